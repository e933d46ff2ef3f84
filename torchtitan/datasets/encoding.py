"""Encode waveforms in groups. A recording that makes its group fail is the only one that is lost."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from torchtitan.audio.codec import Codec, CodecError
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.datasets.decoding import Decoded

T = TypeVar("T")

# Minimum seconds of audio in a group, by the type of the codec's device. Groups do not help a CPU.
GROUP_SECONDS = {"cpu": 0.0, "cuda": 1280.0, "mps": 1280.0}
# Maximum seconds of decoded audio that waits for the codec. 1,000 s take 96 MB.
AHEAD_SECONDS = {"cpu": 120.0, "cuda": 2560.0, "mps": 600.0}


def encode_decoded(decoded: Iterable[Decoded], codec: Codec) -> Iterator[tuple[Decoded, torch.Tensor | str | None]]:
    """Encode recordings in groups of :data:`GROUP_SECONDS`.

    Yields:
        each recording in order, with its codes (int64 [Q, T]), with the reason why it is bad, or with None if it is
        outside the limits of its source.
    """
    group: list[Decoded] = []
    seconds = 0.0
    for recording in decoded:
        group.append(recording)
        seconds += recording.num_samples / SAMPLE_RATE
        if seconds >= GROUP_SECONDS[codec.device.type]:
            yield from _encode_group(group, codec)
            group, seconds = [], 0.0
    yield from _encode_group(group, codec)


def _encode_group(group: list[Decoded], codec: Codec) -> Iterator[tuple[Decoded, torch.Tensor | str | None]]:
    codes = iter(encode_each(codec.encode, [r.waveform for r in group if r.waveform is not None]))
    for recording in group:
        yield recording, recording.reason if recording.waveform is None else next(codes)


def encode_each(encode: Callable[[list[T]], list[torch.Tensor]], clips: list[T]) -> list[torch.Tensor | str]:
    """The codes of each clip, or the reason why it is bad.

    Args:
        encode: gives the codes [Q, T] of clips. If it fails with several clips, each clip is tried alone.

    Raises:
        torch.OutOfMemoryError: one clip alone does not fit into the device's memory.
    """
    if not clips:
        return []
    try:
        return list(encode(clips))
    except Exception as error:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises if the GPU itself has failed
        if len(clips) == 1:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error) if isinstance(error, CodecError) else f"{type(error).__name__}: {error}"
            return [f"its audio cannot be encoded ({reason.splitlines()[0].rstrip('.')})."]
    return [codes for clip in clips for codes in encode_each(encode, [clip])]
