"""Speech continuations here, side by side with the plain way: ``uv run python benchmarks/generation.py``.

Plain: transformers' generate as the original inference calls it (growing cache, all 136,450 columns, a stop check in
Python, units parsed from the ids' strings) and one MimiModel.decode at the end. Ours: the engine, and the codec's
decode of its codes. Both continue the same prompts by the same number of frames; weights are random, so the speech is
noise. The codec has kyutai/mimi's size. The ways run in turn in one process, each warmed up once, and each figure is
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
from functools import partial
from typing import Any, Literal

import harness
import torch
from models import QUANTIZERS, VOCABULARY, make_speech_model

from torchtitan.audio.codec import FRAME_RATE
from torchtitan.audio.streaming import StreamingDecoder
from torchtitan.generation import Engine, Request, Sampling, stream_speech


@dataclass
class Options:
    """What to measure."""

    size: Literal["small", "mid", "1.3B"] = "small"
    """Size of the language model."""
    vocabulary: int = VOCABULARY
    """Number of its ids; the last 8,194 are those of audio."""
    rows: tuple[int, ...] = (1, 8)
    """Continuations at once."""
    prompt_seconds: float = 3.0
    """Length of each prompt."""
    new_seconds: float = 5.0
    """Length of each continuation."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of the language model; for int8, plain runs in bfloat16."""
    compile: bool = False
    """Ours: compile the blocks."""
    turns: int = 3
    """Times that the ways run in turn."""
    device: str | None = None
    """Default: cuda if there is one."""
    ours_only: bool = False
    """Leave the plain way out."""


def make_prompts(rows: int, frames: int) -> list[torch.Tensor]:
    """Random codes [Q, frames] of each row."""
    return [torch.randint(2048, (QUANTIZERS, frames)) for _ in range(rows)]


def make_requests(prompts: list[torch.Tensor], frames: int, **more: Any) -> list[Request]:
    """A request of this many new frames for each prompt."""
    return [Request(prompt, frames, sample=i, **more) for i, prompt in enumerate(prompts)]


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
        # A random model does not speak in whole frames, so the first units are repeated to the full length.
        codes = torch.tensor([int(code) for code, _ in units[:QUANTIZERS]] or [0] * QUANTIZERS)[:, None]
        codes = codes.expand(-1, frames + prompts[0].shape[1])
        waveforms.append(lm.codec.model.decode(codes[None].to(lm.device)).audio_values[0, 0].float().cpu())
    return waveforms


def ours(engine: Engine, prompts: list[torch.Tensor], frames: int) -> list[torch.Tensor]:
    """The waveforms of the engine's way."""
    results = engine.generate(make_requests(prompts, frames, sampling=Sampling(temperature=0.8, top_k=30)))
    pairs = zip(prompts, results, strict=True)
    return [engine.lm.codec.decode(torch.cat([prompt, result.codes], dim=1)) for prompt, result in pairs]


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over a large tensor reads, the best of 6."""
    data = torch.ones((1 << 28 if device.type == "cpu" else 1 << 31) // 4, device=device)
    return data.numel() * 4 / min(harness.seconds_of(data.sum, device) for _ in range(6))


def memory_bound(engine: Engine, rows: int, prompt_frames: int, frames: int, bandwidth: float) -> float:
    """Ids a second if a step only read what it must: the blocks, a quantizer's part of the head, keys and values."""

    def size(part: torch.nn.Module) -> int:
        tensors = [*part.parameters(), *part.buffers()]
        tensors += [module.weight for module in part.modules() if type(module).__name__ == "Packed"]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    llama = engine.llama
    keys = llama.keys[:, 0, :, 0].numel() * llama.keys.element_size()
    positions = 2 + QUANTIZERS * (prompt_frames + frames / 2)
    return rows * bandwidth / (size(llama.layers) + size(engine.heads[1]) + 2 * keys * positions * rows)


def first_audio_seconds(engine: Engine, prompt_frames: int, turns: int) -> float:
    """Time from a request to its first new audio: the median of some, after one that is not counted."""
    waits = []
    for _ in range(turns + 1):
        request = Request(torch.randint(2048, (QUANTIZERS, prompt_frames)), 10)
        begin = time.perf_counter()
        stream = stream_speech(engine, request, prompt=False)
        next(stream)
        waits.append(time.perf_counter() - begin)
        stream.close()  # which waits for the frame at work
    return statistics.median(waits[1:])


def decode_in_chunks(codec: Any, codes: torch.Tensor, chunk: int) -> torch.Tensor:
    """The waveform [n] of codes [Q, T] that come some frames at a time."""
    decoder = StreamingDecoder(codec)
    return torch.cat([decoder.decode(part) for part in codes.split(chunk, dim=1)])


@torch.inference_mode()
def main(options: Options) -> None:
    """Measure and print."""
    device = harness.find_device(options.device)
    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    lm = make_speech_model(options.size, options.vocabulary, dtype, device)
    prompt_frames, frames = round(options.prompt_seconds * FRAME_RATE), round(options.new_seconds * FRAME_RATE)
    context = lm.stream.sample_length(prompt_frames + frames)
    speed = bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {options.size}, {options.dtype}; memory read at {speed / 1e9:.1f} GB/s")

    def make_engine(rows: int) -> Engine:
        return Engine(lm, rows, context, int8=options.dtype == "int8", compile_layers=options.compile)

    for rows in options.rows:
        compare(options, make_engine(rows), rows, prompt_frames, frames, speed)

    first = first_audio_seconds(make_engine(1), prompt_frames, options.turns)
    print(f"first new audio after {1000 * first:.0f} ms (prompt of {options.prompt_seconds:g} s)")
    codes = torch.randint(2048, (QUANTIZERS, 48))
    ways: dict[str, Callable[[], Any]] = {"decode at once": lambda: lm.codec.model.decode(codes[None].to(device))}
    for chunk in (1, 2, 4, 12):
        ways[f"streaming decode, {chunk} frames at a time"] = partial(decode_in_chunks, lm.codec, codes, chunk)
    for name, way in ways.items():
        print(f"{name}: {1000 * harness.median_seconds(way, device, options.turns) / 48:.1f} ms a frame")


def compare(options: Options, engine: Engine, rows: int, prompt_frames: int, frames: int, bandwidth: float) -> None:
    """Print the speeds and ratios of all ways with so many rows at once."""
    lm = engine.lm
    prompts = make_prompts(rows, prompt_frames)
    requests = make_requests(prompts, frames)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(engine, prompts, frames),
        "ours, units alone": lambda: engine.generate(requests),
    }
    if not options.ours_only:
        ways["plain"] = lambda: plain(lm, prompts, frames, True)
        ways["plain, units alone"] = lambda: plain(lm, prompts, frames, False)
    timed = {way: partial(harness.seconds_of, function, lm.device) for way, function in ways.items()}
    harness.in_turns(timed, 1)
    seconds = harness.medians(harness.in_turns(timed, options.turns))
    tokens = rows * frames * QUANTIZERS
    for way, taken in seconds.items():
        times = rows * options.new_seconds / taken
        print(f"{rows} rows, {way}: {tokens / taken:.1f} tokens/s, {times:.2f} times real time")
    if "plain" in seconds:
        units = seconds["plain, units alone"] / seconds["ours, units alone"]
        print(f"{rows} rows, ratios: {seconds['plain'] / seconds['ours']:.2f}, of the units alone {units:.2f}")
    if rows > 1:
        differing = sum(
            not torch.equal(engine.generate([request])[0].codes, result.codes)
            for request, result in zip(requests[:8], engine.generate(requests), strict=False)
        )
        print(f"{rows} rows, other codes than alone: {differing} of {min(rows, 8)}")
    bound = memory_bound(engine, rows, prompt_frames, frames, bandwidth)
    share = tokens / seconds["ours, units alone"] / bound
    print(f"{rows} rows, bound of memory: {bound:.0f} tokens/s, reached {100 * share:.0f} %")


if __name__ == "__main__":
    harness.run(main, Options, __doc__)
