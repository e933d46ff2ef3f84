"""The parquet files of the assets."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from torchtitan.codec_training.voices import STORED_RATE

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CORPUS_SCHEMA = [("id", pa.string()), ("audio", AUDIO), ("duration_ms", pa.int32()), ("text", pa.string())]
OPUS = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.985}
LOUDEST = 0.95
"""Amplitude that a louder clip is brought down to."""


def encode_audio(wave: np.ndarray, path: str) -> dict[str, bytes | str]:
    """The struct that data sets hold: the bytes of a file, FLAC or Opus as its name says, and the name."""
    kind = {"format": "FLAC"} if path.endswith(".flac") else OPUS
    buffer = io.BytesIO()
    soundfile.write(buffer, wave / max(1.0, np.abs(wave).max() / LOUDEST), STORED_RATE, **kind)
    return {"bytes": buffer.getvalue(), "path": path}


def write_table(path: Path, rows: list[dict], schema: list[tuple[str, pa.DataType]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=pa.schema(schema))
    # Recordings do not repeat, so a dictionary would only take room.
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False, write_statistics=False)
