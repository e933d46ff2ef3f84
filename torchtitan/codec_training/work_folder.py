"""The folder in which a run keeps its checkpoint, its log and its options."""

import json
from dataclasses import asdict
from typing import Any

import torch

from torchtitan.codec_training.options import Options
from torchtitan.datasets.shards import write_atomically
from torchtitan.tools.errors import UserError

NOT_COMPARED = ("output", "work", "threads", "device", "checkpoint_every")
"""Options that may change from a run to its continuation."""


class WorkFolder:
    """The work folder of a run.

    Raises:
        UserError: it or the output folder belongs to a run with other options, or cannot be written to.
    """

    def __init__(self, options: Options):
        output = options.output.resolve()
        self.path = options.work or output.with_name(output.name + ".training")
        self._record, self._checkpoint = self.path / "options.json", self.path / "checkpoint.pt"
        compared = {name: value for name, value in asdict(options).items() if name not in NOT_COMPARED}
        self._options = json.loads(json.dumps(compared, default=str))
        if self._record.exists():
            other = json.loads(self._record.read_text())
            if different := [name for name, value in self._options.items() if other.get(name) != value]:
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

    def record_options(self) -> None:
        """Make the folder this run's; called once the data have been read."""
        self._record.write_text(json.dumps(self._options, indent=2) + "\n")

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        write_atomically(self._checkpoint, lambda file: torch.save(state, file))

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, if there is one."""
        if not self._checkpoint.exists():
            return None
        return torch.load(self._checkpoint, map_location="cpu", weights_only=True)

    def log(self, figures: dict[str, float]) -> None:
        """Add a line to the log."""
        with open(self.path / "log.jsonl", "a") as log:
            log.write(json.dumps(figures) + "\n")
