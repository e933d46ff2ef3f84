"""The Mimi codec: waveforms to codes and back, with codes that do not depend on batching.

transformers' ``MimiModel`` ignores ``padding_mask`` when it encodes, so the codes of a clip's last frame depend on the
padding of its batch. :class:`Codec` calls the same submodules itself and tracks every clip's length through them, with
one of two conventions for the end of a clip:

``exact``    what a lone, unpadded ``MimiModel.encode`` call gives: features at or past a clip's length are zeroed
             before every strided convolution and filled with the clip's last feature before the final downsample.
``aligned``  each clip is zero-padded to a whole number of frames (1,920 samples) first, as Moshi does.

The second choice is the attention window of the encoder: ``codec`` is the 250 positions (10 s) of Mimi's design,
``full`` attends over everything, as transformers 4.53 to 5.2 did when the published checkpoints' codes were made.
Decoding always uses the codec's own window.

Weights and the arithmetic of encoding are in fp32, since bf16 changes a quarter of the codes or more. (Decoding may
use TF32 where torch's own switches allow it.) Lengths of paddings are computed in integers. Clips over
:data:`CHUNK_SECONDS` are encoded in chunks with carried state, which bounds the memory. On a CPU the chunks are shorter
(:data:`CPU_CHUNK_SECONDS`), which is faster.
"""

import copy
import hashlib
import json
import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from torchtitan.audio.streaming import StreamingDecoder
from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.audio.waveform import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, require_resampler
from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.hub import commit_of, local_copy

PADDINGS = ("exact", "aligned")
WINDOWS = ("codec", "full")

# The longest chunk, and the usual one on a CPU, whose caches hold the features of a few seconds. Shorter chunks read
# the weights too often (measured at kyutai/mimi's size: 4 s is 1.3 times as fast as 20 s, 1 s is slower again).
CHUNK_SECONDS = 20
CPU_CHUNK_SECONDS = 4
# With the full window the attention cache grows with the audio, by about 0.8 MB a second for kyutai/mimi.
FULL_WINDOW_MAX_SECONDS = 1200
_FULL_WINDOW = 1 << 30

# Maximum seconds of audio, padding included, in one encoder call. Batching speeds up a GPU, not a CPU.
BATCH_SECONDS = {"cpu": 0.0, "cuda": 320.0, "mps": 80.0}
# Memory for a second of audio in an encoder call of kyutai/mimi's size, measured; and the share of a GPU's free memory
# that a call may take.
ACTIVATION_BYTES = 27_000_000
FREE_MEMORY_SHARE = 0.5


class CodecError(UserError):
    """The codec cannot be used as asked."""


@dataclass
class _State:
    """What an encoder carries from one chunk of a clip to the next."""

    tails: dict[int, torch.Tensor] = field(default_factory=dict)  # convolution -> its last inputs [B, C, k - s]
    cache: Any = None  # keys and values of the transformer


class Codec:
    """A Mimi codec on one device.

    Args:
        model: a transformers MimiModel in fp32; its encoder's attention window is set here.
        num_quantizers: Q, how many of the codec's codebooks to use.
        padding: ``exact`` or ``aligned``.
        window: ``codec`` or ``full``.
        name: where the model is from, for messages and records. :meth:`load` sets ``revision``, its commit on the hub.
        resampler: one of :data:`~torchtitan.audio.waveform.RESAMPLERS`; how recordings become the 24 kHz waveforms that
            the codec is given. It is kept here for those who load them, and because the codes depend on it.

    Raises:
        CodecError: the model is not a 24 kHz, 12.5 Hz, 2,048-entry Mimi, has fewer codebooks, is not in fp32, or has
            untrained (identical) codebook entries.
    """

    def __init__(
        self,
        model: Any,
        num_quantizers: int,
        padding: str = "exact",
        window: str = "codec",
        name: str = "Mimi",
        resampler: str = "torchaudio",
    ):
        if padding not in PADDINGS:
            raise CodecError(f"codec_padding must be one of {', '.join(PADDINGS)}, not {padding!r}.")
        if window not in WINDOWS:
            raise CodecError(f"codec_window must be one of {', '.join(WINDOWS)}, not {window!r}.")
        require_resampler(resampler)
        config = model.config
        if (config.sampling_rate, config.frame_size, config.codebook_size) != (SAMPLE_RATE, FRAME_SIZE, CODEBOOK_SIZE):
            raise CodecError(
                f"{name}: the token stream needs a codec of {SAMPLE_RATE} Hz, {FRAME_SIZE} samples a frame and "
                f"{CODEBOOK_SIZE} codes, not {config.sampling_rate} Hz, {config.frame_size} and {config.codebook_size}."
            )
        if not config.num_semantic_quantizers <= num_quantizers <= config.num_quantizers:
            raise CodecError(
                f"{name}: {num_quantizers} quantizers were asked of a codec that has {config.num_quantizers} "
                f"(the first {config.num_semantic_quantizers} always used)."
            )
        if not config.use_causal_conv or config.pad_mode != "constant":
            raise CodecError(f"{name}: only causal convolutions with zero padding are supported.")
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            raise CodecError(f"{name}: the codec must be in fp32, lower precision changes the codes.")
        if bool((model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook.embed_sum == 0).all()):
            raise CodecError(f"{name}: the codebooks are all zero, so every code would be 0; load trained weights.")
        self.model = model.eval().requires_grad_(False)
        self.num_quantizers = num_quantizers
        self.padding = padding
        self.window = window
        self.name = name
        self.resampler = resampler
        self.revision: str | None = None
        # transformers 5.23 nests the encoder, earlier versions keep its parts at the top.
        encoder = model.encoder if hasattr(model.encoder, "encoder_seanet") else model
        self._seanet = encoder.encoder_seanet if encoder is not model else model.encoder
        self._transformer = encoder.encoder_transformer
        self._downsample = encoder.downsample
        # An activation may overwrite its input. The first of a residual unit may not, since its input is used again.
        for layer in self._seanet.layers:
            for part in layer.block[1:] if hasattr(layer, "block") else [layer]:
                if isinstance(part, torch.nn.ELU):
                    part.inplace = True
        _set_window(self._transformer, config.sliding_window if window == "codec" else _FULL_WINDOW)
        self._cuda_stream: torch.cuda.Stream | None = None
        self._largest = 0.0  # seconds of the largest batch, whose memory its CUDA stream keeps for the next one

    @classmethod
    def load(
        cls,
        name: str | Path,
        num_quantizers: int,
        padding: str = "exact",
        window: str = "codec",
        device: torch.device | str = "cpu",
        revision: str | None = None,
        resampler: str = "torchaudio",
    ) -> "Codec":
        """Load a codec by hub name or from a local folder, in fp32, onto ``device``.

        Raises:
            CodecError: there is no such codec, or it does not fit (see the class).
            UserError: the resampler's package does not work here.
        """
        from safetensors import SafetensorError
        from transformers import MimiConfig, MimiModel

        try:
            folder = local_copy(name, revision)
            config = MimiConfig.from_pretrained(folder)
            if config.model_type != "mimi":
                raise CodecError(f"{name}: a Mimi codec is needed, this is a {config.model_type} model.")
            model = MimiModel.from_pretrained(folder, config=config, dtype=torch.float32, use_safetensors=True)
        except (OSError, SafetensorError) as error:
            raise CodecError(f"{name}: no codec could be loaded from there ({first_line(error)}).") from None
        codec = cls(model, num_quantizers, padding, window, str(name), resampler)
        codec.revision = commit_of(folder)
        return codec.to(device)

    def to(self, device: torch.device | str) -> "Codec":
        """Move the codec; transformers computes its cached codebooks again on the device."""
        self.model.to(device)
        self._cuda_stream, self._largest = None, 0.0
        for module in self.model.modules():
            if hasattr(module, "embed_sum"):
                module._embed = None
        return self

    @property
    def device(self) -> torch.device:
        return self._downsample.conv.weight.device

    def num_frames(self, num_samples: int) -> int:
        """Frames that a clip of ``num_samples`` becomes: ceil(n / 1920)."""
        return -(-num_samples // FRAME_SIZE)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode clips of any lengths.

        On CUDA all threads encode on one CUDA stream, which belongs to the codec. So training and validation, which
        encode from different threads, share the memory that it keeps.

        Args:
            waveforms: float32 tensors [n] at 24 kHz, n >= 1.

        Returns:
            for each clip, in the given order, its codes [Q, ceil(n / 1920)] (int64, on the CPU).

        Raises:
            CodecError: an empty clip, or one too long for the ``full`` window.
        """
        for waveform in waveforms:
            if waveform.dim() != 1 or waveform.numel() == 0:
                raise CodecError(f"a waveform must be [n] with n >= 1, not {list(waveform.shape)}")
        codes: dict[int, torch.Tensor] = {}
        with no_tf32(self.device), self._own_cuda_stream():
            for batch in self._batches([waveform.numel() for waveform in waveforms]):
                clips = [waveforms[i] for i in batch]
                if len(clips) == 1 and self._num_chunks(clips[0].numel()) > 1:
                    results = [self._encode_long(clips[0])]
                else:
                    results = self._encode_fitting(clips)
                codes.update(zip(batch, results, strict=True))
        return [codes[i] for i in range(len(waveforms))]

    @torch.inference_mode()
    def encode_pair(self, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        """Encode two clips; on a CPU, frames that both begin with are encoded only once.

        The codes are those of :meth:`encode` up to near-ties. On other devices, where a batch is faster, and where the
        clips share less than a second, this calls :meth:`encode`.

        Raises:
            CodecError: see :meth:`encode`.
        """
        length = min(first.numel(), second.numel())
        differ = (first[:length] != second[:length]).nonzero()
        common = int(differ[0]) if len(differ) else length
        if common == max(first.numel(), second.numel()):
            return self.encode([first]) * 2
        # Both go on after it, by a sample at least.
        common = min(common, length - 1) // FRAME_SIZE * FRAME_SIZE
        longest = max(first.numel(), second.numel()) / SAMPLE_RATE
        if (
            self.device.type != "cpu"
            or common < SAMPLE_RATE
            or (self.window == "full" and longest > FULL_WINDOW_MAX_SECONDS)
        ):
            return self.encode([first, second])
        from transformers import DynamicCache

        state = _State(cache=DynamicCache(config=self._transformer.config))
        begin = self._encode_chunks(first[:common], state)
        branch = _State(dict(state.tails), copy.deepcopy(state.cache))
        ends = (self._encode_chunks(first[common:], state), self._encode_chunks(second[common:], branch))
        return [torch.cat((begin, end), dim=1) for end in ends]

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [Q, T], any Q up to the codec's, to a float32 waveform [1920 * T] on the CPU.

        Codes of more than :data:`CHUNK_SECONDS` are decoded in chunks with carried state. So are all codes on a GPU,
        where transformers' own decoding waits for the device at every convolution to read the lengths of paddings.
        """
        if codes.shape[1] == 0:
            return torch.zeros(0)
        chunk = round(CHUNK_SECONDS * FRAME_RATE)
        if codes.shape[1] > chunk or self.device.type == "cuda":
            decoder = StreamingDecoder(self)
            return torch.cat([decoder.decode(part) for part in codes.split(chunk, dim=1)])
        audio = self.model.decode(codes.to(self.device)[None]).audio_values
        return audio[0, 0].float().cpu()

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides codes, apart from the conventions.

        It covers the encoder's weights, the first Q codebooks and the settings of their arithmetic, but no names. So it
        is the same for a copy in another folder and in all supported versions of transformers. It takes about a second
        for kyutai/mimi.
        """
        config = self.model.config
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)}
        settings = {
            "strides": [layer.conv.stride[0] for layer in self._seanet.modules() if hasattr(layer, "conv")],
            "dilations": [layer.conv.dilation[0] for layer in self._seanet.modules() if hasattr(layer, "conv")],
            "downsample": self._downsample.conv.stride[0],
            "heads": [config.num_attention_heads, config.num_key_value_heads, config.head_dim],
            "activation": config.hidden_act,
            "norm_eps": config.norm_eps,
            "rope_theta": rope["rope_theta"],
            "sliding_window": config.sliding_window,
            "semantic": config.num_semantic_quantizers,
            "quantizers": self.num_quantizers,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        quantizer = self.model.quantizer
        semantic, acoustic = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
        tensors = [p for part in (self._seanet, self._transformer, self._downsample) for p in part.parameters()]
        for half in (semantic, acoustic):
            tensors += [] if half.input_proj is None else [half.input_proj.weight]
        for layer in [*semantic.layers, *acoustic.layers][: self.num_quantizers]:
            book = layer.codebook
            tensors.append(book.embed_sum.cpu() / book.cluster_usage.cpu().clamp(min=book.epsilon)[:, None])
        for tensor in tensors:
            digest.update(str(list(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def conventions(self) -> dict[str, str]:
        """The codec's name and the choices that its codes depend on, under the keys of config files."""
        return {
            "audio_tokenizer": self.name,
            "codec_padding": self.padding,
            "codec_window": self.window,
            "resampler": self.resampler,
        }

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Group clips by length so that each padded batch stays within the device's budget; long ones alone."""
        budget = self._batch_seconds() * SAMPLE_RATE
        batches: list[list[int]] = []
        longest = 0
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            # Lengths descend: where one is a single chunk, so are those after it.
            if batches and self._num_chunks(longest) == 1 and longest * (len(batches[-1]) + 1) <= budget:
                batches[-1].append(i)
            else:
                batches.append([i])
                longest = lengths[i]
        return batches

    def _batch_seconds(self) -> float:
        """Maximum seconds of audio in a batch; on CUDA, what fits into a share of the free memory."""
        most = BATCH_SECONDS.get(self.device.type, 0.0)
        if self.device.type != "cuda":
            return most
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(most, max(self._largest, FREE_MEMORY_SHARE * free / ACTIVATION_BYTES))

    def _own_cuda_stream(self) -> AbstractContextManager:
        """The CUDA stream on which all encoding takes place."""
        if self.device.type != "cuda":
            return nullcontext()
        if self._cuda_stream is None:
            self._cuda_stream = torch.cuda.Stream(self.device)
            self._cuda_stream.wait_stream(torch.cuda.current_stream(self.device))  # on which the weights came
        return torch.cuda.stream(self._cuda_stream)

    def _encode_fitting(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        """:meth:`_encode_batch`, in halves if the memory does not suffice for the whole batch."""
        try:
            codes = self._encode_batch(clips)
        except torch.OutOfMemoryError:
            if len(clips) == 1:
                raise
        else:
            self._largest = max(self._largest, len(clips) * max(clip.numel() for clip in clips) / SAMPLE_RATE)
            return codes
        self._largest = 0.0
        half = len(clips) // 2  # not in the handler, whose traceback keeps the tensors of the whole batch
        return self._encode_fitting(clips[:half]) + self._encode_fitting(clips[half:])

    def _encode_batch(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        """Codes of clips that are encoded in one call, each as if it were alone."""
        lengths = [clip.numel() for clip in clips]
        padded = torch.zeros(len(clips), 1, max(lengths))
        for row, clip in zip(padded, clips, strict=True):
            row[0, : clip.numel()] = clip
        latents = self._latents(padded.to(self.device), lengths, None)
        codes = self._quantize(latents)
        return [row[:, : self.num_frames(length)].cpu() for row, length in zip(codes, lengths, strict=True)]

    def _encode_long(self, clip: torch.Tensor) -> torch.Tensor:
        """Codes of one clip, chunk by chunk."""
        seconds = clip.numel() / SAMPLE_RATE
        if self.window == "full" and seconds > FULL_WINDOW_MAX_SECONDS:
            raise CodecError(
                f"a clip of {seconds:.0f} s is too long for the full attention window (at most "
                f"{FULL_WINDOW_MAX_SECONDS} s, as its memory grows with the length); use codec_window codec or cut it."
            )
        from transformers import DynamicCache

        return self._encode_chunks(clip, _State(cache=DynamicCache(config=self._transformer.config)))

    def _encode_chunks(self, clip: torch.Tensor, state: _State) -> torch.Tensor:
        """Codes of a clip, or of the rest of one whose beginning left ``state``; updates ``state``."""
        codes = []
        # Chunks of about equal length, since a short last chunk would cost as much as a longer one.
        frames = -(-self.num_frames(clip.numel()) // self._num_chunks(clip.numel()))
        for chunk in clip.split(frames * FRAME_SIZE):
            codes.append(self._quantize(self._latents(chunk[None, None].to(self.device), [chunk.numel()], state)))
        return torch.cat(codes, dim=2)[0].cpu()

    def _num_chunks(self, num_samples: int) -> int:
        """Number of chunks in which a clip is encoded; a clip of one chunk may be part of a batch."""
        seconds = num_samples / SAMPLE_RATE
        best = round(seconds / CPU_CHUNK_SECONDS) if self.device.type == "cpu" else 1
        return max(1, best, math.ceil(seconds / CHUNK_SECONDS))

    def _quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, D, T] to codes [B, Q, T]."""
        return self.model.quantizer.encode(latents, self.num_quantizers).transpose(0, 1)

    def _latents(self, x: torch.Tensor, lengths: list[int], state: _State | None) -> torch.Tensor:
        """Waveforms [B, 1, n], row b valid up to lengths[b] and zero after it, to latents [B, D, ceil(n / 1920)].

        With ``state`` the rows are the next chunk of their clips, and every chunk but the last is a multiple of
        1,920 samples.
        """
        if self.padding == "aligned":
            lengths = [self.num_frames(length) * FRAME_SIZE for length in lengths]
            x = F.pad(x, (0, max(lengths) - x.shape[-1]))
        # Nothing is masked if all clips fill their rows, as a lone clip does.
        valid = None if min(lengths) == x.shape[-1] else torch.tensor(lengths, device=x.device)
        for layer in self._seanet.layers:
            x, valid = self._apply(layer, x, valid, state)
        x = self._transformer(
            x.transpose(1, 2),
            past_key_values=state.cache if state else None,
            use_cache=state is not None,
        ).last_hidden_state.transpose(1, 2)
        if valid is not None:
            position = torch.arange(x.shape[-1], device=x.device)
            last = x.gather(2, (valid - 1)[:, None, None].expand(-1, x.shape[1], 1))
            x = torch.where(position < valid[:, None, None], x, last)
        return self._conv(self._downsample, x, state, replicate=True)

    def _apply(
        self, layer: Any, x: torch.Tensor, valid: torch.Tensor | None, state: _State | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer of the SEANet encoder; ``valid`` [B] is each clip's length in positions of ``x``.

        None stands for lengths that are those of ``x``.
        """
        if hasattr(layer, "block"):  # residual unit
            y = x
            for part in layer.block:
                y, _ = self._apply(part, y, valid, state)
            shortcut, _ = self._apply(layer.shortcut, x, valid, state)
            return y.add_(shortcut), valid
        if not hasattr(layer, "conv"):  # activation
            return layer(x), valid
        stride = layer.conv.stride[0]
        if stride > 1 and valid is not None:
            x = x.masked_fill(torch.arange(x.shape[-1], device=x.device) >= valid[:, None, None], 0.0)
            valid = -(-valid // stride)
        return self._conv(layer, x, state), valid

    def _conv(self, layer: Any, x: torch.Tensor, state: _State | None, replicate: bool = False) -> torch.Tensor:
        """A causal convolution whose paddings are Python integers: x [B, C, n] to [B, C', ceil(n / stride)]."""
        conv = layer.conv
        stride = conv.stride[0]
        context = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - stride
        mode = "replicate" if replicate else "constant"
        extra = -x.shape[-1] % stride
        if state is not None and id(layer) in state.tails:
            x = torch.cat([state.tails[id(layer)], x], dim=-1)
        else:
            x = F.pad(x, (context, 0), mode=mode)
        if state is not None:
            state.tails[id(layer)] = x[..., x.shape[-1] - context :]
        if extra:
            x = F.pad(x, (0, extra), mode=mode)
        return conv(x)


# Where transformers 5.23 has the parts of a Mimi, and where all versions before it, kyutai/mimi's files too, have them.
_NESTED_PARTS = {
    **{f"encoder.{part}": part for part in ("encoder_transformer", "downsample")},
    **{f"decoder.{part}": part for part in ("decoder_transformer", "upsample")},
    **{"encoder.encoder_seanet": "encoder", "decoder.decoder_seanet": "decoder"},
}


def published_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a Mimi under the names of kyutai/mimi's files, which every version of transformers loads.

    With the names of 5.23 and later, an older version starts from random weights and only warns.
    """

    def published(name: str) -> str:
        for nested, flat in _NESTED_PARTS.items():
            if name.startswith(f"{nested}."):
                return flat + name.removeprefix(nested)
        return name

    return {published(name): value for name, value in weights.items()}


def _set_window(transformer: Any, window: int) -> None:
    """Give an encoder transformer its own attention window; the decoder, which may share its config, keeps its."""
    config = copy.deepcopy(transformer.config)
    config.sliding_window = window
    transformer.config = config
    for layer in transformer.layers:
        layer.self_attn.config = config
        layer.self_attn.sliding_window = window


# The switches concern the whole process, and training and validation encode in different threads.
_TF32_LOCK = threading.Lock()


@contextmanager
def no_tf32(device: torch.device):
    """On CUDA, keep matrix products and convolutions in full fp32, whatever the trainer allows elsewhere."""
    if device.type != "cuda":
        yield
        return
    with _TF32_LOCK:
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
