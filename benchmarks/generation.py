"""Speech continuations here, side by side with the plain way: ``uv run python benchmarks/generation.py``.

Plain: transformers' generate as the original inference calls it (growing cache, all 136,450 columns, a stop check in
Python, units parsed from the ids' strings) and one MimiModel.decode at the end. Ours: the engine, and the streaming
decode of what it makes. Both continue the same prompts by the same number of frames; weights are random, and so is what
is said. The codec has kyutai/mimi's size. The ways run in turn in one process, each warmed up once, and each figure is
the median of its turns.

Also printed: the bound that memory sets, which is the bytes that a step must read (weights, the part of the head that
can come next, keys and values) over the bandwidth measured by summing up a large tensor; the time to the first new
audio; what a frame costs the streaming decoder; and how many rows (of 8) differ from what they give alone. On one
H200, for the 1.3B:

    python benchmarks/generation.py --size 1.3B --rows 1 8 64 --dtype bfloat16 --compile
"""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import command
import torch
from models import QUANTIZERS, make_model

from torchtitan.audio.codec import FRAME_RATE
from torchtitan.generation import Engine, Request, Sampling, stream_speech


@dataclass
class Options:
    """What is measured."""

    size: Literal["small", "mid", "1.3B"] = "small"
    """Of the language model."""
    vocabulary: int = 136_450
    """Its ids; the last 8,194 are those of audio."""
    rows: tuple[int, ...] = (1, 8)
    """Continuations at once."""
    prompt_seconds: float = 3.0
    """Length of each prompt."""
    new_seconds: float = 5.0
    """Length of each continuation."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the language model; plain runs in bfloat16 for int8."""
    compile: bool = False
    """Ours: compile the blocks."""
    turns: int = 3
    """How often the ways are run in turn."""
    device: str | None = None
    """Default: cuda if there is one."""
    ours_only: bool = False
    """Leave the plain way out."""


def plain(lm: Any, prompts: list[torch.Tensor], frames: int, decode: bool) -> list[torch.Tensor]:
    """The waveforms of transformers' way; without ``decode`` none, and the units alone are made."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    stream = lm.stream
    strings = stream.token_strings()

    class StopAtEnd(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> bool:
            return all(row[-1] == stream.audio_end_id for row in input_ids.tolist())

    ids = torch.stack([stream.sample(prompt, end=False) for prompt in prompts]).to(lm.device)
    found = lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.8,
        top_k=30,
        max_new_tokens=frames * QUANTIZERS,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([StopAtEnd()]),
    )
    waveforms = []
    for row in found.tolist() if decode else []:
        text = "".join(strings[i - stream.base_size] for i in row if i >= stream.base_size)
        units = re.findall(r"<(\d+)_(\d+)>", text)
        # A random model says no whole frames; as many are decoded as were made.
        codes = torch.tensor([int(code) for code, _ in units[:QUANTIZERS]] or [0] * QUANTIZERS)[:, None]
        codes = codes.expand(-1, frames + prompts[0].shape[1])
        waveforms.append(lm.codec.model.decode(codes[None].to(lm.device)).audio_values[0, 0].float().cpu())
    return waveforms


def ours(engine: Engine, prompts: list[torch.Tensor], frames: int) -> list[torch.Tensor]:
    """The waveforms of the engine's way."""
    sampling = Sampling(temperature=0.8, top_k=30)
    requests = [Request(prompt, frames, sampling=sampling, sample=i) for i, prompt in enumerate(prompts)]
    results = engine.generate(requests)
    codec = engine.lm.codec
    return [
        codec.decode(torch.cat([prompt, result.codes], dim=1)) for prompt, result in zip(prompts, results, strict=True)
    ]


def seconds_of(way: Callable[[], Any], device: torch.device) -> float:
    """How long a way takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large tensor reads, the best of 5."""
    data = torch.ones((1 << 28 if device.type == "cpu" else 1 << 31) // 4, device=device)
    return data.numel() * 4 / min(seconds_of(data.sum, device) for _ in range(6))


def bytes_of_step(engine: Engine, rows: int, positions: float) -> float:
    """What one step of all rows must read: the blocks, a quantizer's part of the head, keys and values."""

    def size(part: torch.nn.Module) -> int:
        tensors = [*part.parameters(), *part.buffers()]
        tensors += [module.weight for module in part.modules() if type(module).__name__ == "Packed"]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    llama = engine.llama
    keys = llama.keys[:, 0, :, 0].numel() * llama.keys.element_size()
    return size(llama.layers) + size(engine.heads[1]) + 2 * keys * positions * rows


@torch.inference_mode()
def main(options: Options) -> None:
    """Measure and print."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    lm = make_model(options.size, options.vocabulary, dtype, device)
    prompt_frames, frames = round(options.prompt_seconds * FRAME_RATE), round(options.new_seconds * FRAME_RATE)
    context = lm.stream.sample_length(prompt_frames + frames)
    speed = bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {options.size}, {options.dtype}; memory read at {speed / 1e9:.1f} GB/s")
    for rows in options.rows:
        prompts = [torch.randint(2048, (QUANTIZERS, prompt_frames)) for _ in range(rows)]
        engine = Engine(lm, rows, context, int8=options.dtype == "int8", compile_layers=options.compile)
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda engine=engine, prompts=prompts: ours(engine, prompts, frames),
            "ours, units alone": lambda engine=engine, prompts=prompts: engine.generate(
                [Request(prompt, frames, sample=i) for i, prompt in enumerate(prompts)]
            ),
        }
        if not options.ours_only:
            ways["plain"] = lambda prompts=prompts: plain(lm, prompts, frames, True)
            ways["plain, units alone"] = lambda prompts=prompts: plain(lm, prompts, frames, False)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.turns + 1):
            for way, function in ways.items():
                elapsed = seconds_of(function, device)
                if turn:
                    times[way].append(elapsed)
        median = {way: statistics.median(values) for way, values in times.items()}
        tokens = rows * frames * QUANTIZERS
        for way, elapsed in median.items():
            print(
                f"{rows} rows, {way}: {tokens / elapsed:.1f} tokens/s, "
                f"{rows * options.new_seconds / elapsed:.2f} times real time"
            )
        if "plain" in median:
            units = median["plain, units alone"] / median["ours, units alone"]
            print(f"{rows} rows, ratios: {median['plain'] / median['ours']:.2f}, of the units alone {units:.2f}")
        if rows > 1:
            requests = [Request(prompt, frames, sample=i) for i, prompt in enumerate(prompts)]
            together = engine.generate(requests)
            differing = sum(
                not torch.equal(engine.generate([request])[0].codes, result.codes)
                for request, result in zip(requests[:8], together, strict=False)
            )
            print(f"{rows} rows, other codes than alone: {differing} of {min(rows, 8)}")
        positions = 2 + QUANTIZERS * (prompt_frames + frames / 2)
        bound = rows * speed / bytes_of_step(engine, rows, positions)
        share = tokens / median["ours, units alone"] / bound
        print(f"{rows} rows, bound of memory: {bound:.0f} tokens/s, reached {100 * share:.0f} %")

    engine = Engine(lm, 1, context, int8=options.dtype == "int8", compile_layers=options.compile)
    request = Request(torch.randint(2048, (QUANTIZERS, prompt_frames)), 10)
    waits = []
    for _ in range(options.turns + 1):
        start = time.perf_counter()
        stream = stream_speech(engine, request, prompt=False)
        next(stream)
        waits.append(time.perf_counter() - start)
        stream.close()  # which waits for the frame at work
    print(
        f"first new audio after {1000 * statistics.median(waits[1:]):.0f} ms (prompt of {options.prompt_seconds:g} s)"
    )
    from torchtitan.audio.streaming import StreamingDecoder

    codes = torch.randint(2048, (QUANTIZERS, 48))
    whole = [
        seconds_of(lambda: lm.codec.model.decode(codes[None].to(device)), device) for _ in range(options.turns + 1)
    ]
    print(f"decode at once: {1000 * statistics.median(whole[1:]) / 48:.1f} ms a frame")
    for chunk in (1, 2, 4, 12):
        taken = []
        for _ in range(options.turns + 1):
            decoder = StreamingDecoder(lm.codec)
            taken.append(seconds_of(lambda: [decoder.decode(part) for part in codes.split(chunk, dim=1)], device))  # noqa: B023
        print(f"streaming decode, {chunk} frames at a time: {1000 * statistics.median(taken[1:]) / 48:.1f} ms a frame")


if __name__ == "__main__":
    command.run(main, Options, __doc__)
