"""Clusters of points, and the codebooks that are fitted to latents."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from torchtitan.audio.token_stream import CODEBOOK_SIZE


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """For each of the points [N, D] the number of its nearest centroid [K, D]: int64 [N]."""
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in points.split(16_384)])


def k_means(
    points: torch.Tensor,
    clusters: int,
    generator: torch.Generator,
    rounds: int = 20,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Centroids [clusters, D] of points [N, D]. A centroid that no point is nearest to starts again at a random point.

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
    """Further entries [count, D] for the points [N, D] that are farthest from all entries [K, D], one after the other.

    As in the greedy k-center method (Gonzalez, 1985), but an entry lies beyond its point, by 0.3 of the point's
    distance to the nearest of the given entries: so it is the nearest one to its point, and to few others.
    """
    distances, chosen = torch.cdist(points, entries).min(1)
    nearest_entries = entries[chosen]
    picked = []
    for _ in range(count):
        place = distances.argmax()
        entry = points[place] + 0.3 * (points[place] - nearest_entries[place])
        picked.append(entry)
        distances = torch.minimum(distances, (points - entry).norm(dim=1))
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
            rows = k_means(residual, CODEBOOK_SIZE, generator, rounds, start).half().float()
            set_codebook(layer.codebook, rows)
            residual = residual - rows[nearest(residual, rows)]


@torch.no_grad()
def fit_common_and_rare(
    halves: Sequence[Any], own: torch.Tensor, other: torch.Tensor, common: Sequence[int], rare: int, seed: int
) -> None:
    """Codebooks whose first entries are common and whose others are rare (see Options.common_entries).

    Args:
        own, other: latents [2, N, codebook_dim] and [2, M, codebook_dim]; the codebooks are fitted to the first
            and have spare entries for the second.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = iter(common)
    for half, residual, spare in zip(halves, own, other, strict=True):
        for layer in tqdm(half.layers, "codebooks", mininterval=5):
            centroids = k_means(residual, next(sizes), generator)
            rows = torch.cat([centroids, farthest(residual, centroids, min(rare, CODEBOOK_SIZE - len(centroids)))])
            everything = torch.cat([spare, residual])
            rows = torch.cat([rows, farthest(everything, rows, CODEBOOK_SIZE - len(rows))]).half().float()
            set_codebook(layer.codebook, rows)
            residual, spare = residual - rows[nearest(residual, rows)], spare - rows[nearest(spare, rows)]


def set_codebook(codebook: Any, rows: torch.Tensor) -> None:
    """Give a codebook these entries [2048, D]."""
    codebook.embed_sum.copy_(rows)
    codebook.cluster_usage.fill_(1.0)
    codebook._embed = None  # the cached quotient of the two


def without_speaker(clips: list[torch.Tensor], directions: int) -> torch.Tensor:
    """The matrix [D, D] that takes out of latents (columns) what clips differ in.

    Latents are whitened by their covariance within clips; the leading principal components of the clips' means are
    taken out, and the whitening is undone. What is the same throughout a clip is mostly who speaks.

    Args:
        clips: latents [frames, D] of each clip.
        directions: how many components, at most D - 1.
    """
    means = torch.stack([clip.mean(0) for clip in clips])
    within = torch.cov(torch.cat([clip - mean for clip, mean in zip(clips, means, strict=True)]).T)
    values, vectors = torch.linalg.eigh(within)
    # In what was taken out before, nothing varies but rounding errors.
    alive = values > 1e-4 * values.max()
    if not alive.any():
        return torch.eye(len(values), device=means.device)
    values, vectors = values[alive], vectors[:, alive]
    whiten, colour = (vectors @ torch.diag(values**power) for power in (-0.5, 0.5))
    _, components = torch.linalg.eigh(torch.cov((means @ whiten).T))
    leading = components[:, max(0, len(values) - directions) :]
    return torch.eye(len(means[0]), device=means.device) - colour @ leading @ leading.T @ whiten.T
