"""Accuracies from a samples table: which rule, which pairs count, and how sure the figure is.

Nothing here knows a model. The table holds the negative log-likelihood (NLL) of each target of each clip; a
:class:`Rule` makes one score of them, and a pair is right when the positive clip's score is the lower one.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from torchtitan.audio.token_stream import TokenStream

SIDES = ("positive", "negative")
TIES = "a tie counts one half (the original evaluation counts it as wrong)"


@dataclass(frozen=True)
class Rule:
    """How a clip's NLLs become its score: their mean over some of the targets.

    Attributes:
        targets: ``all`` (``<audio>``, every unit, ``</audio>``) or ``semantic`` (the units of quantizer 0 and
            ``</audio>``).
    """

    targets: Literal["all", "semantic"]

    def mask(self, ids: torch.Tensor, stream: TokenStream) -> torch.Tensor:
        """True at the ids that count; same shape as ``ids``, which may be any part of a sample, with or without BOS."""
        semantic = (stream.quantizer_of(ids) == 0) | (ids == stream.audio_end_id)
        if self.targets == "semantic":
            return semantic
        return semantic | stream.is_unit(ids) | (ids == stream.audio_start_id)

    def describe(self) -> dict[str, str]:
        """The rule in words, for what is saved."""
        meaning = {"all": "<audio>, all units, </audio>", "semantic": "units of quantizer 0, </audio>"}
        return {
            "score": "mean negative log-likelihood in nats, lower is better",
            "targets": f"{self.targets} ({meaning[self.targets]})",
            "ties": TIES,
        }


@dataclass(frozen=True)
class TaskResult:
    """One task's figures.

    Attributes:
        accuracy: share of right pairs, 0 to 1; None without any pair.
        standard_error: sample standard deviation of the pairs' points over the root of their number; None below two.
        pairs: number of pairs in the accuracy.
        ties: pairs of these with equal scores, half a point each.
        left_out: pairs that are not in the accuracy, each with its ``pair``, ``item`` and ``reason``.
        cut_clips: clips cut at the time limit.
        context_cut_clips: clips that lost frames to the model's context.
    """

    accuracy: float | None
    standard_error: float | None
    pairs: int
    ties: int
    left_out: list[dict[str, Any]]
    cut_clips: int
    context_cut_clips: int


def num_quantizers(samples: Any) -> int:
    """Q of a samples table, from its metadata."""
    return json.loads(samples.schema.metadata[b"num_quantizers"])


def clip_scores(samples: Any, rule: Rule) -> np.ndarray:
    """The score of each row of a samples table: float64 [rows], NaN for a row without NLLs.

    Raises:
        ValueError: a row has another number of NLLs than its frames ask for.
    """
    # The stored NLLs are those of <audio>, the units and </audio>; any base size gives the same mask.
    stream = TokenStream(base_size=1, num_quantizers=num_quantizers(samples), bos_id=0)
    masks: dict[int, np.ndarray] = {}
    scores = np.full(samples.num_rows, np.nan)
    for row, (frames, nll) in enumerate(zip(samples["frames"].to_pylist(), _lists(samples["nll"]), strict=True)):
        if not len(nll):
            continue
        if frames not in masks:
            targets = stream.sample(torch.zeros(stream.num_quantizers, frames))[1:]
            masks[frames] = rule.mask(targets, stream).numpy()
        if len(nll) != len(masks[frames]):
            raise ValueError(f"row {row} has {len(nll)} NLLs where its {frames} frames ask for {len(masks[frames])}")
        scores[row] = nll[masks[frames]].mean(dtype=np.float64)
    return scores


def judge(samples: Any, rule: Rule) -> dict[str, TaskResult]:
    """The result of each task in a samples table (see torchtitan/eval/results.py), in the table's order.

    A pair counts when both its clips were readable and both scores are finite.
    """
    clips = samples.select(["task", "pair", "side", "item", "error", "cut", "context_cut"]).to_pylist()
    tasks: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for clip, value in zip(clips, clip_scores(samples, rule), strict=True):
        sides = tasks.setdefault(clip["task"], {}).setdefault(clip["pair"], {})
        sides[clip["side"]] = {**clip, "score": float(value)}
    return {name: _judge_task(pairs) for name, pairs in tasks.items()}


def _judge_task(pairs: dict[int, dict[str, dict[str, Any]]]) -> TaskResult:
    points, left_out = [], []
    for pair, sides in sorted(pairs.items()):
        if reason := _reason_to_leave_out(sides):
            left_out.append({"pair": pair, "item": next(iter(sides.values()))["item"], "reason": reason})
            continue
        positive, negative = (sides[side]["score"] for side in SIDES)
        points.append(0.5 if positive == negative else float(positive < negative))
    clips = [clip for sides in pairs.values() for clip in sides.values()]
    deviation = float(np.std(points, ddof=1)) if len(points) > 1 else None
    return TaskResult(
        accuracy=sum(points) / len(points) if points else None,
        standard_error=None if deviation is None else deviation / math.sqrt(len(points)),
        pairs=len(points),
        ties=points.count(0.5),
        left_out=left_out,
        cut_clips=sum(clip["cut"] > clip["context_cut"] for clip in clips),
        context_cut_clips=sum(clip["context_cut"] > 0 for clip in clips),
    )


def _reason_to_leave_out(sides: dict[str, dict[str, Any]]) -> str | None:
    reasons = []
    for side in SIDES:
        if side not in sides:
            reasons.append(f"there is no {side} clip")
        elif sides[side]["error"]:
            reasons.append(sides[side]["error"])
        elif not math.isfinite(sides[side]["score"]):
            reasons.append(f"the {side} clip's score is {sides[side]['score']}")
    return " ".join(reasons) or None


def _lists(column: Any) -> Iterator[np.ndarray]:
    """The rows of a list column as numpy views."""
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy()
        for start, end in pairwise(offsets):
            yield values[start:end]
