"""Audio in: any container, rate and channel count gives the same 24 kHz mono; damaged files give one sentence."""

import io
import math
import random

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional

from torchtitan.audio import waveform as waveforms
from torchtitan.audio.recording import Part, Samples, audio_of
from torchtitan.audio.waveform import SAMPLE_RATE, AudioError, load_audio, load_beginning, resample

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


@pytest.mark.parametrize("rate", [8_000, 44_100, 384_000, 37_800, 47_952, 44_056])
def test_rates_follow_the_formula(rate):
    samples = make_signal(rate, 0.5)[:, 0]
    waveform = resample(torch.from_numpy(samples), rate)
    assert waveform.numel() == math.ceil(len(samples) * SAMPLE_RATE / rate)
    for position in [0, 1, 2, 777, 6_000, 11_111, waveform.numel() - 2, waveform.numel() - 1]:
        assert waveform[position].item() == pytest.approx(interpolate(samples, rate, position), abs=2e-5)


@pytest.mark.parametrize(
    "rate",
    [
        *(
            2_000,
            4_000,
            5_512,
            6_000,
            7_350,
            8_000,
            8_012,
            9_600,
            11_025,
            12_000,
            14_700,
            16_000,
            18_900,
            20_000,
            22_050,
        ),
        *(
            22_254,
            24_000,
            25_000,
            32_000,
            32_768,
            37_800,
            44_056,
            44_100,
            47_952,
            48_000,
            48_048,
            50_000,
            64_000,
            65_536,
        ),
        *(88_200, 96_000, 176_400, 192_000, 352_800, 384_000, 705_600, 768_000, 8_013, 11_127, 22_255),
    ],
)
def test_rates_in_use_are_resampled(rate, monkeypatch):
    monkeypatch.setattr(torchaudio.functional, "resample", lambda waveform, *_: waveform)  # the largest take seconds
    assert resample(torch.ones(1), rate).numel() == 1


@pytest.mark.parametrize("rate", [44_101, 23_999, 47_999, 192_001])
def test_rates_without_a_small_filter_are_refused(rate):
    data = encode(make_signal(rate, 0.1), rate, "WAV")
    with pytest.raises(AudioError) as caught:
        load_audio(data, name="x.wav")
    assert str(caught.value).startswith(f"x.wav: a sample rate of {rate} Hz")
    assert "such as 24000 Hz, with another tool." in str(caught.value)
    assert load_audio(data, resampler="soxr_hq").numel() == math.ceil(round(0.1 * rate) * SAMPLE_RATE / rate)


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


@pytest.mark.parametrize("rate", [*RATES, 47_952, 2_000])
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


# --- parts of recordings


@pytest.mark.parametrize(
    ("file_format", "subtype"),
    [("WAV", "PCM_16"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("WAV", "GSM610")],
)
@pytest.mark.parametrize("part", [(0.0, 0.5), (0.123, 0.4567), (1.00003, 1.75), (1.5, None), (1.9, 2.05)])
def test_a_part_is_the_slice_that_soundfile_gives(tmp_path, monkeypatch, file_format, subtype, part):
    monkeypatch.setattr(waveforms, "_SKIP_SAMPLES", 1000)
    path = tmp_path / "x.mp3"  # libsndfile knows an MP3 by its name
    path.write_bytes(encode(make_signal(8_000, 2.0), 8_000, file_format, subtype))
    info = soundfile.info(path)
    rate = info.samplerate
    start, stop = round(part[0] * rate), info.frames if part[1] is None else min(round(part[1] * rate), info.frames)
    if subtype == "GSM610":  # libsndfile does not seek in it
        samples = soundfile.read(path, dtype="float32")[0][start:stop]
    else:
        samples = soundfile.read(path, dtype="float32", start=start, stop=stop)[0]
    expected = resample(torch.from_numpy(samples), rate)
    with path.open("rb") as file:
        for source in (path, path.read_bytes(), file):
            found, seconds = load_beginning(source, part=Part(*part))
            assert torch.equal(found, expected)
            assert seconds == pytest.approx(len(samples) / rate)
            beginning, whole = load_beginning(source, 0.05, part=Part(*part))
            assert torch.equal(beginning, expected[:1_200]) and whole == pytest.approx(seconds)


def test_a_part_may_end_a_little_after_its_recording():
    data = encode(make_signal(8_000, 2.0), 8_000, "WAV")
    whole = load_beginning(data, part=Part(1.0))[0]
    for stop in (2.0, 2.004, 2.1):
        found, seconds = load_beginning(data, part=Part(1.0, stop))
        assert torch.equal(found, whole) and seconds == 1.0


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (Part(1.0, 2.2), "x: the part from 1 s to 2.2 s is not in the recording, which is 2 s long."),
        (Part(2.0, 2.05), "x: the part from 2 s to 2.05 s is not in the recording, which is 2 s long."),
        (Part(3.0), "x: the part from 3 s is not in the recording, which is 2 s long."),
        (Part(0.5, 0.5), "x: the part from 0.5 s to 0.5 s holds no samples."),
        (Part(0.5, 1.0, 2), "x: there is no channel 2 (the file has 2, from 0)."),
    ],
)
@pytest.mark.parametrize("max_seconds", [None, 0.1])
def test_a_part_that_is_not_there(part, said, max_seconds):
    data = encode(make_signal(8_000, 2.0, 2), 8_000, "WAV")
    with pytest.raises(AudioError) as error:
        load_beginning(data, max_seconds, "x", part=part)
    assert str(error.value) == said


def test_a_part_may_be_one_channel():
    samples = make_signal(SAMPLE_RATE, channels=3)
    data = encode(samples, SAMPLE_RATE, "WAV", "FLOAT")
    for channel in range(3):
        found = load_beginning(data, part=Part(0.25, 0.5, channel))[0]
        assert torch.equal(found, torch.from_numpy(samples[6_000:12_000, channel]))
    mono = encode(samples[:, :1], SAMPLE_RATE, "WAV", "FLOAT")
    assert torch.equal(load_beginning(mono, part=Part(channel=0))[0], load_audio(mono))


@pytest.mark.parametrize("file_format", ["WAV", "FLAC"])
def test_a_part_does_not_cost_its_recording(file_format):
    data = encode(make_signal(8_000, 300.0), 8_000, file_format)

    class Counting(io.BytesIO):
        count = 0

        def read(self, size=-1):
            found = super().read(size)
            self.count += len(found)
            return found

        def readinto(self, buffer):
            self.count += (size := super().readinto(buffer))
            return size

    source = Counting(data)
    assert load_beginning(source, part=Part(200.0, 201.0))[1] == 1.0
    assert 0 < source.count < len(data) / 8


# --- audio that is decoded


@pytest.mark.parametrize(("kind", "subtype"), [(np.float32, "FLOAT"), (np.float64, "DOUBLE")])
@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
@pytest.mark.parametrize("as_list", [True, False])
def test_decoded_audio_is_that_of_a_float_file(kind, subtype, rate, as_list):
    values = make_signal(rate)[:, 0].astype(kind) / 3
    file = encode(values, rate, "WAV", subtype)
    samples = audio_of({"array": values.tolist() if as_list else values, "sampling_rate": rate, "path": "x.wav"})
    assert isinstance(samples, Samples)
    for max_seconds, part in ((None, None), (0.3, None), (None, Part(0.2, 0.6)), (0.1, Part(0.2, 0.6))):
        found, expected = (load_beginning(source, max_seconds, part=part) for source in (samples, file))
        assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.parametrize(
    ("array", "rate", "said"),
    [
        ([0.1], None, "a sample rate of None Hz holds no speech"),
        ([0.1], 100, "a sample rate of 100 Hz holds no speech"),
        ([], 16_000, "holds no samples"),
        ([0.1, float("nan")], 16_000, "not finite"),
        ([0.1, None], 16_000, "not finite"),
        ([3000.0], 16_000, "samples reach 3000 where full scale is 1.0"),
    ],
)
def test_decoded_audio_that_cannot_be_used(array, rate, said):
    with pytest.raises(AudioError, match=said):
        load_audio(audio_of({"array": array, "sampling_rate": rate}))


def test_kinds_of_cells():
    samples = {"array": [0.5], "sampling_rate": 8_000.0}
    assert audio_of(samples).rate == 8_000
    assert audio_of({**samples, "bytes": b"x"}) == audio_of({"bytes": b"x", "path": "p"}) == audio_of(b"x") == b"x"
    assert audio_of({"bytes": None, "path": "p"}) == audio_of("p") == "p"
    for nothing in (None, "", 3, {}, {"bytes": None, "path": None}, {"array": None, "sampling_rate": 8_000}):
        assert audio_of(nothing) is None
    with pytest.raises(ValueError, match="no plain list of numbers"):
        audio_of({"array": [[0.1], [0.2]], "sampling_rate": 8_000})
