"""Every recording exactly once an epoch: over kill -9 at random moments, other numbers of ranks, other workers.

The ranks are processes of this very file (gloo, CPU) with a real loader, no model. Every few batches they write down
what they used and save the loader's state, as a training run does with its checkpoints; what came after the last saved
state is lost when they are killed, and has to come again. Then the recordings used are compared with those that one
loader uses that was never interrupted.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchtitan.datasets import order

BATCHES_A_STATE = 2
# Recordings among which the order shuffles.
WINDOW = 7


def make_loader(settings: dict, rank: int = 0, world_size: int = 1, num_workers: int = 1):
    """A loader over recordings or code shards."""
    from transformers import AutoTokenizer

    from torchtitan.audio.codec import Codec
    from torchtitan.audio.token_stream import extend_tokenizer
    from torchtitan.components.dataloader import LoaderSettings, SpeechDataLoader, max_frames_of
    from torchtitan.datasets.corpora import find_data, open_corpora
    from torchtitan.datasets.hf_dataset import Source
    from torchtitan.datasets.recordings import Ranks

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    stream = extend_tokenizer(tokenizer, 4)
    found = find_data([Source(name="speech", path=settings["data"])], 0)
    corpora, mixture = open_corpora(found, 5, max_frames_of(20.0), False, 0)
    return SpeechDataLoader(
        corpora,
        mixture,
        stream,
        Codec.load(settings["codec"], 4),
        tokenizer,
        LoaderSettings(
            "a2a",
            seq_len=96,
            batch_size=1,
            max_seconds=20.0,
            packing=settings["packing_window"] > 1,
            window=settings["packing_window"],
            num_workers=num_workers,
            seed=5,
        ),
        Ranks(rank, world_size),
    )


def run_rank(folder: Path, rank: int, world_size: int, num_workers: int, store: str, goal: int) -> None:
    """Take batches until a state of at least ``goal`` draws is saved."""
    torch.set_num_threads(1)
    order.SHUFFLE_ROWS = WINDOW
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    loader = make_loader(json.loads((folder / "settings.json").read_text()), rank, world_size, num_workers)
    number = len(list(folder.glob("state-*.json")))
    if number:
        loader.load_state_dict(json.loads((folder / f"state-{number - 1}.json").read_text()))
    if rank == 0:  # what was written down after the last state does not count
        for stale in folder.glob(f"used-{number}-*.json"):
            stale.unlink()
    dist.barrier()
    batches = iter(loader)
    while True:
        some = list(islice(batches, BATCHES_A_STATE))
        used = [key for batch in some for row in batch.keys for key in row]
        (folder / f"used-{number}-{rank}.json").write_text(json.dumps(used))
        dist.barrier()
        if rank == 0:
            (folder / "new").write_text(json.dumps(some[-1].state))
            (folder / "new").rename(folder / f"state-{number}.json")
        if some[-1].state["draw"] >= goal:
            break
        number += 1
        time.sleep(0.02)  # a training step, in which ranks are killed
    dist.barrier()
    os._exit(0)


def start(folder: Path, world_size: int, num_workers: int, goal: int) -> list[subprocess.Popen]:
    store = folder / f"store-{time.monotonic_ns()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, (folder, rank, world_size, num_workers, store, goal))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world_size)
    ]


def states(folder: Path) -> int:
    return len(list(folder.glob("state-*.json")))


SLOW = [("recordings", 1), ("recordings", 20), ("codes", 1), ("codes", 20)]


@pytest.mark.parametrize(
    ("kind", "packing_window", "legs"),
    [
        ("recordings", 20, [(2, 1), (1, 2)]),
        pytest.param("codes", 1, [(1, 0), (2, 1)], marks=pytest.mark.slow),
        *(pytest.param(*case, [(2, 1), (1, 2), (4, 0), (2, 3)], marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_exactly_once_over_kills_ranks_and_workers(
    tmp_path,
    monkeypatch,
    make_sound,
    write_rows,
    make_base_model,
    mimi_folder,
    write_code_shards,
    kind,
    packing_window,
    legs,
):
    monkeypatch.setattr(order, "SHUFFLE_ROWS", WINDOW)
    draw = random.Random(f"{kind}{packing_window}")
    rows = [(f"r{i}", make_sound(i % 9, 0.2 + 0.013 * i), "t") for i in range(23)]
    data = tmp_path / "data"
    for number, some in enumerate((rows[:9], rows[9:10], rows[10:])):
        write_rows(data / f"train-{number}.parquet", some)
    if kind == "codes":
        data = write_code_shards(tmp_path / "codes", {name: sound for name, sound, _ in rows}, mimi_folder)
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"data": str(data), "model": str(make_base_model()), "codec": str(mimi_folder)}
    settings["packing_window"] = packing_window
    (folder / "settings.json").write_text(json.dumps(settings))

    for world_size, num_workers in legs:  # each is killed once it got on a little
        before = states(folder)
        ranks = start(folder, world_size, num_workers, goal=10**9)
        deadline = time.monotonic() + 120
        while states(folder) < before + draw.randint(1, 4):
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), [
                rank.communicate()[0] for rank in ranks if rank.poll() is not None
            ]
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        for rank in draw.sample(ranks, len(ranks)):
            rank.send_signal(signal.SIGKILL)
        for rank in ranks:
            rank.communicate()
    goal = json.loads((folder / f"state-{states(folder) - 1}.json").read_text())["draw"] + 30
    ranks = start(folder, 3, 1, goal)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs

    used = Counter(
        key
        for number in range(states(folder))
        for path in folder.glob(f"used-{number}-*.json")
        for key in json.loads(path.read_text())
    )
    last = json.loads((folder / f"state-{states(folder) - 1}.json").read_text())
    expected, seen = Counter(), 0
    for batch in make_loader(settings):
        keys = [key for row in batch.keys for key in row]
        expected.update(keys)
        seen += len(keys)
        if seen <= 23:  # the first epoch by itself
            assert max(expected.values()) == 1
        if batch.state == last:
            break
        assert batch.state["draw"] <= last["draw"] + 23
    assert used == expected
    assert len(used) == 23


if __name__ == "__main__":
    folder, rank, world_size, num_workers, store, goal = sys.argv[1:]
    run_rank(Path(folder), int(rank), int(world_size), int(num_workers), store, int(goal))
