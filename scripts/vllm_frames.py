"""Whole frames from vLLM: a logits processor that allows only units of the current quantizer.

    PYTHONPATH=scripts vllm serve MODEL --logits-processors vllm_frames:FrameProcessor

A prompt is BOS, text or none, ``<audio>``, and units. The processor then allows only the 2,048 units of quantizer q,
where q is the number of units since ``<audio>`` modulo Q, and ``</audio>`` at a frame's start. After ``</audio>`` it
allows only ``</audio>``, for a request that does not stop there. It leaves other prompts alone, such as those for
transcription.

This file stands alone: the server's environment needs vLLM, not this project. When the server starts, the processor
reads the layout of the ids from the served checkpoint's tokenizer and checks all of it. The number of a request's ids
decides what may come next, not their values, so a step costs the same at any length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor
except ModuleNotFoundError as error:
    if error.name != "vllm":
        raise
    LogitsProcessor = object  # where vLLM is not installed, the rest can still be tested

CODEBOOK_SIZE = 2048


@dataclass(frozen=True)
class Layout:
    """Where the audio tokens are: unit ``<{code}_{q}>`` is ``base_size + code * Q + q``, then both marks."""

    base_size: int
    num_quantizers: int

    @property
    def audio_start_id(self) -> int:
        return self.base_size + CODEBOOK_SIZE * self.num_quantizers

    @property
    def audio_end_id(self) -> int:
        return self.audio_start_id + 1

    @classmethod
    def from_vocab(cls, vocab: Mapping[str, int], name: str) -> "Layout":
        """Read the layout off a tokenizer's added tokens.

        Raises:
            ValueError: there are none, or they are not one block ordered by code, then quantizer.
        """
        if "<0_0>" not in vocab or "<audio>" not in vocab:
            raise ValueError(f"{name}: the tokenizer holds no audio tokens such as <0_0> and <audio>.")
        base_size = vocab["<0_0>"]
        layout = cls(base_size, (vocab["<audio>"] - base_size) // CODEBOOK_SIZE)
        units = [f"<{code}_{q}>" for code in range(CODEBOOK_SIZE) for q in range(layout.num_quantizers)]
        for position, token in enumerate([*units, "<audio>", "</audio>"], base_size):
            if vocab.get(token) != position:
                raise ValueError(f"{name}: the tokenizer has {token} at id {vocab.get(token)}, not at {position}.")
        return layout


class FrameConstraint:
    """The rule for the rows of a batch that changes from step to step.

    Attributes:
        rows: of each row under the rule, the number of units in its prompt, and its output ids, a list that grows.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.rows: dict[int, tuple[int, Sequence[int]]] = {}

    def add(self, row: int, prompt: Sequence[int] | None, output: Sequence[int]) -> None:
        """Put a request into a row, in place of the one that may be there."""
        units = None if prompt is None else self._open_units(prompt)
        if units is None:
            self.rows.pop(row, None)
        else:
            self.rows[row] = (units, output)

    def remove(self, row: int) -> None:
        self.rows.pop(row, None)

    def move(self, source: int, target: int, swap: bool) -> None:
        """Move a row in place of another, which takes the place ``source`` with ``swap`` and is dropped without."""
        moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
        if moved is not None:
            self.rows[target] = moved
        if swap and replaced is not None:
            self.rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Set logits [B, V] of ids that are not allowed to minus infinity, in place."""
        if not self.rows:
            return logits
        end_id, num_quantizers = self.layout.audio_end_id, self.layout.num_quantizers
        ended = [bool(output) and output[-1] == end_id for _, output in self.rows.values()]
        turns = [(units + len(output)) % num_quantizers for units, output in self.rows.values()]
        # One transfer a step; nothing here waits for the device.
        table = torch.tensor([list(self.rows), turns, ended]).to(logits.device, non_blocking=True)
        row, quantizer, over = table[0, :, None], table[1, :, None], table[2, :, None].bool()
        code = torch.arange(CODEBOOK_SIZE, device=logits.device)
        unit = self.layout.base_size + code * num_quantizers + quantizer  # [rows, 2048]
        units = logits[row, unit].masked_fill(over, -math.inf)
        end = logits[row, end_id].masked_fill((quantizer != 0) & ~over, -math.inf)
        logits.index_fill_(0, table[0], -math.inf)
        logits[row, unit] = units
        logits[row, end_id] = end
        return logits

    def _open_units(self, prompt: Sequence[int]) -> int | None:
        """Number of units after a prompt's ``<audio>``; None if anything else came since, or there is none."""
        for units, token in enumerate(reversed(prompt)):
            if token == self.layout.audio_start_id:
                return units
            if not self.layout.base_size <= token < self.layout.audio_start_id:
                return None
        return None


class FrameProcessor(LogitsProcessor):
    """The rule as vLLM calls it (the V1 interface of logits processors)."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        from transformers import AutoTokenizer

        model = vllm_config.model_config
        tokenizer: Any = AutoTokenizer.from_pretrained(model.tokenizer, revision=model.tokenizer_revision)
        layout = Layout.from_vocab(tokenizer.get_added_vocab(), model.tokenizer)
        declared = getattr(model.hf_config, "num_quantizers", layout.num_quantizers)
        if declared != layout.num_quantizers:
            raise ValueError(
                f"{model.model}: config.json says {declared} quantizers, the tokenizer has {layout.num_quantizers}."
            )
        if model.get_vocab_size() <= layout.audio_end_id:
            raise ValueError(
                f"{model.model}: the model has {model.get_vocab_size():,} ids, its tokenizer needs "
                f"{layout.audio_end_id + 1:,}."
            )
        self.constraint = FrameConstraint(layout)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the batch: what was removed, added and moved, to be done in this order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.constraint.remove(row)
        for row, _, prompt, output in batch_update.added:
            self.constraint.add(row, prompt, output)
        for source, target, direction in batch_update.moved:
            self.constraint.move(source, target, direction.name == "SWAP")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self.constraint.apply(logits)
