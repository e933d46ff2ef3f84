"""Training data of a codec: recordings, decoded once, and the clusters of the semantic teacher."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from tqdm import tqdm

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError
from torchtitan.codec_training.codebooks import k_means, nearest
from torchtitan.codec_training.options import Options
from torchtitan.codec_training.spectra import HIGH_HZ, LOW_HZ, mel_filters
from torchtitan.datasets.decoding import decode_row, open_recordings
from torchtitan.datasets.readers import AudioDataset
from torchtitan.datasets.shards import write_atomically
from torchtitan.tools.errors import UserError

TEACHER_HOP = 480  # samples between two columns of MFCCs: 20 ms
TEACHER_COLUMNS = FRAME_SIZE // TEACHER_HOP  # columns in a frame of the codec
TEACHER_BANDS, TEACHER_COEFFICIENTS, SLOPE_COLUMNS = 40, 13, 5
TEACHER_WINDOW = 1024  # samples
LOUD_SHARE = 0.05  # level of a column that counts as speech, as a share of the clip's loudest one
SLOPE_WEIGHT = 0.6  # of the slopes; MFCCs have weight 1
GAINS_DB = (-8, 4)  # least and greatest gain of a row
FULL_SCALE = 32_767  # an int16 of amplitude 1
RETRIES = 5  # of reading a file
CLUSTERED_COLUMNS = 100_000  # columns that the clusters are fitted to


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write a .npz file that is complete or not there."""
    write_atomically(path, functools.partial(np.savez, **arrays))


class Speech:
    """All clips of the data sets, decoded once into one file of int16 at 24 kHz and read through a memory map.

    Attributes:
        starts: int64 [clips + 1], where each clip begins; clip i is samples starts[i] to starts[i + 1].
        firsts: the number of each data set's first clip.
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
                        (waveform.clamp(-1, 1) * FULL_SCALE).round().to(torch.int16).numpy().tofile(file)
                        starts.append(starts[-1] + len(waveform))
                    if len(starts) - 1 == firsts[-1]:
                        raise UserError(f"{path}: no recording in it can be used.")
            save_arrays(record, starts=starts, firsts=firsts, fingerprints=fingerprints)
        return cls(folder)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def hours(self) -> float:
        return self.starts[-1] / SAMPLE_RATE / 3600

    def clip(self, number: int, first: int = 0, length: int | None = None) -> torch.Tensor:
        """A clip from its sample `first` on, at most `length` samples of it: float32 [samples]."""
        samples = self.samples[self.starts[number] + first : self.starts[number + 1]][:length]
        return torch.from_numpy(samples.astype(np.float32) / FULL_SCALE)


def read_clips(path: str, dataset: AudioDataset) -> Iterator[torch.Tensor]:
    """Waveforms [samples] at 24 kHz of all recordings that can be used, in order, with a progress bar."""
    unusable: list[str] = []
    for _, row in tqdm(dataset.read(range(len(dataset))), f"reading {path}", len(dataset), mininterval=5):
        try:
            waveform = decode_row(row, None, RETRIES)[0]
            if len(waveform) < FRAME_SIZE:
                raise AudioError(f"it is shorter than a frame of {FRAME_SIZE} samples.")
            yield waveform
        except AudioError as error:
            unusable.append(f"{row.key}: {error}")
    if unusable:
        print(f"{path}: {len(unusable)} of {len(dataset)} recordings cannot be used and are left out; {unusable[0]}")


def teacher_labels(speech: Speech, clusters: int, folder: Path, seed: int) -> list[torch.Tensor]:
    """The semantic teacher: for each clip the clusters of its speaker-normalised MFCCs, int16 [columns].

    A column is 20 ms. The clusters are kept in `folder`.
    """
    path = folder / "teacher.npz"
    if not path.exists():
        clips = tqdm(range(len(speech)), "semantic teacher", mininterval=5)
        features = [normalised_mfcc(speech.clip(number)) for number in clips]
        points = torch.cat(features)
        generator = torch.Generator().manual_seed(seed)
        chosen = points[torch.randperm(len(points), generator=generator)[:CLUSTERED_COLUMNS]]
        centroids = k_means(chosen, clusters, generator)
        labels = torch.cat([nearest(feature, centroids) for feature in features]).to(torch.int16)
        save_arrays(path, labels=labels.numpy(), starts=np.cumsum([0, *map(len, features)]))
    with np.load(path) as stored:
        return list(torch.from_numpy(stored["labels"]).split(np.diff(stored["starts"]).tolist()))


def normalised_mfcc(waveform: torch.Tensor) -> torch.Tensor:
    """MFCCs and their slopes, normalised to mean 0 and variance 1 over the clip's loud parts.

    A clip's mean and variance come mostly from its speaker and its channel (cepstral mean and variance normalisation).

    Args:
        waveform: float [samples] at 24 kHz.

    Returns:
        [columns, 26], one column for each whole 20 ms.
    """
    columns = len(waveform) // TEACHER_HOP
    # The centre of a column is the middle of its 20 ms.
    padded = F.pad(waveform, ((TEACHER_WINDOW - TEACHER_HOP) // 2, TEACHER_WINDOW))
    hann = torch.hann_window(TEACHER_WINDOW)
    spectrum = torch.stft(padded, TEACHER_WINDOW, TEACHER_HOP, window=hann, center=False, return_complex=True)
    mel = mel_filters(TEACHER_WINDOW, TEACHER_BANDS, waveform.device, LOW_HZ, HIGH_HZ) @ spectrum.abs()[:, :columns]
    level = mel.mean(0)
    logs = torch.log(mel + 1e-3 * level.max() + 1e-9)
    transform = torchaudio.functional.create_dct(TEACHER_COEFFICIENTS, TEACHER_BANDS, "ortho")
    cepstra = logs.T @ transform
    slopes = torchaudio.functional.compute_deltas(cepstra.T[None], SLOPE_COLUMNS)[0].T
    features = torch.cat([cepstra, slopes], 1)
    loud = level >= LOUD_SHARE * level.max()
    deviation = features[loud].std(0, correction=0).clamp(min=1e-3)
    weights = torch.ones(2 * TEACHER_COEFFICIENTS)
    weights[TEACHER_COEFFICIENTS:] = SLOPE_WEIGHT
    return (features - features[loud].mean(0)) / deviation * weights


def draw_batch(
    speech: Speech, known: list[torch.Tensor] | None, options: Options, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step, a function of the seed and the step alone.

    Args:
        known: the teacher's labels by clip, if there is a teacher.

    Returns:
        waveforms [rows, frames * 1920] with random gain, and the teacher's clusters [rows, frames * 4], -1 for none.
    """
    rng = np.random.default_rng((options.seed, step))
    length = options.frames * FRAME_SIZE
    waveforms = torch.zeros(options.rows, length)
    labels = torch.full((options.rows, options.frames * TEACHER_COLUMNS), -1)
    # Each sample of the data is equally likely.
    picks = rng.integers(speech.starts[-1], size=options.rows)
    for row, pick in enumerate(picks):
        number = int(np.searchsorted(speech.starts, pick, side="right")) - 1
        room = int(speech.starts[number + 1] - speech.starts[number]) - length
        first = TEACHER_HOP * int(rng.integers(max(room, 0) // TEACHER_HOP + 1))
        clip = speech.clip(number, first, length)
        waveforms[row, : len(clip)] = clip * 10 ** (rng.uniform(*GAINS_DB) / 20)
        if known is not None:
            own = known[number][first // TEACHER_HOP :][: labels.shape[1]]
            labels[row, : len(own)] = own
    return waveforms, labels
