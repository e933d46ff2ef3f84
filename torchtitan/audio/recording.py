"""Recordings as data sets hold them, before they are read (see waveform.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np


@dataclass(frozen=True, eq=False)
class Samples:
    """Audio that a data set holds decoded.

    Attributes:
        array: float32 [n], one channel.
        rate: in Hz, as the data state it.
    """

    array: np.ndarray
    rate: Any


@dataclass(frozen=True)
class Part:
    """Which part of a recording is meant: its samples from round(start * rate) up to, not with, round(stop * rate).

    Attributes:
        start, stop: seconds; ``stop`` None is the recording's end.
        channel: number of the one channel that is meant, from 0; None mixes all.
    """

    start: float = 0.0
    stop: float | None = None
    channel: int | None = None


# The path of an audio file, the bytes of one, one that is open, or audio that is decoded.
AudioSource: TypeAlias = str | Path | bytes | BinaryIO | Samples


def audio_of(cell: Any) -> str | bytes | Samples | None:
    """The audio of a data set's cell; None if it holds none.

    Args:
        cell: bytes, a path, or a dict: {bytes, path}, of which bytes come first, or {array, sampling_rate}.

    Raises:
        ValueError, TypeError: the array is no plain list of numbers.
    """
    if isinstance(cell, dict):
        if cell.get("bytes") is not None:
            cell = cell["bytes"]
        elif cell.get("array") is not None:
            array, rate = np.array(cell["array"], dtype=np.float32), cell.get("sampling_rate")
            if array.ndim != 1:
                raise ValueError("array is no plain list of numbers")
            return Samples(array, int(rate) if isinstance(rate, float) and rate.is_integer() else rate)
        else:
            cell = cell.get("path")
    return cell if isinstance(cell, bytes) or (isinstance(cell, str) and cell) else None
