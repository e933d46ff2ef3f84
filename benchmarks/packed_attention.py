"""Training steps of packed rows, side by side with a row a sample: ``uv run python benchmarks/packed_attention.py``.

Unpacked: each sample in a row of its own, a batch cut to its longest sample, padding no target. Packed: the same
samples, best fit into rows of a fixed length, attention within each sample. A turn takes the same samples in the same
number of steps both ways. Two kinds of speech: clips of 2 to 8 s, whose lengths differ widely, and of 13 to 15 s, whose
lengths hardly do; 50 ids a second. One model serves both, from random weights, with random ids and fused AdamW; on a
GPU in bf16, weights and AdamW too.
"""

import json
import statistics
import time
from dataclasses import dataclass

import command
import torch

CLIPS = {"2 to 8 s": (2, 8), "13 to 15 s": (13, 15)}
IDS_PER_SECOND = 50


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
    """How often the two are run in turn, after a step of each that is not measured."""
    device: str = "auto"
    """Where to run: auto is the GPU if there is one."""


def draw_rows(options: Options, seconds: tuple[int, int], seed: int) -> list[list[torch.Tensor]]:
    """The samples of a turn by packed row: random clips, as many as the rows of its steps hold."""
    from torchtitan.datasets.packing import best_fit_decreasing

    generator = torch.Generator().manual_seed(seed)
    shortest, longest = (IDS_PER_SECOND * s for s in seconds)
    lengths, number = [], options.rows * options.steps
    while True:
        lengths += torch.randint(shortest, longest + 1, (1,), generator=generator).tolist()
        if len(best_fit_decreasing(lengths, options.seq_len)) > number:
            break
    rows = best_fit_decreasing(lengths[:-1], options.seq_len)
    return [[torch.randint(options.vocabulary, (lengths[i],), generator=generator) for i in row] for row in rows]


def fill(rows: list[list[torch.Tensor]], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets and positions [B, length] of rows of samples."""
    from torchtitan.models.loss import IGNORE_INDEX

    tokens, positions = torch.zeros(2, len(rows), length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for r, row in enumerate(rows):
        begin = 0
        for sample in row:
            end = begin + sample.numel()
            tokens[r, begin:end], positions[r, begin:end] = sample, torch.arange(sample.numel())
            targets[r, begin : end - 1] = sample[1:]
            begin = end
        positions[r, begin:] = torch.arange(length - begin)
    return tokens, targets, positions


def make_batches(options: Options, rows: list[list[torch.Tensor]]) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """The steps of a turn on the same samples: unpacked (tokens and targets) and packed (with positions)."""
    samples = [sample for row in rows for sample in row]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(len(samples))).tolist()
    unpacked = []
    for step in range(options.steps):
        batch = [samples[i] for i in order[step :: options.steps]]
        longest = max(sample.numel() for sample in batch)
        unpacked.append(fill([[sample] for sample in batch], -(-longest // 32) * 32)[:2])
    packed = [fill(rows[step :: options.steps], options.seq_len) for step in range(options.steps)]
    return {"unpacked": unpacked, "packed": packed}


class Step:
    """The step of torchtitan.train on one rank."""

    def __init__(self, options: Options, device: torch.device):
        from torchtitan.models.llama3.args import Llama3Args
        from torchtitan.models.llama3.model import Llama3
        from torchtitan.models.llama3.weights import init_random, materialize

        heads = options.dim // 64
        args = Llama3Args(
            vocab_size=options.vocabulary,
            dim=options.dim,
            n_layers=options.layers,
            n_heads=heads,
            n_kv_heads=max(1, heads // 4),
            head_dim=64,
            hidden_dim=options.dim * 8 // 3,
        )
        with torch.device("meta"):
            self.model = Llama3(args)
        materialize(self.model, device, options.seq_len)
        init_random(self.model, 0)
        self.model.train().to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.device = device

    def __call__(self, batch: tuple[torch.Tensor, ...]) -> None:
        from torchtitan.models.loss import IGNORE_INDEX

        tokens, targets, *positions = (x.to(self.device) for x in batch)
        loss = self.model(tokens, targets, *positions)
        (loss / (targets != IGNORE_INDEX).sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare(options: Options, step: Step, seconds: tuple[int, int]) -> dict:
    """Turns of both: the medians of their real tokens a second and of the ratio, and their share of padding."""
    speeds: dict[str, list[float]] = {"unpacked": [], "packed": []}
    real, computed = 0, {"unpacked": 0, "packed": 0}
    for batches in make_batches(options, draw_rows(options, seconds, 0)).values():
        step(batches[0])
    for turn in range(1, options.turns + 1):
        rows = draw_rows(options, seconds, turn)
        tokens = sum(sample.numel() for row in rows for sample in row)
        real += tokens
        for name, batches in make_batches(options, rows).items():
            begin = time.perf_counter()
            for batch in batches:
                step(batch)
            speeds[name].append(tokens / (time.perf_counter() - begin))
            computed[name] += sum(batch[0].numel() for batch in batches)
    return {
        "real_tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "speed_ratio": statistics.median(p / u for p, u in zip(speeds["packed"], speeds["unpacked"], strict=True)),
        "padding_share": {name: 1 - real / positions for name, positions in computed.items()},
        "positions_ratio": computed["unpacked"] / computed["packed"],
    }


def main(options: Options) -> None:
    """Run both kinds of clips and print the figures as JSON."""
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    step = Step(options, torch.device(name))
    report: dict = {clips: compare(options, step, seconds) for clips, seconds in CLIPS.items()}
    cuda = name.startswith("cuda")
    report |= {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    command.run(main, Options, __doc__)
