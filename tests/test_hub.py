"""Everything that names the hub, run against a stand-in for it that fails and stalls."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import AUDIO_TYPE
from tests.stand_in_hub import COMMIT, StandInHub
from torchtitan.audio.codec import Codec
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.sources import find_files
from torchtitan.eval.data import open_tasks
from torchtitan.eval.suites import SALMON, SLM21, STORY_CLOZE
from torchtitan.tools import retries
from torchtitan.tools.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory, mimi_folder, make_base_model, save_speech_model, speech_folder, make_sound) -> Path:
    """The stand-in's root: the published models as such (they say nothing of their codec), and the data sets.

    Parquet files hold structs of bytes and path, without the metadata by which ``datasets`` knows audio.
    """
    root = tmp_path_factory.mktemp("hub")
    model = save_speech_model(root / "models" / "llm-jp" / "Llama-Mimi-1.3B", mimi_folder)
    config = json.loads((model / "config.json").read_text())
    for key in ("audio_tokenizer", "codec_padding", "codec_window", "resampler"):
        config.pop(key, None)
    (model / "config.json").write_text(json.dumps(config))
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"weights in a format that is not read")
    shutil.copytree(mimi_folder, root / "models" / "kyutai" / "mimi")
    shutil.copytree(make_base_model(), root / "models" / "meta-llama" / "Llama-3.2-1B")
    data = root / "datasets"
    shutil.copytree(speech_folder / "peoples_speech", data / "MLCommons" / "peoples_speech")
    shutil.copytree(speech_folder / "librispeech_asr", data / "openslr" / "librispeech_asr")
    seed = 0
    for benchmark, owner in ((SALMON, "slprl/SALMon"), (SLM21, "speed"), (STORY_CLOZE, "speed")):
        for task in benchmark.tasks:
            columns = {}
            for column in benchmark.columns:
                seed += 1
                columns[column] = pa.array([{"bytes": make_sound(seed, 0.4, 16_000), "path": None}] * 2, AUDIO_TYPE)
            place = data / owner / task / ("" if benchmark is SALMON else "data")
            place.mkdir(parents=True)
            pq.write_table(pa.table(columns), place / "train-00000-of-00001.parquet")
    return root


def environment(hub: StandInHub, home: Path) -> dict[str, str]:
    variables = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "huggingface")}
    variables.update(XDG_CACHE_HOME=str(home / "cache"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="0")
    variables.update(HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_DISABLE_TELEMETRY="1")
    return variables


def rows_of(folder: Path) -> dict[str, list[dict]]:
    """What samples.parquet says of each clip, by benchmark."""
    files = sorted(folder.rglob("samples.parquet"))
    return {file.relative_to(folder).parts[0]: pq.read_table(file).to_pylist() for file in files}


def losses(folder: Path) -> list[tuple]:
    """Losses of a run in ``folder``."""
    (file,) = folder.rglob("metrics.jsonl")
    keys = ("step", "loss", "validation_loss")
    return [tuple(json.loads(line).get(key) for key in keys) for line in file.read_text().splitlines()]


def test_public_commands_from_a_hub_that_fails_and_stalls(folders, make_base_model, mimi_folder, tmp_path):
    parts = [folders / "models" / "llm-jp" / "Llama-Mimi-1.3B", mimi_folder, make_base_model(), folders / "datasets"]
    with StandInHub(folders, fail=0.1, stall=0.02, stall_seconds=1.2) as hub:
        command = [sys.executable, str(ROOT / "tests" / "hub_commands.py"), *map(str, parts)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(hub, tmp_path),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-6000:]
    assert hub.failed > 5
    assert hub.stalled > 0
    said = [line for line in done.stderr.splitlines() if "trying again in" in line]
    assert any("on the hub" in line and "(1 of 5)" in line for line in said), done.stderr[-6000:]
    assert not [path for _, path in hub.requests if "original" in path and "resolve" in path], "weights fetched twice"

    assert (tmp_path / "hub.wav").read_bytes() == (tmp_path / "local.wav").read_bytes()
    found, expected = rows_of(tmp_path / "results"), rows_of(tmp_path / "local")
    assert set(found) == {"SALMON", "sLM21", "sStoryCloze"}
    assert found == expected
    assert all(np.isfinite(row["nll"]).all() and row["codes"] for rows in found.values() for row in rows)
    (written,) = (tmp_path / "results" / "SALMON").rglob("results.json")
    settings = json.loads(written.read_text())["settings"]
    assert {settings["model"]["revision"], settings["codec"]["revision"]} == {COMMIT}
    assert {task["revision"] for task in settings["data"].values()} == {COMMIT}

    runs = [losses(tmp_path / name) for name in ("from_hub", "from_folder", "from_paths")]
    assert len(runs[0]) >= 3
    assert runs[0] == runs[1] == runs[2]
    assert "peoples_speech is read from ./data/peoples_speech" in done.stdout + done.stderr


@pytest.fixture
def hub_here(folders, tmp_path, monkeypatch):
    """A function that starts a stand-in which this process talks to, with a cache of its own and no waits."""
    from huggingface_hub import constants

    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    started: list[StandInHub] = []

    def start(**options) -> StandInHub:
        hub = StandInHub(folders, **options)
        started.append(hub.__enter__())
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return hub

    yield start
    for hub in started:
        hub.__exit__()


def test_a_hub_that_never_answers_is_one_sentence_after_as_many_tries(hub_here, caplog):
    hub = hub_here(fail=1.0)
    with pytest.raises(UserError, match=r"^kyutai/mimi: the model cannot be downloaded \(.+\)\.$") as caught:
        Codec.load("kyutai/mimi", 4)
    assert "\n" not in str(caught.value)
    assert len(hub.requests) > 5
    with pytest.raises(UserError, match=r"^slprl/SALMon: the data set cannot be downloaded \("):
        open_tasks("slprl/SALMon", SALMON.tasks, SALMON.columns, True)


def test_what_was_fetched_once_is_used_without_a_network(hub_here, monkeypatch, folders):
    from huggingface_hub import constants

    hub_here()
    before = Codec.load("kyutai/mimi", 4)
    assert (before.revision, before.name) == (COMMIT, "kyutai/mimi")
    tasks, _ = open_tasks("slprl/SALMon", SALMON.tasks, SALMON.columns, True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: pytest.fail("this waits for nothing"))
    assert Codec.load("kyutai/mimi", 4).fingerprint() == before.fingerprint()
    again, missing = open_tasks("slprl/SALMon", SALMON.tasks, SALMON.columns, True)
    assert [(task.name, task.revision, task.num_pairs) for task in again] == [(n, COMMIT, 2) for n in SALMON.tasks]
    assert (missing, [next(task.pairs()) for task in again]) == ([], [next(task.pairs()) for task in tasks])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Codec.load("kyutai/mimi", 4).revision == COMMIT
    with pytest.raises(UserError, match=r"^speed/sWUGGY: the data set cannot be downloaded \(HF_HUB_OFFLINE is set"):
        open_tasks("speed", SLM21.tasks, SLM21.columns, False)


def test_what_the_hub_does_not_have_is_said_at_once(hub_here, monkeypatch):
    hub_here()
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: pytest.fail("this will not pass"))
    with pytest.raises(UserError, match=r"^kyutai/mini: the hub has no such model \("):
        Codec.load("kyutai/mini", 4)
    with pytest.raises(UserError, match=r"^llm-jp/Llama-Mimi-2B: the hub has no such model"):
        SpeechLM.load("llm-jp/Llama-Mimi-2B", device="cpu")
    with pytest.raises(
        UserError, match=r"nothing to evaluate: nobody/SALMon is not a folder, and the hub has no data set"
    ):
        open_tasks("nobody/SALMon", SALMON.tasks, SALMON.columns, True)
    with pytest.raises(UserError, match=r"the hub has no such model \("):
        SpeechLM.load("llm-jp/Llama-Mimi-1.3B", device="cpu", revision="no-such-branch")
    with pytest.raises(UserError, match=r"^nobody/speech: the data set cannot be read from the hub"):
        find_files(Source("mine", "nobody/speech"))
