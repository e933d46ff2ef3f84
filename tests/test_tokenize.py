"""Offline tokenization: the codec's own codes, and the same bytes however it runs and wherever it is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import torchtitan.datasets.shards as shards_module
from torchtitan.audio.codec import Codec, CodecError
from torchtitan.audio.waveform import load_audio, resample
from torchtitan.datasets import encoding
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.shards import ShardedCodes, ShardError, find_shards
from torchtitan.tokenization import processes as many
from torchtitan.tokenization import spec as specs
from torchtitan.tokenization import worker as work
from torchtitan.tokenization.run import tokenize
from torchtitan.tokenization.spec import Counts, Options
from torchtitan.tools.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ROWS_PER_SHARD = 7
BAD = {3: "neither audio bytes nor a path", 9: "not a readable audio file", 10: "the file is empty"}
NUM_ROWS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_sound, write_rows) -> Path:
    """24 rows in two files, some of which cannot be used, and a file that is none; below a folder `talks`."""
    folder = tmp_path_factory.mktemp("data") / "talks"
    rows = []
    for i in range(NUM_ROWS):
        sound = make_sound(i, 0.2 + 0.05 * (i % 5), (24_000, 16_000, 8_000)[i % 3])
        broken = {3: {"bytes": None, "path": None}, 9: b"no audio at all", 10: b""}
        rows.append((f"clip-{i}", broken.get(i, sound), f"text {i}" if i % 4 else None))
    write_rows(folder / "train-00000-of-00002.parquet", rows[:15])
    write_rows(folder / "train-00001-of-00002.parquet", rows[15:])
    (folder / "train-00002-of-00002.parquet").write_bytes(b"PAR1 no parquet")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(specs, "PART_ROWS", 3)
    monkeypatch.setattr(many, "tune_malloc", lambda: None)  # this is the process of all tests
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def options(data, mimi_folder) -> Options:
    """All options but the output."""
    return Options(
        dataset=str(data),
        output="",
        audio_tokenizer=str(mimi_folder),
        num_quantizers=8,
        num_processes=1,
        device="cpu",
        rows_per_shard=ROWS_PER_SHARD,
    )


@pytest.fixture(scope="module")
def reference(options, tmp_path_factory) -> dict[str, bytes]:
    """Files of an undisturbed run of one process."""
    output = tmp_path_factory.mktemp("reference") / "codes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs, "PART_ROWS", 3)
        patch.setattr(many, "tune_malloc", lambda: None)
        tokenize(replace(options, output=str(output)))
    return files_of(output)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_in(folder: Path) -> list[str]:
    """Names of the files below a folder that others are changing."""
    return [name for _, _, names in os.walk(folder) for name in names]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return folder


def run_in_fork(work) -> int:
    """Start a process that calls `work`; its exit code is 0, or 2 after a UserError, whose message it prints."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        work()
        code = 0
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        code = 2
    finally:
        os._exit(code)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def status_of(process: int) -> int:
    """The status that a process ends with; it is killed if it does not end."""
    ended: list[int] = []
    try:
        wait_for(lambda: ended.extend(os.waitpid(process, os.WNOHANG)) or ended[-2] == process)
    except AssertionError:
        os.kill(process, signal.SIGKILL)
        raise
    return ended[-1]


def children_of(process: int) -> list[int]:
    """Worker processes that `process` started."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


# --- what comes out


def test_codes_are_those_of_the_codec_alone(reference, options, data, mimi_folder, tmp_path):
    import pyarrow.parquet as pq

    codes = ShardedCodes(find_shards(write_files(tmp_path / "codes", reference)))
    codes.verify()
    codec = Codec.load(mimi_folder, 8)
    tables = [pq.read_table(data / f"train-0000{i}-of-00002.parquet").to_pylist() for i in range(2)]
    good = [
        (f"train-0000{number}-of-00002.parquet:{i} ({row['id']})", row)
        for number, rows in enumerate(tables)
        for i, row in enumerate(rows)
        if int(row["id"].split("-")[1]) not in BAD
    ]
    assert len(codes) == len(good) == NUM_ROWS - len(BAD)
    for i, (key, row) in enumerate(good):
        waveform = load_audio(row["audio"]["bytes"])
        (expected,) = codec.encode([waveform])
        np.testing.assert_array_equal(codes.codes(i), expected.T.numpy())
        assert codes.key(i) == key
        assert codes.text(i) == row["text"]
        assert codes.seconds[i] == waveform.numel() / 24_000
    codes.check_codec(str(mimi_folder), 4, "exact", "codec")
    assert codes.name == "talks"
    assert codes.header["codec_fingerprint"] == codec.fingerprint()
    assert "path" not in codes.header["source"]


def test_parts_of_recordings_are_the_codes_of_their_slices(options, tmp_path, make_sound, mimi_folder):
    import soundfile

    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "long.flac").write_bytes(make_sound(0, 3.0, 16_000))
    (folder / "wav.scp").write_text("rec long.flac\npiped sox x |\n")
    (folder / "segments").write_text("a rec 0.1 0.5\nlate rec 2.5 3.5\nb rec 0.5 2.1\nc piped 0 1\n")
    (folder / "text").write_text("b bee\n")
    told = tokenize(replace(options, dataset=str(folder), output=str(tmp_path / "codes"), max_bad_share=0.6))
    assert "hold 2 recordings" in told
    codes = ShardedCodes(find_shards(tmp_path / "codes"))
    samples, rate = soundfile.read(folder / "long.flac", dtype="float32")
    for i, (start, stop) in enumerate(((0.1, 0.5), (0.5, 2.1))):
        waveform = resample(torch.from_numpy(samples[round(start * rate) : round(stop * rate)]), rate)
        (expected,) = Codec.load(mimi_folder, 8).encode([waveform])
        np.testing.assert_array_equal(codes.codes(i), expected.T.numpy())
        assert codes.seconds[i] == pytest.approx(stop - start)
    assert [(codes.key(i), codes.text(i)) for i in range(2)] == [("wav.scp:0 (a)", None), ("wav.scp:2 (b)", "bee")]
    failed = (tmp_path / "codes" / "bad_rows.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in failed] == ["wav.scp:1 (late)", "wav.scp:3 (c)"]
    assert "is not in the recording" in failed[0] and "commands are not run" in failed[1]


def test_failing_rows_and_files_are_listed(reference, tmp_path):
    codes = ShardedCodes(find_shards(write_files(tmp_path / "codes", reference)))
    lines = [line.split("\t") for line in reference["bad_rows.tsv"].decode().splitlines()]
    assert [key for key, _ in lines] == [
        "train-00000-of-00002.parquet:10 (clip-10)",
        "train-00000-of-00002.parquet:3 (clip-3)",
        "train-00000-of-00002.parquet:9 (clip-9)",
        "train-00002-of-00002.parquet",
    ]
    for (key, reason), row in zip(lines, (10, 3, 9), strict=False):
        assert BAD[row] in reason and "AudioError" not in reason
        assert (key, reason) in codes.bad_rows
    totals = json.loads(reference["tokenization.json"])["totals"]
    assert totals == {
        "recordings": NUM_ROWS - 3,
        "hours": pytest.approx(codes.seconds.sum() / 3600),
        "frames": codes.frames.sum(),
        "failed": 3,
        "left_out": 0,
        "bad_files": 1,
    }


def test_nothing_else_is_left(reference):
    shards = [f"codes-0000{i}-of-00004.arrow" for i in range(4)]
    assert sorted(reference) == ["bad_rows.tsv", *shards, "tokenization.json"]
    for contents in reference.values():
        assert b"/talks" not in contents  # a copy of the data elsewhere gives the same


def test_copy_of_the_data_gives_the_same_bytes(reference, options, data, tmp_path):
    copy = write_files(tmp_path / "elsewhere" / "talks", files_of(data))
    told = tokenize(replace(options, dataset=str(copy), output=str(tmp_path / "codes")))
    assert files_of(tmp_path / "codes") == reference
    assert "4 shards hold 21 recordings" in told
    assert "3 rows and 1 files could not be used and are listed in bad_rows.tsv" in told


def test_ranks_of_torchrun_give_the_same_bytes(reference, options, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        told = tokenize(replace(options, output=str(tmp_path / "codes"), num_processes=None))
        done = {int(name[6:11]) for name in files_of(tmp_path / "codes") if name.startswith("codes-")}
        assert done == {0: {0, 2, 3}, 1: {0, 1, 2, 3}, 2: {2}}[rank]
        assert ("other ranks are not" in told) == (rank != 1)
    assert files_of(tmp_path / "codes") == reference


def test_ranks_are_the_processes(options, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="num_processes is only for runs without torchrun"):
        tokenize(replace(options, output=str(tmp_path), num_processes=2))


def test_finished_output_says_so(reference, options, tmp_path):
    output = write_files(tmp_path / "codes", reference)
    assert tokenize(replace(options, output=str(output))).startswith("everything was already done")
    assert files_of(output) == reference


def test_max_seconds_cuts_and_tells_the_whole_duration(options, reference, tmp_path):
    tokenize(replace(options, output=str(tmp_path / "cut"), max_seconds=0.25))
    cut = ShardedCodes(find_shards(tmp_path / "cut"))
    whole = ShardedCodes(find_shards(write_files(tmp_path / "whole", reference)))
    assert cut.header["max_seconds"] == 0.25
    assert cut.frames.max() == 4
    np.testing.assert_allclose(cut.seconds, whole.seconds)
    np.testing.assert_array_equal(cut.codes(4, 0, 3), whole.codes(4, 0, 3))


def test_limits_of_a_source_leave_rows_out(options, data, tmp_path):
    table = f'[[training.source]]\nname = "short"\npath = "{data}"\nmin_seconds = 0.22\nmax_seconds = 0.37\n'
    (tmp_path / "settings.toml").write_text(table)
    chosen = replace(options, dataset="short", source_file=str(tmp_path / "settings.toml"), output=str(tmp_path / "c"))
    told = tokenize(chosen)
    codes = ShardedCodes(find_shards(tmp_path / "c"))
    assert codes.name == "short"
    assert set(np.round(codes.seconds, 2)) == {0.25, 0.3, 0.35}
    left_out = NUM_ROWS - len(codes) - len(BAD)
    assert left_out > 0
    assert f"{left_out} rows are shorter or longer than the source's limits" in told
    with pytest.raises(UserError, match=r"dataset 'other' must be one of its sources \(short\)\."):
        tokenize(replace(chosen, dataset="other"))


def test_recording_that_the_codec_refuses_is_listed(options, tmp_path, monkeypatch):
    encode = Codec.encode

    def picky(self, waveforms):
        if any(waveform.numel() == round(0.3 * 24_000) for waveform in waveforms):
            raise CodecError("this clip is too odd.")
        return encode(self, waveforms)

    monkeypatch.setattr(Codec, "encode", picky)
    tokenize(replace(options, output=str(tmp_path / "codes"), max_bad_share=0.5))
    failed = dict(ShardedCodes(find_shards(tmp_path / "codes")).bad_rows)
    assert failed["train-00000-of-00002.parquet:2 (clip-2)"] == "its audio cannot be encoded (this clip is too odd)."
    assert len(failed) == len(BAD) + len([i for i in range(NUM_ROWS) if i % 5 == 2 and i not in BAD])


def test_groups_of_a_gpu_do_not_depend_on_where_a_run_began(options, tmp_path, monkeypatch):
    """What is encoded together is a function of the rows' places, as codes may depend on it there."""
    seen = []
    monkeypatch.setitem(encoding.GROUP_SECONDS, "cpu", 0.3)
    monkeypatch.setattr(
        Codec,
        "encode",
        lambda self, waves: [seen.append([w.numel() for w in waves])] and [torch.zeros(8, 1).long()] * len(waves),
    )
    spec = specs.prepare(replace(options, output=str(tmp_path / "codes")))
    worker = work.ShardTokenizer(spec, torch.device("cpu"), 1, lambda kind, counts: None)
    worker.make_parts(1, [0, 1, 2])
    together, seen[:] = list(seen), []
    for part in range(3):
        spec.part_path(1, part).unlink()
        worker.make_parts(1, [part])
    assert together == seen
    assert max(map(len, seen)) > 1
    assert all(sum(group[:-1]) < 0.3 * 24_000 for group in seen)


# --- killed and continued


def test_killed_at_every_write_it_continues_to_the_same_bytes(reference, options, tmp_path):
    """One process is killed before or after its second rename, again and again, until all is done."""
    chosen = replace(options, output=str(tmp_path / "codes"))
    kills = 0

    def work():
        renames = 0
        rename = os.replace

        def deadly(source, target):
            nonlocal renames
            renames += 1
            if renames == 2 and kills % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if renames == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        shards_module.os.replace = deadly
        tokenize(chosen)

    while True:
        status = status_of(run_in_fork(work))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
        assert kills < 60
    assert kills > 10
    assert files_of(tmp_path / "codes") == reference


def test_killed_at_random_moments_two_processes_continue_to_the_same_bytes(reference, options, tmp_path):
    output = tmp_path / "codes"
    chosen = replace(options, output=str(output))
    for number in range(3):
        process = run_in_fork(lambda: tokenize(chosen))
        wait_for(lambda number=number: len(names_in(output)) > number)
        time.sleep(random.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert files_of(output) != reference
    tokenize(replace(chosen, num_processes=2))
    assert files_of(output) == reference


@pytest.mark.slow
def test_two_processes_killed_at_a_random_moment_one_continues_to_the_same_bytes(reference, options, tmp_path):
    output = tmp_path / "codes"
    process = run_in_fork(lambda: tokenize(replace(options, output=str(output), num_processes=2)))
    wait_for(lambda: has_parts(output))
    workers = children_of(process)
    time.sleep(random.uniform(0, 0.1))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    wait_for(lambda: not any(Path(f"/proc/{worker}/exe").exists() for worker in workers), 5)
    tokenize(replace(options, output=str(output)))
    assert files_of(output) == reference


def has_parts(output: Path) -> bool:
    return any(name.startswith("part-") for name in names_in(output))


@pytest.fixture
def long_options(options, make_sound, write_rows, tmp_path) -> Options:
    """Work that takes a while, to be caught at it."""
    sound = make_sound(0, 10.0, 8_000)
    write_rows(tmp_path / "long" / "train.parquet", [(f"{i}", sound, None) for i in range(32)])
    return replace(options, dataset=str(tmp_path / "long"), output=str(tmp_path / "codes"))


def test_dead_worker_is_reported_and_the_others_end(long_options, capfd):
    process = run_in_fork(lambda: tokenize(replace(long_options, num_processes=2)))
    output = Path(long_options.output)
    wait_for(lambda: has_parts(output))
    workers = children_of(process)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert os.waitstatus_to_exitcode(status_of(process)) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    told = capfd.readouterr().err
    assert f"(pid {workers[1]}) was ended by SIGKILL, perhaps because memory ran out, " in told
    assert "at codes-0000" in told or "before its first shard" in told  # the other worker may have been faster
    assert "run the same command again to continue" in told
    assert has_parts(output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_run_cleanly(long_options, number, capfd):
    process = run_in_fork(lambda: tokenize(long_options))
    output = Path(long_options.output)
    wait_for(lambda: has_parts(output))
    os.kill(process, number)
    assert status_of(process) != 0
    told = capfd.readouterr().err
    assert "stopped; nothing finished is lost: run the same command again to continue." in told
    assert not [name for name in files_of(output) if name.endswith(".tmp")]


def test_leftovers_of_killed_processes_are_removed(reference, options, tmp_path):
    output = write_files(tmp_path / "codes", reference)
    (output / "codes-00001-of-00004.partial").mkdir()
    (output / "codes-00001-of-00004.partial" / "part-0000").touch()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = specs.socket.gethostname()
    (output / f".codes-00001-of-00004.arrow.{host}-{dead.pid}.tmp").touch()
    living = f".codes-00002-of-00004.arrow.{host}-{os.getpid()}.tmp"
    (output / living).touch()
    tokenize(replace(options, output=str(output)))
    assert set(files_of(output)) == {*reference, living}


def test_text_that_is_no_unicode_is_stored(options, make_sound, tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    (folder / "good.wav").write_bytes(make_sound(1, 0.2, file_format="WAV"))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "good.wav", "text": "half \ud83d"}) + "\n")
    tokenize(replace(options, dataset=str(folder), output=str(tmp_path / "codes")))
    assert ShardedCodes(find_shards(tmp_path / "codes")).text(0) == "half ?"


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_part_is_made_again(reference, options, tmp_path, processes):
    spec = specs.prepare(replace(options, output=str(tmp_path / "codes")))
    spec.partial_folder(0).mkdir()
    spec.part_path(0, 1).write_bytes(b"ARROW1 and no more")
    if processes == 2:  # as its parent shares out the work
        specs.survey(spec, [0])
        assert many._Jobs(spec, [0], 1).next() == (0, [0])
        assert not spec.part_path(0, 1).exists()
    tokenize(replace(options, output=str(tmp_path / "codes")))
    assert files_of(tmp_path / "codes") == reference


def test_damaged_shard_is_named(reference, options, tmp_path):
    output = write_files(tmp_path / "codes", reference)
    damaged = output / "codes-00002-of-00004.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"{damaged}: the shard is damaged or cut off .*; remove it and run the same"):
        tokenize(replace(options, output=str(output)))
    damaged.unlink()
    tokenize(replace(options, output=str(output)))
    assert files_of(output) == reference


def test_unfinished_output_is_no_data_set(reference, tmp_path):
    output = write_files(tmp_path / "codes", {k: v for k, v in reference.items() if "00003" not in k})
    with pytest.raises(ShardError, match=r"1 of the 4 shards are missing \(codes-00003-of-00004.arrow\)"):
        ShardedCodes(find_shards(output))


# --- refusals


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_quantizers": 4}, "num_quantizers is 8 there and 4 now"),
        ({"codec_padding": "aligned"}, 'codec_padding is "exact" there and "aligned" now'),
        ({"codec_window": "full"}, 'codec_window is "codec" there and "full" now'),
        ({"resampler": "soxr_hq"}, 'resampler is "torchaudio" there and "soxr_hq" now'),
        ({"max_seconds": 5.0}, "max_seconds is null there and 5.0 now"),
        ({"rows_per_shard": 8, "codec_window": "full"}, "now, and rows_per_shard is 7 there and 8 now"),
    ],
)
def test_changed_settings_are_refused(reference, options, tmp_path, changes, told):
    output = write_files(tmp_path / "codes", reference)
    with pytest.raises(
        UserError, match=rf"{output}: the folder has a tokenization with other settings: .*{told}; give anoth"
    ):
        tokenize(replace(options, output=str(output), **changes))
    assert files_of(output) == reference


def test_changed_data_are_refused(reference, options, data, tmp_path):
    copy = write_files(tmp_path / "talks", files_of(data))
    (copy / "train-00001-of-00002.parquet").unlink()
    output = write_files(tmp_path / "codes", reference)
    with pytest.raises(UserError, match="other settings: the data differ"):
        tokenize(replace(options, dataset=str(copy), output=str(output)))


def test_changed_codec_is_refused_and_a_copy_of_it_is_not(reference, options, mimi_folder, tmp_path):
    from transformers import MimiModel

    output = write_files(tmp_path / "codes", reference)
    (output / "codes-00003-of-00004.arrow").unlink()
    model = MimiModel.from_pretrained(mimi_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "copy")
    model.quantizer.acoustic_residual_vector_quantizer.layers[2].codebook.embed_sum[7] += 1
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(UserError, match=f"the codec {tmp_path}/changed has other weights than {mimi_folder}"):
        tokenize(replace(options, audio_tokenizer=str(tmp_path / "changed"), output=str(output)))
    tokenize(replace(options, audio_tokenizer=str(tmp_path / "copy"), output=str(output)))
    assert files_of(output) == reference


def test_foreign_shards_are_not_mixed_with(reference, options, tmp_path):
    output = write_files(tmp_path / "codes", {k: v for k, v in reference.items() if k != "tokenization.json"})
    with pytest.raises(UserError, match=r"codes-00000-of-00004\.arrow is there without tokenization\.json"):
        tokenize(replace(options, output=str(output)))


def test_damaged_settings_are_named(reference, options, tmp_path):
    output = write_files(tmp_path / "codes", {**reference, "tokenization.json": b"{"})
    with pytest.raises(UserError, match=r"tokenization\.json: the file is damaged"):
        tokenize(replace(options, output=str(output)))


def test_folder_that_cannot_be_written_is_named(options, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file/codes: this folder cannot be written to"):
        tokenize(replace(options, output=str(tmp_path / "file" / "codes")))


def test_full_disk_loses_nothing(reference, options, tmp_path, monkeypatch):
    output = tmp_path / "codes"
    opened = 0
    open_for_writing = shards_module.open_for_writing

    class FullDisk:
        closed = False

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(bytes(data)[:7])
            raise OSError(28, "No space left on device")

        flush = close = lambda self: None

    def limited(path):
        nonlocal opened
        opened += 1
        return open_for_writing(path) if opened < 7 else FullDisk(open_for_writing(path))

    monkeypatch.setattr(shards_module, "open_for_writing", limited)
    told = (
        rf"{output}.*: .* cannot be written there \(No space left on device\); nothing finished is lost: run the same"
    )
    with pytest.raises(UserError, match=told):
        tokenize(replace(options, output=str(output)))
    kept = files_of(output)
    assert len(kept) == 1 + 1 + 1  # settings, a shard, a part of the next
    assert kept["codes-00000-of-00004.arrow"] == reference["codes-00000-of-00004.arrow"]
    monkeypatch.undo()
    monkeypatch.setattr(specs, "PART_ROWS", 3)
    tokenize(replace(options, output=str(output)))
    assert files_of(output) == reference


def test_too_many_failing_rows_stop_the_run(options, tmp_path, monkeypatch):
    monkeypatch.setattr(many, "MIN_JUDGED", 10)
    output = tmp_path / "codes"
    chosen = replace(options, output=str(output), max_bad_share=0.1)
    told = rf"2 of 10 recordings could not be used, more than the share of 0.1 .*; {output}/bad_rows\.tsv"
    with pytest.raises(UserError, match=told):
        tokenize(chosen)
    assert (output / "bad_rows.tsv").read_text().count("(clip-") == 2
    assert not (output / "codes-00002-of-00004.arrow").exists()
    tokenize(replace(chosen, max_bad_share=0.3))
    assert (output / "codes-00003-of-00004.arrow").exists()


def test_too_many_failing_rows_of_a_small_data_set_are_told_at_the_end(options, tmp_path):
    chosen = replace(options, output=str(tmp_path / "codes"), max_bad_share=0.1)
    with pytest.raises(UserError, match="3 of 24 recordings could not be used"):
        tokenize(chosen)
    with pytest.raises(UserError, match="3 of 24 recordings could not be used"):
        tokenize(chosen)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows_per_shard": 0}, "rows_per_shard must be at least 1, not 0"),
        ({"num_processes": 0}, "num_processes must be at least 1, not 0"),
        ({"max_bad_share": 1.5}, "max_bad_share must be a share, 0 to 1, not 1.5"),
        ({"max_seconds": 0.0}, "max_seconds must be more than 0, not 0.0"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"device": "tpu9"}, "device must be auto, cpu, cuda"),
        ({"num_quantizers": 9}, "9 quantizers were asked of a codec that has 8"),
        ({"dataset": "./nowhere"}, "./nowhere: there is no such data set folder"),
        ({"dataset_path": "x"}, "dataset_path is for built-in data sets; give x as the dataset"),
    ],
)
def test_impossible_options_are_refused(options, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        tokenize(replace(options, output=str(tmp_path / "codes"), **changes))
    assert not (tmp_path / "codes").exists()


def test_built_in_data_sets_are_read_from_a_folder(options, speech_folder, tmp_path):
    chosen = replace(options, dataset="peoples_speech", dataset_path=str(speech_folder / "peoples_speech"))
    tokenize(replace(chosen, output=str(tmp_path / "codes"), num_quantizers=2))
    codes = ShardedCodes(find_shards(tmp_path / "codes"))
    assert (codes.name, len(codes), codes.codes(0).shape[1]) == ("peoples_speech", 11, 2)


def test_command_line(options, reference, tmp_path):
    """The script itself: options by name, the summary on stdout, errors in a line and exit code 2."""
    output = write_files(tmp_path / "codes", reference)
    command = [sys.executable, ROOT / "scripts" / "tokenize_dataset.py", "--dataset", options.dataset]
    command += ["--output", output, "--audio_tokenizer", options.audio_tokenizer, "--num_quantizers", "4"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {output}: the folder has a tokenization with other settings"
    )


# --- parts


def test_progress_counts_resumed_work_once(options, tmp_path, capsys, monkeypatch):
    spec = specs.prepare(replace(options, output=str(tmp_path / "codes")))
    monkeypatch.setattr(many, "_LOG_SECONDS", 0.0)
    progress = many.Progress(spec, Counts(rows=12, seconds=3600.0, bad=1), 24)
    progress.report("rows", Counts(rows=3, seconds=1800.0, bad=1))
    progress.report("part", Counts(rows=3, seconds=1800.0, bad=1))
    told = capsys.readouterr().err
    assert "talks: 15 of 24 rows (62.5 %), 1.50 h of audio, " in told
    assert "2 bad, 0:00:00 left" in told


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("/data/talks", "/data/talks/a/b.flac:3 (x)", "a/b.flac:3 (x)"),
        ("/data/talks", "cannot read '/data/talks/a.flac'", "cannot read 'a.flac'"),
        ("/data/talks", "/more/data/talks/a.flac", "/more/data/talks/a.flac"),
        ("talks", "talks/a.flac", "a.flac"),
        ("me/talks", "hf://datasets/me/talks/a.parquet:1", "a.parquet:1"),
        ("me/talks", "hf://datasets/me/talks@refs%2Fpr%2F1/a.parquet:1", "a.parquet:1"),
    ],
)
def test_names_are_relative_to_the_data(path, text, expected):
    assert work.relative(text, Source("talks", path)) == expected
