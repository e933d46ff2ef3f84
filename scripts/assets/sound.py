"""Noise, rooms, two clips in one, and the parquet files that hold clips."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import torchaudio

from torchtitan.codec_training.voices import STORED_RATE

LOUDEST = 0.95  # amplitude to which louder clips are scaled down


def noise(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Background noise at 16 kHz, root mean square 1: rain (hiss with drops), wind (slow, low), engine, hum."""
    time_s = np.arange(samples) / STORED_RATE
    white = rng.standard_normal(samples)
    if kind == "rain":
        drops = (rng.random(samples) < 0.003) * rng.exponential(6.0, samples)
        wave = np.diff(white, prepend=0.0) * 0.5 + np.convolve(drops, np.exp(-np.arange(64) / 12), "same")
    elif kind == "wind":
        swell = 1 + 0.8 * np.sin(2 * np.pi * (0.4 * time_s + rng.random()))
        wave = np.convolve(white, np.hanning(48), "same") * swell
    elif kind == "engine":
        rate = rng.uniform(28, 40)
        wave = sum(np.sin(2 * np.pi * rate * k * time_s + rng.uniform(0, 6.28)) / k**0.5 for k in range(1, 24))
        wave = wave + np.convolve(white, np.hanning(12), "same") * 0.2
    elif kind == "hum":
        rate = rng.choice([100.0, 120.0])
        wave = sum(np.sin(2 * np.pi * rate * k * time_s + rng.uniform(0, 6.28)) / k for k in (1, 2, 3, 4, 6, 8))
        wave = wave + 0.03 * white
    else:
        raise ValueError(f"no noise is called {kind}")
    return (wave / np.sqrt(np.mean(wave**2))).astype(np.float32)


def with_noise(wave: np.ndarray, background: np.ndarray, ratio_db: float = 12.0) -> np.ndarray:
    """Speech and noise, `ratio_db` dB apart in power."""
    level = np.sqrt(np.mean(wave**2)) * 10 ** (-ratio_db / 20)
    return wave + level * background


def with_room(wave: np.ndarray, decay_s: float, rng: np.random.Generator) -> np.ndarray:
    """Speech in a synthetic room: convolved with noise that decays by 60 dB in `decay_s`. Same length and level."""
    tail = int(decay_s * STORED_RATE)
    response = rng.standard_normal(tail) * 10 ** (-3 * np.arange(tail) / tail) * 0.12
    response[0] = 1.0
    dry, tail_wave = (torch.from_numpy(samples.astype(np.float32)) for samples in (wave, response))
    wet = torchaudio.functional.fftconvolve(dry, tail_wave)
    wet = wet.numpy()[: len(wave)]
    return (wet * np.sqrt(np.mean(wave**2) / (np.mean(wet**2) + 1e-12))).astype(np.float32)


def switch(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The first half of one clip, then the second half of another of equal length, with 30 ms of crossfade."""
    samples, fade = len(first), int(0.03 * STORED_RATE)
    ramp = np.clip((np.arange(samples) - samples // 2) / fade, 0, 1)
    return (first * (1 - ramp) + second * ramp).astype(np.float32)


def encode_audio(wave: np.ndarray, path: str) -> dict[str, bytes | str]:
    """The struct that data sets hold: the bytes of a file, FLAC or Opus by its name, and the name."""
    buffer, samples = io.BytesIO(), wave / max(1.0, np.abs(wave).max() / LOUDEST)
    if path.endswith(".flac"):
        soundfile.write(buffer, samples, STORED_RATE, format="FLAC")
    else:
        soundfile.write(buffer, samples, STORED_RATE, format="OGG", subtype="OPUS", compression_level=0.985)
    return {"bytes": buffer.getvalue(), "path": path}


def corpus_row(name: str, wave: np.ndarray, text: str) -> dict:
    """A row in the layout of MLCommons/peoples_speech."""
    duration_ms = np.int32(round(len(wave) * 1000 / STORED_RATE))
    return {"id": name, "audio": encode_audio(wave, name), "duration_ms": duration_ms, "text": text}


def write_table(folder: Path, rows: list[dict], name: str = "train-00000-of-00001.parquet") -> None:
    """A parquet file whose columns have the types of the rows' values."""
    folder.mkdir(parents=True, exist_ok=True)
    # Recordings do not repeat, so a dictionary would only take room.
    options = {"compression": "zstd", "compression_level": 19, "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.Table.from_pylist(rows), folder / name, **options)
