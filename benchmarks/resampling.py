"""What the choice of model.resampler changes: ``uv run python benchmarks/resampling.py``.

Each recording is brought to each rate by an ideal filter (in the spectrum; from a lower rate this adds nothing above
its half), then to 24 kHz by each resampler, and encoded. Printed for each rate are the codes of each level that differ
from those of torchaudio, and how fast each resampler is. With a model, the same is done to the clips of pairs, and the
pairs whose decision changes are counted. ffmpeg is left out where torchcodec or FFmpeg's libraries are missing.
"""

import io
import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import harness
import torch

from torchtitan.audio.codec import Codec
from torchtitan.audio.waveform import RESAMPLERS, require_resampler, resample
from torchtitan.tools.errors import UserError

ASSETS = harness.ROOT / "assets"


@dataclass
class Options:
    """What to measure."""

    recordings: str = str(ASSETS / "speech" / "librispeech_asr" / "clean" / "test")
    """A folder, file or hub name with recordings."""
    limit: int = 40
    """Number of recordings."""
    audio_tokenizer: str = str(ASSETS / "mimi-small")
    """The codec."""
    rates: tuple[int, ...] = (8_000, 16_000, 22_050, 44_100, 48_000)
    """Rates in Hz."""
    model_name: str | None = None
    """A model that judges pairs, with its own codec."""
    pairs: str = str(ASSETS / "speech")
    """The parent of the folders of sLM21's and StoryCloze's tasks and of SALMon/."""
    pair_limit: int = 12
    """Pairs of each task."""
    output: Path | None = None
    """A JSON file for all figures."""


def at_rate(samples: torch.Tensor, rate: int, target: int) -> torch.Tensor:
    """A recording [n] at another rate, by cutting off its spectrum or filling it up with zeros."""
    if rate == target:
        return samples
    length = round(len(samples) * target / rate)
    spectrum = torch.fft.rfft(samples.double())
    kept = torch.zeros(length // 2 + 1, dtype=spectrum.dtype)
    shared = min(len(spectrum), len(kept))
    kept[:shared] = spectrum[:shared]
    return (torch.fft.irfft(kept, length) * (length / len(samples))).float()


def read(recording: bytes | str) -> tuple[torch.Tensor, int]:
    """A recording as mono [n] at its own rate."""
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(recording) if isinstance(recording, bytes) else recording, always_2d=True)
    return torch.from_numpy(samples).mean(dim=1).float(), rate


def measure_codes(options: Options, codec: Codec, resamplers: list[str]) -> dict[str, dict]:
    """By rate: recordings at or above it, and for each resampler its speed and the shares of codes that differ."""
    from torchtitan.datasets.decoding import open_recordings

    data = open_recordings(options.recordings)
    rows = [row for _, row in data.read(range(min(options.limit, len(data)))) if row.audio is not None]
    clips = [read(row.audio) for row in rows]  # type: ignore[arg-type]
    found: dict[str, dict] = {}
    for rate in options.rates:
        inputs = [at_rate(samples, own, rate) for samples, own in clips]
        wide = sum(own >= rate for _, own in clips)
        found[str(rate)] = {"clips": len(inputs), "of that rate or above": wide}
        codes: dict[str, torch.Tensor] = {}
        for name in resamplers:
            start = time.perf_counter()
            waveforms = [resample(samples, rate, name) for samples in inputs]
            seconds = time.perf_counter() - start
            frames = [codec.encode([waveform])[0] for waveform in waveforms]
            codes[name] = torch.cat(frames, dim=1)
            audio = sum(len(samples) for samples in inputs) / rate
            found[str(rate)][name] = {"seconds of audio a second": round(audio / seconds)}
        for name, other in itertools.combinations(resamplers, 2):
            differ = (codes[name] != codes[other]).double().mean(dim=1)
            found[str(rate)][f"{name} and {other} differ"] = [round(share, 4) for share in differ.tolist()]
    return found


def measure_pairs(options: Options, model_name: str, resamplers: list[str]) -> dict[str, dict]:
    """By rate: for each resampler the accuracy over all pairs, and how many it decides unlike torchaudio."""
    from torchtitan.checkpoint.speech_lm import SpeechLM
    from torchtitan.eval.benchmark import score_task
    from torchtitan.eval.data import open_tasks
    from torchtitan.eval.metrics import pair_points
    from torchtitan.eval.results import samples_table
    from torchtitan.eval.suites import SALMON, SLM21, STORY_CLOZE

    lm = SpeechLM.load(model_name, device="cpu")
    found: dict[str, dict] = {}
    for rate in options.rates:
        points: dict[str, list[float]] = {name: [] for name in resamplers}
        for benchmark in (SALMON, SLM21, STORY_CLOZE):
            parent = Path(options.pairs) / "SALMon" if benchmark is SALMON else Path(options.pairs)
            tasks, _ = open_tasks(str(parent), benchmark.tasks, benchmark.columns, benchmark.as_configurations)
            for task in tasks:
                with tempfile.TemporaryDirectory() as folder:
                    rows = list(task.pairs(options.pair_limit))
                    columns = {
                        column: [at_rate(*read(task.audio(row, column)), rate) for row in rows]  # type: ignore
                        for column in task.columns
                    }
                    path = Path(folder) / task.name / "train.parquet"
                    harness.write_audio_table(path, columns, rate, format="WAV", subtype="FLOAT")
                    (copy,), _ = open_tasks(folder, [task.name], task.columns, benchmark.as_configurations)
                    for name in resamplers:
                        lm.codec.resampler = name
                        samples = samples_table(score_task(benchmark, copy, lm), lm.stream.num_quantizers, {})
                        judged = pair_points(samples, benchmark.rule)[task.name]
                        points[name] += [pair.point for pair in judged if pair.point is not None]
        found[str(rate)] = {
            name: {
                "pairs": len(own),
                "accuracy": round(sum(own) / len(own), 4),
                "decided unlike torchaudio": sum(a != b for a, b in zip(own, points["torchaudio"], strict=True)),
            }
            for name, own in points.items()
        }
    return found


def main(options: Options) -> None:
    """Measure and print as JSON.

    Raises:
        UserError: the recordings, the codec or the model cannot be read.
    """
    torch.set_num_threads(1)
    resamplers = []
    for name in RESAMPLERS:
        try:
            require_resampler(name)
            resamplers.append(name)
        except UserError as error:
            print(f"left out: {error}", flush=True)
    found: dict[str, dict] = {"codes": measure_codes(options, Codec.load(options.audio_tokenizer, 4), resamplers)}
    print(json.dumps(found, indent=1), flush=True)
    if options.model_name is not None:
        found["pairs"] = measure_pairs(options, options.model_name, resamplers)
        print(json.dumps({"pairs": found["pairs"]}, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    harness.run(main, Options, __doc__)
