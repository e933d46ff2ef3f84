"""Mimi codes as Llama token ids, and back.

The one home of the token stream. A frame of Q codes becomes Q neighbouring ids; a sample is

    BOS [text ids] <audio>  <c0_0> <c0_1> .. <c0_Q-1>  <c1_0> ..  </audio>

with id = base_size + code * Q + quantizer for the unit ``<{code}_{quantizer}>``, then ``<audio>`` and ``</audio>``.
All of it is integer arithmetic. Token strings exist only in :func:`extend_tokenizer` and in the check that
:meth:`TokenStream.from_tokenizer` makes once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchtitan.tools.errors import UserError

CODEBOOK_SIZE = 2048
MAX_QUANTIZERS = 32
AUDIO_START = "<audio>"
AUDIO_END = "</audio>"


class TokenStreamError(UserError):
    """The tokenizer at hand does not hold the expected block of audio tokens."""


@dataclass(frozen=True)
class TokenStream:
    """The id layout of one tokenizer with ``num_quantizers`` codebooks (Q).

    Attributes:
        base_size: number of ids before the audio block (``len(tokenizer)`` of the base tokenizer).
        num_quantizers: Q, 1 to 32.
        bos_id: the id that starts every sample.
    """

    base_size: int
    num_quantizers: int
    bos_id: int

    @property
    def audio_start_id(self) -> int:
        """Id of ``<audio>``."""
        return self.base_size + CODEBOOK_SIZE * self.num_quantizers

    @property
    def audio_end_id(self) -> int:
        """Id of ``</audio>``."""
        return self.audio_start_id + 1

    @property
    def vocab_size(self) -> int:
        """Number of ids in all."""
        return self.audio_end_id + 1

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, num_quantizers: int | None = None) -> "TokenStream":
        """Read the layout off a tokenizer that already holds the audio tokens, and check all of it.

        Args:
            tokenizer: a transformers tokenizer.
            num_quantizers: the Q to insist on; None accepts whatever the tokenizer has.

        Raises:
            TokenStreamError: no audio tokens, another Q, a block with gaps or in another order, or no BOS.
        """
        vocab = tokenizer.get_added_vocab()
        found = quantizers_in(tokenizer)
        if found == 0:
            raise TokenStreamError(f"The tokenizer {_name(tokenizer)} holds no audio tokens such as <0_0>.")
        if num_quantizers is not None and found != num_quantizers:
            raise TokenStreamError(
                f"The tokenizer {_name(tokenizer)} has audio tokens for {found} quantizers, not {num_quantizers}: "
                f"set model.num_quantizers to {found} or start from a base model without audio tokens."
            )
        stream = cls(vocab["<0_0>"], found, _bos_id(tokenizer))
        for token, expected in zip(stream.token_strings(), range(stream.base_size, stream.vocab_size), strict=True):
            if vocab.get(token) != expected:
                raise TokenStreamError(
                    f"The tokenizer {_name(tokenizer)} has {token} at id {vocab.get(token)} where the token stream "
                    f"needs {expected}: its audio tokens are not one block ordered by code, then quantizer."
                )
        return stream

    def token_strings(self) -> list[str]:
        """The added tokens in the order of their ids."""
        units = [f"<{code}_{q}>" for code in range(CODEBOOK_SIZE) for q in range(self.num_quantizers)]
        return [*units, AUDIO_START, AUDIO_END]

    def max_frames(self, length: int, num_text: int = 0, end: bool = True) -> int:
        """Whole frames that fit a row of ``length`` ids beside BOS, ``num_text`` text ids and the audio marks."""
        return max(0, (length - 2 - end - num_text) // self.num_quantizers)

    def encode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [Q, T] (integers 0..2047) to ids [T * Q] (int64), frame by frame."""
        if codes.dim() != 2 or codes.shape[0] != self.num_quantizers:
            raise ValueError(f"codes must be [{self.num_quantizers}, T], not {list(codes.shape)}")
        quantizer = torch.arange(self.num_quantizers, device=codes.device)
        return (self.base_size + codes.long().T * self.num_quantizers + quantizer).reshape(-1)

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [T * Q] of whole frames in order to codes [Q, T] (int64).

        Raises:
            ValueError: the ids are not whole frames with their quantizers in order.
        """
        num_quantizers = self.num_quantizers
        units = ids.long() - self.base_size
        if units.numel() % num_quantizers:
            raise ValueError(f"{units.numel()} ids are not a whole number of frames of {num_quantizers}")
        frames = units.reshape(-1, num_quantizers)
        in_range = (frames >= 0) & (frames < CODEBOOK_SIZE * num_quantizers)
        if not (in_range & (frames % num_quantizers == torch.arange(num_quantizers, device=ids.device))).all():
            raise ValueError("the ids are not audio units in the order of their quantizers")
        return (frames // num_quantizers).T.contiguous()

    def is_unit(self, ids: torch.Tensor) -> torch.Tensor:
        """True where an id is an audio unit (neither text nor ``<audio>`` nor ``</audio>``); same shape as ``ids``."""
        return (ids >= self.base_size) & (ids < self.audio_start_id)

    def quantizer_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The quantizer 0..Q-1 of each audio unit, -1 for every other id; same shape as ``ids``."""
        return torch.where(self.is_unit(ids), (ids - self.base_size) % self.num_quantizers, -1)

    def sample(
        self, codes: torch.Tensor, text_ids: Sequence[int] = (), end: bool = True, text_last: bool = False
    ) -> torch.Tensor:
        """One sample: BOS, text, ``<audio>``, the frames of ``codes`` [Q, T] and, with ``end``, ``</audio>``.

        With ``text_last`` the text stands at the end of all that.

        Returns int64 ids [len(text_ids) + 2 + Q * T + end].
        """
        ids = np.empty(self.sample_length(codes.shape[1], len(text_ids), end), dtype=np.int64)
        self.write_sample(ids, codes.T.cpu().numpy(), text_ids, end, text_last)
        return torch.from_numpy(ids).to(codes.device)

    def sample_length(self, num_frames: int, num_text: int = 0, end: bool = True) -> int:
        """Number of ids of a sample."""
        return 2 + self.num_quantizers * num_frames + num_text + end

    def write_sample(
        self,
        ids: np.ndarray,
        codes: np.ndarray,
        text_ids: Sequence[int] | np.ndarray = (),
        end: bool = True,
        text_last: bool = False,
    ) -> None:
        """Write the sample of ``codes`` [T, Q] (frame by frame) into ``ids``, int64 of just its length."""
        num_text = len(text_ids)
        begin = 2 if text_last else 2 + num_text  # of the frames
        stop = begin + self.num_quantizers * len(codes)
        ids[0] = self.bos_id
        ids[begin - 1] = self.audio_start_id
        frames = ids[begin:stop].reshape(-1, self.num_quantizers)
        np.multiply(codes, self.num_quantizers, out=frames, casting="unsafe", dtype=np.int64)
        frames += np.arange(self.base_size, self.base_size + self.num_quantizers)
        if end:
            ids[stop] = self.audio_end_id
        if num_text:
            place = stop + end if text_last else 1
            ids[place : place + num_text] = text_ids


def quantizers_in(tokenizer: Any) -> int:
    """Number of quantizers whose audio tokens a tokenizer holds; 0 for a base tokenizer."""
    units = (re.fullmatch(r"<0_(\d+)>", token) for token in tokenizer.get_added_vocab())
    return 1 + max((int(unit.group(1)) for unit in units if unit), default=-1)


def extend_tokenizer(tokenizer: Any, num_quantizers: int) -> TokenStream:
    """Add the audio tokens to a base tokenizer, in place; one that has them is checked and left as it is.

    Raises:
        TokenStreamError: ``num_quantizers`` is not 1..32, or the tokenizer has audio tokens for another Q.
    """
    if not 1 <= num_quantizers <= MAX_QUANTIZERS:
        raise TokenStreamError(f"The number of quantizers must be 1 to {MAX_QUANTIZERS}, not {num_quantizers}.")
    if quantizers_in(tokenizer) == 0:
        stream = TokenStream(len(tokenizer), num_quantizers, _bos_id(tokenizer))
        tokenizer.add_tokens(stream.token_strings())
    return TokenStream.from_tokenizer(tokenizer, num_quantizers)


def mark_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens that no transcription may contain: BOS, EOS, and those that are written as marks.

    A mark is text in angle or square brackets, such as ``<|start_header_id|>`` and ``[PAD]``. Ordinary text is no mark
    even if the tokenizer calls it special: the published models pad with "!".
    """
    marks = (n for n, token in tokenizer.added_tokens_decoder.items() if token.special and _is_mark(token.content))
    ends = (number for number in (tokenizer.bos_token_id, tokenizer.eos_token_id) if number is not None)
    return frozenset((*marks, *ends))


def _is_mark(text: str) -> bool:
    return re.fullmatch(r"<.+>|\[.+\]", text.strip(), re.DOTALL) is not None


def _bos_id(tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise TokenStreamError(f"The tokenizer {_name(tokenizer)} has no BOS token, which starts every sample.")
    return tokenizer.bos_token_id


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
