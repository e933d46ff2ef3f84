"""The clips that a codec is judged on: from the assets, from any data set, and spoken words."""

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from torchtitan.audio.waveform import SAMPLE_RATE, AudioError, load_audio, resample
from torchtitan.codec_training.data import FULL_SCALE, RETRIES, save_arrays
from torchtitan.codec_training.voices import PROMPT_SECONDS, STORED_RATE, VOICES, WEEKDAYS, number, say
from torchtitan.datasets.decoding import decode_row, open_recordings
from torchtitan.tools.errors import UserError

REAL_SECONDS = 20.0  # longest clip of any other data set
REST_SECONDS = 0.5  # shortest rest of a clip after its prompt
WORDS = [*(number(n) for n in range(1, 21)), *WEEKDAYS]


@dataclass(frozen=True)
class VoicedClip:
    """A recording: waveform float32 [n] at 24 kHz, and the number in VOICES of its speaker, -1 where unknown."""

    waveform: torch.Tensor
    voice: int = -1


def read_clips(folder: Path, key: str, audio: str, *more: str) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """The rows of the parquet files in a folder, in order, and the waveforms [n] at 24 kHz of their audio column.

    Args:
        key: column that names a row.
        audio: column of the recording, as {bytes, path}.
        more: further columns.

    Raises:
        UserError: there are no such files, one cannot be read, a column is missing, or a recording cannot be used.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: there is no parquet file in it; --speech needs a folder like assets/speech.")
    rows, columns = [], [key, audio, *more]
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
    for row in tqdm(rows, f"clips of {folder.name}", mininterval=5):
        name, found = f"{folder}: {key} {row[key]}", row[audio]
        if not isinstance(found, dict) or not found.get("bytes"):
            raise UserError(f"{name}: column {audio} must hold audio as {{bytes, path}}.")
        yield row, load_audio(found["bytes"], name=name)


def training_clips(speech: Path) -> list[VoicedClip]:
    """The clips of peoples_speech, whose ids begin with their voice.

    Raises:
        UserError: they cannot be read, or a voice is none of VOICES.
    """
    folder, names = speech / "peoples_speech" / "clean", [voice.name for voice in VOICES]
    clips = []
    for row, waveform in read_clips(folder, "id", "audio"):
        voice = str(row["id"]).split("/")[0]
        if voice not in names:
            raise UserError(f"{folder}: the id {row['id']!r} does not begin with a voice ({', '.join(names)}).")
        clips.append(VoicedClip(waveform, names.index(voice)))
    return clips


def held_out_clips(speech: Path) -> list[VoicedClip]:
    """The clips of librispeech_asr, whose speaker_id is the number of their voice.

    Raises:
        UserError: they cannot be read, or a speaker is none of VOICES.
    """
    folder = speech / "librispeech_asr" / "clean" / "test"
    clips = []
    for row, waveform in read_clips(folder, "id", "audio", "speaker_id"):
        if row["speaker_id"] not in range(len(VOICES)):
            raise UserError(f"{folder}: speaker_id {row['speaker_id']} is not one of the {len(VOICES)} voices.")
        clips.append(VoicedClip(waveform, row["speaker_id"]))
    return clips


def pair_clips(speech: Path, count: int) -> list[VoicedClip]:
    """The first positive clips of SALMon/speaker_consistency that are longer than a prompt; their voices take turns.

    Raises:
        UserError: they cannot be read, or none is half a second longer than a prompt.
    """
    folder = speech / "SALMon" / "speaker_consistency"
    least = (PROMPT_SECONDS + REST_SECONDS) * SAMPLE_RATE
    clips = (
        VoicedClip(waveform, int(row["ind"]) % len(VOICES))
        for row, waveform in read_clips(folder, "ind", "positive_audio")
        if len(waveform) >= least
    )
    if not (found := list(itertools.islice(clips, count))):
        raise UserError(f"{folder}: no clip is longer than a prompt of {PROMPT_SECONDS} s by half a second.")
    return found


def other_clips(path: str, count: int) -> list[VoicedClip]:
    """Clips of any data set that training reads, spread evenly over it; at most 20 s of each.

    Raises:
        UserError: the data set is not there, or none of these clips can be used.
    """
    dataset = open_recordings(path)
    picks = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
    clips = []
    for _, row in tqdm(dataset.read(picks), path, len(picks), mininterval=5):
        try:
            clips.append(VoicedClip(decode_row(row, REAL_SECONDS, RETRIES)[0]))
        except AudioError as error:
            tqdm.write(f"left out: {row.key}: {error}")
    if not clips:
        raise UserError(f"{path}: no recording in it can be used.")
    return clips


@dataclass(frozen=True)
class Word:
    """A spoken word: waveform float32 [n] at 24 kHz, its number in the list of words, and whether it is for testing."""

    waveform: torch.Tensor
    word: int
    test: bool


def spoken_words(folder: Path, words: list[str], renditions: int, seed: int) -> list[Word]:
    """Each word in each voice of espeak-ng, at various pitches (+-13), speeds (+-20 %) and levels.

    `renditions` of each word and voice are for learning, half as many (at least one) for testing. They are kept in
    <folder>/words.npz.

    Raises:
        RuntimeError: espeak-ng is not installed.
    """
    tests = max(1, renditions // 2)
    voices = [asdict(voice) for voice in VOICES]
    made_by = json.dumps({"words": words, "renditions": [renditions, tests], "seed": seed, "voices": voices})
    path = folder / "words.npz"
    stored: dict[str, Any] = {}
    if path.exists():
        with np.load(path) as kept:
            stored = dict(kept)
    if str(stored.get("made_by")) != made_by:
        if shutil.which("espeak-ng") is None:
            raise RuntimeError("espeak-ng is not installed")
        samples, numbers, test = [], [], []
        tasks = list(itertools.product(range(len(words)), VOICES, range(renditions + tests)))
        for w, voice, n in tqdm(tasks, "spoken words", mininterval=5):
            rng = random.Random(f"{seed} {words[w]} {voice.name} {n}")
            pitch, speed = voice.pitch + rng.randint(-10, 10), round(voice.speed * rng.uniform(0.85, 1.15))
            wave = say(words[w], replace(voice, pitch=pitch, speed=speed), "neutral", rng)
            samples.append((FULL_SCALE * wave).round().astype(np.int16))
            numbers.append(w)
            test.append(n >= renditions)
        starts = np.cumsum([0, *map(len, samples)])
        stored = {"samples": np.concatenate(samples), "starts": starts, "words": numbers, "test": test}
        save_arrays(path, **stored, made_by=made_by)
    parts = np.split(stored["samples"].astype(np.float32) / FULL_SCALE, stored["starts"][1:-1])
    return [
        Word(resample(torch.from_numpy(part), STORED_RATE), int(word), bool(test))
        for part, word, test in zip(parts, stored["words"], stored["test"], strict=True)
    ]
