"""Whether this project works right and fast on a GPU, in one command: ``python benchmarks/gpu.py``.

Each case below runs in a process of its own, with a time limit; the most telling cases come first. A case that fails,
hangs or is killed does not end the others. ``<output>/<part>.json``, written after each case, holds what the cases have
found so far, and log.txt what they printed. The parts:

    paths        every CUDA path against the CPU in fp32: model, loss, optimizer, FSDP2, engine, codec
    training     the training step at the 1.3B, beside transformers under FSDP2, and at the 8B as far as it fits
    generation   continuations at the 1.3B, beside transformers' generate and the bound of memory; first audio, streams
    codec        encoding by batch, and the training step while the codec works beside it
    evaluation   pairs of clips, beside a plain loop
    run          ``python -m torchtitan.train``, killed and resumed in the three ways to save, beside the CPU

torch, transformers and pyarrow are enough; weights, codes and waveforms are random and made where they are used.
Without a GPU, ``--smoke`` runs every case on small sizes on the CPU, to show that the suite itself works. On a machine
that is lent for a short time:

    python benchmarks/gpu.py --minutes 9 --output results                  # the most telling cases
    python benchmarks/gpu.py --minutes 9 --output results --parts ...      # the others, which the first call names

The exit code is 1 if a case failed. ``scripts/draw_figures.py --only gpu`` draws a chart of the results.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from torchtitan.tools.errors import UserError, run_command  # noqa: E402

# A case that could only get less than this is left for the next call.
LEAST_SECONDS = 25


@dataclass(frozen=True)
class Case:
    """What one process does.

    Attributes:
        name: part and measurement.
        function: module and name; it is called with a Bench and the arguments.
        seconds: time limit on a GPU.
        needs_gpu: it means nothing on a CPU.
    """

    name: str
    function: str
    seconds: int
    arguments: tuple[Any, ...] = ()
    needs_gpu: bool = False

    @property
    def part(self) -> str:
        return self.name.split("/")[0]


CASES = (
    Case("paths/model", "gpu_cases.check_model", 90),
    Case("paths/attention", "gpu_cases.check_attention", 60, needs_gpu=True),
    Case("paths/codec", "gpu_cases.check_codec", 60),
    Case("paths/engine", "gpu_cases.check_engine", 90),
    Case("training/ours packed compiled", "gpu_timings.time_training", 150, ("ours", True, True)),
    Case("training/plain compiled", "gpu_timings.time_training", 180, ("plain", False, True)),
    Case("generation/1 row", "gpu_timings.time_generation", 100, (1,)),
    Case("run/saved and resumed", "gpu_cases.check_run", 240),
    Case("paths/compiled", "gpu_cases.check_compiled", 120),
    Case("generation/64 rows", "gpu_timings.time_generation", 100, (64,)),
    Case("training/ours compiled", "gpu_timings.time_training", 100, ("ours", False, True)),
    Case("training/ours packed", "gpu_timings.time_training", 80, ("ours", True, False)),
    Case("training/plain", "gpu_timings.time_training", 80, ("plain", False, False)),
    Case("codec/encoding", "gpu_timings.time_encoding", 80),
    Case("codec/online", "gpu_timings.time_online", 100),
    Case("evaluation/pairs", "gpu_timings.time_evaluation", 90),
    Case("generation/speech", "gpu_timings.time_speech", 90),
    Case("generation/8 rows", "gpu_timings.time_generation", 100, (8,)),
    Case("generation/int8", "gpu_timings.time_int8", 100),
    Case("training/ours", "gpu_timings.time_training", 80, ("ours", False, False)),
    Case("generation/1 row compiled", "gpu_timings.time_generation", 150, (1, True)),
    Case("training/8B", "gpu_timings.time_8b", 200, needs_gpu=True),
)


def chosen_cases(parts: list[str] | None) -> list[Case]:
    """The cases of parts, or single ones, by name; all without names. Raises UserError for an unknown name."""
    known = dict.fromkeys([*(case.part for case in CASES), *(case.name for case in CASES)])
    if unknown := [name for name in parts or () if name not in known]:
        raise UserError(f"--parts {unknown[0]}: no such part or case; there are {', '.join(known)}.")
    return [case for case in CASES if not parts or case.part in parts or case.name in parts]


def commit() -> str | None:
    """The version that is measured; None where there is no repository or no git."""
    code, said = subprocess.getstatusoutput(f"git -C {shlex.quote(str(ROOT))} describe --always --dirty")
    return said if code == 0 else None


def environment(smoke: bool) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "smoke": smoke,
    }


def read_part(path: Path) -> dict[str, Any]:
    """What earlier calls wrote about a part; no cases without such a file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(path.read_text())
        if isinstance(content["cases"], dict):
            return content
    return {"part": path.stem, "cases": {}}


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole whenever this process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def run_case(case: Case, smoke: bool, result: str, log: str) -> None:
    """The process of a case: what it finds goes to ``result`` as it comes, all that is printed to ``log``."""
    os.setsid()  # so that what it starts can be ended with it
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from gpu_cases import Bench

    found: dict[str, Any] = {}

    def save(more: dict[str, Any]) -> None:
        found.update(more)
        write_json(Path(result), found)

    module, name = case.function.split(".")
    getattr(import_module(module), name)(Bench(smoke, save), *case.arguments)


def use_gpu() -> None:
    """Fail in a process that cannot use its GPU."""
    import torch

    torch.cuda.init()


def start_context(gpu: bool) -> Any:
    """How the processes of cases are started.

    They are forked from a process that has imported the packages, which saves each some ten seconds. That process must
    not have used the GPU; where an import does, each case starts from nothing.
    """
    # Lets imports ask whether there is a GPU without using it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context: Any = multiprocessing.get_context("forkserver")
    # The second brings the compiler, which asks for a GPU in any case.
    context.set_forkserver_preload(["gpu_timings"] if gpu else ["gpu_timings", "torch.distributed.pipelining"])
    if gpu:
        process = context.Process(target=use_gpu)
        process.start()
        process.join(120)
        if process.exitcode != 0:
            process.kill()
            print("processes cannot be forked here: each case imports the packages itself", flush=True)
            return multiprocessing.get_context("spawn")
    return context


def end(process: Any) -> None:
    """End a case's process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has none of its own yet, or nothing of it is left
        process.kill()
    process.join()


def run(case: Case, context: Any, smoke: bool, seconds: float, log: Path) -> dict[str, Any]:
    """Run a case; what it found, and how it ended."""
    with log.open("a") as file:
        file.write(f"\n== {case.name}\n")
    begin, start = time.monotonic(), log.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        process = context.Process(target=run_case, args=(case, smoke, str(result), str(log)))
        process.start()
        try:
            process.join(seconds)
            hangs = process.is_alive()
        finally:
            end(process)
        found = json.loads(result.read_text()) if result.is_file() else {}
    if hangs:
        error = f"it was ended after {seconds:.0f} s"
    elif process.exitcode:
        with log.open("rb") as file:
            file.seek(start)
            said = file.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        error = f"it ended with {how}: {said[-1][:300]}"
    else:
        failed = [name for name, check in found.get("checks", {}).items() if not check["ok"]]
        error = f"not as on the CPU: {', '.join(failed)}" if failed else None
    ended = {"ok": False, "error": error} if error else {"ok": True}
    return {**ended, "seconds": round(time.monotonic() - begin, 1), **found}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", help="parts, or single cases, to run (default: all); see --list")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins, or goes on, after this time")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--list", action="store_true", help="name the cases, and do nothing")
    options = parser.parse_args(argv)
    options.cases = chosen_cases(options.parts)
    if not 0 < options.minutes < 24 * 60:
        raise UserError(f"--minutes must be over 0 and less than a day, not {options.minutes:g}.")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the cases; returns the exit code.

    Raises:
        UserError: an option is wrong, or there is no GPU.
    """
    options = parse(argv)
    if options.list:
        print("\n".join(f"{case.name} (up to {case.seconds} s)" for case in options.cases))
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    about = environment(options.smoke)
    gpu = about["cuda"] is not None
    if not gpu and not options.smoke:
        raise UserError("there is no GPU here; --smoke shows on a CPU that the suite works.")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        log = options.output / "log.txt"
        log.touch()
    except OSError as error:
        raise UserError(f"--output {options.output}: it cannot be written ({error.strerror}).") from None
    print(f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}", flush=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # one machine: no name has to be looked up
        os.environ.setdefault(name, "lo")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not gpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that share the cores wait for each other
    context = start_context(gpu)
    failed, left = [], []
    for case in options.cases:
        seconds = min(case.seconds, deadline - time.monotonic())
        if case.needs_gpu and not gpu:
            found: dict[str, Any] = {"skipped": "it needs a GPU"}
        elif seconds < (1 if options.smoke else LEAST_SECONDS):
            left.append(case.name)
            continue
        else:
            found = run(case, context, options.smoke, seconds, log)
            if not found["ok"] and seconds < case.seconds and "was ended after" in found["error"]:
                left.append(case.name)  # and what an earlier call found stays
                continue
            if not found["ok"]:
                failed.append(case.name)
        file = options.output / f"{case.part}.json"
        content = read_part(file)
        content["cases"][case.name.split("/")[1]] = {**found, "on": about}
        write_json(file, content)
        state = found.get("skipped") or ("ok" if found["ok"] else f"FAILED: {found['error']}")
        print(f"{case.name}: {state}" + (f" ({found['seconds']} s)" if "seconds" in found else ""), flush=True)
    if left:
        names = " ".join(f'"{name}"' for name in left)
        print(f"not run for want of time; the next call: --output {options.output} --parts {names}")
    print(f"results: {options.output}; {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_command(main)
