"""Points to clusters: k-means, and what is far from all of them."""

import torch


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
