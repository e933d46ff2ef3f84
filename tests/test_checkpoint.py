"""Saving in the background, damaged and hostile checkpoints, and the ways to start and end a run."""

import io
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor

from tests.conftest import STEPS, figures, launch
from torchtitan import train
from torchtitan.checkpoint import manager as checkpoint
from torchtitan.checkpoint.manager import (
    STATE_FILE,
    STATE_TYPES,
    CheckpointManager,
    find_checkpoint,
    find_steps,
    load_full_parameters,
    read_state,
)
from torchtitan.checkpoint.reader import CheckpointReader, read_metadata, read_tensors
from torchtitan.config_manager import ConfigManager
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.weights import init_random, materialize
from torchtitan.tools.errors import ConfigError, UserError

ASYNC = pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])


# --- saving in the background


@ASYNC
def test_runs_that_save_in_the_background_save_the_same(arguments, tmp_path, mode):
    launch(arguments(tmp_path / "plain"), 1)
    launch(arguments(tmp_path / "other", 1, "--checkpoint.async_mode", mode), 1)
    assert figures(tmp_path / "other") == figures(tmp_path / "plain")
    for step in (3, STEPS):
        plain, other = (tmp_path / name / "run" / "checkpoint" / f"step-{step}" for name in ("plain", "other"))
        before, after = load_full_parameters(plain), load_full_parameters(other)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert read_state(plain)["ranks"] == read_state(other)["ranks"]
    assert not list((tmp_path / "other" / "run" / "checkpoint").glob(".*"))


def test_a_machine_whose_name_leads_nowhere_saves_in_the_background(arguments, tmp_path, monkeypatch):
    """As that of a container without a network, where torch would look it up."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(_async_process_executor, "_get_fq_hostname", lambda: "no-such-host.invalid")
    launch(arguments(tmp_path, 1, "--checkpoint.async_mode", "async_with_pinned_mem"), 1)
    assert find_steps(tmp_path / "run" / "checkpoint") == [3, STEPS]


@ASYNC
@pytest.mark.slow
def test_two_ranks_save_in_the_background_and_resume(arguments, tmp_path, mode):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("--checkpoint.async_mode", mode, "--checkpoint.interval", "1")
    launch(arguments(whole, 2, *more), 2)
    shutil.copytree(whole / "run" / "checkpoint" / "step-3", cut / "run" / "checkpoint" / "step-3")
    launch(arguments(cut, 2, *more), 2)
    expected = {key: value for key, value in figures(whole).items() if key[0] > 3}
    assert figures(cut) == expected


@pytest.fixture
def model() -> Llama3:
    args = Llama3Args(vocab_size=300, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=64)
    with torch.device("meta"):
        made = Llama3(args)
    materialize(made, torch.device("cpu"), 16)
    init_random(made, 0)
    return made


def save(manager: CheckpointManager, step: int, model: Llama3) -> Path:
    state = {"model_args": model.args.to_dict(), "tokens_seen": 0, "config": {}, "data": {}}
    return manager.save(step, model, None, state, lambda folder: folder.mkdir())


@ASYNC
def test_weights_may_change_while_they_are_being_saved(one_rank, model, tmp_path, mode):
    manager = CheckpointManager(tmp_path, async_mode=mode)
    before = {name: parameter.detach().clone() for name, parameter in model.weights()}
    path = save(manager, 1, model)
    manager.wait_for_staging()
    with torch.no_grad():
        for _, parameter in model.weights():
            parameter.zero_()
    manager.close()
    saved = load_full_parameters(path)
    assert all(torch.equal(saved[name], before[name]) for name in before)


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_the_device_is_waited_for_before_tensors_are_copied(one_rank, model, tmp_path, monkeypatch, mode):
    order = []

    def noting(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            order.append(name)
            return function(*given, **named)

        return call

    monkeypatch.setattr(checkpoint, "wait_for_compute", noting("wait", checkpoint.wait_for_compute))
    for name in ("save", "async_save"):
        monkeypatch.setattr(dcp, name, noting("copy", getattr(dcp, name)))
    manager = CheckpointManager(tmp_path, async_mode=mode)
    save(manager, 1, model)
    manager.close()
    assert order[:2] == ["wait", "copy"]


@ASYNC
def test_an_error_in_the_background_is_one_sentence(one_rank, model, tmp_path, mode):
    manager = CheckpointManager(tmp_path / "run", async_mode=mode)
    save(manager, 1, model)
    manager.wait()
    (tmp_path / "run").rename(tmp_path / "gone")
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="the checkpoint could not be saved"):
        save(manager, 2, model)
    manager.close()


def test_a_step_is_whole_only_when_everything_is_written(one_rank, model, tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path, async_mode="async")

    def interrupted(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(CheckpointManager, "_complete", interrupted)
    save(manager, 1, model)
    with pytest.raises(UserError, match=r"could not be saved \(no space left on device\)"):
        manager.close()
    assert find_steps(tmp_path) == []


def test_nothing_older_is_deleted_when_the_new_one_is_damaged(one_rank, model, tmp_path, monkeypatch):
    save(CheckpointManager(tmp_path), 1, model)
    whole = dcp.save

    def cut_off(tensors: Any, checkpoint_id: Path, **more: Any) -> None:
        whole(tensors, checkpoint_id=checkpoint_id, **more)
        for path in checkpoint_id.glob("*.distcp"):
            path.write_bytes(path.read_bytes()[:100])

    monkeypatch.setattr(dcp, "save", cut_off)
    save(CheckpointManager(tmp_path, keep_latest_k=1), 2, model)
    assert find_steps(tmp_path) == [1, 2]
    assert CheckpointManager(tmp_path).newest_intact() == tmp_path / "step-1"


# --- damage


def cut(step: Path) -> None:
    path = next(step.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-200])


def flip(step: Path) -> None:
    path = next(step.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(step: Path) -> None:
    next(step.glob("*.distcp")).unlink()


def garble_metadata(step: Path) -> None:
    (step / ".metadata").write_bytes(b"\x80\x04garbage")


def garble_state(step: Path) -> None:
    (step / "train_state.json").write_text('{"format": 2, "st')


@pytest.mark.parametrize("damage", [cut, flip, remove, garble_metadata, garble_state])
def test_a_run_falls_back_to_the_newest_step_that_is_whole(arguments, tmp_path, damage):
    launch(arguments(tmp_path, 1, "--checkpoint.interval", "2"), 1)
    expected = figures(tmp_path)
    folder = tmp_path / "run" / "checkpoint"
    shutil.rmtree(folder / "step-6")
    damage(folder / "step-4")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    launch(arguments(tmp_path, 1, "--checkpoint.interval", "2"), 1)
    assert figures(tmp_path) == {key: value for key, value in expected.items() if key[0] > 2}
    assert find_steps(folder) == [2, 4, STEPS]
    assert len(list(folder.glob("step-4.damaged-*"))) == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", "[" * 100_000, '{"format": 2}', '{"format": "2"}', '{"format": 2, "step": "1"}', "\xff"],
)
def test_a_state_that_is_none_is_set_aside(one_rank, model, tmp_path, text):
    save(CheckpointManager(tmp_path), 1, model)
    step = save(CheckpointManager(tmp_path), 2, model)
    (step / STATE_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(f"{step / STATE_FILE}: ")):
        read_state(step)
    manager = CheckpointManager(tmp_path)
    assert manager.latest() == tmp_path / "step-1"
    assert manager.newest_intact() == tmp_path / "step-1"
    assert len(list(tmp_path.glob("step-2.damaged-*"))) == 1


@pytest.mark.parametrize("missing", list(STATE_TYPES))
def test_a_state_that_lacks_a_key_is_refused_by_its_name(saved, missing):
    state = json.loads((saved / STATE_FILE).read_text())
    del state[missing]
    (saved / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(UserError, match=f"{missing} is missing or of another type"):
        read_state(saved)


def test_a_checkpoint_of_a_newer_format_is_refused_as_that(one_rank, model, tmp_path):
    step = save(CheckpointManager(tmp_path), 1, model)
    state = json.loads((step / STATE_FILE).read_text())
    (step / STATE_FILE).write_text(json.dumps({**state, "format": 3}))
    for find in (CheckpointManager(tmp_path).latest, CheckpointManager(tmp_path).newest_intact):
        with pytest.raises(UserError, match=r"step-1: a checkpoint of format 3, this version reads 2\."):
            find()
    assert step.is_dir()


@pytest.mark.parametrize("name", ["step-015", "step-٣٠", "step-99999999999999999999", "step--1", "step-1 "])
def test_folders_with_other_names_are_no_steps(one_rank, model, tmp_path, name):
    step = save(CheckpointManager(tmp_path), 1, model)
    shutil.copytree(step, tmp_path / name)
    assert find_steps(tmp_path) == [1]
    assert CheckpointManager(tmp_path).newest_intact() == step


def test_a_step_under_the_name_of_another_is_set_aside(one_rank, model, tmp_path):
    step = save(CheckpointManager(tmp_path), 1, model)
    shutil.copytree(step, tmp_path / "step-20")
    with pytest.raises(UserError, match="the folder is called step-20, but it holds step 1"):
        read_state(tmp_path / "step-20")
    assert CheckpointManager(tmp_path).newest_intact() == step


def test_files_in_the_place_of_folders_are_in_no_ones_way(one_rank, model, tmp_path):
    for name in ("step-7", ".step-7.partial", ".step-3.replaced", "step-3"):
        (tmp_path / name).write_text("")
    manager = CheckpointManager(tmp_path)
    assert manager.latest() is None
    step = save(manager, 7, model)
    assert CheckpointManager(tmp_path).newest_intact() == step
    assert not list(tmp_path.glob(".step-*"))


def test_a_damaged_step_that_is_asked_for_is_an_error(arguments, tmp_path, capfd):
    launch(arguments(tmp_path), 1)
    flip(tmp_path / "run" / "checkpoint" / "step-3")
    assert train.main(arguments(tmp_path, 1, "--checkpoint.load_step", "3")) == 2
    assert "the file has changed since it was written" in capfd.readouterr().err
    assert find_steps(tmp_path / "run" / "checkpoint") == [3, STEPS]


# --- code in a checkpoint


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def saved(one_rank, model, tmp_path) -> Path:
    return save(CheckpointManager(tmp_path / "run"), 1, model)


def test_code_in_the_metadata_does_not_run(saved, tmp_path):
    (saved / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "mark")))
    for read in (load_full_parameters, lambda path: read_metadata(path / ".metadata")):
        with pytest.raises(UserError, match=r"contains (posix|nt)\.mkdir, which no checkpoint needs"):
            read(saved)
    assert CheckpointManager(saved.parent).newest_intact() is None
    assert not (tmp_path / "mark").exists()


def test_code_in_a_field_of_the_metadata_does_not_run(saved, tmp_path):
    metadata = read_metadata(saved / ".metadata")
    metadata.planner_data = Planted(tmp_path / "mark")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="not to be trusted"):
        load_full_parameters(saved)
    assert not (tmp_path / "mark").exists()


def test_code_in_the_metadata_of_a_rank_does_not_run(saved, tmp_path, model):
    (saved / ".metadata").rename(saved / "moved")
    (saved / "__0.metadata").write_bytes(pickle.dumps(Planted(tmp_path / "mark")))
    with pytest.raises(UserError, match="not to be trusted"):
        read_tensors({f"model.{name}": p.detach() for name, p in model.weights()}, saved)
    with pytest.raises(UserError, match="not to be trusted"):
        CheckpointReader(saved).read_metadata(rank=0)
    assert not (tmp_path / "mark").exists()


def test_an_item_that_is_no_tensor_is_refused(one_rank, model, tmp_path):
    tensors = {f"model.{name}": p.detach() for name, p in model.weights()}
    dcp.save({**tensors, "planted": Planted(tmp_path / "mark")}, checkpoint_id=tmp_path / "step-1")
    for wanted in (tensors, {"planted": None}):
        with pytest.raises(UserError, match="planted is not a tensor"):
            read_tensors(wanted, tmp_path / "step-1")
    with pytest.raises(UserError, match="planted is not a tensor"):
        load_full_parameters(tmp_path / "step-1")
    assert not (tmp_path / "mark").exists()


def test_code_in_place_of_a_tensor_does_not_run(saved, tmp_path):
    record = io.BytesIO()
    torch.save(Planted(tmp_path / "mark"), record)
    metadata = read_metadata(saved / ".metadata")
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, record.tell()
    next(saved.glob("*.distcp")).write_bytes(record.getvalue())
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_full_parameters(saved)
    assert not (tmp_path / "mark").exists()


def test_files_outside_of_the_checkpoint_are_not_read(saved):
    metadata = read_metadata(saved / ".metadata")
    for info in metadata.storage_data.values():
        info.relative_path = f"../step-1/{info.relative_path}"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="name a file in another folder"):
        load_full_parameters(saved)


def test_nothing_but_tensors_and_json_is_saved(saved):
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".distcp", ".json", ""}
    state = json.loads((saved / "train_state.json").read_text())
    assert set(state["files"]) == {path.name for path in saved.glob("*.distcp")}


# --- ways to start and to end


def test_a_seed_checkpoint_starts_the_same_run(arguments, tmp_path):
    launch(arguments(tmp_path / "plain"), 1)
    launch(arguments(tmp_path / "seeded", 1, "--checkpoint.create_seed_checkpoint"), 1)
    assert find_steps(tmp_path / "seeded" / "run" / "checkpoint") == [0]
    launch(arguments(tmp_path / "seeded"), 1)
    assert figures(tmp_path / "seeded") == figures(tmp_path / "plain")


def test_a_seed_checkpoint_is_made_once_and_by_one_rank(arguments, tmp_path, monkeypatch, capfd):
    launch(arguments(tmp_path), 1)
    assert train.main(arguments(tmp_path, 1, "--checkpoint.create_seed_checkpoint", "--training.steps", "9")) == 2
    assert "it cannot have a seed" in capfd.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(arguments(tmp_path, 2, "--checkpoint.create_seed_checkpoint")) == 2
    assert "one rank makes it, not 2" in capfd.readouterr().err


def test_a_run_ends_and_another_starts_in_hugging_face_format(arguments, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ("--checkpoint.last_save_in_hf", "--checkpoint.export_dtype", "bfloat16")
    launch(arguments(tmp_path, 1, *options), 1)
    folder = tmp_path / "run" / "hf" / f"step-{STEPS}"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    assert theirs.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    saved = load_full_parameters(find_checkpoint(tmp_path / "run"))["norm.weight"]
    assert torch.equal(theirs.model.norm.weight, saved.bfloat16())

    shutil.rmtree(folder)  # as if the run had been killed before it was complete
    launch(arguments(tmp_path, 1, *options), 1)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).model.norm.weight, saved.bfloat16())

    start = ("--checkpoint.initial_load_path", str(folder), "--optimizer.lr", "1e-20", "--training.steps", "1")
    launch(arguments(tmp_path / "new", 1, *start), 1)
    after = figures(tmp_path / "new")[(1, "validation/loss")]
    assert after == pytest.approx(figures(tmp_path)[(STEPS, "validation/loss")], abs=0.02)
    fp32 = load_full_parameters(find_checkpoint(tmp_path / "new" / "run"))["norm.weight"]
    assert torch.equal(fp32, saved.bfloat16().float())


def test_a_hugging_face_model_of_other_sizes_or_for_more_than_weights_is_refused(
    arguments,
    make_base_model,
    tmp_path,
    capfd,
):
    start = ("--checkpoint.initial_load_path", str(make_base_model()))
    assert train.main(arguments(tmp_path, 1, *start)) == 2
    assert "differs from the configured one in ['vocab_size']" in capfd.readouterr().err
    assert train.main(arguments(tmp_path, 1, *start, "--checkpoint.no-initial_load_model_only")) == 2
    assert "has no optimizer state" in capfd.readouterr().err


def test_parts_can_be_left_out_of_loading(arguments, tmp_path):
    launch(arguments(tmp_path), 1)

    def resumed(name: str, *parts: str) -> dict[tuple[int, str], float]:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "run" / "checkpoint" / "step-3", folder / "run" / "checkpoint" / "step-3")
        launch(arguments(folder, 1, *(("--checkpoint.exclude_from_loading", ",".join(parts)) if parts else ())), 1)
        return figures(folder)

    everything = resumed("everything")
    assert everything == {key: value for key, value in figures(tmp_path).items() if key[0] > 3}
    without = resumed("optimizer", "optimizer")
    assert without[(4, "loss")] == everything[(4, "loss")]
    assert without[(5, "loss")] != everything[(5, "loss")]
    schedule = resumed("schedule", "lr_scheduler")
    rate = figures(tmp_path)[(2, "lr")]
    assert [schedule[(step, "lr")] for step in (4, 5)] == pytest.approx([rate / 2, rate])
    data = resumed("data", "dataloader")
    assert data[(4, "loss")] != everything[(4, "loss")]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--checkpoint.exclude_from_loading", "model"], "the parts are optimizer, lr_scheduler, dataloader, random"),
        (["--checkpoint.export_dtype", "bfloat16"], "applies only with"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ConfigManager().parse_args(["--checkpoint.enable_checkpoint", *options])


@pytest.mark.parametrize("key", ["create_seed_checkpoint", "last_save_in_hf"])
def test_without_checkpoints_nothing_is_saved(key):
    with pytest.raises(ConfigError, match="nothing is saved unless"):
        ConfigManager().parse_args([f"--checkpoint.{key}"])
