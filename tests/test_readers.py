"""Reading rows by number, from every format: each row once, in order, whatever is damaged."""

import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan.audio.waveform import load_audio
from torchtitan.datasets import files, lists, tables, tars
from torchtitan.datasets.files import RecordingFile
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.readers import AudioDataset, DatasetIndex, index_files
from torchtitan.datasets.rows import Row
from torchtitan.datasets.sources import find_files
from torchtitan.tools import retries
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

AUDIO_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)


@pytest.fixture
def small(monkeypatch):
    """Blocks of few rows."""
    for home, name, size in (
        (tables, "BLOCK_ROWS", 5),
        (tars, "TAR_BLOCK", 3),
        (lists, "LIST_BLOCK", 3),
        (tables, "BATCH_ROWS", 2),
    ):
        monkeypatch.setattr(home, name, size)


@pytest.fixture
def log(caplog, monkeypatch):
    """The messages of the run's logger."""
    monkeypatch.setattr(logger, "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def opened(path: Path | str, **facts) -> AudioDataset:
    source = Source("mine", str(path), **facts)
    return AudioDataset(source, index_files(source, find_files(source)))


def all_rows(data: AudioDataset) -> list[Row]:
    found = list(data.read(range(len(data))))
    assert [number for number, _ in found] == list(range(len(data)))
    return [row for _, row in found]


def texts(data: AudioDataset) -> list[str | None]:
    return [row.text for row in all_rows(data)]


# --- one writer for each format: recordings number 0 to n - 1 with the text "text i", several files


def sound(number: int) -> bytes:
    return b"sound %d " % number * 40


def write_parquet(folder: Path, sizes: list[int]) -> None:
    for start, stop, path in _parts(folder, sizes, "parquet"):
        table = _table(start, stop)
        pq.write_table(table, path, row_group_size=7)


def write_arrow(folder: Path, sizes: list[int]) -> None:
    for start, stop, path in _parts(folder, sizes, "arrow"):
        table = _table(start, stop)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)


def write_arrow_file(folder: Path, sizes: list[int]) -> None:
    for start, stop, path in _parts(folder, sizes, "arrow"):
        table = _table(start, stop)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)


def write_saved(folder: Path, sizes: list[int]) -> None:
    """As the datasets library saves it."""
    from datasets import Dataset

    Dataset(_table(0, sum(sizes))).save_to_disk(folder, num_shards=len(sizes))


def write_tar(folder: Path, sizes: list[int]) -> None:
    for start, stop, path in _parts(folder, sizes, "tar"):
        members = [("README.md", b"not a recording")]
        for i in range(start, stop):
            members.append((f"part/clip_{i}.mp3", sound(i)))
            about = {"text": f"text {i}", "duration": i / 10, "id": f"clip-{i}"}
            members.append((f"part/clip_{i}.json", json.dumps(about).encode()))
        write_members(path, members)


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def _files(folder: Path, sizes: list[int]) -> list[dict]:
    """Sound files and what manifests say of them."""
    (folder / "sounds").mkdir(parents=True)
    records = []
    for i in range(sum(sizes)):
        (folder / "sounds" / f"clip-{i:03}.wav").write_bytes(sound(i))
        records.append({"path": f"sounds/clip-{i:03}.wav", "text": f"text {i}", "duration": i / 10, "id": f"clip-{i}"})
    return records


def write_jsonl(folder: Path, sizes: list[int]) -> None:
    lines = [json.dumps(record) for record in _files(folder, sizes)]
    (folder / "metadata.jsonl").write_text("\n\n".join(lines), "utf-8")


def write_csv(folder: Path, sizes: list[int]) -> None:
    rows = [f'{r["id"]},"{r["path"]}",{r["duration"]},{r["text"]}' for r in _files(folder, sizes)]
    (folder / "metadata.csv").write_text("\ufeffid,file_name,duration,transcription\r\n" + "\r\n".join(rows), "utf-8")


def write_tsv(folder: Path, sizes: list[int]) -> None:
    rows = ["\t".join(str(r[key]) for key in ("id", "path", "duration", "text")) for r in _files(folder, sizes)]
    (folder / "metadata.tsv").write_text("\n".join(["id\tpath\tduration\tsentence", *rows, ""]), "utf-8")


def write_audio(folder: Path, sizes: list[int]) -> None:
    for record in _files(folder, sizes):
        (folder / record["path"]).with_suffix(".txt").write_text(record["text"] + "\n")


def write_kaldi(folder: Path, sizes: list[int]) -> None:
    for records, path in _record_parts(folder, sizes, ""):
        path.mkdir()
        (path / "wav.scp").write_text("".join(f"{r['id']}  ../{r['path']}\n" for r in records))
        lines = [f"{r['id']} {r['text']}\n" for r in reversed(records)]
        (path / "text").write_text("".join(lines))


def write_segments(folder: Path, sizes: list[int]) -> None:
    write_kaldi(folder, sizes)
    for scp in folder.glob("*/wav.scp"):
        names = [line.split()[0] for line in scp.read_text().splitlines()]
        scp.write_text(re.sub("(?m)^clip", "rec", scp.read_text()))
        lines = [f"{name} {name.replace('clip', 'rec')} {i} {i + 0.5}\n" for i, name in enumerate(names)]
        (scp.parent / "segments").write_text("".join(lines))


def lhotse_recording(record: dict, id: str) -> dict:
    source = {"type": "file", "channels": [0], "source": record["path"]}
    return {"id": id, "sources": [source], "sampling_rate": 8000, "num_samples": 1, "duration": record["duration"]}


def write_cuts(folder: Path, sizes: list[int]) -> None:
    for records, path in _record_parts(folder, sizes, ".jsonl.gz", "cuts-"):
        with gzip.open(path, "wt") as file:
            for r in records:
                spoken = [{"text": text, "channel": 0} for text in r["text"].split()]
                cut = {"id": r["id"], "start": 0, "duration": r["duration"], "channel": 0, "type": "MonoCut"}
                cut |= {"recording": lhotse_recording(r, "r"), "supervisions": spoken}
                file.write(json.dumps(cut) + "\n")


def write_recordings(folder: Path, sizes: list[int]) -> None:
    for records, path in _record_parts(folder, sizes, ".jsonl", "x_recordings_"):
        lines = [json.dumps(lhotse_recording(r, f"rec-{r['id']}")) for r in reversed(records)]
        path.write_text("\n".join(lines))
        with gzip.open(path.with_name(path.name.replace("recordings", "supervisions") + ".gz"), "wt") as file:
            for r in records:
                values = {"id": r["id"], "recording_id": f"rec-{r['id']}", "start": 0, "channel": 0}
                file.write(json.dumps({**values, "duration": r["duration"], "text": r["text"]}) + "\n")


def _record_parts(folder: Path, sizes: list[int], extension: str, lead: str = "part-"):
    """What manifests say of the sound files of each of several, and its path."""
    records = _files(folder, sizes)
    for number, size in enumerate(sizes):
        yield records[:size], folder / f"{lead}{number}{extension}"
        records = records[size:]


def _parts(folder: Path, sizes: list[int], extension: str):
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, size in enumerate(sizes):
        yield start, start + size, folder / f"part-{number}.{extension}"
        start += size


def _table(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    return pa.table(
        {
            "unused": ["x" * 50] * len(numbers),
            "audio": pa.array([{"bytes": sound(i), "path": f"{i}.flac"} for i in numbers], AUDIO_TYPE),
            "text": [f"text {i}" for i in numbers],
            "duration_ms": [100 * i for i in numbers],
            "id": [f"clip-{i}" for i in numbers],
        }
    )


FORMATS = {
    "parquet": (write_parquet, {}),
    "arrow": (write_arrow, {}),
    "arrow file": (write_arrow_file, {}),
    "saved": (write_saved, {}),
    "tar": (write_tar, {}),
    "jsonl": (write_jsonl, {}),
    "csv": (write_csv, {}),
    "tsv": (write_tsv, {}),
    "audio": (write_audio, {}),
    "kaldi": (write_kaldi, {}),
    "segments": (write_segments, {}),
    "cuts": (write_cuts, {}),
    "recordings": (write_recordings, {}),
}
every_format = pytest.mark.parametrize("name", FORMATS)


@every_format
def test_rows_of_every_format(tmp_path, name):
    FORMATS[name][0](tmp_path, [13, 1, 9])
    data = opened(tmp_path)
    assert len(data) == 23 == data.block_sizes.sum()
    assert data.block_sizes.dtype == np.int64
    for i, row in enumerate(all_rows(data)):
        assert row.error is None
        assert row.text == f"text {i}"
        stated = {"audio": None, "kaldi": None, "segments": 0.5}.get(name, i / 10)
        assert row.seconds == (None if stated is None else pytest.approx(stated))
        audio = Path(row.audio).read_bytes() if isinstance(row.audio, str) else row.audio
        assert audio == sound(i)
        assert f"clip-{i:03}.wav" in row.key if name == "audio" else row.key.endswith(f" (clip-{i})")
        assert row.key.startswith(str(tmp_path))


@every_format
def test_any_rows_in_order_and_each_once(tmp_path, small, name):
    FORMATS[name][0](tmp_path, [13, 1, 9])
    data = opened(tmp_path)
    assert len(data.block_sizes) > 5 and data.block_sizes.max() <= 5
    rows = all_rows(data)
    assert [row.text for row in rows] == [f"text {i}" for i in range(23)]
    choose = random.Random(0)
    subsets = [[], [0], [22], [12, 13, 14], *(sorted(choose.sample(range(23), k)) for k in range(1, 23))]
    for subset in subsets:
        assert list(data.read(subset)) == [(i, rows[i]) for i in subset]


@every_format
def test_a_copy_elsewhere_has_the_same_fingerprint(tmp_path, monkeypatch, name):
    FORMATS[name][0](tmp_path / "a", [5, 2])
    data = opened(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert opened(tmp_path / "elsewhere" / "b").fingerprint == data.fingerprint
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert opened("./b").fingerprint == opened("b/").fingerprint == data.fingerprint
    FORMATS[name][0](tmp_path / "c", [5, 3])
    assert opened(tmp_path / "c").fingerprint != data.fingerprint


@every_format
def test_the_index_can_be_sent(tmp_path, name):
    FORMATS[name][0](tmp_path, [5, 2])
    data = opened(tmp_path)
    index = pickle.loads(pickle.dumps(data.index))
    assert isinstance(index, DatasetIndex) and index == data.index
    assert all_rows(AudioDataset(data.source, index)) == all_rows(data)


@every_format
def test_several_threads_read_at_once(tmp_path, small, name):
    FORMATS[name][0](tmp_path, [13, 1, 9])
    data = opened(tmp_path)
    rows = list(enumerate(all_rows(data)))
    gate = threading.Barrier(6)

    def read(shift: int) -> bool:
        gate.wait(timeout=10)
        return all(list(data.read(range(shift, 23))) == rows[shift:] for _ in range(3))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(6)))


def test_several_reads_of_one_thread_may_be_interleaved(tmp_path, small):
    write_tar(tmp_path, [9])
    data = opened(tmp_path)
    rows = list(enumerate(all_rows(data)))
    assert [pair for pairs in zip(data.read(range(9)), data.read(range(9)), strict=True) for pair in pairs] == [
        row for row in rows for _ in range(2)
    ]


@pytest.mark.parametrize("rows", [[3, 2], [1, 1], [-1], [7], [0, 100]])
def test_rows_that_do_not_ascend_are_a_mistake(tmp_path, rows):
    write_parquet(tmp_path, [7])
    with pytest.raises(ValueError, match="rows must ascend between 0 and 6"):
        list(opened(tmp_path).read(rows))


# --- tables


def write_table(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_blocks_are_row_groups_of_at_most_128_rows(tmp_path):
    table = pa.table({"audio": [b"x"] * 2500})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1500)
    data = opened(tmp_path)
    assert data.block_sizes.tolist() == [*[128] * 11, 92, *[128] * 7, 104]
    wanted = [0, 127, 128, 1023, 1024, 1499, 1500, 2499]
    assert [number for number, _ in data.read(wanted)] == wanted


def test_real_recordings(speech_folder):
    data = opened(speech_folder / "peoples_speech")
    for row in all_rows(data):
        waveform = load_audio(row.audio)
        assert waveform.numel() / 24_000 == pytest.approx(row.seconds, abs=0.01)


def test_columns_by_other_names(tmp_path):
    path = write_table(
        tmp_path / "a.parquet", speech=[b"x", b"y"], words=["a", None], length=[1.5, float("nan")], name=["p", ""]
    )
    rows = all_rows(opened(path, audio="speech", text="words", duration="length", id="name"))
    assert rows == [Row(f"{path}:0 (p)", b"x", "a", 1.5), Row(f"{path}:1", b"y", None, None)]


@pytest.mark.parametrize(
    "cell",
    [
        pa.array([b"sound"]),
        pa.array([b"sound"], pa.large_binary()),
        pa.array([{"bytes": b"sound", "path": "no.flac"}], AUDIO_TYPE),
        pa.array([{"bytes": b"sound", "path": None, "rate": 8000}]),
        pa.array([{"bytes": b"sound"}]),
    ],
)
def test_kinds_of_audio_columns(tmp_path, cell):
    table = pa.table({"audio": cell})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row.audio for row in all_rows(opened(tmp_path))] == [b"sound"]
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert [row.audio for row in all_rows(opened(tmp_path / "a.arrow"))] == [b"sound"]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
@pytest.mark.parametrize("make_list", [pa.list_, pa.large_list])
def test_decoded_audio_in_a_column(tmp_path, kind, make_list):
    arrays = [[0.1, -0.25, 1 / 3], [], None, [0.5, None]]
    fields = [("path", pa.string()), ("array", make_list(kind)), ("sampling_rate", pa.int64())]
    cells = [{"path": "x.wav", "array": array, "sampling_rate": 16_000} for array in arrays]
    table = pa.table({"audio": pa.array([*cells, None], pa.struct(fields)), "id": list("abcde")})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        rows = all_rows(opened(path))
        assert [row.key for row in rows] == [f"{path}:{i} ({name})" for i, name in enumerate("abcde")]
        first, empty, by_path, gap, nothing = (row.audio for row in rows)
        assert (first.array.dtype, first.rate, rows[0].size) == (np.float32, 16_000, 12)
        assert first.array.tolist() == np.array(arrays[0], np.float32).tolist()
        assert (len(empty.array), by_path, nothing) == (0, "x.wav", None)
        assert gap.array[0] == 0.5 and np.isnan(gap.array[1])


@pytest.mark.parametrize("struct", [True, False])
def test_audio_may_be_named_relative_to_its_table(tmp_path, struct):
    (tmp_path / "data" / "sounds").mkdir(parents=True)
    (tmp_path / "data" / "sounds" / "a.flac").touch()
    names = ["sounds/a.flac", "/elsewhere/b.flac", None]
    cells = pa.array([{"bytes": None, "path": name} for name in names], AUDIO_TYPE) if struct else names
    write_table(tmp_path / "data" / "a.parquet", audio=cells)
    found = [row.audio for row in all_rows(opened(tmp_path, format="parquet"))]
    assert found == [str(tmp_path / "data" / "sounds" / "a.flac"), "/elsewhere/b.flac", None]


def test_an_audio_column_of_numbers_is_refused(tmp_path):
    write_table(tmp_path / "a.parquet", audio=[[0.1, 0.2]])
    with pytest.raises(UserError, match=r"a.parquet: column 'audio' holds .*, which is neither audio nor a path"):
        opened(tmp_path)


@pytest.mark.parametrize("count", [1, 3])
def test_no_audio_column_anywhere(tmp_path, count):
    for i in range(count):
        write_table(tmp_path / f"{i}.parquet", id=["a"], sound=["b"])
    with pytest.raises(UserError, match=r"0.parquet: there is no column 'audio' \(columns: id, sound\)"):
        opened(tmp_path)


def test_a_file_without_audio_is_left_out(tmp_path):
    write_table(tmp_path / "0.parquet", id=["a"])
    write_table(tmp_path / "1.parquet", audio=[b"x"])
    data = opened(tmp_path)
    assert data.index.bad_files == [(str(tmp_path / "0.parquet"), "there is no column 'audio' (columns: id)")]
    assert [row.audio for row in all_rows(data)] == [b"x"]


def test_tables_without_rows(tmp_path):
    write_table(tmp_path / "0.parquet", audio=pa.array([], pa.binary()))
    with pytest.raises(UserError, match="there is no row in the file"):
        opened(tmp_path)
    write_table(tmp_path / "1.parquet", audio=[b"x"])
    assert len(all_rows(opened(tmp_path))) == 1


def test_only_needed_columns_are_read(tmp_path, monkeypatch):
    noise = random.Random(0).randbytes
    table = {"audio": [b"x"] * 64, "embedding": [noise(100_000) for _ in range(64)]}
    path = write_table(tmp_path / "a.parquet", **table)
    size = path.stat().st_size
    data, amount = opened(tmp_path), []
    read = files.File.read
    monkeypatch.setattr(files.File, "read", lambda self, n=-1: amount.append(n) or read(self, n))
    all_rows(data)
    assert 0 < sum(amount) < size / 10


def test_a_row_group_is_not_read_whole(tmp_path, monkeypatch):
    noise = random.Random(0).randbytes
    path = tmp_path / "a.parquet"
    table = pa.table({"audio": [noise(50_000) for _ in range(200)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_batch_size=4)  # in many pages
    del table
    monkeypatch.setattr(files, "READ_BYTES", 1 << 16)
    before = pa.total_allocated_bytes()
    data, highest = opened(path), 0
    for _ in data.read(range(200)):
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert highest < path.stat().st_size / 2


# --- tars


def test_tar_samples_are_consecutive_members_of_one_key(tmp_path):
    path = write_members(
        tmp_path / "a.tar",
        [
            ("a/one.left.txt", b"first\n"),
            ("a/one.flac", b"1"),
            ("a/one.txt", b" of the text file "),
            ("b/one.WAV", b"2"),
            ("b/one.json", b'{"text": "of json", "duration": "0.5"}'),
            ("b/only.json", b"{}"),
            ("._b.wav", b"a leftover"),
            ("c.json", b"broken"),
            ("c.opus", b"3"),
            ("c.mp3", b"not this"),
        ],
    )
    assert all_rows(opened(path)) == [
        Row(f"{path}:0 (one)", b"1", "of the text file", None),
        Row(f"{path}:1 (one)", b"2", "of json", 0.5),
        Row(f"{path}:2 (c)", b"3", None, None),
    ]
    assert [row.audio for row in all_rows(opened(path, audio="mp3"))] == [b"not this"]
    assert texts(opened(path, text="left.txt")) == ["first", None, None]
    with pytest.raises(UserError, match=r"there is no member of extension \.aac \(extensions: flac, json"):
        opened(path, audio="aac")


def test_long_names_in_tars(tmp_path, small):
    members = [(f"{'folder/' * 40}{i}.wav", b"%d" % i) for i in range(10)]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for name, data in members:
                about = tarfile.TarInfo(name)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
        assert [row.audio for row in all_rows(opened(path))] == [data for _, data in members]


def test_the_index_of_a_tar_reads_headers_only(tmp_path, monkeypatch):
    write_members(tmp_path / "a.tar", [(f"{i}.wav", bytes(1 << 20)) for i in range(8)])
    amount = []
    read = files.File.read
    monkeypatch.setattr(files.File, "read", lambda self, n=-1: amount.append(n) or read(self, n))
    opened(tmp_path)
    assert sum(amount) < 100_000


# --- manifests and folders of audio files


def test_manifests_name_files_relative_to_themselves_or_absolutely(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.wav", "b.wav"):
        (tmp_path / name).touch()
    lines = [{"audio_filepath": "a.wav"}, {"audio_filepath": str(tmp_path / "b.wav")}, {"audio_filepath": "no.wav"}]
    path = tmp_path / "sub" / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = [row.audio for row in all_rows(opened(path))]
    assert found == [str(tmp_path / "sub" / "a.wav"), str(tmp_path / "b.wav"), str(tmp_path / "sub" / "no.wav")]


def test_a_manifest_may_be_one_list(tmp_path, small):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"wav": f"{i}.wav", "sentence": f"text {i}"} for i in range(7)]))
    assert texts(opened(path)) == [f"text {i}" for i in range(7)]


def test_tables_of_fairseq(tmp_path, small):
    write_audio(tmp_path / "data", [7])
    names = [f"sounds/clip-{i:03}.wav\t{i * 1000}" for i in range(7)]
    for root in (str(tmp_path / "data"), "data"):
        path = tmp_path / "train.tsv"
        path.write_text("\n".join([root, *names]) + "\n")
        found = all_rows(opened(path))
        assert [Path(row.audio).read_bytes() for row in found] == [sound(i) for i in range(7)]
        assert {row.seconds for row in found} == {None}


def test_tables_of_common_voice(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp3").touch()
    (tmp_path / "train.tsv").write_text('client_id\tpath\tsentence\n1\ta.mp3\tHe said "no.\n')
    (row,) = all_rows(opened(tmp_path / "train.tsv"))
    assert (row.audio, row.text) == (str(tmp_path / "clips" / "a.mp3"), 'He said "no.')


def test_quoted_lines_in_csv(tmp_path, small):
    (tmp_path / "list.csv").write_text("path,text\n" + "".join(f'{i}.wav,"one\ntwo, ""{i}"""\n' for i in range(8)))
    assert texts(opened(tmp_path / "list.csv")) == [f'one\ntwo, "{i}"' for i in range(8)]


def test_keys_of_a_manifest_by_other_names(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"path": "x", "speech": "a.wav", "text": "no", "words": "yes", "length_ms": 1500}\n')
    facts = {"audio": "speech", "text": "words", "duration": "length_ms"}
    assert all_rows(opened(path, **facts)) == [Row(f"{path}:0 (a.wav)", str(tmp_path / "a.wav"), "yes", 1.5)]
    with pytest.raises(UserError, match=r"list.jsonl: there is no key sound \(keys: path, speech, "):
        opened(path, audio="sound")


def test_long_manifests(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "READ_BYTES", 100)
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(json.dumps({"path": "a.wav", "text": f"ü{i} " + "x" * (i % 150)}) for i in range(600)))
    data = opened(path)
    assert data.block_sizes.tolist() == [256, 256, 88]
    assert [row.text.split()[0] for row in all_rows(data)] == [f"ü{i}" for i in range(600)]
    assert [row.text.split()[0] for _, row in data.read([511, 512, 599])] == ["ü511", "ü512", "ü599"]


def test_transcriptions_of_librispeech(tmp_path):
    folder = tmp_path / "train-clean-100" / "1" / "2"
    folder.mkdir(parents=True)
    (folder / "1-2.trans.txt").write_text("1-2-0000 FIRST ONE\n1-2-0001 SECOND\n")
    for i in range(3):
        (folder / f"1-2-000{i}.flac").touch()
    assert texts(opened(tmp_path)) == ["FIRST ONE", "SECOND", None]


# --- damage


def test_damaged_lines_of_a_manifest_are_rows_with_an_error(tmp_path, small):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"path": "a.wav"}\n{"path": "b.wa\n[1]\n{"text": "x"}\n\xff\xfe\n{"path": "c.wav"}\n')
    data = opened(path)
    rows = all_rows(data)
    assert [row.audio and Path(row.audio).name for row in rows] == ["a.wav", None, None, None, None, "c.wav"]
    assert [row.error is None for row in rows] == [True, False, False, False, False, True]
    assert rows[1] == Row(f"{path}:1", None, None, None, "the line is not JSON")


def test_truncated_tar_keeps_its_first_samples(tmp_path, small):
    write_tar(tmp_path, [9])
    path = tmp_path / "part-0.tar"
    whole = path.read_bytes()
    counts = set()
    for size in range(1024, len(whole), 700):
        path.write_bytes(whole[:size])
        try:
            data = opened(tmp_path)
        except UserError:  # not one sample is left
            continue
        counts.add(len(data))
        expected = [sound(i) for i in range(9)]
        assert [row.audio for row in all_rows(data)] == expected[: len(data)]
        if len(data) < 9:
            ((bad, reason),) = data.index.bad_files or [(str(path), "missing")]  # cut between two members
            assert bad == str(path) and "missing" in reason
    assert counts >= set(range(1, 10))


@pytest.mark.parametrize("at", [0, 8 * 1024])
def test_damaged_header_of_a_tar(tmp_path, at):
    write_members(tmp_path / "a.tar", [(f"{i}.wav", sound(i)) for i in range(20)])
    write_members(tmp_path / "b.tar", [("b.wav", b"good")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[at : at + 512] = bytes(range(256)) * 2
    (tmp_path / "a.tar").write_bytes(data)
    found = opened(tmp_path)
    assert [path for path, _ in found.index.bad_files] == [str(tmp_path / "a.tar")]
    rows = all_rows(found)
    assert rows[-1].audio == b"good"
    assert [row.audio for row in rows[:-1]] == [sound(i) for i in range(len(rows) - 1)]
    assert (len(rows) > 1) == (at > 0)


@pytest.mark.parametrize("name", ["parquet", "arrow", "arrow file", "saved", "tar"])
def test_a_file_of_rubbish_among_good_ones(tmp_path, name):
    FORMATS[name][0](tmp_path, [5, 4])
    damaged = sorted(tmp_path.glob("*-0*"))[0]
    damaged.write_bytes(b"nothing of use " * 100)
    data = opened(tmp_path)
    assert [path for path, _ in data.index.bad_files] == [str(damaged)]
    rows = all_rows(data)
    assert [row.text for row in rows] == [f"text {i}" for i in range(9)][-len(rows) :]
    assert len(rows) in (4, 5)


@pytest.mark.parametrize("extension", ["parquet", "arrow", "tar", "csv", "tsv"])
@pytest.mark.parametrize("content", [b"nothing of use " * 100, b""])
def test_rubbish_alone_is_an_error(tmp_path, extension, content):
    path = tmp_path / f"a.{extension}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: (.*[a-z]|there is no row in it)") as caught:
        opened(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["arrow", "arrow file"])
def test_truncated_arrow_keeps_its_first_batches(tmp_path, name):
    FORMATS[name][0](tmp_path, [30])
    path = tmp_path / "part-0.arrow"
    whole = path.read_bytes()
    sizes = set()
    for size in range(0, len(whole), 997):
        path.write_bytes(whole[:size])
        try:
            data = opened(tmp_path)
        except UserError:
            continue
        sizes.add(len(data))
        assert texts(data) == [f"text {i}" for i in range(len(data))]
        assert bool(data.index.bad_files) == (len(data) < 30)
    assert sizes >= {7, 14, 21, 28}


def test_damaged_pages_of_parquet_cost_their_row_group(tmp_path, log):
    table = _table(0, 40)
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=10, compression="zstd")
    second = pq.read_metadata(path).row_group(1).column(1)
    raw = bytearray(path.read_bytes())
    start = second.dictionary_page_offset or second.data_page_offset
    raw[start : start + second.total_compressed_size] = bytes(second.total_compressed_size)
    path.write_bytes(raw)
    data = opened(path)
    rows = all_rows(data)
    assert [i for i, row in enumerate(rows) if row.error] == list(range(10, 20))
    assert all(row.audio is None and row.key == f"{path}:{i}" for i, row in enumerate(rows) if row.error)
    assert [row.audio for row in rows[20:]] == [sound(i) for i in range(20, 40)]
    assert [m for m in log() if "a.parquet: rows 10 to 19 cannot be read (" in m]
    assert not [m for m in log() if "trying again" in m]


@pytest.mark.parametrize("name", ["parquet", "arrow", "arrow file", "tar", "jsonl"])
@pytest.mark.parametrize("change", ["deleted", "emptied", "cut"])
def test_files_that_change_after_they_were_indexed(tmp_path, small, log, name, change):
    FORMATS[name][0](tmp_path, [23])
    data = opened(tmp_path)
    path = next(p for p in tmp_path.iterdir() if p.is_file())
    whole = path.read_bytes()
    if change == "deleted":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2 if change == "cut" else 0])
    rows = all_rows(data)
    good = [i for i, row in enumerate(rows) if row.error is None]
    assert good == list(range(len(good))) and (not good or change == "cut")
    assert all(row.text == f"text {i}" for i, row in enumerate(rows) if row.error is None)
    assert all(row.audio is None and row.error for row in rows[len(good) :])
    assert [m for m in log() if "cannot be read" in m] and not [m for m in log() if "trying again" in m]


# --- reads that fail for a while


class Flaky:
    """Opens files whose reads fail: the next ``failures`` of them, or all of one path."""

    def __init__(self, error: Callable[[], Exception], failures: int = 0):
        self.error, self.failures, self.always = error, failures, ""
        self.tries = 0

    def __call__(self, path: str):
        file = open(path, "rb")  # noqa: SIM115
        flaky = self

        class File:
            def read(self, size: int = -1) -> bytes:
                flaky.fail(path)
                return file.read(size)

            def __getattr__(self, name: str):
                return getattr(file, name)

        return File()

    def fail(self, path: str) -> None:
        if self.failures > 0 or (self.always and self.always in path):
            self.failures -= 1
            self.tries += 1
            raise self.error()


@pytest.fixture
def flaky(monkeypatch):
    def make(error: Callable[[], Exception] = lambda: OSError("the line is down"), failures: int = 0) -> Flaky:
        made = Flaky(error, failures)
        monkeypatch.setattr(files, "open_file", made)
        return made

    return make


def hub_error(status: int) -> Exception:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    response = httpx.Response(status, request=httpx.Request("GET", "https://example.org"))
    return HfHubHTTPError(f"status {status}", response=response)


def lost_connection() -> Exception:
    import httpx

    return httpx.ReadTimeout("timed out")


@pytest.mark.parametrize("name", ["parquet", "arrow", "tar", "jsonl", "segments", "recordings"])
def test_reads_are_tried_again(tmp_path, flaky, log, name):
    FORMATS[name][0](tmp_path, [13])
    expected = all_rows(opened(tmp_path))
    opener = flaky()
    source = Source("mine", str(tmp_path))
    for failures in (1, 3, 5):
        opener.failures = failures
        index = index_files(source, find_files(source))
        assert not index.bad_files
        opener.failures = failures
        assert all_rows(AudioDataset(source, index)) == expected
    messages = [m for m in log() if "trying again" in m]
    assert len(messages) == opener.tries == 18
    assert messages[-1].startswith(str(tmp_path)) and "the line is down; trying again in 0 s (5 of 5)" in messages[-1]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (lambda: TimeoutError("slow"), True),
        (lambda: ConnectionResetError("gone"), True),
        (lost_connection, True),
        (lambda: hub_error(503), True),
        (lambda: hub_error(429), True),
        (lambda: hub_error(403), False),
        (lambda: FileNotFoundError("no such file"), False),
        (lambda: PermissionError("not yours"), False),
        (lambda: pa.ArrowInvalid("corrupt"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(tmp_path, flaky, log, error, again):
    write_parquet(tmp_path, [13])
    data = opened(tmp_path)
    flaky(error, 1)
    assert [row.error is None for row in all_rows(data)[7:]] == [True] * 6
    assert [row.error is None for row in all_rows(data)] == [True] * 13
    assert bool([m for m in log() if "trying again" in m]) is again
    assert bool([m for m in log() if "rows 0 to 6 cannot be read" in m]) is not again


@pytest.mark.parametrize("retries", [0, 2])
def test_a_read_that_never_succeeds_costs_its_rows(tmp_path, flaky, log, retries):
    write_parquet(tmp_path, [7, 5, 7])
    data = opened(tmp_path)
    opener = flaky()
    opener.always = "part-1"
    rows = all_rows(AudioDataset(data.source, data.index, retries))
    path = tmp_path / "part-1.parquet"
    assert rows[7:12] == [Row(f"{path}:{i}", None, None, None, "the line is down") for i in range(5)]
    assert [row.text for row in rows[:7] + rows[12:]] == [f"text {i}" for i in [*range(7), *range(12, 19)]]
    assert opener.tries == retries + 1
    assert len([m for m in log() if "part-1.parquet: rows 0 to 4 cannot be read (the line is down)" in m]) == 1


def test_waits_double(tmp_path, flaky, monkeypatch):
    write_parquet(tmp_path, [3])
    data = opened(tmp_path)
    flaky(failures=4)
    waits: list[float] = []
    monkeypatch.setattr(retries, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    assert len(all_rows(data)) == 3
    assert waits == [1, 2, 4, 8]


# --- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose repository owner/name is the folder ``hub`` of the test."""

    class Hub:
        def find(self, root: str) -> list[str]:
            folder = tmp_path / "hub"
            return [f"{root}/{p.relative_to(folder)}" for p in folder.rglob("*") if p.is_file()]

        def open(self, path: str, mode: str, block_size: int):
            return open(tmp_path / "hub" / path.removeprefix("datasets/owner/name").split("/", 1)[1], mode)

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Hub)


@every_format
def test_every_format_from_the_hub(tmp_path, hub, name):
    FORMATS[name][0](tmp_path / "hub", [13, 9])
    local, data = opened(tmp_path / "hub"), opened("owner/name")
    assert data.fingerprint == local.fingerprint == opened("owner/name", revision="v/1").fingerprint
    for i, row in enumerate(all_rows(data)):
        # What is a part of a recording is read where it is cut.
        assert isinstance(row.audio, str) == (row.part is not None)
        assert (RecordingFile(row.audio, 0).read() if isinstance(row.audio, str) else row.audio) == sound(i)
        assert row.text == (None if name == "audio" else f"text {i}")
        assert row.key.startswith("hf://datasets/owner/name/")


# --- codes


def test_code_shards_are_indexed_but_not_read_here(tmp_path):
    schema = pa.schema([("codes", pa.list_(pa.int16()))])
    with pa.OSFile(str(tmp_path / "codes-0.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(pa.table({"codes": [[1, 2], [3]]}, schema=schema))
    source = Source("mine", str(tmp_path))
    index = index_files(source, find_files(source), progress=True)
    assert index.format == "codes" and [[size for size, _ in blocks] for blocks in index.blocks] == [[2]]
    with pytest.raises(UserError, match="these are codes, not recordings"):
        AudioDataset(replace(source, format="codes"), index)


def test_file_names_need_not_be_text(tmp_path, make_sound):
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.flac", "wb") as file:
        file.write(make_sound(0, 0.2))
    assert len(list(opened(tmp_path).read([0]))) == 1
