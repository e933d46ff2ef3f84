"""Evaluation of generated speech: continue a folder of prompts, and score the continuations.

The output is in ``<output_dir>/generation/<model_name>/``: ``audio/`` has prompt and continuation of each sample,
``samples.jsonl`` has a line per prompt, and ``scores.jsonl`` has a line per score. Each line is written at once, and
``results.json`` at the end. The same command continues an interrupted run.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError, load_audio
from torchtitan.checkpoint.speech_lm import SpeechLM, choose_device
from torchtitan.eval.results import Replacing, make_folder, results_folder
from torchtitan.eval.scorers import (
    Judge,
    Naturalness,
    PromptedSpeech,
    Repetition,
    ScoreError,
    SpeakerSimilarity,
    TextLikelihood,
    Transcriber,
    generative_perplexity,
)
from torchtitan.eval.statistics import standard_error
from torchtitan.generation import BATCH_ROWS, Engine, Sampling, frame_bound, sample_requests
from torchtitan.tools.errors import UserError

ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
Metric = Literal["speaker_similarity", "utmos", "perplexity", "auto_bleu", "judge"]
TRANSCRIBED = ("perplexity", "auto_bleu", "judge")


@dataclass
class Options:
    """The command line."""

    prompts: Path
    """Folder of audio files to continue, with its subfolders."""
    model_name: str = "llm-jp/Llama-Mimi-1.3B"
    """Hub name or folder of a model in Hugging Face format, or a training checkpoint."""
    audio_tokenizer: str | None = None
    """Hub name or folder of the Mimi codec. Default: the codec that the model names."""
    output_dir: str = "results"
    """Results are written to <output_dir>/generation/<model_name>/."""
    metrics: list[Metric] = field(default_factory=lambda: ["speaker_similarity", "auto_bleu", "perplexity"])
    """Scores to compute. --metrics without a value computes none, and only makes the continuations."""
    limit: int | None = None
    """Use only the first prompts by name, up to this number."""
    prompt_seconds: float | None = None
    """Use only this many seconds from the start of each prompt. Default: all of it."""
    max_seconds: float | None = None
    """Maximum length of prompt and continuation together, in seconds. Default: what fits into 1,024 tokens."""
    num_samples: int = 1
    """Number of continuations of each prompt."""
    temperature: float = 0.8
    """Divides the logits. 0 always takes the most likely token."""
    top_k: int | None = 30
    """Draw only from the k most likely tokens. None: draw from all."""
    top_p: float = 1.0
    """Draw only from the most likely tokens that together reach this probability."""
    seed: int = 0
    """Seed of the draws."""
    speaker_model: str = "microsoft/wavlm-base-plus-sv"
    """For speaker_similarity: a speaker verification model of transformers."""
    utmos: str = "tarepan/SpeechMOS:v1.2.0"
    """For utmos: repository of torch.hub with utmos22_strong, or a local copy of it."""
    recognizer: str = "openai/whisper-large-v3-turbo"
    """For perplexity, auto_bleu and judge: the speech recogniser of transformers that writes the transcripts."""
    text_model: str = "openai-community/gpt2-large"
    """For perplexity: the language model of text."""
    judge_url: str = "http://localhost:8000/v1"
    """For judge: an OpenAI-compatible endpoint."""
    judge_model: str = ""
    """For judge: name of the model at this endpoint."""
    judge_prompt: str = str(Path(__file__).with_name("judge_prompt.txt"))
    """For judge: file with the question, with {prompt} and {continuation} in place of the two transcripts."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ... Default: the best one of this machine."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the model. Default: bfloat16 on cuda, float32 elsewhere."""
    resampler: str | None = None
    """Method that resamples recordings to 24 kHz: torchaudio, soxr_hq or ffmpeg. Default: the one in the model's
    config.json, else torchaudio."""

    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)

    def check(self) -> None:
        """Raise UserError for values that are out of range."""
        self.sampling()
        choose_device(self.device)
        for name in ("limit", "num_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}.")
        if self.prompt_seconds is not None and not FRAME_SIZE / SAMPLE_RATE <= self.prompt_seconds < float("inf"):
            raise UserError(f"--prompt_seconds must be at least {FRAME_SIZE / SAMPLE_RATE}, not {self.prompt_seconds}.")
        if "judge" in self.metrics and not self.judge_model:
            raise UserError("--judge_model must name the model at the judge's endpoint.")

    # The settings that the continuations depend on.
    MADE_BY = (
        *("model_name", "audio_tokenizer", "resampler", "prompt_seconds", "max_seconds", "num_samples"),
        *("temperature", "top_k", "top_p", "seed", "dtype"),
    )

    def made_by(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.MADE_BY}

    def source_of(self, metric: str) -> str:
        """The models behind a metric. Scores of other models are not reused."""
        own = {
            "transcript": self.recognizer,
            "prompt_transcript": self.recognizer,
            "speaker_similarity": self.speaker_model,
            "utmos": self.utmos,
            "perplexity": self.text_model,
            "judge": f"{self.judge_model}, {self.judge_prompt}",
        }.get(metric, "")
        return f"{own}, {self.recognizer}" if metric in TRANSCRIBED else own


def find_prompts(folder: Path, limit: int | None = None) -> list[Path]:
    """The audio files in a folder and its subfolders, by name.

    Raises:
        UserError: there is no such folder, or no audio in it.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of prompts.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise UserError(f"{folder}: there are no audio files ({', '.join(ENDINGS)}) in this folder.")
    return files[:limit]


class Lines:
    """A growing file of JSON lines. An incomplete last line is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if path.is_file():
            # As bytes: the file may end in half a character, and transcripts may contain other Unicode line breaks.
            *whole, rest = path.read_bytes().split(b"\n")
            self.entries = [json.loads(line) for line in whole]
            if rest:
                with Replacing(path) as partial:
                    partial.write_bytes(b"".join(line + b"\n" for line in whole))

    def append(self, entry: dict[str, Any]) -> None:
        """Write a line at once."""
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def command(options: Options) -> int:
    """Make the continuations, score them, write and print the results.

    Returns:
        the exit code: 0, or 1 if a prompt could not be used. All results are written in both cases.

    Raises:
        UserError: wrong options, a missing file or model, or a folder with continuations of other settings.
    """
    start = time.monotonic()
    options.check()
    prompts = find_prompts(options.prompts, options.limit)
    folder = results_folder(options.output_dir, "generation", options.model_name)
    make_folder(folder / "audio")
    _require_same(folder / "settings.json", options.made_by())
    samples = Lines(folder / "samples.jsonl")
    names = {path: path.relative_to(options.prompts.expanduser()).as_posix() for path in prompts}
    generate(prompts, names, options, samples, folder)
    wanted = set(names.values())
    entries = [entry for entry in samples.entries if entry["prompt"] in wanted]
    scores = Lines(folder / "scores.jsonl")
    for metric in options.metrics:
        score(metric, entries, options, folder, scores)
    results = summarize(entries, scores.entries, options)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    report = {**results, "settings": settings, "seconds": round(time.monotonic() - start, 1)}
    with Replacing(folder / "results.json") as path:
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
    print(format_results(results))
    print(f"Written to {folder}.")
    return 1 if results["unusable_prompts"] else 0


def _require_same(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix continuations of different settings in one folder."""
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"{path.parent}: there are continuations with {changed[0]} = {before.get(changed[0])}, not "
                f"{settings[changed[0]]}; choose another --output_dir or remove the folder."
            )
    with Replacing(path) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def generate(prompts: list[Path], names: dict[Path, str], options: Options, samples: Lines, folder: Path) -> None:
    """Continue the prompts that have no continuations yet. Each one gives an entry in ``samples`` and audio files."""
    from tqdm import tqdm

    done = {entry["prompt"] for entry in samples.entries}
    missing = [path for path in prompts if names[path] not in done]
    if not missing:
        return
    lm = SpeechLM.load(
        options.model_name, options.audio_tokenizer, options.device, options.dtype, resampler=options.resampler
    )
    max_frames = frame_bound(lm, options.max_seconds)
    rows = min(options.num_samples, BATCH_ROWS.get(lm.device.type, 8))
    engine = Engine(lm, rows, lm.stream.sample_length(max_frames), consume=True)
    for path in tqdm(missing, desc="continuations", unit="prompt"):
        name = names[path]
        try:
            waveform = load_audio(path, options.prompt_seconds, resampler=lm.codec.resampler)
            (codes,) = lm.codec.encode([waveform])
            if codes.shape[1] >= max_frames:
                raise AudioError(f"{path}: {codes.shape[1]} frames leave no room for a continuation in {max_frames}.")
        except AudioError as error:
            samples.append({"prompt": name, "error": str(error)})
            continue
        requests = sample_requests(codes, max_frames - codes.shape[1], options.sampling(), options.num_samples)
        found = engine.generate(requests)
        entry: dict[str, Any] = {"prompt": name, "prompt_samples": waveform.numel(), "samples": []}
        for number, continuation in enumerate(found):
            audio = lm.codec.decode(torch.cat((codes, continuation.codes), dim=1)).clamp(-1, 1)
            file = folder / "audio" / f"{name}.{number}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, audio.numpy(), SAMPLE_RATE)
            entry["samples"].append(
                {
                    "file": file.relative_to(folder).as_posix(),
                    "prompt_frames": codes.shape[1],
                    "frames": continuation.codes.shape[1],
                    "ended": continuation.ended,
                }
            )
        samples.append(entry)


def _cases(entries: Iterable[dict[str, Any]]) -> list[tuple[str, int, dict[str, Any]]]:
    """(prompt, number, entry) of all samples."""
    return [
        (entry["prompt"], number, sample) for entry in entries for number, sample in enumerate(entry.get("samples", []))
    ]


def score(metric: str, entries: list[dict[str, Any]], options: Options, folder: Path, scores: Lines) -> None:
    """Score the samples that have no score yet. Each one gives a line in ``scores``, with the score or the reason."""
    from tqdm import tqdm

    if metric in TRANSCRIBED:
        score("transcript", entries, options, folder, scores)
    if metric == "judge":
        score("prompt_transcript", entries, options, folder, scores)
    known = _found(scores.entries, metric, options)
    cases = [case for case in _cases(entries) if (case[0], case[1]) not in known]
    if metric == "prompt_transcript":
        cases = [case for case in cases if case[1] == 0]
    if not cases:
        return
    device = choose_device(options.device)
    scorer = _scorer(metric, options, device)
    transcripts = _found(scores.entries, "transcript", options)
    of_prompts = _found(scores.entries, "prompt_transcript", options)
    for prompt, number, sample in tqdm(cases, desc=metric, unit="sample"):
        entry: dict[str, Any] = {"metric": metric, "source": options.source_of(metric)}
        entry |= {"prompt": prompt, "sample": number}
        try:
            audio = load_audio(folder / sample["file"])
            cut = sample["prompt_frames"] * FRAME_SIZE
            prompt_audio = load_audio(options.prompts.expanduser() / prompt, options.prompt_seconds)
            heard = transcripts.get((prompt, number), {})
            if metric in TRANSCRIBED and "error" in heard:
                raise ScoreError(heard["error"])
            before = of_prompts.get((prompt, 0), {})
            if metric == "judge" and "error" in before:
                raise ScoreError(f"the prompt has no transcript: {before['error']}")
            given = PromptedSpeech(prompt_audio, audio[cut:], heard.get("value"), before.get("value"))
            if isinstance(scorer, Transcriber):
                entry["value"] = scorer(given.prompt if metric == "prompt_transcript" else given.continuation)
            else:
                entry["value"] = scorer(given)
                if not math.isfinite(entry["value"]):
                    raise ScoreError(f"the score is {entry.pop('value')}")
        except (ScoreError, AudioError) as error:
            entry["error"] = str(error)
        scores.append(entry)


def _scorer(metric: str, options: Options, device: torch.device) -> Callable[[Any], Any]:
    if metric == "speaker_similarity":
        return SpeakerSimilarity(options.speaker_model, device)
    if metric == "utmos":
        return Naturalness(options.utmos, device)
    if metric in ("transcript", "prompt_transcript"):
        return Transcriber(options.recognizer, device)
    if metric == "perplexity":
        return TextLikelihood(options.text_model, device)
    if metric == "judge":
        return Judge(options.judge_url, options.judge_model, options.judge_prompt)
    return Repetition()


def _found(entries: list[dict[str, Any]], metric: str, options: Options) -> dict[tuple[str, int], dict[str, Any]]:
    """The scores of a metric by the chosen models. A later line replaces an earlier one."""
    source = options.source_of(metric)
    return {
        (entry["prompt"], entry["sample"]): entry
        for entry in entries
        if (entry["metric"], entry["source"]) == (metric, source)
    }


def summarize(entries: list[dict[str, Any]], scores: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    """The figures: the mean of each metric over the scored samples, and the samples without a score, by reason.

    The perplexity is :func:`torchtitan.eval.scorers.generative_perplexity`; the delta method gives its standard error.
    """
    cases = _cases(entries)
    metrics: dict[str, Any] = {}
    for metric in options.metrics:
        found = _found(scores, metric, options)
        mine = [found[prompt, number] for prompt, number, _ in cases if (prompt, number) in found]
        values = [entry["value"] for entry in mine if "value" in entry]
        reasons: dict[str, int] = {}
        for entry in mine:
            if "error" in entry:
                reasons[entry["error"]] = reasons.get(entry["error"], 0) + 1
        value = error = None
        if values:
            value, error = sum(values) / len(values), standard_error(values)
            if metric == "perplexity":
                value = generative_perplexity(values)
                error = None if error is None else value * error
        metrics[metric] = {
            "value": value,
            "standard_error": error,
            "samples": len(values),
            "failed": len(mine) - len(values),
            "reasons": reasons,
        }
    frames = [sample["frames"] for _, _, sample in cases]
    return {
        "metrics": metrics,
        "samples": len(cases),
        "ended": sum(sample["ended"] for _, _, sample in cases),
        "seconds_of_speech": round(sum(frames) * FRAME_SIZE / SAMPLE_RATE, 2),
        "unusable_prompts": [entry for entry in entries if "error" in entry],
    }


def format_results(results: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"{'metric':<20}{'value':>10}{'std. error':>12}{'samples':>9}{'failed':>8}"]
    for name, figures in results["metrics"].items():
        shown = ["nan" if figures[key] is None else f"{figures[key]:.4f}" for key in ("value", "standard_error")]
        lines.append(f"{name:<20}{shown[0]:>10}{shown[1]:>12}{figures['samples']:>9}{figures['failed']:>8}")
    count, ended = results["samples"], results["ended"]
    lines.append(f"{count} continuations, {results['seconds_of_speech']:g} s of speech, {ended} ended by themselves")
    for entry in results["unusable_prompts"]:
        print(f"warning: {entry['prompt']} could not be used: {entry['error']}", file=sys.stderr)
    return "\n".join(lines)
