"""Continue a spoken prompt: ``python inference.py --prompt FILE_OR_URL --output output.wav``.

The prompt is encoded with the checkpoint's codec, the model continues it unit by unit, and prompt and continuation are
decoded together into one 24 kHz waveform. The continuation ends where the model says so or at ``--max_seconds``.

Several prompts and samples are continued together (``--batch_size``), and each is written as soon as it is complete.
With ``--output -`` the speech of one prompt goes to standard output while it is being made:
``python inference.py --output - | aplay -f S16_LE -r 24000``.
"""

import concurrent.futures
import functools
import http.client
import io
import json
import math
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch
import tyro
from tqdm import tqdm

from torchtitan.audio.codec import FRAME_RATE, FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, load_audio, open_audio, pcm16
from torchtitan.checkpoint.speech_lm import SpeechLM, choose_device
from torchtitan.generation import (
    BATCH_ROWS,
    DEFAULT_MAX_IDS,
    Engine,
    Generation,
    Request,
    Sampling,
    frame_bound,
    require_room,
    sample_requests,
    stream_speech,
    text_prompt,
)
from torchtitan.tools.errors import UserError, run_command

DEFAULT_PROMPT = str(Path(__file__).resolve().parent / "assets" / "prompt.flac")

# File endings of prompts in a folder: formats that libsndfile reads.
AUDIO_ENDINGS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}

DOWNLOAD_MAX_BYTES = 50_000_000
DOWNLOAD_MAX_SECONDS = 120.0
DOWNLOAD_STALL_SECONDS = 20.0

# libsndfile's (format, subtype) of endings that are not the name of a format.
ENDINGS = {"aif": ("AIFF", None), "oga": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}


@dataclass
class Options:
    """Continue spoken prompts: one waveform each with the prompt and what the model makes follow it."""

    model_name: str = "llm-jp/Llama-Mimi-1.3B"
    """The model: a hub name, a folder in Hugging Face format, or a training checkpoint as it is."""
    audio_tokenizer: str | None = None
    """The codec: a hub name or a folder. Default: the one that the model's config.json names, else kyutai/mimi."""
    prompt: tuple[str, ...] | None = None
    """The speech to continue: audio files of any rate and channel count, http(s) addresses of such, or folders of them.
    Default: the one in assets/, or none with --text and --unconditional."""
    text: str | None = None
    """A text to speak, for models trained with the task tts; with --prompt, what is said in it and what follows."""
    unconditional: bool = False
    """Start from nothing."""
    output: str = "output.wav"
    """Where prompt and continuation go; the ending says the format (wav, flac, ogg, opus, mp3, ...). Several samples
    are numbered (output-0.wav, ...), of several prompts each adds its name (output-NAME.wav). A name that ends in / is
    a folder, in which the files are called after their prompts. - is standard output: 24 kHz, mono, 16 bits, raw."""
    max_seconds: float | None = None
    """What prompt and continuation may last together. Default: what fits into 1,024 ids (20.4 s with 4 quantizers)."""
    context_seconds: float | None = None
    """How much of the speech so far the model sees at most: when it is full, the older half is forgotten. Default: all
    of it, and --max_seconds cannot be over the model's context."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely unit each time."""
    top_k: int | None = 30
    """Draw from the k most likely units only; None from all."""
    top_p: float = 1.0
    """Draw from the most likely units that together reach this probability; 1 is no limit."""
    repetition_penalty: float = 1.0
    """Over 1 makes units less likely that their quantizer had in the last --repetition_window frames."""
    repetition_window: int = 64
    """Frames (of 80 ms, at most 256) that the repetition penalty looks back on."""
    unconstrained: bool = False
    """Draw from the whole vocabulary, as the original did; what follows the first broken frame is dropped."""
    seed: int = 0
    """The same seed gives the same samples, whatever --num_samples, --batch_size and the other prompts are."""
    num_samples: int = 1
    """How many continuations of each prompt to draw."""
    batch_size: int | None = None
    """How many continuations to make at once. Default: 64 on cuda, 8 elsewhere."""
    skip_existing: bool = False
    """Leave out what has its output already, so that a run that was stopped goes on."""
    spectrogram: bool = False
    """Draw a PNG beside each output: waveform and spectrogram, with the end of the prompt marked."""
    report: str | None = None
    """A JSON file for what is printed: of each output the frames, seconds and how it ended, and the speed."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... or mps. Default: cuda if there is one, then mps, then cpu."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """Of the language model; int8 keeps its weights in 8 bits and computes in bfloat16. The codec is always in float32.
    Default: bfloat16 on cuda, float32 elsewhere."""
    resampler: str | None = None
    """How recordings become 24 kHz: torchaudio, soxr_hq or ffmpeg. Default: as the model's config.json says, else
    torchaudio."""
    compile: bool = False
    """torch.compile the model's blocks: takes a minute at the start, pays for many prompts on a GPU."""


@dataclass
class Job:
    """One continuation to make.

    Attributes:
        source: the prompt's file or address; None without one.
        sample: its number among those of the prompt.
        prompt_samples: length of the prompt at 24 kHz.
        number: its place in the order of jobs.
    """

    source: str | None
    sample: int
    output: Path
    request: Request
    prompt_samples: int
    generation: Generation | None = None
    number: int = 0


def run(options: Options) -> list[Path]:
    """Do what the command line asks, print a short report, and return the files written.

    Raises:
        UserError: a mistake of the user, found before the model is loaded where possible. If one of several prompts
            cannot be used, the others are continued first.
    """
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        repetition_window=options.repetition_window,
        seed=options.seed,
    )
    if options.num_samples < 1:
        raise UserError(f"num_samples must be 1 or more, not {options.num_samples}.")
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, not {options.batch_size}.")
    sources = find_prompts(options)
    streamed = options.output == "-"
    files = options.report is not None or options.spectrogram or options.skip_existing
    if streamed and (len(sources) > 1 or options.num_samples > 1 or options.unconstrained or files):
        raise UserError(
            "--output - takes one prompt, one sample and constrained sampling, and neither --report, --spectrogram nor "
            "--skip_existing."
        )
    outputs = [] if streamed else output_paths(options.output, sources, options.num_samples)
    prompts = {identity(source) for source in sources if source is not None and os.path.exists(source)}
    for path in (path for paths in outputs for path in paths):
        check_output(path, prompts)
    if options.report is not None:
        check_writable(Path(options.report))
    device = choose_device(options.device)
    failed: dict[str, str] = {}
    if len(sources) == 1 and sources[0] is not None:
        read_prompt(sources[0], options.max_seconds)  # a mistake shows before the model is loaded

    int8 = options.dtype == "int8"
    dtype = "bfloat16" if int8 else options.dtype
    lm = SpeechLM.load(options.model_name, options.audio_tokenizer, device, dtype, resampler=options.resampler)
    text_ids = () if options.text is None else text_prompt(lm, options.text)
    max_frames = frame_bound(lm, options.max_seconds, len(text_ids), options.context_seconds is not None)
    context_frames = max_frames
    if options.context_seconds is not None:
        context = frame_bound(lm, options.context_seconds, len(text_ids), name="context_seconds")
        context_frames = min(max_frames, context)
    num_requests = len(sources) * options.num_samples
    engine = Engine(
        lm,
        rows=min(num_requests, options.batch_size or BATCH_ROWS.get(device.type, 8)),
        context=lm.stream.sample_length(context_frames, len(text_ids)),
        int8=int8,
        constrained=not options.unconstrained,
        compile_layers=options.compile,
        consume=True,
    )

    def jobs() -> Iterator[Job]:
        """Read and encode the prompts, one after the other, as the batch has room."""
        for i, source in enumerate(sources):
            if options.skip_existing and outputs and all(path.exists() for path in outputs[i]):
                continue
            try:
                prompt, num_samples = encode_prompt(lm, source, options.max_seconds)
                require_room(prompt.shape[1], max_frames)
                if prompt.shape[1] >= context_frames:
                    raise UserError(f"{source}: the prompt does not fit into --context_seconds; raise it.")
            except UserError as error:
                if len(sources) == 1:
                    raise
                failed[str(source)] = str(error)
                tqdm.write(f"left out: {error}", file=sys.stderr)
                continue
            new_frames = max_frames - prompt.shape[1]
            requests = sample_requests(prompt, new_frames, sampling, options.num_samples, text_ids)
            for sample, request in enumerate(requests):
                output = outputs[i][sample] if outputs else Path("-")
                if not (options.skip_existing and output.exists()):
                    yield Job(source, sample, output, request, num_samples)

    if streamed:
        stream_to_stdout(engine, next(jobs()))
        return []
    results = continue_all(engine, jobs(), options.spectrogram)
    if options.report is not None:
        report = {"command": sys.argv, "model_name": options.model_name, "dtype": engine.dtype, "device": str(device)}
        content = json.dumps({**report, **results, "failed": failed}, indent=2)
        try:
            Path(options.report).write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{options.report}: the report could not be written ({error.strerror}).") from None
    if failed:
        raise UserError(f"{len(failed)} of {len(sources)} prompts could not be used; the others were continued.")
    return [Path(result["output"]) for result in results["outputs"]]


def continue_all(engine: Engine, jobs: Iterator[Job], spectrogram: bool) -> dict[str, Any]:
    """Continue, decode and write every job, print a report and return the figures."""
    outputs: list[tuple[int, dict[str, Any]]] = []
    running: list[Job] = []
    announced: list[str] = []
    elapsed = 0.0
    made = 0
    more = True
    with tqdm(unit="frame") as bar:
        while more or running:
            while more and len(running) < engine.rows:
                job = next(jobs, None)
                more = job is not None
                if job is not None:
                    if job.source is not None and (not announced or announced[-1] != job.source):
                        announced.append(job.source)
                        units, frames = job.request.prompt.shape
                        seconds = job.prompt_samples / SAMPLE_RATE
                        say(f"prompt: {seconds:.2f} s, {frames} frames of {units} units; {job.source}")
                    job.generation = engine.submit(job.request)
                    job.number = made
                    made += 1
                    running.append(job)
            start = time.perf_counter()
            bar.update(len(engine.advance()))
            for job in [job for job in running if job.generation is not None and job.generation.finished]:
                running.remove(job)
                outputs.append((job.number, finish(engine, job, spectrogram)))
            elapsed += time.perf_counter() - start
    results = [result for _, result in sorted(outputs, key=lambda output: output[0])]
    seconds = sum(result["frames"] for result in results) / FRAME_RATE
    speed = seconds / elapsed if elapsed else 0.0
    if results:
        say(f"speed: {seconds:.2f} s of new speech in {elapsed:.2f} s, {speed:.2f} times real time")
    return {"outputs": results, "new_seconds": seconds, "elapsed_seconds": elapsed, "real_time_factor": speed}


def finish(engine: Engine, job: Job, spectrogram: bool) -> dict[str, Any]:
    """Decode and write a job's result; returns its figures.

    Raises:
        UserError: the model gave something that is not finite, or the file cannot be written.
    """
    generation = job.generation
    assert generation is not None
    if generation.error is not None:
        raise generation.error
    result, prompt = engine.continuation(generation), job.request.prompt
    waveform = engine.lm.codec.decode(torch.cat([prompt, result.codes], dim=1))
    write_audio(job.output, waveform)
    if spectrogram:
        from torchtitan.audio.spectrogram import draw_spectrogram

        draw_spectrogram(job.output.with_suffix(".png"), waveform, prompt.shape[1] * FRAME_SIZE)
    frames = result.codes.shape[1]
    bound = prompt.shape[1] + job.request.max_frames
    how = "ended by itself" if result.ended else f"stopped at the bound of {bound} frames in all"
    if result.dropped:
        how += f", {result.dropped} ids dropped from the first broken frame on"
    say(f"continuation: {frames} frame{'s' * (frames != 1)}, {frames / FRAME_RATE:.2f} s, {how}; {job.output} written")
    return {
        "prompt": job.source,
        "sample": job.sample,
        "output": str(job.output),
        "prompt_frames": prompt.shape[1],
        "frames": frames,
        "seconds": frames / FRAME_RATE,
        "first_frame_seconds": generation.first_frame - generation.started if frames else None,
        "ended": result.ended,
        "dropped_ids": result.dropped,
    }


def stream_to_stdout(engine: Engine, job: Job) -> None:
    """Write prompt and continuation as raw 16-bit samples to standard output, while they are being made."""
    start = time.perf_counter()
    samples, first = 0, 0.0
    try:
        for waveform in stream_speech(engine, job.request):
            sys.stdout.buffer.write(pcm16(waveform))
            sys.stdout.buffer.flush()
            samples += waveform.numel()
            if not first and samples > job.request.prompt.shape[1] * FRAME_SIZE:
                first = time.perf_counter() - start
    except BrokenPipeError:  # the listener has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elapsed = time.perf_counter() - start
    seconds = samples / SAMPLE_RATE - job.request.prompt.shape[1] / FRAME_RATE
    say(
        f"continuation: {seconds:.2f} s, the first of it after {first:.2f} s; {seconds / elapsed:.2f} times real time",
        file=sys.stderr,
    )


def say(text: str, file: Any = None) -> None:
    """Print a line without breaking the progress bar."""
    tqdm.write(text, file=file or sys.stdout)


def find_prompts(options: Options) -> list[str | None]:
    """The prompts that the options name, folders searched; [None] for speech without one.

    Raises:
        UserError: options that contradict each other, or a folder without audio.
    """
    if options.unconditional and (options.prompt is not None or options.text is not None):
        raise UserError("--unconditional takes neither --prompt nor --text.")
    if options.prompt is None:
        return [None] if options.unconditional or options.text is not None else [DEFAULT_PROMPT]
    found: list[str | None] = []
    for source in (options.prompt,) if isinstance(options.prompt, str) else options.prompt:
        if not os.path.isdir(source):
            found.append(source)
            continue
        files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in AUDIO_ENDINGS)
        if not files:
            raise UserError(f"{source}: the folder holds no audio file ({', '.join(sorted(AUDIO_ENDINGS))}).")
        found += [str(path) for path in files]
    if not found:
        raise UserError("--prompt names no file.")
    return found


def encode_prompt(lm: SpeechLM, source: str | None, max_seconds: float | None) -> tuple[torch.Tensor, int]:
    """A prompt's codes [Q, T] and how many samples it has; no frames without one."""
    if source is None:
        return torch.zeros(lm.stream.num_quantizers, 0, dtype=torch.int64), 0
    waveform = read_prompt(source, max_seconds, lm.codec.resampler)
    return lm.codec.encode([waveform])[0], waveform.numel()


def read_prompt(source: str, max_seconds: float | None, resampler: str = "torchaudio") -> torch.Tensor:
    """A prompt file or address as a waveform [n] at 24 kHz, whole or not at all.

    Raises:
        UserError: it cannot be fetched or read, or it is longer than any continuation could be.
    """
    audio = download(source) if source.lower().startswith(("http://", "https://")) else source
    # Reading stops soon after the bound, so that the length of a file that is far too long costs nothing.
    limit = max_seconds if max_seconds is not None and math.isfinite(max_seconds) else DEFAULT_MAX_IDS / FRAME_RATE
    waveform = load_audio(audio, max(limit, 0.0) + 1.0, source, resampler)
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


class HTTPOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            raise ValueError(f"it redirects to {newurl.partition(':')[0]}, and only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str) -> bytes:
    """Fetch a file over http(s), within the limits of size and time above.

    Raises:
        UserError: the address does not answer with a file, or the file is too large or too slow.
    """
    found: Future[bytes] = Future()

    def fetch() -> None:
        try:
            found.set_result(_download(url))
        except BaseException as error:  # raised again by whoever waits
            found.set_exception(error)

    # A thread has a limit of time also where a server sends a byte of its headers now and then.
    threading.Thread(target=fetch, name="download", daemon=True).start()
    try:
        return found.result(DOWNLOAD_MAX_SECONDS)
    except concurrent.futures.TimeoutError:
        raise UserError(f"{url}: the download took more than {DOWNLOAD_MAX_SECONDS:.0f} s.") from None


def _download(url: str) -> bytes:
    data = bytearray()
    begin = time.monotonic()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llama-mimi"})
        with urllib.request.build_opener(HTTPOnly).open(request, timeout=DOWNLOAD_STALL_SECONDS) as response:
            declared = int(response.headers.get("Content-Length") or -1)
            while chunk := response.read1(1 << 16):
                data += chunk
                if max(len(data), declared) > DOWNLOAD_MAX_BYTES:
                    raise UserError(f"{url}: the file is larger than {DOWNLOAD_MAX_BYTES // 1_000_000} MB.")
                if time.monotonic() - begin > DOWNLOAD_MAX_SECONDS:  # nobody waits for it any longer
                    break
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


def output_paths(output: str, sources: list[str | None], num_samples: int) -> list[list[Path]]:
    """For each prompt the file of each sample, see ``Options.output``. A folder is made if it is not there.

    Raises:
        UserError: the folder cannot be made.
    """
    path = Path(output)
    several = len(sources) > 1
    if output.endswith(("/", os.sep)) or (path.is_dir() and not path.suffix):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output}: the folder cannot be made ({error.strerror}).") from None
        stem, suffix, several = "", ".wav", True
    else:
        path, stem, suffix = path.parent, path.stem, path.suffix
    taken: set[str] = set()
    paths = []
    for source in sources:
        parts = [stem] if stem else []
        if several:
            name = "speech" if source is None else Path(urllib.parse.urlparse(source).path).stem or "prompt"
            name, number = "-".join([*parts, name]), 1
            while (unique := name if number == 1 else f"{name}-{number}") in taken:
                number += 1
            taken.add(unique)
            parts = [unique]
        numbers = [""] if num_samples == 1 else [f"-{i}" for i in range(num_samples)]
        paths.append([path / f"{parts[0]}{number}{suffix}" for number in numbers])
    return paths


def output_format(path: Path) -> tuple[str, str | None]:
    """libsndfile's (format, subtype) for a file's ending; None is the format's usual subtype.

    Raises:
        UserError: no format that can be written has this ending.
    """
    ending = path.suffix[1:].lower()
    if not can_write(ending):
        raise UserError(
            f"{path}: no audio format with the ending {path.suffix!r} can be written; use .wav, .flac, .ogg or .mp3, "
            "or end the name of a folder with /."
        )
    return ENDINGS.get(ending, (ending.upper(), None))


@functools.cache
def can_write(ending: str) -> bool:
    """Whether libsndfile writes 24 kHz speech in the format of an ending, seen by trying."""
    file_format, subtype = ENDINGS.get(ending, (ending.upper(), None))
    if file_format == "SD2":  # keeps its header in a second file
        return False
    try:
        soundfile.write(io.BytesIO(), torch.zeros(SAMPLE_RATE).numpy(), SAMPLE_RATE, subtype, format=file_format)
    except (TypeError, ValueError, soundfile.SoundFileError):
        return False
    return True


def identity(path: str | Path) -> tuple[int, int]:
    """Device and inode of a file, which identify it under any name."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def check_output(path: Path, prompts: set[tuple[int, int]]) -> None:
    """Refuse an output that could not be written once the model has run, or that is one of the prompts.

    Raises:
        UserError: an unknown ending, a folder that is not there or closed to us, or a prompt's own file.
    """
    output_format(path)
    check_writable(path)
    if path.exists() and identity(path) in prompts:
        raise UserError(f"{path}: this is a prompt's own file; choose another --output.")


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        UserError: with the reason.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"{path}: the folder {folder} does not exist.")
    if path.is_dir():
        raise UserError(f"{path}: this is a folder, not a file.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{path}: the file cannot be written (no permission).")


def write_audio(path: Path, waveform: torch.Tensor) -> None:
    """Write a waveform [n] at 24 kHz, clipped to full scale, in the format that the path's ending names.

    Raises:
        UserError: samples that are not finite, or a file that cannot be written.
    """
    if not torch.isfinite(waveform).all():
        raise UserError(f"{path}: not written, as the codec gave samples that are not finite numbers.")
    file_format, subtype = output_format(path)
    part = path.with_name(f"{path.name}.part")  # a run that is killed leaves no half file under the real name
    try:
        with soundfile.SoundFile(str(part), "w", SAMPLE_RATE, 1, subtype, format=file_format) as file:
            for block in waveform.clamp(-1.0, 1.0).split(SAMPLE_RATE):  # libsndfile's Vorbis overflows on long blocks
                file.write(block.numpy())
        part.replace(path)
    except (OSError, soundfile.SoundFileError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: the file could not be written ({error}).") from None


def main() -> None:
    run(tyro.cli(Options, use_underscores=True))


if __name__ == "__main__":
    run_command(main)
