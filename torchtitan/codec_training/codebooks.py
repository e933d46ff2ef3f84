"""k-means, and codebooks fitted to latents."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from torchtitan.audio.token_stream import CODEBOOK_SIZE


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The number of the nearest centroid [K, D] to each point [N, D]: int64 [N]."""
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in points.split(16_384)])


def k_means(
    points: torch.Tensor,
    clusters: int,
    generator: torch.Generator,
    rounds: int = 20,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Centroids [clusters, D] of points [N, D]. A centroid without points starts again at a random point.

    Args:
        start: centroids to go on from; random points by default.
    """
    if start is None:
        picks = torch.randint(len(points), (clusters,), generator=generator)
        if len(points) >= clusters:
            picks = torch.randperm(len(points), generator=generator)[:clusters]
        start = points[picks.to(points.device)]
    centroids = start.clone()
    for _ in range(rounds):
        chosen = nearest(points, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, chosen, points)
        counts = torch.bincount(chosen, minlength=clusters)
        spare = points[torch.randint(len(points), (clusters,), generator=generator).to(points.device)]
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), spare)
    return centroids


def farthest(points: torch.Tensor, entries: torch.Tensor, count: int) -> torch.Tensor:
    """Further entries [count, D]: each goes to the point [N, D] that is then farthest from all entries [K, D].

    As in the greedy k-center method (Gonzalez, 1985), but an entry lies beyond its point, by 0.3 of the point's
    distance to the nearest given entry. So it is nearest to its point and to few others.
    """
    distances, chosen = torch.cdist(points, entries).min(1)
    nearest_entries = entries[chosen]
    picked = []
    for _ in range(count):
        place = distances.argmax()
        picked.append(points[place] + 0.3 * (points[place] - nearest_entries[place]))
        distances = torch.minimum(distances, (points - picked[-1]).norm(dim=1))
        distances[place] = 0
    return torch.stack(picked) if picked else entries[:0]


@torch.no_grad()
def fit_codebooks(halves: Sequence[Any], latents: torch.Tensor, seed: int, rounds: int, anew: bool) -> None:
    """Fit all codebooks by residual k-means, from the present entries on or anew.

    Args:
        halves: the semantic and the acoustic residual quantizer.
        latents: [2, N, codebook_dim], of the two halves.
        rounds: of k-means.
    """
    generator = torch.Generator().manual_seed(seed)
    for half, residual in zip(halves, latents, strict=True):
        for layer in half.layers:
            start = None if anew else layer.codebook.embed
            entries = set_codebook(layer.codebook, k_means(residual, CODEBOOK_SIZE, generator, rounds, start))
            residual = residual - entries[nearest(residual, entries)]


@torch.no_grad()
def fit_common_and_rare(
    halves: Sequence[Any], own: torch.Tensor, other: torch.Tensor, common: Sequence[int], rare: int, seed: int
) -> None:
    """Fit all codebooks so that their first entries are common and the others rare (see Options.common_entries).

    Args:
        own, other: latents [2, N, codebook_dim] of the target domain and [2, M, codebook_dim] of other speech. The
            common entries are fitted to the first; the rare ones lie at latents of the first, then of both.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = iter(common)
    for half, residual, spare in zip(halves, own, other, strict=True):
        for layer in tqdm(half.layers, "codebooks", mininterval=5):
            entries = k_means(residual, next(sizes), generator)
            entries = torch.cat([entries, farthest(residual, entries, min(rare, CODEBOOK_SIZE - len(entries)))])
            both = torch.cat([spare, residual])
            entries = torch.cat([entries, farthest(both, entries, CODEBOOK_SIZE - len(entries))])
            entries = set_codebook(layer.codebook, entries)
            residual, spare = (part - entries[nearest(part, entries)] for part in (residual, spare))


def set_codebook(codebook: Any, entries: torch.Tensor) -> torch.Tensor:
    """Give a codebook these entries [2048, D], and return them as float16 holds them."""
    entries = entries.half().float()
    codebook.embed_sum.copy_(entries)
    codebook.cluster_usage.fill_(1.0)
    codebook._embed = None  # the cached quotient of the two
    return entries


def without_speaker(clips: list[torch.Tensor], directions: int) -> torch.Tensor:
    """The matrix [D, D] that removes the differences between clips from latents (columns).

    Latents are whitened by their covariance within clips; the leading principal components of the clips' means are
    removed, and the whitening is undone. What stays the same throughout a clip is mostly the speaker.

    Args:
        clips: latents [frames, D] of each clip.
        directions: number of components, at most D - 1.
    """
    means = torch.stack([clip.mean(0) for clip in clips])
    within = torch.cov(torch.cat([clip - mean for clip, mean in zip(clips, means, strict=True)]).T)
    values, vectors = torch.linalg.eigh(within)
    # Directions that were removed before hold only rounding errors.
    alive = values > 1e-4 * values.max()
    if not alive.any():
        return torch.eye(len(values), device=means.device)
    values, vectors = values[alive], vectors[:, alive]
    whiten, colour = (vectors @ torch.diag(values**power) for power in (-0.5, 0.5))
    _, components = torch.linalg.eigh(torch.cov((means @ whiten).T))
    leading = components[:, max(0, len(values) - directions) :]
    return torch.eye(len(means[0]), device=means.device) - colour @ leading @ leading.T @ whiten.T
