"""Training steps of packed rows, side by side with a row a sample: ``uv run python benchmarks/packed_attention.py``.

Unpacked: each sample has a row of its own, and a batch is as long as its longest sample; padding is no target. Packed:
the same samples, best fit into rows of a fixed length, with attention within each sample. Both ways take the same
samples in the same number of steps. There are clips of 2 to 8 s, whose lengths differ widely, and of 13 to 15 s, whose
lengths hardly do; a second has 50 ids. One model with random weights serves both, on random ids, with fused AdamW; on a
GPU weights and AdamW are in bf16 too.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import harness
import torch
from models import Rows, fill_rows, make_train_step, num_ids

from torchtitan.datasets.packing import best_fit_decreasing
from torchtitan.models.llama3.args import Llama3Args

CLIPS = {"2 to 8 s": (2, 8), "13 to 15 s": (13, 15)}
IDS_PER_SECOND = 50

Batches = dict[str, list[tuple[torch.Tensor, ...]]]  # by way, the arguments of each step


@dataclass
class Options:
    """Sizes of the model and of a step."""

    dim: int = 256
    """Width; heads are 64 wide, a fourth of them for keys and values."""
    layers: int = 4
    vocabulary: int = 8192
    rows: int = 1
    """Packed rows a step; unpacked, a step has as many rows as these hold samples on average."""
    seq_len: int = 8192
    """Length of packed rows in ids."""
    steps: int = 3
    """Steps of a turn."""
    turns: int = 2
    """Times that the two run in turn, after a step of each that is not measured."""
    device: str = "auto"
    """Where to run: auto is the GPU if there is one."""

    def args(self) -> Llama3Args:
        """The sizes of the model."""
        heads, hidden = self.dim // 64, self.dim * 8 // 3
        return Llama3Args(self.vocabulary, self.dim, self.layers, heads, max(1, heads // 4), 64, hidden)


def draw_rows(options: Options, seconds: tuple[int, int], seed: int) -> Rows:
    """The samples of a turn by packed row: random clips, as many as the rows of its steps hold."""
    generator = torch.Generator().manual_seed(seed)
    shortest, longest = (IDS_PER_SECOND * s for s in seconds)
    lengths: list[int] = []
    while len(best_fit_decreasing(lengths, options.seq_len)) <= options.rows * options.steps:
        lengths += torch.randint(shortest, longest + 1, (1,), generator=generator).tolist()
    rows = best_fit_decreasing(lengths[:-1], options.seq_len)
    return [[torch.randint(options.vocabulary, (lengths[i],), generator=generator) for i in row] for row in rows]


def make_batches(options: Options, rows: Rows) -> Batches:
    """The steps of a turn on the same samples: unpacked (tokens and targets) and packed (with positions)."""
    samples = [sample for row in rows for sample in row]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(len(samples))).tolist()
    unpacked = []
    for step in range(options.steps):
        batch = [[samples[i]] for i in order[step :: options.steps]]
        longest = max(sample.numel() for (sample,) in batch)
        unpacked.append(fill_rows(batch, -(-longest // 32) * 32)[:2])
    packed = [fill_rows(rows[step :: options.steps], options.seq_len) for step in range(options.steps)]
    return {"unpacked": unpacked, "packed": packed}


def compare(options: Options, device: torch.device, step: Any, seconds: tuple[int, int]) -> dict[str, Any]:
    """Medians of the real tokens a second of both ways and of their ratio, and their shares of padding."""
    for batches in make_batches(options, draw_rows(options, seconds, 0)).values():
        step(*batches[0])
    speeds: dict[str, list[float]] = {"unpacked": [], "packed": []}
    real, computed = 0, {"unpacked": 0, "packed": 0}
    for turn in range(1, options.turns + 1):
        rows = draw_rows(options, seconds, turn)
        real += num_ids(rows)
        for name, batches in make_batches(options, rows).items():
            taken = harness.seconds_of(lambda batches=batches: [step(*batch) for batch in batches], device)
            speeds[name].append(num_ids(rows) / taken)
            computed[name] += sum(batch[0].numel() for batch in batches)
    return {
        "real_tokens_per_second": harness.medians(speeds),
        "speed_ratio": statistics.median(p / u for p, u in zip(speeds["packed"], speeds["unpacked"], strict=True)),
        "padding_share": {name: 1 - real / positions for name, positions in computed.items()},
        "positions_ratio": computed["unpacked"] / computed["packed"],
    }


def main(options: Options) -> None:
    """Run both kinds of clips and print the figures as JSON."""
    device = harness.find_device(options.device)
    step = make_train_step(options.args(), device, options.seq_len)
    figures = {clips: compare(options, device, step, seconds) for clips, seconds in CLIPS.items()}
    harness.report(figures, options, device)


if __name__ == "__main__":
    harness.run(main, Options, __doc__)
