"""Faults of the machine: what is half written, cannot be written, or has other rights than asked for."""

import errno
import json
import stat
from types import SimpleNamespace

import pytest
import torch

from torchtitan.checkpoint.hf_export import write_weights
from torchtitan.components.metrics import MetricsLogger, drop_torn_line
from torchtitan.config.job_config import JobConfig
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.weights import init_random, materialize
from torchtitan.tools.logging import logger


@pytest.mark.parametrize(
    ("text", "kept"),
    [("", ""), ('{"step": 1}\n', '{"step": 1}\n'), ('{"step": 1}\n{"st', '{"step": 1}\n'), ('{"step', "")],
)
def test_a_torn_line_is_dropped(tmp_path, text, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    drop_torn_line(path)
    assert path.read_text() == kept
    drop_torn_line(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_that_goes_on_drops_a_torn_line_and_one_that_cannot_write_warns_once(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    metrics = MetricsLogger(JobConfig(), tmp_path, 0, torch.device("cpu"), lambda length: 1.0)
    metrics.write(2, {"loss": 2.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    warnings: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: warnings.append(text % values))
    metrics._file = SimpleNamespace(parent=tmp_path, open=full)
    for step in (3, 4):
        metrics.write(step, {"loss": 1.0})
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]


def test_exported_weights_can_be_read_by_whom_the_rest_can(tmp_path):
    args = Llama3Args(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=32, hidden_dim=32)
    with torch.device("meta"):
        model = Llama3(args)
    materialize(model, torch.device("cpu"), 1)
    init_random(model, 0)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0o640)
    write_weights(tmp_path, args, dict(model.named_parameters()), torch.float32)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640
