"""What a run keeps beside its codec: options, decoded speech, checkpoint, log."""

import json
import os
from dataclasses import asdict
from typing import Any

import torch

from torchtitan.codec_training.options import Options
from torchtitan.tools.errors import UserError

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
        partial = self.path / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.path / "checkpoint.pt")

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, if there is one."""
        path = self.path / "checkpoint.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def log(self, figures: dict[str, float]) -> None:
        """Add a line to the log."""
        with open(self.path / "log.jsonl", "a") as log:
            log.write(json.dumps(figures) + "\n")
