"""What the cases of gpu.py do, each in a process of its own: checks against the CPU, and measurements.

A case says what it finds by ``bench.save`` as soon as it knows it. A check has a value, its limit and whether it is
kept; figures have their unit in their name.
"""

import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import generation
import torch
import torch.distributed as dist
import training_step
from models import QUANTIZERS, make_codec, make_model
from transformers import LlamaForCausalLM, MimiModel  # noqa: F401 - take long to import, before cases are forked

from torchtitan.audio.codec import FRAME_RATE, SAMPLE_RATE, no_tf32
from torchtitan.audio.streaming import StreamingDecoder
from torchtitan.config.job_config import Comm, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.utils import init_distributed
from torchtitan.generation import Engine, Request, Sampling, stream_speech
from torchtitan.generation.linear import Int8, widened
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.parallel_model import ParallelModel
from torchtitan.models.llama3.parallelize import compile_blocks
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools.prefetch import prefetch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
VOCABULARY, TINY_VOCABULARY = 136_450, 9_000

# How far results may be from those of the CPU in fp32, relative to their norm. In bf16 a product's inputs have 8 bits.
FP32_LIMIT, BF16_LIMIT, BF16_GRADIENT_LIMIT = 1e-4, 0.02, 0.08
FLOAT8_LIMIT, FLOAT8_GRADIENT_LIMIT = 0.05, 0.6
# TF32, which decoding may use, has 10 bits.
TF32_LIMIT = 0.02
# Equal arithmetic in another order flips near-ties.
CODES_LIMIT, DIVERGING_ROWS_LIMIT = 0.002, 0.2


@dataclass
class Bench:
    """Where a case runs, how large, and where it says what it finds.

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
            # What a GPU compiles, without the compiler of C++, which takes most of the time and is another one's.
            torch.compiler.set_stance("default", force_backend="aot_eager")

    def check(self, name: str, function: Callable[[], dict[str, tuple[float, float]]]) -> None:
        """Run a check, which gives values with their limits; an error of its is a failed check."""
        begin = time.perf_counter()
        try:
            values = function()
            found: dict[str, Any] = {key: value for key, (value, _) in values.items()}
            found = {"ok": all(value <= limit for value, limit in values.values()), **found}
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
    """The norm of the difference over that of what is expected."""
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
    """Six rows of ids, targets and, packed, positions of three documents a row."""
    tokens = torch.randint(ARGS.vocab_size, (6, ROW), generator=torch.Generator().manual_seed(1))
    targets, positions = tokens.roll(-1, 1), torch.zeros_like(tokens)
    targets[:, -1] = IGNORE_INDEX
    for row in range(len(tokens)):
        bounds = [0, 60 + 9 * row, 130 + 3 * row, ROW]
        for begin, end in pairwise(bounds):
            positions[row, begin:end] = torch.arange(end - begin)
            targets[row, end - 1] = IGNORE_INDEX
    return tokens, targets, positions if packed else None


def make_parallel(device: torch.device, dtype: str, change: Callable[[JobConfig], None] | None = None) -> ParallelModel:
    """The trainer's model on one rank; with ``dtype`` bfloat16 under FSDP2, which on a GPU is nccl's."""
    config = JobConfig()
    config.training.seq_len, config.training.mixed_precision_param = ROW, dtype  # type: ignore[assignment]
    if change is not None:
        change(config)
    model = ParallelModel(config, ARGS, ParallelDims(), device)
    fill(model)
    return model


def gradients(model: ParallelModel, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of :func:`make_ids`, and the gradients by name."""
    tokens, targets, positions = make_ids(packed)
    loss = model.backward(tokens, targets, positions, float((targets != IGNORE_INDEX).sum()))
    return loss, {name: whole(parameter.grad) for name, parameter in model.weights() if parameter.grad is not None}


def check_model(bench: Bench) -> None:
    """Losses, gradients and updates of the trainer's model, in every way to compute them, against the CPU in fp32."""
    init_distributed(Comm())
    device = bench.device
    expected = {packed: gradients(make_parallel(CPU, "float32"), packed) for packed in (False, True)}

    def compare(model: ParallelModel, packed: bool, limit: float, gradient_limit: float) -> dict:
        loss, found = gradients(model, packed)
        wanted_loss, wanted = expected[packed]
        if set(found) != set(wanted):
            raise AssertionError(f"gradients of {sorted(found)}, not of {sorted(wanted)}")
        worst = max(distance(found[name], wanted[name]) for name in wanted)
        return {"loss": (distance(loss, wanted_loss), limit), "gradients": (worst, gradient_limit)}

    def checkpointing(mode: str, option: str = "2") -> Callable[[JobConfig], None]:
        def change(config: JobConfig) -> None:
            config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option = mode, option  # type: ignore

        return change

    def use_float8(config: JobConfig) -> None:
        config.model.converters = ["float8"]
        config.float8.emulate = device.type == "cpu" or torch.cuda.get_device_capability() < (8, 9)

    exact, rough = (FP32_LIMIT, FP32_LIMIT), (BF16_LIMIT, BF16_GRADIENT_LIMIT)
    ways: dict[str, tuple[str, bool, tuple[float, float], Callable[[JobConfig], None] | None]] = {}
    for packed in (False, True):
        more = ", packed" if packed else ""
        ways[f"fp32{more}"] = ("float32", packed, exact, None)
        ways[f"FSDP2 in bf16{more}"] = ("bfloat16", packed, rough, None)
        ways[f"activation checkpointing, full{more}"] = ("bfloat16", packed, rough, checkpointing("full"))
        ways[f"activation checkpointing, op{more}"] = ("bfloat16", packed, rough, checkpointing("selective", "op"))
    if _has("torchao"):
        ways["float8"] = ("bfloat16", False, (FLOAT8_LIMIT, FLOAT8_GRADIENT_LIMIT), use_float8)
    for name, (dtype, packed, limits, change) in ways.items():
        bench.check(name, lambda d=dtype, p=packed, c=change, two=limits: compare(make_parallel(device, d, c), p, *two))

    def losses() -> dict[str, tuple[float, float]]:
        tokens, targets, _ = make_ids(False)
        wanted = make_parallel(CPU, "float32").losses(tokens, targets)
        return {
            dtype: (distance(make_parallel(device, dtype).losses(tokens, targets), wanted), limit)
            for dtype, limit in (("float32", FP32_LIMIT), ("bfloat16", BF16_LIMIT))
        }

    bench.check("losses by target, as validation has them", losses)
    for dtype, limit in (("float32", 1e-3), ("bfloat16", BF16_LIMIT)):
        bench.check(
            f"four updates in {dtype}",
            lambda d=dtype, m=limit: {"losses": (distance(updates(device, d), updates(CPU, "float32")), m)},
        )
    dist.destroy_process_group()


def updates(device: torch.device, dtype: str) -> torch.Tensor:
    """The losses of four of the trainer's steps, clipping and fused AdamW included."""
    from torchtitan import train
    from torchtitan.components.dataloader import Batch

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


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


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
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = statistics.median(generation.seconds_of(run, device) for _ in range(10))
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

    def differing(found: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[float, float]:
        pairs = list(zip(found, expected, strict=True))
        return sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for b in expected), CODES_LIMIT

    bench.check("a lone clip", lambda: {"codes that differ": differing(codec.encode(clips[:1]), wanted[:1])})
    bench.check("a batch", lambda: {"codes that differ": differing(codec.encode(clips), wanted)})
    bench.check("in chunks", lambda: {"codes that differ": differing(codec.encode([long]), [wanted_long])})
    bench.check("a batch twice", lambda: {"codes that differ": differing(codec.encode(clips), codec.encode(clips))})
    bench.check("decoding", lambda: {"waveform": (distance(codec.decode(wanted[0]), waveform), TF32_LIMIT)})

    def streamed() -> dict[str, tuple[float, float]]:
        decoder = StreamingDecoder(codec)
        pieces = torch.cat([decoder.decode(part) for part in wanted[0].split(5, dim=1)])
        torch.backends.cudnn.allow_tf32 = False
        decoder = StreamingDecoder(codec)
        exact = torch.cat([decoder.decode(part) for part in wanted[0].split(5, dim=1)])
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


def compare_rows(found: Drawn, expected: Drawn) -> tuple[float, float]:
    """The share of rows with other ids, and the share of a row's frames before its first other one, on average."""
    before, pairs = [], list(zip(found, expected, strict=True))
    for one, other in pairs:
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        before.append(1.0 if one == other else equal / max(1, len(one), len(other)))
    return sum(one != other for one, other in pairs) / len(pairs), statistics.mean(before)


def check_engine(bench: Bench) -> None:
    """What is drawn on the device against the CPU, in every way to compute it, and alone against in a batch.

    In 16 bits a near-tie that falls otherwise sends a row another way for good, so there the share of such rows is told
    and no limit set.
    """
    device, codec = bench.device, make_codec(CPU, tiny=True)
    models: dict[tuple[str, torch.dtype], Any] = {}

    def model(where: torch.device, dtype: torch.dtype) -> Any:
        if (where.type, dtype) not in models:
            made = make_model("tiny", TINY_VOCABULARY, dtype, CPU, codec)
            made.model.to(where)
            models[where.type, dtype] = replace(made, codec=make_codec(where, tiny=True))
        return models[where.type, dtype]

    def run(where: torch.device, dtype: torch.dtype, requests: list[Request], context: int = 512, **more: Any) -> Drawn:
        return draw(Engine(model(where, dtype), 4, context, **more), requests)

    def against_the_cpu(dtype: torch.dtype, requests: list[Request], **more: Any) -> dict[str, tuple[float, float]]:
        rows, before = compare_rows(run(device, dtype, requests, **more), run(CPU, dtype, requests, **more))
        limit = DIVERGING_ROWS_LIMIT if dtype == torch.float32 else math.inf
        return {"rows that diverge": (rows, limit), "frames before that": (before, math.inf)}

    fp32, bf16 = torch.float32, torch.bfloat16
    few, many = make_requests(4, 12), make_requests(6 if bench.smoke else 20, 4)
    bench.check("fp32", lambda: against_the_cpu(fp32, few))
    bench.check("bf16", lambda: against_the_cpu(bf16, few))
    bench.check("int8", lambda: against_the_cpu(bf16, few, int8=True))
    bench.check("unconstrained", lambda: against_the_cpu(fp32, make_requests(2, 3), constrained=False))
    bench.check("rows that come and go", lambda: against_the_cpu(fp32, many))
    bench.check("a context that slides", lambda: against_the_cpu(fp32, make_requests(3, 40), context=140))

    def alone(dtype: torch.dtype, limit: float) -> dict[str, tuple[float, float]]:
        one_by_one = [frames for request in many for frames in run(device, dtype, [request])]
        rows, before = compare_rows(run(device, dtype, many), one_by_one)
        return {"rows that diverge": (rows, limit), "frames before that": (before, math.inf)}

    bench.check("alone and in a batch, fp32", lambda: alone(fp32, DIVERGING_ROWS_LIMIT))
    bench.check("alone and in a batch, bf16", lambda: alone(bf16, math.inf))
    if device.type == "cuda":
        bench.check("captured and not", lambda: _captured(run(device, fp32, few), model(device, fp32), few))
        bench.check("one-byte products", lambda: _int8(device))


def _captured(expected: Drawn, lm: Any, requests: list[Request]) -> dict[str, tuple[float, float]]:
    """CUDA graphs against the same operations one by one."""
    engine = Engine(lm, 4, 512)
    engine._replay = engine._frame  # type: ignore[method-assign]
    return {"rows that diverge": (compare_rows(draw(engine, requests), expected)[0], 0.0)}


def _int8(device: torch.device) -> dict[str, tuple[float, float]]:
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
    from torch._dynamo.utils import counters

    init_distributed(Comm())
    device = bench.device

    def train(packed: bool) -> dict[str, tuple[float, float]]:
        plain, compiled = (make_parallel(device, "bfloat16") for _ in range(2))
        for part in compiled.parts:
            compile_blocks(part)
            part.output.compiled = True
        (loss, found), (wanted_loss, wanted) = gradients(compiled, packed), gradients(plain, packed)
        worst = max(distance(found[name], wanted[name]) for name in wanted)
        return {"loss": (distance(loss, wanted_loss), BF16_LIMIT), "gradients": (worst, BF16_GRADIENT_LIMIT)}

    bench.check("model", lambda: train(False))
    bench.check("model, packed", lambda: train(True))

    def generate() -> dict[str, tuple[float, float]]:
        requests = make_requests(4, 8)
        lm = make_model("tiny", TINY_VOCABULARY, torch.float32, device, make_codec(device, tiny=True))
        found, expected = (draw(Engine(lm, 4, 256, compile_layers=how), requests) for how in (True, False))
        rows, before = compare_rows(found, expected)
        return {"rows that diverge": (rows, DIVERGING_ROWS_LIMIT), "frames before that": (before, math.inf)}

    bench.check("engine", generate)
    bench.check("graph breaks", lambda: {"breaks": (float(sum(counters["graph_break"].values())), 0.0)})
    bench.save({"graphs": counters["stats"]["unique_graphs"]})
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def fitting(options: training_step.Options, name: str, rows: tuple[int, ...]) -> dict[str, Any]:
    """What was measured with the first number of rows that the memory holds."""
    tried = []
    for batch in rows:
        found = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = training_step.measure(name, replace(options, batch=batch), 0, folder)
            except RuntimeError as error:
                # Libraries have errors of their own for it.
                if not any(text in str(error) for text in ("out of memory", "ALLOC_FAILED")):
                    raise
                tried.append(batch)
        if found is not None:
            return {"rows": batch, "rows_that_did_not_fit": tried, **found._asdict()}
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.compiler.reset()
        free_memory()
    return {"rows_that_did_not_fit": tried}


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


def time_training(bench: Bench, name: str, packing: bool, compiled: bool) -> None:
    """The training step of one way; a GPU's kernels by kind."""
    options = training_step.Options(
        size="1.3B", dtype="bfloat16", packing=packing, compile=compiled, steps=10, profile=True
    )
    rows = (32, 16, 8)
    if name == "plain" and bench.device.type == "cuda" and memory_of(bench.device) < 100e9:
        rows = (16, 8)  # whole logits of 32 rows need some 92 GiB
    if bench.smoke:
        options = replace(options, size="tiny", vocabulary=TINY_VOCABULARY, seq_len=256, steps=2)
        rows = (4,)
    figures = fitting(options, name, rows)
    bench.save({"options": vars(options), "figures": figures})
    if "real_tokens_per_second" not in figures:
        raise SystemExit(f"{rows[-1]} rows do not fit into the memory.")


def time_8b(bench: Bench) -> None:
    """The step at the 8B with what saves memory: blocks recomputed, weights updated in the backward pass.

    Where not even that fits, with half or a quarter of the layers, which is said.
    """
    for layers in (32, 16, 8):
        options = training_step.Options(
            size="8B", layers=layers, dtype="bfloat16", compile=True, steps=5, activation_checkpoint="full"
        )
        options.step_in_backward = True
        if 12.5 * options.args().num_params > memory_of(bench.device):  # weights and AdamW's states
            continue
        figures = fitting(options, "ours", (16, 4, 1))
        bench.save({"options": vars(options), "figures": figures, "layers": layers})
        if "real_tokens_per_second" in figures:
            return
    raise SystemExit("no number of rows and layers fits into the memory.")


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


def _generation_model(bench: Bench, codec: Any = None) -> Any:
    size, vocabulary = ("tiny", TINY_VOCABULARY) if bench.smoke else ("1.3B", VOCABULARY)
    return make_model(size, vocabulary, torch.bfloat16, bench.device, codec or make_codec(bench.device, tiny=True))


@torch.inference_mode()
def time_generation(bench: Bench, rows: int, compiled: bool = False) -> None:
    """Ids a second of ``rows`` rows at once, beside transformers' generate, and as a share of memory's bound."""
    lm, device = _generation_model(bench), bench.device
    prompt_frames, frames = (5, 4) if bench.smoke else (38, 50)
    if bench.smoke:
        rows = min(rows, 3)
    prompts = [torch.randint(2048, (QUANTIZERS, prompt_frames)) for _ in range(rows)]
    engine = Engine(lm, rows, lm.stream.sample_length(prompt_frames + frames), compile_layers=compiled)
    requests = [Request(prompt, frames, sample=i) for i, prompt in enumerate(prompts)]
    positions = 2 + QUANTIZERS * (prompt_frames + frames / 2)
    bound = rows * generation.bandwidth(device) / generation.bytes_of_step(engine, rows, positions)

    def timed(way: Callable[[], Any], turns: int, tokens: int) -> float:
        way()
        return tokens / statistics.median(generation.seconds_of(way, device) for _ in range(turns))

    # A row may draw </audio> before its bound.
    drawn = sum(result.codes.numel() for result in engine.generate(requests))
    ours = timed(lambda: engine.generate(requests), 3, drawn)
    figures = {"rows": rows, "ids_per_second": ours, "ids_per_second_of_the_bound": bound, "share": ours / bound}
    bench.save({"figures": figures})
    plain = timed(lambda: generation.plain(lm, prompts, frames, False), 1, rows * frames * QUANTIZERS)
    bench.save({"figures": {**figures, "ids_per_second_of_transformers": plain, "ratio": ours / plain}})


@torch.inference_mode()
def time_int8(bench: Bench) -> None:
    """Ids a second with weights in 8 bits, and each of the products that they can get at the sizes of the 1.3B."""
    lm, device = _generation_model(bench), bench.device
    frames = 4 if bench.smoke else 50
    figures: dict[str, Any] = {}
    for rows in (1, 2) if bench.smoke else (1, 8, 64):
        requests = [Request(torch.randint(2048, (QUANTIZERS, 5)), frames, sample=i) for i in range(rows)]
        for name, int8 in (("int8", True), ("bf16", False)):
            engine = Engine(lm, rows, 512, int8=int8)
            way = partial(engine.generate, requests)
            way()
            seconds = statistics.median(generation.seconds_of(way, device) for _ in range(3))
            figures[f"{name}, {rows} rows, ids_per_second"] = rows * frames * QUANTIZERS / seconds
            bench.save({"figures": figures})
            free_memory()
    bench.save({"microseconds_of_a_product": _time_products(bench)})


def _time_products(bench: Bench) -> dict[str, float]:
    """Of x [rows, inputs] and weights of the 1.3B's projections, in microseconds.

    As in a step of the engine: many weights in turn, more than a GPU's caches hold, and launched as one graph.
    """
    device = bench.device
    found: dict[str, float] = {}
    for outputs, inputs in ((512, 256),) if bench.smoke else ((3072, 2048), (16384, 2048), (2048, 8192)):
        count = 2 if bench.smoke else -(-(256 << 20) // (outputs * inputs))
        dense = [torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) for _ in range(count)]
        layers = [Int8(weight, None) for weight in dense]
        products: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
            "bf16": lambda x, i, w=dense: torch.nn.functional.linear(x, w[i]),
            "int8, as chosen": lambda x, i, p=layers: p[i].product(x, p[i].weight, p[i].scale),
            "int8, widened": lambda x, i, p=layers: widened(x, p[i].weight, p[i].scale),
            "int8, torch's": lambda x, i, p=layers: torch._weight_int8pack_mm(x, p[i].weight, p[i].scale),
        }
        for rows in (1, 64):
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            for name, product in products.items():
                try:
                    way = _captured_ways(partial(product, x), count, device)
                    way()
                    seconds = statistics.median(generation.seconds_of(way, device) for _ in range(5))
                    found[f"{name}, {rows} x {inputs} x {outputs}"] = 1e6 * seconds / count
                except RuntimeError as error:  # an operator that this version does not have here
                    print(name, rows, error)
    return found


def _captured_ways(function: Callable[[int], Any], count: int, device: torch.device) -> Callable[[], Any]:
    """Calls of a function with 0 to ``count`` - 1, on CUDA as one graph."""

    def run() -> None:
        for i in range(count):
            function(i)

    run()
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@torch.inference_mode()
def time_speech(bench: Bench) -> None:
    """The time to the first new audio, and what decoding costs: at once, streamed, and of many streams in turn."""
    codec = make_codec(bench.device, bench.smoke)
    lm, device = _generation_model(bench, codec), bench.device
    prompt_frames, turns = (5, 2) if bench.smoke else (38, 5)
    engine = Engine(lm, 1, 512)
    waits = []
    for _ in range(turns + 1):
        request = Request(torch.randint(2048, (QUANTIZERS, prompt_frames)), 10)
        begin = time.perf_counter()
        stream = stream_speech(engine, request, prompt=False)
        next(stream)
        waits.append(1000 * (time.perf_counter() - begin))
        stream.close()  # which waits for the frame at work
    figures: dict[str, Any] = {"first_audio_ms": statistics.median(waits[1:])}
    bench.save({"figures": figures})
    frames = 8 if bench.smoke else 96
    codes = torch.randint(2048, (QUANTIZERS, frames))

    def timed(way: Callable[[], Any]) -> float:
        way()
        return 1000 * statistics.median(generation.seconds_of(way, device) for _ in range(turns)) / frames

    figures["decoded_at_once_ms_a_frame"] = timed(lambda: codec.decode(codes))
    for chunk in (1, 4):

        def stream(chunk: int = chunk) -> None:
            decoder = StreamingDecoder(codec)
            for part in codes.split(chunk, dim=1):
                decoder.decode(part)

        figures[f"streamed_{chunk}_frames_ms_a_frame"] = timed(stream)
        bench.save({"figures": figures})
    # A frame lasts 80 ms, in which each of so many listeners must get one.
    figures["listeners_in_real_time_at_4_frames"] = 1000 / FRAME_RATE / figures["streamed_4_frames_ms_a_frame"]
    bench.save({"figures": figures})


# ---------------------------------------------------------------------------------------------------------------------
# The codec, and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def time_encoding(bench: Bench) -> None:
    """Seconds of audio a second by number of clips in a call, beside one lone call of transformers after the other."""
    codec, device = make_codec(bench.device, bench.smoke), bench.device
    seconds, counts = (2.0, (1, 2)) if bench.smoke else (15.0, (1, 4, 16, 64))
    figures: dict[str, Any] = {}
    peaks: dict[str, float] = {}
    for count in counts:
        clips = [noise(seconds, i) for i in range(count)]
        codec.encode(clips)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = statistics.median(generation.seconds_of(lambda clips=clips: codec.encode(clips), device) for _ in "123")
        figures[f"{count} clips"] = count * seconds / taken
        if device.type == "cuda":
            peaks[f"{count} clips"] = torch.cuda.max_memory_allocated() / 2**30
        bench.save({"audio_seconds_per_second": figures, "peak_gib": peaks})
    clip = noise(seconds)[None, None].to(device)

    @torch.no_grad()
    def plain() -> None:
        with no_tf32(device):  # as codes need it
            codec.model.encode(clip, num_quantizers=QUANTIZERS).audio_codes.cpu()

    plain()
    figures["transformers, one by one"] = seconds / statistics.median(
        generation.seconds_of(plain, device) for _ in "123"
    )
    figures["ratio"] = figures[f"{counts[-1]} clips"] / figures["transformers, one by one"]
    bench.save({"audio_seconds_per_second": figures})


def time_online(bench: Bench) -> None:
    """The training step while the codec encodes what the steps take, in a thread of its own, beside ready rows.

    Recordings are waveforms already: decoding files is the work of other threads, on the CPU.
    """
    from torchtitan import train

    codec = make_codec(bench.device, bench.smoke)
    options = training_step.Options(size="1.3B", dtype="bfloat16", compile=True, batch=32)
    steps, seconds = 12, 13.0
    if bench.smoke:
        options = replace(options, size="tiny", vocabulary=TINY_VOCABULARY, seq_len=256, batch=2, compile=False)
        steps, seconds = 2, 2.0
    init_distributed(Comm())
    run = training_step.make_run(options, 0, bench.device, Path("unused"))
    rows = training_step.make_rows(options, 0, False)
    ready = training_step.make_batch(rows, options)
    clips = [noise(seconds, i) for i in range(options.batch)]

    def encode() -> Any:
        while True:
            yield [len(codes) for codes in codec.encode(clips)]

    def time_steps(recordings: Any) -> float:
        for number in range(steps + 3):
            if number == 3:
                bench.synchronize()
                begin = time.perf_counter()
            if recordings is not None:
                next(recordings)
            run.step += 1
            train.train_step(run, [ready])
        bench.synchronize()
        return (time.perf_counter() - begin) / steps

    figures: dict[str, Any] = {"seconds_per_step_ready": time_steps(None)}
    bench.save({"options": vars(options), "figures": figures})
    recordings = prefetch(encode(), 2, "codec")
    figures["seconds_per_step_online"] = time_steps(recordings)
    recordings.close()
    figures["ratio"] = figures["seconds_per_step_online"] / figures["seconds_per_step_ready"]
    figures["audio_seconds_per_step"] = seconds * options.batch
    figures["seconds_of_encoding_alone"] = generation.seconds_of(lambda: codec.encode(clips), bench.device)
    bench.save({"figures": figures})
    dist.destroy_process_group()


@torch.inference_mode()
def time_evaluation(bench: Bench) -> None:
    """Pairs of clips to scores: batches of codes and of scores, beside one clip at a time with whole logits."""
    from torchtitan.eval.scoring import score

    codec = make_codec(bench.device, bench.smoke)
    lm, device = _generation_model(bench, codec), bench.device
    lengths = random.Random(0)
    pairs = 2 if bench.smoke else 32
    clips = [noise(lengths.uniform(1, 2) if bench.smoke else lengths.uniform(2, 12), i) for i in range(2 * pairs)]

    def plain() -> list[torch.Tensor]:
        found = []
        for clip in clips:
            with no_tf32(device):  # as codes need it
                encoded: Any = codec.model.encode(clip[None, None].to(device), num_quantizers=QUANTIZERS)
            ids = lm.stream.sample(encoded.audio_codes[0].cpu()).to(device)
            logits = lm.model(input_ids=ids[None]).logits[0].float()
            found.append(-torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None])[:, 0].cpu())
        return found

    def scored(codes: list[torch.Tensor]) -> list[torch.Tensor]:
        return score(lm.model, [lm.stream.sample(each) for each in codes], 16)

    def ours() -> list[torch.Tensor]:
        return scored(codec.encode(clips))

    kept = codec.encode(clips)
    figures: dict[str, Any] = {}
    nlls = {}
    for name, way in (("plain", plain), ("ours", ours), ("ours, codes kept", lambda: scored(kept))):
        nlls[name] = way()
        figures[f"pairs_per_second, {name}"] = pairs / generation.seconds_of(way, device)
        bench.save({"figures": figures})
    for name in ("ours", "ours, codes kept"):
        figures[f"ratio, {name}"] = figures[f"pairs_per_second, {name}"] / figures["pairs_per_second, plain"]
    bench.save({"figures": figures})

    def scores() -> dict[str, tuple[float, float]]:
        # A batch adds up in another order: a clip can get another code at a near-tie, and another score with it.
        apart = [distance(a.mean(), b.mean()) for a, b in zip(nlls["ours"], nlls["plain"], strict=True)]
        again = [distance(a, b) for a, b in zip(nlls["ours"], nlls["ours, codes kept"], strict=True)]
        return {"median of clips": (statistics.median(apart), BF16_LIMIT), "kept codes": (max(again), 1e-6)}

    bench.check("scores", scores)


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
        cpu = runs.losses("cpu", "--metrics.log_freq", "1", cuda=False)
        whole_run = runs.losses("whole") if bench.device.type == "cuda" else cpu

        def beside(found: dict[int, float], expected: dict[int, float], limit: float) -> dict[str, tuple[float, float]]:
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

    def command(self, name: str, *more: str) -> list[str]:
        settings = {
            "job.config_file": ROOT / "config" / "debug.toml",
            "job.dump_folder": self.folder,
            "job.wandb_run_name": name,
            "model.name": ROOT / "assets" / "llama-small",
            "model.audio_tokenizer": "random/codes",  # that of write_shards: nothing is encoded
            "training.dataset_path": self.codes,
            "training.steps": self.steps,
            "training.seed": 1,
            "checkpoint.interval": self.interval,
            "metrics.log_freq": 1,
            **({"training.local_batch_size": 2, "training.seq_len": 128} if self.smoke else {}),
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        return [sys.executable, "-m", "torchtitan.train", *options, "--validation.no-enabled", *more]

    def start(self, name: str, *more: str, cuda: bool = True) -> subprocess.Popen:
        environment = dict(os.environ) if cuda else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(self.command(name, *more), cwd=ROOT, env=environment)

    def losses(self, name: str, *more: str, cuda: bool = True) -> dict[int, float]:
        """The losses of a run by step, which is made."""
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
