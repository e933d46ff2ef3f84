"""A record of behaviour: what the command lines compute, to the bit, as digests in tests/data/record.json.

    uv run python tests/record.py            # write the record
    uv run python tests/record.py --check    # compare with it, and name what differs

A change that is to keep all results, such as moving code, gives the same digests; one that changes results on purpose
writes the record anew. Models and data are those in assets/. The bits depend on the versions of torch and transformers
and on the CPU's instructions, so the record names those that it was made with. It takes about a minute on two cores.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "data" / "record.json"
SPEECH = ROOT / "assets" / "speech"
MIMI = str(ROOT / "assets" / "mimi-small")
# Figures of a run that depend on its speed.
SPEED = {"tokens_per_second_per_device", "tflops_per_device", "memory_gib", "data_wait_share"}


def made_with() -> dict[str, str]:
    """What the bits depend on: versions, and the CPU's instructions."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    vectors = [flag for flag in (flags[1].split() if flags else ()) if flag.startswith(("sse", "avx", "fma", "amx"))]
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": " ".join(sorted(vectors)),
    }


def digest(value: Any) -> str:
    """Of bytes, or of anything that JSON can hold; a float is written so that it is told from every other one."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def of_table(table: pa.Table) -> dict[str, str]:
    """The digest of each column."""
    return {name: digest(table.column(name).to_pylist()) for name in table.column_names}


class Recorder:
    """Runs commands in a folder of its own.

    Attributes:
        digests: of all results so far, by name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.digests: dict[str, str] = {}

    def run(self, *command: str | Path) -> None:
        """Run a Python program of the repository on one thread, without network and caches."""
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: exit code {done.returncode} of {shlex.join(words)}\n{done.stderr[-3000:]}")

    def add(self, name: str, digests: dict[str, str]) -> None:
        self.digests |= {f"{name}: {part}": found for part, found in digests.items()}

    def train(self, name: str, *options: str | Path) -> None:
        """Four steps of two microbatches, with two validations; each figure's values, step by step."""
        self.run(
            *("-m", "torchtitan.train", "--job.config_file", "config/debug.toml"),
            *("--job.dump_folder", self.folder, "--job.wandb_run_name", name, "--metrics.log_freq", "1"),
            *("--training.steps", "4", "--training.local_batch_size", "2", "--training.global_batch_size", "4"),
            *("--training.seq_len", "256", "--lr_scheduler.warmup_steps", "2", "--checkpoint.interval", "4"),
            *("--validation.freq", "2", "--validation.steps", "2", "--validation.local_batch_size", "4"),
            *("--validation.seq_len", "256", *options),
        )
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        keys = dict.fromkeys(key for line in lines for key in line if key not in SPEED)
        self.add(f"training, {name}", {key: digest([line[key] for line in lines if key in line]) for key in keys})

    def tokenize(self, name: str, *options: str | Path) -> Path:
        """Recordings to shards of codes; each column's values."""
        folder = self.folder / name
        self.run(
            *("scripts/tokenize_dataset.py", "--dataset", self.folder / "clips", "--output", folder, *options),
            *("--audio_tokenizer", MIMI, "--num_processes", "1", "--device", "cpu", "--rows_per_shard", "20"),
        )
        for path in sorted(folder.glob("*.arrow")):
            self.add(f"shards, {name}, {path.name}", of_table(pa.ipc.open_file(path).read_all()))
        return folder

    def evaluate(self, script: str, model: Path, dataset: Path) -> None:
        """Two pairs a task; each column of the samples' scores, and the accuracies."""
        results = self.folder / f"results of {script}"
        self.run(
            *(f"eval/{script}", "--model_name", model, "--dataset", dataset, "--output_dir", results),
            *("--limit", "2", "--device", "cpu", "--dtype", "float32"),
        )
        (samples,) = results.rglob("samples.parquet")
        self.add(f"evaluation, {script}", of_table(pq.read_table(samples)))
        self.add(f"evaluation, {script}", {"accuracy": digest(samples.with_name("accuracy.json").read_bytes())})

    def export(self, name: str) -> Path:
        """A run's last step in Hugging Face format; each file, but for the names of folders in it."""
        folder = self.folder / "export"
        self.run("scripts/convert_dcp_to_hf.py", "--checkpoint", self.folder / name, "--output", folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            for place in (self.folder, ROOT) if path.suffix != ".safetensors" else ():
                content = content.replace(str(place).encode(), b"")
            self.add("export", {str(path.relative_to(folder)): digest(content)})
        return folder

    def generate(self, model: Path) -> None:
        """Two continuations of the shipped prompt; their samples."""
        self.run(
            *("inference.py", "--model_name", model, "--output", self.folder / "continuation.wav", "--device", "cpu"),
            *("--dtype", "float32", "--max_seconds", "5", "--num_samples", "2", "--seed", "1"),
        )
        for path in sorted(self.folder.glob("continuation-*.wav")):
            self.add("inference", {path.name: digest(soundfile.read(path, dtype="int16")[0].tobytes())})


def write_clips(folder: Path) -> None:
    """A small data set: 32 shipped recordings, and one of 13 s, longer than what the codec attends over."""
    rows = pq.read_table(SPEECH / "peoples_speech").slice(0, 32)
    sounds = [soundfile.read(pa.BufferReader(row["bytes"]), dtype="int16") for row in rows["audio"].to_pylist()]
    rate = sounds[0][1]
    long = folder / "long.flac"
    soundfile.write(long, torch.cat([torch.from_numpy(sound) for sound, _ in sounds])[: 13 * rate].numpy(), rate)
    audio = pa.array([{"bytes": long.read_bytes(), "path": "long.flac"}], rows.schema.field("audio").type)
    more = pa.table({"id": ["long"], "audio": audio, "duration_ms": pa.array([13_000], rows["duration_ms"].type)})
    more = more.append_column("text", pa.array(["several recordings"])).select(rows.column_names).cast(rows.schema)
    long.unlink()
    pq.write_table(pa.concat_tables([rows, more]), folder / "train-0.parquet")


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def record(folder: Path) -> dict[str, str]:
    """The digests of everything, by name."""
    found = Recorder(folder)
    (folder / "clips").mkdir()
    write_clips(folder / "clips")
    full = ("--codec_padding", "aligned", "--codec_window", "full", "--num_quantizers", "4")
    packed = ("--training.packing", "best_fit", "--training.packing_window", "16", "--training.task", "tts")
    codes, *_ = together(
        partial(found.tokenize, "exact"),
        partial(found.tokenize, "aligned", *full),
        partial(found.train, "padded"),
        partial(found.train, "packed", *packed),
    )
    split = ("--training.mixed_precision_param", "bfloat16", "--training.long_clips", "split")
    _, model = together(
        partial(found.train, "codes", "--training.dataset_path", codes, *split), partial(found.export, "padded")
    )
    together(
        partial(found.evaluate, "salmon.py", model, SPEECH / "SALMon"),
        partial(found.evaluate, "sLM21.py", model, SPEECH),
        partial(found.evaluate, "sStoryCloze.py", model, SPEECH),
        partial(found.generate, model),
    )
    return dict(sorted(found.digests.items()))


def differences(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    """A line for each digest that is another, missing or new."""
    lines = []
    for name in dict.fromkeys((*recorded, *found)):
        if name not in found:
            lines.append(f"{name}: is missing")
        elif name not in recorded:
            lines.append(f"{name}: is new")
        elif recorded[name] != found[name]:
            lines.append(f"{name}: differs")
    return lines


def main() -> int:
    """Write or check the record; the exit code is 1 if something differs, 2 if it cannot be compared here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the record instead of writing it")
    check = parser.parse_args().check
    here = made_with()
    recorded = json.loads(RECORD.read_text()) if check else {}
    if check and (others := differences(recorded["made_with"], here)):
        print(f"error: {RECORD} was made elsewhere, so it cannot be compared: {'; '.join(others)}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder))
    if check:
        lines = differences(recorded["digests"], found)
        print("\n".join(lines) or f"{len(found)} digests are those of {RECORD.relative_to(ROOT)}")
        return 1 if lines else 0
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps({"made_with": here, "digests": found}, indent=1) + "\n")
    print(f"{len(found)} digests written to {RECORD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
