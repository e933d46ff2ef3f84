"""Continue a spoken prompt: ``python inference.py --prompt FILE_OR_URL --output output.wav``.

The prompt is encoded with the checkpoint's codec, the model continues it unit by unit, and prompt and continuation are
decoded together into one 24 kHz waveform. The continuation ends where the model says so or at ``--max_seconds``.
"""

import http.client
import io
import math
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import soundfile
import torch
import tyro
from tqdm import tqdm

from torchtitan.audio.codec import FRAME_RATE
from torchtitan.audio.waveform import SAMPLE_RATE, load_audio, open_audio
from torchtitan.generation import DEFAULT_MAX_IDS, Sampling, continue_codes, frame_bound, require_room
from torchtitan.models.speech_lm import SpeechLM, choose_device
from torchtitan.tools.errors import UserError, run_command

DEFAULT_PROMPT = str(Path(__file__).resolve().parent / "assets" / "prompt.flac")

DOWNLOAD_MAX_BYTES = 50_000_000
DOWNLOAD_MAX_SECONDS = 120.0
DOWNLOAD_STALL_SECONDS = 20.0

# libsndfile's (format, subtype) of endings that are not the name of a format.
ENDINGS = {"aif": ("AIFF", None), "oga": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}


@dataclass
class Options:
    """Continue a spoken prompt: one waveform with the prompt and what the model makes follow it."""

    model_name: str = "llm-jp/Llama-Mimi-1.3B"
    """The model: a hub name, or a folder in Hugging Face format."""
    audio_tokenizer: str | None = None
    """The codec: a hub name or a folder. Default: the one that the model's config.json names, else kyutai/mimi."""
    prompt: str = DEFAULT_PROMPT
    """The speech to continue: an audio file of any rate and channel count, or an http(s) address of one."""
    output: str = "output.wav"
    """Where prompt and continuation go; the ending says the format (wav, flac, ogg, opus, mp3, ...). With several
    samples the files are numbered: output-0.wav, output-1.wav, ..."""
    max_seconds: float | None = None
    """What prompt and continuation may last together. Default: what fits into 1,024 ids (20.4 s with 4 quantizers)."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely unit each time."""
    top_k: int | None = 30
    """Draw from the k most likely units only; None from all."""
    top_p: float = 1.0
    """Draw from the most likely units that together reach this probability; 1 is no limit."""
    seed: int = 0
    """The same seed gives the same samples, whatever --num_samples is."""
    num_samples: int = 1
    """How many continuations to draw."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... or mps. Default: cuda if there is one, then mps, then cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the language model; the codec is always in float32. Default: bfloat16 on cuda, float32 elsewhere."""


def run(options: Options) -> list[Path]:
    """Do what the command line asks, print a short report, and return the files written.

    Raises:
        UserError: anything the user can put right; whatever can be checked before the model is loaded, is.
    """
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if options.num_samples < 1:
        raise UserError(f"num_samples must be 1 or more, not {options.num_samples}.")
    outputs = output_paths(options.output, options.num_samples)
    for path in outputs:
        check_output(path, options.prompt)
    device = choose_device(options.device)
    waveform = read_prompt(options.prompt, options.max_seconds)

    lm = SpeechLM.load(options.model_name, options.audio_tokenizer, device, options.dtype)
    max_frames = frame_bound(lm, options.max_seconds)
    prompt_frames = lm.codec.num_frames(waveform.numel())
    require_room(prompt_frames, max_frames)
    prompt = lm.codec.encode([waveform])[0]
    print(f"prompt: {waveform.numel() / SAMPLE_RATE:.2f} s, {prompt_frames} frames of {lm.stream.num_quantizers} units")

    start = time.perf_counter()
    with tqdm(total=max_frames - prompt_frames, unit="frame") as bar:
        continuations = continue_codes(lm, prompt, max_frames, sampling, options.num_samples, bar.update)
    waveforms = [lm.codec.decode(torch.cat([prompt, continuation.codes], dim=1)) for continuation in continuations]
    elapsed = time.perf_counter() - start

    for path, result, continuation in zip(outputs, waveforms, continuations, strict=True):
        write_audio(path, result)
        frames = continuation.codes.shape[1]
        how = "ended by itself" if continuation.ended else f"stopped at the bound of {max_frames} frames in all"
        print(f"continuation: {frames} frames, {frames / FRAME_RATE:.2f} s, {how}; {path} written")
    seconds = sum(continuation.codes.shape[1] for continuation in continuations) / FRAME_RATE
    print(f"speed: {seconds:.2f} s of new speech in {elapsed:.2f} s, {seconds / elapsed:.2f} times real time")
    return outputs


def read_prompt(source: str, max_seconds: float | None) -> torch.Tensor:
    """A prompt file or address as a waveform [n] at 24 kHz, whole or not at all.

    Raises:
        UserError: it cannot be fetched or read, or it is longer than any continuation could be.
    """
    audio = download(source) if source.lower().startswith(("http://", "https://")) else source
    # Reading stops soon after the bound, so that the length of a file that is far too long costs nothing.
    limit = max_seconds if max_seconds is not None and math.isfinite(max_seconds) else DEFAULT_MAX_IDS / FRAME_RATE
    waveform = load_audio(audio, max(limit, 0.0) + 1.0, name=source)
    if waveform.numel() > limit * SAMPLE_RATE:
        with open_audio(audio) as file:
            seconds = file.frames / file.samplerate
        bound = f"--max_seconds allows {limit:g} s"
        if max_seconds is None:
            bound = f"by default no model takes more than {limit:.2f} s"
        raise UserError(
            f"{source}: the prompt lasts {seconds:.2f} s and {bound} for prompt and continuation together; "
            f"shorten the prompt or raise --max_seconds."
        )
    return waveform


def download(url: str) -> bytes:
    """Fetch a file over http(s), within the limits of size and time above.

    Raises:
        UserError: the address does not answer with a file, or the file is too large or too slow.
    """
    deadline = time.monotonic() + DOWNLOAD_MAX_SECONDS
    data = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llama-mimi"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_STALL_SECONDS) as response:
            declared = int(response.headers.get("Content-Length") or -1)
            while chunk := response.read1(1 << 16):
                data += chunk
                if max(len(data), declared) > DOWNLOAD_MAX_BYTES:
                    raise UserError(f"{url}: the file is larger than {DOWNLOAD_MAX_BYTES // 1_000_000} MB.")
                if time.monotonic() > deadline:
                    raise UserError(f"{url}: the download took more than {DOWNLOAD_MAX_SECONDS:.0f} s.")
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answered {error.code} {error.reason}.") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: it could not be downloaded ({str(reason) or type(error).__name__}).") from None
    if len(data) < declared:
        raise UserError(f"{url}: the download broke off after {len(data):,} of {declared:,} bytes.")
    return bytes(data)


def output_paths(output: str, num_samples: int) -> list[Path]:
    """``output`` itself, or one numbered name for each of several samples."""
    path = Path(output)
    if num_samples == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(num_samples)]


def output_format(path: Path) -> tuple[str, str | None]:
    """libsndfile's (format, subtype) for a file's ending; None is the format's usual subtype.

    Raises:
        UserError: no format that can be written has this ending.
    """
    ending = path.suffix[1:].lower()
    file_format, subtype = ENDINGS.get(ending, (ending.upper(), None))
    try:
        if file_format == "SD2":  # keeps its header in a second file
            raise ValueError(file_format)
        soundfile.write(io.BytesIO(), torch.zeros(SAMPLE_RATE).numpy(), SAMPLE_RATE, subtype, format=file_format)
    except (TypeError, ValueError, soundfile.SoundFileError):
        raise UserError(
            f"{path}: no audio format with the ending {path.suffix!r} can be written; use .wav, .flac, .ogg or .mp3."
        ) from None
    return file_format, subtype


def check_output(path: Path, prompt: str) -> None:
    """Refuse an output that could not be written once the model has run.

    Raises:
        UserError: an unknown ending, a folder that is not there or closed to us, or the prompt's own file.
    """
    output_format(path)
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"{path}: the folder {folder} does not exist.")
    if path.is_dir():
        raise UserError(f"{path}: this is a folder, not a file.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{path}: the file cannot be written (no permission).")
    if path.exists() and os.path.exists(prompt) and path.samefile(prompt):
        raise UserError(f"{path}: this is the prompt's own file; choose another --output.")


def write_audio(path: Path, waveform: torch.Tensor) -> None:
    """Write a waveform [n] at 24 kHz, clipped to full scale, in the format that the path's ending names.

    Raises:
        UserError: samples that are not finite, or a file that cannot be written.
    """
    if not torch.isfinite(waveform).all():
        raise UserError(f"{path}: not written, as the codec gave samples that are not finite numbers.")
    file_format, subtype = output_format(path)
    try:
        with soundfile.SoundFile(str(path), "w", SAMPLE_RATE, 1, subtype, format=file_format) as file:
            for block in waveform.clamp(-1.0, 1.0).split(SAMPLE_RATE):  # libsndfile's Vorbis overflows on long blocks
                file.write(block.numpy())
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{path}: the file could not be written ({error}).") from None


def main() -> None:
    run(tyro.cli(Options, use_underscores=True))


if __name__ == "__main__":
    run_command(main)
