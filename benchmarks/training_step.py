"""A training step here, side by side with the plain way: ``uv run python benchmarks/training_step.py``.

Plain: transformers' LlamaForCausalLM, every row padded to the row length, padding among the targets, logits whole.
Ours: torchtitan's Llama3 on the same samples, batches cut to their longest sample, padding no target, loss in chunks.
Both take the same samples a step, in fp32 with fused AdamW, from random weights; ids are random, lengths those of clips
of 3 to 20 s. The two run in turn, each in a process of its own, so that each has its own peak of memory.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch


@dataclass
class Options:
    """Sizes of the model and of a step."""

    dim: int = 768
    """Width; heads are 64 wide, a fourth of them for keys and values."""
    layers: int = 12
    vocabulary: int = 136_450
    batch: int = 2
    """Rows a step."""
    seq_len: int = 1024
    """Longest row in ids."""
    steps: int = 3
    """Measured steps of each turn, after one that is not measured."""
    turns: int = 2
    """How often the two are run in turn."""


def make_samples(options: Options, seed: int) -> list[torch.Tensor]:
    """Samples of 3 to 20 s at 50 ids a second, cut to the row length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(150, 1003, (options.batch,), generator=generator).clamp(max=options.seq_len).tolist()
    return [torch.randint(0, options.vocabulary, (length,), generator=generator) for length in lengths]


def plain(options: Options):
    """The plain step, as a function of samples."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = options.dim // 64
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.dim,
        intermediate_size=options.dim * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(samples: list[torch.Tensor]) -> None:
        ids = torch.zeros(len(samples), options.seq_len, dtype=torch.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[: sample.numel()] = sample
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def pad(samples: list[torch.Tensor], ignore: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as long as the longest sample, and their targets, as the trainer's loader makes them."""
    length = -(-max(sample.numel() for sample in samples) // 32) * 32
    tokens = torch.zeros(len(samples), length, dtype=torch.int64)
    targets = torch.full((len(samples), length), ignore)
    for row, sample in enumerate(samples):
        tokens[row, : sample.numel()] = sample
        targets[row, : sample.numel() - 1] = sample[1:]
    return tokens, targets


def ours(options: Options):
    """The step of torchtitan.train on one rank, as a function of samples."""
    from torchtitan.components.loss import IGNORE_INDEX
    from torchtitan.models.llama3.args import Llama3Args
    from torchtitan.models.llama3.model import Llama3
    from torchtitan.models.llama3.weights import init_random, materialize

    heads = options.dim // 64
    args = Llama3Args(
        vocab_size=options.vocabulary,
        dim=options.dim,
        n_layers=options.layers,
        n_heads=heads,
        n_kv_heads=heads // 4,
        head_dim=64,
        hidden_dim=options.dim * 8 // 3,
    )
    with torch.device("meta"):
        model = Llama3(args)
    materialize(model, torch.device("cpu"), options.seq_len)
    init_random(model, 0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(samples: list[torch.Tensor]) -> None:
        tokens, targets = pad(samples, IGNORE_INDEX)
        (model(tokens, targets) / (targets != IGNORE_INDEX).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(name: str, options: Options, results) -> None:
    """Time the steps of one way, and put (real tokens a second, peak memory in GiB) into ``results``."""
    step = {"plain": plain, "ours": ours}[name](options)
    step(make_samples(options, 0))
    tokens, begin = 0, time.perf_counter()
    for seed in range(1, options.steps + 1):
        samples = make_samples(options, seed)
        tokens += sum(sample.numel() for sample in samples)
        step(samples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    results.put((tokens / (time.perf_counter() - begin), peak))


def main(options: Options) -> None:
    """Run both ways in turn and print the medians and their ratio as JSON."""
    context = multiprocessing.get_context("spawn")
    figures: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for _ in range(options.turns):
        for name, measured in figures.items():
            results = context.Queue()
            process = context.Process(target=measure, args=(name, options, results))
            process.start()
            measured.append(results.get())
            process.join()
            print(f"{name}: {measured[-1][0]:.1f} real tokens/s, peak {measured[-1][1]:.2f} GiB", flush=True)
    speed = {name: statistics.median(tokens for tokens, _ in measured) for name, measured in figures.items()}
    memory = {name: max(peak for _, peak in measured) for name, measured in figures.items()}
    report = {
        "real_tokens_per_second": speed,
        "speed_ratio": speed["ours"] / speed["plain"],
        "peak_gib": memory,
        "memory_ratio": memory["ours"] / memory["plain"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    try:
        import tyro

        main(tyro.cli(Options, description=__doc__, use_underscores=True))
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        main(Options())
