"""The Slurm script, with srun and scontrol played by shell scripts that run everything on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_train import ROOT, arguments  # noqa: F401 - a fixture
from torchtitan.checkpoint.manager import find_steps

SCRIPT = ROOT / "scripts" / "train_multinode.slurm"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    return {
        **os.environ,
        **slurm,
        "SLURM_GPUS_ON_NODE": "2",
        "MASTER_PORT": "0",
        "PYTHON": sys.executable,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
    }


def test_the_script_is_valid_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_without_a_config_it_says_how_it_is_used(environment):
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")


def test_a_job_that_is_preempted_saves_and_goes_back_into_the_queue(arguments, environment, tmp_path):  # noqa: F811
    config = tmp_path / "run.toml"
    config.write_text('[training]\ngc_freq = 10\n[job]\ndescription = "by slurm"\n')
    options = arguments(tmp_path, 2, "--training.steps", "1000", "--checkpoint.interval", "1000")
    log = tmp_path / "log"
    with log.open("w") as file:
        job = subprocess.Popen(
            ["bash", SCRIPT, str(config), *options], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    deadline = time.monotonic() + 90
    while "step: 3 " not in log.read_text() and time.monotonic() < deadline:
        assert job.poll() is None, log.read_text()[-2000:]
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(timeout=60) == 0, log.read_text()[-2000:]
    assert len(find_steps(tmp_path / "run" / "checkpoint")) == 1
    assert Path(environment["SCONTROL_LOG"]).read_text().split() == ["requeue", environment["SLURM_JOB_ID"]]
    assert "by slurm" in log.read_text()


@pytest.mark.slow
def test_a_job_that_fails_is_not_queued_again(arguments, environment, tmp_path):  # noqa: F811
    config = tmp_path / "run.toml"
    config.write_text("[training]\nnothing = 1\n")
    done = subprocess.run(["bash", SCRIPT, str(config)], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode != 0
    assert not Path(environment["SCONTROL_LOG"]).exists()
