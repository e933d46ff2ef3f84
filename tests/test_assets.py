"""The embedded assets keep their promises: data layouts, tokenizer, and a codec that can be heard and learned from."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torchaudio
from pystoi import stoi
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, EncodecFeatureExtractor, MimiModel

from torchtitan.eval.suites import SALMON

ASSETS = Path(__file__).parent.parent / "assets"
SPEECH = ASSETS / "speech"
TRAIN = SPEECH / "peoples_speech" / "clean" / "train-00000-of-00001.parquet"
TEST = SPEECH / "librispeech_asr" / "clean" / "test" / "0000.parquet"
# Path under assets/speech, columns, columns that hold audio.
TABLES = [
    (TRAIN.relative_to(SPEECH), ["id", "audio", "duration_ms", "text"], ["audio"]),
    (TEST.relative_to(SPEECH), ["file", "audio", "text", "speaker_id", "chapter_id", "id"], ["audio"]),
    ("sBLIMP/train-00000-of-00001.parquet", ["id", "positive", "negative", "voice", "type", "subtype"], None),
    *[(f"{name}/train-00000-of-00001.parquet", ["positive", "negative"], None) for name in ("sWUGGY", "sStoryCloze")],
    ("tStoryCloze/train-00000-of-00001.parquet", ["positive", "negative"], None),
    *[
        (
            f"SALMon/{task}/train-00000-of-00001.parquet",
            ["task", "ind", "positive_audio", "negative_audio"],
            ["positive_audio", "negative_audio"],
        )
        for task in SALMON.tasks
    ],
]


def waveform(data: bytes) -> torch.Tensor:
    """Bytes of a stored clip to [n] at 24 kHz."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return torchaudio.functional.resample(torch.from_numpy(samples), rate, 24_000)


@pytest.fixture(scope="module")
def codec() -> MimiModel:
    return MimiModel.from_pretrained(ASSETS / "mimi-small", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    """Six held-out clips, one a voice."""
    rows = pq.read_table(TEST, columns=["audio"]).slice(0, 6).column("audio").to_pylist()
    return [waveform(row["bytes"]) for row in rows]


@pytest.mark.parametrize(("path", "columns", "audio"), TABLES, ids=[str(table[0]) for table in TABLES])
def test_table_has_its_columns_and_decodes(path, columns, audio):
    table = pq.read_table(SPEECH / path)
    assert table.column_names == columns
    rows = table.to_pylist()
    assert len(rows) >= 8
    for row in rows[:: max(1, len(rows) // 8)]:
        for column in audio or ["positive", "negative"]:
            samples, rate = soundfile.read(io.BytesIO(row[column]["bytes"]), dtype="float32")
            assert rate == 16_000
            assert samples.ndim == 1
            assert 0.2 < len(samples) / rate < 8.0
            assert np.isfinite(samples).all()
            assert np.abs(samples).max() > 0.05


def test_train_lengths_and_voices():
    table = pq.read_table(TRAIN, columns=["id", "duration_ms"])
    minutes = sum(table.column("duration_ms").to_pylist()) / 60_000
    assert 25 <= minutes <= 35
    assert len({name.split("/")[0] for name in table.column("id").to_pylist()}) == 6


def test_assets_are_small():
    assert sum(path.stat().st_size for path in SPEECH.rglob("*") if path.is_file()) <= 6_000_000
    file = ASSETS / "mimi-small" / "model.safetensors"
    assert file.stat().st_size <= 6_000_000
    with safe_open(file, "pt") as weights:  # in the layout of kyutai/mimi's files, which every version loads
        assert {"encoder.layers.0.conv.weight", "downsample.conv.weight", "upsample.conv.weight"} <= set(weights.keys())


@pytest.mark.parametrize("table", ["SALMon/speaker_consistency", "SALMon/gender_consistency", "sBLIMP"])
def test_tasks_that_the_quickstart_explains_have_two_hundred_pairs(table):
    assert pq.read_metadata(SPEECH / table / "train-00000-of-00001.parquet").num_rows == 200


def test_pairs_of_one_clip_with_two_voices_differ_in_their_second_half_only():
    for row in pq.read_table(SPEECH / "SALMon/speaker_consistency").to_pylist()[:12]:
        right, wrong = (waveform(row[f"{side}_audio"]["bytes"]) for side in ("positive", "negative"))
        quarter = len(right) // 4
        early = torch.corrcoef(torch.stack([right[:quarter], wrong[:quarter]]))[0, 1]
        assert early > 0.98
        late = min(len(right), len(wrong))
        assert torch.corrcoef(torch.stack([right[late // 2 : late], wrong[late // 2 : late]]))[0, 1] < 0.9


def test_held_out_speech_is_not_in_train():
    train = pq.read_table(TRAIN, columns=["id", "text"])
    test = pq.read_table(TEST, columns=["id", "text"])
    assert len(test) == 40
    assert not set(train.column("text").to_pylist()) & {text.lower() for text in test.column("text").to_pylist()}
    assert not set(train.column("id").to_pylist()) & set(test.column("id").to_pylist())


def test_prompts_are_short_mono_clips_of_each_voice():
    names = {name.split("/")[0] for name in pq.read_table(TRAIN, columns=["id"]).column("id").to_pylist()}
    prompts = sorted((ASSETS / "prompts").iterdir())
    assert [prompt.stem for prompt in prompts] == sorted(names)
    for path in (*prompts, ASSETS / "prompt.flac"):
        samples, rate = soundfile.read(path)
        assert samples.ndim == 1
        assert 1.0 < len(samples) / rate < 4.0
        assert 0.05 < np.abs(samples).max() < 1


def test_tokenizer_puts_bos_first_and_has_the_stated_size():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "llama-small")
    config = json.loads((ASSETS / "llama-small" / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == 512
    ids = tokenizer("one two three")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == config["bos_token_id"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end_of_text|>", config["eos_token_id"])
    for text in ("one two three", "Größe, 3.14 €", "SEVENTEEN\n\teighteen"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_llama_config_keeps_its_rotary_base_in_both_spellings():
    config = AutoConfig.from_pretrained(ASSETS / "llama-small")
    assert config.rope_parameters["rope_theta"] == 500_000
    assert json.loads((ASSETS / "llama-small" / "config.json").read_text())["rope_theta"] == 500_000


def test_codec_has_the_shape_of_mimi(codec):
    config = codec.config
    assert (config.sampling_rate, config.frame_rate, config.frame_size) == (24_000, 12.5, 1_920)
    assert (config.codebook_size, config.num_quantizers, config.num_semantic_quantizers) == (2_048, 8, 1)
    assert config.use_causal_conv
    extractor = EncodecFeatureExtractor.from_pretrained(ASSETS / "mimi-small")
    assert (extractor.sampling_rate, extractor.feature_size) == (24_000, 1)


def test_codebooks_hold_distinct_finite_rows(codec):
    quantizer = codec.quantizer
    layers = [
        *quantizer.semantic_residual_vector_quantizer.layers,
        *quantizer.acoustic_residual_vector_quantizer.layers,
    ]
    assert len(layers) == 8
    for layer in layers:
        rows = layer.codebook.embed
        assert rows.isfinite().all()
        assert len(rows.unique(dim=0)) == 2_048


@torch.no_grad()
def test_codes_vary_with_the_signal(codec, clips):
    codes = torch.cat([codec.encode(clip[None, None], num_quantizers=4).audio_codes[0] for clip in clips], dim=1)
    for quantizer, row in enumerate(codes):
        share = torch.bincount(row).float() / len(row)
        entropy = -(share[share > 0] * share[share > 0].log()).sum().item()
        assert entropy > math.log(8), f"quantizer {quantizer} says little: {entropy:.2f} nats"
    other = codec.encode(clips[0].flip(0)[None, None], num_quantizers=4).audio_codes
    same = codec.encode(clips[0][None, None], num_quantizers=4).audio_codes
    assert (other != same).float().mean() > 0.3


@torch.no_grad()
def test_round_trips_are_intelligible(codec, clips):
    """Short-time objective intelligibility, of which white noise of the same level reaches 0.4."""
    for quantizers, least in ((8, 0.80), (4, 0.70)):
        scores = []
        for clip in clips:
            codes = codec.encode(clip[None, None], num_quantizers=quantizers).audio_codes
            assert codes.shape[-1] == math.ceil(len(clip) / 1_920)
            made = codec.decode(codes).audio_values[0, 0]
            assert len(made) == 1_920 * codes.shape[-1]
            assert made.isfinite().all() and made.mean().abs() < 0.01
            pair = [torchaudio.functional.resample(wave, 24_000, 10_000).numpy() for wave in (clip, made[: len(clip)])]
            scores.append(stoi(*pair, 10_000))
        assert np.mean(scores) > least, f"{quantizers} quantizers"
        assert min(scores) > 0.5, f"{quantizers} quantizers"


@torch.no_grad()
@pytest.mark.parametrize(("every", "entries"), [(8, 230), pytest.param(1, 1_024, marks=pytest.mark.slow)])
def test_half_of_the_first_codebooks_is_in_use(codec, every, entries):
    """Over the training part; a ninth over every eighth of its recordings."""
    rows = pq.read_table(TRAIN, columns=["audio"]).column("audio").to_pylist()[::every]
    codes = [codec.encode(waveform(row["bytes"])[None, None], num_quantizers=4).audio_codes[0] for row in rows]
    used = [len(row.unique()) for row in torch.cat(codes, dim=1)]
    assert min(used) > entries, used
