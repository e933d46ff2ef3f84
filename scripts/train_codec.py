"""Train a small Mimi codec from scratch, on any speech, on a CPU or a GPU.

    python scripts/train_codec.py --data MY_SPEECH --output codecs/mine

The result is a folder that ``MimiModel.from_pretrained`` loads: 24 kHz, 12.5 frames a second, 8 codebooks of 2,048
entries of which the first is semantic. `--data` are data sets as training reads them: folders of parquet, audio files,
manifests or tars, local or on the hub. A run that was stopped continues when the same command is given again. Figures
of the result: scripts/measure_codec.py.

How it is trained (docs/codec.md says why, and what else was tried):

1. Continuous. Encoder and decoder learn as an autoencoder whose latents carry noise instead of being quantized. The
   loss is the distance of log-mel spectra at five resolutions. The part of the latents that the first codebook will
   hold also predicts clusters of speaker-normalised MFCCs, four for each frame: what is spoken, not who speaks.
2. Quantized. Residual k-means of the latents seen so far gives the codebooks; gradients pass straight through them.
   They are fitted again and again, starting from the previous ones, and entries that no latent chose start anew.
3. Decoder. Encoder and codebooks are final (rounded to the float16 that they are stored in). The decoder learns on,
   and from `adversarial_from` on discriminators of spectra at three resolutions judge it.

`--start_from` fits the codebooks of a trained codec to other speech, keeps its encoder and repeats stage 3.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from tqdm import tqdm

from torchtitan.audio.codec import FRAME_SIZE, Codec, no_tf32, published_names
from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError
from torchtitan.checkpoint.speech_lm import choose_device
from torchtitan.datasets.decoding import decode_row, open_recordings
from torchtitan.datasets.readers import AudioDataset
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.memory import tune_malloc

QUANTIZERS = 8
# How many frames the codebooks' last fit looks at, of each data set; where some entries are at rare latents, fewer do,
# and finding those takes a pass over them for each entry.
FITTED_FRAMES, COMMON_FRAMES = 100_000, 30_000
# The semantic teacher: MFCCs each 20 ms, so four clusters a frame.
TEACHER_HOP = 480
TEACHER_BANDS, TEACHER_COEFFICIENTS = 40, 13
# Window lengths (samples) and mel bands of the spectral loss, and below which amplitude differences stop to count.
RESOLUTIONS = ((2048, 96), (1024, 80), (512, 64), (256, 40), (128, 20))
FLOOR = 1e-4
# Window lengths of the discriminators, which see what lies below 8 kHz.
DISCRIMINATOR_WINDOWS = (1024, 512, 256)
DISCRIMINATOR_TOP = 8_000


# Options that describe the encoder and how it is trained.
FROM_SCRATCH = (
    "continuous_steps",
    "quantized_steps",
    "num_filters",
    "hidden_size",
    "codebook_dim",
    "upsampling_ratios",
)
FROM_SCRATCH += ("clusters", "semantic_weight", "refit_every")


@dataclass
class Options:
    """Train a small Mimi codec from scratch."""

    data: list[str]
    """Data sets to train on: folders, files or hub ids. Common entries of codebooks are fitted to the last of them."""
    output: Path
    """Folder for the codec (config.json, model.safetensors, preprocessor_config.json)."""
    start_from: str | None = None
    """A codec (folder or hub id, of 8 quantizers) to start from instead of random weights. Its encoder stays, rounded
    to float16, so stages 1 and 2 and their options do not apply; codebooks are fitted and the decoder is trained."""
    work: Path | None = None
    """Folder for the decoded audio and checkpoints; <output>.training by default. It may be deleted at the end."""
    continuous_steps: int = 1500
    """Steps of stage 1."""
    quantized_steps: int = 1000
    """Steps of stage 2."""
    decoder_steps: int = 2500
    """Steps of stage 3."""
    adversarial_from: int = 800
    """Steps of stage 3 without discriminators; decoder_steps or more for none at all."""
    rows: int = 6
    """Stretches of speech in a step."""
    frames: int = 12
    """Length of a stretch in frames of 80 ms."""
    learning_rate: float = 0.02
    """Peak learning rate of matrices (Muon); that of vectors (AdamW) is 0.15 of it. It falls linearly over stages 1 and
    2; stage 3 begins again with the half of it."""
    num_filters: int = 24
    """Channels at the waveform; 16 times as many before the last strided convolution."""
    hidden_size: int = 96
    """Channels of latents and transformers."""
    codebook_dim: int = 32
    """Dimensions of codebook entries."""
    upsampling_ratios: tuple[int, int, int, int] = (4, 5, 6, 8)
    """Strides of the decoder, their product 960; the encoder's are the reverse. Mimi has 8 6 5 4; this order, with the
    long stride at the waveform, has a quarter fewer weights."""
    common_entries: tuple[int, ...] = (2048,) * 8
    """Of each codebook, the entries that k-means fits at the start of stage 3, to 100,000 frames of the last data set
    and as many of the others. Fewer than 2,048 give codes of lower entropy, which a small language model can learn from
    little speech: they are fitted to 30,000 frames of the last data set, and the other entries lie at rare latents."""
    rare_entries: int = 750
    """Of the others, how many lie at rare latents of the last data set; the rest lie at rare latents of all data."""
    speaker_directions: int | None = None
    """Directions of the semantic latents that are taken out of them at the start of stage 3: those in which clips
    differ most from each other, compared to how much they vary within, which is the speaker. 3, with --start_from 0."""
    clusters: int = 256
    """Clusters of the semantic teacher."""
    semantic_weight: float = 1.0
    """Weight of the semantic loss."""
    adversarial_weight: float = 1.0
    """Weight of what the discriminators say."""
    refit_every: int = 250
    """Steps between two fits of the codebooks in stage 2."""
    checkpoint_every: int = 250
    """Steps between two checkpoints."""
    precision: str = "bfloat16"
    """Of convolutions while training: bfloat16 or float32. The codec itself is always run in float32."""
    threads: int = 1
    """Threads on a CPU."""
    seed: int = 0
    """Of weights, stretches and noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


# ---------------------------------------------------------------------------------------------------------------------
# Speech


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


def draw_batch(
    speech: Speech, teacher: Teacher | None, options: Options, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stretches of a step, which depend on the seed and the step alone.

    Returns:
        waveforms [rows, frames * 1920] with random gain, and the teacher's clusters [rows, frames * 4], -1 for none.
    """
    rng = np.random.default_rng((options.seed, step))
    length = options.frames * FRAME_SIZE
    waveforms, labels = torch.zeros(options.rows, length), torch.full((options.rows, options.frames * 4), -1)
    # Each sample of the data is as likely as any other.
    picks = rng.integers(speech.starts[-1], size=options.rows)
    for row, pick in enumerate(picks):
        number = int(np.searchsorted(speech.starts, pick, side="right")) - 1
        room = int(speech.starts[number + 1] - speech.starts[number]) - length
        first = TEACHER_HOP * int(rng.integers(max(room, 0) // TEACHER_HOP + 1))
        clip = speech.clip(number, first, length)
        waveforms[row, : len(clip)] = clip * 10 ** (rng.uniform(-8, 4) / 20)
        if teacher is not None:
            known = teacher.labels(number)[first // TEACHER_HOP :][: labels.shape[1]]
            labels[row, : len(known)] = known
    return waveforms, labels


# ---------------------------------------------------------------------------------------------------------------------
# Semantic teacher


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
            chosen = points[torch.randperm(len(points), generator=generator)[:100_000]]
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
    padded = F.pad(waveform, (512 - TEACHER_HOP // 2, 1024))
    spectrum = torch.stft(padded, 1024, TEACHER_HOP, window=torch.hann_window(1024), center=False, return_complex=True)
    mel = mel_filters(1024, TEACHER_BANDS, waveform.device, 60.0, 7_600.0) @ spectrum.abs()[:, :columns]
    level = mel.mean(0)
    logs = torch.log(mel + 1e-3 * level.max() + 1e-9)
    transform = torchaudio.functional.create_dct(TEACHER_COEFFICIENTS, TEACHER_BANDS, "ortho")
    cepstra = logs.T @ transform
    slopes = torchaudio.functional.compute_deltas(cepstra.T[None], 5)[0].T
    features = torch.cat([cepstra, slopes], 1)
    loud = level >= 0.05 * level.max()
    deviation = features[loud].std(0, correction=0).clamp(min=1e-3)
    weights = torch.ones(2 * TEACHER_COEFFICIENTS)
    weights[TEACHER_COEFFICIENTS:] = 0.6
    return (features - features[loud].mean(0)) / deviation * weights


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """For each of the points [N, D] the number of its nearest centroid [K, D]: int64 [N]."""
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in points.split(16_384)])


def k_means(
    points: torch.Tensor,
    clusters: int,
    generator: torch.Generator,
    rounds: int = 20,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Centroids [clusters, D] of points [N, D]. A centroid that no point is nearest to starts again at a random point.

    Args:
        start: centroids to go on from; random points by default.
    """
    if start is None:
        picks = torch.randint(len(points), (clusters,), generator=generator)
        if len(points) >= clusters:
            picks = torch.randperm(len(points), generator=generator)[:clusters]
        start = points[picks.to(points.device)]
    centroids = start.clone()
    for _ in range(rounds):
        chosen = nearest(points, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, chosen, points)
        counts = torch.bincount(chosen, minlength=clusters)
        spare = points[torch.randint(len(points), (clusters,), generator=generator).to(points.device)]
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), spare)
    return centroids


def farthest(points: torch.Tensor, entries: torch.Tensor, count: int) -> torch.Tensor:
    """Further entries [count, D] for the points [N, D] that are farthest from all entries [K, D], one after the other.

    As in the greedy k-center method (Gonzalez, 1985), but an entry lies beyond its point, by 0.3 of the point's
    distance to the nearest of the given entries: so it is the nearest one to its point, and to few others.
    """
    distances, chosen = torch.cdist(points, entries).min(1)
    nearest_entries = entries[chosen]
    picked = []
    for _ in range(count):
        place = distances.argmax()
        entry = points[place] + 0.3 * (points[place] - nearest_entries[place])
        picked.append(entry)
        distances = torch.minimum(distances, (points - entry).norm(dim=1))
        distances[place] = 0
    return torch.stack(picked) if picked else entries[:0]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@cache
def mel_filters(
    window: int, bands: int, device: torch.device, low: float = 0.0, high: float = SAMPLE_RATE / 2
) -> torch.Tensor:
    """Triangular mel filters [bands, window // 2 + 1]."""
    filters = torchaudio.functional.melscale_fbanks(window // 2 + 1, low, high, bands, SAMPLE_RATE)
    return filters.T.contiguous().to(device)


def mel_spectrum(waveform: torch.Tensor, window: int, bands: int) -> torch.Tensor:
    """Amplitudes in mel bands, [B, samples] to [B, bands, columns]: 1 for a full-scale sine in the band's middle."""
    hann = torch.hann_window(window, device=waveform.device)
    spectrum = torch.stft(waveform, window, window // 4, window=hann, return_complex=True).abs()
    return mel_filters(window, bands, waveform.device) @ spectrum * (2 / hann.sum())


def spectral_loss(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Mean distance of log-mel spectra, plus that of the amplitudes relative to their mean, over all resolutions.

    The floor below the logarithm is low on purpose: at 1e-2, quiet bands and fricatives do not count, and speech
    comes out unintelligible.

    Args:
        made, true: [B, samples].
    """
    losses = []
    for window, bands in RESOLUTIONS:
        a, b = mel_spectrum(made, window, bands), mel_spectrum(true, window, bands)
        losses.append((torch.log(a + FLOOR) - torch.log(b + FLOOR)).abs().mean())
        losses.append((a - b).abs().mean() / b.mean().clamp(min=FLOOR))
    return torch.stack(losses).sum() / len(RESOLUTIONS)


class SpectralDiscriminator(torch.nn.Module):
    """Judges complex spectra at one resolution, as in EnCodec (arXiv 2210.13438), with few channels.

    Amplitudes are compressed (to the power of 0.3), phases kept.
    """

    def __init__(self, window: int, channels: int = 8):
        super().__init__()
        self.window = window
        self.bins = DISCRIMINATOR_TOP * window // SAMPLE_RATE + 1
        widths = [2, channels, channels, 2 * channels]
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, (9, 3), stride=(2, 1), padding=(4, 1)) for a, b in itertools.pairwise(widths)
        )
        self.convolutions.append(torch.nn.Conv2d(2 * channels, 2 * channels, 3, padding=1))
        self.verdict = torch.nn.Conv2d(2 * channels, 1, 3, padding=1)

    def forward(self, waveform: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[B, samples] to verdicts (1 for real) at many places, and the features on the way to them."""
        hann = torch.hann_window(self.window, device=waveform.device)
        spectrum = torch.stft(waveform.float(), self.window, self.window // 4, window=hann, return_complex=True)
        spectrum = spectrum[:, : self.bins] * (2 / hann.sum())
        spectrum = 2 * spectrum * (spectrum.abs() + 1e-5) ** -0.7
        hidden = torch.stack([spectrum.real, spectrum.imag], 1)
        features = []
        for convolution in self.convolutions:
            hidden = F.leaky_relu(convolution(hidden), 0.2)
            features.append(hidden)
        return self.verdict(hidden), features


class Discriminators(torch.nn.Module):
    """One discriminator for each resolution; least-squares losses and feature matching."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(SpectralDiscriminator(window) for window in DISCRIMINATOR_WINDOWS)

    def loss(self, made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        """What the discriminators are trained with: 1 is real, 0 is made."""
        losses = []
        for part in self.parts:
            losses.append((part(true)[0].float() - 1).square().mean() + part(made)[0].float().square().mean())
        return torch.stack(losses).mean()

    def judge(self, made: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder is trained with: to be taken for real, and to have the features of the real."""
        fooled, matched = [], []
        for part in self.parts:
            with torch.no_grad():
                _, real_features = part(true)
            verdict, features = part(made)
            fooled.append((verdict.float() - 1).square().mean())
            for a, b in zip(features, real_features, strict=True):
                matched.append((a.float() - b.float()).abs().mean() / b.float().abs().mean().clamp(min=1e-5))
        return torch.stack(fooled).mean(), torch.stack(matched).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Model


def make_config(options: Options) -> Any:
    """The MimiConfig of the options. Attention reaches as far as the stretches of a step, so it never sees further
    than in training."""
    from transformers import MimiConfig

    if math.prod(options.upsampling_ratios) * 2 != FRAME_SIZE:
        raise UserError(f"upsampling_ratios {options.upsampling_ratios}: their product must be {FRAME_SIZE // 2}.")
    if options.hidden_size % 8:
        raise UserError(f"hidden_size {options.hidden_size}: it must be a multiple of 8, for 4 attention heads.")
    if options.hidden_size == options.codebook_dim:
        raise UserError(
            f"codebook_dim {options.codebook_dim}: it must not be the hidden_size, which has no projection."
        )
    return MimiConfig(
        hidden_size=options.hidden_size,
        num_filters=options.num_filters,
        codebook_dim=options.codebook_dim,
        vector_quantization_hidden_dimension=options.codebook_dim,
        codebook_size=CODEBOOK_SIZE,
        num_quantizers=QUANTIZERS,
        num_semantic_quantizers=1,
        upsample_groups=options.hidden_size,
        upsampling_ratios=list(options.upsampling_ratios),
        num_hidden_layers=1,
        intermediate_size=3 * options.hidden_size // 2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=options.hidden_size // 4,
        layer_scale_initial_scale=0.3,
        sliding_window=2 * options.frames,
    )


class Autoencoder(torch.nn.Module):
    """A MimiModel as it is trained, with the head that predicts the semantic teacher's clusters."""

    def __init__(self, model: Any, clusters: int):
        super().__init__()
        self.model = model
        dim = model.config.codebook_dim
        self.head = torch.nn.Linear(dim, 4 * clusters)
        # transformers 5.23 nests the parts, earlier versions keep them at the top.
        nested = hasattr(model.encoder, "encoder_seanet")
        encoder, decoder = (model.encoder, model.decoder) if nested else (model, model)
        self._encoder = (
            encoder.encoder_seanet if nested else encoder.encoder,
            encoder.encoder_transformer,
            encoder.downsample,
        )
        self._decoder = (
            decoder.upsample,
            decoder.decoder_transformer,
            decoder.decoder_seanet if nested else decoder.decoder,
        )
        quantizer = model.quantizer
        self._halves = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)

    def encoder_parameters(self) -> list[torch.nn.Parameter]:
        """All that codes depend on: encoder, projections into the codebooks' spaces, the head."""
        projections = [half.input_proj for half in self._halves]
        return [p for part in (*self._encoder, *projections, self.head) for p in part.parameters()]

    def decoder_parameters(self) -> list[torch.nn.Parameter]:
        """All that only what is heard depends on."""
        projections = [half.output_proj for half in self._halves]
        return [p for part in (*self._decoder, *projections) for p in part.parameters()]

    def encode(self, waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, samples] to the semantic and the acoustic latents, each [B, codebook_dim, frames]."""
        seanet, transformer, downsample = self._encoder
        hidden = transformer(seanet(waveform[:, None]).transpose(1, 2))[0]
        latents = downsample(hidden.transpose(1, 2))
        semantic, acoustic = (half.input_proj(latents) for half in self._halves)
        return semantic, acoustic

    def decode(self, semantic: torch.Tensor, acoustic: torch.Tensor) -> torch.Tensor:
        """The latents, quantized or not, to [B, samples]."""
        upsample, transformer, seanet = self._decoder
        latents = sum(half.output_proj(part) for half, part in zip(self._halves, (semantic, acoustic), strict=True))
        hidden = transformer(upsample(latents).transpose(1, 2))[0]
        return seanet(hidden.transpose(1, 2))[:, 0].float()

    def semantic_loss(self, semantic: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the teacher's clusters [B, 4 * frames], given [B, codebook_dim, frames]."""
        logits = self.head(semantic.transpose(1, 2)).float()
        return F.cross_entropy(logits.reshape(labels.numel(), -1), labels.flatten(), ignore_index=-1)

    def quantize(
        self, semantic: torch.Tensor, acoustic: torch.Tensor, quantizers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest entries; for row b of the first `quantizers[b]` codebooks only. Without gradients."""
        quantized = []
        used = 0
        for half, part in zip(self._halves, (semantic, acoustic), strict=True):
            residual = part.detach().float().transpose(1, 2)
            total = torch.zeros_like(residual)
            for layer in half.layers:
                entries = layer.codebook.embed
                entry = F.embedding(nearest(residual.flatten(0, 1), entries), entries).view_as(residual)
                entry = entry * (used < quantizers)[:, None, None]
                total, residual, used = total + entry, residual - entry, used + 1
            quantized.append(total.transpose(1, 2))
        return quantized[0], quantized[1]

    @torch.no_grad()
    def fit_codebooks(self, latents: torch.Tensor, seed: int, rounds: int, anew: bool) -> None:
        """Residual k-means over latents [2, N, codebook_dim], from the present codebooks or anew."""
        generator = torch.Generator().manual_seed(seed)
        for half, residual in zip(self._halves, latents, strict=True):
            for layer in half.layers:
                start = None if anew else layer.codebook.embed
                rows = k_means(residual, CODEBOOK_SIZE, generator, rounds, start).half().float()
                set_codebook(layer.codebook, rows)
                residual = residual - rows[nearest(residual, rows)]

    @torch.no_grad()
    def fit_common_and_rare(
        self, own: torch.Tensor, other: torch.Tensor, common: Sequence[int], rare: int, seed: int
    ) -> None:
        """Codebooks whose first entries are common and whose others are rare (see Options.common_entries).

        Args:
            own, other: latents [2, N, codebook_dim] and [2, M, codebook_dim]; the codebooks are fitted to the first
                and have spare entries for the second.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = iter(common)
        for half, residual, spare in zip(self._halves, own, other, strict=True):
            for layer in tqdm(half.layers, "codebooks", mininterval=5):
                centroids = k_means(residual, next(sizes), generator)
                rows = torch.cat([centroids, farthest(residual, centroids, min(rare, CODEBOOK_SIZE - len(centroids)))])
                everything = torch.cat([spare, residual])
                rows = torch.cat([rows, farthest(everything, rows, CODEBOOK_SIZE - len(rows))]).half().float()
                set_codebook(layer.codebook, rows)
                residual, spare = residual - rows[nearest(residual, rows)], spare - rows[nearest(spare, rows)]


def without_speaker(clips: list[torch.Tensor], directions: int) -> torch.Tensor:
    """The matrix [D, D] that takes out of latents (columns) what clips differ in.

    Latents are whitened by their covariance within clips; the leading principal components of the clips' means are
    taken out, and the whitening is undone. What is the same throughout a clip is mostly who speaks.

    Args:
        clips: latents [frames, D] of each clip.
        directions: how many components, at most D - 1.
    """
    means = torch.stack([clip.mean(0) for clip in clips])
    within = torch.cov(torch.cat([clip - mean for clip, mean in zip(clips, means, strict=True)]).T)
    values, vectors = torch.linalg.eigh(within)
    # In what was taken out before, nothing varies but rounding errors.
    alive = values > 1e-4 * values.max()
    if not alive.any():
        return torch.eye(len(values), device=means.device)
    values, vectors = values[alive], vectors[:, alive]
    whiten, colour = (vectors @ torch.diag(values**power) for power in (-0.5, 0.5))
    _, components = torch.linalg.eigh(torch.cov((means @ whiten).T))
    leading = components[:, max(0, len(values) - directions) :]
    return torch.eye(len(means[0]), device=means.device) - colour @ leading @ leading.T @ whiten.T


def set_codebook(codebook: Any, rows: torch.Tensor) -> None:
    """Give a codebook these entries [2048, D]."""
    codebook.embed_sum.copy_(rows)
    codebook.cluster_usage.fill_(1.0)
    codebook._embed = None  # the cached quotient of the two


@torch.no_grad()
def scale_weights(autoencoder: Autoencoder, waveform: torch.Tensor) -> None:
    """Divide each convolution by the deviation of what it gives, and begin with quiet output.

    As in layer-sequential unit-variance initialisation (arXiv 1511.06422). With the weights that transformers draws,
    features grow from layer to layer, and the first steps explode.
    """

    def unit(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        deviation = output.float().std()
        module.weight.div_(deviation)
        if module.bias is not None:
            module.bias.zero_()
        return output / deviation

    hooks = [
        module.register_forward_hook(unit)
        for module in autoencoder.model.modules()
        if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)) and module.groups == 1
    ]
    autoencoder.decode(*autoencoder.encode(waveform))
    for hook in hooks:
        hook.remove()
    last = [module for module in autoencoder._decoder[2].modules() if isinstance(module, torch.nn.Conv1d)][-1]
    last.weight.mul_(0.02)


def keep_in_float32(model: torch.nn.Module) -> list[str]:
    """Run those convolutions in float32 under autocast whose bfloat16 is wrong on this CPU; returns their names.

    With fewer than 32 channels and a large stride, oneDNN gets some of them wrong (torch 2.14 on a CPU with AMX:
    the output of Conv1d(24, 48, 16, 8), the input's gradient of ConvTranspose1d(48, 24, 16, 8)). Training would go on
    with losses that look well, and the codec, which is run in float32, would be another function. So each is tried.
    """
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            continue
        length = 8 * module.kernel_size[0] if isinstance(module, torch.nn.Conv1d) else 64
        hidden = torch.randn(4, module.in_channels, length, generator=generator)
        results: list[list[torch.Tensor]] = []
        weights = None
        for enabled in (False, True):
            given = hidden.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                made = module(given).float()
            weights = torch.randn(made.shape, generator=generator) if weights is None else weights
            gradients = torch.autograd.grad((made * weights).sum(), [given, module.weight])
            results.append([made.detach(), *gradients])
        likeness = [F.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in zip(*results, strict=True)]
        if min(likeness) < 0.99:
            wrong.append(name)
            forward = module.forward

            def exact(hidden: torch.Tensor, forward: Any = forward) -> torch.Tensor:
                with torch.autocast(hidden.device.type, enabled=False):
                    return forward(hidden.float())

            vars(module)["forward"] = exact
    return wrong


@torch.no_grad()
def round_to_half(parameters: list[torch.nn.Parameter]) -> None:
    """Give every weight a value that float16 holds, since that is how the codec is stored."""
    for parameter in parameters:
        parameter.copy_(parameter.half().float())


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (K. Jordan and others, 2024), a convolution taken as a matrix.

    On two CPU cores it brings this codec in 400 steps further than AdamW in 600. torch.optim.Muon takes matrices only.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float = 0.02):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 0.05)
                update = orthogonal(parameter.grad.lerp(momentum, 0.95).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.mul_(1 - 0.02 * group["lr"]).add_(update.view_as(parameter), alpha=-scale * group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near 1, by five Newton-Schulz steps in bfloat16."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-12)).bfloat16()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Training:
    """The three stages. All that is random depends on seed and step, so on a CPU a resumed run is the same run."""

    def __init__(self, options: Options):
        from transformers import MimiModel

        self.options = options
        # What may be wrong is looked at before anything is decoded or written.
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = choose_device(found if options.device == "auto" else options.device)
        torch.manual_seed(options.seed)
        if options.start_from is None:
            model = MimiModel(make_config(options))
        else:
            model = Codec.load(options.start_from, QUANTIZERS).model.requires_grad_(True)
            if model.config.num_quantizers != QUANTIZERS or model.config.codebook_size != CODEBOOK_SIZE:
                raise UserError(f"{options.start_from}: it must have 8 codebooks of {CODEBOOK_SIZE} entries.")
        directions, dim = options.speaker_directions, model.config.codebook_dim
        self.speaker_directions = directions if directions is not None else 0 if options.start_from else 3
        if not 0 <= self.speaker_directions < dim:
            raise UserError(f"--speaker_directions must be from 0 to {dim - 1}, the codebook_dim less one.")
        output = options.output.resolve()
        self.work = options.work or output.with_name(output.name + ".training")
        # The steps at which the stages end.
        before = [0, 0] if options.start_from else [options.continuous_steps, options.quantized_steps]
        self.stages = list(itertools.accumulate([*before, options.decoder_steps]))
        self.claim()
        self.speech = Speech.prepare(options.data, self.work)
        self.teacher = None
        if options.start_from is None:
            self.teacher = Teacher.prepare(self.speech, options.clusters, self.work, options.seed)
        self.record.write_text(json.dumps(self.mine, indent=2) + "\n")
        self.autoencoder = Autoencoder(model, options.clusters).train()
        if options.start_from is None:
            batch, _ = draw_batch(self.speech, self.teacher, options, 0)
            scale_weights(self.autoencoder, batch)
        if self.device.type == "cpu" and options.precision == "bfloat16":
            for name in keep_in_float32(self.autoencoder.model):
                print(f"kept in float32, as bfloat16 is wrong on this CPU: {name}")
        self.discriminators = Discriminators()
        self.autoencoder.to(self.device)
        self.discriminators.to(self.device)
        self.parameters = [*self.autoencoder.encoder_parameters(), *self.autoencoder.decoder_parameters()]
        matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters if parameter.ndim == 1]
        # (optimizer, its share of the learning rate)
        self.optimizers = [(Muon(matrices), 1.0), (torch.optim.AdamW(vectors, betas=(0.9, 0.98)), 0.15)]
        self.judge = torch.optim.AdamW(self.discriminators.parameters(), 5e-4, (0.8, 0.98))
        # Latents seen lately, for the next fit of the codebooks.
        self.seen: list[torch.Tensor] = []
        self.step = 0
        self.shown: dict[str, float] = {}

    def claim(self) -> None:
        """Look whether work and output folder are this run's, or free. The work folder is taken once the data are read.

        Raises:
            UserError: they belong to a run with other options, or cannot be written to.
        """
        ignored = ("output", "work", "threads", "device", "checkpoint_every")
        mine = {name: value for name, value in asdict(self.options).items() if name not in ignored}
        self.mine = json.loads(json.dumps(mine, default=str))
        self.record = self.work / "options.json"
        if self.record.exists():
            other = json.loads(self.record.read_text())
            different = [name for name in self.mine if other.get(name) != self.mine[name]]
            if different:
                raise UserError(
                    f"{self.work}: it holds a run with other {', '.join(different)}; delete it or give another --work."
                )
        elif (self.options.output / "model.safetensors").exists():
            raise UserError(f"{self.options.output}: it holds another codec; delete it or give another --output.")
        for folder in (self.work, self.options.output):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: the folder cannot be made ({error.strerror}).") from None

    # -- state

    def save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "autoencoder": self.autoencoder.state_dict(),
            "discriminators": self.discriminators.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "judge": self.judge.state_dict(),
            "seen": self.seen,
        }
        partial = self.work / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.work / "checkpoint.pt")

    def load_checkpoint(self) -> None:
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.autoencoder.load_state_dict(state["autoencoder"])
        for half in self.autoencoder._halves:
            for layer in half.layers:
                layer.codebook._embed = None
        self.discriminators.load_state_dict(state["discriminators"])
        for (optimizer, _), stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.judge.load_state_dict(state["judge"])
        self.seen, self.step = [part.to(self.device) for part in state["seen"]], state["step"]
        print(f"going on from step {self.step}")

    # -- steps

    def run(self) -> None:
        """Train to the end and save the codec; what was done before is not done again."""
        self.load_checkpoint()
        print(f"{len(self.speech):,} clips, {self.speech.hours:.2f} hours; {self.count():,} values in the codec")
        started = time.monotonic()
        bar = tqdm(total=self.stages[2], initial=self.step, desc="codec", mininterval=10)
        while self.step < self.stages[2]:
            digest = hashlib.sha256(f"{self.options.seed} {self.step}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            self.set_learning_rate()
            waveform, labels = draw_batch(self.speech, self.teacher, self.options, self.step)
            waveform, labels = waveform.to(self.device), labels.to(self.device)
            if self.step < self.stages[1]:
                figures = self.train_both(waveform, labels)
            else:
                if self.step == self.stages[1]:
                    self.finish_encoder()
                figures = self.train_decoder(waveform)
            self.step += 1
            bar.update()
            self.show(bar, figures)
            if self.step % self.options.checkpoint_every == 0 or self.step == self.stages[2]:
                self.save_checkpoint()
                if self.step > self.stages[1]:  # codes are final
                    save_codec(self.autoencoder.model, self.options.output)
                with open(self.work / "log.jsonl", "a") as log:
                    log.write(json.dumps({"step": self.step, **self.shown}) + "\n")
        bar.close()
        save_codec(self.autoencoder.model, self.options.output)
        size = (self.options.output / "model.safetensors").stat().st_size / 1e6
        print(f"{self.options.output}: {size:.2f} MB, after {(time.monotonic() - started) / 60:.0f} minutes")

    def count(self) -> int:
        model = self.autoencoder.model
        return sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())

    def set_learning_rate(self) -> None:
        """Linear warm-up over 50 steps and linear decay to a twentieth, over stages 1 and 2 and again over stage 3."""
        last = self.step >= self.stages[1]
        start, end = (self.stages[1], self.stages[2]) if last else (0, self.stages[1])
        share = (self.step - start) / max(1, end - start)
        factor = min((self.step - start + 1) / 50, 1.0) * (1 - 0.95 * share) * (0.5 if last else 1.0)
        for optimizer, part in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate * part * factor

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def train_both(self, waveform: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """A step of stage 1 or 2."""
        quantized = self.step >= self.stages[0]
        if quantized and (self.step - self.stages[0]) % self.options.refit_every == 0:
            first = self.step == self.stages[0]
            self.autoencoder.fit_codebooks(torch.cat(self.seen, 1), self.step, 20 if first else 5, anew=first)
        with self.autocast():
            latents = self.autoencoder.encode(waveform)
        # Semantic and acoustic latents, [2, rows, codebook_dim, frames].
        both = torch.stack([part.float() for part in latents])
        self.remember(both)
        if quantized:
            entries = torch.stack(self.autoencoder.quantize(both[0], both[1], self.draw_quantizers(len(waveform))))
            # Straight-through: the gradient of what is decoded is that of the latent.
            passed = both + (entries - both).detach()
            commitment = 2 * (both - entries).square().mean()
        else:
            levels = torch.empty(len(waveform), 1, 1, device=waveform.device).uniform_(0.05, 0.6)
            passed = both + levels * torch.stack([torch.randn_like(both[0]), torch.randn_like(both[1])])
            commitment = torch.zeros((), device=waveform.device)
        with self.autocast():
            made = self.autoencoder.decode(passed[0], passed[1])
            semantic_loss = self.autoencoder.semantic_loss(passed[0], labels)
        # Latents keep mean 0 and variance 1, which the noise and the commitment are measured against.
        means, deviations = both.mean((1, 3)), both.std((1, 3))
        spread = 2 * (means.square().mean() + (deviations + 1e-4).log().square().mean())
        spectral = spectral_loss(made, waveform)
        loss = 5 * spectral + self.options.semantic_weight * semantic_loss + 0.25 * commitment + 0.1 * spread
        self.descend(loss, [optimizer for optimizer, _ in self.optimizers], self.parameters)
        return {"spectral": spectral, "semantic": semantic_loss, "commitment": commitment}

    def remember(self, latents: torch.Tensor) -> None:
        """Keep the latents [2, rows, codebook_dim, frames] of the last steps, up to 60,000 frames."""
        self.seen.append(latents.detach().transpose(2, 3).flatten(1, 2))
        limit = max(1, 60_000 // (self.options.rows * self.options.frames))
        self.seen = self.seen[-limit:]

    def draw_quantizers(self, rows: int) -> torch.Tensor:
        """How many codebooks each row uses: all 8 for half of them, 4 for a quarter, 1 to 7 for the rest."""
        draw = torch.rand(rows)
        some = torch.randint(1, 8, (rows,))
        return torch.where(draw < 0.5, 8, torch.where(draw < 0.75, 4, some)).to(self.device)

    @torch.no_grad()
    def finish_encoder(self) -> None:
        """Make the encoder final and fit the codebooks to it for the last time, on whole clips, in float32."""
        round_to_half(self.autoencoder.encoder_parameters())
        self.autoencoder.eval()
        last = range(self.speech.firsts[-1], len(self.speech))
        common = self.options.common_entries
        whole = min(common) == CODEBOOK_SIZE
        most = FITTED_FRAMES if whole else COMMON_FRAMES
        own, other = self.latents_of(last, most), self.latents_of(range(last.start), most)
        directions = self.speaker_directions
        if 0 < directions < len(own) + len(other):
            kept = without_speaker([clip[0] for clip in own + other], directions)
            projection = self.autoencoder._halves[0].input_proj.weight
            projection.copy_((kept @ projection[:, :, 0]).half().float()[:, :, None])
            own, other = ([torch.stack([clip[0] @ kept.T, clip[1]]) for clip in clips] for clips in (own, other))
        # Of no clips: [2, 0, codebook_dim].
        none = own[0][:, :0]
        if whole:
            anew = self.options.start_from is not None
            self.autoencoder.fit_codebooks(torch.cat([*own, *other], 1), self.step, 30, anew)
        else:
            self.autoencoder.fit_common_and_rare(
                torch.cat(own, 1), torch.cat([none, *other], 1), common, self.options.rare_entries, self.step
            )
        self.autoencoder.train()
        self.seen = []

    @torch.no_grad()
    def latents_of(self, clips: range, most: int) -> list[torch.Tensor]:
        """Latents [2, frames, codebook_dim] of whole clips (of 30 s at most), in random order, up to `most` frames."""
        order = np.random.default_rng(self.options.seed).permutation(clips)
        found: list[torch.Tensor] = []
        frames = 0
        for number in tqdm(order, "latents", mininterval=5):
            clip = self.speech.clip(int(number), 0, 30 * SAMPLE_RATE).to(self.device)
            with no_tf32(self.device):
                semantic, acoustic = self.autoencoder.encode(clip[None])
            found.append(torch.stack([semantic[0].T, acoustic[0].T]))
            frames += found[-1].shape[1]
            if frames >= most:
                break
        return found

    def train_decoder(self, waveform: torch.Tensor) -> dict[str, torch.Tensor]:
        """A step of stage 3."""
        parameters = self.autoencoder.decoder_parameters()
        with torch.no_grad():
            with no_tf32(self.device):
                latents = self.autoencoder.encode(waveform)
            entries = self.autoencoder.quantize(*latents, self.draw_quantizers(len(waveform)))
        with self.autocast():
            made = self.autoencoder.decode(*entries)
        spectral = spectral_loss(made, waveform)
        figures = {"spectral": spectral}
        loss = 5 * spectral
        if self.step - self.stages[1] >= self.options.adversarial_from:
            doubt = self.discriminators.loss(made.detach(), waveform)
            self.descend(doubt, [self.judge], list(self.discriminators.parameters()))
            fooled, matched = self.discriminators.judge(made, waveform)
            loss = loss + self.options.adversarial_weight * (fooled + 4 * matched)
            figures |= {"discriminator": doubt, "fooled": fooled, "matched": matched}
        self.descend(loss, [optimizer for optimizer, _ in self.optimizers], parameters)
        return figures

    def descend(self, loss: torch.Tensor, optimizers: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        """One step of these optimizers, for these parameters.

        Raises:
            UserError: the loss is not finite.
        """
        if not loss.isfinite():
            raise UserError(f"training diverged at step {self.step}: lower --learning_rate or use float32.")
        for parameter in (*self.parameters, *self.discriminators.parameters()):
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()

    def show(self, bar: Any, figures: dict[str, torch.Tensor]) -> None:
        """Running means of the losses, beside the bar."""
        for name, value in figures.items():
            value = float(value.detach())
            self.shown[name] = 0.98 * self.shown.get(name, value) + 0.02 * value
        self.shown = {name: value for name, value in self.shown.items() if name in figures}
        bar.set_postfix({name: f"{value:.3f}" for name, value in self.shown.items()}, refresh=False)


def save_codec(model: Any, folder: Path) -> None:
    """The folder that MimiModel.from_pretrained of any version loads: weights in float16, to be run in float32."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()}
    weights = published_names(weights)
    partial = folder / "model.safetensors.partial"
    partial.write_bytes(save(weights, metadata={"format": "pt"}))  # with the permissions of other files
    os.replace(partial, folder / "model.safetensors")
    config = {**model.config.to_diff_dict(), "architectures": ["MimiModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    extractor = {
        "chunk_length_s": None,
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": 1,
        "overlap": None,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor, indent=2) + "\n")


def main(options: Options) -> None:
    """Train the codec.

    Raises:
        UserError: an option does not fit, the data cannot be used, or training diverged.
    """
    counts = ("rows", "frames", "continuous_steps", "quantized_steps", "decoder_steps", "num_filters", "hidden_size")
    for name in (*counts, "codebook_dim", "refit_every", "checkpoint_every", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1.")
    if not 2 <= options.clusters < 2**15:
        raise UserError(f"--clusters must be from 2 to {2**15 - 1}, not {options.clusters}.")
    if len(options.common_entries) != QUANTIZERS or not all(1 <= n <= CODEBOOK_SIZE for n in options.common_entries):
        raise UserError(f"--common_entries needs 8 numbers from 1 to {CODEBOOK_SIZE}, not {options.common_entries}.")
    if not 0 <= options.rare_entries <= CODEBOOK_SIZE:
        raise UserError(f"--rare_entries must be from 0 to {CODEBOOK_SIZE}, not {options.rare_entries}.")
    if options.start_from is not None:
        default = {field.name: field.default for field in fields(Options)}
        given = [name for name in FROM_SCRATCH if getattr(options, name) != default[name]]
        if given:
            raise UserError(f"--{', --'.join(given)}: not with --start_from, whose codec has its own.")
    if options.precision not in ("bfloat16", "float32"):
        raise UserError(f"--precision must be bfloat16 or float32, not {options.precision!r}.")
    tune_malloc()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal activations slow a CPU several times
    Training(options).run()


def command() -> None:
    import tyro

    main(tyro.cli(Options, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    run_command(command)
