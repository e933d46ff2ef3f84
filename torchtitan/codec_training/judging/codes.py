"""Measures of codes: how they are used, and how much they tell about voice and sound."""

import math

import torch

from torchtitan.audio.token_stream import CODEBOOK_SIZE

# Codes and labels of a clip, int64 [N] each.
Labelled = tuple[torch.Tensor, torch.Tensor]

# Weights of the prior, as numbers of observations.
PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def entropy(counts: torch.Tensor) -> float:
    """Entropy in nats of a distribution, given counts of any shape."""
    shares = counts.flatten().double() / counts.sum()
    return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())


def code_use(codes: torch.Tensor) -> dict[str, float]:
    """Use of a codebook by codes [N]: number and share of the entries used, entropy in nats, and perplexity."""
    counts = torch.bincount(codes, minlength=CODEBOOK_SIZE)
    used, nats = int((counts > 0).sum()), entropy(counts)
    return {"used": used, "share": used / CODEBOOK_SIZE, "entropy": nats, "perplexity": math.exp(nats)}


def information(learned: list[Labelled], tests: list[Labelled]) -> dict[str, float]:
    """How many nats a code tells about a label: a lower bound of their mutual information, estimated on test clips.

    The bound is the drop in cross-entropy of the test clips' labels from overall probabilities to those given the
    code, both counted on other clips (after Barber and Agakov, NIPS 2003). Unlike the mutual information of the counts
    it does not grow with the number of codes. It may come out slightly below 0.

    The labels' overall shares are the prior for each code; every fifth clip to learn from decides the prior's weight.

    Args:
        learned, tests: for each clip its codes and labels, int64 [N] each.

    Returns:
        nats, their standard_error over test clips, and at_most: the cross-entropy without the code.
    """
    size = 1 + max(int(labels.max()) for _, labels in (*learned, *tests))
    fitting = [clip for i, clip in enumerate(learned) if i % 5] or learned
    counts, judged = count_pairs(fitting, size), learned[::5]
    prior = min(PRIORS, key=lambda prior: sum(float(loss.sum()) for loss in code_losses(counts, prior, judged)))
    counts = count_pairs(learned, size)
    # With an infinite prior the code tells nothing.
    without, given = code_losses(counts, math.inf, tests), code_losses(counts, prior, tests)
    gains = torch.stack([(a - b).sum() for a, b in zip(without, given, strict=True)])
    lengths = torch.tensor([len(loss) for loss in given])
    nats = gains.sum() / lengths.sum()
    # The error of a mean over frames that are clustered in clips.
    error = (gains - nats * lengths).square().sum().sqrt() / lengths.sum()
    at_most = torch.cat(without).mean()
    return {"nats": float(nats), "standard_error": float(error), "at_most": float(at_most)}


def count_pairs(clips: list[Labelled], size: int) -> torch.Tensor:
    """Number of times that each code had each of `size` labels: float64 [2048, size]."""
    codes, labels = (torch.cat(parts) for parts in zip(*clips, strict=True))
    counts = torch.bincount(codes * size + labels, minlength=CODEBOOK_SIZE * size)
    return counts.view(CODEBOOK_SIZE, size).double()


def code_losses(counts: torch.Tensor, prior: float, clips: list[Labelled]) -> list[torch.Tensor]:
    """For each clip the negative log probabilities [N] of its labels, given its codes."""
    overall = (counts.sum(0) + 1) / (counts.sum() + counts.shape[1])
    weight = 1 / (1 + counts.sum(1, keepdim=True) / prior)
    losses = -(counts / (counts.sum(1, keepdim=True) + prior) + weight * overall).log()
    return [losses[codes, labels] for codes, labels in clips]


def histogram(codes: torch.Tensor) -> torch.Tensor:
    """Square roots of the shares of all entries in a clip's codes [T]: float [2048] of norm 1."""
    return (torch.bincount(codes, minlength=CODEBOOK_SIZE).float() / len(codes)).sqrt()
