"""The benchmark during training: the figures of eval/salmon.py, however the work is split."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_train import STEPS, arguments, launch  # noqa: F401 - a fixture
from torchtitan import train
from torchtitan.config_manager import ConfigManager

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def pairs(make_sound, tmp_path) -> Path:
    """Two tasks: seven pairs, two of them of equal clips, and five, one of which cannot be read."""
    for number, (task, count) in enumerate({"bg_alignment": 7, "rir_consistency": 5}.items()):
        rows: dict[str, list[Any]] = {"task": [], "ind": [], "positive_audio": [], "negative_audio": []}
        for i in range(count):
            first, second = (make_sound(20 * number + 2 * i + side, 0.4 + 0.13 * (i + side)) for side in range(2))
            second = first if task == "bg_alignment" and i < 2 else second
            second = b"no audio" if task == "rir_consistency" and i == 3 else second
            for key, value in (("task", task), ("ind", i)):
                rows[key].append(value)
            rows["positive_audio"].append({"bytes": first, "path": None})
            rows["negative_audio"].append({"bytes": second, "path": None})
        folder = tmp_path / "pairs" / task
        folder.mkdir(parents=True)
        types = {"positive_audio": AUDIO, "negative_audio": AUDIO}
        pq.write_table(pa.table({k: pa.array(v, types.get(k)) for k, v in rows.items()}), folder / "train-0.parquet")
    return tmp_path / "pairs"


def options(pairs: Path, *more: str) -> tuple[str, ...]:
    wanted = ("--evaluation.enable_evaluation", "--evaluation.dataset_path", str(pairs), "--evaluation.freq", "4")
    return (*wanted, "--evaluation.seq_len", "128", "--evaluation.batch_size", "3", *more)


def accuracies(folder: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {line.pop("step"): line for line in lines if "evaluation/accuracy" in line}


def test_the_figures_are_those_of_the_benchmark(arguments, pairs, tmp_path, mimi_folder, capfd):  # noqa: F811
    from torchtitan.eval.benchmark import Options, command
    from torchtitan.eval.suites import SALMON

    launch(arguments(tmp_path, 1, *options(pairs), "--checkpoint.last_save_in_hf", "--optimizer.lr", "1e-2"), 1)
    found = accuracies(tmp_path)
    assert list(found) == [4, STEPS]
    assert "1 clips cannot be read" in capfd.readouterr().err

    model = tmp_path / "run" / "hf" / f"step-{STEPS}"
    given = Options(str(pairs), str(model), str(mimi_folder), str(tmp_path / "results"), device="cpu", dtype="float32")
    assert command(SALMON, given) == 1
    expected = json.loads(next((tmp_path / "results").rglob("accuracy.json")).read_text())
    assert {name: found[STEPS][f"evaluation/accuracy_{name}"] for name in expected} == pytest.approx(expected)
    assert found[STEPS]["evaluation/accuracy"] == pytest.approx(sum(expected.values()) / 2)
    assert expected["bg_alignment"] * 7 % 1 == pytest.approx(0) or expected["bg_alignment"] * 14 % 1 == pytest.approx(0)


SPLITS = {
    "FSDP": ("--evaluation.batch_size", "1"),
    "TP": ("--parallelism.tensor_parallel_degree", "2"),
    "PP": ("--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_microbatch_size", "1"),
}


@pytest.mark.parametrize("name", ["PP", *(pytest.param(name, marks=pytest.mark.slow) for name in ("FSDP", "TP"))])
def test_two_ranks_find_the_same(arguments, pairs, tmp_path, name):  # noqa: F811
    still = options(pairs, "--optimizer.lr", "1e-20", "--training.steps", "1", "--validation.no-enabled")
    launch(arguments(tmp_path / "one", 1, *still), 1)
    launch(arguments(tmp_path / "two", 2, *still, *SPLITS[name], "--training.global_batch_size", "4"), 2)
    assert accuracies(tmp_path / "two") == accuracies(tmp_path / "one")


def test_a_fixed_choice_of_pairs(arguments, pairs, tmp_path, caplog):  # noqa: F811
    launch(arguments(tmp_path, 1, *options(pairs, "--evaluation.max_pairs_per_task", "2")), 1)
    assert "of 4 pairs" in caplog.text or "of 3 pairs" in caplog.text


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--evaluation.dataset_path", "./nowhere"), "./nowhere"),
        (("--evaluation.seq_len", "3"), "evaluation.seq_len"),
        (("--evaluation.seq_len", "100000"), "rows of at most"),
        (("--evaluation.freq", "3", "--evaluation.evaluation_freq", "4"), "evaluation.evaluation_freq"),
    ],
)
def test_wrong_input_is_one_line(arguments, pairs, tmp_path, capfd, more, sentence):  # noqa: F811
    if "4" in more:  # the later one of two equal settings counts
        assert ConfigManager().parse_args(list(more)).evaluation.freq == 4
        return
    assert train.main(arguments(tmp_path, 1, *options(pairs), *more)) == 2
    assert sentence in capfd.readouterr().err


def test_a_folder_without_pairs_is_one_line(arguments, tmp_path, capfd):  # noqa: F811
    (tmp_path / "empty").mkdir()
    assert train.main(arguments(tmp_path, 1, *options(tmp_path / "empty"))) == 2
    assert "nothing to evaluate" in capfd.readouterr().err
