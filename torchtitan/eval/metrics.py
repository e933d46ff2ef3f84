"""Accuracies from a samples table: the scoring rule, the pairs that count, and the standard error.

This module needs no model. The table has the negative log-likelihood (NLL) of each target of each clip. A
:class:`Rule` turns them into one score per clip. A pair is right if the positive clip has the lower score.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch

from torchtitan.audio.token_stream import TokenStream
from torchtitan.eval.statistics import standard_error, wilson_interval
from torchtitan.tools.errors import UserError

SIDES = ("positive", "negative")
FRAME_MS = 80.0

Targets = Literal["all", "semantic", "acoustic"]


class MetricsError(UserError):
    """A figure cannot be computed from this samples table."""


@dataclass(frozen=True)
class Rule:
    """How a clip's NLLs become its score, and what a tie counts. The defaults are the original's, except for ties.

    Attributes:
        targets: ``all`` (``<audio>`` and all audio tokens), ``semantic`` (tokens of quantizer 0), ``acoustic`` (tokens
            of the other quantizers), or ``q0``, ``q1``, ... for the tokens of one quantizer.
        audio_end: whether ``</audio>`` is also scored.
        reduction: ``mean`` over these targets, or their ``sum``, which makes longer clips worse.
        ties: a tie counts ``half`` a point, or as ``wrong``, as in the original.
        window_ms: localized likelihood (arXiv 2601.06329): score only targets within this many milliseconds from the
            first frame on in which the pair's codes differ. ``</audio>`` counts as the frame after the last one.
    """

    targets: str = "all"
    audio_end: bool = True
    reduction: Literal["mean", "sum"] = "mean"
    ties: Literal["half", "wrong"] = "half"
    window_ms: float | None = None

    def __post_init__(self):
        number = self.targets.removeprefix("q")
        if self.targets not in get_args(Targets) and not (self.targets.startswith("q") and number.isdecimal()):
            raise UserError(f'targets must be all, semantic, acoustic or q0, q1, ..., not "{self.targets}".')
        for name, value, choices in (("reduction", self.reduction, "mean sum"), ("ties", self.ties, "half wrong")):
            if value not in choices.split():
                raise UserError(f'{name} must be {" or ".join(choices.split())}, not "{value}".')
        if self.window_ms is not None and not 0 < self.window_ms < math.inf:
            raise UserError(f"window_ms must be above 0, not {self.window_ms}.")

    def check(self, quantizers: int) -> None:
        """Raise MetricsError if the rule needs a quantizer that does not exist."""
        if self.targets.startswith("q") and int(self.targets[1:]) >= quantizers:
            raise MetricsError(f"targets {self.targets}: there are {quantizers} quantizers, q0 to q{quantizers - 1}.")

    def mask(self, ids: torch.Tensor, stream: TokenStream) -> torch.Tensor:
        """True at the ids that are scored, in the shape of ``ids``, which may be any part of a sample."""
        quantizers = stream.quantizer_of(ids)
        if self.targets == "all":
            mask = stream.is_unit(ids) | (ids == stream.audio_start_id)
        elif self.targets == "acoustic":
            mask = quantizers > 0
        else:
            mask = quantizers == (0 if self.targets == "semantic" else int(self.targets[1:]))
        return mask | (ids == stream.audio_end_id) if self.audio_end else mask

    def frames(self) -> int | None:
        """The length of the window in frames, at least 1; None without a window."""
        return None if self.window_ms is None else max(1, round(self.window_ms / FRAME_MS))

    def describe(self) -> dict[str, str]:
        """The rule in words, for results.json."""
        meaning = {"all": "<audio>, all units", "semantic": "units of quantizer 0", "acoustic": "units but quantizer 0"}
        targets = meaning.get(self.targets, f"units of quantizer {self.targets[1:]}")
        ties = {"half": "one half (the original evaluation counts it as wrong)", "wrong": "as wrong"}[self.ties]
        described = {
            "score": f"{self.reduction} negative log-likelihood in nats, lower is better",
            "targets": f"{self.targets} ({targets}{', </audio>' if self.audio_end else ''})",
            "ties": f"a tie counts {ties}",
        }
        if self.window_ms is not None:
            described["window"] = f"{self.window_ms:g} ms from where the pair's codes first differ"
        return described


@dataclass(frozen=True)
class TaskResult:
    """One task's figures.

    Attributes:
        accuracy: share of right pairs, 0 to 1; None if no pair counts.
        standard_error: standard error of the accuracy; None for fewer than two pairs.
        interval: Wilson's 95 % interval of the accuracy; None if no pair counts.
        pairs: number of pairs that count.
        ties: number of these with equal scores.
        identical_pairs: number of these whose clips have the same codes; None if the table has no codes.
        left_out: pairs that do not count, each with its ``pair``, ``item`` and ``reason``.
        cut_clips: number of clips cut at the time limit.
        context_cut_clips: number of clips cut at the model's context.
        zerospeech: the figures by ZeroSpeech's rules (:func:`zerospeech`); None if the data have no voices.
    """

    accuracy: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    pairs: int
    ties: int
    identical_pairs: int | None
    left_out: list[dict[str, Any]]
    cut_clips: int
    context_cut_clips: int
    zerospeech: dict[str, Any] | None = None


def num_quantizers(samples: Any) -> int:
    """Q of a samples table, from its metadata."""
    return json.loads(samples.schema.metadata[b"num_quantizers"])


def clip_scores(samples: Any, rule: Rule) -> np.ndarray:
    """The score of each row of a samples table: float64 [rows]; NaN for a row without scored NLLs.

    Raises:
        MetricsError: the NLLs of a row do not fit its number of frames, or the rule needs a quantizer or codes that the
            table does not have.
    """
    quantizers = num_quantizers(samples)
    rule.check(quantizers)
    # The stored NLLs are those of <audio>, the audio tokens and </audio>. Any base size gives the same mask.
    stream = TokenStream(base_size=1, num_quantizers=quantizers, bos_id=0)
    masks: dict[int, np.ndarray] = {}
    begins, width = _window_begins(samples) if rule.window_ms is not None else None, rule.frames()
    scores = np.full(samples.num_rows, np.nan)
    for row, (frames, nll) in enumerate(zip(samples["frames"].to_pylist(), _lists(samples["nll"]), strict=True)):
        if not len(nll):
            continue
        if frames not in masks:
            targets = stream.sample(torch.zeros(quantizers, frames))[1:]
            masks[frames] = rule.mask(targets, stream).numpy()
        mask = masks[frames]
        if len(nll) != len(mask):
            raise MetricsError(f"row {row} has {len(nll)} NLLs, but its {frames} frames need {len(mask)}.")
        if begins is not None and width is not None:
            # Target 0 is <audio>; the targets of frame t begin at 1 + t * Q.
            inside = np.zeros_like(mask)
            first = 1 + begins[row] * quantizers
            inside[first : first + width * quantizers] = True
            mask = mask & inside
        counted = nll[mask].astype(np.float64)
        if len(counted):
            scores[row] = counted.mean() if rule.reduction == "mean" else counted.sum()
    return scores


def first_differences(samples: Any) -> dict[tuple[str, int], int | None]:
    """The first frame in which a pair's codes differ, by task and pair; None if they are the same.

    If one clip is the beginning of the other, it is the frame after the end of the shorter one. Pairs with an
    unreadable clip are left out.

    Raises:
        MetricsError: the table has no codes.
    """
    if "codes" not in samples.column_names:
        raise MetricsError("the samples have no codes, so it is not known where the clips of a pair differ.")
    quantizers = num_quantizers(samples)
    keys = zip(samples["task"].to_pylist(), samples["pair"].to_pylist(), samples["side"].to_pylist(), strict=True)
    pairs: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for (task, pair, side), codes in zip(keys, _lists(samples["codes"]), strict=True):
        if len(codes):
            pairs.setdefault((task, pair), {})[side] = codes.reshape(-1, quantizers)
    found: dict[tuple[str, int], int | None] = {}
    for key, sides in pairs.items():
        if len(sides) < len(SIDES):
            continue
        positive, negative = (sides[side] for side in SIDES)
        common = min(len(positive), len(negative))
        differs = (positive[:common] != negative[:common]).any(axis=1)
        if differs.any():
            found[key] = int(differs.argmax())
        else:
            found[key] = None if len(positive) == len(negative) else common
    return found


def _window_begins(samples: Any) -> list[int]:
    """For each row, the first frame of its pair's window; 0 if the clips are the same, or one is missing."""
    begins = first_differences(samples)
    keys = zip(samples["task"].to_pylist(), samples["pair"].to_pylist(), strict=True)
    return [begins.get(key) or 0 for key in keys]


@dataclass(frozen=True)
class PairPoint:
    """The points of a pair (1 right, 0 wrong, between for a tie), or the reason why it is left out."""

    pair: int
    item: str
    point: float | None
    tie: bool
    reason: str | None


def pair_points(samples: Any, rule: Rule) -> dict[str, list[PairPoint]]:
    """The points of each task's pairs, in the order of their numbers.

    A pair counts if both clips were readable and both scores are finite.

    Raises:
        MetricsError: see :func:`clip_scores`.
    """
    clips = samples.select(["task", "pair", "side", "item", "error"]).to_pylist()
    tasks: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for clip, value in zip(clips, clip_scores(samples, rule), strict=True):
        sides = tasks.setdefault(clip["task"], {}).setdefault(clip["pair"], {})
        sides[clip["side"]] = {**clip, "score": float(value)}
    return {name: [_point(pair, sides, rule) for pair, sides in sorted(pairs.items())] for name, pairs in tasks.items()}


def _point(pair: int, sides: dict[str, dict[str, Any]], rule: Rule) -> PairPoint:
    item = next(iter(sides.values()))["item"]
    if reason := _reason_to_leave_out(sides):
        return PairPoint(pair, item, None, False, reason)
    positive, negative = (sides[side]["score"] for side in SIDES)
    tie = positive == negative
    tied = 0.5 if rule.ties == "half" else 0.0
    return PairPoint(pair, item, tied if tie else float(positive < negative), tie, None)


def judge(samples: Any, rule: Rule) -> dict[str, TaskResult]:
    """The result of each task in a samples table (see torchtitan/eval/results.py), in the table's order.

    Raises:
        MetricsError: see :func:`clip_scores`.
    """
    columns = samples.select(["task", "cut", "context_cut"]).to_pylist()
    same = first_differences(samples) if "codes" in samples.column_names else None
    by_zerospeech = zerospeech(samples, rule)
    results = {}
    for name, found in pair_points(samples, rule).items():
        points = [pair.point for pair in found if pair.point is not None]
        accuracy = sum(points) / len(points) if points else None
        clips = [clip for clip in columns if clip["task"] == name]
        identical = None
        if same is not None:
            identical = sum(pair.point is not None and same.get((name, pair.pair), 0) is None for pair in found)
        results[name] = TaskResult(
            accuracy=accuracy,
            standard_error=standard_error(points),
            interval=None if accuracy is None else wilson_interval(accuracy, len(points)),
            pairs=len(points),
            ties=sum(pair.tie for pair in found),
            identical_pairs=identical,
            left_out=[
                {"pair": pair.pair, "item": pair.item, "reason": pair.reason} for pair in found if pair.point is None
            ],
            cut_clips=sum(clip["cut"] > clip["context_cut"] for clip in clips),
            context_cut_clips=sum(clip["context_cut"] > 0 for clip in clips),
            zerospeech=by_zerospeech.get(name),
        )
    return results


def averages(results: dict[str, TaskResult]) -> dict[str, dict[str, Any]]:
    """Averages over all tasks, and over those whose names end in ``_consistency`` and in ``_alignment``.

    Each has the ``mean`` of the tasks' accuracies, the ``pooled`` accuracy of all their pairs, and the standard errors
    of both. Tasks in which no pair counts are left out.
    """
    counted = {name: result for name, result in results.items() if result.accuracy is not None}
    groups = {
        "all": counted,
        **{
            ending: {name: result for name, result in counted.items() if name.endswith(f"_{ending}")}
            for ending in ("consistency", "alignment")
        },
    }
    found = {}
    for group, members in groups.items():
        if len(members) < 2:
            continue
        errors = [result.standard_error for result in members.values()]
        pairs = np.array([result.pairs for result in members.values()])
        accuracies = np.array([result.accuracy for result in members.values()], dtype=np.float64)
        squares = None if None in errors else np.square(np.array(errors, dtype=np.float64))
        found[group] = {
            "tasks": len(members),
            "pairs": int(pairs.sum()),
            "mean": float(accuracies.mean()),
            "standard_error": None if squares is None else float(np.sqrt(squares.sum())) / len(members),
            "pooled": float((accuracies * pairs).sum() / pairs.sum()),
            "pooled_standard_error": None
            if squares is None
            else float(np.sqrt((squares * pairs**2).sum()) / pairs.sum()),
        }
    return found


def quantizer_losses(samples: Any) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The negative log-likelihood in nats of each quantizer's tokens, by task and side, from quantizer 0 on.

    All frames count, whatever the rule. A pair with an unreadable clip or with an NLL that is not finite is left out.

    Returns:
        for each quantizer the number of ``clips`` and ``frames``, the ``mean`` over clips of each clip's mean, the
        ``pooled`` mean over all frames, and the standard errors of both. The pooled one is that of a ratio estimator,
        since clips are independent but frames are not. Means are None without clips, errors below two clips.

    Raises:
        MetricsError: the NLLs of a row do not fit its number of frames.
    """
    quantizers = num_quantizers(samples)
    points = pair_points(samples, Rule())
    counted = {(task, pair.pair) for task, pairs in points.items() for pair in pairs if pair.point is not None}
    clips: dict[str, dict[str, list[np.ndarray]]] = {task: {side: [] for side in SIDES} for task in points}
    rows = samples.select(["task", "pair", "side", "frames"]).to_pylist()
    for row, nll in zip(rows, _lists(samples["nll"]), strict=True):
        if (row["task"], row["pair"]) in counted and row["frames"]:
            # All targets except <audio> and </audio>, as [Q, T].
            clips[row["task"]][row["side"]].append(nll[1:-1].astype(np.float64).reshape(-1, quantizers).T)
    return {
        task: {side: [_loss([clip[q] for clip in found]) for q in range(quantizers)] for side, found in sides.items()}
        for task, sides in clips.items()
    }


def _loss(clips: list[np.ndarray]) -> dict[str, Any]:
    """The figures of one quantizer from its NLLs, which are an array [T] per clip."""
    frames = np.array([len(clip) for clip in clips], dtype=np.int64)
    figures: dict[str, Any] = {"clips": len(clips), "frames": int(frames.sum())}
    if not clips:
        return figures | dict.fromkeys(("mean", "standard_error", "pooled", "pooled_standard_error"))
    means = np.array([clip.mean() for clip in clips])
    pooled = (means * frames).sum() / frames.sum()
    # The influence of each clip on the pooled mean; the sum over all clips is 0.
    added = (means - pooled) * frames / frames.mean()
    return figures | {
        "mean": float(means.mean()),
        "standard_error": standard_error(means.tolist()),
        "pooled": float(pooled),
        "pooled_standard_error": standard_error(added.tolist()),
    }


# Frequency bands of ZeroSpeech 2021: how often a word occurs in LibriSpeech. A band begins with its number and ends
# below the next one. The names are the challenge's, although its program puts 5 into the band 6-20.
FREQUENCY_BANDS = {0: "oov", 1: "1-5", 5: "6-20", 20: "21-100", 100: ">100"}


def zerospeech(samples: Any, rule: Rule) -> dict[str, dict[str, Any]]:
    """Figures by the rules of ZeroSpeech 2021 (arXiv 2011.11588), for tasks whose data have a ``voice`` column.

    The points of an item are averaged over its voices, and then over all items. Pairs with the same ``item`` (and the
    same type and subtype, if there are such columns) are one item.

    Returns:
        for each task ``accuracy``, ``standard_error`` (over items) and ``items``. If the data have the columns, also
        ``in_vocabulary``, ``by_frequency``, ``by_length``, ``by_type`` and ``by_subtype`` with the same figures per
        group.
    """
    if "voice" not in samples.column_names:
        return {}
    facts = [name for name in ("voice", "type", "subtype", "frequency", "length") if name in samples.column_names]
    rows = samples.select(["task", "pair", *facts]).to_pylist()
    about = {(row["task"], row["pair"]): row for row in rows}
    found = {}
    for task, points in pair_points(samples, rule).items():
        items: dict[tuple[Any, ...], list[float]] = {}
        first: dict[tuple[Any, ...], dict[str, Any]] = {}
        for pair in points:
            row = about[task, pair.pair]
            if pair.point is None or row["voice"] is None:
                continue
            key = (row.get("type"), row.get("subtype"), pair.item)
            items.setdefault(key, []).append(pair.point)
            first.setdefault(key, row)
        if not items:
            continue
        means = {key: sum(voices) / len(voices) for key, voices in items.items()}

        def group(label: Callable[[dict[str, Any]], Any], means=means, first=first) -> dict[str, Any]:
            groups: dict[Any, list[float]] = {}
            for key, mean in means.items():
                if (name := label(first[key])) is not None:
                    groups.setdefault(name, []).append(mean)
            return {str(name): _share(groups[name]) for name in sorted(groups, key=str)}

        found[task] = {**_share(list(means.values()))}
        if "frequency" in facts:
            bands = group(lambda row: _frequency_band(row["frequency"]))
            found[task]["by_frequency"] = {name: bands[name] for name in FREQUENCY_BANDS.values() if name in bands}
            known = [
                mean for key, mean in means.items() if _frequency_band(first[key]["frequency"]) not in (None, "oov")
            ]
            found[task]["in_vocabulary"] = _share(known) if known else None
        for column in ("length", "type", "subtype"):
            if column in facts and (groups := group(lambda row, column=column: row[column])):
                found[task][f"by_{column}"] = groups
    return found


def _share(points: list[float]) -> dict[str, Any]:
    return {"accuracy": sum(points) / len(points), "standard_error": standard_error(points), "items": len(points)}


def _frequency_band(frequency: Any) -> str | None:
    """The frequency band of a count, which may be a text; ``oov`` is a count of 0. None if it is unknown."""
    if isinstance(frequency, str):
        if frequency.strip().lower() == "oov":
            return "oov"
        try:
            frequency = float(frequency)
        except ValueError:
            return None
    if frequency is None or not frequency >= 0:
        return None
    return next(name for low, name in reversed(FREQUENCY_BANDS.items()) if frequency >= low)


def _reason_to_leave_out(sides: dict[str, dict[str, Any]]) -> str | None:
    reasons = []
    for side in SIDES:
        if side not in sides:
            reasons.append(f"there is no {side} clip")
        elif sides[side]["error"]:
            reasons.append(sides[side]["error"])
        elif not math.isfinite(sides[side]["score"]):
            reasons.append(f"the {side} clip's score is {sides[side]['score']}")
    return "; ".join(reason.rstrip(".") for reason in reasons) or None


def _lists(column: Any) -> Iterator[np.ndarray]:
    """The rows of a list column, as numpy views."""
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy()
        for start, end in pairwise(offsets):
            yield values[start:end]
