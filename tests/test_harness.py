"""Evaluations as they are run: over several ranks, killed and continued, with kept codes, from training checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.test_eval import REPOSITORY, open_task, run, wav, write_task
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.datasets import decoding
from torchtitan.eval import benchmark, scoring, store
from torchtitan.eval.benchmark import Options, command, encode_pairs
from torchtitan.eval.results import results_folder
from torchtitan.eval.store import ArrayStore, digest
from torchtitan.eval.suites import SALMON, SLM21


@pytest.fixture(scope="module")
def model(tmp_path_factory, mimi_folder, save_speech_model) -> Path:
    return save_speech_model(tmp_path_factory.mktemp("runs") / "run" / "step-1", mimi_folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """sWUGGY and sBLIMP, with clips of many lengths, equal ones, and one that is no audio."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [(wav(0.1 + 0.05 * i, i), wav(0.7 - 0.05 * i, 20 + i)) for i in range(9)]
    write_task(folder / "sWUGGY", [*pairs, (pairs[0][0], pairs[0][0])], SLM21.columns)
    write_task(folder / "sBLIMP", [*pairs[::-1], (b"no audio", pairs[1][1])], SLM21.columns)
    return folder


@pytest.fixture(scope="module")
def alone(model, data, tmp_path_factory) -> Path:
    """The results of an undisturbed run."""
    return run(SLM21, data, model, tmp_path_factory.mktemp("alone"), batch_size=4, cache_dir="none")[1]


def assert_same(folder: Path, expected: Path) -> None:
    """The same results: codes and decisions exactly, scores within rounding."""
    found, wanted = (pq.read_table(f / "samples.parquet").to_pylist() for f in (folder, expected))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.pop("nll"), other.pop("nll"), rtol=0, atol=1e-5)
        assert one == other
    assert (folder / "accuracy.json").read_text() == (expected / "accuracy.json").read_text()
    results, others = (json.loads((f / "results.json").read_text()) for f in (folder, expected))
    for key in ("tasks", "averages", "localized"):
        assert results[key] == others[key]
    assert sorted(os.listdir(folder)) == ["accuracy.json", "accuracy.png", "results.json", "samples.parquet"]


def process(ranks: int, model: Path, data: Path, output: Path, *more: str) -> subprocess.Popen:
    arguments = ["--model_name", str(model), "--dataset", str(data), "--output_dir", str(output), *more]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(REPOSITORY / "eval" / "sLM21.py"), "--device", "cpu", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_ranks_find_what_one_finds(model, data, alone, tmp_path):
    ranks = process(2, model, data, tmp_path / "out", "--batch_size", "2")
    output = ranks.communicate(timeout=120)[0]
    # Every rank must have ended by itself: torchrun would have reported a code that is not 0 of any of them.
    assert ranks.returncode == 1, output
    assert "1 of 10 pairs are left out" in output
    assert output.count("Written to") == 1
    assert_same(tmp_path / "out" / "sLM21" / "run" / "step-1", alone)


class Killed(BaseException):
    pass


def test_a_run_that_ends_early_goes_on_with_what_it_had(model, data, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FILE_ENTRIES", 1)
    computed: list[int] = []
    score_batch = scoring._score_batch

    def stop_after(batches: int):
        def score(lm, rows):
            if batches == len(computed):
                raise Killed
            computed.append(sum(map(len, rows)))
            return score_batch(lm, rows)

        return score

    options = {"batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    for batches in (1, 3):
        monkeypatch.setattr(scoring, "_score_batch", stop_after(batches))
        with pytest.raises(Killed):
            run(SLM21, data, model, tmp_path / "out", **options)
    monkeypatch.setattr(scoring, "_score_batch", stop_after(-1))
    _, folder = run(SLM21, data, model, tmp_path / "out", **options)
    assert_same(folder, alone)
    assert sum(computed) == 18, "a clip was computed twice, or not at all"


def test_what_was_computed_before_an_error_is_kept(model, data, tmp_path, monkeypatch):
    """Also if the run is stopped long before a file is due, while codes or scores are computed."""
    options = {"batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    score_batch, encode_clips, encoded, computed = scoring._score_batch, benchmark._encode, [], []

    def encode(codec, clips):
        if len(encoded) == 8:
            encoded.append(None)
            raise KeyboardInterrupt
        encoded.extend(waveform.numpy().tobytes() for _, waveform in clips)
        return encode_clips(codec, clips)

    def score(lm, rows):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(sum(map(len, rows)))
        return score_batch(lm, rows)

    monkeypatch.setattr(benchmark, "_CLIPS_PER_ENCODE", 4)
    monkeypatch.setattr(benchmark, "_encode", encode)
    monkeypatch.setattr(scoring, "_score_batch", score)
    for kept in ("cache", "out"):
        with pytest.raises(KeyboardInterrupt):
            run(SLM21, data, model, tmp_path / "out", **options)
        assert list((tmp_path / kept).rglob("*.npz")), f"nothing was kept in {kept}"
    assert len(encoded) == len(set(encoded)), "codes were computed twice"


def test_ranks_that_know_different_scores_leave_nothing_out(model, tmp_path):
    """As when processes of a killed run still write while the next one begins."""
    lm = SpeechLM.load(str(model), device="cpu")
    sequences = [lm.stream.sample(torch.full((4, 3 + i), i)) for i in range(11)]
    wanted = scoring.score(lm.model, sequences)
    kept = ArrayStore(tmp_path)
    for ids, nll in list(zip(sequences, wanted, strict=True))[::3]:
        kept.put(digest(ids.numpy().tobytes()), nll.numpy())
    parts = [scoring.score(lm.model, sequences, 2, store=s, share=(r, 2)) for r, s in enumerate((kept, None))]
    for nll, *found in zip(wanted, *parts, strict=True):
        (only,) = [one for one in found if one is not None]
        torch.testing.assert_close(only, nll, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_killed_at_random_moments_two_ranks_go_on(model, data, alone, tmp_path):
    random = np.random.default_rng(0)
    output = tmp_path / "out"
    for _ in range(5):
        ranks = process(2, model, data, output, "--batch_size", "2", "--cache_dir", str(tmp_path / "cache"))
        time.sleep(random.uniform(4, 9))
        children = Path(f"/proc/{ranks.pid}/task/{ranks.pid}/children").read_text().split()
        for pid in (ranks.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        ranks.communicate()
        if ranks.returncode == 1:
            break
    ranks = process(2, model, data, output, "--batch_size", "2", "--cache_dir", str(tmp_path / "cache"))
    said = ranks.communicate(timeout=120)[0]
    assert ranks.returncode == 1, said
    assert_same(output / "sLM21" / "run" / "step-1", alone)


def test_scores_of_other_weights_are_not_taken_up(model, data, mimi_folder, save_speech_model, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FILE_ENTRIES", 1)
    changed = save_speech_model(tmp_path / "run" / "step-1", mimi_folder)
    monkeypatch.setattr(benchmark, "samples_table", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(SLM21, data, changed, tmp_path / "out", limit=2)
    monkeypatch.undo()
    weights = next(changed.glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    _, folder = run(SLM21, data, changed, tmp_path / "out", limit=2)
    _, fresh = run(SLM21, data, changed, tmp_path / "fresh", limit=2)
    assert pq.read_table(folder / "samples.parquet")["nll"] == pq.read_table(fresh / "samples.parquet")["nll"]


def test_codes_are_computed_once(model, data, alone, tmp_path, monkeypatch):
    options = {"batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    run(SLM21, data, model, tmp_path / "first", **options)
    decoded: list[str] = []
    load_beginning = decoding.load_beginning

    def load(source, max_seconds, name, *others):
        decoded.append(name)
        return load_beginning(source, max_seconds, name, *others)

    monkeypatch.setattr(decoding, "load_beginning", load)
    _, folder = run(SLM21, data, model, tmp_path / "second", **options)
    assert decoded == ["sBLIMP pair 9, positive clip"]  # which is no audio
    assert_same(folder, alone)
    # Another limit, another convention or another codec means other codes.
    run(SLM21, data, model, tmp_path / "third", max_seconds=0.3, **options)
    assert len(decoded) > 20


def test_a_damaged_file_of_codes_is_passed_over(model, data, alone, tmp_path):
    options = {"batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    run(SLM21, data, model, tmp_path / "first", **options)
    files = list((tmp_path / "cache").rglob("*.npz"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-100])
    _, folder = run(SLM21, data, model, tmp_path / "second", **options)
    assert_same(folder, alone)


def test_where_nothing_can_be_kept_that_is_said_and_the_run_goes_on(model, data, alone, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    _, folder = run(SLM21, data, model, tmp_path / "out", batch_size=4, cache_dir=str(tmp_path / "file" / "cache"))
    assert capsys.readouterr().err.count("nothing can be kept there") == 1
    assert_same(folder, alone)


def test_a_store_keeps_arrays_of_any_length_by_key(tmp_path):
    kept = ArrayStore(tmp_path)
    arrays = {digest(i): np.arange(i, dtype=np.int16) for i in range(5)}
    for number, (key, array) in enumerate(arrays.items()):
        kept.put(key, array, number)
    kept.flush()
    kept.put(digest("later"), np.ones(2, np.int16))
    kept.flush()
    again = ArrayStore(tmp_path)
    assert len(again) == 6
    for number, (key, array) in enumerate(arrays.items()):
        found = again.get(key)
        assert found is not None
        assert found[1] == number
        assert np.array_equal(found[0], array)
    assert again.get(digest("other")) is None
    assert not list(tmp_path.glob("*.partial"))


def test_the_order_of_pairs_and_the_batch_size_change_nothing(model, tmp_path):
    pairs = [(wav(0.1 + 0.04 * i, i), wav(0.5 - 0.04 * i, 20 + i)) for i in range(8)]
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    write_task(tmp_path / "a" / "gender_consistency", pairs, SALMON.columns, ind=list(range(8)))
    write_task(tmp_path / "b" / "gender_consistency", [pairs[i] for i in order], SALMON.columns, ind=order)
    found = {}
    for name, batch_size in (("a", 1), ("b", 5)):
        _, folder = run(SALMON, tmp_path / name, model, tmp_path / f"out-{name}", batch_size=batch_size)
        rows = pq.read_table(folder / "samples.parquet").to_pylist()
        found[name] = {(row["item"], row["side"]): row for row in rows}
    assert found["a"].keys() == found["b"].keys()
    for key, row in found["a"].items():
        assert row["codes"] == found["b"][key]["codes"]
        np.testing.assert_allclose(row["nll"], found["b"][key]["nll"], rtol=0, atol=1e-5)


def test_ranks_encode_their_shares(model, data):
    lm = SpeechLM.load(str(model), device="cpu")
    task = open_task(data / "sWUGGY", SLM21)
    whole = encode_pairs(SLM21, task, lm.codec, lm.stream, 2048)
    parts = [
        encode_pairs(SLM21, task, lm.codec, lm.stream, 2048, chosen=range(rank, task.num_pairs, 3)) for rank in range(3)
    ]
    assert [clip.pair for clip in parts[1]] == [1, 1, 4, 4, 7, 7]
    merged = sorted((clip for part in parts for clip in part), key=lambda clip: clip.pair)
    for one, other in zip(merged, whole, strict=True):
        assert (one.pair, one.side) == (other.pair, other.side)
        assert torch.equal(one.codes, other.codes)


def test_threads_encode_pairs_of_their_own_and_are_given_back(model, data, monkeypatch):
    lm = SpeechLM.load(str(model), device="cpu")
    task = open_task(data / "sWUGGY", SLM21)
    whole = encode_pairs(SLM21, task, lm.codec, lm.stream, 2048)
    used: list[int] = []
    encode_pair = lm.codec.encode_pair

    def recorded(*clips):
        used.append(torch.get_num_threads())
        return encode_pair(*clips)

    monkeypatch.setattr(lm.codec, "encode_pair", recorded)
    torch.set_num_threads(2)
    try:
        clips = encode_pairs(SLM21, task, lm.codec, lm.stream, 2048)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert used == [1] * task.num_pairs
    for one, other in zip(clips, whole, strict=True):
        assert (one.pair, one.side) == (other.pair, other.side)
        assert (one.codes != other.codes).sum() <= one.codes.numel() // 1000


def test_a_training_checkpoint_is_evaluated_as_it_is(model, data, alone, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    from convert_hf_to_dcp import convert

    step = convert(str(model), tmp_path / "run" / "checkpoint")
    folder = results_folder(tmp_path / "out", "sLM21", str(step))
    assert folder.parts[-2:] == ("checkpoint", "step-0")
    for name in (step, tmp_path / "run"):
        code = command(SLM21, Options(str(data), str(name), output_dir=str(tmp_path / "out"), device="cpu"))
        assert code == 1
        settings = json.loads((folder / "results.json").read_text())["settings"]
        assert settings["model"]["folder"] == str(step), "it is not said which checkpoint of the run was evaluated"
        (folder / "results.json").rename(folder / f"results of {name.name}.json")
    found, wanted = (pq.read_table(f / "samples.parquet").to_pylist() for f in (folder, alone))
    for one, other in zip(found, wanted, strict=True):
        assert one["codes"] == other["codes"]
        np.testing.assert_allclose(one["nll"], other["nll"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", [("--targets", "phones"), ("--targets", "q9"), ("--windows_ms", "0")])
def test_rules_that_cannot_be_are_refused_before_anything_is_scored(model, data, tmp_path, option, monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(benchmark, "score_task", lambda *_: pytest.fail("something was scored"))
    arguments = ["--model_name", str(model), "--dataset", str(data), "--output_dir", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sLM21.py", *arguments, *option])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "eval" / "sLM21.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1
