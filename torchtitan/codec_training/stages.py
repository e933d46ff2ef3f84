"""What a step of each stage does, and how encoder and codebooks become final before the third."""

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from torchtitan.audio.codec import no_tf32
from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.codec_training.autoencoder import Autoencoder, round_to_half
from torchtitan.codec_training.codebooks import fit_codebooks, fit_common_and_rare, without_speaker
from torchtitan.codec_training.data import Speech
from torchtitan.codec_training.optimizer import Optimizers, Schedule
from torchtitan.codec_training.options import Options
from torchtitan.codec_training.spectra import Discriminators, spectral_loss

SEEN_FRAMES = 60_000  # frames of the last steps that the codebooks are fitted to in stage 2
FIRST_ROUNDS, LATER_ROUNDS = 20, 5  # rounds of k-means in the first and in each later of these fits
LEAST_NOISE, MOST_NOISE = 0.05, 0.6
"""Deviation of the noise that latents carry in stage 1, drawn for each row; latents have deviation 1."""
SPECTRAL_WEIGHT, COMMITMENT_WEIGHT, SPREAD_WEIGHT, MATCHED_WEIGHT = 5, 0.25, 0.1, 4
"""Of the losses' parts; the options have the weights of the other parts."""
FITTED_FRAMES, COMMON_FRAMES = 100_000, 30_000
"""Frames of each data set that the last fit looks at; fewer where some entries are at rare latents, since finding those
takes a pass over the frames for each entry."""
LONGEST_SECONDS = 30  # of a clip
FINAL_ROUNDS = 30  # rounds of k-means in the last fit


def autocast(device: torch.device, precision: str) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def draw_quantizers(rows: int, device: torch.device) -> torch.Tensor:
    """How many codebooks each row uses: all 8 for half of them, 4 for a quarter, 1 to 7 for the rest. int64 [rows]."""
    draw = torch.rand(rows)
    some = torch.randint(1, 8, (rows,))
    return torch.where(draw < 0.5, 8, torch.where(draw < 0.75, 4, some)).to(device)


class Stages:
    """What the three stages share, and a step of each.

    Attributes:
        seen: latents [2, rows * frames, codebook_dim] of each of the last steps, for the next fit of the codebooks.
    """

    def __init__(self, autoencoder: Autoencoder, discriminators: Discriminators, schedule: Schedule, options: Options):
        self.autoencoder, self.discriminators = autoencoder, discriminators
        self.optimizers = Optimizers(autoencoder, discriminators, options.learning_rate)
        self.schedule, self.options = schedule, options
        self.seen: list[torch.Tensor] = []

    def train_whole(self, step: int, waveform: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """A step of stage 1 or 2: encoder and decoder learn together, before and after there are codebooks.

        Args:
            waveform: [rows, samples].
            labels: the teacher's clusters, int64 [rows, 4 * frames], -1 for none.
        """
        quantized = step >= self.schedule.quantized
        if quantized and (step - self.schedule.quantized) % self.options.refit_every == 0:
            first = step == self.schedule.quantized
            rounds = FIRST_ROUNDS if first else LATER_ROUNDS
            fit_codebooks(self.autoencoder.halves, torch.cat(self.seen, 1), step, rounds, anew=first)
        with autocast(waveform.device, self.options.precision):
            latents = self.autoencoder.encode(waveform)
        # Semantic and acoustic latents, [2, rows, codebook_dim, frames].
        both = torch.stack([part.float() for part in latents])
        self._remember(both)
        if quantized:
            quantizers = draw_quantizers(len(waveform), waveform.device)
            entries = torch.stack(self.autoencoder.quantize(both[0], both[1], quantizers))
            # Straight-through: the gradient of what is decoded is that of the latent.
            passed = both + (entries - both).detach()
            commitment = 2 * (both - entries).square().mean()
        else:
            levels = torch.empty(len(waveform), 1, 1, device=waveform.device).uniform_(LEAST_NOISE, MOST_NOISE)
            passed = both + levels * torch.stack([torch.randn_like(both[0]), torch.randn_like(both[1])])
            commitment = torch.zeros((), device=waveform.device)
        with autocast(waveform.device, self.options.precision):
            made = self.autoencoder.decode(passed[0], passed[1])
            semantic = self.autoencoder.semantic_loss(passed[0], labels)
        # Latents keep mean 0 and variance 1, which the noise and the commitment are measured against.
        means, deviations = both.mean((1, 3)), both.std((1, 3))
        spread = 2 * (means.square().mean() + (deviations + 1e-4).log().square().mean())
        spectral = spectral_loss(made, waveform)
        loss = SPECTRAL_WEIGHT * spectral + self.options.semantic_weight * semantic
        loss = loss + COMMITMENT_WEIGHT * commitment + SPREAD_WEIGHT * spread
        self.optimizers.descend(loss, self.optimizers.parameters, step)
        return {"spectral": spectral, "semantic": semantic, "commitment": commitment}

    def _remember(self, latents: torch.Tensor) -> None:
        """Keep the latents [2, rows, codebook_dim, frames] of the last steps."""
        self.seen.append(latents.detach().transpose(2, 3).flatten(1, 2))
        limit = max(1, SEEN_FRAMES // (self.options.rows * self.options.frames))
        self.seen = self.seen[-limit:]

    def train_decoder(self, step: int, waveform: torch.Tensor) -> dict[str, torch.Tensor]:
        """A step of stage 3: the decoder learns to speak the final codes. `waveform` is [rows, samples]."""
        with torch.no_grad():
            with no_tf32(waveform.device):
                latents = self.autoencoder.encode(waveform)
            entries = self.autoencoder.quantize(*latents, draw_quantizers(len(waveform), waveform.device))
        with autocast(waveform.device, self.options.precision):
            made = self.autoencoder.decode(*entries)
        spectral = spectral_loss(made, waveform)
        losses = {"spectral": spectral}
        loss = SPECTRAL_WEIGHT * spectral
        if step - self.schedule.decoder >= self.options.adversarial_from:
            doubt = self.discriminators.loss(made.detach(), waveform)
            self.optimizers.descend(doubt, self.optimizers.judge_parameters, step)
            fooled, matched = self.discriminators.judge(made, waveform)
            loss = loss + self.options.adversarial_weight * (fooled + MATCHED_WEIGHT * matched)
            losses |= {"discriminator": doubt, "fooled": fooled, "matched": matched}
        self.optimizers.descend(loss, self.autoencoder.decoder_parameters(), step)
        return losses


@torch.no_grad()
def finish_encoder(autoencoder: Autoencoder, speech: Speech, options: Options, directions: int, step: int) -> None:
    """Make the encoder final and fit the codebooks to it for the last time, on whole clips, in float32.

    Args:
        directions: of the speaker, that are taken out of the semantic latents.
        step: the seed of the fit.
    """
    round_to_half(autoencoder.encoder_parameters())
    autoencoder.eval()
    last = range(speech.firsts[-1], len(speech))
    common = options.common_entries
    whole = min(common) == CODEBOOK_SIZE
    most = FITTED_FRAMES if whole else COMMON_FRAMES
    own, other = (latents_of(autoencoder, speech, clips, most, options.seed) for clips in (last, range(last.start)))
    if 0 < directions < len(own) + len(other):
        kept = without_speaker([clip[0] for clip in own + other], directions)
        projection = autoencoder.halves[0].input_proj.weight
        projection.copy_((kept @ projection[:, :, 0]).half().float()[:, :, None])
        own, other = ([torch.stack([clip[0] @ kept.T, clip[1]]) for clip in clips] for clips in (own, other))
    if whole:
        anew = options.start_from is not None
        fit_codebooks(autoencoder.halves, torch.cat([*own, *other], 1), step, FINAL_ROUNDS, anew)
    else:
        # Of no clips: [2, 0, codebook_dim].
        none = own[0][:, :0]
        spare = torch.cat([none, *other], 1)
        fit_common_and_rare(autoencoder.halves, torch.cat(own, 1), spare, common, options.rare_entries, step)
    autoencoder.train()


def latents_of(autoencoder: Autoencoder, speech: Speech, clips: range, most: int, seed: int) -> list[torch.Tensor]:
    """Latents [2, frames, codebook_dim] of whole clips (of 30 s at most), in random order, up to `most` frames."""
    device = autoencoder.head.weight.device
    order = np.random.default_rng(seed).permutation(clips)
    found: list[torch.Tensor] = []
    frames = 0
    for number in tqdm(order, "latents", mininterval=5):
        clip = speech.clip(int(number), 0, LONGEST_SECONDS * SAMPLE_RATE).to(device)
        with no_tf32(device):
            semantic, acoustic = autoencoder.encode(clip[None])
        found.append(torch.stack([semantic[0].T, acoustic[0].T]))
        frames += found[-1].shape[1]
        if frames >= most:
            break
    return found
