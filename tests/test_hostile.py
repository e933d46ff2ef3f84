"""What one file can do: it costs itself, in one sentence, within bounds of time and memory."""

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from torchtitan.audio.codec import Codec
from torchtitan.audio.waveform import AudioError, load_audio, load_beginning
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.config_manager import ConfigManager
from torchtitan.datasets import lists
from torchtitan.datasets.decoding import decode_row
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.readers import AudioDataset, index_files
from torchtitan.datasets.rows import Row
from torchtitan.datasets.sources import find_files
from torchtitan.tools import retries
from torchtitan.tools.errors import ConfigError, UserError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: pytest.fail("this does not pass with time"))


def rows_of(path: Path) -> list[Row]:
    source = Source("mine", str(path))
    data = AudioDataset(source, index_files(source, find_files(source)))
    return [row for _, row in data.read(range(len(data)))]


def flac_that_declares(samples: int) -> bytes:
    """A FLAC of a second whose header states another number of samples (36 bits from byte 21 on)."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8_000, np.float32), 8_000, format="FLAC")
    data = bytearray(file.getvalue())
    data[21] = (data[21] & 0xF0) | (samples >> 32)
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def test_a_header_that_declares_hours_costs_no_memory():
    for samples in (1 << 34, (1 << 36) - 1):
        with pytest.raises(AudioError, match=r"damaged or cut off|not a readable audio file"):
            load_audio(flac_that_declares(samples))
        waveform, _ = load_beginning(flac_that_declares(samples), 0.5)
        assert waveform.shape == (12_000,)


@pytest.mark.parametrize(
    ("file_format", "subtype"), [("AU", "G721_32"), ("AU", "G723_24"), ("WAV", "GSM610"), ("WAV", "G721_32")]
)
@pytest.mark.parametrize("max_seconds", [None, 0.5])
def test_telephone_speech_is_read(file_format, subtype, max_seconds):
    file = io.BytesIO()
    tone = (0.3 * np.sin(np.arange(8_000) / 5)).astype(np.float32)
    soundfile.write(file, tone, 8_000, format=file_format, subtype=subtype)
    waveform = load_audio(file.getvalue(), max_seconds)
    assert abs(waveform.numel() - (24_000 if max_seconds is None else 12_000)) < 1_000
    assert 0.15 < waveform.std() < 0.3


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("odd"), MemoryError("odd"), OverflowError("odd")])
def test_whatever_reading_raises_is_the_recordings_own(monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(soundfile.SoundFile, "read", broken)
    with pytest.raises(AudioError, match=r"^x: cannot be decoded \(odd\)\.$"):
        load_audio(flac_that_declares(8_000), name="x")


def test_many_channels_are_mixed_as_they_are_read(tmp_path):
    """An hour of eight channels of silence, cut at 20 s and whole: in a process of its own, for its own peak."""
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 8_000, 8, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros((60 * 8_000, 8), np.int16))
    script = (
        "import resource, sys; from torchtitan.audio.waveform import load_audio\n"
        "load_audio(sys.argv[1], 1.0); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "first = load_audio(sys.argv[1], 20.0); cut = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(first.numel(), (cut - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    samples, mebibytes = map(int, done.stdout.split())
    assert samples == 480_000
    assert mebibytes < 100


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    lines = [{"audio": "/dev/zero"}, {"audio": "pipe.wav"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for row in rows_of(tmp_path / "metadata.jsonl"):
        with pytest.raises(AudioError, match=r"its audio: (this is not a regular file|there is no such file)\."):
            decode_row(row, 20.0, 5)


def test_loops_of_links_are_not_followed(tmp_path):
    (tmp_path / "good.wav").write_bytes(flac_that_declares(8_000))
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "up").symlink_to("..")
    rows = rows_of(tmp_path)
    assert sorted(Path(row.key).name for row in rows) == ["good.wav", "loop.wav"]
    assert not retries.may_pass(OSError(errno.ELOOP, "Too many levels of symbolic links"))
    loop = next(row for row in rows if row.key.endswith("loop.wav"))
    with pytest.raises(AudioError):
        decode_row(loop, 20.0, 5)


def test_deep_json_costs_its_row(tmp_path):
    deep = '{"audio": "a.wav", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    good = json.dumps({"audio": "a.wav"})
    (tmp_path / "list.jsonl").write_text("\n".join([good, deep, good]) + "\n")
    rows = rows_of(tmp_path / "list.jsonl")
    assert [row.error for row in rows] == [None, "the line's JSON is nested too deeply", None]
    (tmp_path / "list.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="its JSON is nested too deeply"):
        rows_of(tmp_path / "list.json")
    (tmp_path / "run.toml").write_text("x = " + "[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConfigError, match=r"nested too deeply|not valid TOML"):
        ConfigManager().parse_args(["--job.config_file", str(tmp_path / "run.toml")])


def test_a_line_without_end_is_refused_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "MAX_LINE_BYTES", 1 << 21)
    (tmp_path / "list.jsonl").write_bytes(b'{"audio": "' + b"x" * (1 << 25))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"a line is longer than 2,097,152 bytes"):
        rows_of(tmp_path / "list.jsonl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


def test_blocks_give_the_same_bits_as_one(monkeypatch):
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.default_rng(0).standard_normal((9_001, 3)), 8_000, format="WAV")
    whole = load_audio(file.getvalue())
    monkeypatch.setattr("torchtitan.audio.waveform._BLOCK_SAMPLES", 1_000)
    assert torch.equal(load_audio(file.getvalue()), whole)


# Models


@pytest.fixture
def speech_model(tmp_path, mimi_folder, save_speech_model) -> Path:
    return save_speech_model(tmp_path / "model", mimi_folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_comes_with_code_is_refused_by_name(speech_model, file):
    """Also where transformers would ask at the terminal, or has the class itself and would pass over the code."""
    (speech_model / "planted.py").write_text("raise SystemExit('the code ran')")
    config = json.loads((speech_model / file).read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "planted.Model", "AutoTokenizer": ["planted.Tokenizer", None]}
    (speech_model / file).write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"model: {file} asks for Python code of the model \(auto_map\)"):
        SpeechLM.load(str(speech_model), device="cpu")


def test_pickled_weights_are_refused(speech_model, mimi_folder, tmp_path):
    (speech_model / "model.safetensors").unlink()
    torch.save({}, speech_model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model: no language model could be loaded .*model\.safetensors"):
        SpeechLM.load(str(speech_model), device="cpu")
    codec = tmp_path / "codec"
    codec.mkdir()
    shutil.copy(Path(mimi_folder) / "config.json", codec)
    torch.save({}, codec / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"codec: no codec could be loaded .*model\.safetensors"):
        Codec.load(str(codec), 4)
