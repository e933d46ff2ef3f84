"""Audio files in, 24 kHz mono waveforms out.

This is the one place where audio is read, cut, mixed and resampled. Training, inference and the evaluations call
:func:`load_audio`, so the same file gives the same samples everywhere. libsndfile decodes (wav, flac, ogg, opus, mp3,
aiff, ...) from a path, from bytes or from an open file. One of :data:`RESAMPLERS` resamples. Its name is stored with
everything that is derived from its output, since it decides some of the codes:

``torchaudio``  ``torchaudio.functional.resample`` with its defaults.
``soxr_hq``     the SoX resampler at quality HQ, as the ``datasets`` library before version 4 called it through librosa.
``ffmpeg``      FFmpeg's swresample with its defaults, as ``datasets`` calls it since, through torchcodec.
"""

import io
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtitan.audio.recording import AudioSource, Part, Samples
from torchtitan.tools.errors import UserError, first_line

SAMPLE_RATE = 24_000
# Samples in a frame of the codec, and frames a second.
FRAME_SIZE = 1920
FRAME_RATE = SAMPLE_RATE / FRAME_SIZE
RESAMPLERS = ("torchaudio", "soxr_hq", "ffmpeg")

# A recording at a lower rate holds no speech; a header that states one is broken.
MIN_RATE = 2_000
# Full scale is 1.0. Loud float recordings overshoot a little. A file beyond this was never normalised, for example one
# with integers stored as floats, and the codec was never trained on such values.
MAX_PEAK = 16.0

# Audio that is read beyond a limit, so that no resampler's filter reaches past its end. The longest filter, that of
# soxr_hq, reaches about 100 samples.
_LOOK_AHEAD_SECONDS = 0.1
# Seconds by which a part may end after its recording, since times may be rounded.
MAX_OVERSHOOT = 0.1
# The header of a file of unknown length states at least so many samples.
_UNKNOWN = 1 << 60
# Samples that are read at a time, and dropped at a time where libsndfile cannot seek.
_BLOCK_SAMPLES = 1 << 20
_SKIP_SAMPLES = 1 << 20

# torchaudio's filter has a row for each of 24,000 / g output phases, where g is the rate's greatest common divisor with
# 24,000. This many coefficients take 128 MiB, and 0.6 GB while they are computed. Rates in use need up to 0.4 million
# (65,536 Hz) and those of old hardware up to 30 million (11,127 Hz); 44,101 Hz would need a billion.
_MAX_COEFFICIENTS = 1 << 25
_LOWPASS_FILTER_WIDTH = 6
_ROLLOFF = 0.99


class AudioError(UserError):
    """A file that cannot be used as audio; the message is one sentence that names the file and the reason."""


def load_audio(
    source: AudioSource,
    max_seconds: float | None = None,
    name: str | None = None,
    resampler: str = "torchaudio",
) -> torch.Tensor:
    """Read audio as a mono waveform at 24 kHz.

    Args:
        source: path of an audio file, the bytes of one, one that is open, or decoded audio.
        max_seconds: keep only this much from the start. The result equals the start of the whole file's result (with
            soxr_hq up to rounding in fp32).
        name: what to call the audio in error messages; the path, if there is one, otherwise.
        resampler: one of :data:`RESAMPLERS`.

    Returns:
        float32 tensor [n], n >= 1.

    Raises:
        AudioError: the audio is missing, unreadable, truncated, empty, not finite, not normalised, or at a rate
            that is below 2 kHz or that :func:`resample` refuses.
    """
    return load_beginning(source, max_seconds, name, resampler)[0]


def load_beginning(
    source: AudioSource,
    max_seconds: float | None = None,
    name: str | None = None,
    resampler: str = "torchaudio",
    part: Part | None = None,
) -> tuple[torch.Tensor, float]:
    """As :func:`load_audio`, and the length of the whole recording in seconds, as its header states it.

    Args:
        part: the part of the file that is the recording. It is cut out before anything else is done to it.

    Raises:
        AudioError: also where the part is not in the file: it ends more than :data:`MAX_OVERSHOOT` after it, holds no
            sample, or is of a channel that the file does not have.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "audio")
    samples, rate, num_samples = _read(source, max_seconds, name, part or Part())
    try:
        waveform = resample(samples, rate, resampler)
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from None
    if max_seconds is not None:
        waveform = waveform[: round(max_seconds * SAMPLE_RATE)]
    return waveform, num_samples / rate


def _read(source: AudioSource, max_seconds: float | None, name: str, part: Part) -> tuple[torch.Tensor, int, int]:
    """Decode a part of a file to mono float32 [n] at the file's own rate; with ``max_seconds`` a little more than that.

    Returns the samples, their rate, and how many the whole part has.
    """
    import soundfile

    if isinstance(source, bytes):
        empty = not source
    elif isinstance(source, str | Path):
        if not os.path.isfile(source):
            raise AudioError(f"{name}: there is no such file.")
        empty = os.path.getsize(source) == 0
    else:
        empty = not isinstance(source, Samples) and source.seek(0, os.SEEK_END) == 0
    if empty:
        raise AudioError(f"{name}: the file is empty.")
    try:
        with open_audio(source) as file:
            rate, is_mp3 = file.samplerate, file.format.startswith("MP3")
            first, declared, wanted = _span(part, max_seconds, rate, file.frames, name)
            if part != Part():
                _go_to(file, first)
            if part.channel is not None and part.channel >= file.channels:
                raise AudioError(f"{name}: there is no channel {part.channel} (the file has {file.channels}, from 0).")
            waveform = _read_mono(file, wanted, part.channel)
    except AudioError:
        raise
    except soundfile.LibsndfileError as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        # libsndfile tries a resource fork and a file's name last and reports that attempt when nothing fits.
        if reason.startswith(("Error : bad data", "Error : bad map", "Error : bad resource", "File does not exist")):
            reason = "Format not recognised"
        reason = reason.removeprefix("Error : ")
        raise AudioError(f"{name}: not a readable audio file ({reason}).") from None
    except (ValueError, RuntimeError, MemoryError, OverflowError, OSError) as error:
        raise AudioError(f"{name}: cannot be decoded ({first_line(error)}).") from None
    expected = declared if wanted < 0 else min(declared, wanted)
    # The length of an MP3 is an estimate; every other format states it.
    found = waveform.numel()
    if found < expected * (0.9 if is_mp3 else 1.0) and declared < _UNKNOWN:
        raise AudioError(f"{name}: the file is damaged or cut off ({found:,} of {expected:,} samples are readable).")
    if found == 0:
        raise AudioError(f"{name}: the file holds no samples.")
    if not torch.isfinite(waveform).all():
        raise AudioError(f"{name}: some samples are not finite numbers (NaN or infinity).")
    peak = waveform.abs().max().item()
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name}: samples reach {peak:.4g} where full scale is 1.0; normalise the file to the range -1 to 1."
        )
    # The header of a file of unknown length states a huge number; its length is what was read.
    return waveform, rate, declared if 0 <= wanted < declared < _UNKNOWN else found


def _read_mono(file: Any, wanted: int, channel: int | None) -> torch.Tensor:
    """The next ``wanted`` samples (-1: all that follow) as float32 [n]: one channel, or the mean of all.

    In blocks, so that no more than one block of many channels is in memory.
    """
    blocks, left = [], wanted
    while left:
        block = file.read(_BLOCK_SAMPLES if left < 0 else min(left, _BLOCK_SAMPLES), dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        left -= len(block) if left > 0 else 0
        mono = torch.from_numpy(block)
        blocks.append(mono[:, channel].clone() if channel is not None else mono.mean(dim=1))
    return torch.cat(blocks) if blocks else torch.zeros(0)


def _span(part: Part, max_seconds: float | None, rate: Any, frames: int, name: str) -> tuple[int, int, int]:
    """(number of the part's first sample, of its samples, of those to read; -1 reads all) in a file of ``frames``."""
    if not isinstance(rate, int) or rate < MIN_RATE:
        raise AudioError(f"{name}: a sample rate of {rate} Hz holds no speech (at least {MIN_RATE:,} Hz needed).")
    first, known = round(part.start * rate), frames < _UNKNOWN
    last = frames if part.stop is None else round(part.stop * rate)
    if known and (last > frames + MAX_OVERSHOOT * rate or (part != Part() and first >= frames)):
        end = "" if part.stop is None else f" to {part.stop:g} s"
        raise AudioError(
            f"{name}: the part from {part.start:g} s{end} is not in the recording, which is {frames / rate:g} s long."
        )
    if part.stop is not None and last <= first:
        raise AudioError(f"{name}: the part from {part.start:g} s to {part.stop:g} s holds no samples.")
    length = (min(last, frames) if known else last) - first
    wanted = length if known or part.stop is not None else -1
    if max_seconds is not None:
        beginning = math.ceil((max_seconds + _LOOK_AHEAD_SECONDS) * rate)
        wanted = beginning if wanted < 0 else min(wanted, beginning)
    return first, length, wanted


def _go_to(file: Any, samples: int) -> None:
    """Go to a place in a file that is open at its start.

    It seeks to 0 as well: libsndfile then decodes an MP3 with other last bits, the same as those of any other part.
    """
    if file.seekable():
        file.seek(samples)
        return
    while samples > 0 and (dropped := len(file.read(min(samples, _SKIP_SAMPLES), dtype="float32"))):
        samples -= dropped


class _Decoded:
    """Decoded audio with the part of soundfile.SoundFile's interface that is used here."""

    format = ""

    def __init__(self, source: Samples):
        self._array, self.samplerate, self.frames = source.array, source.rate, len(source.array)

    def seekable(self) -> bool:
        return True

    def seek(self, samples: int) -> None:
        self._array = self._array[samples:]

    def read(self, samples: int, **_: Any) -> np.ndarray:
        return self._array[: None if samples < 0 else samples, None].copy()


@contextmanager
def open_audio(source: AudioSource) -> Iterator[Any]:
    """Open audio as a soundfile.SoundFile (decoded audio as what can be read like one), at its start.

    libsndfile recognises an MP3 by its path alone, not through callbacks: bytes that start like one go through a
    temporary file.
    """
    import soundfile

    if isinstance(source, Samples):
        yield _Decoded(source)
        return
    if isinstance(source, str | Path):
        with soundfile.SoundFile(str(source)) as file:
            yield file
        return
    data = io.BytesIO(source) if isinstance(source, bytes) else source
    data.seek(0)
    start = data.read(3)
    data.seek(0)
    if start == b"ID3" or (start[:1] == b"\xff" and start[1:2] >= b"\xe0"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "audio.mp3"
            path.write_bytes(data.read())
            with soundfile.SoundFile(str(path)) as file:
                yield file
    else:
        with soundfile.SoundFile(data) as file:
            yield file


def pcm16(waveform: torch.Tensor) -> bytes:
    """A float waveform [n] in 16 bits, little-endian, clipped to full scale.

    Raises:
        UserError: samples that are not finite.
    """
    if not torch.isfinite(waveform).all():
        raise UserError("the codec gave samples that are not finite numbers.")
    return (waveform.clamp(-1.0, 1.0) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()


def recorded_resampler(record: str | None) -> str:
    """The resampler that stored codes or a config.json name; without a name, or spelled out as once, ``torchaudio``."""
    return "torchaudio" if record is None or record.startswith("torchaudio.") else record


def require_resampler(name: str) -> None:
    """Refuse a resampler that there is none of, or whose package does not work here.

    Raises:
        UserError: with what to install.
    """
    if name not in RESAMPLERS:
        raise UserError(f"resampler must be one of {', '.join(RESAMPLERS)}, not {name!r}.")
    try:
        resample(torch.zeros(8), 8_000, name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UserError(f'resampler = "{name}" needs the package {package} (pip install {package}).') from None
    except (ImportError, RuntimeError, OSError):
        raise UserError(
            f'resampler = "{name}": torchcodec cannot be loaded; it needs the libraries of FFmpeg (apt install ffmpeg) '
            "and a version of its own that suits the installed torch."
        ) from None


def resample(waveform: torch.Tensor, rate: int, resampler: str = "torchaudio") -> torch.Tensor:
    """Resample a waveform [n] from ``rate`` Hz to 24 kHz: float32 [ceil(n * 24000 / rate)].

    Each equals the call that :data:`RESAMPLERS` names; ``ffmpeg`` may give a sample less.

    Raises:
        AudioError: torchaudio's filter would not fit into memory, as for 44,101 Hz.
    """
    if rate == SAMPLE_RATE:
        return waveform
    if resampler == "soxr_hq":
        return _resample_by_soxr(waveform, rate)
    if resampler == "ffmpeg":
        return _resample_by_ffmpeg(waveform, rate)
    import torchaudio.functional

    divisor = math.gcd(rate, SAMPLE_RATE)
    reduced_rate, reduced_target = rate // divisor, SAMPLE_RATE // divisor
    width = math.ceil(_LOWPASS_FILTER_WIDTH * reduced_rate / (min(reduced_rate, reduced_target) * _ROLLOFF))
    if reduced_target * (reduced_rate + 2 * width) > _MAX_COEFFICIENTS:
        raise AudioError(
            f"a sample rate of {rate} Hz needs a resampling filter that does not fit into memory; convert the file to "
            f"a common rate, such as {SAMPLE_RATE} Hz, with another tool."
        )
    return torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)


def _resample_by_soxr(waveform: torch.Tensor, rate: int) -> torch.Tensor:
    """As ``librosa.resample(..., res_type="soxr_hq")``, which cuts or fills up to the exact length."""
    import soxr

    resampled = torch.from_numpy(soxr.resample(waveform.numpy(), rate, SAMPLE_RATE, quality="HQ"))
    length = math.ceil(waveform.numel() * SAMPLE_RATE / rate)
    return torch.nn.functional.pad(resampled, (0, length - resampled.numel()))


def _resample_by_ffmpeg(waveform: torch.Tensor, rate: int) -> torch.Tensor:
    """What torchcodec decodes of a WAV with these samples."""
    import soundfile
    from torchcodec.decoders import AudioDecoder

    file = io.BytesIO()
    soundfile.write(file, waveform.numpy(), rate, format="WAV", subtype="FLOAT")
    resampled = AudioDecoder(file.getvalue(), sample_rate=SAMPLE_RATE).get_all_samples().data[0]
    if resampled.numel() == 0:  # fewer samples than its filter is long
        return torch.zeros(math.ceil(waveform.numel() * SAMPLE_RATE / rate))
    return resampled
