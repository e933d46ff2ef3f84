"""The measurements among the cases of gpu.py; gpu_cases.py has the checks."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import evaluation
import generation
import harness
import torch
import torch.distributed as dist
import training_step
from gpu_cases import BF16_LIMIT, TINY_VOCABULARY, Bench, distance, free_memory, noise
from models import QUANTIZERS, VOCABULARY, make_codec, make_speech_model
from transformers import LlamaForCausalLM, MimiModel  # noqa: F401 - imported before cases are forked, as it takes long

from torchtitan import train
from torchtitan.audio.codec import FRAME_RATE, no_tf32
from torchtitan.config.job_config import Comm
from torchtitan.distributed.utils import init_distributed
from torchtitan.eval.scoring import score
from torchtitan.generation import Engine
from torchtitan.generation.linear import Int8, widened
from torchtitan.tools.prefetch import prefetch
from torchtitan.tools.torch_private import torch_int8_product

# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def small_if_smoke(bench: Bench, options: training_step.Options, **more: Any) -> training_step.Options:
    """The options, or those of small sizes."""
    return replace(options, size="tiny", vocabulary=TINY_VOCABULARY, seq_len=128, **more) if bench.smoke else options


def fitting(options: training_step.Options, name: str, rows: tuple[int, ...]) -> dict[str, Any]:
    """What was measured with the first number of rows that the memory holds."""
    tried = []
    for batch in rows:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = training_step.measure(name, replace(options, batch=batch), 0, folder)
                return {"rows": batch, "rows_that_did_not_fit": tried, **found._asdict()}
            except RuntimeError as error:
                # Libraries have errors of their own for it.
                if not any(text in str(error) for text in ("out of memory", "ALLOC_FAILED")):
                    raise
        tried.append(batch)
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
    options = small_if_smoke(bench, options, steps=2)
    rows: tuple[int, ...] = (4,) if bench.smoke else (32, 16, 8)
    if not bench.smoke and name == "plain" and memory_of(bench.device) < 100e9:
        rows = (16, 8)  # whole logits of 32 rows need some 92 GiB
    figures = fitting(options, name, rows)
    bench.save({"options": vars(options), "figures": figures})
    if "real_tokens_per_second" not in figures:
        raise SystemExit(f"{rows[-1]} rows do not fit into the memory.")


def time_8b(bench: Bench) -> None:
    """The step at the 8B with what saves memory: blocks recomputed, weights updated in the backward pass.

    Where not even that fits, half or a quarter of the layers are measured; the results have their number.
    """
    saving: dict[str, Any] = {"activation_checkpoint": "full", "step_in_backward": True}
    for layers in (32, 16, 8):
        options = training_step.Options(size="8B", layers=layers, dtype="bfloat16", compile=True, steps=5, **saving)
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


def generation_model(bench: Bench, codec: Any = None) -> Any:
    size, vocabulary = ("tiny", TINY_VOCABULARY) if bench.smoke else ("1.3B", VOCABULARY)
    codec = codec or make_codec(bench.device, tiny=True)
    return make_speech_model(size, vocabulary, torch.bfloat16, bench.device, codec)


@torch.inference_mode()
def time_generation(bench: Bench, rows: int, compiled: bool = False) -> None:
    """Ids a second of ``rows`` rows at once, beside transformers' generate, and as a share of memory's bound."""
    lm, device = generation_model(bench), bench.device
    prompt_frames, frames = (5, 4) if bench.smoke else (38, 50)
    rows = min(rows, 3) if bench.smoke else rows
    prompts = generation.make_prompts(rows, prompt_frames)
    requests = generation.make_requests(prompts, frames)
    engine = Engine(lm, rows, lm.stream.sample_length(prompt_frames + frames), compile_layers=compiled)
    bound = generation.memory_bound(engine, rows, prompt_frames, frames, generation.bandwidth(device))

    # A row may draw </audio> before its bound.
    drawn = sum(result.codes.numel() for result in engine.generate(requests))
    ours = drawn / harness.median_seconds(lambda: engine.generate(requests), device, 3)
    figures = {"rows": rows, "ids_per_second": ours, "ids_per_second_of_the_bound": bound, "share": ours / bound}
    bench.save({"figures": figures})
    seconds = harness.median_seconds(lambda: generation.plain(lm, prompts, frames, False), device, 1)
    plain = rows * frames * QUANTIZERS / seconds
    bench.save({"figures": {**figures, "ids_per_second_of_transformers": plain, "ratio": ours / plain}})


@torch.inference_mode()
def time_int8(bench: Bench) -> None:
    """Ids a second with weights in 8 bits, and each of the products that they can get at the sizes of the 1.3B."""
    lm, device = generation_model(bench), bench.device
    frames = 4 if bench.smoke else 50
    figures: dict[str, Any] = {}
    for rows in (1, 2) if bench.smoke else (1, 8, 64):
        requests = generation.make_requests(generation.make_prompts(rows, 5), frames)
        for name, int8 in (("int8", True), ("bf16", False)):
            engine = Engine(lm, rows, 512, int8=int8)
            seconds = harness.median_seconds(partial(engine.generate, requests), device, 3)
            figures[f"{name}, {rows} rows, ids_per_second"] = rows * frames * QUANTIZERS / seconds
            bench.save({"figures": figures})
            free_memory()
    bench.save({"microseconds_of_a_product": product_microseconds(bench)})


def product_microseconds(bench: Bench) -> dict[str, float]:
    """Time of each product of x [rows, inputs] with weights of the 1.3B's projections, in microseconds.

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
            "int8, torch's": lambda x, i, p=layers: torch_int8_product()(x, p[i].weight, p[i].scale),
        }
        for rows in (1, 64):
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            for name, product in products.items():
                try:
                    way = captured(partial(product, x), count, device)
                    seconds = harness.median_seconds(way, device, 5)
                    found[f"{name}, {rows} x {inputs} x {outputs}"] = 1e6 * seconds / count
                except RuntimeError as error:  # an operator that this version does not have here
                    print(name, rows, error)
    return found


def captured(function: Callable[[int], Any], count: int, device: torch.device) -> Callable[[], Any]:
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
    prompt_frames, turns = (5, 2) if bench.smoke else (38, 5)
    engine = Engine(generation_model(bench, codec), 1, 512)
    figures = {"first_audio_ms": 1000 * generation.first_audio_seconds(engine, prompt_frames, turns)}
    bench.save({"figures": figures})
    codes = torch.randint(2048, (QUANTIZERS, 8 if bench.smoke else 96))
    ways: dict[str, Callable[[], Any]] = {"decoded_at_once": partial(codec.decode, codes)}
    for chunk in (1, 4):
        ways[f"streamed_{chunk}_frames"] = partial(generation.decode_in_chunks, codec, codes, chunk)
    for name, way in ways.items():
        seconds = harness.median_seconds(way, bench.device, turns)
        figures[f"{name}_ms_a_frame"] = 1000 * seconds / codes.shape[1]
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
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = harness.median_seconds(partial(codec.encode, clips), device, 3)
        figures[f"{count} clips"] = count * seconds / taken
        if device.type == "cuda":
            peaks[f"{count} clips"] = torch.cuda.max_memory_allocated() / 2**30
        bench.save({"audio_seconds_per_second": figures, "peak_gib": peaks})
    clip = noise(seconds)[None, None].to(device)

    @torch.no_grad()
    def plain() -> None:
        with no_tf32(device):  # as codes need it
            codec.model.encode(clip, num_quantizers=QUANTIZERS).audio_codes.cpu()

    figures["transformers, one by one"] = seconds / harness.median_seconds(plain, device, 3)
    figures["ratio"] = figures[f"{counts[-1]} clips"] / figures["transformers, one by one"]
    bench.save({"audio_seconds_per_second": figures})


def time_online(bench: Bench) -> None:
    """The training step while the codec encodes what the steps take, in a thread of its own, beside ready rows.

    Recordings are waveforms already: decoding files is the work of other threads, on the CPU.
    """
    codec = make_codec(bench.device, bench.smoke)
    steps, seconds = (2, 2.0) if bench.smoke else (12, 13.0)
    options = training_step.Options(size="1.3B", dtype="bfloat16", compile=True, batch=32)
    options = small_if_smoke(bench, options, batch=2, compile=False)
    init_distributed(Comm())
    run = training_step.make_run(options, 0, bench.device, Path("unused"))
    ready = training_step.make_batch(training_step.make_rows(options, 0, False), options)
    clips = [noise(seconds, i) for i in range(options.batch)]

    def encode() -> Iterator[list[int]]:
        while True:
            yield [len(codes) for codes in codec.encode(clips)]

    def time_steps(recordings: Iterator[list[int]] | None) -> float:
        """Seconds of a step, after three that are not counted."""
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
    figures["seconds_of_encoding_alone"] = harness.seconds_of(partial(codec.encode, clips), bench.device)
    bench.save({"figures": figures})
    dist.destroy_process_group()


@torch.inference_mode()
def time_evaluation(bench: Bench) -> None:
    """Pairs of clips to scores: batches of codes and of scores, beside one clip at a time with whole logits."""
    codec = make_codec(bench.device, bench.smoke)
    lm, lengths = generation_model(bench, codec), random.Random(0)
    pairs, longest = (2, 2) if bench.smoke else (32, 12)
    clips = [noise(lengths.uniform(longest / 6, longest), i) for i in range(2 * pairs)]
    kept = codec.encode(clips)

    def scored(codes: list[torch.Tensor]) -> list[torch.Tensor]:
        return score(lm.model, [lm.stream.sample(each) for each in codes], 16)

    ways = {
        "plain": lambda: evaluation.plain_nlls(lm, clips),
        "ours": lambda: scored(codec.encode(clips)),
        "ours, codes kept": lambda: scored(kept),
    }
    nlls: dict[str, list[torch.Tensor]] = {}
    figures: dict[str, Any] = {}
    for name, way in ways.items():
        nlls[name] = way()
        figures[f"pairs_per_second, {name}"] = pairs / harness.seconds_of(way, bench.device)
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
