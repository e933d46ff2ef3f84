"""A training step here, side by side with the plain way: ``uv run python benchmarks/training_step.py``.

Plain: transformers' LlamaForCausalLM under FSDP2 with one unit a layer and one for the rest, every row padded to the
row length, labels = input ids (padding among them), logits whole, AdamW fused.
Ours: the trainer's own step (torchtitan.train.train_step) on the same samples: batches cut to their longest sample or,
with ``--packing``, samples packed into rows; padding is no target; the loss in chunks.
Both take the same samples a step, from random weights; ids are random, lengths those of clips of 3 to 20 s. The two run
in turn, with fresh processes each time, so that each has its own peak of memory. On one H200, for the 1.3B:

    python benchmarks/training_step.py --size 1.3B --batch 32 --dtype bfloat16 --compile --packing --steps 10
"""

import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dim": 128, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 64, "hidden_dim": 256},
    "mid": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 3, "head_dim": 64, "hidden_dim": 2048},
    "1.3B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64, "hidden_dim": 8192},
}


@dataclass
class Options:
    """Sizes of the model and of a step."""

    size: Literal["tiny", "mid", "1.3B"] = "mid"
    """Of the model: 768 x 12 layers, or that of Llama-Mimi-1.3B."""
    vocabulary: int = 136_450
    """Ids; the last 8,194 are those of audio."""
    ranks: int = 1
    """Processes (GPUs, if there are any) that share the work."""
    batch: int = 2
    """Rows a step of each rank."""
    seq_len: int = 1024
    """Longest row in ids."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of forward and backward passes."""
    packing: bool = False
    """Ours: pack samples into rows."""
    compile: bool = False
    """Compile the blocks, on both sides."""
    activation_checkpoint: Literal["none", "full"] = "none"
    """On both sides."""
    audio_head: bool = False
    """Ours: logits of audio ids alone (training.audio_head). The samples then hold only these."""
    steps: int = 3
    """Measured steps of each turn, after two that are not measured."""
    turns: int = 2
    """How often the two are run in turn."""
    ways: list[str] = field(default_factory=lambda: ["plain", "ours"])
    """Which ones are run."""


Samples = list[torch.Tensor]


def make_samples(options: Options, seed: int) -> Samples:
    """Samples of 3 to 20 s at 50 ids a second, cut to the row length, for all ranks."""
    generator = torch.Generator().manual_seed(seed)
    count = options.batch * options.ranks
    lengths = torch.randint(150, 1003, (count,), generator=generator).clamp(max=options.seq_len).tolist()
    first = options.vocabulary - 8194
    return [torch.randint(first, options.vocabulary, (length,), generator=generator) for length in lengths]


def plain(options: Options, rank: int, device: torch.device) -> Any:
    """The plain step, as a function of all ranks' samples."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[options.size]
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=size["dim"],
        intermediate_size=size["hidden_dim"],
        num_hidden_layers=size["n_layers"],
        num_attention_heads=size["n_heads"],
        num_key_value_heads=size["n_kv_heads"],
        head_dim=size["head_dim"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(config).train()
    if options.activation_checkpoint == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (options.ranks,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, options.dtype), reduce_dtype=torch.float32),
    }
    for layer in model.model.layers:
        if options.compile:
            layer.compile()
        fully_shard(layer, **policy)
    fully_shard([model.model.embed_tokens, model.model.norm, model.lm_head], **policy, reshard_after_forward=False)
    fully_shard(model, **policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(samples: Samples) -> None:
        own = samples[rank :: options.ranks]
        ids = torch.zeros(len(own), options.seq_len, dtype=torch.int64)
        for row, sample in zip(ids, own, strict=True):
            row[: sample.numel()] = sample
        ids = ids.to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_batch(rows: list[Samples], options: Options) -> Any:
    """Rows of samples, as the trainer's loader makes them."""
    from torchtitan.components.dataloader import LENGTH_MULTIPLE, Batch
    from torchtitan.components.loss import IGNORE_INDEX

    longest = max(1, *(sum(sample.numel() for sample in row) for row in rows))
    length = options.seq_len if options.compile else -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORE_INDEX)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = 0
        for sample in row:
            stop = place + sample.numel()
            tokens[i, place:stop], targets[i, place : stop - 1] = sample, sample[1:]
            positions[i, place:stop] = torch.arange(stop - place)
            place = stop
        positions[i, place:] = torch.arange(length - place)
    real = sum(sample.numel() for row in rows for sample in row)
    tensors = [t.pin_memory() if torch.cuda.is_available() else t for t in (tokens, targets, positions)]
    return Batch(tensors[0], tensors[1], real, {}, positions=tensors[2] if options.packing else None)


def ours(options: Options, rank: int, device: torch.device) -> Any:
    """The step of torchtitan.train, as a function of all ranks' samples."""
    from torchtitan import train
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.gradients import FiniteGuard
    from torchtitan.components.optimizer import build_optimizer
    from torchtitan.config_manager import JobConfig
    from torchtitan.datasets.packing import best_fit_decreasing
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.models.llama3.args import Llama3Args
    from torchtitan.models.llama3.parallel_model import ParallelModel
    from torchtitan.models.llama3.weights import init_random
    from torchtitan.tools.signals import StopRequest

    config = JobConfig()
    training = config.training
    training.seq_len, training.local_batch_size = options.seq_len, options.batch
    training.mixed_precision_param, training.compile = options.dtype, options.compile
    config.activation_checkpoint.mode = options.activation_checkpoint
    dims = ParallelDims(shard=options.ranks, rank=rank)
    args = Llama3Args(vocab_size=options.vocabulary, tied=True, **SIZES[options.size])
    first_id = options.vocabulary - 8194 if options.audio_head else 0
    model = ParallelModel(config, args, dims, device, first_id)
    init_random(model, 0)
    optimizer = build_optimizer(model, config.optimizer)
    group = dist.new_group(backend="gloo")
    run: Any = SimpleNamespace(
        inputs=SimpleNamespace(config=config, checkpoints=CheckpointManager(Path("unused"))),
        dims=dims,
        device=device,
        data_group=group,
        model=model,
        optimizer=optimizer,
        guard=FiniteGuard(optimizer, device, group),
        stop=StopRequest(),
        schedule_start=0,
        step=0,
        tokens_seen=0,
    )

    def step(samples: Samples) -> None:
        rows = [[sample] for sample in samples]
        if options.packing:
            packed = best_fit_decreasing([sample.numel() for sample in samples], options.seq_len)
            rows = [[samples[i] for i in row] for row in packed]
            rows += [[]] * (-len(rows) % options.ranks)
        run.step += 1
        train.train_step(run, [make_batch(rows[rank :: options.ranks], options)])

    return step


def measure(name: str, options: Options, rank: int, folder: str, results: Any) -> None:
    """Time the steps of one way on one rank; rank 0 puts (real tokens a second, peak GiB) into ``results``."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=options.ranks,
    )
    step = {"plain": plain, "ours": ours}[name](options, rank, device)

    def finish() -> None:
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()

    for seed in range(2):
        step(make_samples(options, seed))
    finish()
    tokens, begin = 0, time.perf_counter()
    for seed in range(2, options.steps + 2):
        samples = make_samples(options, seed)
        tokens += sum(sample.numel() for sample in samples)
        step(samples)
    finish()
    seconds = time.perf_counter() - begin
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    if rank == 0:
        results.put((tokens / seconds, peak))
    dist.destroy_process_group()


def run_once(name: str, options: Options) -> tuple[float, float]:
    """One turn of one way: real tokens a second of all ranks, and the peak memory of one in GiB."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=measure, args=(name, options, rank, folder, results))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"{name}: a process failed, see above.")
        return results.get()


def mfu(options: Options, tokens_per_second: float) -> float | None:
    """Share of the GPUs' peak that the real tokens' own work is: 6 N + 12 L H T FLOPs a token, T the row length."""
    from torchtitan.models.llama3.args import Llama3Args
    from torchtitan.tools.utils import peak_flops

    if not torch.cuda.is_available() or (peak := peak_flops(torch.device("cuda", 0))) is None:
        return None
    flops = Llama3Args(vocab_size=options.vocabulary, tied=True, **SIZES[options.size]).flops_per_token(options.seq_len)
    return tokens_per_second * flops / (peak * options.ranks)


def main(options: Options) -> None:
    """Run both ways in turn and print the medians and their ratio as JSON."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in options.ways}
    for _ in range(options.turns):
        for name, measured in figures.items():
            measured.append(run_once(name, options))
            print(f"{name}: {measured[-1][0]:.1f} real tokens/s, peak {measured[-1][1]:.2f} GiB a rank", flush=True)
    speed = {name: statistics.median(tokens for tokens, _ in measured) for name, measured in figures.items()}
    memory = {name: max(peak for _, peak in measured) for name, measured in figures.items()}
    report: dict[str, Any] = {"real_tokens_per_second": speed, "peak_gib": memory}
    if len(figures) == 2:
        report |= {"speed_ratio": speed["ours"] / speed["plain"], "memory_ratio": memory["ours"] / memory["plain"]}
    if torch.cuda.is_available():
        report["mfu"] = {name: mfu(options, tokens) for name, tokens in speed.items()}
        report["device"] = torch.cuda.get_device_name()
    report |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "options": vars(options)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    try:
        import tyro

        main(tyro.cli(Options, description=__doc__, use_underscores=True))
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        main(Options())
