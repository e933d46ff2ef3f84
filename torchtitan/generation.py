"""Continue a spoken prompt, frame by frame.

The model reads BOS, ``<audio>`` and the prompt's units and then draws one unit after the other. What can be drawn is
decided before the draw, not checked after it: the last hidden state meets only the rows of the head that may come
next, the 2,048 units of the quantizer whose turn it is and, at a frame's start, ``</audio>``. Every frame is therefore
whole and in order, whatever the model prefers, and with Llama 3's vocabulary the head's part of a step is a 66th.

Several samples of one prompt are drawn together: the prompt is read once and its cache repeated. The random numbers
of a sample depend on the seed and the sample's number alone, so sample 3 of 8 is sample 3 of 4 (in fp32, up to
near-ties within rounding, since a larger batch may add up in another order).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torchtitan.audio.codec import FRAME_RATE
from torchtitan.audio.token_stream import CODEBOOK_SIZE, TokenStream
from torchtitan.models.speech_lm import SpeechLM
from torchtitan.tools.errors import UserError

# The sequence length of the published recipe: BOS, <audio>, frames, </audio>.
DEFAULT_MAX_IDS = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next unit is drawn.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most likely unit each time.
        top_k: draw from the k most likely units only; None from all.
        top_p: draw from the most likely units that together reach this probability, after ``top_k``; 1 is no limit.
        seed: with the sample's number, the only source of randomness.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.8
    top_k: int | None = 30
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (the most likely unit) or more, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be 1 or more, not {self.top_k}; leave it at None to draw from all units.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be over 0 and at most 1, not {self.top_p}.")


@dataclass(frozen=True)
class Continuation:
    """One sample.

    Attributes:
        codes: the new frames [Q, T] (int64, on the CPU), without the prompt's; T may be 0.
        ended: True if the model drew ``</audio>``, False if the bound came first.
    """

    codes: torch.Tensor
    ended: bool


def frame_bound(lm: SpeechLM, max_seconds: float | None = None) -> int:
    """The number of frames, prompt included, that a sequence may have.

    Args:
        max_seconds: what the frames may last together; None allows the frames that fit into 1,024 ids.

    Raises:
        UserError: ``max_seconds`` is under one frame or over the model's context.
    """
    context = lm.stream.max_frames(lm.max_length)
    if max_seconds is None:
        return min(context, lm.stream.max_frames(DEFAULT_MAX_IDS))
    if not max_seconds * FRAME_RATE >= 1 or not math.isfinite(max_seconds):
        raise UserError(f"max_seconds must be a number from {1 / FRAME_RATE:.2f} (one frame) on, not {max_seconds}.")
    frames = math.floor(max_seconds * FRAME_RATE + 1e-6)
    if frames > context:
        raise UserError(
            f"max_seconds {max_seconds:g} is over the context of {lm.name}: {lm.max_length:,} ids hold "
            f"{context} frames, {context / FRAME_RATE:.2f} s; ask for at most that."
        )
    return frames


def require_room(prompt_frames: int, max_frames: int) -> None:
    """Refuse a prompt that leaves no frame to generate.

    Raises:
        UserError: with both lengths.
    """
    if prompt_frames >= max_frames:
        raise UserError(
            f"the prompt has {prompt_frames} frames ({prompt_frames / FRAME_RATE:.2f} s) and prompt and continuation "
            f"together may have {max_frames} ({max_frames / FRAME_RATE:.2f} s): shorten the prompt or raise "
            f"max_seconds, if the model's context allows it."
        )


@torch.inference_mode()
def continue_codes(
    lm: SpeechLM,
    prompt: torch.Tensor | None = None,
    max_frames: int | None = None,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    on_frame: Callable[[], object] | None = None,
) -> list[Continuation]:
    """Draw ``num_samples`` continuations of one prompt.

    Args:
        prompt: codes [Q, Tp]; None starts from ``<audio>``.
        max_frames: bound of the prompt's and the new frames together; None is :func:`frame_bound`'s default.
        sampling: None takes the defaults.
        on_frame: called after each new frame, which all samples share.

    Raises:
        UserError: no room beside the prompt, a bound over the model's context, fewer than one sample, a model that
            is no Llama, or logits that are not finite.
    """
    from transformers import DynamicCache

    stream = lm.stream
    num_quantizers = stream.num_quantizers
    sampling = sampling or Sampling()
    if num_samples < 1:
        raise UserError(f"num_samples must be 1 or more, not {num_samples}.")
    if lm.model.config.model_type != "llama":
        raise UserError(f"{lm.name}: a Llama is needed, this is a {lm.model.config.model_type} model.")
    if prompt is None:
        prompt = torch.zeros(num_quantizers, 0, dtype=torch.int64)
    if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < CODEBOOK_SIZE:
        raise ValueError(f"codes must be 0 to {CODEBOOK_SIZE - 1}")
    context = stream.max_frames(lm.max_length)
    if max_frames is None:
        max_frames = frame_bound(lm)
    if max_frames > context:
        raise UserError(f"{max_frames} frames are over the context of {lm.name}, which holds {context}.")
    require_room(prompt.shape[1], max_frames)

    device = lm.device
    new_frames = max_frames - prompt.shape[1]
    heads = _heads(lm.model.get_output_embeddings().weight, stream)
    uniforms = torch.stack([_uniforms(sampling.seed, i, (new_frames, num_quantizers)) for i in range(num_samples)])
    uniforms = uniforms.to(device)
    codes = torch.zeros(num_samples, num_quantizers, new_frames, dtype=torch.int64, device=device)
    lengths = torch.full((num_samples,), new_frames, device=device)
    ended = torch.zeros(num_samples, dtype=torch.bool, device=device)
    broken = torch.zeros((), dtype=torch.bool, device=device)

    def advance(ids: torch.Tensor) -> torch.Tensor:
        """Feed ids [B, n] after those in the cache; the last position's hidden state [B, D]."""
        return lm.model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    cache = DynamicCache(config=lm.model.config)
    hidden = advance(stream.sample(prompt, end=False)[None].to(device)).expand(num_samples, -1)
    if num_samples > 1:
        cache.batch_repeat_interleave(num_samples)
    for frame in range(new_frames):
        for quantizer in range(num_quantizers):
            logits = _next_logits(hidden, heads, quantizer).float()
            broken = broken | (~torch.isfinite(logits).all(dim=1) & ~ended).any()
            choice = draw(logits, uniforms[:, frame, quantizer], sampling)
            if quantizer == 0:
                stops = (choice == CODEBOOK_SIZE) & ~ended
                lengths = torch.where(stops, frame, lengths)
                ended = ended | stops
                # Rows that have ended go on with arbitrary units, which nobody reads: the batch keeps its shape.
                choice = choice.clamp(max=CODEBOOK_SIZE - 1)
                all_ended, is_broken = torch.stack([ended.all(), broken]).tolist()
                if is_broken:
                    raise _not_finite(lm)
                if all_ended:
                    return _results(codes, lengths, ended)
            codes[:, quantizer, frame] = choice
            if (frame, quantizer) != (new_frames - 1, num_quantizers - 1):
                hidden = advance((stream.base_size + choice * num_quantizers + quantizer)[:, None])
        if on_frame is not None:
            on_frame()
    if bool(broken):
        raise _not_finite(lm)
    return _results(codes, lengths, ended)


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Draw one candidate a row by inverting the cumulative distribution, without waiting for the device.

    Args:
        logits: float32 [B, K].
        uniform: random numbers in [0, 1) [B].

    Returns:
        indices [B] (int64) into the candidates.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    # With the maximum at 0 no temperature, however small, can overflow.
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[1]:
        least = scaled.topk(sampling.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    probabilities = scaled.softmax(dim=1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(dim=1) - ordered  # what more likely candidates hold; 0 for the first, which stays
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    cumulative = probabilities.cumsum(dim=1)
    reached = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    # A parallel sum may round so that nothing is reached; the most likely candidate stands in.
    return torch.where(reached.any(dim=1), reached.int().argmax(dim=1), probabilities.argmax(dim=1))


def _heads(weight: torch.Tensor, stream: TokenStream) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Views of the head [V, D]: the rows [2048, D] of each quantizer's units, and the row [1, D] of ``</audio>``."""
    units = weight[stream.base_size : stream.audio_start_id]
    end = weight[stream.audio_end_id : stream.audio_end_id + 1]
    return [units[quantizer :: stream.num_quantizers] for quantizer in range(stream.num_quantizers)], end


def _next_logits(hidden: torch.Tensor, heads: tuple[list[torch.Tensor], torch.Tensor], quantizer: int) -> torch.Tensor:
    """Logits of what can come next: [B, 2049] at a frame's start, ``</audio>`` last, and [B, 2048] within it."""
    units, end = heads
    logits = F.linear(hidden, units[quantizer])
    return torch.cat([logits, F.linear(hidden, end)], dim=1) if quantizer == 0 else logits


def _uniforms(seed: int, sample: int, shape: tuple[int, int]) -> torch.Tensor:
    """Random numbers in [0, 1) [frames, Q] of one sample; more frames only append to them."""
    # torch's CPU generator uses 32 bits of its seed, so seed and sample are mixed rather than packed into it.
    digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.rand(shape, generator=generator)


def _results(codes: torch.Tensor, lengths: torch.Tensor, ended: torch.Tensor) -> list[Continuation]:
    codes = codes.cpu()
    rows = zip(codes, lengths.tolist(), ended.tolist(), strict=True)
    return [Continuation(row[:, :length].clone(), stopped) for row, length, stopped in rows]


def _not_finite(lm: SpeechLM) -> UserError:
    dtype = str(lm.model.dtype).removeprefix("torch.")
    hint = "its weights are damaged" if dtype == "float32" else "try --dtype float32"
    return UserError(f"{lm.name}: the model gives logits that are not finite numbers in {dtype}; {hint}.")
