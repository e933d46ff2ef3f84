"""A step against transformers and numbers worked out by hand: its loss, its gradients and its learning rate.

The trainer runs from its command line, in this process; a second rank is a process of this very file. Before each
update a hook of torch's notes what the optimizer is given.
"""

import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.conftest import ROOT, figures, require_devices
from torchtitan import train
from torchtitan.components.dataloader import Batch
from torchtitan.models.llama3.weights import hf_names

LR = 1e-3
UNCLIPPED = ("--training.max_norm", "1e30")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def observe(arguments: list[str]) -> dict[int, dict[str, Any]]:
    """Run the trainer. Of each step on this rank: its microbatches, and at its update the learning rates of all
    parameters, and weights and gradients under transformers' names."""
    seen: dict[int, dict[str, Any]] = {}
    step = train.train_step

    def observed(trainer: train.Trainer, microbatches: list[Batch]) -> Any:
        names, theirs = {parameter: name for name, parameter in trainer.model.weights()}, hf_names(trainer.model.args)
        noted: dict[str, Any] = {"microbatches": microbatches, "weights": {}, "gradients": {}, "rates": []}
        seen[trainer.step] = noted

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                noted["rates"] += [group["lr"]] * len(group["params"])
                for parameter in group["params"]:
                    name = theirs[names[parameter]]
                    noted["weights"][name], noted["gradients"][name] = whole(parameter), whole(parameter.grad)

        hook = register_optimizer_step_pre_hook(note)
        try:
            return step(trainer, microbatches)
        finally:
            hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", observed)
        assert train.main(arguments) == 0
    return seen


def observe_two(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[int, dict[str, Any]]]:
    """The same of two ranks, this process and another one."""
    require_devices(2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    arguments = [*arguments, "--comm.init_timeout_seconds", "60"]
    command = [sys.executable, "-m", "tests.test_train_step", str(folder / "seen.pt"), *arguments]
    other = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    monkeypatch.setenv("RANK", "0")
    try:
        first = observe(arguments)
    finally:
        said = other.communicate(timeout=60)[0]
    assert other.returncode == 0, said[-3000:]
    return [first, torch.load(folder / "seen.pt", weights_only=False)]


def num_targets(clip: int) -> int:
    """Targets of the clip of this number in ``speech_folder``: four codes a frame, <audio> and </audio>."""
    rate = (24_000, 16_000, 44_100)[clip % 3]
    seconds = round((0.3 + 0.11 * clip) * rate) / rate
    return 4 * math.ceil(seconds * 12.5) + 2


def documents(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and targets [L] of each sample of a microbatch and of what pads a row."""
    found = []
    for row, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True)):
        starts = [0] if batch.positions is None else (batch.positions[row] == 0).nonzero()[:, 0].tolist()
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            found.append((tokens[start:stop], targets[start:stop]))
    return found


def by_hand(base: Path, step: dict[str, Any], batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean negative log-likelihood over the targets of some microbatches, and its gradients, each sample by itself
    through transformers' model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = 258 + 4 * 2048 + 2
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(base, vocab_size=vocab_size))
    # Rows after these align matrix products.
    cut = {
        name: weight[:vocab_size] if len(weight) > vocab_size else weight for name, weight in step["weights"].items()
    }
    model.load_state_dict({"lm_head.weight": cut["model.embed_tokens.weight"], **cut})
    total, count = torch.zeros(()), 0
    for tokens, targets in (document for batch in batches for document in documents(batch)):
        real = targets >= 0
        if real.any():
            likelihood = model(tokens[None]).logits[0].log_softmax(dim=-1)
            total = total - likelihood[real].gather(1, targets[real][:, None]).sum()
            count += int(real.sum())
    clips = [int(re.findall(r"clip-(\d+)", name)[-1]) for batch in batches for row in batch.keys for name in row]
    assert count == sum(map(num_targets, clips))  # padding is no target, and no target is left out
    (total / count).backward()
    return (total / count).item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


IN_BACKWARD = ("--optimizer.early_step_in_backward", "--training.max_norm", "0")


@pytest.mark.parametrize(
    ("ranks", "tied", "options"),
    [
        pytest.param(1, True, (), id="one rank"),
        pytest.param(1, False, (), id="untied"),
        pytest.param(1, True, ("--training.packing", "best_fit"), id="packed"),
        pytest.param(1, True, IN_BACKWARD, id="updated in the backward pass"),
        pytest.param(2, True, (), id="two ranks"),
    ],
)
def test_loss_and_gradients_are_those_of_the_mean_over_all_targets(
    arguments, make_base_model, tmp_path, monkeypatch, ranks, tied, options
):
    base = make_base_model(tied=tied)
    run = arguments(tmp_path, ranks, *UNCLIPPED, *options, "--training.steps", "2", "--model.name", str(base))
    run += ["--validation.no-enabled", "--checkpoint.no-enable_checkpoint", "--training.seed", "1"]
    seen = [observe(run)] if ranks == 1 else observe_two(run, tmp_path, monkeypatch)
    logged = figures(tmp_path)
    # Means of each microbatch, or of each rank, have to be something else.
    counts = [[int((batch.targets >= 0).sum()) for batch in rank[1]["microbatches"]] for rank in seen]
    assert any(len(set(of_rank)) == 2 for of_rank in counts)
    assert len(set(map(sum, counts))) == ranks
    for number in (1, 2):
        batches = [batch for rank in seen for batch in rank[number]["microbatches"]]
        assert len(batches) == 2 * ranks
        loss, gradients = by_hand(base, seen[0][number], batches)
        assert logged[number, "loss"] == pytest.approx(loss, rel=1e-6)
        assert logged[number, "grad_norm"] == pytest.approx(norm_of(gradients), rel=1e-4)
        for rank in seen:
            found = rank[number]["gradients"]
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                rows = len(gradient)
                torch.testing.assert_close(found[name][:rows], gradient, rtol=1e-4, atol=1e-6, msg=name)
                assert not found[name][rows:].any()


def test_gradients_are_scaled_to_max_norm(arguments, make_base_model, tmp_path):
    clipped = ("--training.max_norm", "0.5", "--training.steps", "1", "--checkpoint.no-enable_checkpoint")
    step = observe(arguments(tmp_path, 1, *clipped, "--validation.no-enabled"))[1]
    _, gradients = by_hand(make_base_model(), step, step["microbatches"])
    norm = norm_of(gradients)
    assert norm > 0.5
    for name, gradient in gradients.items():
        found = step["gradients"][name][: len(gradient)]
        torch.testing.assert_close(found, gradient * 0.5 / norm, rtol=1e-4, atol=1e-6, msg=name)


# --- the learning rate


def rates(arguments: list[str], folder: Path) -> dict[int, float]:
    """Run the trainer: the learning rate of each step relative to optimizer.lr, the same for all parameters, and the
    same in the log."""
    found = {}
    for number, step in observe(arguments).items():
        assert len(step["rates"]) == len(step["weights"]) > 10
        assert len(set(step["rates"])) == 1
        found[number] = step["rates"][0] / LR
    logged = figures(folder)
    assert {number: logged[number, "lr"] / LR for number in found} == found
    return found


def test_the_schedules_rate_of_each_step_reaches_the_optimizer(arguments, tmp_path):
    """Two steps of warm-up, and a fall over the last half."""
    options = ("--optimizer.lr", str(LR), "--lr_scheduler.decay_ratio", "0.5", "--validation.no-enabled")

    def run(name: str, start: Path | None, *more: str) -> dict[int, float]:
        if start is not None:
            shutil.copytree(start, tmp_path / name / "run" / "checkpoint" / start.name)
        return rates(arguments(tmp_path / name, 1, *options, *more), tmp_path / name)

    def saved(name: str, step: int) -> Path:
        return tmp_path / name / "run" / "checkpoint" / f"step-{step}"

    assert run("all", None) == pytest.approx({1: 1 / 2, 2: 1, 3: 1, 4: 1, 5: 2 / 3, 6: 1 / 3})
    assert run("resumed", saved("all", 3)) == pytest.approx({4: 1, 5: 2 / 3, 6: 1 / 3})
    # A schedule that starts anew is one of the five steps that are left, also where it is resumed.
    eight = ("--training.steps", "8", "--checkpoint.interval", "1")
    anew = run("anew", saved("all", 3), *eight, "--checkpoint.exclude_from_loading", "lr_scheduler")
    assert anew == pytest.approx({4: 1 / 2, 5: 1, 6: 1, 7: 1, 8: 1 / 2})
    assert run("anew, resumed", saved("anew", 5), *eight) == pytest.approx({6: 1, 7: 1, 8: 1 / 2})
    assert run("in the backward pass", None, *IN_BACKWARD, "--training.steps", "2") == pytest.approx({1: 1 / 2, 2: 1})


if __name__ == "__main__":
    output, *given = sys.argv[1:]
    torch.set_num_threads(1)
    torch.save(observe(given), output)
