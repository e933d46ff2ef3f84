"""A run that is killed at any moment, also while it saves, goes on from a whole checkpoint to the same end."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.test_train import ROOT, arguments, figures, launch  # noqa: F401 - a fixture
from torchtitan.checkpoint.manager import find_steps

STEPS, KILLS = 100, 10


def start(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)


def saving(folder: Path) -> bool:
    return any(folder.glob(".step-*.partial"))


def descendants(pid: int) -> list[int]:
    """A process and all that came of it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found


def kill_somewhere(process: subprocess.Popen, folder: Path, moment: random.Random, while_saving: bool) -> bool:
    """Kill a run once it has saved a step; false if it ended before."""
    before = find_steps(folder)
    deadline = time.monotonic() + 120
    while find_steps(folder) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(moment.uniform(0, 0.3))
    while while_saving and not saving(folder) and process.poll() is None:
        pass
    if while_saving:
        time.sleep(moment.uniform(0, 0.02))
    if process.poll() is not None:
        return False
    family = descendants(process.pid)
    # torchrun starts its workers in sessions of their own. In turn all go at once, or one worker does.
    for pid in family if while_saving or len(family) < 3 else family[-1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_ten_kills_change_nothing(arguments, tmp_path, ranks, mode):  # noqa: F811
    options = ("--training.steps", str(STEPS), "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "3")
    options = (*options, "--checkpoint.async_mode", mode, "--validation.no-enabled")
    launch(arguments(tmp_path / "whole", ranks, *options), ranks)
    expected = figures(tmp_path / "whole")
    assert len(expected) == 3 * STEPS

    run = [sys.executable, "-m"]
    if ranks > 1:
        run += ["torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv-backend=c10d"]
        run += ["--rdzv-endpoint=localhost:0", "-m"]
    command = [*run, "torchtitan.train", *arguments(tmp_path / "killed", ranks, *options)]
    folder, log, moment = tmp_path / "killed" / "run" / "checkpoint", tmp_path / "log", random.Random(ranks)
    killed = 0
    for number in range(KILLS):
        killed += kill_somewhere(start(command, log), folder, moment, while_saving=number % 2 == 1)
    assert start(command, log).wait() == 0, log.read_text()[-2000:]
    assert killed == KILLS, f"the run ended after {killed} kills"
    assert "damaged" not in "".join(path.name for path in folder.iterdir())
    assert find_steps(folder) == [STEPS - 2, STEPS - 1, STEPS]
    assert figures(tmp_path / "killed") == expected
