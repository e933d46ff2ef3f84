"""Measures of a codec: each figure means what it says, and the command gives all of them or says what is wrong."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from scripts.measure_codec import command
from torchtitan.audio.codec import Codec
from torchtitan.codec_training.judging.clips import (
    VoicedClip,
    Word,
    held_out_clips,
    pair_clips,
    spoken_words,
    training_clips,
)
from torchtitan.codec_training.judging.codes import Labelled, code_use, count_pairs, entropy, information
from torchtitan.codec_training.judging.hearing import (
    Classifier,
    intelligibility,
    load_pystoi,
    log_mel_distance,
    mel_levels,
    pitch_track,
    score,
    speaks,
)
from torchtitan.codec_training.judging.judge import CodecJudge
from torchtitan.codec_training.judging.measure import load_model
from torchtitan.codec_training.voices import VOICES
from torchtitan.tools.errors import UserError, run_command

ASSETS = Path(__file__).parent.parent / "assets"
CODEC = str(ASSETS / "mimi-small")
TRAIN = Path("peoples_speech", "clean", "train-00000-of-00001.parquet")
TEST = Path("librispeech_asr", "clean", "test", "0000.parquet")
PAIRS = Path("SALMon", "speaker_consistency", "train-00000-of-00001.parquet")


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """A few clips of the assets in their layout: of three voices, six training clips, a held-out one and a pair each.

    The pairs' positive clips are training clips.
    """
    folder = tmp_path_factory.mktemp("speech")
    train, test = (pq.read_table(ASSETS / "speech" / path).to_pylist() for path in (TRAIN, TEST))
    names = [voice.name for voice in VOICES[:3]]
    of_voice = [[row for row in train if row["id"].split("/")[0] == name][:6] for name in names]
    write(folder / TRAIN, [row for rows in of_voice for row in rows])
    write(folder / TEST, [next(row for row in test if row["speaker_id"] == voice) for voice in range(3)])
    write(folder / PAIRS, [{"ind": i, "positive_audio": rows[0]["audio"]} for i, rows in enumerate(of_voice)])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_speech_model) -> Path:
    """A random Llama that speaks the codes of the assets' codec."""
    return save_speech_model(tmp_path_factory.mktemp("model") / "llama", Path(CODEC))


@pytest.fixture(scope="module")
def held_out(speech) -> list[VoicedClip]:
    return held_out_clips(speech)


@pytest.fixture(scope="module")
def judge(speech, held_out) -> CodecJudge:
    return CodecJudge(Codec.load(CODEC, 8), training_clips(speech), held_out, 0)


def run(monkeypatch, *arguments: str | Path) -> int:
    """Exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["measure_codec.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_command(command)
    return end.value.code or 0


# Classifiers


def points(seed: int, shuffled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clusters of points in five dimensions, with their own labels or with any."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (300,), generator=generator)
    centres = 3 * torch.eye(3, 5)
    features = centres[labels] + torch.randn(300, 5, generator=generator) + 100
    return features, labels[torch.randperm(300, generator=generator)] if shuffled else labels


def test_classifier_learns_what_is_there():
    features, labels = points(1, shuffled=False)
    accuracy = (Classifier(*points(0, shuffled=False), 3)(features) == labels).float().mean()
    assert accuracy > 0.95


def test_classifier_learns_nothing_where_nothing_is():
    features, labels = points(1, shuffled=True)
    accuracy = (Classifier(*points(0, shuffled=True), 3)(features) == labels).float().mean()
    assert abs(accuracy - 1 / 3) < 0.12  # four standard errors


def test_classifier_is_at_its_optimum():
    features, labels = points(0, shuffled=False)
    found = Classifier(features, labels, 3, penalty=0.01)
    # The gradient, by hand: the mean of (probability - truth) times the input, and the penalty's.
    inputs = (features.double() - found.centre) / found.scale
    wrong = (inputs @ found.weight.T + found.bias).softmax(1) - torch.eye(3, dtype=torch.float64)[labels]
    gradient = wrong.T @ inputs / len(labels) + 2 * 0.01 * found.weight
    assert gradient.abs().max() < 1e-3
    assert wrong.mean(0).abs().max() < 1e-3


def test_score_has_its_standard_error():
    found = score([True, True, True, False])
    assert found["accuracy"] == 0.75
    assert found["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert score([])["accuracy"] is None


# Codes


def test_code_use_is_that_of_plain_loops():
    codes = torch.tensor([3, 3, 3, 2047, 5, 5, 3, 0])
    found, total = code_use(codes), 0.0
    for entry in range(2048):
        share = sum(int(code) == entry for code in codes) / len(codes)
        total -= share * math.log(share) if share else 0.0
    assert found["used"] == 4 and found["share"] == 4 / 2048
    assert found["entropy"] == pytest.approx(total)
    assert found["perplexity"] == pytest.approx(math.exp(total))


def test_perplexity_of_codes_used_alike_is_their_number():
    assert code_use(torch.arange(64).repeat(5))["perplexity"] == pytest.approx(64)


def clips_of_codes(seed: int, label_of) -> list[Labelled]:
    """Twenty clips of 100 frames: codes 0 to 15 and the labels that a function gives them."""
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(16, (100,), generator=generator) for _ in range(20)]
    return [(row, label_of(row, generator)) for row in codes]


def test_information_of_codes_that_decide_the_label_is_its_entropy():
    learned, tests = (clips_of_codes(seed, lambda codes, _: codes % 4) for seed in (0, 1))
    labels = torch.cat([labels for _, labels in tests])
    found = information(learned, tests)
    assert found["nats"] == pytest.approx(entropy(torch.bincount(labels)), abs=0.05)
    assert found["nats"] == pytest.approx(found["at_most"], abs=0.05)


def test_information_of_codes_that_say_nothing_is_none():
    def any_label(codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(4, codes.shape, generator=generator)

    found = information(clips_of_codes(0, any_label), clips_of_codes(1, any_label))
    assert abs(found["nats"]) < 0.02 and found["at_most"] == pytest.approx(math.log(4), abs=0.02)


def test_information_does_not_grow_with_the_number_of_codes():
    def many(seed: int) -> list[Labelled]:
        generator = torch.Generator().manual_seed(seed)
        return [tuple(torch.randint(high, (100,), generator=generator) for high in (2048, 64)) for _ in range(20)]

    learned, tests = many(0), many(1)
    assert abs(information(learned, tests)["nats"]) < 0.05
    # What the counts alone seem to say: nearly all, since most codes occur once.
    counts = count_pairs(learned, 64)
    assert sum(map(entropy, (counts.sum(0), counts.sum(1)))) - entropy(counts) > 3


def test_information_and_standard_error_are_those_of_plain_loops(monkeypatch):
    def half_decided(codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.where(torch.rand(codes.shape, generator=generator) < 0.5, codes % 3, 0)

    monkeypatch.setattr("torchtitan.codec_training.judging.codes.PRIORS", (2.0,))
    learned, tests = clips_of_codes(0, half_decided), clips_of_codes(1, half_decided)
    tests[0] = (tests[0][0][:30], tests[0][1][:30])
    seen = [pair for codes, labels in learned for pair in zip(codes.tolist(), labels.tolist(), strict=True)]
    shares = [(sum(label == known for _, label in seen) + 1) / (len(seen) + 3) for known in range(3)]
    sums = []
    for codes, labels in tests:
        sums.append(0.0)
        for code, label in zip(codes.tolist(), labels.tolist(), strict=True):
            times = sum(pair == (code, label) for pair in seen)
            among = sum(pair[0] == code for pair in seen)
            sums[-1] += math.log((times + 2 * shares[label]) / (among + 2)) - math.log(shares[label])
    frames = sum(len(codes) for codes, _ in tests)
    mean = sum(sums) / frames
    squares = sum((total - mean * len(codes)) ** 2 for total, (codes, _) in zip(sums, tests, strict=True))
    found = information(learned, tests)
    assert found["nats"] == pytest.approx(mean)
    assert found["standard_error"] == pytest.approx(math.sqrt(squares) / frames)


# Waveforms


def noise_like(waveform: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """White noise of the same length and power."""
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(seed))
    return noise * waveform.square().mean().sqrt()


def test_speech_is_as_intelligible_as_itself(held_out):
    true = held_out[0].waveform
    assert intelligibility(true, true) == pytest.approx(1.0, abs=1e-6)
    assert intelligibility(0.1 * true, true) == pytest.approx(1.0, abs=1e-6)


def test_noise_is_not_intelligible(held_out):
    true = held_out[0].waveform
    pure, some = intelligibility(noise_like(true), true), intelligibility(true + noise_like(true), true)
    assert pure < 0.5 < some < 0.95


def test_a_moment_has_no_intelligibility(held_out):
    moment = held_out[0].waveform[5000:10_000]
    assert intelligibility(moment, moment) is None


def test_log_mel_distance_is_in_decibels(held_out):
    noise, true = noise_like(torch.ones(24_000)), held_out[0].waveform
    assert log_mel_distance(2 * noise, noise) == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert log_mel_distance(true, true) == 0.0


def test_a_sine_has_its_level_in_its_band():
    # The seventh of 40 bands between 60 Hz and 7.6 kHz has its middle here.
    mels = np.linspace(*(2595 * np.log10(1 + hertz / 700) for hertz in (60, 7600)), 42)
    hertz = 700 * (10 ** (mels[7] / 2595) - 1)
    sine = torch.sin(2 * math.pi * hertz * torch.arange(24_000) / 24_000)
    levels = mel_levels(sine)
    assert levels.shape == (40, 101) and levels[:, 50].argmax() == 6
    assert float(levels[6, 50] - mel_levels(0.1 * sine)[6, 50]) == pytest.approx(20, abs=1e-3)
    assert float(levels.min()) == pytest.approx(float(levels.max()) - 60)


@pytest.mark.parametrize("hertz", [75, 120, 220, 380])
def test_pitch_of_pulses_is_their_rate(hertz):
    period = round(24_000 / hertz)
    pulses = torch.zeros(24_000)
    pulses[::period] = 1.0
    pitch, periodic = pitch_track(pulses)
    assert pitch[20:80].median() == pytest.approx(12 * math.log2(24_000 / period / 100), abs=0.05)
    assert periodic[20:80].min() > 0.9
    assert pitch_track(noise_like(torch.ones(24_000)))[1].mean() < 0.6


def test_silence_is_not_speech(held_out):
    clip = held_out[0].waveform
    prompt, rest = clip[:24_000], clip[24_000:]
    assert speaks(rest, prompt)
    assert not speaks(1e-3 * rest, prompt)
    assert not speaks(torch.zeros(0), prompt)


# Judging


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_words_are_kept_and_heard(judge, tmp_path):
    def listen(seed: int) -> list[Word]:
        return spoken_words(tmp_path, ["six", "monday"], 1, seed)

    words = listen(0)
    kept = (tmp_path / "words.npz").stat().st_mtime_ns
    again = listen(0)
    assert (tmp_path / "words.npz").stat().st_mtime_ns == kept
    assert all(torch.equal(a.waveform, b.waveform) for a, b in zip(words, again, strict=True))
    assert [(word.word, word.test) for word in words[:2]] == [(0, False), (0, True)]
    found = judge.words(words)
    assert found["chance"] == 1 / 2
    assert found["clean"]["accuracy"] == 1.0 and found["clean"]["clips"] == 2 * len(VOICES)
    assert found["8"]["accuracy"] > 1 / 2
    assert not torch.equal(listen(1)[0].waveform, words[0].waveform)


def test_clean_voices_are_heard(judge):
    found = judge.speakers()
    assert found["chance"] == pytest.approx(1 / 3) and found["gender_chance"] == pytest.approx(2 / 3)
    assert found["clean"]["voice"]["accuracy"] == found["clean"]["gender"]["accuracy"] == 1.0


def test_pairs_in_another_order_are_not_judged(judge, lm, speech):
    pairs = [VoicedClip(clip.waveform, (clip.voice + 1) % 3) for clip in pair_clips(speech, 3)]
    assert "do not take turns" in judge.continuations(lm, pairs)["skipped"]


def test_a_voice_without_training_clips_is_named(speech, held_out):
    training = [clip for clip in training_clips(speech) if clip.voice != 1]
    with pytest.raises(UserError, match="voice ben is held out, but no training clip has it"):
        CodecJudge(Codec.load(CODEC, 8), training, held_out, 0)


# The command


def test_command_measures_everything_twice_alike(monkeypatch, capsys, tmp_path, speech, model):
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no espeak-ng
    real = speech / TEST.parent
    found = []
    for name in ("first", "second"):
        arguments = ["--codec", CODEC, "--speech", speech, "--model", model, "--output", tmp_path / name]
        assert run(monkeypatch, *arguments, "--real", real, "--real_clips", 2, "--continuations", 3) == 0
        found.append(json.loads((tmp_path / name / "measures.json").read_text()))
    printed = capsys.readouterr().out
    assert [figures.pop("timing")["seconds"] > 0 for figures in found] == [True, True]
    assert found[0] == found[1]
    figures = found[0]
    trips = figures["round_trips"]
    for by_number in (trips["held_out"], trips["real"][str(real)]):
        assert list(by_number) == ["8", "4"]
        for trip in by_number.values():
            assert 0 < trip["stoi"]["minimum"] <= trip["stoi"]["mean"] < 1
            assert trip["log_mel_distance_db"]["mean"] > 0
    assert trips["held_out"]["4"]["stoi"]["clips"] == 3 and trips["real"][str(real)]["4"]["stoi"]["clips"] == 2
    assert list(trips["held_out"]["8"]["stoi_by_voice"]) == ["anna", "ben", "clara"]
    books = figures["codebooks"]["quantizers"]
    assert [book["quantizer"] for book in books] == list(range(8))
    assert all(0 < book["entropy"] <= math.log(book["used"]) for book in books)
    assert all({"voice", "about_voice", "about_sound", "perplexity", "share"} <= set(book) for book in books)
    assert "espeak-ng" in figures["words"]["skipped"]
    assert figures["speakers"]["8"]["voice"]["clips"] == 3
    continued = figures["continuations"]
    assert continued["num_quantizers"] == 4 and continued["prompts"] == 3
    assert continued["continuation"]["voice"]["clips"] + round(3 * continued["silent"]["accuracy"]) == 3
    for line in ("| held out | 8 | 3 |", "| STOI by voice | anna |", "| voice | 100.0", "No words were judged: espeak"):
        assert line in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--codec", "no/such/codec"], "no codec could be loaded"),
        (["--speech", "no/such/speech"], "there is no parquet file in it"),
        (["--real", "./no/such/speech"], "./no/such/speech"),
        (["--model", "./no/such/model"], "./no/such/model: there is no such folder"),
        (["--renditions", "0"], "--renditions must be at least 1"),
        (["--real_clips", "0"], "--real_clips must be at least 1"),
    ],
    ids=["codec", "speech", "real", "model", "renditions", "real_clips"],
)
def test_bad_input_is_told_in_a_sentence(monkeypatch, capsys, tmp_path, speech, arguments, sentence):
    defaults = ["--codec", CODEC, "--speech", speech, "--output", tmp_path]
    assert run(monkeypatch, *defaults, *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and last.endswith(".")


@pytest.mark.parametrize(
    ("path", "change", "sentence"),
    [
        (TRAIN, {"id": "zoe/000.ogg"}, "'zoe/000.ogg' does not begin with a voice"),
        (TRAIN, {"audio": None}, "column audio must hold audio"),
        (TEST, {"speaker_id": len(VOICES)}, f"speaker_id {len(VOICES)} is not one of the {len(VOICES)} voices"),
        (TEST, {"audio": {"bytes": b"not audio", "path": "a.ogg"}}, "not a readable audio file"),
        (PAIRS, {"ind": None}, "has no column ind"),
    ],
    ids=["voice", "no audio", "speaker", "broken audio", "column"],
)
def test_bad_speech_is_told_in_a_sentence(tmp_path, speech, path, change, sentence):
    shutil.copytree(speech, tmp_path / "speech")
    rows = pq.read_table(tmp_path / "speech" / path).to_pylist()
    rows[0] |= change
    if change == {"ind": None}:
        rows = [{"positive_audio": row["positive_audio"]} for row in rows]
    write(tmp_path / "speech" / path, rows)
    read = {TRAIN: training_clips, TEST: held_out_clips}.get(path, lambda folder: pair_clips(folder, 1))
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / "speech")


def test_a_model_of_another_codec_is_refused(speech_model):
    with pytest.raises(UserError, match=r"it was trained on the codes of .*tiny-mimi, which are not those of"):
        load_model(str(speech_model(4)), CODEC)


def test_a_missing_pystoi_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(UserError, match="pystoi, which is not installed"):
        load_pystoi()
