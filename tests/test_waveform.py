"""Audio in: any container, rate and channel count gives the same 24 kHz mono; damaged files give one sentence."""

import io
import math
import random

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional

from torchtitan.audio.waveform import SAMPLE_RATE, AudioError, load_audio, resample

RATES = [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 384_000]


def make_signal(rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    """Tones and noise as float32 [n, channels] within -1 to 1."""
    n = round(seconds * rate)
    t = np.arange(n)[:, None] / rate
    noise = np.random.default_rng(0).standard_normal((n, channels))
    tones = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.2 * np.sin(2 * np.pi * (1_000 + 100 * np.arange(channels)) * t)
    return (tones + 0.05 * noise).clip(-1, 1).astype(np.float32)


def encode(samples: np.ndarray, rate: int, file_format: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


def interpolate(samples: np.ndarray, rate: int, position: int) -> float:
    """One output sample at 24 kHz in float64: a sinc of six zero crossings under a Hann window, rolled off at 0.99."""
    cutoff = 0.99 * min(rate, SAMPLE_RATE)
    x = (np.arange(len(samples)) / rate - position / SAMPLE_RATE) * cutoff
    kernel = np.where(np.abs(x) < 6, np.sinc(x) * np.cos(x * np.pi / 12) ** 2, 0.0)
    return float(np.sum(samples * kernel) * cutoff / rate)


@pytest.mark.parametrize("rate", RATES)
def test_rates_equal_torchaudio(tmp_path, rate):
    samples = make_signal(rate)
    path = tmp_path / "x.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    expected = torchaudio.functional.resample(torch.from_numpy(samples[:, 0]), rate, SAMPLE_RATE)
    waveform = load_audio(path)
    assert waveform.dtype == torch.float32
    assert waveform.shape == (SAMPLE_RATE,)
    assert torch.equal(waveform, expected)


@pytest.mark.parametrize("rate", [8_000, 44_100, 384_000, 44_101, 23_999, 192_001])
def test_rates_follow_the_formula(rate):
    samples = make_signal(rate, 0.5)[:, 0]
    waveform = resample(torch.from_numpy(samples), rate)
    assert waveform.numel() == math.ceil(len(samples) * SAMPLE_RATE / rate)
    for position in [0, 1, 2, 777, 6_000, 11_111, waveform.numel() - 2, waveform.numel() - 1]:
        assert waveform[position].item() == pytest.approx(interpolate(samples, rate, position), abs=2e-5)


def test_native_rate_is_left_alone():
    samples = make_signal(SAMPLE_RATE)
    assert torch.equal(load_audio(encode(samples, SAMPLE_RATE, "WAV", "FLOAT")), torch.from_numpy(samples[:, 0]))


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_channels_are_averaged(channels):
    samples = make_signal(SAMPLE_RATE, channels=channels)
    waveform = load_audio(encode(samples, SAMPLE_RATE, "WAV", "FLOAT"))
    np.testing.assert_allclose(waveform.numpy(), samples.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("file_format", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("WAV", "ULAW", 0.05),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
        ("AIFF", "PCM_16", 2**-15),
        ("CAF", "PCM_16", 2**-15),
        ("W64", "PCM_16", 2**-15),
        ("AU", "PCM_16", 2**-15),
    ],
)
def test_sample_formats(tmp_path, file_format, subtype, error):
    samples = make_signal(SAMPLE_RATE)
    data = encode(samples, SAMPLE_RATE, file_format, subtype)
    path = tmp_path / "no-ending"
    path.write_bytes(data)
    waveform = load_audio(path)
    assert np.abs(waveform.numpy() - samples[:, 0]).max() <= error
    assert torch.equal(load_audio(data), waveform)


@pytest.mark.parametrize(("file_format", "subtype"), [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")])
@pytest.mark.parametrize("seconds", [0.05, 3.0])
def test_lossy_formats(tmp_path, file_format, subtype, seconds):
    samples = make_signal(SAMPLE_RATE, seconds)
    data = encode(samples, SAMPLE_RATE, file_format, subtype)
    path = tmp_path / "x"
    path.write_bytes(data)
    waveform = load_audio(path)
    assert torch.equal(load_audio(data), waveform)  # libsndfile alone does not open an MP3 from memory
    if seconds == 3.0:
        assert abs(waveform.numel() - len(samples)) <= 0.1 * SAMPLE_RATE
        n = min(waveform.numel(), len(samples))
        assert np.corrcoef(waveform[:n].numpy(), samples[:n, 0])[0, 1] > 0.9


@pytest.mark.parametrize("rate", [*RATES, 44_101, 2_000])
@pytest.mark.parametrize("max_seconds", [0.001, 0.5, 0.7777, 5.0])
def test_max_seconds_is_the_start_of_the_whole(rate, max_seconds):
    data = encode(make_signal(rate), rate, "WAV", "FLOAT")
    whole, start = load_audio(data), load_audio(data, max_seconds)
    assert start.numel() == min(round(max_seconds * SAMPLE_RATE), whole.numel())
    assert (start - whole[: start.numel()]).abs().max() <= 1e-6


@pytest.mark.parametrize(("file_format", "subtype"), [("MP3", None), ("OGG", "VORBIS"), ("FLAC", None)])
def test_max_seconds_of_compressed_files(file_format, subtype):
    data = encode(make_signal(16_000, 3.0), 16_000, file_format, subtype)
    assert torch.equal(load_audio(data, 1.0), load_audio(data)[:SAMPLE_RATE])


def refused(source, words: str, name: str | None = None) -> None:
    with pytest.raises(AudioError) as caught:
        load_audio(source, name=name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    refused(tmp_path / "missing.wav", "no such file")
    refused(tmp_path, "no such file")
    refused("x" * 300, "no such file")


def test_empty_and_foreign_files(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(b"")
    refused(path, f"{path}: the file is empty")
    refused(b"", "clip 7: the file is empty", name="clip 7")
    path.write_text("this is text, not audio\n" * 30)
    refused(path, "not a readable audio file (Format not recognised)")
    noise = random.Random(0).randbytes(20_000)
    for start in (b"", b"ID3", b"\xff\xfb"):
        refused(start + noise, "not a readable audio file")
    path = tmp_path / "noise.mp3"
    path.write_bytes(noise)
    refused(path, "not a readable audio file (Format not recognised)")


def test_no_samples():
    refused(encode(np.zeros((0, 1)), 16_000, "WAV"), "no samples")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite(value):
    samples = make_signal(16_000)
    samples[500] = value
    refused(encode(samples, 16_000, "WAV", "FLOAT"), "not finite")


def test_loudness():
    samples = make_signal(16_000)
    loud = load_audio(encode(3 * samples, 16_000, "WAV", "FLOAT"))
    torch.testing.assert_close(loud, 3 * load_audio(encode(samples, 16_000, "WAV", "FLOAT")))
    refused(encode(32_768 * samples, 16_000, "WAV", "FLOAT"), "normalise")


def test_rate_too_low():
    refused(encode(np.zeros((100, 1)), 1, "WAV"), "1 Hz")


def test_silence_and_a_single_sample():
    assert not load_audio(encode(np.zeros((16_000, 1)), 16_000, "WAV")).any()
    assert load_audio(encode(np.full((1, 1), 0.5), 16_000, "WAV")).numel() == 2


@pytest.mark.parametrize("kept", [0.001, 0.3, 0.9, 0.999])
def test_cut_off_flac(kept):
    data = encode(make_signal(16_000, 3.0), 16_000, "FLAC")
    refused(data[: int(kept * len(data))], "audio")


def test_flipped_bits_in_flac():
    data = bytearray(encode(make_signal(16_000, 3.0), 16_000, "FLAC"))
    for position in range(5_000, len(data), 2_000):
        data[position] ^= 0x10
    refused(bytes(data), "audio")


@pytest.mark.parametrize(
    ("file_format", "subtype"),
    [("WAV", None), ("AIFF", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)],
)
def test_damage_gives_a_sentence_or_sound_samples(file_format, subtype):
    whole = encode(make_signal(16_000, 2.0), 16_000, file_format, subtype)
    rng, sentences = random.Random(0), []
    for _ in range(12):
        data = bytearray(whole)
        for _ in range(30):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        data = bytes(data[: rng.randrange(len(data) // 2, len(data))])
        try:
            waveform = load_audio(data)
        except AudioError as error:
            sentences.append(str(error))
            continue
        assert waveform.dim() == 1
        assert waveform.numel() >= 1
        assert torch.isfinite(waveform).all()
    assert not any("\n" in sentence for sentence in sentences)
