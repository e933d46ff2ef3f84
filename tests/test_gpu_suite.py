"""benchmarks/gpu.py: all of it runs on a CPU, and a case that fails, hangs or is killed leaves the others' results."""

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchtitan.tools.errors import UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
PARTS = {"paths", "training", "generation", "codec", "evaluation", "run"}

# What stands in for the cases: one that says two things, and ones that do not end well.
CASES = """
import os, time, signal
def works(bench):
    bench.save({"first": 1})
    bench.save({"second": 2})
def fails(bench):
    bench.save({"first": 1})
    raise ValueError("no such thing")
def differs(bench):
    bench.check("near", lambda: {"loss": (0.1, 0.2)})
    bench.check("far", lambda: {"loss": (0.3, 0.2)})
    bench.check("broken", lambda: {"loss": (1 / 0, 1)})
def hangs(bench):
    bench.save({"first": 1})
    if os.fork() == 0:
        open(os.environ["CHILD"], "w").write(str(os.getpid()))
    time.sleep(600)
def killed(bench):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def gpu(monkeypatch):
    for folder in (ROOT, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    import gpu

    return gpu


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_every_case_runs_on_a_cpu(gpu, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    said = done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-5000:]
    assert done.returncode == 0, said
    parts = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(parts) == PARTS
    found = {f"{name}/{case}": result for name, part in parts.items() for case, result in part["cases"].items()}
    assert set(found) == {case.name for case in gpu.CASES}
    for name, result in found.items():
        assert result.get("ok") or result["skipped"] == "it needs a GPU", name
        assert {"device", "torch", "transformers", "python", "date", "commit"} <= set(result["on"])
    # What the figures are drawn from, and what only a run can tell.
    for name in ("training/ours packed compiled", "training/plain compiled"):
        figures = found[name]["figures"]
        assert figures["real_tokens_per_second"] > 0 and figures["rows"] == 4
        assert figures["graphs"][0] > 0 and figures["graphs"][1] == 0, "compiled anew within the timed steps"
    assert found["generation/64 rows"]["figures"]["ratio"] > 0
    assert found["run/saved and resumed"]["checks"]["killed and resumed, disabled"]["losses"] == 0
    assert found["paths/compiled"]["checks"]["graph breaks"]["breaks"] == 0
    for check in ("fp32", "int8", "unconstrained", "rows that come and go", "a context that slides"):
        assert found["paths/engine"]["checks"][check]["rows that diverge"] == 0
    assert not list(tmp_path.glob(".*")), "nothing is left behind"


def test_a_case_that_ends_badly_ends_alone(gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "stand_ins.py").write_text(CASES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    cases = [
        gpu.Case(f"some/{name}", f"stand_ins.{name}", 3 if name == "hangs" else 60)
        for name in ("fails", "killed", "hangs", "differs", "works")
    ]
    monkeypatch.setattr(gpu, "CASES", (*cases, gpu.Case("other/works", "stand_ins.works", 60)))
    assert gpu.main(["--smoke", "--output", str(tmp_path / "out")]) == 1
    found = json.loads((tmp_path / "out" / "some.json").read_text())["cases"]
    assert found["works"]["ok"] and (found["works"]["first"], found["works"]["second"]) == (1, 2)
    assert not found["fails"]["ok"] and found["fails"]["first"] == 1
    assert found["fails"]["error"].endswith("ValueError: no such thing")
    assert "signal 9" in found["killed"]["error"]
    assert found["hangs"]["first"] == 1 and "ended after 3 s" in found["hangs"]["error"]
    assert not is_alive(int((tmp_path / "child").read_text())), "what a case started ends with it"
    assert found["differs"]["error"] == "not as on the CPU: far, broken"
    assert (
        found["differs"]["checks"]["near"]["ok"]
        and "ZeroDivisionError" in found["differs"]["checks"]["broken"]["error"]
    )
    assert json.loads((tmp_path / "out" / "other.json").read_text())["cases"]["works"]["ok"]
    said = capsys.readouterr().out
    assert "some/hangs: FAILED: it was ended after 3 s" in said and "4 failed" in said

    # Single cases can be run again, and what is there stays.
    (tmp_path / "stand_ins.py").write_text(CASES.replace('raise ValueError("no such thing")', "pass"))
    assert gpu.main(["--smoke", "--output", str(tmp_path / "out"), "--parts", "some/fails"]) == 0
    again = json.loads((tmp_path / "out" / "some.json").read_text())["cases"]
    assert again["fails"]["ok"] and again["killed"] == found["killed"]


def test_what_the_time_does_not_suffice_for_is_named(gpu, tmp_path, monkeypatch, capsys):
    """Also what had begun, of which an earlier result stays."""
    (tmp_path / "stand_ins.py").write_text(CASES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    hanging = gpu.Case("some/hangs", "stand_ins.hangs", 60)
    monkeypatch.setattr(gpu, "CASES", (hanging, gpu.Case("some/works", "stand_ins.works", 60)))
    out = tmp_path / "out"
    out.mkdir()
    (out / "some.json").write_text('{"part": "some", "cases": {"hangs": {"ok": true}}}')
    assert gpu.main(["--smoke", "--output", str(out), "--minutes", "0.1"]) == 0
    assert f'the next call: --output {out} --parts "some/hangs" "some/works"' in capsys.readouterr().out
    assert json.loads((out / "some.json").read_text())["cases"] == {"hangs": {"ok": True}}


@pytest.mark.slow
def test_a_suite_that_is_ended_ends_its_case(tmp_path):
    """SIGTERM, as a borrowed machine sends it when its time is over."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--smoke", "--output", str(tmp_path), "--parts", "run"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().startswith(("CPU", "NVIDIA", "AMD"))
    deadline = time.monotonic() + 60
    while "torchtitan.train" not in (running := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "torchtitan.train" in running
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    time.sleep(0.5)
    assert str(tmp_path) not in everything()


def everything() -> str:
    """The command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text().replace("\0", " "))
        except OSError:
            continue
    return "\n".join(found)


def children(process: int) -> str:
    """The command lines of a process's descendants."""
    found, parents = [], {process}
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) in parents:
                parents.add(int(path.name))
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return "\n".join(found)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--smoke", "--parts", "nothing"), "--parts nothing: no such part or case; there are paths,"),
        (("--smoke", "--minutes", "0"), "--minutes must be over 0"),
        (("--smoke", "--output", "/dev/null/here"), "--output /dev/null/here: it cannot be written"),
    ],
)
def test_wrong_options_are_one_sentence(gpu, options, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: gpu.main(list(options)))
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_without_a_gpu_full_sizes_are_refused(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="there is no GPU here; --smoke shows"):
        gpu.main(["--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_kinds_of_kernels(gpu):
    import training_step

    for kernel, kind in {
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN": "matrix products",
        "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "triton_poi_fused_mul_silu_4": "fused by the compiler",
        "triton_poi_fused__scaled_dot_product_flash_attention_view_3": "fused by the compiler",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "ncclDevKernel_AllGather_RING_LL": "communication",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4>": "elementwise and reductions",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8>": "elementwise and reductions",
    }.items():
        assert training_step.kind_of(kernel) == kind


def test_packed_rows_are_as_many_as_asked_for(gpu):
    import training_step

    options = training_step.Options(batch=32, packing=True, compile=True)
    for seed in range(3):
        rows = training_step.make_rows(options, seed, packed=True)
        assert len(rows) == 32
        assert all(0 < sum(sample.numel() for sample in row) <= 1024 for row in rows)
        samples = sum(len(row) for row in rows)
        assert samples > 40
        batch = training_step.make_batch(rows, options)
        spans = training_step._spans(batch)
        assert batch.tokens.shape == (32, 1024) and sum(spans) == 32 * 1024
        assert len(spans) >= samples
    assert [len(row) for row in training_step.make_rows(options, 0, packed=False)] == [1] * 32


@pytest.mark.parametrize("name", ["training_step", "generation", "packed_attention", "evaluation", "loader"])
def test_without_tyro_options_are_not_ignored(gpu, name, monkeypatch, capsys):
    """A bare GPU machine may lack it."""
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "7"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT.with_name(f"{name}.py")), run_name="__main__")
    assert ended.value.code == 2
    assert "error: tyro is missing, so --steps 7 cannot be read" in capsys.readouterr().err
