"""The training of a codec, from top to bottom."""

import hashlib
import time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from torchtitan.audio.codec import no_tf32
from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.checkpoint.speech_lm import choose_device
from torchtitan.codec_training.autoencoder import (
    Autoencoder,
    keep_in_float32,
    new_model,
    round_to_half,
    save_codec,
    scale_weights,
)
from torchtitan.codec_training.codebooks import fit_codebooks, fit_common_and_rare, without_speaker
from torchtitan.codec_training.data import Speech, draw_batch, teacher_labels
from torchtitan.codec_training.optimizer import Optimizers, Schedule
from torchtitan.codec_training.options import Options, check
from torchtitan.codec_training.spectra import Discriminators, spectral_loss
from torchtitan.codec_training.work_folder import WorkFolder
from torchtitan.tools.errors import UserError
from torchtitan.tools.memory import tune_malloc

SPEAKER_DIRECTIONS = 3  # removed from the latents of a codec trained from scratch, unless the options say otherwise
SMOOTHING = 0.98  # share of the old value in the running means of the losses
SEEN_FRAMES = 60_000  # frames of the last steps that the codebooks are fitted to in stage 2
FIRST_ROUNDS, LATER_ROUNDS, FINAL_ROUNDS = 20, 5, 30
"""Rounds of k-means in the first and in the later fits of stage 2, and in the fit before stage 3."""
LEAST_NOISE, MOST_NOISE = 0.05, 0.6
"""Bounds of the deviation of the noise in stage 1, drawn for each row; latents have deviation 1."""
SPECTRAL_WEIGHT, COMMITMENT_WEIGHT, SPREAD_WEIGHT, MATCHED_WEIGHT = 5, 0.25, 0.1, 4
"""Weights of losses that have no option."""
FITTED_FRAMES, COMMON_FRAMES = 100_000, 30_000
"""Frames of each data set in the last fit, without and with rare entries: a rare entry takes a pass over all frames."""
LONGEST_SECONDS = 30  # of a clip in the last fit

Losses = dict[str, torch.Tensor]


class CodecTrainer:
    """Trains a codec in three stages. Randomness depends on seed and step alone, so that a run can be resumed exactly.

    Attributes:
        seen: latents [2, rows * frames, codebook_dim] of each of the last steps, for the next fit of the codebooks.

    Raises:
        UserError: an option does not fit, or the data cannot be used.
    """

    def __init__(self, options: Options):
        self.options = options
        # Errors in options show before anything is decoded or written.
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = choose_device(found if options.device == "auto" else options.device)
        torch.manual_seed(options.seed)
        model = new_model(options)
        from_scratch, dim = options.start_from is None, model.config.codebook_dim
        default = SPEAKER_DIRECTIONS if from_scratch else 0
        self.speaker_directions = default if options.speaker_directions is None else options.speaker_directions
        if not 0 <= self.speaker_directions < dim:
            raise UserError(f"--speaker_directions must be from 0 to {dim - 1}, the codebook_dim less one.")
        self.schedule = Schedule(options)
        self.folder = WorkFolder(options)
        self.speech = Speech.prepare(options.data, self.folder.path)
        self.labels = None
        if from_scratch:
            self.labels = teacher_labels(self.speech, options.clusters, self.folder.path, options.seed)
        self.folder.record_options()
        self.autoencoder = Autoencoder(model, options.clusters).train()
        if from_scratch:
            scale_weights(self.autoencoder, draw_batch(self.speech, self.labels, options, 0)[0])
        if self.device.type == "cpu" and options.precision == "bfloat16":
            for name in keep_in_float32(model):
                print(f"kept in float32, as bfloat16 is wrong on this CPU: {name}")
        self.discriminators = Discriminators().to(self.device)
        self.autoencoder.to(self.device)
        self.optimizers = Optimizers(self.autoencoder, self.discriminators, options.learning_rate)
        self.seen: list[torch.Tensor] = []
        self.step = 0
        self.shown: dict[str, float] = {}

    def run(self) -> None:
        """Train to the end, from the last checkpoint on, and save the codec."""
        self.load_checkpoint()
        model, end = self.autoencoder.model, self.schedule.end
        values = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
        print(f"{len(self.speech):,} clips, {self.speech.hours:.2f} hours; {values:,} values in the codec")
        started = time.monotonic()
        bar = tqdm(total=end, initial=self.step, desc="codec", mininterval=10)
        while self.step < end:
            losses = self.train_step()
            self.step += 1
            bar.update()
            self.show(bar, losses)
            if self.step % self.options.checkpoint_every == 0 or self.step == end:
                self.save_checkpoint()
                if self.step > self.schedule.decoder:  # codes are final
                    save_codec(model, self.options.output)
                self.folder.log({"step": self.step, **self.shown})
        bar.close()
        save_codec(model, self.options.output)
        size = (self.options.output / "model.safetensors").stat().st_size / 1e6
        print(f"{self.options.output}: {size:.2f} MB, after {(time.monotonic() - started) / 60:.0f} minutes")

    def train_step(self) -> Losses:
        """A step of the stage whose turn it is."""
        digest = hashlib.sha256(f"{self.options.seed} {self.step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        self.optimizers.set_learning_rate(self.schedule.learning_rate(self.step))
        batch = draw_batch(self.speech, self.labels, self.options, self.step)
        waveform, labels = (part.to(self.device) for part in batch)
        if self.step < self.schedule.decoder:
            return self.train_whole(waveform, labels)
        if self.step == self.schedule.decoder:
            self.finish_encoder()
        return self.train_decoder(waveform)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def train_whole(self, waveform: torch.Tensor, labels: torch.Tensor) -> Losses:
        """A step of stage 1 (without codebooks) or 2 (with them): encoder and decoder learn together.

        Args:
            waveform: [rows, samples].
            labels: the teacher's clusters, int64 [rows, 4 * frames], -1 for none.
        """
        steps_with_codebooks = self.step - self.schedule.quantized
        if steps_with_codebooks >= 0 and steps_with_codebooks % self.options.refit_every == 0:
            first = steps_with_codebooks == 0
            rounds = FIRST_ROUNDS if first else LATER_ROUNDS
            fit_codebooks(self.autoencoder.halves, torch.cat(self.seen, 1), self.step, rounds, anew=first)
        with self.autocast():
            latents = self.autoencoder.encode(waveform)
        # Semantic and acoustic latents, [2, rows, codebook_dim, frames].
        both = torch.stack([part.float() for part in latents])
        kept_steps = max(1, SEEN_FRAMES // (self.options.rows * self.options.frames))
        self.seen = [*self.seen, both.detach().transpose(2, 3).flatten(1, 2)][-kept_steps:]
        if steps_with_codebooks >= 0:
            quantizers = draw_quantizers(len(waveform), self.device)
            entries = torch.stack(self.autoencoder.quantize(both[0], both[1], quantizers))
            # Straight-through: the latents get the gradients of the entries.
            passed = both + (entries - both).detach()
            commitment = 2 * (both - entries).square().mean()
        else:
            levels = torch.empty(len(waveform), 1, 1, device=self.device).uniform_(LEAST_NOISE, MOST_NOISE)
            passed = both + levels * torch.stack([torch.randn_like(both[0]), torch.randn_like(both[1])])
            commitment = torch.zeros((), device=self.device)
        with self.autocast():
            made = self.autoencoder.decode(passed[0], passed[1])
            semantic = self.autoencoder.semantic_loss(passed[0], labels)
        # Latents keep mean 0 and variance 1, which the noise and the commitment are measured against.
        means, deviations = both.mean((1, 3)), both.std((1, 3))
        spread = 2 * (means.square().mean() + (deviations + 1e-4).log().square().mean())
        spectral = spectral_loss(made, waveform)
        loss = SPECTRAL_WEIGHT * spectral + self.options.semantic_weight * semantic
        loss = loss + COMMITMENT_WEIGHT * commitment + SPREAD_WEIGHT * spread
        self.optimizers.descend(loss, self.optimizers.parameters, self.step)
        return {"spectral": spectral, "semantic": semantic, "commitment": commitment}

    @torch.no_grad()
    def finish_encoder(self) -> None:
        """Make the encoder final, and fit the codebooks for the last time, on whole clips, in float32."""
        halves, common = self.autoencoder.halves, self.options.common_entries
        round_to_half(self.autoencoder.encoder_parameters())
        self.autoencoder.eval()
        own_clips = range(self.speech.firsts[-1], len(self.speech))  # the last data set is the target domain
        whole = min(common) == CODEBOOK_SIZE
        most = FITTED_FRAMES if whole else COMMON_FRAMES
        own, other = (self.latents_of(clips, most) for clips in (own_clips, range(own_clips.start)))
        if 0 < self.speaker_directions < len(own) + len(other):
            kept = without_speaker([clip[0] for clip in own + other], self.speaker_directions)
            projection = halves[0].input_proj.weight
            projection.copy_((kept @ projection[:, :, 0]).half().float()[:, :, None])
            own, other = ([torch.stack([clip[0] @ kept.T, clip[1]]) for clip in clips] for clips in (own, other))
        if whole:
            fit_codebooks(halves, torch.cat([*own, *other], 1), self.step, FINAL_ROUNDS, self.labels is None)
        else:
            spare = torch.cat([own[0][:, :0], *other], 1)  # [2, 0, codebook_dim] without other clips
            fit_common_and_rare(halves, torch.cat(own, 1), spare, common, self.options.rare_entries, self.step)
        self.autoencoder.train()
        self.seen = []

    def latents_of(self, clips: range, most: int) -> list[torch.Tensor]:
        """Latents [2, frames, codebook_dim] of whole clips (of 30 s at most), in random order, up to `most` frames."""
        found: list[torch.Tensor] = []
        for number in tqdm(np.random.default_rng(self.options.seed).permutation(clips), "latents", mininterval=5):
            clip = self.speech.clip(int(number), 0, LONGEST_SECONDS * SAMPLE_RATE).to(self.device)
            with no_tf32(self.device):
                semantic, acoustic = self.autoencoder.encode(clip[None])
            found.append(torch.stack([semantic[0].T, acoustic[0].T]))
            if sum(latents.shape[1] for latents in found) >= most:
                break
        return found

    def train_decoder(self, waveform: torch.Tensor) -> Losses:
        """A step of stage 3: the decoder learns to speak the final codes. `waveform` is [rows, samples]."""
        with torch.no_grad():
            with no_tf32(self.device):
                latents = self.autoencoder.encode(waveform)
            entries = self.autoencoder.quantize(*latents, draw_quantizers(len(waveform), self.device))
        with self.autocast():
            made = self.autoencoder.decode(*entries)
        spectral = spectral_loss(made, waveform)
        losses = {"spectral": spectral}
        loss = SPECTRAL_WEIGHT * spectral
        if self.step - self.schedule.decoder >= self.options.adversarial_from:
            doubt = self.discriminators.loss(made.detach(), waveform)
            self.optimizers.descend(doubt, self.optimizers.judge_parameters, self.step)
            fooled, matched = self.discriminators.judge(made, waveform)
            loss = loss + self.options.adversarial_weight * (fooled + MATCHED_WEIGHT * matched)
            losses |= {"discriminator": doubt, "fooled": fooled, "matched": matched}
        self.optimizers.descend(loss, self.autoencoder.decoder_parameters(), self.step)
        return losses

    def show(self, bar: Any, losses: Losses) -> None:
        """Running means of the losses, beside the bar."""
        values = {name: float(value.detach()) for name, value in losses.items()}
        self.shown = {n: SMOOTHING * self.shown.get(n, v) + (1 - SMOOTHING) * v for n, v in values.items()}
        bar.set_postfix({name: f"{value:.3f}" for name, value in self.shown.items()}, refresh=False)

    def save_checkpoint(self) -> None:
        modules = {"autoencoder": self.autoencoder.state_dict(), "discriminators": self.discriminators.state_dict()}
        self.folder.save({"step": self.step, **modules, **self.optimizers.state_dict(), "seen": self.seen})

    def load_checkpoint(self) -> None:
        state = self.folder.load()
        if state is None:
            return
        self.autoencoder.load_state_dict(state["autoencoder"])
        for half in self.autoencoder.halves:
            for layer in half.layers:
                layer.codebook._embed = None
        self.discriminators.load_state_dict(state["discriminators"])
        self.optimizers.load_state_dict(state)
        self.seen, self.step = [part.to(self.device) for part in state["seen"]], state["step"]
        print(f"going on from step {self.step}")


def draw_quantizers(rows: int, device: torch.device) -> torch.Tensor:
    """How many codebooks each row uses: all 8 for half of them, 4 for a quarter, 1 to 7 for the rest. int64 [rows]."""
    draw = torch.rand(rows)
    some = torch.randint(1, 8, (rows,))
    return torch.where(draw < 0.5, 8, torch.where(draw < 0.75, 4, some)).to(device)


def train(options: Options) -> None:
    """Train the codec.

    Raises:
        UserError: an option does not fit, the data cannot be used, or training diverged.
    """
    check(options)
    tune_malloc()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal activations slow a CPU several times
    CodecTrainer(options).run()
