"""The benchmark during training: the figures of eval/salmon.py, however the work is split."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import STEPS, launch
from torchtitan import train
from torchtitan.audio.token_stream import extend_tokenizer
from torchtitan.config.job_config import Evaluation
from torchtitan.eval.evaluator import Evaluator, find_pairs
from torchtitan.models.loss import IGNORE_INDEX

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


def test_the_figures_are_those_of_the_benchmark(arguments, pairs, tmp_path, mimi_folder, capfd):
    from torchtitan.eval.benchmark import Options, command
    from torchtitan.eval.suites import SALMON

    launch(arguments(tmp_path, 1, *options(pairs), "--checkpoint.last_save_in_hf", "--optimizer.lr", "1e-2"), 1)
    found = accuracies(tmp_path)
    assert list(found) == [4, STEPS]
    assert "1 clips cannot be read" in capfd.readouterr().err

    model = tmp_path / "run" / "hf" / f"step-{STEPS}"
    given = Options(
        str(pairs), str(model), str(mimi_folder), output_dir=str(tmp_path / "results"), device="cpu", dtype="float32"
    )
    assert command(SALMON, given) == 1
    expected = json.loads(next((tmp_path / "results").rglob("accuracy.json")).read_text())
    assert {name: found[STEPS][f"evaluation/accuracy_{name}"] for name in expected} == pytest.approx(expected)
    assert found[STEPS]["evaluation/accuracy"] == pytest.approx(sum(expected.values()) / 2)
    results = json.loads(next((tmp_path / "results").rglob("results.json")).read_text())
    assert results["tasks"]["bg_alignment"]["ties"] == 2


SPLITS = {
    "FSDP": ("--evaluation.batch_size", "1"),
    "TP": ("--parallelism.tensor_parallel_degree", "2"),
    "PP": ("--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_microbatch_size", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SPLITS))
def test_two_ranks_find_the_same(arguments, pairs, tmp_path, name):
    still = options(pairs, "--optimizer.lr", "1e-20", "--training.steps", "1", "--validation.no-enabled")
    launch(arguments(tmp_path / "one", 1, *still), 1)
    launch(arguments(tmp_path / "two", 2, *still, *SPLITS[name], "--training.global_batch_size", "4"), 2)
    assert accuracies(tmp_path / "two") == accuracies(tmp_path / "one")


def test_the_same_pairs_are_chosen_each_time(pairs, codec, make_tokenizer, one_rank):
    stream = extend_tokenizer(make_tokenizer(), 4)

    def scored(count: int) -> tuple[int, list[set[tuple[int, ...]]]]:
        """How many pairs are judged, and the clips that are scored in each of two evaluations."""
        config = Evaluation(dataset_path=str(pairs), seq_len=128, max_pairs_per_task=count)
        evaluator = Evaluator(config, find_pairs(config), codec, stream, (0, 1), True)
        clips: list[set[tuple[int, ...]]] = []

        def losses(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            clips[-1].update(tuple(row[row != IGNORE_INDEX].tolist()) for row in targets)
            return torch.rand(targets.shape)

        for _ in range(2):
            clips.append(set())
            result = evaluator.run(losses)
        return result.pairs, clips

    judged, (first, second) = scored(2)
    assert judged == 3  # two of each task, of which one cannot be read
    assert first == second == scored(2)[1][0]
    judged, (every, _) = scored(0)
    assert judged == 7 + 4  # one cannot be read
    assert first < every


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--evaluation.dataset_path", "./nowhere"), "./nowhere"),
        (("--evaluation.seq_len", "3"), "evaluation.seq_len"),
        (("--evaluation.seq_len", "100000"), "rows of at most"),
    ],
)
def test_wrong_input_is_one_line(arguments, pairs, tmp_path, capfd, more, sentence):
    assert train.main(arguments(tmp_path, 1, *options(pairs), *more)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


def test_a_folder_without_pairs_is_one_line(arguments, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    assert train.main(arguments(tmp_path, 1, *options(tmp_path / "empty"))) == 2
    assert "nothing to evaluate" in capfd.readouterr().err
