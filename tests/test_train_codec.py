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

from torchtitan.audio.codec import Codec, published_names
from torchtitan.codec_training.autoencoder import Autoencoder, keep_in_float32
from torchtitan.codec_training.codebooks import farthest, k_means, nearest, without_speaker
from torchtitan.codec_training.data import Speech, normalised_mfcc
from torchtitan.codec_training.optimizer import Schedule
from torchtitan.codec_training.options import FROM_SCRATCH, Options
from torchtitan.codec_training.spectra import Discriminators, mel_spectrum, spectral_loss
from torchtitan.codec_training.training import CodecTrainer, train
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


def write_clips(path: Path, waves: list[np.ndarray]) -> None:
    """A parquet of these clips, and of one that is broken."""
    rows = []
    for number, wave in enumerate(waves):
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, 16_000, format="FLAC")
        rows.append({"audio": {"bytes": buffer.getvalue(), "path": f"{number}.flac"}})
    rows.append({"audio": {"bytes": b"not audio", "path": "bad.flac"}})
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("audio", AUDIO)])), path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight clips of 1 to 3 s, and one that is broken."""
    folder = tmp_path_factory.mktemp("data")
    write_clips(folder / "train-0.parquet", [tone_speech(number, 1 + number / 4) for number in range(8)])
    return folder


def options(data: Path, output: Path, **changes) -> Options:
    small = Options(
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
    if "start_from" in changes:
        default = Options([], output)
        small = replace(small, **{name: getattr(default, name) for name in FROM_SCRATCH})
    return replace(small, **changes)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "mimi"
    train(options(data, folder))
    return folder


def test_codec_loads_as_a_mimi_and_uses_its_codebooks(trained, data):
    codec = Codec.load(str(trained), 8)
    config = codec.model.config
    assert (config.sampling_rate, config.frame_size, config.codebook_size) == (24_000, 1_920, 2_048)
    assert (config.num_quantizers, config.num_semantic_quantizers, config.sliding_window) == (8, 1, 8)
    clip = Speech(trained.with_name("mimi.training")).clip(7)
    codes = codec.model.encode(clip[None, None], num_quantizers=8).audio_codes
    # Fewer frames than entries: the first codebook of each kind holds them all, and leaves nothing to the others.
    assert all(len(row.unique()) > 5 for row in codes[0, :2])
    made = codec.model.decode(codes).audio_values
    assert made.isfinite().all() and made.abs().max() > 0


def test_stored_weights_are_what_was_trained(trained, data, tmp_path):
    state = torch.load(trained.with_name("mimi.training") / "checkpoint.pt", weights_only=True)
    stored = load_file(trained / "model.safetensors")
    own = {name.removeprefix("model."): value for name, value in state["autoencoder"].items() if name != "head"}
    assert "encoder.layers.0.conv.weight" in stored, "not in the layout that every version of transformers loads"
    own = published_names(own)
    assert stored.keys() <= own.keys()
    for name, value in stored.items():
        assert value.dtype == torch.float16
        torch.testing.assert_close(value.float(), own[name], rtol=1e-3, atol=1e-4)
        if "encoder" in name or "downsample" in name or "codebook" in name or "input_proj" in name:
            assert torch.equal(value.float(), own[name]), f"{name}: codes would not be those of training"


def test_same_seed_gives_the_same_codec_and_another_gives_another(trained, data, tmp_path):
    train(options(data, tmp_path / "again"))
    train(options(data, tmp_path / "other", seed=1))
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

    show = CodecTrainer.show

    def show_or_stop(self, bar, figures):
        if self.step > stop:
            raise Stopped
        show(self, bar, figures)

    with monkeypatch.context() as patch:
        patch.setattr(CodecTrainer, "show", show_or_stop)
        with pytest.raises(Stopped):
            train(options(data, tmp_path / "mimi"))
    # A codec is there as soon as its codes are final.
    assert (tmp_path / "mimi" / "model.safetensors").exists() == (stop > 9)
    train(options(data, tmp_path / "mimi"))
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "mimi"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "mimi.training" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_finished_run_given_again_changes_nothing(trained, data, tmp_path):
    shutil.copytree(trained, tmp_path / "mimi")
    shutil.copytree(trained.with_name("mimi.training"), tmp_path / "mimi.training")
    train(options(data, tmp_path / "mimi"))
    assert (tmp_path / "mimi" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_other_options_do_not_go_on_from_a_run(trained, data):
    with pytest.raises(UserError, match=r"other learning_rate, num_filters; delete it or give another --work"):
        train(options(data, trained, learning_rate=0.1, num_filters=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "--rows must be at least 1"),
        ({"precision": "float16"}, "--precision must be bfloat16 or float32"),
        ({"upsampling_ratios": (4, 5, 6, 7)}, "their product must be 960"),
        ({"common_entries": (2048,) * 7}, "--common_entries needs 8 numbers from 1 to 2048"),
        ({"speaker_directions": 8}, "--speaker_directions must be from 0 to 7"),
        ({"rare_entries": -1}, "--rare_entries must be from 0 to 2048"),
        ({"decoder_steps": 0}, "--decoder_steps must be at least 1"),
        ({"clusters": 40_000}, "--clusters must be from 2 to 32767"),
        ({"device": "banana"}, "device must be cpu, cuda"),
        ({"codebook_dim": 16}, "codebook_dim 16: it must not be the hidden_size"),
        ({"common_entries": (0,) * 8}, "--common_entries needs 8 numbers from 1 to 2048"),
        ({"start_from": "/nowhere"}, "--continuous_steps, .*--refit_every: not with --start_from"),
        ({"hidden_size": 20}, "hidden_size 20: it must be a multiple of 8"),
        ({"data": ["/nowhere/at/all"]}, "/nowhere/at/all: there is no such data set folder"),
    ],
)
def test_wrong_options_are_named(data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(replace(options(data, tmp_path / "mimi"), **changes))


def test_wrong_command_does_not_stand_in_the_way_of_the_right_one(trained, data, tmp_path):
    for key, value in {"data": [str(data), "/nowhere"], "hidden_size": 20, "device": "banana"}.items():
        with pytest.raises(UserError, match="/nowhere" if key == "data" else key):
            train(replace(options(data, tmp_path / "mimi"), **{key: value}))
    train(options(data, tmp_path / "mimi"))
    assert (tmp_path / "mimi" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_codec_of_another_run_is_not_written_over(trained, data, tmp_path):
    before = (trained / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"mimi: it holds another codec; delete it or give another --output"):
        train(options(data, trained, work=tmp_path / "work", seed=3))
    assert (trained / "model.safetensors").read_bytes() == before


def test_recordings_that_came_since_are_noticed(trained, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    train(options(tmp_path / "data", tmp_path / "mimi"))
    write_clips(tmp_path / "data" / "train-1.parquet", [tone_speech(9, 2.0)])
    with pytest.raises(UserError, match=r"mimi\.training: it holds a run on other recordings"):
        train(options(tmp_path / "data", tmp_path / "mimi"))


def test_unreadable_file_and_recordings_are_named(data, tmp_path, capsys, caplog):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train-1.parquet").write_bytes(b"PAR1 and nothing more")
    train(options(tmp_path / "data", tmp_path / "mimi", continuous_steps=1))
    assert "1 of 9 recordings cannot be used and are left out; " in capsys.readouterr().out
    assert any("train-1.parquet: the unreadable part of the file is left out" in text for text in caplog.messages)


def test_command_line_names_wrong_input(tmp_path):
    command = [sys.executable, "scripts/train_codec.py", "--data", str(tmp_path), "--output", str(tmp_path / "mimi")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: ")
    assert "Traceback" not in done.stderr


def test_start_from_keeps_the_encoder_and_trains_the_decoder(trained, data, tmp_path):
    changes = {"common_entries": (4,) * 8, "rare_entries": 20, "start_from": str(trained)}
    train(options(data, tmp_path / "kept", **changes))
    train(options(data, tmp_path / "mimi", **changes, speaker_directions=2))
    before, kept, after = (
        load_file(path / "model.safetensors") for path in (trained, tmp_path / "kept", tmp_path / "mimi")
    )
    projection = "quantizer.semantic_residual_vector_quantizer.input_proj.weight"
    for name, value in before.items():
        if "embed_sum" in name:
            assert not torch.equal(value, kept[name]), name
        elif ("encoder" in name or "downsample" in name or "input_proj" in name) and "decoder" not in name:
            assert torch.equal(value, kept[name]), name
            assert torch.equal(value, after[name]) == (name != projection), name
    assert not all(torch.equal(value, kept[name]) for name, value in before.items() if name.startswith("decoder."))


@pytest.mark.parametrize("stop", [None, 3])
def test_common_entries_are_fitted_to_the_last_data_set(trained, data, tmp_path, stop, monkeypatch):
    """Silence beside it has its share of all latents and none of the common entries; also where the run was stopped."""
    (tmp_path / "silence").mkdir()
    write_clips(tmp_path / "silence" / "train-0.parquet", [np.zeros(32_000, np.float32)] * 8)
    changes = {"common_entries": (16,) * 8, "rare_entries": 20, "start_from": str(trained)}
    given = options(data, tmp_path / "both", **changes)
    given.data.insert(0, str(tmp_path / "silence"))
    if stop is not None:
        with monkeypatch.context() as patch:
            patch.setattr(CodecTrainer, "show", lambda self, *_: 1 / (stop - self.step))
            with pytest.raises(ZeroDivisionError):
                train(given)
    train(given)
    train(options(data, tmp_path / "alone", **changes))
    together, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "alone"))
    names = [name for name in together if "embed_sum" in name]
    assert len(names) == 8
    for name in names[:2]:  # the first codebook of each half: the others are fitted to what is left
        assert torch.equal(together[name][:36], alone[name][:36])
        assert not torch.equal(together[name], alone[name])


def test_codec_with_other_codebooks_is_no_start(data, tmp_path):
    from transformers import MimiConfig, MimiModel

    config = MimiConfig(num_filters=4, hidden_size=16, codebook_dim=8, vector_quantization_hidden_dimension=8)
    config.update({"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8})
    config.update({"intermediate_size": 16, "upsample_groups": 16, "num_quantizers": 12})
    model = MimiModel(config)
    for name, value in model.named_buffers():
        if "embed_sum" in name:
            value.normal_()
    model.save_pretrained(tmp_path / "twelve")
    with pytest.raises(UserError, match="twelve: it must have 8 codebooks of 2048 entries"):
        train(options(data, tmp_path / "mimi", start_from=str(tmp_path / "twelve")))


def test_what_clips_differ_in_is_taken_out_and_the_rest_is_kept():
    generator = torch.Generator().manual_seed(0)
    speaker, sound = torch.eye(6)[0] + 0.5 * torch.eye(6)[3], torch.eye(6)[1]
    clips = []
    for _ in range(40):
        said = torch.randn(50, 1, generator=generator) * sound
        who = 5 * torch.randn(1, generator=generator) * speaker
        clips.append(said + who + 0.1 * torch.randn(50, 6, generator=generator))
    kept = without_speaker(clips, 1)
    made = [clip @ kept.T for clip in clips]
    means = torch.stack([clip.mean(0) for clip in made])
    assert means.std(0).max() < 0.3, "clips still differ"
    for clip, other in zip(clips, made, strict=True):
        assert torch.corrcoef(torch.stack([clip[:, 1], other[:, 1]]))[0, 1] > 0.98
    torch.testing.assert_close(kept @ kept, kept, atol=1e-4, rtol=0)


def test_rare_entries_are_nearest_to_rare_points_and_leave_the_common_ones_theirs():
    generator = torch.Generator().manual_seed(0)
    common = 0.1 * torch.randn(500, 4, generator=generator)
    rare = torch.tensor([[3.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, -5.0, 0]])
    points = torch.cat([common, rare])
    entries = k_means(common, 8, generator)
    rows = torch.cat([entries, farthest(points, entries, 3)])
    chosen = nearest(points, rows)
    assert sorted(chosen[500:].tolist()) == [8, 9, 10]
    assert (chosen[:500] < 8).all()
    assert len(farthest(points, entries, 0)) == 0


def test_spectral_loss_sees_spectra_and_not_phases():
    time = torch.arange(24_000) / 24_000
    tones = [torch.sin(2 * torch.pi * 440 * time + phase)[None] * 0.3 for phase in (0.0, 1.5)]
    other = torch.sin(2 * torch.pi * 620 * time)[None] * 0.3
    quiet = 0.1 * tones[0]
    assert spectral_loss(tones[0], tones[0]) == 0
    assert spectral_loss(tones[0], tones[1]) < 0.2
    assert spectral_loss(tones[0], other) > 1.0
    assert spectral_loss(tones[0], quiet) > 1.0


def test_full_scale_sine_has_amplitude_one():
    # The centre of a mel band, so that the filters, which overlap to 1, take most of the window's main lobe.
    time = torch.arange(24_000) / 24_000
    sine = torch.sin(2 * torch.pi * 1_000 * time)[None]
    mel = mel_spectrum(sine, 1024, 80)[0, :, 10:-10]
    assert 0.5 < mel.max() < 2.1


def test_teacher_does_not_hear_level_and_colour():
    speech = torch.from_numpy(np.repeat(tone_speech(0, 2.0), 2)[:48_000].copy())
    same = normalised_mfcc(speech)
    assert same.shape == (100, 26)
    torch.testing.assert_close(normalised_mfcc(0.2 * speech), same, atol=0.02, rtol=0)
    # A fixed filter adds the same to the cepstra of all columns, which the mean takes out.
    coloured = torch.nn.functional.conv1d(speech[None, None], torch.tensor([[[-0.6, 1.0]]]), padding=1)[0, 0, :48_000]
    raw_change = (normalised_mfcc(coloured) - same)[5:-5, :13].abs().mean()
    assert raw_change < 0.35 * same[5:-5, :13].abs().mean()


def test_k_means_finds_groups_and_leaves_no_centroid_unused():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2, generator=generator)
    start = torch.tensor([[100.0, 100.0], [101.0, 100.0], [0.0, 1.0], [200.0, 0.0]])
    found = k_means(points, 4, generator, rounds=40, start=start)
    assert len(nearest(points, found).unique()) == 4
    # More centroids than points: still as many rows as asked for.
    assert k_means(points[:3], 8, generator, rounds=2).shape == (8, 2)


def test_quantizers_are_those_of_transformers(trained):
    codec = Codec.load(str(trained), 8)
    autoencoder = Autoencoder(codec.model, 8)
    clip = Speech(trained.with_name("mimi.training")).clip(6)
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
    keep_in_float32(torch.nn.ModuleList(layers))
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
    discriminators = Discriminators()
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


def test_learning_rate_warms_up_and_falls_twice():
    """By hand: 100 steps of stages 1 and 2, 100 of stage 3 at half the rate; each warms up over 50 steps."""
    steps = {"continuous_steps": 60, "quantized_steps": 40, "decoder_steps": 100}
    schedule = Schedule(Options([], Path("mimi"), **steps))
    assert (schedule.quantized, schedule.decoder, schedule.end) == (60, 100, 200)
    shares = [schedule.learning_rate(step) for step in (0, 49, 80, 100, 180)]
    assert shares == pytest.approx([1 / 50, 1 - 0.95 * 0.49, 1 - 0.95 * 0.8, 0.5 / 50, 0.5 * (1 - 0.95 * 0.8)])


@pytest.mark.slow
def test_shipped_speech_is_learned(tmp_path):
    """Three hundred steps on the shipped speech bring the spectra most of the way."""
    speech = str(ROOT / "assets" / "speech" / "peoples_speech")
    sizes = {"num_filters": 16, "hidden_size": 64, "codebook_dim": 32, "frames": 8, "rows": 4, "clusters": 64}
    steps = {"continuous_steps": 200, "quantized_steps": 50, "decoder_steps": 50, "adversarial_from": 20}
    train(options(Path(speech), tmp_path / "mimi", **sizes, **steps, refit_every=25, checkpoint_every=50))
    log = [json.loads(line) for line in (tmp_path / "mimi.training" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["spectral"] < 0.75 * log[0]["spectral"]
    assert log[4]["semantic"] < 0.9 * log[0]["semantic"]
