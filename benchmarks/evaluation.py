"""Pairs of clips a second here, side by side with the plain way: ``uv run python benchmarks/evaluation.py``.

Plain: one clip at a time through transformers' MimiModel.encode and LlamaForCausalLM, whole logits, log-softmax and
gather. Ours: eval/salmon.py's score_task, with no codes kept before, and again with the codes of the first time. All
read the same parquet file in fp32 on a CPU, in bf16 (the codec in fp32) on a GPU, and how far their scores are apart is
printed. The codec has kyutai/mimi's size, the language model that of --size, both with random weights. The pairs are
those of --dataset, or 2 to 12 s of the repository's prompt, repeated. The two run in turn in processes of their own,
and the best time of each counts; loading and a first pair are not counted.
"""

import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import harness
import numpy as np
import torch
from models import QUANTIZERS, VOCABULARY, make_speech_model

from torchtitan.audio.codec import no_tf32


@dataclass
class Options:
    """What to measure."""

    size: Literal["small", "mid", "1.3B"] = "small"
    """Size of the language model."""
    vocabulary: int = VOCABULARY
    """Number of its ids; the last 8,194 are those of audio."""
    pairs: int = 12
    """Pairs of clips."""
    shared: float = 0.0
    """Share of the shorter clip of a pair with which both clips begin."""
    dataset: str | None = None
    """A task's folder in SALMon's layout, to take the first pairs of it instead."""
    batch_size: int = 16
    """Ours: clips in one forward pass."""
    turns: int = 2
    """Times that the ways run in turn."""


class Timed(NamedTuple):
    """Seconds, seconds for which the processors were busy, and the NLLs of each clip."""

    seconds: float
    busy: float
    nlls: list[np.ndarray]


def make_task(folder: Path, pairs: int, shared: float) -> Path:
    """A task in SALMon's layout; both clips of a pair begin alike, for a share of the shorter one."""
    lengths = random.Random(0)
    columns: dict[str, list[torch.Tensor]] = {"positive_audio": [], "negative_audio": []}
    for number in range(pairs):
        seconds = [lengths.uniform(2, 12) for _ in columns]
        begin = harness.speech(number / 20, shared * min(seconds))
        for i, (clips, length) in enumerate(zip(columns.values(), seconds, strict=True)):
            own = harness.speech(number / 20 + (i + 1) / 40, length - len(begin) / harness.SPEECH_RATE)
            clips.append(torch.cat((begin, own)))
    harness.write_audio_table(folder / "train.parquet", columns, harness.SPEECH_RATE)
    return folder


@torch.no_grad()
def plain_nlls(lm: Any, waveforms: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The NLLs of each clip [n], one clip at a time."""
    found = []
    for waveform in waveforms:
        with no_tf32(lm.device):  # as codes need it
            encoded: Any = lm.codec.model.encode(waveform[None, None].to(lm.device), num_quantizers=QUANTIZERS)
        ids = lm.stream.sample(encoded.audio_codes[0].cpu()).to(lm.device)
        logits = lm.model(input_ids=ids[None]).logits[0].float()
        found.append(-torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None])[:, 0].cpu())
    return found


def measure(way: str, options: Options, folder: str) -> dict[str, Timed]:
    """Time one way, or the two of ours, in a process of its own."""
    from torchtitan.audio.waveform import load_audio
    from torchtitan.eval.benchmark import score_task
    from torchtitan.eval.data import open_tasks
    from torchtitan.eval.store import ArrayStore
    from torchtitan.eval.suites import SALMON
    from torchtitan.tools.memory import tune_malloc

    if way == "ours":
        tune_malloc()  # as eval/*.py do
    device = harness.find_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = make_speech_model(options.size, options.vocabulary, dtype, device)
    (task,), _ = open_tasks(folder, SALMON.tasks, SALMON.columns, True)

    def nlls(pairs: int, cache: ArrayStore) -> list[torch.Tensor]:
        if way == "plain":
            rows = task.pairs(pairs)
            return plain_nlls(lm, (load_audio(row[column]["bytes"]) for row in rows for column in task.columns))
        clips = score_task(SALMON, task, lm, options.batch_size, limit=pairs, cache=cache)
        return [clip.nll for clip in clips if clip.nll is not None]

    found: dict[str, Timed] = {}
    with tempfile.TemporaryDirectory() as temporary:
        nlls(1, ArrayStore(Path(temporary) / "warm-up"))
        cache = ArrayStore(Path(temporary) / "measured")
        for name in ("plain",) if way == "plain" else ("ours", "ours, codes kept"):
            begin, busy = time.perf_counter(), time.process_time()
            scores = [nll.numpy() for nll in nlls(options.pairs, cache)]
            found[name] = Timed(time.perf_counter() - begin, time.process_time() - busy, scores)
    return found


def main(options: Options) -> None:
    """Run the ways in turn and print the best speeds and their ratios as JSON."""
    from torchtitan.eval.suites import SALMON

    def progress(found: dict[str, Timed]) -> str:
        return "; ".join(
            f"{name} {options.pairs / timed.seconds:.2f} pairs/s, {timed.busy:.1f} s of processors"
            for name, timed in found.items()
        )

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dataset or make_task(Path(temporary) / SALMON.tasks[0], options.pairs, options.shared)
        ways = {
            way: lambda way=way: harness.in_processes(measure, (way, options, str(folder)))[0]
            for way in ("plain", "ours")
        }
        turns = harness.in_turns(ways, options.turns, progress)
    times = {name: [found[name] for found in all_found] for all_found in turns.values() for name in all_found[0]}
    speeds = {name: options.pairs / min(timed.seconds for timed in found) for name, found in times.items()}
    busy = {name: min(timed.busy for timed in found) for name, found in times.items()}
    others = [name for name in times if name != "plain"]
    distances = [
        float(abs(one - other).max())
        for name in others
        for one, other in zip(times["plain"][-1].nlls, times[name][-1].nlls, strict=True)
    ]
    figures = {
        "pairs_per_second": speeds,
        "ratios": harness.over(speeds, "plain"),
        "processor_seconds": busy,
        "processor_ratios": {name: busy["plain"] / busy[name] for name in others},
        "furthest_scores": max(distances),
    }
    harness.report(figures, options)


if __name__ == "__main__":
    harness.run(main, Options, __doc__)
