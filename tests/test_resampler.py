"""model.resampler: each is the call it names, is recorded wherever codes are made, and is followed from there."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import inference
from torchtitan.audio.codec import Codec
from torchtitan.audio.waveform import load_audio, require_resampler, resample
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.components.dataloader import LoaderSettings, SpeechDataLoader, max_frames_of
from torchtitan.datasets.corpora import find_data, open_corpora
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.shards import ShardedCodes, find_shards
from torchtitan.eval.benchmark import Options as Evaluation
from torchtitan.eval.benchmark import command
from torchtitan.eval.suites import SLM21
from torchtitan.tokenization.run import tokenize
from torchtitan.tokenization.spec import Options
from torchtitan.tools.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000)


def noise(rate: int, seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(rate * seconds))).astype(np.float32)


def flac(rate: int, seconds: float, seed: int = 0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(rate, seconds, seed), rate, format="FLAC")
    return file.getvalue()


@pytest.mark.parametrize("rate", RATES)
def test_soxr_hq_is_what_librosa_gives(rate):
    import soxr

    samples = noise(rate, 1.3)
    plain = soxr.resample(samples.astype(np.float64), rate, 24_000, quality="HQ").astype(np.float32)
    length = math.ceil(len(samples) * 24_000 / rate)
    expected = np.pad(plain, (0, length - len(plain)))  # librosa.util.fix_length
    np.testing.assert_array_equal(resample(torch.from_numpy(samples), rate, "soxr_hq").numpy(), expected)


@pytest.mark.parametrize("rate", [2_000, *RATES])
def test_a_cut_recording_is_the_start_of_the_whole_one(rate):
    data = flac(rate, 3.0)
    whole = load_audio(data, resampler="soxr_hq")
    assert torch.allclose(load_audio(data, 1.0, resampler="soxr_hq"), whole[:24_000], rtol=0, atol=2e-7)


FFMPEG = """
import io, sys
import av, numpy as np, soundfile, torch
from torchtitan.audio.waveform import load_audio, require_resampler, resample
require_resampler("ffmpeg")
for rate in (2_000, 8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000):
    samples = (0.1 * np.random.default_rng(0).standard_normal(round(1.3 * rate))).astype(np.float32)
    swr = av.AudioResampler(format="flt", layout="mono", rate=24_000)
    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate = rate
    expected = np.concatenate([f.to_ndarray()[0] for part in (frame, None) for f in swr.resample(part)])
    found = resample(torch.from_numpy(samples), rate, "ffmpeg").numpy()
    assert abs(len(found) - 24_000 * len(samples) / rate) <= 1, (rate, len(found))
    np.testing.assert_allclose(found, expected[: len(found)], rtol=0, atol=1e-7)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    whole, cut = (load_audio(file.getvalue(), seconds, resampler="ffmpeg") for seconds in (None, 1.0))
    assert torch.allclose(cut, whole[:24_000], rtol=0, atol=1e-7), rate
for samples in (1, 3, 40):
    assert resample(torch.ones(samples), 8_000, "ffmpeg").numel() == 3 * samples
print("equal")
"""


def test_ffmpeg_is_swresample(tmp_path):
    """Against PyAV's own binding of it, whose libraries torchcodec finds under their usual names."""
    av = pytest.importorskip("av")
    libraries = Path(av.__file__).parent.parent / "av.libs"
    if not libraries.is_dir():
        pytest.skip("PyAV came without FFmpeg's libraries")
    for library in libraries.glob("lib*.so.*"):
        if match := re.fullmatch(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)\..*", library.name):
            (tmp_path / (match[1] + match[2])).symlink_to(library)
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{libraries}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FFMPEG], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize(("name", "package"), [("soxr_hq", "soxr"), ("ffmpeg", "torchcodec")])
def test_a_missing_package_is_named(monkeypatch, mimi_folder, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'^resampler = "{name}" needs the package {package} \(pip install {package}'):
        Codec.load(mimi_folder, 4, resampler=name)


def test_without_ffmpegs_libraries_the_sentence_says_what_to_install(monkeypatch):
    def broken(*_):
        raise RuntimeError("Could not load libtorchcodec. Likely causes: ...")

    monkeypatch.setattr("torchtitan.audio.waveform._resample_by_ffmpeg", broken)
    with pytest.raises(UserError, match=r"needs the libraries of FFmpeg \(apt install ffmpeg\)"):
        require_resampler("ffmpeg")


def test_an_unknown_one_is_refused(mimi_folder):
    with pytest.raises(UserError, match="resampler must be one of torchaudio, soxr_hq, ffmpeg, not 'sox'"):
        Codec.load(mimi_folder, 4, resampler="sox")


def test_stored_codes_and_those_made_in_training_are_the_same(tmp_path, mimi_folder, write_rows, make_tokenizer):
    """And both those of the codec on what the named resampler gives."""
    from torchtitan.audio.token_stream import extend_tokenizer

    sounds = [flac(8_000, 0.5, seed) for seed in range(3)]
    data = tmp_path / "talks"
    write_rows(data / "train-0.parquet", [(str(i), sound, None) for i, sound in enumerate(sounds)])
    codec = Codec.load(mimi_folder, 4, resampler="soxr_hq")
    expected = [codec.encode([load_audio(sound, resampler="soxr_hq")])[0] for sound in sounds]
    assert not torch.equal(expected[0], codec.encode([load_audio(sounds[0])])[0])

    options = Options(
        *(str(data), str(tmp_path / "codes")),
        audio_tokenizer=str(mimi_folder),
        num_quantizers=4,
        num_processes=1,
        device="cpu",
        resampler="soxr_hq",
    )
    tokenize(options)
    stored = ShardedCodes(find_shards(tmp_path / "codes"))
    assert stored.header["resampler"] == "soxr_hq"
    for i, codes in enumerate(expected):
        np.testing.assert_array_equal(stored.codes(i), codes.T.numpy())

    tokenizer = make_tokenizer()
    ids = extend_tokenizer(tokenizer, 4)
    found = find_data([Source(name="talks", path=str(data))], 0)
    corpora, mixture = open_corpora(found, 0, max_frames_of(20.0), False, 0, shuffle=False)
    loader = SpeechDataLoader(corpora, mixture, ids, codec, tokenizer, LoaderSettings("a2a", 64, 3, 20.0))
    rows = next(iter(loader)).tokens
    for row, codes in zip(rows, expected, strict=True):
        sample = ids.sample(codes)
        assert torch.equal(row[: len(sample)], sample)


@pytest.fixture
def pairs(tmp_path) -> Path:
    folder = tmp_path / "sWUGGY"
    folder.mkdir()
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    sides = {
        name: [{"bytes": flac(8_000, 0.4, seed), "path": None}] for name, seed in (("positive", 1), ("negative", 2))
    }
    pq.write_table(pa.table({name: pa.array(side, audio) for name, side in sides.items()}), folder / "train-0.parquet")
    return folder


def test_inference_and_evaluations_follow_the_models_own(tmp_path, mimi_folder, save_speech_model, pairs):
    model = save_speech_model(tmp_path / "runs" / "model", mimi_folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "resampler": "soxr_hq"}))
    lm = SpeechLM.load(str(model), device="cpu")
    assert lm.codec.conventions()["resampler"] == "soxr_hq"
    prompt = tmp_path / "prompt.flac"
    prompt.write_bytes(flac(8_000, 0.5))
    (expected,) = lm.codec.encode([load_audio(prompt, resampler="soxr_hq")])
    assert torch.equal(inference.encode_prompt(lm, str(prompt), None)[0], expected)

    options = Evaluation(str(pairs), str(model), output_dir=str(tmp_path / "results"), device="cpu")
    assert command(SLM21, options) == 0
    (written,) = (tmp_path / "results").rglob("results.json")
    assert json.loads(written.read_text())["settings"]["codec"]["resampler"] == "soxr_hq"
    (samples,) = (tmp_path / "results").rglob("samples.parquet")
    (first,) = lm.codec.encode([load_audio(flac(8_000, 0.4, 1), resampler="soxr_hq")])
    positive = next(row for row in pq.read_table(samples).to_pylist() if row["side"] == "positive")
    assert positive["codes"] == first.T.flatten().tolist()

    with pytest.raises(UserError, match="the model was trained with resampler soxr_hq, not torchaudio"):
        SpeechLM.load(str(model), device="cpu", resampler="torchaudio")


def test_a_model_that_does_not_say_is_given_the_one_asked_for(speech_model):
    assert SpeechLM.load(str(speech_model(4)), device="cpu").codec.resampler == "torchaudio"
    assert SpeechLM.load(str(speech_model(4)), device="cpu", resampler="soxr_hq").codec.resampler == "soxr_hq"
