"""What the cases of gpu.py do, each in a process of its own: checks against the CPU, and measurements.

A case hands what it finds to ``bench.save`` as soon as it knows it. A check has values, their limits, and whether all
are kept; figures have their unit in their name.
"""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import training_step
from generation import decode_in_chunks
from models import QUANTIZERS, fill_rows, make_codec, make_speech_model

from torchtitan import train
from torchtitan.audio.codec import SAMPLE_RATE
from torchtitan.components.dataloader import Batch
from torchtitan.config.job_config import Comm, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.utils import init_distributed
from torchtitan.generation import Engine, Request, Sampling
from torchtitan.generation.linear import Int8, widened
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.parallel_model import ParallelModel
from torchtitan.models.llama3.parallelize import compile_blocks
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools.torch_private import compile_counters

CPU = torch.device("cpu")
TINY_VOCABULARY = 9_000

# How far results may be from those of the CPU in fp32, relative to their norm. In bf16 a product's inputs have 8 bits.
FP32_LIMIT, BF16_LIMIT, BF16_GRADIENT_LIMIT = 1e-4, 0.02, 0.08
FLOAT8_LIMIT, FLOAT8_GRADIENT_LIMIT = 0.05, 0.6
# TF32, which decoding may use, has 10 bits.
TF32_LIMIT = 0.02
# Equal arithmetic in another order flips near-ties.
CODES_LIMIT, DIVERGING_ROWS_LIMIT = 0.002, 0.2


Values = dict[str, tuple[float, float]]  # each with its limit


@dataclass
class Bench:
    """What a case is given: device, size, and a place for its results.

    Attributes:
        smoke: small sizes.
        save: adds to the case's results.
        checks: by name, see :meth:`check`.
    """

    smoke: bool
    save: Callable[[dict[str, Any]], None]
    checks: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if torch.cuda.is_available() else CPU

    def __post_init__(self) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # all is small, and other things may run
            # The graphs that a GPU gets, but not compiled to C++, which would take most of the time.
            torch.compiler.set_stance("default", force_backend="aot_eager")

    def check(self, name: str, function: Callable[[], Values]) -> None:
        """Run a check, which gives values with their limits; an error in it is a failed check."""
        begin = time.perf_counter()
        try:
            values = function()
            found: dict[str, Any] = {"ok": all(value <= limit for value, limit in values.values())}
            found |= {key: value for key, (value, _) in values.items()}
            found["limits"] = {key: limit for key, (_, limit) in values.items() if limit < math.inf}
        except Exception as error:
            traceback.print_exc()
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500], "at": places}
        found["seconds"] = round(time.perf_counter() - begin, 2)
        self.checks[name] = found
        print(name, found, flush=True)
        self.save({"checks": self.checks})
        free_memory()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the codec has one of its own


def free_memory() -> None:
    """Give back the GPU's memory that nothing holds any longer."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of the expected tensor."""
    a, b = (x.detach().double().cpu() for x in (found, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or all of a sharded one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---------------------------------------------------------------------------------------------------------------------
# Paths: the model
# ---------------------------------------------------------------------------------------------------------------------

ARGS = Llama3Args(vocab_size=3002, dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, tied=True)
ROW = 256


def fill(model: Any) -> None:
    """The same weights on every device and for every sharding over one rank."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.weights():
            values = torch.randn(parameter.shape, generator=generator) / 16
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.copy_(torch.ones_like(values) if name.endswith("norm.weight") else values)


def make_ids(packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Six rows of three documents each: ids, targets and, packed, positions."""
    ids = torch.randint(ARGS.vocab_size, (6, ROW), generator=torch.Generator().manual_seed(1))
    rows = [list(row.split([60 + 9 * r, 70 - 6 * r, ROW - 130 - 3 * r])) for r, row in enumerate(ids)]
    tokens, targets, positions = fill_rows(rows, ROW)
    return tokens, targets, positions if packed else None


def make_parallel(device: torch.device, dtype: str, **sections: dict[str, Any]) -> ParallelModel:
    """The trainer's model on one rank; with ``dtype`` bfloat16 under FSDP2, which on a GPU is nccl's.

    Args:
        sections: changed keys of the config, by section.
    """
    config = JobConfig()
    config.training.seq_len, config.training.mixed_precision_param = ROW, dtype  # type: ignore[assignment]
    for section, changes in sections.items():
        for key, value in changes.items():
            setattr(getattr(config, section), key, value)
    model = ParallelModel(config, ARGS, ParallelDims(), device)
    fill(model)
    return model


Gradients = tuple[torch.Tensor, dict[str, torch.Tensor]]  # the loss, and the gradients by name


def gradients(model: ParallelModel, packed: bool) -> Gradients:
    """The loss of :func:`make_ids`, and its gradients."""
    tokens, targets, positions = make_ids(packed)
    loss = model.backward(tokens, targets, positions, float((targets != IGNORE_INDEX).sum()))
    return loss, {name: whole(parameter.grad) for name, parameter in model.weights() if parameter.grad is not None}


def compare_gradients(found: Gradients, expected: Gradients, limit: float, gradient_limit: float) -> Values:
    """How far loss and gradients are from what they should be; of the gradients, the worst."""
    if set(found[1]) != set(expected[1]):
        raise AssertionError(f"gradients of {sorted(found[1])}, not of {sorted(expected[1])}")
    worst = max(distance(found[1][name], wanted) for name, wanted in expected[1].items())
    return {"loss": (distance(found[0], expected[0]), limit), "gradients": (worst, gradient_limit)}


def check_model(bench: Bench) -> None:
    """Losses, gradients and updates of the trainer's model, in every way to compute them, against the CPU in fp32."""
    init_distributed(Comm())
    device = bench.device
    expected = {packed: gradients(make_parallel(CPU, "float32"), packed) for packed in (False, True)}

    def compare(packed: bool, dtype: str, limits: tuple[float, float], **sections: dict[str, Any]) -> Values:
        found = gradients(make_parallel(device, dtype, **sections), packed)
        return compare_gradients(found, expected[packed], *limits)

    exact, rough = (FP32_LIMIT, FP32_LIMIT), (BF16_LIMIT, BF16_GRADIENT_LIMIT)
    full, by_op = {"mode": "full"}, {"mode": "selective", "selective_ac_option": "op"}
    for packed, more in ((False, ""), (True, ", packed")):
        bench.check(f"fp32{more}", partial(compare, packed, "float32", exact))
        bench.check(f"FSDP2 in bf16{more}", partial(compare, packed, "bfloat16", rough))
        for mode, section in (("full", full), ("op", by_op)):
            way = partial(compare, packed, "bfloat16", rough, activation_checkpoint=section)
            bench.check(f"activation checkpointing, {mode}{more}", way)
    if find_spec("torchao"):
        emulate = device.type == "cpu" or torch.cuda.get_device_capability() < (8, 9)
        float8 = {"model": {"converters": ["float8"]}, "float8": {"emulate": emulate}}
        limits = (FLOAT8_LIMIT, FLOAT8_GRADIENT_LIMIT)
        bench.check("float8", partial(compare, False, "bfloat16", limits, **float8))

    def losses() -> Values:
        tokens, targets, _ = make_ids(False)
        wanted = make_parallel(CPU, "float32").losses(tokens, targets)
        limits = {"float32": FP32_LIMIT, "bfloat16": BF16_LIMIT}
        found = {dtype: make_parallel(device, dtype).losses(tokens, targets) for dtype in limits}
        return {dtype: (distance(found[dtype], wanted), limit) for dtype, limit in limits.items()}

    bench.check("losses by target, as validation has them", losses)
    on_cpu = updates(CPU, "float32")
    for dtype, limit in (("float32", 1e-3), ("bfloat16", BF16_LIMIT)):
        bench.check(
            f"four updates in {dtype}",
            lambda d=dtype, m=limit: {"losses": (distance(updates(device, d), on_cpu), m)},
        )
    dist.destroy_process_group()


def updates(device: torch.device, dtype: str) -> torch.Tensor:
    """The losses of four of the trainer's steps, clipping and fused AdamW included."""
    options = training_step.Options(size="tiny", vocabulary=ARGS.vocab_size, seq_len=ROW, dtype=dtype, batch=6)  # type: ignore[arg-type]
    run = training_step.make_run(options, 0, device, Path("unused"))
    fill(run.model)
    tokens, targets, positions = make_ids(True)
    found = []
    for run.step in range(1, 5):
        loss, _, _ = train.train_step(run, [Batch(tokens, targets, tokens.numel(), {}, positions=positions)])
        found.append(loss.cpu())
    run.guard.settle()
    return torch.stack(found)


def check_attention(bench: Bench) -> None:
    """How the variable-length kernel takes grouped heads, and what it costs to repeat them."""
    from torchtitan.models.llama3 import attention

    device, length, heads, kv_heads = bench.device, 8192, 32, 8
    attention._settle_grouping(device, torch.bfloat16, 64)
    starts = torch.zeros(1, length, dtype=torch.bool, device=device)
    starts[:, ::700] = True
    documents = attention.Documents(offsets=attention.document_offsets(starts))
    q, k, v = (
        torch.randn(1, n, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )

    def run() -> list[torch.Tensor]:
        out = attention.attend(q, k, v, documents)
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    def timed() -> tuple[float, float]:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = harness.median_seconds(run, device, 10)
        return 1000 * seconds, (torch.cuda.max_memory_allocated() - before) / 2**30

    chosen = attention._grouping
    mask = attention.document_mask(starts)
    with torch.no_grad():
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *(x.float() for x in (q, k, v)), attn_mask=mask, enable_gqa=True
        )
    bench.check("the variable-length kernel", lambda: {"output": (distance(run()[0], wanted), BF16_LIMIT)})
    figures = {"grouping": chosen, "as chosen": timed()}
    if chosen != "repeated":
        attention._grouping = "repeated"
        figures["repeated"] = timed()
    bench.save({"ms_and_gib_of_32_heads_8192_ids": figures})


# ---------------------------------------------------------------------------------------------------------------------
# Paths: the codec
# ---------------------------------------------------------------------------------------------------------------------


def noise(seconds: float, seed: int = 0) -> torch.Tensor:
    """A waveform at 24 kHz."""
    return 0.1 * torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(seed))


def check_codec(bench: Bench) -> None:
    """Codes and waveforms against the CPU: a lone clip, a batch of unequal ones, one in chunks; decoding in pieces."""
    small, device = bench.smoke, bench.device
    clips = [noise(seconds, i) for i, seconds in enumerate((1.0, 2.3, 1.61) if small else (3.0, 4.97, 8.0))]
    long = noise(4.0 if small else 23.0, 9)
    codec = make_codec(CPU, small)
    wanted = [codec.encode([clip])[0] for clip in clips]
    wanted_long = codec.encode([long])[0]
    waveform = codec.decode(wanted[0])
    codec.to(device)

    def encoded(given: list[torch.Tensor], expected: list[torch.Tensor]) -> Values:
        found, expected_codes = torch.cat(codec.encode(given), 1), torch.cat(expected, 1)
        return {"codes that differ": (float((found != expected_codes).double().mean()), CODES_LIMIT)}

    bench.check("a lone clip", lambda: encoded(clips[:1], wanted[:1]))
    bench.check("a batch", lambda: encoded(clips, wanted))
    bench.check("in chunks", lambda: encoded([long], [wanted_long]))
    bench.check("a batch twice", lambda: encoded(clips, codec.encode(clips)))
    bench.check("decoding", lambda: {"waveform": (distance(codec.decode(wanted[0]), waveform), TF32_LIMIT)})

    def streamed() -> Values:
        pieces = decode_in_chunks(codec, wanted[0], 5)
        torch.backends.cudnn.allow_tf32 = False
        exact = decode_in_chunks(codec, wanted[0], 5)
        torch.backends.cudnn.allow_tf32 = True
        return {"waveform": (distance(pieces, waveform), TF32_LIMIT), "in fp32": (distance(exact, waveform), 1e-3)}

    bench.check("decoding in pieces", streamed)


# ---------------------------------------------------------------------------------------------------------------------
# Paths: the engine
# ---------------------------------------------------------------------------------------------------------------------

SAMPLINGS = (
    Sampling(temperature=0.8, top_k=30),
    Sampling(temperature=0.0),
    Sampling(top_p=0.9, top_k=None, repetition_penalty=1.2),
)


def make_requests(count: int, frames: int) -> list[Request]:
    """Requests of unequal prompts and lengths, sampled in different ways."""
    random_codes = torch.Generator().manual_seed(3)
    return [
        Request(
            torch.randint(2048, (QUANTIZERS, 5 + 7 * (i % 4)), generator=random_codes),
            frames + 3 * i,
            sampling=SAMPLINGS[i % len(SAMPLINGS)],
            sample=i,
        )
        for i in range(count)
    ]


Drawn = list[list[list[int]]]  # the ids of each row's frames


def draw(engine: Engine, requests: list[Request]) -> Drawn:
    """The ids that an engine draws for requests, whole frames or not."""
    generations = [engine.submit(request) for request in requests]
    while not all(each.finished for each in generations):
        engine.advance()
    if errors := [each.error for each in generations if each.error is not None]:
        raise errors[0]
    return [each.frames for each in generations]


def compare_rows(found: Drawn, expected: Drawn, limit: float) -> Values:
    """The share of rows with other ids, and the share of a row's frames before its first other one, on average."""
    before, pairs = [], list(zip(found, expected, strict=True))
    for one, other in pairs:
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        before.append(1.0 if one == other else equal / max(1, len(one), len(other)))
    share = sum(one != other for one, other in pairs) / len(pairs)
    return {"rows that diverge": (share, limit), "frames before that": (statistics.mean(before), math.inf)}


def check_engine(bench: Bench) -> None:
    """Ids drawn on the device against the CPU, in every way to compute them, and alone against in a batch.

    In 16 bits a near-tie that falls the other way changes the rest of its row. The share of such rows is then reported
    without a limit.
    """
    device, codec = bench.device, make_codec(CPU, tiny=True)

    @cache
    def model(where: torch.device, dtype: torch.dtype) -> Any:
        made = make_speech_model("tiny", TINY_VOCABULARY, dtype, CPU, codec)
        made.model.to(where)
        return replace(made, codec=make_codec(where, tiny=True))

    def run(where: torch.device, dtype: torch.dtype, requests: list[Request], context: int = 512, **more: Any) -> Drawn:
        return draw(Engine(model(where, dtype), 4, context, **more), requests)

    def against_the_cpu(dtype: torch.dtype, requests: list[Request], **more: Any) -> Values:
        limit = DIVERGING_ROWS_LIMIT if dtype == torch.float32 else math.inf
        return compare_rows(run(device, dtype, requests, **more), run(CPU, dtype, requests, **more), limit)

    fp32, bf16 = torch.float32, torch.bfloat16
    few, many = make_requests(4, 12), make_requests(6 if bench.smoke else 20, 4)
    bench.check("fp32", lambda: against_the_cpu(fp32, few))
    bench.check("bf16", lambda: against_the_cpu(bf16, few))
    bench.check("int8", lambda: against_the_cpu(bf16, few, int8=True))
    bench.check("unconstrained", lambda: against_the_cpu(fp32, make_requests(2, 3), constrained=False))
    bench.check("rows that come and go", lambda: against_the_cpu(fp32, many))
    bench.check("a context that slides", lambda: against_the_cpu(fp32, make_requests(3, 40), context=140))

    def alone(dtype: torch.dtype, limit: float) -> Values:
        one_by_one = [frames for request in many for frames in run(device, dtype, [request])]
        return compare_rows(run(device, dtype, many), one_by_one, limit)

    bench.check("alone and in a batch, fp32", lambda: alone(fp32, DIVERGING_ROWS_LIMIT))
    bench.check("alone and in a batch, bf16", lambda: alone(bf16, math.inf))
    if device.type == "cuda":
        bench.check("captured and not", lambda: without_graphs(run(device, fp32, few), model(device, fp32), few))
        bench.check("one-byte products", lambda: one_byte_products(device))


def without_graphs(expected: Drawn, lm: Any, requests: list[Request]) -> Values:
    """CUDA graphs against the same operations one by one."""
    engine = Engine(lm, 4, 512)
    engine._replay = engine._frame  # type: ignore[method-assign]
    return compare_rows(draw(engine, requests), expected, 0.0)


def one_byte_products(device: torch.device) -> Values:
    """The product that int8 weights get, against the one by way of 16 bits."""
    found = {}
    for rows in (1, 5, 64):
        layer = Int8(torch.randn(2056, 512, device=device, dtype=torch.bfloat16), None)
        x = torch.randn(rows, 512, device=device, dtype=torch.bfloat16)
        found[f"{rows} rows"] = (distance(layer(x), widened(x.float(), layer.weight, layer.scale.float())), BF16_LIMIT)
    found["not fused"] = (float(layer.product is widened), 0.0)
    return found


def check_compiled(bench: Bench) -> None:
    """Compiled blocks, loss and engine against the same without a compiler."""
    init_distributed(Comm())
    device = bench.device

    def trained(packed: bool) -> Values:
        plain, compiled = (make_parallel(device, "bfloat16") for _ in range(2))
        for part in compiled.parts:
            compile_blocks(part)
            part.output.compiled = True
        pair = (gradients(compiled, packed), gradients(plain, packed))
        return compare_gradients(*pair, BF16_LIMIT, BF16_GRADIENT_LIMIT)

    bench.check("model", lambda: trained(False))
    bench.check("model, packed", lambda: trained(True))

    def generate() -> Values:
        requests = make_requests(4, 8)
        lm = make_speech_model("tiny", TINY_VOCABULARY, torch.float32, device, make_codec(device, tiny=True))
        found, expected = (draw(Engine(lm, 4, 256, compile_layers=how), requests) for how in (True, False))
        return compare_rows(found, expected, DIVERGING_ROWS_LIMIT)

    bench.check("engine", generate)
    bench.check("graph breaks", lambda: {"breaks": (float(sum(compile_counters()["graph_break"].values())), 0.0)})
    bench.save({"graphs": compile_counters()["stats"]["unique_graphs"]})
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Real runs
# ---------------------------------------------------------------------------------------------------------------------

MODES = ("disabled", "async", "async_with_pinned_mem")


def check_run(bench: Bench) -> None:
    """``python -m torchtitan.train`` on stored codes: its losses beside the CPU's, killed and resumed in each mode."""
    from loader import write_shards

    with tempfile.TemporaryDirectory() as folder:
        codes = Path(folder) / "codes"
        codes.mkdir()
        write_shards(codes, 400, 1.0, 6.0)
        runs = Runs(Path(folder), codes, *((6, 3) if bench.smoke else (12, 4)), bench.smoke)
        cpu = runs.losses("cpu", cuda=False)
        whole_run = runs.losses("whole") if bench.device.type == "cuda" else cpu

        def beside(found: dict[int, float], expected: dict[int, float], limit: float) -> Values:
            if not expected or not set(found) >= set(expected):
                raise AssertionError(f"losses of the steps {sorted(found)}, not of {sorted(expected)}")
            return {"losses": (max(abs(found[step] / value - 1) for step, value in expected.items()), limit)}

        bench.check("fp32, beside the CPU", lambda: beside(whole_run, cpu, 1e-3))
        if not bench.smoke:
            bf16 = ("--training.mixed_precision_param", "bfloat16")
            bench.check("bf16, beside the CPU", lambda: beside(runs.losses("bf16", *bf16), cpu, BF16_LIMIT))
            # Packed rows hold other samples: the loss is only known to stay near that of guessing, ln 8,450 = 9.04.
            more = (*bf16, "--training.packing", "best_fit", "--training.compile")
            bench.check("bf16, packed, compiled", lambda: {"loss": (max(runs.losses("more", *more).values()), 9.5)})
        # On a GPU sums may be formed in another order from run to run.
        limit = 0.0 if bench.device.type == "cpu" else 1e-4
        for mode in MODES[: 1 if bench.smoke else None]:
            bench.check(f"killed and resumed, {mode}", lambda m=mode: beside(runs.killed(m), whole_run, limit))


@dataclass
class Runs:
    """Runs of the debug config on codes: ``steps`` of them, saved every ``interval``."""

    folder: Path
    codes: Path
    steps: int
    interval: int
    smoke: bool

    def start(self, name: str, *more: str, cuda: bool = True) -> subprocess.Popen:
        settings = {
            "job.config_file": harness.ROOT / "config" / "debug.toml",
            "job.dump_folder": self.folder,
            "job.wandb_run_name": name,
            "model.name": harness.ROOT / "assets" / "llama-small",
            "model.audio_tokenizer": "random/codes",  # that of write_shards: nothing is encoded
            "training.dataset_path": self.codes,
            "training.steps": self.steps,
            "training.seed": 1,
            "checkpoint.interval": self.interval,
            "metrics.log_freq": 1,
            **({"training.local_batch_size": 2, "training.seq_len": 128} if self.smoke else {}),
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "torchtitan.train", *options, "--validation.no-enabled", *more]
        environment = dict(os.environ) if cuda else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(command, cwd=harness.ROOT, env=environment)

    def losses(self, name: str, *more: str, cuda: bool = True) -> dict[int, float]:
        """Make a run; its losses by step."""
        if code := self.start(name, *more, cuda=cuda).wait():
            raise RuntimeError(f"the run {name} ended with {code}")
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}

    def killed(self, mode: str) -> dict[int, float]:
        """The losses after the first checkpoint of a run that was killed there and resumed."""
        options = ("--checkpoint.async_mode", mode)
        process = self.start(mode, *options)
        first = self.folder / mode / "checkpoint" / f"step-{self.interval}"
        while process.poll() is None and not first.is_dir():
            time.sleep(0.01)
        process.kill()
        process.wait()
        if not first.is_dir():
            raise RuntimeError(f"the run {mode} saved nothing before it ended")
        return self.losses(mode, *options)
