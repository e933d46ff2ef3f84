"""What a step of each stage does, and what is done between the second and the third."""

from typing import Any

import torch

from torchtitan.audio.codec import no_tf32
from torchtitan.codec_training.autoencoder import Autoencoder
from torchtitan.codec_training.codebooks import fit_codebooks
from torchtitan.codec_training.losses import Discriminators, spectral_loss
from torchtitan.codec_training.optimizer import Optimizers
from torchtitan.codec_training.options import Options
from torchtitan.codec_training.schedule import Schedule

SEEN_FRAMES = 60_000
"""Frames of the last steps that the codebooks are fitted to in stage 2."""
FIRST_ROUNDS, LATER_ROUNDS = 20, 5
"""Rounds of k-means in the first and in each later of these fits."""
LEAST_NOISE, MOST_NOISE = 0.05, 0.6
"""Deviation of the noise that latents carry in stage 1, drawn for each row; latents have deviation 1."""
SPECTRAL_WEIGHT, COMMITMENT_WEIGHT, SPREAD_WEIGHT, MATCHED_WEIGHT = 5, 0.25, 0.1, 4
"""Of the losses' parts; the options have the weights of the other parts."""

Losses = dict[str, torch.Tensor]


def autocast(device: torch.device, precision: str) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def draw_quantizers(rows: int, device: torch.device) -> torch.Tensor:
    """How many codebooks each row uses: all 8 for half of them, 4 for a quarter, 1 to 7 for the rest. int64 [rows]."""
    draw = torch.rand(rows)
    some = torch.randint(1, 8, (rows,))
    return torch.where(draw < 0.5, 8, torch.where(draw < 0.75, 4, some)).to(device)


class WholeCodec:
    """Stages 1 and 2: encoder and decoder learn together, before and after there are codebooks.

    Attributes:
        seen: latents [2, rows * frames, codebook_dim] of each of the last steps, for the next fit of the codebooks.
    """

    def __init__(self, autoencoder: Autoencoder, optimizers: Optimizers, schedule: Schedule, options: Options):
        self.autoencoder, self.optimizers, self.schedule, self.options = autoencoder, optimizers, schedule, options
        self.seen: list[torch.Tensor] = []

    def train(self, step: int, waveform: torch.Tensor, labels: torch.Tensor) -> Losses:
        """One step.

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
        self.optimizers.improve_codec(loss, self.optimizers.parameters, step)
        return {"spectral": spectral, "semantic": semantic, "commitment": commitment}

    def _remember(self, latents: torch.Tensor) -> None:
        """Keep the latents [2, rows, codebook_dim, frames] of the last steps."""
        self.seen.append(latents.detach().transpose(2, 3).flatten(1, 2))
        limit = max(1, SEEN_FRAMES // (self.options.rows * self.options.frames))
        self.seen = self.seen[-limit:]


class DecoderAlone:
    """Stage 3: the decoder learns to speak the final codes, at last before discriminators."""

    def __init__(
        self, autoencoder: Autoencoder, discriminators: Discriminators, optimizers: Optimizers, options: Options
    ):
        self.autoencoder, self.discriminators = autoencoder, discriminators
        self.optimizers, self.options = optimizers, options

    def train(self, step: int, waveform: torch.Tensor, adversarial: bool) -> Losses:
        """One step, for a waveform [rows, samples], with or without discriminators."""
        with torch.no_grad():
            with no_tf32(waveform.device):
                latents = self.autoencoder.encode(waveform)
            entries = self.autoencoder.quantize(*latents, draw_quantizers(len(waveform), waveform.device))
        with autocast(waveform.device, self.options.precision):
            made = self.autoencoder.decode(*entries)
        spectral = spectral_loss(made, waveform)
        losses = {"spectral": spectral}
        loss = SPECTRAL_WEIGHT * spectral
        if adversarial:
            doubt = self.discriminators.loss(made.detach(), waveform)
            self.optimizers.improve_judge(doubt, step)
            fooled, matched = self.discriminators.judge(made, waveform)
            loss = loss + self.options.adversarial_weight * (fooled + MATCHED_WEIGHT * matched)
            losses |= {"discriminator": doubt, "fooled": fooled, "matched": matched}
        self.optimizers.improve_codec(loss, self.autoencoder.decoder_parameters(), step)
        return losses
