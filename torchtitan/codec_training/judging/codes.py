"""Measures of codes: how they are used, and what they say."""

import math

import torch

from torchtitan.audio.token_stream import CODEBOOK_SIZE

# Codes and labels of a clip, int64 [N] each.
Labelled = tuple[torch.Tensor, torch.Tensor]

# Observations that the labels' overall shares may count as for each code.
PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def entropy(counts: torch.Tensor) -> float:
    """Entropy in nats of a distribution, given counts of any shape."""
    shares = counts.flatten().double() / counts.sum()
    return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())


def code_use(codes: torch.Tensor) -> dict[str, float]:
    """How the entries of a codebook are used by these codes [N]: number and share of those used, entropy in nats, and
    perplexity, which is how many entries it would take if all were used alike."""
    counts = torch.bincount(codes, minlength=CODEBOOK_SIZE)
    used, nats = int((counts > 0).sum()), entropy(counts)
    return {"used": used, "share": used / CODEBOOK_SIZE, "entropy": nats, "perplexity": math.exp(nats)}


def information(learned: list[Labelled], tests: list[Labelled]) -> dict[str, float]:
    """How many nats a code says about a label: an estimate from below of their mutual information.

    It is by how much the cross-entropy of the test clips' labels falls when their probabilities are those given the
    code, all counted on other clips (after Barber and Agakov, NIPS 2003). Unlike the mutual information of the counts
    themselves it does not grow with the number of codes: rare codes, of which little is known, say little. It may come
    out slightly below 0.

    For each code the labels' overall shares count as some observations more. How many, every fifth of the clips to
    learn from decides.

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
    # With a boundless prior the code says nothing.
    without, given = code_losses(counts, math.inf, tests), code_losses(counts, prior, tests)
    gains = torch.stack([(a - b).sum() for a, b in zip(without, given, strict=True)])
    lengths = torch.tensor([len(loss) for loss in given])
    nats = gains.sum() / lengths.sum()
    # Of a mean over frames that come in clips.
    error = (gains - nats * lengths).square().sum().sqrt() / lengths.sum()
    at_most = torch.cat(without).mean()
    return {"nats": float(nats), "standard_error": float(error), "at_most": float(at_most)}


def count_pairs(clips: list[Labelled], size: int) -> torch.Tensor:
    """How often each code had each of `size` labels: float64 [2048, size]."""
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
    """Roots of the shares of each entry among a clip's codes [T]: float [2048] of length 1."""
    return (torch.bincount(codes, minlength=CODEBOOK_SIZE).float() / len(codes)).sqrt()
