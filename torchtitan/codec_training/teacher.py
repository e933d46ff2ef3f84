"""The semantic teacher: what is spoken, not who speaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from tqdm import tqdm

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.codec_training.clusters import k_means, nearest
from torchtitan.codec_training.mel import HIGH_HZ, LOW_HZ, mel_filters
from torchtitan.codec_training.speech import Speech, save_arrays

TEACHER_HOP = 480
"""Samples between two columns of MFCCs: 20 ms."""
TEACHER_COLUMNS = FRAME_SIZE // TEACHER_HOP
"""Columns, and so clusters, of a frame of the codec."""
TEACHER_BANDS, TEACHER_COEFFICIENTS, SLOPE_COLUMNS = 40, 13, 5
TEACHER_WINDOW = 1024
"""Samples."""
LOUD_SHARE = 0.05
"""Level of a column that counts as speech, as a share of the clip's loudest one."""
SLOPE_WEIGHT = 0.6
"""Of the slopes; that of the MFCCs is 1."""
CLUSTERED_COLUMNS = 100_000
"""That the clusters are fitted to."""


class Teacher:
    """Clusters of speaker-normalised MFCCs: for each 20 ms of each clip the number of its cluster."""

    def __init__(self, folder: Path):
        stored = np.load(folder / "teacher.npz")
        self._labels, self._starts = stored["labels"], stored["starts"]

    @classmethod
    def prepare(cls, speech: Speech, clusters: int, folder: Path, seed: int) -> Teacher:
        """Cluster the clips' MFCCs unless `folder` holds the result already."""
        if not (folder / "teacher.npz").exists():
            clips = tqdm(range(len(speech)), "semantic teacher", mininterval=5)
            features = [normalised_mfcc(speech.clip(number)) for number in clips]
            points = torch.cat(features)
            generator = torch.Generator().manual_seed(seed)
            chosen = points[torch.randperm(len(points), generator=generator)[:CLUSTERED_COLUMNS]]
            centroids = k_means(chosen, clusters, generator)
            labels = torch.cat([nearest(feature, centroids) for feature in features]).to(torch.int16)
            starts = np.cumsum([0, *map(len, features)])
            save_arrays(folder / "teacher.npz", labels=labels.numpy(), starts=starts)
        return cls(folder)

    def labels(self, number: int) -> torch.Tensor:
        """int64 [columns] of a clip."""
        return torch.from_numpy(self._labels[self._starts[number] : self._starts[number + 1]].astype(np.int64))


def normalised_mfcc(waveform: torch.Tensor) -> torch.Tensor:
    """MFCCs and their slopes, normalised to mean 0 and variance 1 over the clip's loud parts.

    What a clip has on average is its speaker and its channel, so taking it out leaves more of what is said (cepstral
    mean and variance normalisation).

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
