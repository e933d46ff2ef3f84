"""Run a benchmark, from audio files to results.

The scripts in eval/ are command lines over :func:`command`. :func:`score_task` and torchtitan.eval.metrics do the work,
and can be called on their own.
"""

import itertools
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

import torchtitan
from torchtitan.audio.codec import FRAME_SIZE, Codec
from torchtitan.audio.recording import Samples
from torchtitan.audio.token_stream import TokenStream
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.checkpoint.speech_lm import SpeechLM, choose_device
from torchtitan.datasets.decoding import Decoded, RecordingDecoder, decode_ahead, num_threads
from torchtitan.datasets.encoding import AHEAD_SECONDS, encode_each
from torchtitan.datasets.rows import Row
from torchtitan.eval.data import Task, open_tasks
from torchtitan.eval.metrics import SIDES, Rule, TaskResult, judge
from torchtitan.eval.results import (
    Clip,
    format_table,
    make_folder,
    require_no_other_model,
    results_folder,
    samples_table,
    write_results,
)
from torchtitan.eval.scoring import score
from torchtitan.eval.store import ArrayStore, default_cache_folder, digest
from torchtitan.eval.suites import Benchmark
from torchtitan.tools.errors import UserError
from torchtitan.tools.memory import tune_malloc

# Clips per call of the codec: it limits the memory, and lets the codec batch clips of similar length.
_CLIPS_PER_ENCODE = 64


@dataclass
class Options:
    """The command line of an evaluation."""

    dataset: str
    """Hub name, or a local folder of the same layout: the parent of the tasks' folders, or the folder of one task."""
    model_name: str = "llm-jp/Llama-Mimi-1.3B"
    """Hub name or folder of a model in Hugging Face format, or a training checkpoint."""
    audio_tokenizer: str | None = None
    """Hub name or folder of the Mimi codec. Default: the codec that the model names."""
    output_dir: str = "results"
    """Results are written to <output_dir>/<benchmark>/<model_name>/."""
    limit: int | None = None
    """Evaluate only the first pairs of each task, up to this number."""
    batch_size: int = 16
    """Clips in one forward pass of the model."""
    max_seconds: float = 20.0
    """Clips are cut to this many seconds."""
    splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits of the data sets. Other splits than train become part of the task names: sWUGGY_dev, sWUGGY_test."""
    dataset_revision: str | None = None
    """Commit, branch or tag of the data sets on the hub. Default: the newest. results.json has the commit."""
    model_revision: str | None = None
    """Commit, branch or tag of the model on the hub. Default: the newest. results.json has the commit."""
    resampler: str | None = None
    """Method that resamples recordings to 24 kHz: torchaudio, soxr_hq or ffmpeg. Default: the one in the model's
    config.json, else torchaudio."""
    targets: str | None = None
    """Scored tokens: all, semantic, acoustic, or q0, q1, ... for one quantizer. Default: those of the benchmark."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether a clip's score is the mean or the sum of the negative log-likelihoods of these tokens."""
    audio_end: bool = True
    """Also score the end of the clip, </audio>."""
    ties: Literal["half", "wrong"] = "half"
    """What a pair with equal scores counts: half a point, or nothing, as in the original evaluation."""
    windows_ms: list[float] = field(default_factory=lambda: [500.0, 1000.0, 2000.0])
    """Also score these windows alone, which begin where a pair's codes first differ (localized likelihood)."""
    cache_dir: str = ""
    """Folder in which the codes of clips are cached, or none. Default: ~/.cache/llama-mimi/codes."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ... Default: the best one of this machine."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the model. Default: bfloat16 on cuda, float32 elsewhere. The codec is always float32."""

    def check(self) -> None:
        """Raise UserError for values that are out of range."""
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise UserError(f"--splits must name each split once, not {', '.join(self.splits) or 'none'}.")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be at least 1, not {self.limit}.")
        if self.batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, not {self.batch_size}.")
        if not FRAME_SIZE / SAMPLE_RATE <= self.max_seconds < float("inf"):
            raise UserError(
                f"--max_seconds must be at least one frame ({FRAME_SIZE / SAMPLE_RATE} s), not {self.max_seconds}."
            )
        self.rule(Rule())
        self.localized_rules(Rule())
        choose_device(self.device)

    def rule(self, default: Rule) -> Rule:
        """How clips are scored. ``default`` gives the targets if the options have none."""
        return Rule(self.targets or default.targets, self.audio_end, self.reduction, self.ties)

    def localized_rules(self, default: Rule) -> dict[str, Rule]:
        """The same rule within each window."""
        return {f"{ms:g} ms": replace(self.rule(default), window_ms=ms) for ms in self.windows_ms}


def command(benchmark: Benchmark, options: Options) -> int:
    """Run a benchmark; write and print its results.

    Returns:
        the exit code: 0, or 1 if a pair had to be left out. All results are written in both cases.

    Raises:
        UserError: wrong options, or the data set, the model or the codec does not exist.
    """
    start, date = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    tune_malloc()
    options.check()
    share = rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tasks: list[Task] = []
    missing: list[str] = []
    for split in options.splits:
        found = open_tasks(
            options.dataset,
            benchmark.tasks,
            benchmark.columns,
            benchmark.as_configurations,
            split,
            options.dataset_revision,
        )
        tasks, missing = tasks + found[0], missing + found[1]
    if missing and rank == 0:
        print(f"warning: {options.dataset} lacks {', '.join(missing)}; only the rest is evaluated.", file=sys.stderr)
    device = options.device
    if ranks > 1 and device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    lm = SpeechLM.load(
        options.model_name, options.audio_tokenizer, device, options.dtype, options.model_revision, options.resampler
    )
    options.rule(benchmark.rule).check(lm.stream.num_quantizers)
    is_local = lm.folder is not None and Path(options.model_name).expanduser().is_dir()
    # The name of a run stands for its last checkpoint, which is another one later.
    folder = results_folder(options.output_dir, benchmark.name, str(lm.folder) if is_local else options.model_name)
    if lm.folder is not None and is_local:
        require_no_other_model(folder, lm.folder)
    make_folder(folder)
    # All ranks read both stores before the barrier below, so no rank reads what a faster one has written.
    cache = None if options.cache_dir.lower() == "none" else ArrayStore(_cache_folder(options.cache_dir, lm.codec))
    scores = ArrayStore(folder / f".scores-{_scores_of(lm).hex()[:16]}")
    if ranks > 1:
        # A rank may be hours behind if its codes are not cached. A dead rank is noticed at once anyway.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()

    clips: list[Clip] = []
    for task in tasks:
        clips += score_task(
            benchmark, task, lm, options.batch_size, options.max_seconds, options.limit, cache, scores, share
        )
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return 0
    settings = _settings(benchmark, options, tasks, lm)
    samples = samples_table(clips, lm.stream.num_quantizers, settings)
    results = judge(samples, options.rule(benchmark.rule))
    localized = {name: judge(samples, rule) for name, rule in options.localized_rules(benchmark.rule).items()}
    seconds = round(time.monotonic() - start, 1)
    report = {"missing_tasks": missing, "date": date, "seconds": seconds, "ranks": ranks, "settings": settings}
    write_results(folder, samples, results, localized, report)
    from torchtitan.eval.charts import draw  # imports matplotlib

    draw(folder / "accuracy.png", benchmark.name, {lm.name: results})
    shutil.rmtree(scores.folder, ignore_errors=True)
    _print_results(benchmark, results)
    print(f"Written to {folder}.")
    return 1 if any(result.left_out for result in results.values()) else 0


def _cache_folder(name: str, codec: Codec) -> Path:
    """Cache folder for the codes of this codec with its conventions."""
    base = Path(name).expanduser() if name else default_cache_folder()
    made_by = digest(codec.fingerprint(), codec.padding, codec.window, codec.resampler)
    return base / made_by.hex()[:32]


def _scores_of(lm: SpeechLM) -> bytes:
    """Hash of everything but the ids that scores depend on."""
    files = [] if lm.folder is None else sorted(file for file in lm.folder.rglob("*") if file.is_file())
    weights = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return digest(lm.name, lm.revision, weights, str(lm.model.dtype), lm.device.type)


def score_task(
    benchmark: Benchmark,
    task: Task,
    lm: SpeechLM,
    batch_size: int = 16,
    max_seconds: float = 20.0,
    limit: int | None = None,
    cache: ArrayStore | None = None,
    scores: ArrayStore | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Clip]:
    """The clips of a task, two per pair, with their codes and NLLs. An unreadable clip has an ``error`` instead.

    Args:
        cache: cache of codes, see :func:`encode_pairs`.
        scores: store of scores of an unfinished evaluation, see torchtitan.eval.scoring.score.
        share: this rank's number and the number of ranks, which share the work through torch.distributed. All ranks
            return all clips.

    Raises:
        UserError: no frame fits into the model's context, or a batch does not fit into the device's memory.
    """
    from tqdm import tqdm

    if lm.stream.max_frames(lm.max_length) < 1:
        raise UserError(f"{lm.name}: a context of {lm.max_length} tokens is too short for a frame of audio.")
    rank, ranks = share
    own = range(rank, min(task.num_pairs, limit or task.num_pairs), ranks)
    shown: dict[str, Any] = {"mininterval": 0.1 if sys.stderr.isatty() else 10.0, "disable": rank > 0, "unit": "clip"}
    try:
        with tqdm(total=2 * len(own), desc=f"{task.name}: codes", **shown) as bar:
            clips = encode_pairs(
                benchmark,
                task,
                lm.codec,
                lm.stream,
                lm.max_length,
                max_seconds,
                own,
                bar.update,
                cache,
            )
        if ranks > 1:
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, clips)
            clips = sorted((clip for part in gathered for clip in part), key=lambda c: (c.pair, SIDES.index(c.side)))
        readable = [(clip, clip.codes) for clip in clips if clip.codes is not None]
        sequences = [lm.stream.sample(codes) for _, codes in readable]
        with tqdm(total=len(readable), desc=f"{task.name}: scores", **shown) as bar:

            def on_progress(count: int) -> None:
                bar.update(min(count * ranks, len(readable) - bar.n))  # the other ranks are about as far

            found = score(lm.model, sequences, batch_size, on_progress, scores, share)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{task.name}: a batch does not fit into the device's memory; use a smaller --batch_size."
        ) from None
    finally:  # also after an error or Ctrl-C
        for store in (cache, scores):
            if store is not None:
                store.flush()
    if ranks > 1:
        own = {i: nll for i, nll in enumerate(found) if nll is not None}
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, own)
        for i, nll in (item for part in parts for item in part.items()):
            found[i] = nll
    for (clip, _), nll in zip(readable, found, strict=True):
        clip.nll = nll
    return clips


def encode_pairs(
    benchmark: Benchmark,
    task: Task,
    codec: Codec,
    stream: TokenStream,
    max_length: int,
    max_seconds: float = 20.0,
    chosen: Collection[int] | None = None,
    on_progress: Callable[[int], Any] = lambda count: None,
    cache: ArrayStore | None = None,
) -> list[Clip]:
    """Read and encode the clips of a task, without scores.

    Args:
        max_length: context of the model, in tokens.
        chosen: numbers of the pairs to encode; None: all. Pairs after the last one are not read.
        on_progress: called with the number of clips done since the last call.
        cache: codes by the bytes of the audio file and the limit in seconds. A clip with cached codes is not decoded.
    """
    max_frames, max_samples = stream.max_frames(max_length), round(max_seconds * SAMPLE_RATE)
    clips: list[Clip] = []
    # Clips without codes and their keys in the cache, by their names in messages.
    unknown: dict[str, tuple[Clip, bytes | None]] = {}

    def finish(clip: Clip, codes: torch.Tensor, num_samples: int) -> None:
        """Store the codes [Q, T] of a clip, cut to the context. ``num_samples`` is the length of the whole clip."""
        kept = min(num_samples, max_samples)
        clip.cut = (num_samples - kept) / SAMPLE_RATE
        if codes.shape[1] > max_frames:
            clip.context_cut = (kept - max_frames * FRAME_SIZE) / SAMPLE_RATE
            clip.cut += clip.context_cut
        clip.codes = codes[:, :max_frames].to(torch.int16)

    def rows() -> Generator[Row | None]:
        """A row for each clip; None if it has no audio, or if its codes are cached."""
        for index, row in enumerate(task.pairs(None if chosen is None else max(chosen, default=-1) + 1)):
            if chosen is not None and index not in chosen:
                continue
            item = row.get(benchmark.item_column)
            plain = {
                name: value
                for name, value in row.items()
                if name not in (*task.columns, benchmark.item_column) and isinstance(value, str | int | float)
            }
            for side, column in zip(SIDES, task.columns, strict=True):
                clip = Clip(task.name, index, side, str(index if item is None else item), columns=plain)
                clips.append(clip)
                name = f"{task.name} pair {index}, {side} clip"
                audio, key = task.audio(row, column), None
                if cache is not None and (data := _bytes_of(audio)) is not None:
                    key = digest(data, max_samples)
                    if (known := cache.get(key)) is not None:
                        finish(clip, torch.from_numpy(known[0].reshape(-1, stream.num_quantizers).T.copy()), known[1])
                if audio is None:
                    clip.error = f"{name}: the row has no audio."
                if clip.error or clip.codes is not None:
                    yield None
                else:
                    unknown[name] = (clip, key)
                    yield Row(name, str(audio) if isinstance(audio, Path) else audio, None, None)

    def encode(decoded: list[Decoded]) -> None:
        found = encode_each(partial(_encode, codec), [(unknown[d.row.key][0].pair, d.waveform) for d in decoded])
        for recording, codes in zip(decoded, found, strict=True):
            clip, key = unknown.pop(recording.row.key)
            if isinstance(codes, str):
                clip.error = f"{recording.row.key}: {codes}"
                continue
            num_samples = math.ceil(recording.seconds * SAMPLE_RATE - 1e-6)
            finish(clip, codes, num_samples)
            if cache is not None and key is not None:
                cache.put(key, codes.T.reshape(-1).to(torch.int16).numpy(), num_samples)
        on_progress(len(decoded))

    decoder = RecordingDecoder(max_seconds, resampler=codec.resampler, name=None)
    ready: list[Decoded] = []
    with (
        ThreadPoolExecutor(num_threads(codec.device)) as pool,
        closing(decode_ahead(rows(), decoder, pool, AHEAD_SECONDS[codec.device.type])) as recordings,
    ):
        for recording in recordings:
            if recording is not None and recording.waveform is not None:
                ready.append(recording)
            else:
                on_progress(1)
                if recording is not None:
                    unknown.pop(recording.row.key)[0].error = recording.reason
            if len(ready) >= _CLIPS_PER_ENCODE:
                encode(ready)
                ready = []
        encode(ready)
    return clips


def _encode(codec: Codec, clips: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
    """The codes of clips, each given with its pair's number. The two sides of a pair are neighbours.

    On a CPU each thread encodes its own pair. Several threads on one pair would be as fast on an idle machine, but wait
    for each other on a busy one.
    """
    if codec.device.type != "cpu":
        return codec.encode([waveform for _, waveform in clips])
    pairs = [[waveform for _, waveform in sides] for _, sides in itertools.groupby(clips, key=lambda clip: clip[0])]

    def encode(number: int) -> list[torch.Tensor]:
        sides = pairs[number]
        return codec.encode_pair(*sides) if len(sides) == 2 else codec.encode(sides)

    threads = torch.get_num_threads()
    longest_first = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = dict(zip(longest_first, pool.map(encode, longest_first), strict=True))
    finally:
        torch.set_num_threads(threads)
    return [codes for number in range(len(pairs)) for codes in found[number]]


def _bytes_of(source: bytes | Path | Samples | None) -> bytes | None:
    """The bytes of a clip; None if they cannot be read. The decoder then reports the reason."""
    if source is None or isinstance(source, bytes):
        return source
    if isinstance(source, Samples):
        return f"{source.rate} Hz ".encode() + source.array.tobytes()
    try:
        return source.read_bytes()
    except OSError:
        return None


def _settings(benchmark: Benchmark, options: Options, tasks: list[Task], lm: SpeechLM) -> dict[str, Any]:
    """Everything that the figures depend on, for results.json and the metadata of samples.parquet."""
    device = lm.device
    return {
        "benchmark": benchmark.name,
        "model": {
            "name": lm.name,
            "folder": None if lm.folder is None else os.path.abspath(lm.folder),
            "revision": lm.revision or options.model_revision,
        },
        "codec": {
            **lm.codec.conventions(),
            "num_quantizers": lm.stream.num_quantizers,
            "revision": lm.codec.revision,
        },
        "data": {task.name: {"source": task.source, "revision": task.revision} for task in tasks},
        "rule": asdict(options.rule(benchmark.rule)),
        "rule_in_words": options.rule(benchmark.rule).describe(),
        "context": lm.max_length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "options": asdict(options),
        "command": shlex.join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            "torchtitan": torchtitan.__version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "huggingface_hub")},
        },
    }


def _print_results(benchmark: Benchmark, results: dict[str, TaskResult]) -> None:
    print(f"\n{benchmark.name}\n{format_table(results)}")
    for name, result in results.items():
        if result.left_out:
            total = result.pairs + len(result.left_out)
            print(
                f"warning: {name}: {len(result.left_out)} of {total} pairs are left out of the accuracy (results.json "
                f"lists them), the first because: {result.left_out[0]['reason']}",
                file=sys.stderr,
            )
