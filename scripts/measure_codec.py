"""Judge a small Mimi codec on speech: what is left of words and voices in its codes, and how the codes are used.

    python scripts/measure_codec.py --codec assets/mimi-small --output outputs/measures
    python scripts/measure_codec.py --model outputs/quickstart/hf/quickstart --real MY_SPEECH MORE_SPEECH

All but the use of the codebooks is measured on clips that neither codec nor classifiers have seen, and has its standard
error beside it:

1. Round trips, at 8 and at 4 quantizers: short-time objective intelligibility (STOI) against the input, and the
   distance of log-mel spectra; also on speech of other people (`--real`).
2. The use of each codebook: entries used, entropy, perplexity.
3. What each codebook says: how well a clip's histogram of codes tells the voice, and how many nats a code says about
   the voice and about the sound. A good semantic codebook says much about the sound and little about the voice.
4. Words: a classifier that learned clean spoken words hears their round trips.
5. Voices: a classifier that learned clean voices hears round trips and, with `--model`, continuations of prompts.

<output>/measures.json holds all figures; the tables are printed. The same command on the same machine gives the same
figures, apart from `timing`. espeak-ng speaks the words; without it that measure is left out. The voices and the
layout of `--speech` are those of scripts/build_assets.py.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import torchaudio
from tqdm import tqdm

from scripts.build_assets import PROMPT_SECONDS, STORED_RATE, VOICES, WEEKDAYS, number, say
from torchtitan.audio.codec import FRAME_RATE, FRAME_SIZE, Codec
from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError, load_audio, resample
from torchtitan.eval.statistics import standard_error, wilson_interval
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.logging import quiet_transformers

# How many quantizers round trips use: all that a small codec has, and the token stream's default.
QUANTIZERS = (8, 4)
STOI_RATE = 10_000
# Log-mel spectra: 25 ms each 10 ms. Stored clips have nothing above 8 kHz.
MEL_WINDOW, MEL_FFT, MEL_HOP, MEL_BANDS = 600, 1024, 240, 40
MEL_LOW, MEL_HIGH = 60.0, 7_600.0
# How far below a clip's loudest value differences stop to count, and columns stop to be speech, in dB.
FLOOR_DB, LOUD_DB = 60.0, 26.0
# Clusters of 20 ms of the teacher that stand for the sounds: fewer than in training, so that 30 minutes tell their
# probabilities given a code.
SOUNDS = 64
# Observations that the labels' overall shares may count as for each code.
PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# Of the classifiers of histograms; the best of 0.001 to 1 in cross-validation over the training clips of the assets.
HISTOGRAM_PENALTY = 1.0
WORDS = [*(number(n) for n in range(1, 21)), *WEEKDAYS]
WORD_COLUMNS = 32
# Silence around a word on its way through the codec, in samples: it does not begin at the codec's first moment.
WORD_MARGIN = 2 * FRAME_SIZE
CONTINUATION_SECONDS = 3.0
# A continuation with less speech than this, in seconds, is silent; speech is what lies less than this below the
# prompt's loudest column, in dB.
SILENT_SECONDS, SILENT_DB = 0.2, 30.0
REAL_SECONDS = 20.0


@dataclass
class Options:
    """Judge a small Mimi codec on speech."""

    codec: str = "assets/mimi-small"
    """The codec: a folder or a hub id."""
    speech: Path = Path("assets/speech")
    """Folder of speech laid out like assets/speech, with clips of the voices of scripts/build_assets.py."""
    model: str | None = None
    """A converted model that was trained on this codec's codes, whose continuations are judged too."""
    real: list[str] | None = None
    """Further data sets, as training reads them, for round trips of speech that the codec was not trained on."""
    real_clips: int = 100
    """Clips of each of them, spread evenly."""
    continuations: int = 60
    """Prompts to continue: the first clips of SALMon/speaker_consistency that are long enough; voices take turns."""
    renditions: int = 4
    """Renditions of each word in each voice that the classifier of words learns; half as many others test it."""
    output: Path = Path("outputs/measures")
    """Folder for measures.json and the spoken words."""
    seed: int = 0
    """Of spoken words, clusters and continuations."""
    threads: int = 1
    """Threads on the CPU."""


@dataclass(frozen=True)
class Clip:
    """A recording: waveform float32 [n] at 24 kHz, and the number in VOICES of who speaks, -1 where unknown."""

    waveform: torch.Tensor
    voice: int = -1


# Codes and labels of a clip, int64 [N] each.
Labelled = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Word:
    """A spoken word: waveform float32 [n] at 24 kHz, its number in the list of words, and whether it tests."""

    waveform: torch.Tensor
    word: int
    test: bool


# ---------------------------------------------------------------------------------------------------------------------
# Speech


def read_rows(folder: Path, columns: list[str]) -> list[dict[str, Any]]:
    """These columns of all rows of the parquet files in a folder, in order.

    Raises:
        UserError: there are no such files, one cannot be read, or a column is missing.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: there is no parquet file in it; --speech needs a folder like assets/speech.")
    rows = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: it cannot be read ({str(error).splitlines()[0]}).") from None
        if missing := [column for column in columns if column not in table.column_names]:
            raise UserError(f"{file}: it has no column {' and no column '.join(missing)}.")
        rows += table.select(columns).to_pylist()
    if not rows:
        raise UserError(f"{folder}: its parquet files have no rows.")
    return rows


def read_audio(row: dict[str, Any], column: str, name: str) -> torch.Tensor:
    """The recording in a column of a row: float32 [n] at 24 kHz.

    Raises:
        UserError: it cannot be used.
    """
    audio = row[column]
    if not isinstance(audio, dict) or not audio.get("bytes"):
        raise UserError(f"{name}: column {column} must hold audio as {{bytes, path}}.")
    return load_audio(audio["bytes"], name=name)


def training_clips(speech: Path) -> list[Clip]:
    """The clips of peoples_speech, whose ids begin with their voice.

    Raises:
        UserError: they cannot be read, or a voice is none of VOICES.
    """
    folder, names = speech / "peoples_speech" / "clean", [voice.name for voice in VOICES]
    clips = []
    for row in tqdm(read_rows(folder, ["id", "audio"]), "training clips", mininterval=5):
        voice = str(row["id"]).split("/")[0]
        if voice not in names:
            raise UserError(f"{folder}: the id {row['id']!r} does not begin with a voice ({', '.join(names)}).")
        clips.append(Clip(read_audio(row, "audio", f"{folder}: {row['id']}"), names.index(voice)))
    return clips


def held_out_clips(speech: Path) -> list[Clip]:
    """The clips of librispeech_asr, whose speaker_id is the number of their voice.

    Raises:
        UserError: they cannot be read, or a speaker is none of VOICES.
    """
    folder = speech / "librispeech_asr" / "clean" / "test"
    clips = []
    for row in tqdm(read_rows(folder, ["id", "audio", "speaker_id"]), "held-out clips", mininterval=5):
        if row["speaker_id"] not in range(len(VOICES)):
            raise UserError(f"{folder}: speaker_id {row['speaker_id']} is not one of the {len(VOICES)} voices.")
        clips.append(Clip(read_audio(row, "audio", f"{folder}: {row['id']}"), row["speaker_id"]))
    return clips


def pair_clips(speech: Path, count: int) -> list[Clip]:
    """The first positive clips of SALMon/speaker_consistency that are longer than a prompt; their voices take turns.

    Raises:
        UserError: they cannot be read, or none is long enough, by half a second of rest.
    """
    folder = speech / "SALMon" / "speaker_consistency"
    clips: list[Clip] = []
    for row in read_rows(folder, ["ind", "positive_audio"]):
        waveform = read_audio(row, "positive_audio", f"{folder}: pair {row['ind']}")
        if len(waveform) >= (PROMPT_SECONDS + 0.5) * SAMPLE_RATE:
            clips.append(Clip(waveform, int(row["ind"]) % len(VOICES)))
        if len(clips) == count:
            break
    if not clips:
        raise UserError(f"{folder}: no clip is longer than a prompt of {PROMPT_SECONDS} s by half a second.")
    return clips


def other_clips(path: str, count: int) -> list[Clip]:
    """Clips of any data set that training reads, spread evenly over it; at most 20 s of each.

    Raises:
        UserError: the data set is not there, or none of these clips can be used.
    """
    from torchtitan.datasets.decoding import decode_row, open_recordings

    dataset = open_recordings(path)
    picks = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
    clips = []
    for _, row in tqdm(dataset.read(picks), path, len(picks), mininterval=5):
        try:
            clips.append(Clip(decode_row(row, REAL_SECONDS, 5)[0]))
        except AudioError as error:
            tqdm.write(f"left out: {row.key}: {error}")
    if not clips:
        raise UserError(f"{path}: no recording in it can be used.")
    return clips


def spoken_words(folder: Path, words: list[str], renditions: int, seed: int) -> list[Word]:
    """Each word in each voice, as espeak-ng says it at various pitches (+-13), speeds (+-20 %) and levels.

    `renditions` of a word and voice are to learn from, half as many (one at least) to test with. They are kept in
    <folder>/words.npz for the next time.

    Raises:
        RuntimeError: espeak-ng is not installed.
    """
    tests = max(1, renditions // 2)
    voices = [asdict(voice) for voice in VOICES]
    made_by = json.dumps({"words": words, "renditions": [renditions, tests], "seed": seed, "voices": voices})
    stored = _load_words(folder / "words.npz", made_by)
    if stored is None:
        if shutil.which("espeak-ng") is None:
            raise RuntimeError("espeak-ng is not installed")
        samples, numbers, test = [], [], []
        tasks = [(w, v, n) for w in range(len(words)) for v in range(len(VOICES)) for n in range(renditions + tests)]
        for w, v, n in tqdm(tasks, "spoken words", mininterval=5):
            rng = random.Random(f"{seed} {words[w]} {VOICES[v].name} {n}")
            pitch, speed = VOICES[v].pitch + rng.randint(-10, 10), round(VOICES[v].speed * rng.uniform(0.85, 1.15))
            wave = say(words[w], replace(VOICES[v], pitch=pitch, speed=speed), "neutral", rng)
            samples.append((32767 * wave).round().astype(np.int16))
            numbers.append(w)
            test.append(n >= renditions)
        stored = {
            "samples": np.concatenate(samples),
            "starts": np.cumsum([0, *map(len, samples)]),
            "words": np.array(numbers),
            "test": np.array(test),
        }
        np.savez(folder / "words.partial.npz", made_by=np.array(made_by), **stored)
        os.replace(folder / "words.partial.npz", folder / "words.npz")
    parts = np.split(stored["samples"].astype(np.float32) / 32767, stored["starts"][1:-1])
    return [
        Word(resample(torch.from_numpy(part), STORED_RATE), int(word), bool(test))
        for part, word, test in zip(parts, stored["words"], stored["test"], strict=True)
    ]


def _load_words(path: Path, made_by: str) -> dict[str, np.ndarray] | None:
    """The words kept in a file, if it is there and they were made the same way."""
    if not path.exists():
        return None
    with np.load(path) as stored:
        found = dict(stored)
    return found if str(found.pop("made_by")) == made_by else None


# ---------------------------------------------------------------------------------------------------------------------
# Measures of waveforms


def mel_levels(waveform: torch.Tensor, floor: float | None = None) -> torch.Tensor:
    """Levels in mel bands from 60 Hz to 7.6 kHz, one column each 10 ms: [n] at 24 kHz to [40, 1 + n // 240], in dB.

    Args:
        floor: to which lower values are raised; 60 dB below the highest one by default.
    """
    hann = torch.hann_window(MEL_WINDOW)
    spectrum = torch.stft(
        waveform, MEL_FFT, MEL_HOP, MEL_WINDOW, hann, center=True, pad_mode="constant", return_complex=True
    )
    filters = torchaudio.functional.melscale_fbanks(MEL_FFT // 2 + 1, MEL_LOW, MEL_HIGH, MEL_BANDS, SAMPLE_RATE)
    levels = 20 * torch.log10(filters.T @ spectrum.abs() * (2 / hann.sum()) + 1e-7)
    return levels.clamp(min=float(levels.max()) - FLOOR_DB if floor is None else floor)


def log_mel_distance(made: torch.Tensor, true: torch.Tensor) -> float:
    """Mean absolute difference in dB of two clips' levels in mel bands, down to 60 dB below the true one's loudest.

    Args:
        made, true: [n] at 24 kHz.
    """
    levels = mel_levels(true)
    return float((mel_levels(made, float(levels.max()) - FLOOR_DB) - levels).abs().mean())


def intelligibility(made: torch.Tensor, true: torch.Tensor) -> float | None:
    """Short-time objective intelligibility of a clip, given the clean one: 1 for the clean one, 0.4 for white noise.

    As Taal and others (IEEE Transactions on Audio, Speech and Language Processing, 2011) define it, at 10 kHz. None
    for a clip with less than 0.4 s of speech, for which it is not defined.

    Args:
        made, true: [n] at 24 kHz.

    Raises:
        UserError: pystoi is not installed.
    """
    stoi = load_pystoi()
    pair = [torchaudio.functional.resample(w.double(), SAMPLE_RATE, STOI_RATE).numpy() for w in (true, made)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = float(stoi(*pair, STOI_RATE, extended=False))
    return None if any("Not enough STFT frames" in str(warning.message) for warning in caught) else value


def load_pystoi() -> Any:
    """pystoi's function.

    Raises:
        UserError: it is not installed.
    """
    try:
        from pystoi import stoi
    except ImportError:
        raise UserError("STOI is computed by pystoi, which is not installed; `uv sync` brings it.") from None
    return stoi


def pitch_track(waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pitch in semitones above 100 Hz, and how periodic the sound is (0 to 1), one value each 10 ms.

    The highest peak between 60 and 400 Hz of the windows' autocorrelation, divided by that of the window alone, with a
    small preference for higher pitches (after Boersma, IFA Proceedings 17, 1993).

    Args:
        waveform: [n] at 24 kHz.

    Returns:
        two tensors [1 + n // 240].
    """
    length = 1440
    shortest, longest = SAMPLE_RATE // 400, SAMPLE_RATE // 60
    window = torch.hann_window(length)
    pieces = F.pad(waveform, (length // 2, length)).unfold(0, length, MEL_HOP)[: 1 + len(waveform) // MEL_HOP]
    pieces = (pieces - pieces.mean(1, keepdim=True)) * window
    size = 2 * length
    correlation = torch.fft.irfft(torch.fft.rfft(pieces, size).abs().square(), size)
    own = torch.fft.irfft(torch.fft.rfft(window, size).abs().square(), size)
    normal = correlation / (correlation[:, :1] + 1e-6) / (own / own[0])
    lags = torch.arange(shortest, longest)
    scores = normal[:, shortest:longest] - 0.02 * torch.log2(lags / shortest)
    best = scores.argmax(1)
    periodic = normal[:, shortest:longest].gather(1, best[:, None])[:, 0].clamp(0, 1)
    return 12 * torch.log2(SAMPLE_RATE / lags[best] / 100), periodic


# ---------------------------------------------------------------------------------------------------------------------
# Measures of codes


def entropy(counts: torch.Tensor) -> float:
    """Entropy in nats of a distribution, given counts of any shape."""
    shares = counts.flatten().double() / counts.sum()
    return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())


def code_use(codes: torch.Tensor) -> dict[str, float]:
    """How the entries of a codebook are used by these codes [N]: number and share of those used, entropy in nats, and
    perplexity, which is how many entries it would take if all were used alike."""
    counts = torch.bincount(codes, minlength=CODEBOOK_SIZE)
    used, nats = int((counts > 0).sum()), entropy(counts)
    return {"used": used, "share": used / CODEBOOK_SIZE, "entropy": nats, "perplexity": math.exp(nats)}


def information(learned: list[Labelled], tests: list[Labelled]) -> dict[str, float]:
    """How many nats a code says about a label: an estimate from below of their mutual information.

    It is by how much the cross-entropy of the test clips' labels falls when their probabilities are those given the
    code, all counted on other clips (after Barber and Agakov, NIPS 2003). Unlike the mutual information of the counts
    themselves it does not grow with the number of codes: rare codes, of which little is known, say little. It may come
    out slightly below 0.

    For each code the labels' overall shares count as some observations more. How many, every fifth of the clips to
    learn from decides.

    Args:
        learned, tests: for each clip its codes and labels, int64 [N] each.

    Returns:
        nats, their standard_error over test clips, and at_most: the cross-entropy without the code.
    """
    size = 1 + max(int(labels.max()) for _, labels in (*learned, *tests))
    fitting = [clip for i, clip in enumerate(learned) if i % 5] or learned
    counts, judged = count_pairs(fitting, size), learned[::5]
    prior = min(PRIORS, key=lambda prior: sum(float(loss.sum()) for loss in code_losses(counts, prior, judged)))
    counts = count_pairs(learned, size)
    # With a boundless prior the code says nothing.
    without, given = code_losses(counts, math.inf, tests), code_losses(counts, prior, tests)
    gains = torch.stack([(a - b).sum() for a, b in zip(without, given, strict=True)])
    lengths = torch.tensor([len(loss) for loss in given])
    nats = gains.sum() / lengths.sum()
    # Of a mean over frames that come in clips.
    error = (gains - nats * lengths).square().sum().sqrt() / lengths.sum()
    at_most = torch.cat(without).mean()
    return {"nats": float(nats), "standard_error": float(error), "at_most": float(at_most)}


def count_pairs(clips: list[Labelled], size: int) -> torch.Tensor:
    """How often each code had each of `size` labels: float64 [2048, size]."""
    codes, labels = (torch.cat(parts) for parts in zip(*clips, strict=True))
    counts = torch.bincount(codes * size + labels, minlength=CODEBOOK_SIZE * size)
    return counts.view(CODEBOOK_SIZE, size).double()


def code_losses(counts: torch.Tensor, prior: float, clips: list[Labelled]) -> list[torch.Tensor]:
    """For each clip the negative log probabilities [N] of its labels, given its codes."""
    overall = (counts.sum(0) + 1) / (counts.sum() + counts.shape[1])
    weight = 1 / (1 + counts.sum(1, keepdim=True) / prior)
    losses = -(counts / (counts.sum(1, keepdim=True) + prior) + weight * overall).log()
    return [losses[codes, labels] for codes, labels in clips]


def histogram(codes: torch.Tensor) -> torch.Tensor:
    """Roots of the shares of each entry among a clip's codes [T]: float [2048] of length 1."""
    return (torch.bincount(codes, minlength=CODEBOOK_SIZE).float() / len(codes)).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers


class Classifier:
    """Multinomial logistic regression with an L2 penalty, fitted to its one optimum by L-BFGS in double precision.

    Features are centred and divided by one common deviation, so they should be of one kind or one size.

    Args:
        features: float [N, D].
        labels: int64 [N], from 0 to classes - 1.
        penalty: of the squared weights, beside the mean cross-entropy.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float = 1e-3):
        points = features.double()
        self.centre, self.scale = points.mean(0), points.std(0, correction=0).square().mean().sqrt().clamp(min=1e-9)
        points = (points - self.centre) / self.scale
        self.weight = torch.zeros(classes, points.shape[1], dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(points @ self.weight.T + self.bias, labels)
            value = value + penalty * self.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """float [N, D] to the likeliest classes, int64 [N]."""
        return ((features.double() - self.centre) / self.scale @ self.weight.T + self.bias).argmax(1)


def word_features(waveform: torch.Tensor) -> torch.Tensor:
    """A word's levels in mel bands, stretched to 32 columns and freed of their mean: [n] to [40 * 32], in dB."""
    levels = F.interpolate(mel_levels(waveform)[None], WORD_COLUMNS, mode="linear", align_corners=True)[0]
    return (levels - levels.mean()).flatten()


def voice_features(waveform: torch.Tensor) -> torch.Tensor:
    """What a voice is like on average: [n] at 24 kHz to [82].

    Mean (less the mean of all bands, which is the level) and deviation of the levels in each mel band over the loud
    columns, in dB, and mean and deviation of the pitch over the periodic ones among them, in semitones.
    """
    levels = mel_levels(waveform)
    loud = loudness(levels) >= loudness(levels).max() - LOUD_DB
    pitch, periodic = pitch_track(waveform)
    voiced = loud & (periodic > 0.6)
    if not voiced.any():
        voiced = loud
    mean, deviation = levels[:, loud].mean(1), levels[:, loud].std(1, correction=0)
    # A semitone weighs as much as two decibels: there are two figures of pitch and eighty of levels.
    pitches = 2 * torch.stack([pitch[voiced].mean(), pitch[voiced].std(correction=0)])
    return torch.cat([mean - mean.mean(), deviation, pitches])


def loudness(levels: torch.Tensor) -> torch.Tensor:
    """Level of all bands together: [bands, columns] to [columns], in dB."""
    return 10 * torch.log10((10 ** (levels / 10)).sum(0))


def score(right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with its standard error, 95 % interval (Wilson) and number of trials; None for both without any."""
    if not len(right):
        return {"accuracy": None, "standard_error": None, "interval": None, "clips": 0}
    points = [float(value) for value in right]
    accuracy = sum(points) / len(points)
    interval = wilson_interval(accuracy, len(points))
    return {
        "accuracy": accuracy,
        "standard_error": standard_error(points),
        "interval": list(interval),
        "clips": len(points),
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error, minimum and number of values."""
    if not len(values):
        return {"mean": None, "standard_error": None, "minimum": None, "clips": 0}
    return {
        "mean": sum(values) / len(values),
        "standard_error": standard_error(values),
        "minimum": min(values),
        "clips": len(values),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The five measures


class Judge:
    """A codec and the speech it is judged on. Each method is one of the measures and returns its figures.

    Args:
        codec: with 8 quantizers.
        training, held_out: clips with their voices.

    Raises:
        UserError: a voice is held out that no training clip has.
    """

    def __init__(self, codec: Codec, training: list[Clip], held_out: list[Clip], seed: int):
        self.codec, self.training, self.held_out, self.seed = codec, training, held_out, seed
        self.voices = sorted({clip.voice for clip in training})
        if unknown := {clip.voice for clip in held_out} - set(self.voices):
            raise UserError(f"the voice {VOICES[min(unknown)].name} is held out, but no training clip has it.")
        self.timing: dict[str, float] = {}
        started = time.perf_counter()
        self.training_codes = self.encode([clip.waveform for clip in training], "codes of training clips")
        self.held_out_codes = self.encode([clip.waveform for clip in held_out], "codes of held-out clips")
        samples = sum(len(clip.waveform) for clip in (*training, *held_out))
        self.timing["encoded_times_real_time"] = samples / SAMPLE_RATE / (time.perf_counter() - started)
        self.made = {
            quantizers: self.decode(self.held_out_codes, [clip.waveform for clip in held_out], quantizers)
            for quantizers in QUANTIZERS
        }
        features = [voice_features(clip.waveform) for clip in tqdm(training, "voices", mininterval=5)]
        labels = torch.tensor([clip.voice for clip in training])
        self.voice_of = Classifier(torch.stack(features), labels, len(VOICES))

    def encode(self, waveforms: list[torch.Tensor], what: str) -> list[torch.Tensor]:
        """Codes [8, T] of waveforms [n], each alone."""
        return [self.codec.encode([waveform])[0] for waveform in tqdm(waveforms, what, mininterval=5)]

    def decode(self, codes: list[torch.Tensor], waveforms: list[torch.Tensor], quantizers: int) -> list[torch.Tensor]:
        """What is heard of waveforms [n] when their codes [8, T] are cut to the first quantizers: [n] again."""
        pairs = tqdm(zip(codes, waveforms, strict=True), f"{quantizers} quantizers", len(codes), mininterval=5)
        return [self.codec.decode(rows[:quantizers])[: len(waveform)] for rows, waveform in pairs]

    def round_trips(self, real: dict[str, list[Clip]]) -> dict[str, Any]:
        """STOI and log-mel distance of the held-out clips and of other speech, at each number of quantizers."""

        def judge(made: list[torch.Tensor], true: list[Clip]) -> dict[str, Any]:
            pairs = [(a, b.waveform) for a, b in zip(made, true, strict=True)]
            stoi = [intelligibility(*pair) for pair in tqdm(pairs, "STOI", mininterval=5)]
            distance = [log_mel_distance(*pair) for pair in pairs]
            found = {"stoi": summary([value for value in stoi if value is not None])}
            found["log_mel_distance_db"] = summary(distance)
            by_voice = {
                VOICES[voice].name: [
                    s for s, clip in zip(stoi, true, strict=True) if clip.voice == voice and s is not None
                ]
                for voice in sorted({clip.voice for clip in true} - {-1})
            }
            return {**found, "stoi_by_voice": {name: summary(values) for name, values in by_voice.items()}}

        figures = {"held_out": {str(q): judge(made, self.held_out) for q, made in self.made.items()}, "real": {}}
        for name, clips in real.items():
            waveforms = [clip.waveform for clip in clips]
            codes = self.encode(waveforms, f"codes of {name}")
            figures["real"][name] = {str(q): judge(self.decode(codes, waveforms, q), clips) for q in QUANTIZERS}
        return figures

    def codebooks(self) -> dict[str, Any]:
        """For each quantizer: use of its codebook, and what its codes say about voice and sound.

        Sounds are clusters of speaker-normalised MFCCs each 20 ms, four in a frame: the semantic teacher's of
        scripts/train_codec.py, found anew on the training clips.
        """
        from scripts.train_codec import k_means, nearest, normalised_mfcc

        groups = ((self.training, self.training_codes), (self.held_out, self.held_out_codes))
        mfccs = [
            [normalised_mfcc(clip.waveform) for clip in tqdm(clips, "sounds", mininterval=5)] for clips, _ in groups
        ]
        centroids = k_means(torch.cat(mfccs[0]), SOUNDS, torch.Generator().manual_seed(self.seed))
        sounds = [[nearest(mfcc, centroids) for mfcc in group] for group in mfccs]
        voices = [torch.tensor([clip.voice for clip in clips]) for clips, _ in groups]
        figures = []
        for q in tqdm(range(self.codec.num_quantizers), "codebooks", mininterval=5):
            codes = [[rows[q] for rows in group] for _, group in groups]
            histograms = [torch.stack([histogram(row) for row in group]) for group in codes]
            heard = Classifier(histograms[0], voices[0], len(VOICES), HISTOGRAM_PENALTY)(histograms[1])
            of_voice, of_sound = [], []
            for rows, speakers, labels in zip(codes, voices, sounds, strict=True):
                of_voice.append([(row, speaker.expand(len(row))) for row, speaker in zip(rows, speakers, strict=True)])
                # The teacher has four columns a frame, but none for a rest of less than 20 ms.
                finer = [row.repeat_interleave(4)[: len(own)] for row, own in zip(rows, labels, strict=True)]
                of_sound.append(list(zip(finer, labels, strict=True)))
            figures.append(
                {
                    "quantizer": q,
                    **code_use(torch.cat([*codes[0], *codes[1]])),
                    "voice": score((heard == voices[1]).tolist()),
                    "about_voice": information(*of_voice),
                    "about_sound": information(*of_sound),
                }
            )
        frames = sum(rows.shape[1] for _, group in groups for rows in group)
        return {"frames": frames, "chance": 1 / len(self.voices), "quantizers": figures}

    def words(self, words: list[Word]) -> dict[str, Any]:
        """How many words a classifier that learned clean ones hears right, clean and after round trips.

        The round trip is that of the word between two bits of silence; where it begins and ends is not guessed.
        """
        learned, tests = ([word for word in words if word.test == test] for test in (False, True))
        classes = len({word.word for word in words})
        features = torch.stack([word_features(word.waveform) for word in learned])
        word_of = Classifier(features, torch.tensor([word.word for word in learned]), classes)
        truth = torch.tensor([word.word for word in tests])
        padded = [F.pad(word.waveform, (WORD_MARGIN, WORD_MARGIN)) for word in tests]
        codes = self.encode(padded, "codes of words")
        heard = {"clean": [word.waveform for word in tests]}
        for q in QUANTIZERS:
            heard[str(q)] = [made[WORD_MARGIN:-WORD_MARGIN] for made in self.decode(codes, padded, q)]
        figures: dict[str, Any] = {"chance": 1 / classes, "learned_from": len(learned)}
        for name, waveforms in heard.items():
            said = word_of(torch.stack([word_features(waveform) for waveform in waveforms]))
            figures[name] = score((said == truth).tolist())
        return figures

    def speakers(self) -> dict[str, Any]:
        """How many voices a classifier that learned clean ones hears right, clean and after round trips."""
        truth = [clip.voice for clip in self.held_out]
        heard = {"clean": [clip.waveform for clip in self.held_out], **{str(q): made for q, made in self.made.items()}}
        figures = {name: self.hear_voices(waveforms, truth) for name, waveforms in heard.items()}
        return {"chance": 1 / len(self.voices), "gender_chance": self.gender_chance(), **figures}

    def gender_chance(self) -> float:
        """The share of voices of the more frequent gender."""
        women = sum(VOICES[voice].gender == "female" for voice in self.voices)
        return max(women, len(self.voices) - women) / len(self.voices)

    def hear_voices(self, waveforms: list[torch.Tensor], truth: list[int]) -> dict[str, Any]:
        """Scores of the classifier of voices on waveforms [n], of voice and of gender."""
        if not waveforms:
            return {"voice": score([]), "gender": score([])}
        said = self.voice_of(torch.stack([voice_features(waveform) for waveform in waveforms])).tolist()
        pairs = list(zip(said, truth, strict=True))
        return {
            "voice": score([a == b for a, b in pairs]),
            "gender": score([VOICES[a].gender == VOICES[b].gender for a, b in pairs]),
        }

    def continuations(self, lm: Any, pairs: list[Clip]) -> dict[str, Any]:
        """Whether a model goes on in the voice of its prompt, the first 1.28 s of each clip; 3 s at most.

        What the codec leaves of the true rest of the clips is what can be expected of a model at best.

        Args:
            lm: the SpeechLM, with the codec that is judged.
            pairs: clips whose voice does not change.
        """
        from torchtitan.generation import BATCH_ROWS, Engine, Sampling, frame_bound, sample_requests

        length = round(PROMPT_SECONDS * SAMPLE_RATE)
        frames = length // FRAME_SIZE
        bound = frame_bound(lm, PROMPT_SECONDS + CONTINUATION_SECONDS)
        truth = [clip.voice for clip in pairs]
        prompts = [clip.waveform[:length] for clip in pairs]
        figures: dict[str, Any] = {"num_quantizers": lm.stream.num_quantizers, "prompts": len(pairs)}
        figures["clean_prompt"] = self.hear_voices(prompts, truth)
        figures["clean_rest"] = self.hear_voices([clip.waveform[length:] for clip in pairs], truth)
        if figures["clean_prompt"]["voice"]["accuracy"] < 0.5:
            reason = "the voices of SALMon/speaker_consistency do not take turns, as far as their prompts can be heard"
            return {"skipped": f"No continuations were judged: {reason}."}
        rests = [
            lm.codec.decode(lm.codec.encode([clip.waveform])[0])[length : len(clip.waveform)]
            for clip in tqdm(pairs, "true continuations", mininterval=5)
        ]
        figures["round_trip_of_rest"] = self.hear_voices(rests, truth)

        rows = min(len(pairs), BATCH_ROWS["cpu"])
        engine = Engine(lm, rows, lm.stream.sample_length(bound), consume=True)
        sampling = Sampling(temperature=0.8, top_k=30, seed=self.seed)
        codes = [lm.codec.encode([prompt])[0] for prompt in prompts]
        requests = [sample_requests(code, bound - frames, sampling)[0] for code in codes]
        with tqdm(desc="continuations", unit="frame", mininterval=5) as bar:
            results = engine.generate(requests, bar.update)
        spoken, voices = [], []
        for prompt, code, result, voice in zip(prompts, codes, results, truth, strict=True):
            # Prompt and continuation are decoded together, as inference.py does it.
            waveform = lm.codec.decode(torch.cat([code, result.codes], dim=1))[length:]
            if speaks(waveform, prompt):
                spoken.append(waveform)
                voices.append(voice)
        figures["continuation"] = self.hear_voices(spoken, voices)
        figures["silent"] = score([False] * len(spoken) + [True] * (len(pairs) - len(spoken)))
        figures["mean_seconds"] = sum(result.codes.shape[1] for result in results) / len(results) / FRAME_RATE
        return {**figures, "chance": 1 / len(self.voices), "gender_chance": self.gender_chance()}


def speaks(waveform: torch.Tensor, prompt: torch.Tensor) -> bool:
    """Whether a continuation [n] has speech: 0.2 s of it less than 30 dB below the prompt's loudest 25 ms."""
    if not len(waveform):
        return False
    loud = loudness(mel_levels(waveform)) > loudness(mel_levels(prompt)).max() - SILENT_DB
    return int(loud.sum()) * MEL_HOP >= SILENT_SECONDS * SAMPLE_RATE


# ---------------------------------------------------------------------------------------------------------------------
# The command


def load_model(name: str, codec: str) -> Any:
    """A SpeechLM with the codec that is judged.

    Raises:
        UserError: it cannot be loaded, or was trained on the codes of another codec, as far as that can be seen.
    """
    from torchtitan.checkpoint.speech_lm import SpeechLM

    lm = SpeechLM.load(name, codec, "cpu", "float32")
    own = getattr(lm.model.config, "audio_tokenizer", None)
    if own and Path(own).is_dir():
        trained_on = Codec.load(own, lm.stream.num_quantizers, lm.codec.padding, lm.codec.window)
        if trained_on.fingerprint() != lm.codec.fingerprint():
            raise UserError(f"{name}: it was trained on the codes of {own}, which are not those of {codec}.")
    return lm


def measure(options: Options) -> dict[str, Any]:
    """All figures.

    Raises:
        UserError: an option does not fit, or something that is needed is missing or cannot be read.
    """
    for name in ("real_clips", "continuations", "renditions", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1.")
    load_pystoi()
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal activations slow a CPU several times
    quiet_transformers()
    # All that can be missing is looked for before anything is measured.
    codec = Codec.load(options.codec, max(QUANTIZERS))
    lm = None if options.model is None else load_model(options.model, options.codec)
    pairs = [] if lm is None else pair_clips(options.speech, options.continuations)
    held_out = held_out_clips(options.speech)
    training = training_clips(options.speech)
    real = {path: other_clips(path, options.real_clips) for path in options.real or []}
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{options.output}: the folder cannot be made ({error.strerror}).") from None

    judge = Judge(codec, training, held_out, options.seed)
    figures: dict[str, Any] = {
        "codec": options.codec,
        "codec_fingerprint": codec.fingerprint(),
        "speech": str(options.speech),
        "model": options.model,
        "settings": {"seed": options.seed, "threads": options.threads, "renditions": options.renditions},
        "versions": {name: metadata.version(name) for name in ("torch", "torchaudio", "transformers", "pystoi")},
        "round_trips": judge.round_trips(real),
        "codebooks": judge.codebooks(),
    }
    try:
        words = spoken_words(options.output, WORDS, options.renditions, options.seed)
    except RuntimeError as error:
        figures["words"] = {"skipped": f"No words were judged: {error}."}
    else:
        figures["words"] = judge.words(words)
    figures["speakers"] = judge.speakers()
    if lm is None:
        figures["continuations"] = {"skipped": "No continuations were judged: no --model was given."}
    else:
        figures["continuations"] = judge.continuations(lm, pairs)
    return {**figures, "timing": {**judge.timing, "seconds": time.perf_counter() - started}}


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""

    def with_error(value: dict[str, Any], key: str, digits: int, factor: int = 1, unit: str = "") -> str:
        if value[key] is None:
            return ""
        error = "" if value["standard_error"] is None else f" ± {factor * value['standard_error']:.{digits}f}"
        return f"{factor * value[key]:.{digits}f}{error}{unit}"

    def mean(value: dict[str, Any], digits: int) -> str:
        return with_error(value, "mean", digits)

    def share(value: dict[str, Any]) -> str:
        return with_error(value, "accuracy", 1, 100, " %")

    def table(head: list[str], rows: list[list[str]]) -> str:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    trips, books, words, speakers = (figures[key] for key in ("round_trips", "codebooks", "words", "speakers"))
    parts = [f"Codec {figures['codec']}, speech {figures['speech']}. What follows ± is the standard error."]

    rows = []
    for name, by_number in {"held out": trips["held_out"], **trips["real"]}.items():
        for q, found in by_number.items():
            stoi = found["stoi"]
            lowest = "" if stoi["minimum"] is None else f"{stoi['minimum']:.3f}"
            rows.append([name, q, str(stoi["clips"]), mean(stoi, 3), lowest, mean(found["log_mel_distance_db"], 2)])
    parts.append(table(["round trip", "quantizers", "clips", "STOI", "lowest", "log-mel distance, dB"], rows))

    by_voice = {q: found["stoi_by_voice"] for q, found in trips["held_out"].items()}
    rows = [[f"{q} quantizers", *(mean(value, 3) for value in found.values())] for q, found in by_voice.items()]
    parts.append(table(["STOI by voice", *by_voice[str(QUANTIZERS[0])]], rows))

    head = ["quantizer", "entries used", "entropy, nats", "perplexity", f"voice (chance {100 * books['chance']:.1f} %)"]
    for what in ("voice", "sound"):
        head.append(f"nats about the {what} (of {books['quantizers'][0][f'about_{what}']['at_most']:.2f})")
    rows = []
    for book in books["quantizers"]:
        row = [str(book["quantizer"]), f"{book['used']:,} ({100 * book['share']:.0f} %)", f"{book['entropy']:.2f}"]
        row += [f"{book['perplexity']:.0f}", share(book["voice"])]
        rows.append([*row, *(with_error(book[key], "nats", 2) for key in ("about_voice", "about_sound"))])
    parts.append(table(head, rows))

    heard = ["clean", *map(str, QUANTIZERS)]
    head = ["heard right", "clean", *(f"{q} quantizers" for q in QUANTIZERS), "chance", "clips"]
    judged = [] if "skipped" in words else [("word", {name: words[name] for name in heard}, words["chance"])]
    for kind, chance in (("voice", "chance"), ("gender", "gender_chance")):
        judged.append((kind, {name: speakers[name][kind] for name in heard}, speakers[chance]))
    rows = [
        [kind, *map(share, found.values()), f"{100 * chance:.1f} %", str(found["clean"]["clips"])]
        for kind, found, chance in judged
    ]
    parts.append(table(head, rows))

    found = figures["continuations"]
    if "skipped" not in found:
        head = [f"{figures['model']}, {found['num_quantizers']} quantizers"]
        for kind, chance in (("voice", "chance"), ("gender", "gender_chance")):
            head.append(f"{kind} (chance {100 * found[chance]:.1f} %)")
        kinds = {
            "clean_prompt": "clean prompt",
            "clean_rest": "clean rest of the clip",
            "round_trip_of_rest": "its round trip",
            "continuation": "continuation",
        }
        rows = [
            [name, *(share(found[key][kind]) for kind in ("voice", "gender")), str(found[key]["voice"]["clips"])]
            for key, name in kinds.items()
        ]
        parts.append(table([*head, "clips"], rows))
        length = f"mean length {found['mean_seconds']:.2f} s"
        parts.append(f"Silent continuations: {share(found['silent'])} of {found['prompts']}; {length}.")
    parts += [part["skipped"] for part in (words, found) if "skipped" in part]
    timing = figures["timing"]
    speed = f"Encoded at {timing['encoded_times_real_time']:.0f} times real time"
    return "\n\n".join([*parts, f"{speed}; {timing['seconds']:.0f} s in all."])


def main(options: Options) -> None:
    """Measure, write measures.json, print the tables.

    Raises:
        UserError: see :func:`measure`, or the result cannot be written.
    """
    figures = measure(options)
    path = options.output / "measures.json"
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: it cannot be written ({error.strerror}).") from None
    print(tables(figures))


def command() -> None:
    import tyro

    main(tyro.cli(Options, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    run_command(command)
