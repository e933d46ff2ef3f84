"""Kaldi folders, lhotse's manifests and NeMo's: which part of which recording each row is, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from torchtitan.audio.recording import Part
from torchtitan.audio.waveform import AudioError, resample
from torchtitan.datasets import files, lists
from torchtitan.datasets.decoding import UnreadError, decode_row
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.readers import AudioDataset, index_files
from torchtitan.datasets.rows import Row
from torchtitan.datasets.sources import find_files
from torchtitan.tools import retries
from torchtitan.tools.errors import UserError

RATE = 16_000
SECONDS = 3.0


def opened(path: Path | str, **facts) -> AudioDataset:
    source = Source("mine", str(path), **facts)
    return AudioDataset(source, index_files(source, find_files(source), retries=0), retries=0)


def rows_of(path: Path | str, **facts) -> list[Row]:
    data = opened(path, **facts)
    return [row for _, row in data.read(range(len(data)))]


def refused(path: Path | str, **facts) -> str:
    with pytest.raises(UserError) as error:
        opened(path, **facts)
    return str(error.value)


def name_of(row: Row) -> str:
    return row.key.rpartition("(")[2].removesuffix(")")


def write(path: Path, *lines: Any) -> Path:
    """A file of lines, or of JSON lines, packed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def wav(tmp_path) -> Path:
    """A stereo recording of three seconds, whose channels differ."""
    samples = 0.3 * np.random.default_rng(0).standard_normal((round(SECONDS * RATE), 2))
    path = tmp_path / "audio" / "long.wav"
    path.parent.mkdir()
    soundfile.write(path, samples.clip(-1, 1), RATE)
    return path


def sliced(path: Path, start: int, stop: int | None = None, channel: int | None = None) -> torch.Tensor:
    """The waveform of samples of a file."""
    samples = soundfile.read(path, start=start, stop=stop, dtype="float32", always_2d=True)[0]
    samples = samples.mean(axis=1) if channel is None else np.ascontiguousarray(samples[:, channel])
    return resample(torch.from_numpy(samples), RATE)


def same_as_slice(row: Row, expected: torch.Tensor) -> bool:
    waveform, seconds = decode_row(row, None, 0)
    beginning, whole = decode_row(row, 0.2, 0)
    assert seconds == whole == pytest.approx(len(expected) / 24_000, abs=1e-4)
    return torch.equal(waveform, expected) and torch.equal(beginning, expected[:4_800])


# --- Kaldi


def test_a_row_of_a_kaldi_folder_is_a_segment(tmp_path, wav):
    write(tmp_path / "train" / "wav.scp", f"a  {wav}", "b\t../audio/long.wav")
    write(tmp_path / "train" / "text", "utt-2 two  words ", "utt-3", "utt-1 héllo")
    write(
        tmp_path / "train" / "segments", "utt-1 a 0.5 1.25", "utt-2 b 2 3.05", "utt-3 b 0.00003 1", "utt-4 a 1.5 -1 1"
    )
    rows = rows_of(tmp_path / "train")
    assert [name_of(row) for row in rows] == ["utt-1", "utt-2", "utt-3", "utt-4"]
    assert [row.text or None for row in rows] == ["héllo", "two  words", None, None]
    assert [row.seconds for row in rows] == [0.75, pytest.approx(1.05), pytest.approx(0.99997), None]
    assert rows[0].part == Part(0.5, 1.25) and rows[3].part == Part(1.5, None, 1)
    slices = [(8_000, 20_000), (32_000, 48_000), (0, 16_000), (24_000, None, 1)]
    assert all(same_as_slice(row, sliced(wav, *where)) for row, where in zip(rows, slices, strict=True))


def test_a_row_of_a_kaldi_folder_without_segments_is_a_recording(tmp_path, wav, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "wav.scp", "a audio/long.wav", f"b  {wav} ")  # relative to the working directory
    rows = rows_of("data")
    assert [(name_of(row), row.audio, row.text, row.part) for row in rows] == [
        ("a", "audio/long.wav", None, None),
        ("b", str(wav), None, None),
    ]
    assert rows_of("data/wav.scp") == rows
    assert [name_of(row) for row in rows_of(".")] == ["a", "b"]
    write(tmp_path / "data" / "text.lower", "b says", "")
    assert [row.text for row in rows_of("data", text="text.lower")] == [None, "says"]
    assert same_as_slice(rows[0], sliced(wav, 0))


def test_nested_kaldi_folders_have_splits(tmp_path, wav):
    for name in ("train", "dev", "test_clean", "train/split4/1", "train/split4utt/1"):
        write(tmp_path / "data" / name / "wav.scp", f"{name} {wav}")
    assert [name_of(row) for row in rows_of(tmp_path / "data")] == ["train"]
    assert [name_of(row) for row in rows_of(tmp_path / "data", split="test_clean")] == ["test_clean"]
    assert [name_of(row) for row in rows_of(tmp_path)] == ["train"]  # the recordings below it are named by it


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("touch {} |", "holds a command, and commands are not run"),
        ("| touch {}", "holds a command, and commands are not run"),
        ("sph2pipe -f wav x.sph|", "holds a command, and commands are not run"),
        ("/x/raw.ark:1234", "names a place in an archive, and archives are not read"),
        ("", "has no path"),
    ],
)
@pytest.mark.parametrize("segments", [True, False])
def test_what_kaldi_makes_when_it_reads_is_refused(tmp_path, wav, value, said, segments):
    value = value.format(tmp_path / "made")
    write(tmp_path / "k" / "wav.scp", f"bad {value}")
    if segments:
        write(tmp_path / "k" / "segments", "bad bad 0 1")
    message = f"the line {f'bad {value}'.strip()!r} of wav.scp {said}"
    assert refused(tmp_path / "k") == f"{tmp_path / 'k' / 'wav.scp'}: {message}."
    write(tmp_path / "k" / "wav.scp", f"bad {value}", f"good {wav}")
    if segments:
        write(tmp_path / "k" / "segments", "bad bad 0 1", "good good 0 1")
    bad, good = rows_of(tmp_path / "k")
    assert (bad.key, bad.audio, bad.error) == (f"{tmp_path / 'k' / 'wav.scp'}:0 (bad)", None, message)
    assert good.error is None
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("utt", "must have an utterance, a recording, a start and an end"),
        ("utt a 0 1 0 x", "must have an utterance, a recording, a start and an end"),
        ("utt a x 1", "is wrong: its start 'x' is not a time in seconds"),
        ("utt a -1 1", "is wrong: its start '-1' is not a time in seconds"),
        ("utt a 0 inf", "is wrong: its end 'inf' is not a time in seconds"),
        ("utt a 0 -2", "is wrong: its end '-2' is not a time in seconds"),
        ("utt a 0 1 left", "is wrong: its end or channel is not a number"),
        ("utt a 2 1", "is wrong: it ends before it starts"),
        ("utt c 0 1", "names the recording 'c', which is not in wav.scp"),
    ],
)
def test_wrong_segments(tmp_path, wav, line, said):
    write(tmp_path / "k" / "wav.scp", f"a {wav}")
    write(tmp_path / "k" / "segments", line, "good a 0 1")
    bad, good = rows_of(tmp_path / "k")
    assert (name_of(bad), bad.error) == ("utt", f"the line {line!r} of segments {said}")
    assert good.error is None


def test_long_lines_are_quoted_in_part(tmp_path):
    write(tmp_path / "k" / "wav.scp", "bad " + "sox " * 1000 + "|")
    assert refused(tmp_path / "k").endswith(" sox sox ...' of wav.scp holds a command, and commands are not run.")


def test_a_segment_that_is_not_in_its_recording_is_its_own_error(tmp_path, wav):
    write(tmp_path / "k" / "wav.scp", f"a {wav}", "gone /no/such.wav")
    write(tmp_path / "k" / "segments", "late a 2 3.5", "good a 2 3.1", "lost gone 0 1")
    late, good, lost = rows_of(tmp_path / "k")
    with pytest.raises(AudioError, match=r"the part from 2 s to 3\.5 s is not in the recording, which is 3 s long"):
        decode_row(late, None, 0)
    assert same_as_slice(good, sliced(wav, 32_000))
    with pytest.raises(AudioError, match="there is no such file"):
        decode_row(lost, None, 0)


def test_names_with_equal_hashes_are_told_apart():
    class Word(bytes):
        def __hash__(self):
            return 1

    lines = lists._Lookup(b"a 1\nb 2\n\na 3\nc", lambda line: Word(line.split()[0]) if line.split() else None)
    assert [lines.find(Word(name)) for name in (b"a", b"b", b"c", b"d")] == [b"a 1", b"b 2", b"c", None]


# --- lhotse


def recording(path: Path | str, *, channels: tuple[int, ...] = (0, 1), kind: str = "file", **more) -> dict:
    source = {"type": kind, "channels": list(channels), "source": str(path)}
    return {"id": "rec", "sources": [source], "sampling_rate": RATE, "num_samples": 1, "duration": SECONDS, **more}


def cut(made_of: dict | None, start: float = 0, duration: float = 1.0, channel: Any = 0, **more) -> dict:
    values = {"id": "cut", "start": start, "duration": duration, "channel": channel, "type": "MonoCut"}
    return {**values, **({"recording": made_of} if made_of else {}), **more}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_row_of_lhotse_is_a_cut(tmp_path, wav, monkeypatch, ending, relative):
    monkeypatch.chdir(tmp_path)
    path = "audio/long.wav" if relative else wav
    spoken = [{"id": "s1", "start": -0.1, "text": "one"}, {"id": "s2", "text": None}, {"id": "s3", "text": "two"}]
    manifest = write(
        tmp_path / "manifests" / f"x_cuts_train.{ending}",
        cut(recording(path), 0.5, 0.75, supervisions=spoken, features={"type": "fbank"}),
        "",
        cut(recording(path, channels=(5, 3)), 2, 1.01, 3, id="other"),
        cut(recording(path), 0.00003, 1, [0, 1], id="both", type="MultiCut"),
        cut(recording("audio/first.wav", channels=(1,)), 0, 1, 1, id="mono"),
    )
    rows = rows_of(tmp_path / "manifests")
    assert rows == rows_of(manifest)
    assert [name_of(row) for row in rows] == ["cut", "other", "both", "mono"]
    assert [(row.text, row.seconds) for row in rows] == [("one two", 0.75), (None, 1.01), (None, 1), (None, 1)]
    slices = [(8_000, 20_000, 0), (32_000, 48_000, 1), (0, 16_000, None)]
    assert all(same_as_slice(row, sliced(wav, *where)) for row, where in zip(rows, slices, strict=False))
    assert rows[3].part == Part(0, 1, None)  # a file of one channel, whatever its number


def test_paths_of_lhotse_may_be_beside_the_manifest(tmp_path, wav):
    manifest = write(wav.parent / "cuts.jsonl", cut(recording("long.wav")))
    assert rows_of(manifest)[0].audio == str(wav)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_rows_of_recordings_are_their_supervisions(tmp_path, wav, monkeypatch, ending):
    monkeypatch.setattr(lists, "LIST_BLOCK", 2)
    names = ["a", "b", "c", "d", "e"]
    path = write(tmp_path / f"m_recordings_all.{ending}", *[recording(wav, id=name) for name in names])
    rows = rows_of(tmp_path, format="lhotse")
    assert rows == rows_of(path)
    assert [(name_of(row), row.text, row.seconds, row.part) for row in rows] == [(n, None, 3, None) for n in names]
    spoken = [("s0", "d", 0, 0), ("s1", "b", 1, [0, 1]), ("s2", "d", 2, 1)]
    write(
        tmp_path / "m_supervisions_all.jsonl.gz",
        *[
            {"id": name, "recording_id": of, "start": start, "duration": 0.5, "channel": channel, "text": f"t {name}"}
            for name, of, start, channel in spoken
        ],
    )
    data = opened(path)
    assert data.block_sizes.tolist() == [2, 1, 2, 1]
    rows = [row for _, row in data.read(range(6))]
    assert [name_of(row) for row in rows] == ["s0", "s1", "s2", "a", "c", "e"]
    assert [row.text for row in rows] == ["t s0", "t s1", "t s2", None, None, None]
    assert [row.part for row in rows] == [Part(0, 0.5, 0), Part(1, 1.5), Part(2, 2.5, 1), None, None, None]
    assert [row for number in range(6) for _, row in data.read([number])] == rows
    assert same_as_slice(rows[2], sliced(wav, 32_000, 40_000, 1)) and same_as_slice(rows[5], sliced(wav, 0))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            cut(recording("rm -rf x", kind="command")),
            "recording 'rec' has a source of type 'command', and only type 'file'",
        ),
        (cut(recording("https://x", kind="url")), "recording 'rec' has a source of type 'url', and only type 'file'"),
        (cut(recording("", kind="shar")), "has a source of type 'shar', and only type 'file' is read"),
        (cut(recording("x.wav", transforms=[{"name": "Speed"}])), "has transforms (Speed), which are not applied"),
        (cut(recording("x.wav"), channel=7), "recording 'rec' has channel 7 in 0 files, not in one"),
        (cut(recording("x.wav", channels=(0, 1, 2)), channel=[0, 2]), "only one or all of a file are read"),
        (cut(None, features={"type": "fbank"}), "the cut has no recording, and features are not read"),
        (cut(recording("x.wav"), type="PaddingCut"), "a PaddingCut is not read, only a cut of one recording is"),
        ({"id": "cut", "type": "MixedCut", "tracks": []}, "a MixedCut is not read, only a cut of one recording is"),
        (cut(recording("x.wav"), start=-1), "start -1 is not a time in seconds"),
        (cut(recording("x.wav"), duration=None), "duration None is not a time in seconds"),
        ({"id": "cut"}, "the line is neither a cut nor a recording, nor a supervision of a recording"),
        ({"id": "cut", "sources": []}, "recording 'cut' has its channels in 0 files, not in one"),
        ({**recording("x.wav"), "id": "cut", "sources": [{}, {}]}, "this is not a valid lhotse line (KeyError: "),
        ({"id": "cut", "sources": recording("x.wav")["sources"] * 2}, "has its channels in 2 files, not in one"),
        (cut({"id": "rec", "sources": 3}), "this is not a valid lhotse line (TypeError"),
    ],
)
def test_what_lhotse_makes_when_it_reads_is_refused(tmp_path, wav, line, said):
    path = write(tmp_path / "cuts.jsonl", line)
    message = refused(path)
    assert message.startswith(f"{path}: ") and said in message and "\n" not in message
    write(path, cut(recording(wav)), line, "{", "[]")
    good, bad, cut_off, other = rows_of(path)
    assert good.error is None and said in bad.error and name_of(bad) == "cut"
    assert (cut_off.error, other.error) == ("the line is not JSON", "the line is not a JSON object")


def test_a_supervision_without_its_recording(tmp_path, wav):
    write(tmp_path / "recordings.jsonl", recording(wav))
    spoken = {"start": 0, "duration": 1, "channel": 0}
    write(
        tmp_path / "supervisions.jsonl",
        {"id": "a", "recording_id": "other", **spoken},
        {"id": "b", "recording_id": "rec", **spoken},
    )
    a, b = rows_of(tmp_path, format="lhotse")
    assert a.error == "there is no recording 'other' for this supervision" and b.error is None
    assert "these are supervisions; give the file of recordings beside it, or the folder" in refused(
        tmp_path / "supervisions.jsonl"
    )


def test_cuts_are_taken_before_the_recordings_that_they_are_made_of(tmp_path, wav):
    write(tmp_path / "audio" / "cuts_train.jsonl.gz", cut(recording(wav)))
    write(tmp_path / "audio" / "cuts_dev.jsonl.gz", cut(recording(wav), id="held-out"))
    for name in ("recordings_train.jsonl.gz", "supervisions_train.jsonl.gz"):
        write(tmp_path / "audio" / name, {})
    assert [name_of(row) for row in rows_of(tmp_path)] == ["cut"]
    assert [name_of(row) for row in rows_of(tmp_path, split="dev")] == ["held-out"]
    mine = write(tmp_path / "any_name.jsonl.gz", cut(recording(wav)))
    assert [name_of(row) for row in rows_of(mine, format="lhotse")] == ["cut"]


def test_a_packed_manifest_is_unpacked_once(tmp_path, wav, monkeypatch):
    monkeypatch.setattr(lists, "LIST_BLOCK", 4)
    path = write(tmp_path / "cuts.jsonl.gz", *[cut(recording(wav), id=f"c{i}") for i in range(50)])
    data = opened(path)
    count = 0
    unpack = gzip.GzipFile

    def counting(**arguments):
        nonlocal count
        count += 1
        return unpack(**arguments)

    monkeypatch.setattr(gzip, "GzipFile", counting)
    assert [name_of(row) for number in range(50) for _, row in data.read([number])] == [f"c{i}" for i in range(50)]
    assert count == 1
    monkeypatch.setattr(lists, "KEPT_BYTES", 0)  # the latest is kept however large it is
    assert len(list(data.read(range(50)))) == 50
    assert count == 1


def test_packed_manifests_that_are_too_large_or_damaged(tmp_path, wav, monkeypatch):
    path = write(tmp_path / "cuts.jsonl.gz", *[cut(recording(wav))] * 100)
    size = len(gzip.decompress(path.read_bytes()))
    monkeypatch.setattr(lists, "UNPACKED_BYTES", size)
    assert len(rows_of(path)) == 100
    monkeypatch.setattr(lists, "UNPACKED_BYTES", size - 1)
    assert refused(path) == f"{path}: the file has more than {size - 1:,} bytes when unpacked; unpack it."
    path.write_bytes(path.read_bytes()[:-30])
    assert refused(path).startswith(f"{path}: ")
    path.write_bytes(b"no gzip at all")
    assert refused(path).startswith(f"{path}: Not a gzipped file")


# --- the hub


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "MP3"])
def test_parts_of_recordings_on_the_hub_are_read_where_they_are_cut(tmp_path, monkeypatch, file_format):
    samples = 0.3 * np.random.default_rng(0).standard_normal(60 * RATE).clip(-1, 1)
    path = tmp_path / f"long.{file_format.lower()}"
    soundfile.write(path, samples, RATE, format=file_format)
    read = 0

    def opened(name):
        nonlocal read
        file = (tmp_path / name.removeprefix("hf://datasets/owner/name/")).open("rb")
        whole = file.read

        class Counting:
            def __getattr__(self, attribute):
                return getattr(file, attribute)

            def read(self, size):
                nonlocal read
                read += len(data := whole(size))
                return data

        return Counting()

    monkeypatch.setattr(files, "open_file", opened)
    row = Row("key", f"hf://datasets/owner/name/{path.name}", None, None, None, Part(40.0, 41.5))
    assert same_as_slice(row, sliced(path, 40 * RATE, round(41.5 * RATE)))
    assert file_format == "MP3" or 0 < read < path.stat().st_size / 4  # both reads of the part together


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (lambda: OSError(5, "Input/output error"), "its audio: Input/output error."),
        (lambda: FileNotFoundError(2, "x"), "its audio: there is no such file."),
        (lambda: RuntimeError("a bug"), "its audio: a bug."),
    ],
)
def test_a_recording_on_the_hub_that_cannot_be_read(tmp_path, monkeypatch, failure, said):
    tries = 0

    def opened(name):
        nonlocal tries
        tries += 1
        raise failure()

    monkeypatch.setattr(files, "open_file", opened)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    row = Row("key", "hf://datasets/owner/name/long.wav", None, None, None, Part(1.0, 2.0))
    with pytest.raises(UnreadError) as error:
        decode_row(row, None, 2)
    assert str(error.value) == said
    assert tries == (3 if "Input" in said else 1)


# --- NeMo


@pytest.mark.parametrize("name", ["manifest.json", "manifest.jsonl", "manifest.csv"])
def test_offset_and_duration_cut_a_row_of_nemo(tmp_path, wav, name):
    records = [
        {"audio_filepath": "audio/long.wav", "offset": 0.5, "duration": 0.75, "text": "one"},
        {"audio_filepath": str(wav), "offset": 1.5, "duration": None, "text": "two"},
        {"audio_filepath": str(wav), "offset": 0, "duration": 1.25, "text": "three"},
        {"audio_filepath": str(wav), "offset": None, "duration": 2.5, "text": "four"},
    ]
    if name.endswith("csv"):
        lines = [",".join("" if value is None else str(value) for value in record.values()) for record in records]
        path = write(tmp_path / name, ",".join(records[0]), *lines)
    else:
        path = write(tmp_path / name, *records)
    rows = rows_of(path)
    assert [row.text for row in rows] == ["one", "two", "three", "four"]
    assert [row.seconds for row in rows] == [0.75, None, 1.25, 2.5]
    assert rows[3].part is None  # the stated length of the whole file
    slices = [(8_000, 20_000), (24_000, None), (0, 20_000), (0, None)]
    assert all(same_as_slice(row, sliced(wav, *where)) for row, where in zip(rows, slices, strict=True))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"offset": "x"}, "offset 'x' is not a time in seconds"),
        ({"offset": -0.5}, "offset -0.5 is not a time in seconds"),
        ({"offset": [1]}, "offset [1] is not a time in seconds"),
        ({"offset": 1, "duration": 0}, "duration 0 is not a valid length"),
        ({"offset": 1, "duration": "long"}, "duration 'long' is not a valid length"),
    ],
)
def test_wrong_offsets(tmp_path, wav, values, said):
    path = write(tmp_path / "manifest.json", {"audio_filepath": str(wav)}, {"audio_filepath": str(wav), **values})
    assert [row.error for row in rows_of(path)] == [None, said]


def test_a_manifest_of_which_nothing_can_be_used(tmp_path):
    path = write(tmp_path / "manifest.json", {"sound": "a.wav"}, {"sound": "b.wav"})
    assert refused(path).startswith(f"{path}: there is no key audio or path or audio_filepath")
