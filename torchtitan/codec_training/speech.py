"""The speech that a codec is trained on, decoded once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError
from torchtitan.datasets.decoding import decode_row, open_recordings
from torchtitan.datasets.readers import AudioDataset
from torchtitan.tools.errors import UserError


class Speech:
    """All clips of the data sets, decoded once into one file of int16 at 24 kHz and read through a memory map.

    Attributes:
        starts: int64 [clips + 1], where each clip begins; clip i is samples starts[i] to starts[i + 1].
        firsts: for each data set the number of its first clip.
    """

    def __init__(self, folder: Path):
        stored = np.load(folder / "speech.npz")
        self.starts, self.firsts = stored["starts"], stored["firsts"].tolist()
        self.samples = np.memmap(folder / "speech.i16", dtype=np.int16, mode="r")

    @classmethod
    def prepare(cls, data: list[str], folder: Path) -> Speech:
        """Decode the data sets, unless `folder` holds them already, as they are now.

        Raises:
            UserError: a data set is missing, or none of it can be used.
        """
        # All are opened before any is decoded.
        datasets = [open_recordings(path) for path in data]
        fingerprints = np.array([dataset.fingerprint for dataset in datasets])
        record = folder / "speech.npz"
        current = record.exists() and np.array_equal(np.load(record)["fingerprints"], fingerprints)
        if not current and (folder / "checkpoint.pt").exists():
            raise UserError(f"{folder}: it holds a run on other recordings; delete it or give another --work.")
        if not current:
            folder.mkdir(parents=True, exist_ok=True)
            record.unlink(missing_ok=True)
            (folder / "teacher.npz").unlink(missing_ok=True)
            starts, firsts = [0], []
            with open(folder / "speech.i16", "wb") as file:
                for path, dataset in zip(data, datasets, strict=True):
                    firsts.append(len(starts) - 1)
                    for waveform in read_clips(path, dataset):
                        file.write((waveform.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes())
                        starts.append(starts[-1] + len(waveform))
                    if len(starts) - 1 == firsts[-1]:
                        raise UserError(f"{path}: no recording in it can be used.")
            save_arrays(record, starts=np.array(starts), firsts=np.array(firsts), fingerprints=fingerprints)
        return cls(folder)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def hours(self) -> float:
        return self.starts[-1] / SAMPLE_RATE / 3600

    def clip(self, number: int, first: int = 0, length: int | None = None) -> torch.Tensor:
        """float32 [samples] of a clip, from its sample `first` on, at most `length`."""
        start, end = self.starts[number] + first, self.starts[number + 1]
        if length is not None:
            end = min(end, start + length)
        return torch.from_numpy(self.samples[start:end].astype(np.float32) / 32767)


def read_clips(path: str, dataset: AudioDataset) -> Iterator[torch.Tensor]:
    """Waveforms [samples] at 24 kHz of all recordings that can be used, in order, with a progress bar."""
    unusable: list[str] = []
    for _, row in tqdm(dataset.read(range(len(dataset))), f"reading {path}", len(dataset), mininterval=5):
        try:
            waveform = decode_row(row, None, 5)[0]
            if len(waveform) < FRAME_SIZE:
                raise AudioError(f"it is shorter than a frame of {FRAME_SIZE} samples.")
            yield waveform
        except AudioError as error:
            unusable.append(f"{row.key}: {error}")
    if unusable:
        print(f"{path}: {len(unusable)} of {len(dataset)} recordings cannot be used and are left out; {unusable[0]}")


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An .npz file that is there whole or not at all."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    os.replace(partial, path)
