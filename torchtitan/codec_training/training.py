"""The training of a codec, from top to bottom."""

import hashlib
import time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.codec_training.autoencoder import Autoencoder, new_model, scale_weights
from torchtitan.codec_training.export import save_codec
from torchtitan.codec_training.final_codes import finish_encoder
from torchtitan.codec_training.losses import Discriminators
from torchtitan.codec_training.optimizer import Optimizers
from torchtitan.codec_training.options import Options, check
from torchtitan.codec_training.precision import keep_in_float32
from torchtitan.codec_training.schedule import Schedule
from torchtitan.codec_training.speech import Speech
from torchtitan.codec_training.stages import DecoderAlone, WholeCodec
from torchtitan.codec_training.teacher import TEACHER_COLUMNS, TEACHER_HOP, Teacher
from torchtitan.codec_training.work_folder import WorkFolder
from torchtitan.models.speech_lm import choose_device
from torchtitan.tools.errors import UserError
from torchtitan.tools.memory import tune_malloc

SPEAKER_DIRECTIONS = 3
"""That are taken out of the latents of a codec trained from scratch, if the options do not say how many."""
GAINS_DB = (-8, 4)
"""Least and greatest gain of a stretch of speech."""
OLD_SHARE, NEW_SHARE = 0.98, 0.02
"""Of what a running mean was and of the new value."""


class Training:
    """The three stages. All that is random depends on seed and step, so on a CPU a resumed run is the same run.

    Raises:
        UserError: an option does not fit, or the data cannot be used.
    """

    def __init__(self, options: Options):
        self.options = options
        # What may be wrong is looked at before anything is decoded or written.
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = choose_device(found if options.device == "auto" else options.device)
        torch.manual_seed(options.seed)
        model = new_model(options)
        directions, dim = options.speaker_directions, model.config.codebook_dim
        default = 0 if options.start_from else SPEAKER_DIRECTIONS
        self.speaker_directions = default if directions is None else directions
        if not 0 <= self.speaker_directions < dim:
            raise UserError(f"--speaker_directions must be from 0 to {dim - 1}, the codebook_dim less one.")
        self.schedule = Schedule(options)
        self.folder = WorkFolder(options)
        self.speech = Speech.prepare(options.data, self.folder.path)
        self.teacher = None
        if options.start_from is None:
            self.teacher = Teacher.prepare(self.speech, options.clusters, self.folder.path, options.seed)
        self.folder.take()
        self.autoencoder = Autoencoder(model, options.clusters).train()
        if options.start_from is None:
            scale_weights(self.autoencoder, draw_batch(self.speech, self.teacher, options, 0)[0])
        if self.device.type == "cpu" and options.precision == "bfloat16":
            for name in keep_in_float32(model):
                print(f"kept in float32, as bfloat16 is wrong on this CPU: {name}")
        self.discriminators = Discriminators()
        self.autoencoder.to(self.device)
        self.discriminators.to(self.device)
        self.optimizers = Optimizers(self.autoencoder, self.discriminators, options.learning_rate)
        self.whole = WholeCodec(self.autoencoder, self.optimizers, self.schedule, options)
        self.decoder = DecoderAlone(self.autoencoder, self.discriminators, self.optimizers, options)
        self.step = 0
        self.shown: dict[str, float] = {}

    def run(self) -> None:
        """Train to the end and save the codec; what was done before is not done again."""
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

    def train_step(self) -> dict[str, torch.Tensor]:
        """The losses of a step of the stage whose turn it is."""
        digest = hashlib.sha256(f"{self.options.seed} {self.step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        self.optimizers.set_learning_rate(self.schedule.learning_rate(self.step))
        batch = draw_batch(self.speech, self.teacher, self.options, self.step)
        waveform, labels = (part.to(self.device) for part in batch)
        if self.step < self.schedule.decoder:
            return self.whole.train(self.step, waveform, labels)
        if self.step == self.schedule.decoder:
            finish_encoder(self.autoencoder, self.speech, self.options, self.speaker_directions, self.step)
            self.whole.seen = []
        adversarial = self.step - self.schedule.decoder >= self.options.adversarial_from
        return self.decoder.train(self.step, waveform, adversarial)

    def show(self, bar: Any, losses: dict[str, torch.Tensor]) -> None:
        """Running means of the losses, beside the bar."""
        for name, value in losses.items():
            value = float(value.detach())
            self.shown[name] = OLD_SHARE * self.shown.get(name, value) + NEW_SHARE * value
        self.shown = {name: value for name, value in self.shown.items() if name in losses}
        bar.set_postfix({name: f"{value:.3f}" for name, value in self.shown.items()}, refresh=False)

    def save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "autoencoder": self.autoencoder.state_dict(),
            "discriminators": self.discriminators.state_dict(),
            **self.optimizers.state_dict(),
            "seen": self.whole.seen,
        }
        self.folder.save(state)

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
        self.whole.seen, self.step = [part.to(self.device) for part in state["seen"]], state["step"]
        print(f"going on from step {self.step}")


def draw_batch(
    speech: Speech, teacher: Teacher | None, options: Options, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stretches of a step, which depend on the seed and the step alone.

    Returns:
        waveforms [rows, frames * 1920] with random gain, and the teacher's clusters [rows, frames * 4], -1 for none.
    """
    rng = np.random.default_rng((options.seed, step))
    length = options.frames * FRAME_SIZE
    waveforms, labels = (
        torch.zeros(options.rows, length),
        torch.full((options.rows, options.frames * TEACHER_COLUMNS), -1),
    )
    # Each sample of the data is as likely as any other.
    picks = rng.integers(speech.starts[-1], size=options.rows)
    for row, pick in enumerate(picks):
        number = int(np.searchsorted(speech.starts, pick, side="right")) - 1
        room = int(speech.starts[number + 1] - speech.starts[number]) - length
        first = TEACHER_HOP * int(rng.integers(max(room, 0) // TEACHER_HOP + 1))
        clip = speech.clip(number, first, length)
        waveforms[row, : len(clip)] = clip * 10 ** (rng.uniform(*GAINS_DB) / 20)
        if teacher is not None:
            known = teacher.labels(number)[first // TEACHER_HOP :][: labels.shape[1]]
            labels[row, : len(known)] = known
    return waveforms, labels


def train(options: Options) -> None:
    """Train the codec.

    Raises:
        UserError: an option does not fit, the data cannot be used, or training diverged.
    """
    check(options)
    tune_malloc()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal activations slow a CPU several times
    Training(options).run()
