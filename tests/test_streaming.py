"""Decoding while codes arrive: the pieces together are the whole decode, however they are cut."""

import pytest
import torch

from torchtitan.audio.codec import Codec
from torchtitan.audio.streaming import StreamingDecoder


def pieces(codec: Codec, codes: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The waveforms of frames that come in groups of the given sizes, over and over."""
    decoder, found, start, i = StreamingDecoder(codec), [], 0, 0
    while start < codes.shape[1]:
        found.append(decoder.decode(codes[:, start : start + sizes[i % len(sizes)]]))
        start, i = start + sizes[i % len(sizes)], i + 1
    return found


@pytest.mark.parametrize("num_quantizers", [1, 4, 8])
@pytest.mark.parametrize("sizes", [[1], [2, 3, 1, 7], [50, 1, 1], [400]])
def test_any_chunking_is_the_whole_decode(mimi_folder, random_codes, num_quantizers, sizes):
    codec = Codec.load(mimi_folder, num_quantizers)
    codes = random_codes(num_quantizers, 140)  # 280 positions: more than the window of 250
    whole = codec.model.decode(codes[None]).audio_values[0, 0]
    streamed = pieces(codec, codes, sizes)
    assert streamed[0].numel() == 1920 * min(sizes[0], 140)
    result = torch.cat(streamed)
    assert result.shape == whole.shape
    assert (result - whole).norm() / whole.norm() < 1e-5
    assert (result - whole).abs().max() / whole.abs().max() < 1e-4


def test_decoding_long_codes_in_pieces(mimi_folder, random_codes):
    codec = Codec.load(mimi_folder, 4, window="full")
    codes = random_codes(4, 600)
    whole = codec.model.decode(codes[None]).audio_values[0, 0]
    result = codec.decode(codes)
    assert (result - whole).norm() / whole.norm() < 1e-5


def test_two_streams_are_independent(codec, random_codes):
    first, second = random_codes(4, 12, seed=1), random_codes(4, 12, seed=2)
    one, other = StreamingDecoder(codec), StreamingDecoder(codec)
    mixed = [(one.decode(first[:, i : i + 3]), other.decode(second[:, i : i + 3])) for i in range(0, 12, 3)]
    for codes, parts in ((first, [a for a, _ in mixed]), (second, [b for _, b in mixed])):
        assert torch.equal(torch.cat(parts), torch.cat(pieces(codec, codes, [3])))


def test_state_does_not_grow(codec, random_codes):
    decoder = StreamingDecoder(codec)
    sizes = []
    for start in range(0, 400, 100):
        decoder.decode(random_codes(4, 100, seed=start))
        layers = decoder._cache.layers
        sizes.append(
            sum(tail.numel() for tail in decoder._tails.values()) + sum(layer.keys.numel() for layer in layers)
        )
    assert sizes[1] == sizes[2] == sizes[3]


def test_nothing_to_decode(codec):
    assert StreamingDecoder(codec).decode(torch.zeros(4, 0, dtype=torch.int64)).shape == (0,)
