"""scripts/train_codec.py makes a codec that loads, the same from the same seed, whether it was stopped or not."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from scripts import train_codec
from torchtitan.audio.codec import Codec
from torchtitan.tools.errors import UserError

ROOT = Path(__file__).parent.parent
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def tone_speech(seed: int, seconds: float) -> np.ndarray:
    """Buzzes whose pitch and formant wander: enough structure to learn. float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16_000)) / 16_000
    pitch = 110 * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    formant = 700 + 400 * np.sin(2 * np.pi * rng.uniform(1, 3) * time + rng.uniform(0, 6))
    wave = sum(np.sin(k * phase) * np.exp(-(((k * pitch - formant) / 250) ** 2)) for k in range(1, 30))
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight clips of 1 to 3 s, and one that is broken."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(8):
        buffer = io.BytesIO()
        soundfile.write(buffer, tone_speech(number, 1 + number / 4), 16_000, format="FLAC")
        rows.append({"audio": {"bytes": buffer.getvalue(), "path": f"{number}.flac"}})
    rows.append({"audio": {"bytes": b"not audio", "path": "bad.flac"}})
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("audio", AUDIO)])), folder / "train-0.parquet")
    return folder


def options(data: Path, output: Path, **changes) -> train_codec.Options:
    small = train_codec.Options(
        data=[str(data)],
        output=output,
        continuous_steps=4,
        quantized_steps=4,
        decoder_steps=4,
        adversarial_from=2,
        rows=2,
        frames=4,
        num_filters=4,
        hidden_size=16,
        codebook_dim=8,
        clusters=8,
        refit_every=2,
        checkpoint_every=2,
        precision="float32",
        device="cpu",
    )
    return replace(small, **changes)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "mimi"
    train_codec.main(options(data, folder))
    return folder


def test_codec_loads_as_a_mimi_and_uses_its_codebooks(trained, data):
    codec = Codec.load(str(trained), 8)
    config = codec.model.config
    assert (config.sampling_rate, config.frame_size, config.codebook_size) == (24_000, 1_920, 2_048)
    assert (config.num_quantizers, config.num_semantic_quantizers, config.sliding_window) == (8, 1, 8)
    clip = train_codec.Speech(trained.with_name("mimi.training")).clip(7)
    codes = codec.model.encode(clip[None, None], num_quantizers=8).audio_codes
    # Fewer frames than entries: the first codebook of each kind holds them all, and leaves nothing to the others.
    assert all(len(row.unique()) > 5 for row in codes[0, :2])
    made = codec.model.decode(codes).audio_values
    assert made.isfinite().all() and made.abs().max() > 0


def test_stored_weights_are_what_was_trained(trained, data, tmp_path):
    state = torch.load(trained.with_name("mimi.training") / "checkpoint.pt", weights_only=True)
    stored = load_file(trained / "model.safetensors")
    own = {name.removeprefix("model."): value for name, value in state["autoencoder"].items() if name != "head"}
    assert stored.keys() <= own.keys()
    for name, value in stored.items():
        assert value.dtype == torch.float16
        torch.testing.assert_close(value.float(), own[name], rtol=1e-3, atol=1e-4)
        if "encoder" in name or "downsample" in name or "codebook" in name or "input_proj" in name:
            assert torch.equal(value.float(), own[name]), f"{name}: codes would not be those of training"


def test_same_seed_gives_the_same_codec_and_another_gives_another(trained, data, tmp_path):
    train_codec.main(options(data, tmp_path / "again"))
    train_codec.main(options(data, tmp_path / "other", seed=1))
    first, again, other = (
        load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("stop", [3, 5, 8, 11])
def test_stopped_run_ends_as_an_uninterrupted_one(trained, data, tmp_path, stop, monkeypatch):
    """Stopped within each stage and between two of them, after a step that no checkpoint holds."""

    class Stopped(Exception):
        pass

    show = train_codec.Training.show

    def show_or_stop(self, bar, figures):
        if self.step > stop:
            raise Stopped
        show(self, bar, figures)

    with monkeypatch.context() as patch:
        patch.setattr(train_codec.Training, "show", show_or_stop)
        with pytest.raises(Stopped):
            train_codec.main(options(data, tmp_path / "mimi"))
    train_codec.main(options(data, tmp_path / "mimi"))
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "mimi"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "mimi.training" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_finished_run_given_again_changes_nothing(trained, data, tmp_path):
    shutil.copytree(trained, tmp_path / "mimi")
    shutil.copytree(trained.with_name("mimi.training"), tmp_path / "mimi.training")
    train_codec.main(options(data, tmp_path / "mimi"))
    assert (tmp_path / "mimi" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_other_options_do_not_go_on_from_a_run(trained, data):
    with pytest.raises(UserError, match=r"other learning_rate, num_filters; delete it or give another --work"):
        train_codec.main(options(data, trained, learning_rate=0.1, num_filters=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "--rows must be at least 1"),
        ({"precision": "float16"}, "--precision must be bfloat16 or float32"),
        ({"upsampling_ratios": (4, 5, 6, 7)}, "their product must be 960"),
        ({"hidden_size": 18}, "hidden_size 18: it must be a multiple of 4"),
        ({"data": ["/nowhere/at/all"]}, "/nowhere/at/all: there is no such data set folder"),
    ],
)
def test_wrong_options_are_named(data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_codec.main(replace(options(data, tmp_path / "mimi"), **changes))


def test_command_line_names_wrong_input(tmp_path):
    command = [sys.executable, "scripts/train_codec.py", "--data", str(tmp_path), "--output", str(tmp_path / "mimi")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: ")
    assert "Traceback" not in done.stderr


def test_spectral_loss_sees_spectra_and_not_phases():
    time = torch.arange(24_000) / 24_000
    tones = [torch.sin(2 * torch.pi * 440 * time + phase)[None] * 0.3 for phase in (0.0, 1.5)]
    other = torch.sin(2 * torch.pi * 620 * time)[None] * 0.3
    quiet = 0.1 * tones[0]
    assert train_codec.spectral_loss(tones[0], tones[0]) == 0
    assert train_codec.spectral_loss(tones[0], tones[1]) < 0.2
    assert train_codec.spectral_loss(tones[0], other) > 1.0
    assert train_codec.spectral_loss(tones[0], quiet) > 1.0


def test_full_scale_sine_has_amplitude_one():
    # The centre of a mel band, so that the filters, which overlap to 1, take most of the window's main lobe.
    time = torch.arange(24_000) / 24_000
    sine = torch.sin(2 * torch.pi * 1_000 * time)[None]
    mel = train_codec.mel_spectrum(sine, 1024, 80)[0, :, 10:-10]
    assert 0.5 < mel.max() < 2.1


def test_teacher_does_not_hear_level_and_colour():
    speech = torch.from_numpy(np.repeat(tone_speech(0, 2.0), 2)[:48_000].copy())
    same = train_codec.normalised_mfcc(speech)
    assert same.shape == (100, 26)
    torch.testing.assert_close(train_codec.normalised_mfcc(0.2 * speech), same, atol=0.02, rtol=0)
    # A fixed filter adds the same to the cepstra of all columns, which the mean takes out.
    coloured = torch.nn.functional.conv1d(speech[None, None], torch.tensor([[[-0.6, 1.0]]]), padding=1)[0, 0, :48_000]
    raw_change = (train_codec.normalised_mfcc(coloured) - same)[5:-5, :13].abs().mean()
    assert raw_change < 0.35 * same[5:-5, :13].abs().mean()


def test_k_means_finds_groups_and_leaves_no_centroid_unused():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2, generator=generator)
    start = torch.tensor([[100.0, 100.0], [101.0, 100.0], [0.0, 1.0], [200.0, 0.0]])
    found = train_codec.k_means(points, 4, generator, rounds=40, start=start)
    assert len(train_codec.nearest(points, found).unique()) == 4
    # More centroids than points: still as many rows as asked for.
    assert train_codec.k_means(points[:3], 8, generator, rounds=2).shape == (8, 2)


def test_quantizers_are_those_of_transformers(trained):
    codec = Codec.load(str(trained), 8)
    autoencoder = train_codec.Autoencoder(codec.model, 8)
    clip = train_codec.Speech(trained.with_name("mimi.training")).clip(6)
    clip = clip[: len(clip) // 1_920 * 1_920]
    with torch.no_grad():
        latents = autoencoder.encode(clip[None])
        for quantizers in (1, 3, 8):
            made = autoencoder.decode(*autoencoder.quantize(*latents, torch.tensor([quantizers])))
            codes = codec.model.encode(clip[None, None], num_quantizers=quantizers).audio_codes
            expected = codec.model.decode(codes).audio_values[:, 0]
            torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_used_only_where_it_is_right():
    """For channels and strides of which oneDNN gets some wrong on some CPUs, and on inputs other than those tried."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv1d(c, 2 * c, 16, 8) for c in (8, 16, 24, 32)]
    layers += [torch.nn.ConvTranspose1d(2 * c, c, 16, 8) for c in (8, 16, 24, 32)]
    layers += [torch.nn.Conv1d(24, 48, 8, 4), torch.nn.Conv1d(24, 12, 3)]
    train_codec.keep_in_float32(torch.nn.ModuleList(layers))
    for layer in layers:
        results = []
        for enabled in (False, True):
            generator = torch.Generator().manual_seed(1)
            hidden = torch.randn(3, layer.in_channels, 2_000, generator=generator).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                made = layer(hidden).float()
            made.mul(torch.randn(made.shape, generator=generator)).sum().backward()
            results.append((made.detach(), hidden.grad))
        for a, b in zip(*results, strict=True):
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99, layer


def test_discriminators_learn_to_tell_noise_from_tones():
    torch.manual_seed(0)
    discriminators = train_codec.Discriminators()
    optimizer = torch.optim.AdamW(discriminators.parameters(), 2e-3)
    true = torch.stack([torch.from_numpy(np.repeat(tone_speech(seed, 0.5), 2)) for seed in range(2)])[:, :12_000]
    made = 0.1 * torch.randn(2, 12_000)
    first = discriminators.loss(made, true).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = discriminators.loss(made, true)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    fooled, matched = discriminators.judge(made, true)
    same, none = discriminators.judge(true, true)
    assert fooled > 3 * same and matched > 0.1 and none == 0


@pytest.mark.slow
def test_shipped_speech_is_learned(tmp_path):
    """Three hundred steps on the shipped speech bring the spectra most of the way."""
    speech = str(ROOT / "assets" / "speech" / "peoples_speech")
    sizes = {"num_filters": 16, "hidden_size": 64, "codebook_dim": 32, "frames": 8, "rows": 4, "clusters": 64}
    steps = {"continuous_steps": 200, "quantized_steps": 50, "decoder_steps": 50, "adversarial_from": 20}
    train_codec.main(options(Path(speech), tmp_path / "mimi", **sizes, **steps, refit_every=25, checkpoint_every=50))
    log = [json.loads(line) for line in (tmp_path / "mimi.training" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["spectral"] < 0.75 * log[0]["spectral"]
    assert log[4]["semantic"] < 0.9 * log[0]["semantic"]
