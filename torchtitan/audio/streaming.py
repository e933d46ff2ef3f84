"""Decodes codes to audio piece by piece, while the codes are still being made.

``MimiModel.decode`` keeps no state of its convolutions: called frame by frame, it starts every call from silence, which
causes clicks. :class:`StreamingDecoder` calls the same submodules and keeps the state of each between calls. However
the codes are cut, the concatenated pieces are the waveform of one whole call:

- a causal convolution keeps its last inputs (kernel size - 1, dilated);
- a transposed convolution keeps the part of its output that the next input still adds to;
- the transformer keeps keys and values of the codec's own window (250 positions).

State and cost of a frame are constant, however long the speech is.
"""

from typing import Any

import torch
import torch.nn.functional as F

from torchtitan.audio.waveform import FRAME_SIZE


class StreamingDecoder:
    """Decodes one waveform piece by piece.

    Several decoders of one codec are independent of each other, even in different threads.

    Args:
        codec: a Codec (codec.py, which imports this file); its decoder's weights are used where they are.
    """

    def __init__(self, codec: Any):
        from transformers import DynamicCache

        model = codec.model
        # transformers 5.23 nests the decoder, earlier versions keep its parts at the top.
        decoder = model.decoder if hasattr(model.decoder, "decoder_seanet") else model
        self._codec = codec
        self._seanet = decoder.decoder_seanet if decoder is not model else model.decoder
        self._transformer = decoder.decoder_transformer
        self._upsample = decoder.upsample
        self._cache = DynamicCache(config=self._transformer.config)
        self._tails: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The next frames, codes [Q, T], any Q up to the codec's, to their float32 waveform [1920 * T] on the CPU."""
        if codes.shape[1] == 0:
            return torch.zeros(0)
        x = self._codec.model.quantizer.decode(codes.to(self._codec.device)[None])
        x = self._transposed(self._upsample, x).transpose(1, 2)
        x = self._transformer(x, past_key_values=self._cache, use_cache=True).last_hidden_state.transpose(1, 2)
        for layer in self._seanet.layers:
            x = self._apply(layer, x)
        assert x.shape[-1] == FRAME_SIZE * codes.shape[1]
        return x[0, 0].float().cpu()

    def _apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """One layer of the SEANet decoder."""
        if hasattr(layer, "block"):  # residual unit
            y = x
            for part in layer.block:
                y = self._apply(part, y)
            return y + self._apply(layer.shortcut, x)
        if not hasattr(layer, "conv"):  # activation
            return layer(x)
        if isinstance(layer.conv, torch.nn.ConvTranspose1d):
            return self._transposed(layer, x)
        conv = layer.conv
        context = (conv.kernel_size[0] - 1) * conv.dilation[0]
        tail = self._tails.get(id(layer))
        x = F.pad(x, (context, 0)) if tail is None else torch.cat([tail, x], dim=-1)
        self._tails[id(layer)] = x[..., x.shape[-1] - context :]
        return conv(x)

    def _transposed(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """A causal transposed convolution: x [1, C, n] to [1, C', n * stride]."""
        conv = layer.conv
        stride = conv.stride[0]
        y = F.conv_transpose1d(x, conv.weight, None, stride, groups=conv.groups)
        tail = self._tails.get(id(layer))
        if tail is not None:
            y[..., : tail.shape[-1]] += tail
        done = x.shape[-1] * stride
        self._tails[id(layer)] = y[..., done:].clone()
        y = y[..., :done]
        return y if conv.bias is None else y + conv.bias[:, None]
