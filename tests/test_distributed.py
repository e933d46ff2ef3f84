"""Two ranks compute what one does: weights, loss, gradients, updates and checkpoints.

The two ranks are processes of this very file (gloo, CPU). They run all their scenarios once, write what they got into
a folder, and the tests compare it with one rank's results.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from torchtitan.audio.token_stream import TokenStream
from torchtitan.checkpoint.manager import (
    CheckpointManager,
    find_checkpoint,
    find_steps,
    load_checkpoint,
    load_full_parameters,
    read_state,
    restore_random_state,
)
from torchtitan.components.dataloader import Batch
from torchtitan.components.optimizer import build_optimizer
from torchtitan.components.validate import ValidationResult, Validator
from torchtitan.config.job_config import Optimizer
from torchtitan.models.llama3.args import Llama3Args, read_config
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.parallelize import shard
from torchtitan.models.llama3.weights import init_random, load_hf, materialize
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools.errors import UserError

KNOWN_ROWS, VOCAB_SIZE = 258, 301
SETTINGS = Optimizer(lr=1e-2)
STEPS = 3


# --- what one rank and two ranks do alike


def build(folder: Path, mesh=None) -> Llama3:
    """The base model in a folder, its vocabulary extended, without values."""
    args = Llama3Args.from_hf({**read_config(folder), "vocab_size": VOCAB_SIZE})
    with torch.device("meta"):
        model = Llama3(args)
    if mesh is not None:
        shard(model, mesh, torch.float32, torch.float32)
    materialize(model, torch.device("cpu"), 64)
    return model.train()


def loaded(folder: Path, mesh=None) -> Llama3:
    model = build(folder, mesh)
    load_hf(model, folder, KNOWN_ROWS)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def parameters(model: Llama3) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


def gradients(model: Llama3) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows of 40 ids; the first two, which rank 0 gets, are nearly full, the others nearly empty."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB_SIZE, (4, 40), generator=random)
    targets = torch.randint(VOCAB_SIZE, (4, 40), generator=random)
    for row, length in enumerate((40, 33, 5, 0)):
        targets[row, length:] = IGNORE_INDEX
    return tokens, targets


def backward(model: Llama3, step: int, rows: slice) -> torch.Tensor:
    """One backward pass over some rows of a batch, of the mean over the targets of all rows; this rank's loss sum."""
    tokens, targets = batch(step)
    loss = model(tokens[rows], targets[rows])
    (loss / (targets != IGNORE_INDEX).sum()).backward()
    return loss.detach()


def update(model: Llama3, optimizer: torch.optim.Optimizer, step: int, rows: slice) -> None:
    backward(model, step, rows)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train(model: Llama3, rows: slice) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, SETTINGS)
    for step in range(STEPS):
        update(model, optimizer, step, rows)
    return optimizer


class HeldOut:
    """A loader of three batches of one row, dealt out to the ranks: with two, the first has one more than the other."""

    def __init__(self, rank: int, world_size: int):
        tokens = torch.randint(2048, (3, 41), generator=torch.Generator().manual_seed(5))
        targets = tokens[:, 1:].clone()
        for row, length in enumerate((40, 7, 21)):
            targets[row, length:] = IGNORE_INDEX
        self.batches = [Batch(tokens[i : i + 1, :-1], targets[i : i + 1], 0, {}) for i in range(rank, 3, world_size)]

    def start_state(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def __iter__(self):
        yield from self.batches


def validate(model: Llama3, rank: int, world_size: int, steps: int = -1) -> ValidationResult:
    stream = TokenStream(0, 1, 2047)
    return Validator(HeldOut(rank, world_size), stream, steps).run(model.eval())


def speech_model(mesh=None) -> Llama3:
    """A model of the 2,050 ids that Q = 1 has over an empty base."""
    args = Llama3Args(vocab_size=2050, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=64)
    with torch.device("meta"):
        model = Llama3(args)
    if mesh is not None:
        shard(model, mesh, torch.float32, torch.float32)
    materialize(model, torch.device("cpu"), 64)
    init_random(model, 3)
    return model


def checkpoint_state(model: Llama3) -> dict:
    return {"model_args": model.args.to_dict(), "tokens_seen": 0, "config": {}, "data": {}}


# --- the two ranks


def run_rank(rank: int, folder: Path, bases: dict[str, Path]) -> None:
    """All scenarios of one of two ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    rows = slice(0, 2) if rank == 0 else slice(2, 4)
    results = {}
    for kind, base in bases.items():
        model = loaded(base, mesh)
        results[f"{kind}/loaded"] = parameters(model)
        results[f"{kind}/shares"] = {name: p.to_local().shape[0] / p.shape[0] for name, p in model.named_parameters()}
        loss = backward(model, 0, rows)
        dist.all_reduce(loss)
        results[f"{kind}/loss"], results[f"{kind}/gradients"] = loss, gradients(model)
        results[f"{kind}/tied"] = model.output.weight is model.tok_embeddings.weight

        model.zero_grad()
        train(model, rows)
        results[f"{kind}/trained"] = parameters(model)

        model = build(base, mesh)
        init_random(model, 7)
        results[f"{kind}/random"] = parameters(model)

    model = loaded(bases["tied"], mesh)
    optimizer = train(model, rows)
    manager = CheckpointManager(folder / "checkpoint", keep_latest_k=2)
    torch.manual_seed(rank)
    for step in (1, 2, STEPS):
        manager.save(step, model, optimizer, checkpoint_state(model), Path.mkdir)
    update(model, optimizer, STEPS, rows)
    results["uninterrupted"] = parameters(model)

    model = loaded(bases["tied"], mesh)
    optimizer = build_optimizer(model, SETTINGS)
    state = load_checkpoint(manager.latest(), model, optimizer, model.args)
    torch.rand(1)
    restore_random_state(state["ranks"][rank]["random"])
    results["random"] = torch.rand(1)
    update(model, optimizer, STEPS, rows)
    results["resumed"] = parameters(model)

    weights_only = CheckpointManager(folder / "weights")
    weights_only.save(1, model, None, checkpoint_state(model), Path.mkdir, torch.bfloat16)

    results["validation"] = asdict(validate(speech_model(mesh), rank, 2))
    torch.save(results, folder / f"results-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def bases(make_base_model) -> dict[str, Path]:
    return {"tied": make_base_model(tied=True), "untied": make_base_model(tied=False)}


@pytest.fixture(scope="module")
def two_ranks(bases, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder with the checkpoints, and what each of the two ranks got."""
    folder = tmp_path_factory.mktemp("two-ranks")
    arguments = [str(path) for path in (folder, bases["tied"], bases["untied"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
    return folder, [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= tolerance, name


BOTH = pytest.mark.parametrize("kind", ["tied", "untied"])


@BOTH
def test_each_rank_keeps_half(two_ranks, kind):
    for rank in two_ranks[1]:
        assert all(0 <= share <= 0.55 for share in rank[f"{kind}/shares"].values())


@BOTH
def test_loaded_weights_are_the_same(two_ranks, bases, kind):
    expected = parameters(loaded(bases[kind]))
    assert expected["tok_embeddings.weight"][KNOWN_ROWS:VOCAB_SIZE].any(dim=1).all()  # the new rows are in it
    for rank in two_ranks[1]:
        assert_close(rank[f"{kind}/loaded"], expected, 1e-7)


@BOTH
def test_random_weights_are_the_same(two_ranks, bases, kind):
    model = build(bases[kind])
    init_random(model, 7)
    assert_close(two_ranks[1][0][f"{kind}/random"], parameters(model), 0.0)


@BOTH
def test_loss_is_the_same(two_ranks, bases, kind):
    expected = backward(loaded(bases[kind]), 0, slice(0, 4))
    assert two_ranks[1][1][f"{kind}/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@BOTH
def test_gradients_are_the_same(two_ranks, bases, kind):
    model = loaded(bases[kind])
    backward(model, 0, slice(0, 4))
    assert_close(two_ranks[1][0][f"{kind}/gradients"], gradients(model), 1e-5)


@BOTH
def test_updates_are_the_same(two_ranks, bases, kind):
    model = loaded(bases[kind])
    before = parameters(model)
    train(model, slice(0, 4))
    expected = parameters(model)
    assert (expected["norm.weight"] - before["norm.weight"]).abs().max() > 1e-3
    assert_close(two_ranks[1][0][f"{kind}/trained"], expected, 1e-5)


def test_tied_weights_stay_tied(two_ranks):
    assert [rank["tied/tied"] for rank in two_ranks[1]] == [True, True]
    assert "output.weight" not in two_ranks[1][0]["tied/trained"]


def test_validation_averages_over_the_tokens_of_all_ranks(two_ranks, one_rank):
    expected = validate(speech_model(), 0, 1)
    assert expected.num_targets == 40 + 7 + 21
    for rank in two_ranks[1]:
        assert rank["validation"].keys() == asdict(expected).keys()
        for name, value in asdict(expected).items():
            assert rank["validation"][name] == pytest.approx(value, rel=1e-5), name


def test_validation_is_the_mean_over_real_targets(one_rank):
    model = speech_model()
    losses = [F.cross_entropy(model(b.tokens)[0], b.targets[0], reduction="none") for b in HeldOut(0, 1).batches]
    expected = sum(loss.sum() for loss in losses) / (40 + 7 + 21)
    assert validate(model, 0, 1).loss == pytest.approx(expected.item(), rel=1e-5)


def test_validation_of_some_batches(one_rank):
    assert validate(speech_model(), 0, 1, steps=2).num_targets == 40 + 7


# --- checkpoints


def test_checkpoint_of_two_ranks_is_read_by_one(two_ranks):
    folder, (rank, _) = two_ranks
    assert_close(load_full_parameters(folder / "checkpoint" / f"step-{STEPS}"), rank["tied/trained"], 0.0)


def test_resumed_ranks_go_on_bit_for_bit(two_ranks):
    for rank in two_ranks[1]:
        assert_close(rank["resumed"], rank["uninterrupted"], 0.0)


def test_one_rank_goes_on_from_the_checkpoint_of_two(two_ranks, bases, one_rank):
    folder, (rank, _) = two_ranks
    model = loaded(bases["tied"])
    optimizer = build_optimizer(model, SETTINGS)
    load_checkpoint(folder / "checkpoint" / f"step-{STEPS}", model, optimizer, model.args)
    update(model, optimizer, STEPS, slice(0, 4))
    assert_close(parameters(model), rank["uninterrupted"], 1e-5)


def test_each_rank_finds_its_own_random_state(two_ranks):
    for number, rank in enumerate(two_ranks[1]):
        assert torch.equal(rank["random"], torch.rand(1, generator=torch.Generator().manual_seed(number)))


def test_only_the_latest_checkpoints_are_kept(two_ranks):
    assert sorted(path.name for path in (two_ranks[0] / "checkpoint").iterdir()) == ["step-2", "step-3"]


def test_weights_alone_are_saved_in_their_dtype(two_ranks):
    folder, (rank, _) = two_ranks
    checkpoint = find_checkpoint(folder / "weights")
    rounded = {name: tensor.bfloat16().float() for name, tensor in rank["resumed"].items()}
    assert_close(load_full_parameters(checkpoint), rounded, 0.0)


def test_run_cannot_be_resumed_from_weights_alone(two_ranks, bases):
    model = loaded(bases["tied"])
    with pytest.raises(UserError, match="has only weights, so a run cannot resume"):
        load_checkpoint(two_ranks[0] / "weights" / "step-1", model, build_optimizer(model, SETTINGS), model.args)


def test_checkpoint_of_another_size_is_refused(two_ranks, bases):
    model = loaded(bases["untied"])
    with pytest.raises(UserError, match=r"differs from the configured one in \['tied'\]"):
        load_checkpoint(two_ranks[0] / "checkpoint" / "step-2", model, None, model.args)


@pytest.fixture
def saved(bases, one_rank, tmp_path):
    """A function that saves steps of one rank into a folder, and the manager."""
    model = loaded(bases["tied"])

    def save(*steps: int, keep_latest_k: int = 0) -> CheckpointManager:
        manager = CheckpointManager(tmp_path, keep_latest_k)
        for step in steps:
            manager.save(step, model, None, checkpoint_state(model), Path.mkdir)
        return manager

    return save


def test_latest_is_by_number_not_by_name(saved):
    assert saved(9, 10).latest().name == "step-10"


def test_step_can_be_chosen(saved):
    manager = saved(1, 2)
    assert manager.latest(load_step=1).name == "step-1"
    with pytest.raises(UserError, match=r"no complete checkpoint of step 3 \(complete: \[1, 2\]\)"):
        manager.latest(load_step=3)


def test_no_checkpoint_yet(tmp_path):
    assert CheckpointManager(tmp_path / "missing").latest() is None


@pytest.mark.parametrize("missing", [".metadata", "train_state.json"])
def test_partial_folder_is_no_checkpoint(saved, tmp_path, missing):
    manager = saved(1, 2)
    (tmp_path / "step-2" / missing).unlink()
    (tmp_path / ".step-3.partial").mkdir()
    (tmp_path / "step-4").mkdir()
    assert find_steps(tmp_path) == [1]
    assert manager.latest().name == "step-1"


def test_leftovers_of_an_interrupted_save_do_not_matter(saved, tmp_path):
    partial = tmp_path / ".step-1.partial"
    partial.mkdir()
    (partial / "leftover").touch()
    saved(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert not (tmp_path / "step-1" / "leftover").exists()


def test_step_is_saved_over_an_older_one(saved, tmp_path):
    saved(1)
    (tmp_path / "step-1" / "mark").touch()
    saved(1)
    assert not (tmp_path / "step-1" / "mark").exists()


def test_zero_keeps_all_checkpoints(saved, tmp_path):
    saved(1, 2, 3, keep_latest_k=0)
    assert find_steps(tmp_path) == [1, 2, 3]


def test_new_checkpoint_of_a_run_that_went_back_is_kept(saved, tmp_path):
    saved(10, 20, 30)
    saved(15, keep_latest_k=2)
    assert find_steps(tmp_path) == [10, 15, 20, 30]
    saved(17, keep_latest_k=2)
    assert find_steps(tmp_path) == [15, 17, 20, 30]


def test_damaged_tensors_are_one_sentence(saved, tmp_path):
    saved(1)
    for path in (tmp_path / "step-1").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="the checkpoint is damaged or incomplete"):
        load_full_parameters(tmp_path / "step-1")


def test_damaged_state_is_one_sentence(saved, tmp_path):
    saved(1)
    (tmp_path / "step-1" / "train_state.json").write_text("{")
    with pytest.raises(UserError, match=r"train_state\.json: it cannot be read"):
        read_state(tmp_path / "step-1")


def test_other_format_is_refused(saved, tmp_path):
    saved(1)
    path = tmp_path / "step-1" / "train_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="a checkpoint of format 99, this version reads 2"):
        read_state(tmp_path / "step-1")


@pytest.mark.parametrize("place", ["", "run", "run/checkpoint", "run/checkpoint/step-2"])
def test_checkpoint_is_found_from_its_run(saved, tmp_path, place):
    saved(1, 2)
    run = tmp_path / "run" / "checkpoint"
    run.mkdir(parents=True)
    for step in ("step-1", "step-2"):
        (tmp_path / step).rename(run / step)
    if place:
        assert find_checkpoint(tmp_path / place) == run / "step-2"
    else:
        with pytest.raises(UserError, match="there is no complete checkpoint"):
            find_checkpoint(tmp_path)


if __name__ == "__main__":
    number, *paths = sys.argv[1:]
    output, tied, untied = map(Path, paths)
    run_rank(int(number), output, {"tied": tied, "untied": untied})
