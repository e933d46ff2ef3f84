"""SALMon, sLM21 and StoryCloze, and the run of one from audio files to results.

The scripts under eval/ are command lines over :func:`command`; :func:`score_task` and torchtitan.eval.metrics do the
work and can be called on their own.
"""

import platform
import shlex
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

import torchtitan
from torchtitan.audio.codec import FRAME_SIZE, Codec
from torchtitan.audio.token_stream import TokenStream
from torchtitan.audio.waveform import RESAMPLER, SAMPLE_RATE, AudioError, load_audio
from torchtitan.eval.data import Task, open_tasks
from torchtitan.eval.metrics import SIDES, Rule, TaskResult, judge
from torchtitan.eval.results import Clip, format_table, make_folder, results_folder, samples_table, write_results
from torchtitan.eval.scoring import score
from torchtitan.models.speech_lm import SpeechLM, choose_device
from torchtitan.tools.errors import UserError

# Clips decoded before the codec is called: bounds the memory and lets it batch clips of similar length.
_CLIPS_PER_ENCODE = 64


@dataclass(frozen=True)
class Benchmark:
    """What sets a benchmark apart.

    Attributes:
        name: its folder under the output folder.
        tasks: their names, which are those of their data sets, configurations or folders.
        columns: columns with the positive and the negative clip.
        item_column: the column with a pair's id, where the data set has one.
        rule: how clips are scored.
        as_configurations: on the hub the tasks are configurations of one data set, otherwise data sets of one owner.
    """

    name: str
    tasks: tuple[str, ...]
    columns: tuple[str, str]
    item_column: str
    rule: Rule
    as_configurations: bool = False


# Its hub configurations all, all_consistency and all_alignment are unions of these, not tasks.
SALMON = Benchmark(
    name="SALMON",
    tasks=(
        "sentiment_consistency",
        "speaker_consistency",
        "gender_consistency",
        "bg_domain_consistency",
        "bg_all_consistency",
        "rir_consistency",
        "sentiment_alignment",
        "bg_alignment",
    ),
    columns=("positive_audio", "negative_audio"),
    item_column="ind",
    rule=Rule("all"),
    as_configurations=True,
)
SLM21 = Benchmark("sLM21", ("sWUGGY", "sBLIMP"), ("positive", "negative"), "id", Rule("semantic"))
STORY_CLOZE = Benchmark("sStoryCloze", ("sStoryCloze", "tStoryCloze"), ("positive", "negative"), "id", Rule("semantic"))


@dataclass
class Options:
    """The command line of an evaluation."""

    dataset: str
    """Hub id, or a local folder of that layout: the parent of the tasks' folders, or one task's own."""
    model_name: str = "llm-jp/Llama-Mimi-1.3B"
    """Hub name or folder of a model in Hugging Face format."""
    audio_tokenizer: str | None = None
    """Hub name or folder of the Mimi codec; the one that the model names by default."""
    output_dir: str = "results"
    """Results go to <output_dir>/<benchmark>/<model_name>/."""
    limit: int | None = None
    """Evaluate only this many pairs of each task, from its start."""
    batch_size: int = 16
    """Clips in one forward pass of the model."""
    max_seconds: float = 20.0
    """Clips are cut at this length."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ...; the best one there is by default."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the model; bfloat16 on cuda and float32 elsewhere by default. The codec is always float32."""

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be at least 1, not {self.limit}.")
        if self.batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, not {self.batch_size}.")
        if not FRAME_SIZE / SAMPLE_RATE <= self.max_seconds < float("inf"):
            raise UserError(
                f"--max_seconds must be at least one frame ({FRAME_SIZE / SAMPLE_RATE} s), not {self.max_seconds}."
            )
        choose_device(self.device)


def command(benchmark: Benchmark, options: Options) -> int:
    """Run a benchmark and write and print its results.

    Returns:
        the exit code: 0, or 1 if a pair had to be left out (everything is written first).

    Raises:
        UserError: wrong options, or no data set, model or codec where they were said to be.
    """
    start = time.monotonic()
    options.check()
    tasks, missing = open_tasks(options.dataset, benchmark.tasks, benchmark.columns, benchmark.as_configurations)
    if missing:
        print(f"warning: {options.dataset} lacks {', '.join(missing)}; only the rest is evaluated.", file=sys.stderr)
    lm = SpeechLM.load(options.model_name, options.audio_tokenizer, options.device, options.dtype)
    folder = results_folder(options.output_dir, benchmark.name, options.model_name)
    make_folder(folder)

    clips: list[Clip] = []
    for task in tasks:
        clips += score_task(benchmark, task, lm, options.batch_size, options.max_seconds, options.limit)
    settings = _settings(benchmark, options, tasks, lm)
    samples = samples_table(clips, lm.stream.num_quantizers, settings)
    results = judge(samples, benchmark.rule)
    report = {"missing_tasks": missing, "seconds": round(time.monotonic() - start, 1), "settings": settings}
    write_results(folder, samples, results, report)
    _print_results(benchmark, results)
    print(f"Written to {folder}.")
    return 1 if any(result.left_out for result in results.values()) else 0


def score_task(
    benchmark: Benchmark,
    task: Task,
    lm: SpeechLM,
    batch_size: int = 16,
    max_seconds: float = 20.0,
    limit: int | None = None,
) -> list[Clip]:
    """The clips of a task, two a pair, with their codes and NLLs; an unreadable clip has its ``error`` instead.

    Raises:
        UserError: the model's context holds no frame, or a batch does not fit into the device's memory.
    """
    from tqdm import tqdm

    if lm.stream.max_frames(lm.max_length) < 1:
        raise UserError(f"{lm.name}: a context of {lm.max_length} ids holds no frame of audio.")
    total = 2 * min(task.num_pairs, limit or task.num_pairs)
    interval = 0.1 if sys.stderr.isatty() else 10.0
    try:
        with tqdm(total=total, desc=f"{task.name}: codes", unit="clip", mininterval=interval) as bar:
            clips = encode_pairs(
                benchmark, task, lm.codec, lm.stream, lm.max_length, max_seconds, limit, on_progress=bar.update
            )
        readable = [(clip, clip.codes) for clip in clips if clip.codes is not None]
        with tqdm(total=len(readable), desc=f"{task.name}: scores", unit="clip", mininterval=interval) as bar:
            sequences = [lm.stream.sample(codes) for _, codes in readable]
            for (clip, _), nll in zip(readable, score(lm.model, sequences, batch_size, bar.update), strict=True):
                clip.nll = nll
    except torch.OutOfMemoryError:
        raise UserError(
            f"{task.name}: the device's memory does not hold a batch; use a smaller --batch_size."
        ) from None
    return clips


def encode_pairs(
    benchmark: Benchmark,
    task: Task,
    codec: Codec,
    stream: TokenStream,
    max_length: int,
    max_seconds: float = 20.0,
    limit: int | None = None,
    chosen: Collection[int] | None = None,
    on_progress: Callable[[int], Any] = lambda count: None,
) -> list[Clip]:
    """Read and encode the clips of a task, without scores.

    Args:
        max_length: ids that the model can take.
        limit: only so many pairs, from the task's start.
        chosen: only these pairs, by their number.
        on_progress: called with the number of clips done since the last call.
    """
    max_frames = stream.max_frames(max_length)
    clips: list[Clip] = []
    waiting: list[tuple[Clip, torch.Tensor]] = []  # waveforms [n] that await the codec

    def encode_waiting() -> None:
        encoded = codec.encode([waveform for _, waveform in waiting])
        for (clip, waveform), codes in zip(waiting, encoded, strict=True):
            if codes.shape[1] > max_frames:
                clip.context_cut = (waveform.numel() - max_frames * FRAME_SIZE) / SAMPLE_RATE
                clip.cut += clip.context_cut
            clip.codes = codes[:, :max_frames].to(torch.int16)
        on_progress(len(waiting))
        waiting.clear()

    for index, row in enumerate(task.pairs(limit)):
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
            try:
                waveform = _load(task, row, column, f"{task.name} pair {index}, {side} clip")
            except AudioError as error:
                clip.error = str(error)
                on_progress(1)
                continue
            kept = waveform[: round(max_seconds * SAMPLE_RATE)]
            clip.cut = (waveform.numel() - kept.numel()) / SAMPLE_RATE
            waiting.append((clip, kept))
        if len(waiting) >= _CLIPS_PER_ENCODE:
            encode_waiting()
    encode_waiting()
    return clips


def _load(task: Task, row: dict[str, Any], column: str, name: str) -> torch.Tensor:
    """The waveform [n] of a clip.

    Raises:
        AudioError: there is none, or it is unreadable.
    """
    source = task.audio(row, column)
    if source is None:
        raise AudioError(f"{name}: the row holds no audio.")
    return load_audio(source, name=name)


def _settings(benchmark: Benchmark, options: Options, tasks: list[Task], lm: SpeechLM) -> dict[str, Any]:
    """Everything that the figures depend on, for results.json and the metadata of samples.parquet."""
    import datasets
    import transformers

    device = lm.device
    return {
        "benchmark": benchmark.name,
        "model": {"name": lm.name, "revision": getattr(lm.model.config, "_commit_hash", None)},
        "codec": {
            **lm.codec.conventions(),
            "num_quantizers": lm.stream.num_quantizers,
            "revision": getattr(lm.codec.model.config, "_commit_hash", None),
            "resampler": RESAMPLER,
        },
        "data": {task.name: {"source": task.source, "revision": task.revision} for task in tasks},
        "rule": benchmark.rule.describe(),
        "context": lm.max_length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "options": asdict(options),
        "command": shlex.join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            "torchtitan": torchtitan.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
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
