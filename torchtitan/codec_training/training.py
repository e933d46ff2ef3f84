"""The training of a codec, from top to bottom."""

import hashlib
import json
import time
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from torchtitan.checkpoint.speech_lm import choose_device
from torchtitan.codec_training.autoencoder import Autoencoder, keep_in_float32, new_model, save_codec, scale_weights
from torchtitan.codec_training.data import Speech, Teacher, draw_batch
from torchtitan.codec_training.optimizer import Schedule
from torchtitan.codec_training.options import Options, check
from torchtitan.codec_training.spectra import Discriminators
from torchtitan.codec_training.stages import Stages, finish_encoder
from torchtitan.datasets.shards import write_atomically
from torchtitan.tools.errors import UserError
from torchtitan.tools.memory import tune_malloc

SPEAKER_DIRECTIONS = 3
"""That are taken out of the latents of a codec trained from scratch, if the options do not say how many."""
OLD_SHARE, NEW_SHARE = 0.98, 0.02  # of what a running mean was and of the new value
NOT_COMPARED = ("output", "work", "threads", "device", "checkpoint_every")
"""Options that may change from a run to its continuation."""


class WorkFolder:
    """The work folder of a run, and proof that it and the output folder are this run's, or free.

    Raises:
        UserError: they belong to a run with other options, or cannot be written to.
    """

    def __init__(self, options: Options):
        output = options.output.resolve()
        self.path = options.work or output.with_name(output.name + ".training")
        self._record = self.path / "options.json"
        mine = {name: value for name, value in asdict(options).items() if name not in NOT_COMPARED}
        self._mine = json.loads(json.dumps(mine, default=str))
        if self._record.exists():
            other = json.loads(self._record.read_text())
            different = [name for name in self._mine if other.get(name) != self._mine[name]]
            if different:
                raise UserError(
                    f"{self.path}: it holds a run with other {', '.join(different)}; delete it or give another --work."
                )
        elif (options.output / "model.safetensors").exists():
            raise UserError(f"{options.output}: it holds another codec; delete it or give another --output.")
        for folder in (self.path, options.output):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: the folder cannot be made ({error.strerror}).") from None

    def take(self) -> None:
        """From here on the folder is this run's: the data have been read."""
        self._record.write_text(json.dumps(self._mine, indent=2) + "\n")

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        write_atomically(self.path / "checkpoint.pt", lambda file: torch.save(state, file))

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, if there is one."""
        path = self.path / "checkpoint.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def log(self, figures: dict[str, float]) -> None:
        """Add a line to the log."""
        with open(self.path / "log.jsonl", "a") as log:
            log.write(json.dumps(figures) + "\n")


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
        self.stages = Stages(self.autoencoder, self.discriminators, self.schedule, options)
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
        self.stages.optimizers.set_learning_rate(self.schedule.learning_rate(self.step))
        batch = draw_batch(self.speech, self.teacher, self.options, self.step)
        waveform, labels = (part.to(self.device) for part in batch)
        if self.step < self.schedule.decoder:
            return self.stages.train_whole(self.step, waveform, labels)
        if self.step == self.schedule.decoder:
            finish_encoder(self.autoencoder, self.speech, self.options, self.speaker_directions, self.step)
            self.stages.seen = []
        return self.stages.train_decoder(self.step, waveform)

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
            **self.stages.optimizers.state_dict(),
            "seen": self.stages.seen,
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
        self.stages.optimizers.load_state_dict(state)
        self.stages.seen, self.step = [part.to(self.device) for part in state["seen"]], state["step"]
        print(f"going on from step {self.step}")


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
