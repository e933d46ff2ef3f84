"""The evaluations, on a tiny random model and codec and real audio files."""

import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from torchtitan.audio.token_stream import TokenStream
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.eval import scoring
from torchtitan.eval.benchmark import Options, command, encode_pairs, score_task
from torchtitan.eval.data import DataError, open_tasks
from torchtitan.eval.metrics import Rule, clip_scores, judge
from torchtitan.eval.results import Clip, require_no_other_model, results_folder, samples_table
from torchtitan.eval.scoring import score
from torchtitan.eval.store import ArrayStore, digest
from torchtitan.eval.suites import SALMON, SLM21, STORY_CLOZE, Benchmark
from torchtitan.tools.errors import UserError

REPOSITORY = Path(__file__).parents[1]
CONTEXT = 40  # ids: nine frames of four codes
MAX_FRAMES = 9


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, mimi_folder, save_speech_model):
    return save_speech_model(tmp_path_factory.mktemp("runs") / "run" / "step-10", mimi_folder, context=CONTEXT)


@pytest.fixture(scope="module")
def lm(model_folder):
    return SpeechLM.load(str(model_folder), device="cpu")


def wav(seconds: float, seed: int) -> bytes:
    """A noisy tone as the bytes of an 8 kHz wav file."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * 8000)) / 8000
    samples = 0.3 * np.sin(2 * np.pi * (100 + 50 * seed) * time) + 0.1 * random.standard_normal(len(time))
    file = io.BytesIO()
    soundfile.write(file, samples, 8000, format="WAV")
    return file.getvalue()


def write_task(
    folder: Path, pairs: Sequence[tuple[bytes | None, bytes]], columns: tuple[str, str], **plain: list
) -> Path:
    folder.mkdir(parents=True)
    table = {name: [{"bytes": pair[side], "path": None} for pair in pairs] for side, name in enumerate(columns)}
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = {name: pa.array(values, audio) for name, values in table.items()}
    pq.write_table(pa.table({**arrays, **plain}), folder / "train-00000-of-00001.parquet")
    return folder


def open_task(folder: Path, benchmark: Benchmark):
    (task,), _ = open_tasks(str(folder), benchmark.tasks, benchmark.columns, benchmark.as_configurations)
    return task


def plain_nll(lm: SpeechLM, ids: torch.Tensor) -> torch.Tensor:
    """One sequence at a time, straight over transformers."""
    with torch.no_grad():
        logits = lm.model(input_ids=ids[None]).logits[0].float()
    return -torch.log_softmax(logits[:-1], dim=-1)[torch.arange(len(ids) - 1), ids[1:]]


def random_samples(lm: SpeechLM, frames: list[int]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [lm.stream.sample(torch.randint(0, 2048, (4, n))) for n in frames]


def hand_made(rows: list[tuple[str, int, str, int, list[float]]], num_quantizers: int):
    """A samples table from task, pair, side, frames and NLLs."""
    clips = [
        Clip(task, pair, side, str(pair), torch.zeros(num_quantizers, frames, dtype=torch.int16), torch.tensor(nll))
        for task, pair, side, frames, nll in rows
    ]
    return samples_table(clips, num_quantizers, {})


def two_sides(pairs: list[tuple[float, float]]):
    """A samples table of one-frame, one-quantizer clips whose NLLs are all the same number."""
    rows = []
    for i, (positive, negative) in enumerate(pairs):
        rows += [("t", i, "positive", 1, [positive] * 3), ("t", i, "negative", 1, [negative] * 3)]
    return hand_made(rows, 1)


# Scoring.


def test_scores_are_those_of_a_plain_loop_over_transformers(lm):
    sequences = random_samples(lm, [1, 9, 4, 2, 7])
    for nll, ids in zip(score(lm.model, sequences, batch_size=3), sequences, strict=True):
        assert nll.dtype == torch.float32
        torch.testing.assert_close(nll, plain_nll(lm, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_scores_do_not_depend_on_batch_size(lm, batch_size):
    sequences = random_samples(lm, [3, 1, 9, 9, 5, 2, 8])
    for nll, other in zip(score(lm.model, sequences, 4), score(lm.model, sequences, batch_size), strict=True):
        torch.testing.assert_close(nll, other, rtol=0, atol=1e-5)


def test_scores_stay_with_their_sequence_when_these_are_permuted(lm):
    sequences = random_samples(lm, [3, 1, 9, 5])
    order = [2, 0, 3, 1]
    scores = score(lm.model, sequences, 2)
    for nll, i in zip(score(lm.model, [sequences[i] for i in order], 2), order, strict=True):
        torch.testing.assert_close(nll, scores[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("columns", [1000, 1 << 20])
def test_logits_are_computed_in_bounded_blocks(lm, monkeypatch, columns):
    monkeypatch.setattr(scoring, "LOGITS_BLOCK", 16)
    monkeypatch.setattr(scoring, "CPU_COLUMNS", columns)
    sequences = random_samples(lm, [9, 9, 9, 5])
    shapes = []

    def linear(hidden, weight, bias):
        shapes.append((len(hidden), len(weight)))
        return torch.nn.functional.linear(hidden, weight, bias)

    monkeypatch.setattr(scoring, "F", SimpleNamespace(linear=linear))
    scores = score(lm.model, sequences, 4)
    assert all(rows <= 16 and width <= columns for rows, width in shapes)
    vocabulary = lm.model.config.vocab_size
    assert sum(rows * width for rows, width in shapes) == vocabulary * sum(len(ids) - 1 for ids in sequences)
    for nll, ids in zip(scores, sequences, strict=True):
        torch.testing.assert_close(nll, plain_nll(lm, ids), rtol=0, atol=1e-5)


def test_equal_sequences_are_computed_once_and_get_the_same_bits(lm):
    sequences = random_samples(lm, [9, 4, 5, 9, 2])
    sequences.append(sequences[1].clone())
    rows, progress = [], []
    handle = lm.model.model.embed_tokens.register_forward_hook(lambda *call: rows.append(call[2].shape[0]))
    try:
        scores = score(lm.model, sequences, 2, progress.append)
    finally:
        handle.remove()
    assert rows[-3:] == [2, 2, 1]
    assert sum(progress) == len(sequences)
    assert torch.equal(scores[1], scores[-1])


def begin_alike(lm: SpeechLM) -> list[torch.Tensor]:
    """Pairs of which one or all frames but the last are shared, one is the beginning of the other, and single ones."""
    torch.manual_seed(2)
    codes = [torch.randint(0, 2048, (4, 9)) for _ in range(8)]
    sequences = []
    for own, shared, first, second in ((0, 8, 9, 9), (1, 1, 9, 9), (2, 5, 6, 9), (3, 4, 4, 7), (4, 6, 7, 8)):
        other = torch.cat((codes[own][:, :shared], codes[7 - own // 2][:, shared:]), dim=1)
        sequences += [lm.stream.sample(codes[own][:, :first]), lm.stream.sample(other[:, :second])]
    return [*sequences, lm.stream.sample(codes[5]), sequences[0].clone(), sequences[2][:-1].clone()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_common_beginnings_are_computed_once_and_change_no_score(lm, batch_size, attention, monkeypatch):
    monkeypatch.setattr(lm.model.config, "_attn_implementation", attention)
    sequences = begin_alike(lm)
    positions: list[int] = []
    handle = lm.model.model.embed_tokens.register_forward_hook(
        lambda *call: positions.append(call[2].shape[:2].numel())
    )
    try:
        scores = score(lm.model, sequences, batch_size)
    finally:
        handle.remove()
    for nll, ids in zip(scores, sequences, strict=True):
        torch.testing.assert_close(nll, plain_nll(lm, ids), rtol=0, atol=1e-5)
    assert torch.equal(scores[0], scores[11])
    assert torch.equal(scores[0][:33], scores[1][:33]) or batch_size == 1, "the beginning was computed twice"
    if batch_size == 3:  # without padding
        assert sum(positions[2:]) < 0.8 * sum(len(ids) - 1 for ids in sequences[:11])


def test_common_beginnings_when_ranks_share_and_some_scores_are_known(lm, tmp_path):
    sequences = begin_alike(lm)
    kept = ArrayStore(tmp_path)
    kept.put(digest(sequences[0].numpy().tobytes()), plain_nll(lm, sequences[0]).numpy())
    parts = [score(lm.model, sequences, 4, store=kept, share=(rank, 3)) for rank in range(3)]
    for ids, *found in zip(sequences, *parts, strict=True):
        (only,) = [one for one in found if one is not None]
        torch.testing.assert_close(only, plain_nll(lm, ids), rtol=0, atol=1e-5)


def test_a_model_that_scales_its_logits_is_refused(lm, monkeypatch):
    forward = lm.model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits / 8
        return output

    monkeypatch.setattr(lm.model, "forward", scaled)
    with pytest.raises(UserError, match="logits"):
        score(lm.model, random_samples(lm, [2]))


# Rules and accuracies.


@pytest.mark.parametrize("num_quantizers", [1, 4, 8])
def test_semantic_rule_takes_label_positions_2_and_every_qth_after_it(num_quantizers):
    stream = TokenStream(base_size=7, num_quantizers=num_quantizers, bos_id=1)
    ids = stream.sample(torch.randint(0, 2048, (num_quantizers, 3)))
    positions = Rule("semantic").mask(ids, stream).nonzero()[:, 0].tolist()
    assert positions == [2 + num_quantizers * frame for frame in range(4)]  # the fourth is </audio>


def test_semantic_rule_does_not_assume_a_bos():
    stream = TokenStream(base_size=7, num_quantizers=4, bos_id=1)
    ids = stream.sample(torch.randint(0, 2048, (4, 2)), text_ids=[2, 3, 4])[1:]
    assert Rule("semantic").mask(ids, stream).nonzero()[:, 0].tolist() == [4, 8, 12]
    assert Rule("all").mask(ids, stream).nonzero()[:, 0].tolist() == list(range(3, 13))


def test_clip_scores_are_means_over_the_targets_of_the_rule():
    nll = [100.0, 1.0, 10.0, 2.0, 20.0, 6.0]  # <audio>, two frames of two codes, </audio>
    samples = hand_made([("t", 0, "positive", 2, nll)], num_quantizers=2)
    assert clip_scores(samples, Rule("all"))[0] == pytest.approx(139 / 6)
    assert clip_scores(samples, Rule("semantic"))[0] == pytest.approx(3.0)


def test_lower_nll_of_the_positive_is_right_and_a_tie_is_half():
    result = judge(two_sides([(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (1.0, 5.0)]), Rule("all"))["t"]
    assert (result.accuracy, result.pairs, result.ties) == (2.5 / 4, 4, 1)
    assert result.standard_error == pytest.approx(np.std([1, 0, 0.5, 1], ddof=1) / 2)


def test_nan_leaves_its_pair_out_and_lists_it():
    result = judge(two_sides([(1.0, 2.0), (float("nan"), 1.0), (1.0, float("nan"))]), Rule("all"))["t"]
    assert (result.accuracy, result.pairs) == (1.0, 1)
    assert [(left["pair"], left["reason"]) for left in result.left_out] == [
        (1, "the positive clip's score is nan"),
        (2, "the negative clip's score is nan"),
    ]


def test_no_countable_pair_gives_no_accuracy_rather_than_a_number():
    result = judge(two_sides([(float("nan"), 1.0)]), Rule("all"))["t"]
    assert result.accuracy is None
    assert result.standard_error is None
    assert result.pairs == 0


def test_samples_whose_nlls_do_not_fit_their_frames_are_refused():
    with pytest.raises(ValueError, match="row 0"):
        judge(hand_made([("t", 0, "positive", 2, [1.0] * 3)], 1), Rule("all"))


# Data.


def test_a_tasks_own_folder_runs_that_task_alone(tmp_path):
    for name in ("bg_alignment", "all", "rir_consistency"):
        write_task(tmp_path / name, [(wav(0.1, 1), wav(0.1, 2))], SALMON.columns)
    found, missing = open_tasks(str(tmp_path / "bg_alignment"), SALMON.tasks, SALMON.columns, True)
    assert [task.name for task in found] == ["bg_alignment"]
    assert missing == []
    found, missing = open_tasks(str(tmp_path), SALMON.tasks, SALMON.columns, True)
    assert [task.name for task in found] == ["rir_consistency", "bg_alignment"]  # unions are not tasks
    assert len(missing) == 6


def test_missing_column_is_named_with_what_is_there(tmp_path):
    write_task(tmp_path / "sWUGGY", [(wav(0.1, 1), wav(0.1, 2))], ("positive", "wrong"))
    with pytest.raises(DataError, match="'negative'; the columns are positive, wrong"):
        open_tasks(str(tmp_path), SLM21.tasks, SLM21.columns, False)


@pytest.mark.parametrize("dataset", ["./nowhere", "/nowhere/at/all"])
def test_missing_folder_is_refused(dataset):
    with pytest.raises(DataError, match="no such folder"):
        open_tasks(dataset, SLM21.tasks, SLM21.columns, False)


def test_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(DataError, match="none of the task folders sWUGGY, sBLIMP"):
        open_tasks(str(tmp_path), SLM21.tasks, SLM21.columns, False)


def test_splits_have_tasks_of_their_own(model_folder, tmp_path):
    for split, count in (("train", 1), ("dev", 2), ("test", 3)):
        pairs = [(wav(0.1, i), wav(0.2, 10 * count + i)) for i in range(count)]
        folder = write_task(tmp_path / split, pairs, SLM21.columns)
        (tmp_path / "d" / "sWUGGY").mkdir(parents=True, exist_ok=True)
        (folder / "train-00000-of-00001.parquet").rename(tmp_path / "d" / "sWUGGY" / f"{split}-0.parquet")
    (tmp_path / "d" / "sBLIMP" / "dev").mkdir(parents=True)
    write_task(tmp_path / "other", [(wav(0.1, 1), wav(0.2, 2))], SLM21.columns)
    (tmp_path / "other" / "train-00000-of-00001.parquet").rename(tmp_path / "d" / "sBLIMP" / "dev" / "0.parquet")
    _, folder = run(SLM21, tmp_path / "d", model_folder, tmp_path / "out", splits=["dev", "test"])
    results = json.loads((folder / "results.json").read_text())
    assert {name: task["pairs"] for name, task in results["tasks"].items()} == {
        "sWUGGY_dev": 2,
        "sBLIMP_dev": 1,
        "sWUGGY_test": 3,
    }
    assert results["missing_tasks"] == ["sBLIMP_test"]
    tasks, missing = open_tasks(str(tmp_path / "d"), SLM21.tasks, SLM21.columns, False)
    assert [(task.name, task.num_pairs) for task in tasks] == [("sWUGGY", 1)]
    assert missing == ["sBLIMP"], "pairs of dev were taken for those of train"
    with pytest.raises(DataError, match=r"\(split valid\)"):
        open_tasks(str(tmp_path / "d"), SLM21.tasks, SLM21.columns, False, "valid")


def test_dev_and_test_pairs_are_not_mixed_where_no_split_was_asked_for(tmp_path):
    folder = write_task(tmp_path / "d" / "sStoryCloze", [(wav(0.1, 1), wav(0.2, 2))], SLM21.columns)
    for split in ("dev", "test"):
        (folder / f"{split}.parquet").write_bytes((folder / "train-00000-of-00001.parquet").read_bytes())
    (folder / "train-00000-of-00001.parquet").unlink()
    for name in (tmp_path / "d", folder):
        with pytest.raises(DataError, match=r"other splits \(--splits dev test\)"):
            open_tasks(str(name), STORY_CLOZE.tasks, STORY_CLOZE.columns, False)
    (folder / "pairs.parquet").write_bytes((folder / "dev.parquet").read_bytes())
    (task,), _ = open_tasks(str(folder), STORY_CLOZE.tasks, STORY_CLOZE.columns, False)
    assert task.files == [folder / "pairs.parquet"]


def test_a_file_is_no_folder(tmp_path):
    folder = write_task(tmp_path / "sWUGGY", [(wav(0.1, 1), wav(0.2, 2))], SLM21.columns)
    with pytest.raises(DataError, match="this is a file"):
        open_tasks(str(folder / "train-00000-of-00001.parquet"), SLM21.tasks, SLM21.columns, False)


@pytest.mark.slow
def test_story_cloze_in_full(model_folder, tmp_path):
    """As many pairs as the public sets have, with these two columns alone."""
    pairs = [(wav(0.08 + 0.01 * (i % 7), i), wav(0.08 + 0.01 * (i % 5), 2000 + i)) for i in range(1871)]
    for name in STORY_CLOZE.tasks:
        write_task(tmp_path / "d" / name, pairs, STORY_CLOZE.columns)
    code, folder = run(STORY_CLOZE, tmp_path / "d", model_folder, tmp_path / "out")
    assert code == 0
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    assert [(name, task["pairs"]) for name, task in tasks.items()] == [("sStoryCloze", 1871), ("tStoryCloze", 1871)]
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [row["item"] for row in rows[: 2 * 1871 : 2]] == [str(i) for i in range(1871)]
    points = [np.mean(a["nll"][1::4]) < np.mean(b["nll"][1::4]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert tasks["sStoryCloze"]["accuracy"] == np.mean(points[:1871])


def test_audio_may_be_a_path_beside_the_parquet_file(lm, tmp_path):
    folder = write_task(tmp_path / "sWUGGY", [(wav(0.2, 1), wav(0.3, 2))], SLM21.columns)
    audio = pa.array([{"bytes": None, "path": "clip.wav"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pq.read_table(folder).set_column(1, "negative", audio)
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    (folder / "clip.wav").write_bytes(wav(0.2, 1))
    positive, negative = score_task(SLM21, open_task(folder, SLM21), lm)
    assert torch.equal(positive.codes, negative.codes)


ARRAY_TYPE = pa.struct([("path", pa.string()), ("array", pa.list_(pa.float64())), ("sampling_rate", pa.int64())])


def as_arrays(folder: Path) -> None:
    """Replace the clips of a task by their decoded samples."""
    file = folder / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    for name in ("positive", "negative"):
        cells = []
        for cell in table.column(name).to_pylist():
            samples, rate = soundfile.read(io.BytesIO(cell["bytes"]), dtype="float32")
            cells.append({"path": "x.wav", "array": samples, "sampling_rate": rate})
        table = table.set_column(table.schema.names.index(name), name, pa.array(cells, ARRAY_TYPE))
    pq.write_table(table, file)


@pytest.mark.parametrize("cached", [True, False])
def test_audio_may_be_decoded(lm, tmp_path, cached):
    pairs = [(wav(0.2, 1), wav(0.3, 2)), (wav(0.25, 3), wav(0.2, 4))]
    for name in ("a", "b"):
        write_task(tmp_path / name / "sWUGGY", pairs, SLM21.columns)
    as_arrays(tmp_path / "b" / "sWUGGY")
    cache = ArrayStore(tmp_path / "store") if cached else None
    clips = []
    for name in ("a", "b", "b"):
        task = open_task(tmp_path / name / "sWUGGY", SLM21)
        clips.append(encode_pairs(SLM21, task, lm.codec, lm.stream, lm.max_length, cache=cache))
    for given, decoded, again in zip(*clips, strict=True):
        assert torch.equal(given.codes, decoded.codes) and torch.equal(given.codes, again.codes)


def test_columns_without_audio_are_refused(tmp_path):
    (tmp_path / "sWUGGY").mkdir()
    table = pa.table({"positive": [[0.1, 0.2]], "negative": ["a.wav"]})
    pq.write_table(table, tmp_path / "sWUGGY" / "train-0.parquet")
    with pytest.raises(DataError, match=r"'positive' of task sWUGGY must contain audio as \{bytes, path\} or \{array"):
        open_tasks(str(tmp_path / "sWUGGY"), SLM21.tasks, SLM21.columns, False)


# From files to results.


def test_clips_are_cut_at_the_time_limit_and_then_at_the_context_by_whole_frames(lm, tmp_path):
    pairs = [(wav(0.5, 1), wav(3.0, 2)), (wav(1.0, 3), wav(0.71, 4))]
    task = open_task(write_task(tmp_path / "sWUGGY", pairs, SLM21.columns), SLM21)
    clips = score_task(SLM21, task, lm, max_seconds=0.9)
    assert [clip.codes.shape[1] for clip in clips] == [7, MAX_FRAMES, MAX_FRAMES, MAX_FRAMES]
    assert [round(clip.cut, 6) for clip in clips] == [0, 2.28, 0.28, 0]
    assert [round(clip.context_cut, 6) for clip in clips] == [0, 0.18, 0.18, 0]
    assert [len(clip.nll) for clip in clips] == [4 * 7 + 2] + [4 * MAX_FRAMES + 2] * 3
    result = judge(samples_table(clips, 4, {}), SLM21.rule)["sWUGGY"]
    assert (result.cut_clips, result.context_cut_clips) == (2, 2)


def test_codes_and_scores_of_a_clip_are_those_of_the_clip_alone(lm, tmp_path):
    from torchtitan.audio.waveform import load_audio

    files = [wav(0.1 + 0.11 * i, i) for i in range(6)]
    pairs = list(zip(files[::2], files[1::2], strict=True))
    task = open_task(write_task(tmp_path / "sBLIMP", pairs, SLM21.columns), SLM21)
    for clip, file in zip(score_task(SLM21, task, lm, batch_size=4), files, strict=True):
        (codes,) = lm.codec.encode([load_audio(file)])
        assert torch.equal(clip.codes.long(), codes)
        torch.testing.assert_close(clip.nll, plain_nll(lm, lm.stream.sample(codes)), rtol=0, atol=1e-5)


def run(benchmark: Benchmark, dataset: Path, model: Path, output: Path, **options) -> tuple[int, Path]:
    options = Options(str(dataset), str(model), output_dir=str(output), device="cpu", **options)
    code = command(benchmark, options)
    return code, output / benchmark.name / model.parent.name / model.name


def test_results_can_be_recomputed_from_samples_alone(lm, model_folder, tmp_path, capsys):
    pairs = [(wav(0.1 + 0.07 * i, i), wav(0.6 - 0.07 * i, 10 + i)) for i in range(5)]
    pairs.append((pairs[0][0], pairs[0][0]))  # identical clips: an exact tie
    write_task(tmp_path / "d" / "sWUGGY", pairs, SLM21.columns, frequency=[3, 1, 4, 1, 5, 9])
    write_task(tmp_path / "d" / "sBLIMP", pairs[:2], SLM21.columns, id=[70, 71], voice=["a", "b"], frequency=["x", "y"])
    code, folder = run(SLM21, tmp_path / "d", model_folder, tmp_path / "out", batch_size=3)
    assert code == 0

    accuracy = json.loads((folder / "accuracy.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    samples = pq.read_table(folder / "samples.parquet")
    assert list(accuracy) == ["sWUGGY", "sBLIMP"]
    recomputed = judge(samples.drop_columns("codes"), SLM21.rule)
    for name in accuracy:
        assert recomputed[name].accuracy == accuracy[name] == results["tasks"][name]["accuracy"]
        assert recomputed[name].standard_error == results["tasks"][name]["standard_error"]
    assert results["tasks"]["sWUGGY"]["ties"] == 1

    # By hand, too: positions 2, 6, 10, ... of the ids are 1, 5, 9, ... of the targets.
    rows = samples.to_pylist()
    points = []
    for positive, negative in zip(rows[:12:2], rows[1:12:2], strict=True):
        assert (positive["side"], negative["side"], positive["pair"]) == ("positive", "negative", negative["pair"])
        first, second = np.mean(positive["nll"][1::4]), np.mean(negative["nll"][1::4])
        points.append(0.5 if first == second else float(first < second))
    assert accuracy["sWUGGY"] == np.mean(points)

    assert samples.schema.field("codes").type == pa.list_(pa.int16())
    assert samples.schema.field("nll").type == pa.list_(pa.float32())
    assert all(len(row["codes"]) == 4 * row["frames"] == len(row["nll"]) - 2 for row in rows)
    for row in rows:  # the codes are frame by frame, and the NLLs in the order of the ids they make
        ids = lm.stream.sample(torch.tensor(row["codes"]).reshape(-1, 4).T)
        torch.testing.assert_close(torch.tensor(row["nll"]), plain_nll(lm, ids), rtol=0, atol=1e-5)
    assert [row["item"] for row in rows[-4:]] == ["70", "70", "71", "71"]
    assert [row["frequency"] for row in rows[::2]] == ["3", "1", "4", "1", "5", "9", "x", "y"]
    assert json.loads(samples.schema.metadata[b"num_quantizers"]) == 4
    assert json.loads(samples.schema.metadata[b"settings"]) == results["settings"]
    docs = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    assert [key for key in results["settings"] if f"`{key}`" not in docs and f"`{key}." not in docs] == []
    assert sorted(os.listdir(folder)) == ["accuracy.json", "accuracy.png", "results.json", "samples.parquet"]
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "sWUGGY" in capsys.readouterr().out


def test_salmon_scores_all_targets(model_folder, tmp_path):
    pairs = [(wav(0.2, i), wav(0.3, 10 + i)) for i in range(12)]
    write_task(tmp_path / "gender_consistency", pairs, SALMON.columns, ind=list(range(12, 0, -1)))
    code, folder = run(SALMON, tmp_path, model_folder, tmp_path / "out")
    samples = pq.read_table(folder / "samples.parquet")
    rows = samples.to_pylist()
    right = [np.mean(a["nll"]) < np.mean(b["nll"]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    semantic = [np.mean(a["nll"][1::4]) < np.mean(b["nll"][1::4]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    differing = [i for i, (one, other) in enumerate(zip(right, semantic, strict=True)) if one != other]
    assert differing, "these clips cannot tell the rules apart"
    pair = samples.slice(2 * differing[0], 2)
    assert judge(pair, SALMON.rule)["gender_consistency"].accuracy == float(right[differing[0]])
    assert code == 0
    assert json.loads((folder / "accuracy.json").read_text()) == {"gender_consistency": np.mean(right)}
    assert [row["item"] for row in rows[::2]][:3] == ["12", "11", "10"]
    assert len(json.loads((folder / "results.json").read_text())["missing_tasks"]) == 7


def test_unreadable_clip_leaves_its_pair_out_and_everything_is_written(model_folder, tmp_path, capsys):
    pairs = [(wav(0.2, 1), wav(0.2, 2)), (wav(0.2, 3), b"no audio at all"), (None, wav(0.2, 4)), (wav(0.2, 5), b"")]
    write_task(tmp_path / "sWUGGY", pairs, SLM21.columns)
    code, folder = run(SLM21, tmp_path / "sWUGGY", model_folder, tmp_path / "out")
    result = json.loads((folder / "results.json").read_text())["tasks"]["sWUGGY"]
    assert code == 1
    assert result["pairs"] == 1
    assert json.loads((folder / "accuracy.json").read_text())["sWUGGY"] in (0, 1)
    assert [left["pair"] for left in result["left_out"]] == [1, 2, 3]
    for left, reason in zip(result["left_out"], ["not a readable", "the row has no audio", "is empty"], strict=True):
        assert reason in left["reason"]
    samples = pq.read_table(folder / "samples.parquet")
    assert samples.num_rows == 8
    assert samples["error"].null_count == 5
    assert judge(samples, SLM21.rule)["sWUGGY"].left_out == result["left_out"]
    assert "3 of 4 pairs are left out" in capsys.readouterr().err


def test_a_model_with_nan_weights_gives_no_accuracy_and_exit_code_1(mimi_folder, save_speech_model, tmp_path):
    model = save_speech_model(tmp_path / "m" / "broken", mimi_folder, context=CONTEXT, broken=True)
    write_task(tmp_path / "sWUGGY", [(wav(0.2, 1), wav(0.2, 2))], SLM21.columns)
    code, folder = run(SLM21, tmp_path / "sWUGGY", model, tmp_path / "out")
    assert code == 1
    assert json.loads((folder / "accuracy.json").read_text()) == {"sWUGGY": None}
    (left,) = json.loads((folder / "results.json").read_text())["tasks"]["sWUGGY"]["left_out"]
    assert left["reason"] == "the positive clip's score is nan; the negative clip's score is nan"
    assert (folder / "accuracy.png").is_file(), "without any accuracy there is no chart"


def test_limit_takes_the_first_pairs(lm, tmp_path):
    pairs = [(wav(0.1, i), wav(0.1, 10 + i)) for i in range(4)]
    task = open_task(write_task(tmp_path / "sWUGGY", pairs, SLM21.columns), SLM21)
    assert [clip.pair for clip in score_task(SLM21, task, lm, limit=2)] == [0, 0, 1, 1]


def test_a_folder_that_is_no_language_model_is_one_sentence(mimi_folder):
    with pytest.raises(UserError, match="no language model could be loaded"):
        SpeechLM.load(str(mimi_folder), device="cpu")


@pytest.mark.parametrize("option", [{"limit": 0}, {"batch_size": 0}, {"max_seconds": 0.0}, {"device": "abacus"}])
def test_options_that_cannot_work_are_refused_by_name(option):
    with pytest.raises(UserError, match=next(iter(option))):
        Options("speed", **option).check()


def test_results_folder_is_named_after_a_hub_id_or_the_last_two_parts_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "step-10").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    assert results_folder("out", "sLM21", "owner/model") == Path("out/sLM21/owner/model")
    for name in (str(tmp_path / "runs" / "step-10"), "step-10", "./step-10/"):
        assert results_folder("out", "sLM21", name) == Path("out/sLM21/runs/step-10")


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("outputs/A/hf/step-60", "A/hf/step-60"),
        ("outputs/A/checkpoint/step-60", "A/checkpoint/step-60"),
        ("outputs/A/checkpoints/checkpoint-7", "A/checkpoints/checkpoint-7"),
        ("outputs/B/hf/B", "B/hf/B"),
        ("models/mimi", "models/mimi"),
    ],
)
def test_results_of_two_runs_never_share_a_folder(tmp_path, model, named):
    (tmp_path / model).mkdir(parents=True)
    assert results_folder("out", "sLM21", str(tmp_path / model)) == Path("out/sLM21") / named


def test_results_of_another_model_are_not_overwritten(tmp_path):
    folder, (one, other) = tmp_path / "results", (tmp_path / "a" / "m", tmp_path / "b" / "m")
    folder.mkdir()
    require_no_other_model(folder, one)
    for text in ("[]", "{", "[" * 100_000):
        (folder / "results.json").write_text(text)
        require_no_other_model(folder, one)
    (folder / "results.json").write_text(json.dumps({"settings": {"model": {"folder": str(one)}}}))
    require_no_other_model(folder, one)
    with pytest.raises(UserError, match=rf"results of another model \({one}\); give another --output_dir"):
        require_no_other_model(folder, other)


# The command lines.


def command_line_task(folder: Path, script: str, model_folder: Path) -> tuple[str, Path, list[str]]:
    """A data folder with one good pair and one with a broken clip, and the arguments to evaluate it."""
    name = {"salmon.py": "rir_consistency", "sLM21.py": "sBLIMP", "sStoryCloze.py": "tStoryCloze"}[script]
    columns = SALMON.columns if script == "salmon.py" else SLM21.columns
    write_task(folder / "data" / name, [(wav(0.2, 1), wav(0.2, 2)), (wav(0.2, 1), b"broken")], columns)
    benchmark = {"salmon.py": "SALMON", "sLM21.py": "sLM21", "sStoryCloze.py": "sStoryCloze"}[script]
    written = folder / "out" / benchmark / model_folder.parent.name / model_folder.name / "accuracy.json"
    return name, written, f"--model_name {model_folder} --dataset data --output_dir out --batch_size 2".split()


def test_command_line_as_a_process(model_folder, tmp_path):
    """Results are written although a clip is broken; the exit code is 1 and there is no stack trace."""
    name, written, arguments = command_line_task(tmp_path, "salmon.py", model_folder)
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "eval" / "salmon.py"), *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "warning: data lacks" in done.stderr
    assert name in done.stdout
    assert list(json.loads(written.read_text())) == [name]


@pytest.mark.parametrize("script", ["sLM21.py", "sStoryCloze.py"])
def test_command_lines(script, model_folder, tmp_path, monkeypatch):
    name, written, arguments = command_line_task(tmp_path, script, model_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "eval" / script), run_name="__main__")
    assert stop.value.code == 1
    assert list(json.loads(written.read_text())) == [name]


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sLM21.py", "--dataset", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "eval" / "sLM21.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
