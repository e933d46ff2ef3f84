"""How a run stops early: by a signal, in order, or by a gradient that is no number, before it harms the weights."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, figures, launch, require_devices
from tests.test_kill import descendants
from tests.test_parallel import make, microbatch
from torchtitan import train
from torchtitan.checkpoint.manager import find_steps, load_full_parameters, read_state
from torchtitan.components.dataloader import Batch
from torchtitan.components.gradients import FiniteGuard, clip_grad_norm
from torchtitan.tools.errors import UserError
from torchtitan.tools.locks import locked
from torchtitan.tools.signals import shielded

STEPS = 25


# --- signals


def is_running(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def start(options: list[str], ranks: int, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torchtitan.train", *options]
    if ranks > 1:
        require_devices(ranks)
        torchrun = ["torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv-backend=c10d"]
        command[2:2] = [*torchrun, "--rdzv-endpoint=localhost:0", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stderr=log.open("w"), env=environment)


def wait_for_step(process: subprocess.Popen, log: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while f"step: {step} " not in log.read_text() and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.01)


MORE = [
    pytest.param(ranks, number, marks=pytest.mark.slow)
    for ranks, number in ((1, signal.SIGTERM), (1, signal.SIGUSR1), (2, signal.SIGUSR1))
]


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), *MORE])
def test_a_signal_ends_a_run_in_order_and_it_goes_on(arguments, tmp_path, ranks, number):
    options = ("--training.steps", str(STEPS), "--checkpoint.interval", "1000", "--validation.no-enabled")
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    launch(arguments(whole, ranks, *options), ranks)
    process = start(arguments(cut, ranks, *options), ranks, log)
    wait_for_step(process, log, 3)
    # Of two ranks only the last one is told.
    os.kill(descendants(process.pid)[-1] if ranks > 1 else process.pid, number)
    assert process.wait(timeout=60) == (130 if number == signal.SIGINT else 0), log.read_text()[-2000:]
    assert "Traceback" not in log.read_text()
    (stopped,) = find_steps(cut / "run" / "checkpoint")
    assert 3 <= stopped < STEPS
    assert f"stopped at step {stopped} of {STEPS} by {number.name}; the same command goes on" in log.read_text()
    launch(arguments(cut, ranks, *options), ranks)
    assert figures(cut) == figures(whole)


IN_BACKGROUND = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("async", "async_with_pinned_mem")]


@pytest.mark.parametrize("mode", ["disabled", *IN_BACKGROUND])
def test_torchrun_passes_a_signal_on(arguments, tmp_path, mode):
    """To each rank and to all that it has started."""
    options = ("--training.steps", "1000", "--checkpoint.interval", "2", "--checkpoint.async_mode", mode)
    log = tmp_path / "log"
    process = start(arguments(tmp_path, 2, *options, "--validation.no-enabled"), 2, log)
    wait_for_step(process, log, 5)
    process.terminate()
    process.wait(timeout=60)
    assert "by SIGTERM; the same command goes on" in log.read_text()
    (stopped,) = set(re.findall(r"stopped at step (\d+) of", log.read_text()))
    assert find_steps(tmp_path / "run" / "checkpoint")[-1] == int(stopped)


def test_a_second_interrupt_stops_at_once(tmp_path):
    """One that follows within a moment is torchrun's, which passes on what the terminal has sent already."""
    script = (
        "import time\nfrom torchtitan.tools.signals import stop_requests\n"
        "with stop_requests() as stop:\n    print('ready', flush=True)\n"
        "    for _ in range(600):\n        time.sleep(0.1)\n        print(stop.name, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        while process.stdout.readline() != "SIGINT\n":
            pass
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_a_child_ends_with_its_parent(monkeypatch, arguments, tmp_path):
    """As each rank that torchrun has started asks for."""
    child = (
        "import signal, time; from torchtitan.tools.signals import end_with_parent; end_with_parent(signal.SIGTERM)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    script = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [parent.stdout.readline().strip() for _ in range(2)]
    number = next(int(line) for line in lines if line != "ready")
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_running(number):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)
    asked = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(train, "end_with_parent", asked.append)
    assert train.main(["--no.such_key", "1"]) == 2
    assert asked == [signal.SIGTERM]


@pytest.mark.slow
def test_ranks_end_with_a_torchrun_that_is_killed(arguments, tmp_path):
    log = tmp_path / "log"
    options = ("--training.steps", "100000", "--checkpoint.interval", "100000", "--validation.no-enabled")
    process = start(arguments(tmp_path, 2, *options), 2, log)
    wait_for_step(process, log, 3)
    ranks = descendants(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline, "ranks outlive torchrun"
        time.sleep(0.1)


def test_a_run_folder_in_use_is_refused_with_the_process_that_has_it(arguments, tmp_path, capfd):
    options = arguments(tmp_path, 1, "--training.steps", "2", "--validation.no-enabled")
    with locked(tmp_path / "run"):
        assert train.main(options) == 2
        assert f"run: process {os.getpid()} on " in capfd.readouterr().err
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from torchtitan.tools.locks import locked\n"
            "with locked(Path(sys.argv[1])): print('has it', flush=True); time.sleep(60)",
            str(tmp_path / "run"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline()
    with pytest.raises(UserError, match=f"process {holder.pid} on"), locked(tmp_path / "run"):
        pass
    holder.kill()  # the system gives the lock back
    holder.wait()
    launch(options, 1)


def test_what_is_started_under_a_shield_outlives_a_signal():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with shielded():
            process = subprocess.Popen(["sleep", "60"])
            os.kill(os.getpid(), signal.SIGUSR1)
        # A thread of a library may take the signal, and then Python hears of it a moment later.
        deadline = time.monotonic() + 10
        while not received and time.monotonic() < deadline:
            time.sleep(0.01)
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_without_checkpoints_a_signal_only_stops(arguments, tmp_path):
    log = tmp_path / "log"
    process = start(arguments(tmp_path, 1, "--training.steps", "1000", "--checkpoint.no-enable_checkpoint"), 1, log)
    wait_for_step(process, log, 3)
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert "nothing is saved" in log.read_text()


def test_handlers_are_put_back(arguments, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    launch(arguments(tmp_path), 1)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed_after_the_short_timeout(arguments, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "hang.py").write_text(
        "import os, time\nfrom torchtitan.models.llama3.parallel_model import ParallelModel\n\n"
        "whole, calls = ParallelModel.backward, []\n\n\ndef backward(self, *batch):\n    calls.append(1)\n"
        '    time.sleep(60 if len(calls) == 3 and os.environ["RANK"] == "1" else 0)\n'
        "    return whole(self, *batch)\n\n\n"
        "ParallelModel.backward = backward\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "modules"), *filter(None, sys.path))))
    log = tmp_path / "log"
    options = ("--experimental.custom_import", "hang", "--comm.train_timeout_seconds", "2")
    process = start(arguments(tmp_path, 2, "--training.steps", "1000", *options), 2, log)
    assert process.wait(timeout=90) != 0
    assert "Timed out waiting 2000ms" in log.read_text()


@pytest.mark.slow
def test_a_rank_that_is_slow_to_save_is_waited_for(arguments, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "slow.py").write_text(
        "import os, time\nfrom torchtitan.checkpoint import manager as checkpoint\n\nwhole = checkpoint.checksum\n\n\n"
        'def checksum(path):\n    time.sleep(5 if os.environ["RANK"] == "1" else 0)\n    return whole(path)\n\n\n'
        "checkpoint.checksum = checksum\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "modules"), *filter(None, sys.path))))
    options = ("--experimental.custom_import", "slow", "--comm.train_timeout_seconds", "2", "--training.steps", "3")
    launch(arguments(tmp_path, 2, *options), 2)
    assert find_steps(tmp_path / "run" / "checkpoint") == [3]


# --- gradients that are no numbers


def weights(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.weights()}


def batch(step: int) -> Batch:
    tokens, targets, _ = microbatch(step, False)
    return Batch(tokens, targets, 0, {}, keys=[[f"clip-{step}-{row}"] for row in range(len(tokens))])


def test_a_bad_gradient_stops_the_run_before_the_weights_change(one_rank):
    run = make([], True, 0, 1)
    run.step = 1
    train.train_step(run, [batch(0)])
    with torch.no_grad():
        dict(run.model.weights())["layers.2.ffn_norm.weight"][3] = float("inf")
    before, run.step = weights(run), 2
    with pytest.raises(UserError) as raised:
        train.train_step(run, [batch(1)])
    said = str(raised.value)
    assert "step 2: the gradient is not finite, so training stops before it changes the weights" in said
    assert "the loss is not finite on ranks 0, with the recordings clip-1-0, clip-1-1" in said
    assert "layers.3.feed_forward.w1.weight" in said or "tok_embeddings.weight" in said
    after = weights(run)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_only_the_parameters_at_fault_are_named(one_rank):
    run = make([], True, 0, 1)
    run.model.backward(*microbatch(0, False), 100.0)
    dict(run.model.weights())["layers.1.attention.wq.weight"].grad[0, 0] = float("nan")
    norm = clip_grad_norm(run.model, 1.0)
    with pytest.raises(UserError, match=r"in 1 parameters \(layers\.1\.attention\.wq\.weight\); the loss is finite on"):
        run.guard.check(1, torch.zeros(()), norm, [])


def test_updates_in_the_backward_pass_stop_before_they_are_saved(one_rank):
    run = make(["--optimizer.early_step_in_backward", "--training.max_norm", "0"], True, 0, 1)
    run.step = 1
    train.train_step(run, [batch(0)])
    run.guard.settle()
    with torch.no_grad():
        dict(run.model.weights())["layers.2.ffn_norm.weight"][3] = float("inf")
    run.step = 2
    train.train_step(run, [batch(1)])
    with pytest.raises(UserError, match="step 2: the gradient is not finite, so training stops; it is so in") as raised:
        run.guard.settle()  # as before each save
    assert "layers.3.feed_forward.w1.weight" in str(raised.value) or "tok_embeddings.weight" in str(raised.value)


def test_the_optimizer_skips_in_its_kernel_and_stays_so(one_rank):
    """What CUDA does, with the same kernel on the CPU: the update is skipped, the stop comes two steps later."""
    run = make([], True, 0, 1)
    run.guard = FiniteGuard(run.optimizer, torch.device("cpu"), skip_in_kernel=True)
    run.step = 1
    train.train_step(run, [batch(0)])
    before, norm_weight = weights(run), dict(run.model.weights())["layers.2.ffn_norm.weight"]
    counts = [state["step"].item() for state in run.optimizer.state.values()]
    kept = norm_weight[3].item()
    with torch.no_grad():
        norm_weight[3] = float("inf")
    run.step = 2
    train.train_step(run, [batch(1)])
    with torch.no_grad():
        norm_weight[3] = kept
    run.step = 3
    train.train_step(run, [batch(2)])
    after = weights(run)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [state["step"].item() for state in run.optimizer.state.values()] == counts
    run.step = 4
    with pytest.raises(UserError, match="step 2: the gradient is not finite"):
        train.train_step(run, [batch(3)])


def test_a_step_is_looked_at_before_it_is_reported(one_rank):
    run = make([], True, 0, 1)
    run.guard = FiniteGuard(run.optimizer, torch.device("cpu"), skip_in_kernel=True)
    with torch.no_grad():
        dict(run.model.weights())["norm.weight"][0] = float("nan")
    train.train_step(run, [batch(0)])
    with pytest.raises(UserError, match="the gradient is not finite"):
        run.guard.settle()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_diverges_ends_with_one_sentence(arguments, tmp_path, ranks):
    """The rate is so large that weights leave what numbers can hold after a step or two."""
    options = ("--optimizer.lr", "1e30", "--checkpoint.interval", "1", "--optimizer.weight_decay", "0")
    log = tmp_path / "log"
    process = start(arguments(tmp_path, ranks, *options, "--validation.no-enabled"), ranks, log)
    assert process.wait(timeout=120) != 0
    said = [line for line in log.read_text().splitlines() if line.startswith("error: step")]
    assert len(set(said)) == 1
    assert "the gradient is not finite, so training stops before it changes the weights" in said[0]
    for step in find_steps(tmp_path / "run" / "checkpoint"):
        tensors: dict[str, Any] = load_full_parameters(tmp_path / "run" / "checkpoint" / f"step-{step}")
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_an_interrupted_run_keeps_its_place(arguments, tmp_path):
    log = tmp_path / "log"
    process = start(arguments(tmp_path, 1, "--training.steps", "1000", "--checkpoint.interval", "1000"), 1, log)
    wait_for_step(process, log, 2)
    process.terminate()
    process.wait(timeout=60)
    folder = tmp_path / "run" / "checkpoint"
    (step,) = find_steps(folder)
    state = read_state(folder / f"step-{step}")
    assert state["step"] == step
    assert state["data"]["counters"]["rows"] > 0
    shutil.rmtree(folder)
