"""The clips that a codec is judged on: of the assets, of any data set, and spoken words."""

import functools
import json
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from torchtitan.audio.waveform import SAMPLE_RATE, AudioError, load_audio, resample
from torchtitan.codec_training.data import FULL_SCALE, RETRIES
from torchtitan.codec_training.voices import PROMPT_SECONDS, STORED_RATE, VOICES, WEEKDAYS, number, say
from torchtitan.datasets.decoding import decode_row, open_recordings
from torchtitan.datasets.shards import write_atomically
from torchtitan.tools.errors import UserError

REAL_SECONDS = 20.0  # of a clip of any other data set, at most
REST_SECONDS = 0.5  # what a clip has after its prompt, at least
WORDS = [*(number(n) for n in range(1, 21)), *WEEKDAYS]


@dataclass(frozen=True)
class Clip:
    """A recording: waveform float32 [n] at 24 kHz, and the number in VOICES of who speaks, -1 where unknown."""

    waveform: torch.Tensor
    voice: int = -1


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
        if len(waveform) >= (PROMPT_SECONDS + REST_SECONDS) * SAMPLE_RATE:
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
    dataset = open_recordings(path)
    picks = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
    clips = []
    for _, row in tqdm(dataset.read(picks), path, len(picks), mininterval=5):
        try:
            clips.append(Clip(decode_row(row, REAL_SECONDS, RETRIES)[0]))
        except AudioError as error:
            tqdm.write(f"left out: {row.key}: {error}")
    if not clips:
        raise UserError(f"{path}: no recording in it can be used.")
    return clips


@dataclass(frozen=True)
class Word:
    """A spoken word: waveform float32 [n] at 24 kHz, its number in the list of words, and whether it tests."""

    waveform: torch.Tensor
    word: int
    test: bool


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
            samples.append((FULL_SCALE * wave).round().astype(np.int16))
            numbers.append(w)
            test.append(n >= renditions)
        starts = np.cumsum([0, *map(len, samples)])
        stored = {"samples": np.concatenate(samples), "starts": starts, "words": np.array(numbers)}
        stored |= {"test": np.array(test), "made_by": np.array(made_by)}
        write_atomically(folder / "words.npz", functools.partial(np.savez, **stored))
    parts = np.split(stored["samples"].astype(np.float32) / FULL_SCALE, stored["starts"][1:-1])
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
