"""The speech that a codec is judged on, in the layout of the assets, and any other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from torchtitan.audio.waveform import SAMPLE_RATE, AudioError, load_audio
from torchtitan.codec_training.voices import PROMPT_SECONDS, VOICES
from torchtitan.datasets.decoding import decode_row, open_recordings
from torchtitan.tools.errors import UserError

REAL_SECONDS = 20.0
"""Of a clip of any other data set, at most."""
REST_SECONDS = 0.5
"""What a clip has after its prompt, at least."""


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
            clips.append(Clip(decode_row(row, REAL_SECONDS, 5)[0]))
        except AudioError as error:
            tqdm.write(f"left out: {row.key}: {error}")
    if not clips:
        raise UserError(f"{path}: no recording in it can be used.")
    return clips
