"""Continue a spoken prompt on a server that takes and gives token ids (docs/serving.md).

    python scripts/serve_client.py --server http://127.0.0.1:8000 --model_name MODEL --prompt speech.wav

The client has the codec and the token stream. It encodes the prompt, exchanges only ids with the server, and decodes
the frames as they arrive. It reads only the configuration and the tokenizer of the model's folder.
"""

import http.client
import itertools
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch

from torchtitan.audio.codec import FRAME_RATE, FRAME_SIZE, Codec
from torchtitan.audio.conventions import conventions_of
from torchtitan.audio.streaming import StreamingDecoder
from torchtitan.audio.token_stream import TokenStream
from torchtitan.audio.waveform import SAMPLE_RATE, load_audio
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.hub import local_copy, require_model_folder
from torchtitan.tools.logging import quiet_transformers

STALL_SECONDS = 120.0  # between two chunks; the first waits for the server's queue


@dataclass
class Options:
    """Continue a spoken prompt: one waveform with the prompt and what the served model makes follow it."""

    model_name: str
    """The served checkpoint, a hub name or a folder: says the layout of the ids and the codec."""
    prompt: Path = Path("assets/prompt.flac")
    """The speech to continue, an audio file."""
    output: Path = Path("output.wav")
    """Where prompt and continuation go."""
    server: str = "http://127.0.0.1:8000"
    """Address of the server."""
    audio_tokenizer: str | None = None
    """The codec: a hub name or a folder. Default: the one that the model's config.json names."""
    max_seconds: float = 20.0
    """What prompt and continuation may last together."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely unit each time."""
    top_k: int | None = 30
    """Draw from the k most likely units only; None from all."""
    top_p: float = 1.0
    """Draw from the most likely units that together reach this probability; 1 is no limit."""
    seed: int | None = None
    """Of the server's random numbers, which are not those of inference.py; None draws anew each time."""


def run(options: Options) -> None:
    """Do what the command line asks and print a short report.

    Raises:
        UserError: a file, the codec or the server cannot be used, or the server sent no whole frames.
    """
    if not 0 < options.max_seconds < math.inf:
        raise UserError(f"max_seconds must be a number of seconds over 0, not {options.max_seconds}.")
    stream, codec = load_ends(options.model_name, options.audio_tokenizer)
    waveform = load_audio(options.prompt, options.max_seconds, resampler=codec.resampler)
    prompt = codec.encode([waveform])[0]
    room = int(options.max_seconds * FRAME_RATE + 1e-6) - prompt.shape[1]
    if room < 1:
        raise UserError(f"{options.prompt}: the prompt fills max_seconds ({options.max_seconds:g}); raise it.")
    request = {
        "prompt": stream.sample(prompt, end=False).tolist(),
        "max_tokens": room * stream.num_quantizers,
        "stop_token_ids": [stream.audio_end_id],
        "temperature": options.temperature,
        "top_k": -1 if options.top_k is None else options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "return_token_ids": True,
        "stream": True,
    }
    start = time.perf_counter()
    received, times = [], []

    def arriving() -> Iterator[int]:
        for token in send(options.server, request):
            received.append(token)
            times.append(time.perf_counter() - start)
            yield token

    arrived = whole_frames(stream, arriving())
    first = list(itertools.islice(arrived, 1))  # a server that refuses leaves an earlier output as it is
    samples = 0
    try:
        with soundfile.SoundFile(options.output, "w", SAMPLE_RATE, 1) as file:
            for piece in to_audio(codec, prompt, itertools.chain(first, arrived)):
                file.write(piece.clamp(-1.0, 1.0).numpy())
                samples += piece.numel()
    except (OSError, TypeError, ValueError, soundfile.SoundFileError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{options.output}: the file cannot be written ({error}).") from None
    frames = samples // FRAME_SIZE - prompt.shape[1]
    how = "ended by itself" if stream.audio_end_id in received else "stopped at the bound"
    print(f"prompt: {prompt.shape[1]} frames; continuation: {frames} frames, {frames / FRAME_RATE:.2f} s, {how}")
    if frames:
        begin, end = times[stream.num_quantizers - 1], times[stream.num_quantizers * frames - 1]
        print(f"first frame after {begin:.2f} s, last after {end:.2f} s")
    print(f"{options.output} written")


def load_ends(model_name: str, audio_tokenizer: str | None) -> tuple[TokenStream, Codec]:
    """The layout of a checkpoint's ids and its codec, without its weights.

    Raises:
        UserError: one of them cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    quiet_transformers()
    require_model_folder(model_name)
    folder = local_copy(model_name, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except OSError as error:
        raise UserError(f"{model_name}: no configuration and tokenizer there ({str(error).splitlines()[0]}).") from None
    stream = TokenStream.from_tokenizer(tokenizer, getattr(config, "num_quantizers", None))
    made = conventions_of(config.to_dict())
    name = audio_tokenizer or made["audio_tokenizer"]
    settings = (name, stream.num_quantizers, made["codec_padding"], made["codec_window"])
    return stream, Codec.load(*settings, resampler=made["resampler"])


def send(server: str, request: dict[str, Any]) -> Iterator[int]:
    """Post a request to the server's /v1/completions and give the new ids as they arrive.

    Raises:
        UserError: no server, or one that refuses or breaks off, with its reason.
    """
    address = f"{server.rstrip('/')}/v1/completions"
    try:
        body = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(body, timeout=STALL_SECONDS) as response:
            for line in response:
                # Each event is one line, "data: {...}", with empty lines between events; the last is "data: [DONE]".
                data = line.decode().strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if not data:
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise UserError(f"{address}: the server gave up ({event['error'].get('message')}).")
                for choice in event["choices"]:
                    yield from choice["token_ids"] or ()
    except urllib.error.HTTPError as error:
        raise UserError(f"{address}: the server refused the request ({error.code}: {_reason(error)}).") from None
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{address}: no stream of ids came from there ({str(error) or type(error).__name__})."
        ) from None
    raise UserError(f"{address}: the stream of ids broke off.")


def whole_frames(stream: TokenStream, ids: Iterable[int]) -> Iterator[torch.Tensor]:
    """The frames, codes [Q, 1] each, of ids up to ``</audio>``; a frame that max_tokens cut is left out.

    Raises:
        UserError: ids that are no frames, as from a server without the constraint.
    """
    frame: list[int] = []
    for token in ids:
        if token == stream.audio_end_id and not frame:
            return
        frame.append(token)
        if len(frame) == stream.num_quantizers:
            try:
                yield stream.decode(torch.tensor(frame))
            except ValueError:
                raise UserError(
                    f"the server sent {frame}, which is no frame of {stream.num_quantizers} units in order: start it "
                    "with --logits-processors vllm_frames:FrameProcessor."
                ) from None
            frame = []


def to_audio(codec: Codec, prompt: torch.Tensor, frames: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Prompt [Q, Tp] and arriving frames [Q, 1] to waveforms [n], each as soon as its frames are there."""
    decoder = StreamingDecoder(codec)
    yield decoder.decode(prompt)
    for frame in frames:
        yield decoder.decode(frame)


def _reason(error: urllib.error.HTTPError) -> str:
    """What an error response says, in one line."""
    try:
        return " ".join(json.loads(error.read())["error"]["message"].split())
    except (OSError, ValueError, KeyError, TypeError):
        return error.reason


def main() -> None:
    import tyro

    run(tyro.cli(Options, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    run_command(main)
