"""Shards of codes: what is written is read back, and what cannot be right is refused by name."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import torchtitan.datasets.shards as shards_module
from torchtitan.audio.codec import CodecError
from torchtitan.datasets.shards import (
    HEADER_KEY,
    Recording,
    ShardedCodes,
    ShardError,
    WriteError,
    find_shards,
    merge_parts,
    shard_name,
    write_part,
)

Q = 8
# Numbers of recordings of the parts of three shards; one part and one shard are empty.
PARTS = [[3, 0, 2], [4], [0]]


def make_recordings() -> list[list[list[Recording]]]:
    random = np.random.default_rng(0)
    number = 0
    made = []
    for sizes in PARTS:
        made.append([])
        for size in sizes:
            made[-1].append([])
            for _ in range(size):
                codes = random.integers(0, 2048, (1 + 7 * number, Q)).astype(np.uint16)
                text = f"täxt {number}" if number % 3 else None
                made[-1][-1].append(Recording(f"file:{number}", codes, 0.08 * len(codes), text, "talks"))
                number += 1
    return made


def header_of(shard: int, **changes) -> dict:
    header = {
        "format": 1,
        "audio_tokenizer": "kyutai/mimi",
        "codec_fingerprint": "0" * 64,
        "codec_padding": "exact",
        "codec_window": "codec",
        "num_quantizers": Q,
        "source": {"name": "talks"},
        "shard": shard,
        "of": len(PARTS),
        "rows": [10 * shard, 10 * shard + 10],
        "versions": {"torch": f"2.{shard}"},
    }
    return {**header, **changes}


def write_set(folder: Path, made: list[list[list[Recording]]] | None = None, **changes) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, parts in enumerate(made or make_recordings()):
        paths = []
        for number, recordings in enumerate(parts):
            paths.append(folder / f"part-{shard}-{number}")
            failed = [[f"bad:{shard}:{number}", "no audio"]]
            write_part(paths[-1], recordings, {"failed": failed, "left_out": 1})
        merge_parts(paths, folder / shard_name(shard, len(PARTS)), header_of(shard, **changes))
        for path in paths:
            path.unlink()
    return find_shards(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with a set of shards, not to be changed."""
    folder = tmp_path_factory.mktemp("shards")
    write_set(folder)
    return folder


@pytest.fixture
def copied(written, tmp_path) -> list[str]:
    """Paths of a copy of the set."""
    shutil.copytree(written, tmp_path / "copy")
    return find_shards(tmp_path / "copy")


EXPECTED = [recording for parts in make_recordings() for part in parts for recording in part]


def assert_holds_what_was_written(codes: ShardedCodes) -> None:
    assert len(codes) == len(EXPECTED)
    for i, expected in enumerate(EXPECTED):
        np.testing.assert_array_equal(codes.codes(i), expected.codes)
        assert codes.codes(i).dtype == np.uint16
        assert codes.key(i) == expected.key
        assert codes.text(i) == expected.text
    assert codes.frames.dtype == np.int32
    assert codes.frames.tolist() == [len(recording.codes) for recording in EXPECTED]
    assert codes.seconds.tolist() == [recording.seconds for recording in EXPECTED]


# --- reading what was written


def test_recordings_are_read_back(written):
    codes = ShardedCodes(find_shards(written))
    assert_holds_what_was_written(codes)
    codes.verify()
    assert codes.name == "talks"
    assert codes.header["audio_tokenizer"] == "kyutai/mimi"
    assert "shard" not in codes.header
    assert codes.bad_rows == [(f"bad:{s}:{p}", "no audio") for s, parts in enumerate(PARTS) for p in range(len(parts))]


def test_files_may_come_in_any_order(written):
    assert_holds_what_was_written(ShardedCodes([Path(path) for path in reversed(find_shards(written))]))


def test_large_shards_have_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_MAX_BATCH_CODES", 200)
    files = write_set(tmp_path)
    with pa.memory_map(files[0]) as file:
        assert pa.ipc.open_file(file).num_record_batches == 2
    assert_holds_what_was_written(ShardedCodes(files))


@pytest.mark.parametrize("num_quantizers", [1, 4, Q, None])
def test_codes_are_views_of_the_file(written, num_quantizers):
    codes = ShardedCodes(find_shards(written))
    whole = codes.codes(3)
    first = codes.codes(3, num_quantizers=num_quantizers)
    assert np.shares_memory(whole, first)
    assert not first.flags.writeable
    np.testing.assert_array_equal(first, EXPECTED[3].codes[:, :num_quantizers])


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (2, 9), (3, None), (20, 100), (0, 0), (-3, None), (5, 2), (0, -2)])
def test_frames_are_cut_out(written, start, stop):
    found = ShardedCodes(find_shards(written)).codes(4, start, stop, 4)
    np.testing.assert_array_equal(found, EXPECTED[4].codes[start:stop, :4])


@pytest.mark.parametrize("i", [-1, len(EXPECTED)])
def test_recordings_that_are_not_there(written, i):
    codes = ShardedCodes(find_shards(written))
    for read in (codes.codes, codes.text, codes.key):
        with pytest.raises(IndexError, match=str(i)):
            read(i)


def test_equal_sets_have_equal_fingerprints_and_bytes(written, tmp_path):
    files = write_set(tmp_path / "again")
    for ours, theirs in zip(files, find_shards(written), strict=True):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()
    assert ShardedCodes(files).fingerprint == ShardedCodes(find_shards(written)).fingerprint


def test_other_codes_or_settings_have_another_fingerprint(written, tmp_path):
    known = {ShardedCodes(find_shards(written)).fingerprint}
    known.add(ShardedCodes(write_set(tmp_path / "padding", codec_padding="aligned")).fingerprint)
    made = make_recordings()
    made[1][0][0].codes[0, 0] ^= 1
    known.add(ShardedCodes(write_set(tmp_path / "codes", made)).fingerprint)
    assert len(known) == 3


def test_pickled_sets_open_their_files_again(written):
    codes = ShardedCodes(find_shards(written))
    assert_holds_what_was_written(pickle.loads(pickle.dumps(codes)))
    assert len(pickle.dumps(codes)) < 5000  # no codes in it


def test_pickled_sets_notice_that_a_file_changed(copied, tmp_path):
    pickled = pickle.dumps(ShardedCodes(copied))
    parts = [tmp_path / "part"]
    write_part(parts[0], [EXPECTED[0]] * 4, {"failed": [], "left_out": 0})
    merge_parts(parts, Path(copied[1]), header_of(1))
    codes = pickle.loads(pickled)
    with pytest.raises(ShardError, match=r"00001-of-00003\.arrow: the shard has changed since it was first opened"):
        codes.codes(6)


def test_sets_are_read_in_forked_processes(written):
    codes = ShardedCodes(find_shards(written))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(codes.codes, (5,)), EXPECTED[5].codes)


def test_sets_hold_no_files_open(written):
    """There may be more shards than a process may have open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sets = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
    try:
        sets = [ShardedCodes(find_shards(written)) for _ in range(20)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_holds_what_was_written(sets[0])


# --- what is refused


def test_no_files_are_refused():
    with pytest.raises(ShardError, match="at least one file"):
        ShardedCodes([])


def test_missing_shards_are_named(copied):
    with pytest.raises(ShardError, match=r"1 of the 3 shards are missing \(codes-00001-of-00003.arrow\); finish"):
        ShardedCodes([copied[0], copied[2]])


def test_file_that_is_not_there_is_named(copied):
    os.remove(copied[1])
    with pytest.raises(ShardError, match=r"codes-00001-of-00003\.arrow: there is no such shard"):
        ShardedCodes(copied)


def test_shard_given_twice_is_refused(copied):
    shutil.copy(copied[0], copied[1])
    with pytest.raises(ShardError, match=r"codes-00001-of-00003\.arrow: it has the number 0, as"):
        ShardedCodes(copied)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"codec_padding": "aligned"}, "codec_padding is 'aligned' in one and 'exact' in the other"),
        ({"codec_fingerprint": "1"}, "codec_fingerprint is '1' in one"),
        ({"of": 4}, "of is 4 in one and 3 in the other"),
        ({"more": 1}, "more is 1 in one and None in the other"),
    ],
)
def test_shards_of_two_sets_are_refused(copied, tmp_path, changes, told):
    others = write_set(tmp_path / "other", **changes)
    with pytest.raises(ShardError, match=f"00001-of-00003.arrow: it does not belong to the same set as .*: {told}"):
        ShardedCodes([copied[0], others[1], copied[2]])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_cut_off_shard_is_named(copied, share):
    contents = Path(copied[1]).read_bytes()
    Path(copied[1]).write_bytes(contents[: int(share * len(contents))])
    with pytest.raises(ShardError, match=r"00001-of-00003\.arrow: the shard is damaged or cut off"):
        ShardedCodes(copied)


def test_any_damaged_byte_is_refused_or_harmless(copied):
    """No damage crashes the reader; verify() finds all that codes can have."""
    path = Path(copied[1])
    contents = path.read_bytes()
    random = np.random.default_rng(1)
    found = 0
    for place in random.integers(0, len(contents), 300).tolist():
        damaged = bytearray(contents)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        reason = None
        try:
            codes = ShardedCodes(copied)
            codes.verify()
            for i in range(len(codes)):
                assert np.array_equal(codes.codes(i), EXPECTED[i].codes)
                codes.text(i), codes.key(i)
        except ShardError as error:
            reason = str(error)
            found += 1
        assert reason is None or str(path) in reason or "3 shards are missing" in reason
    assert found > 100


@pytest.mark.parametrize("read", [ShardedCodes.verify, lambda codes: codes.codes(7)])
def test_damaged_codes_are_found_before_any_of_the_shard_are_used(copied, read):
    path = Path(copied[1])
    contents = bytearray(path.read_bytes())
    place = contents.index(EXPECTED[6].codes.tobytes())
    contents[place] ^= 1
    path.write_bytes(contents)
    codes = ShardedCodes(copied)
    with pytest.raises(ShardError, match=r"00001-of-00003.arrow: the shard is damaged \(its codes have another"):
        read(codes)
    assert np.array_equal(codes.codes(0), EXPECTED[0].codes)


@pytest.mark.parametrize("code", [2048, 65_535])
def test_codes_that_no_codebook_has_are_refused(tmp_path, code):
    """The id of code 2048 of the first quantizer would be that of <audio>."""
    frames = np.full((3, 4), code, np.uint16)
    write_part(tmp_path / "part", [Recording("a", frames, 0.24, None, "s")], {"failed": [], "left_out": 0})
    codec = dict.fromkeys(("audio_tokenizer", "codec_fingerprint", "codec_padding", "codec_window"), "x")
    header = {"format": 1, "num_quantizers": 4, **codec, "source": {"name": "s"}, "shard": 0, "of": 1, "rows": [0, 1]}
    merge_parts([tmp_path / "part"], tmp_path / shard_name(0, 1), header)
    with pytest.raises(ShardError, match=rf"00000-of-00001\.arrow: the shard holds the code {code}"):
        ShardedCodes(find_shards(tmp_path)).codes(0)


def test_lengths_that_contradict_the_codes_are_refused(copied):
    path = Path(copied[1])
    contents = bytearray(path.read_bytes())
    frames = np.array([len(recording.codes) for recording in EXPECTED[5:]], np.int32).tobytes()
    contents[contents.index(frames)] += 1
    path.write_bytes(contents)
    with pytest.raises(ShardError, match=r"00001-of-00003.arrow: the shard is damaged \(its lengths contradict"):
        ShardedCodes(copied)


def test_other_arrow_files_are_refused(copied):
    table = pa.table({"id": ["a"], "frames": [1]})
    with pa.OSFile(copied[1], "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ShardError, match=r"00001-of-00003\.arrow: this is not a shard of codes"):
        ShardedCodes(copied)


def test_newer_format_is_refused(tmp_path):
    with pytest.raises(ShardError, match="its format is 2, but this version reads 1"):
        ShardedCodes(write_set(tmp_path, format=2))


@pytest.mark.parametrize("key", ["num_quantizers", "of", "source"])
def test_header_that_lacks_something_is_refused(copied, key):
    with pa.memory_map(copied[0]) as file:
        reader = pa.ipc.open_file(file)
        header = json.loads(reader.schema.metadata[HEADER_KEY])
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    del header[key]
    schema = batches[0].schema.with_metadata({HEADER_KEY: json.dumps(header).encode()})
    with pa.OSFile(copied[1], "wb") as file, pa.ipc.new_file(file, schema):
        pass
    with pytest.raises(ShardError, match=f"00001-of-00003.arrow: the shard is damaged .*{key}"):
        ShardedCodes(copied)


# --- the codec


@pytest.fixture
def of_codec(tmp_path_factory, mimi_folder, codec) -> ShardedCodes:
    """A set of a codec with 4 quantizers that lies beside it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("shards")
    shutil.copytree(mimi_folder, folder / "codec")
    part = folder / "part"
    write_part(part, [Recording("a", np.zeros((3, 4), np.uint16), 0.2, None, "talks")], {"failed": [], "left_out": 0})
    header = header_of(
        0,
        of=1,
        num_quantizers=4,
        codec_fingerprint=codec.fingerprint(),
        audio_tokenizer=str(folder / "codec"),
        codec_window="full",
    )
    merge_parts([part], folder / shard_name(0, 1), header)
    return ShardedCodes(find_shards(folder))


@pytest.mark.parametrize("num_quantizers", [1, 4])
def test_the_same_codec_is_accepted_wherever_it_lies(of_codec, mimi_folder, num_quantizers):
    of_codec.check_codec(of_codec.header["audio_tokenizer"], num_quantizers, "exact", "full")
    of_codec.check_codec(str(mimi_folder), num_quantizers, "exact", "full")


def test_the_same_hub_name_is_accepted_without_loading(written):
    ShardedCodes(find_shards(written)).check_codec("kyutai/mimi", 8, "exact", "codec")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((5, "exact", "full"), "they have 4 quantizers, but 5 are needed"),
        ((4, "aligned", "full"), "codec_padding is exact in them, but aligned is needed"),
        ((4, "exact", "codec"), "codec_window is full in them, but codec is needed"),
        ((4, "exact", "full", "ffmpeg"), "resampler is torchaudio in them, but ffmpeg is needed"),
        ((5, "aligned", "full"), "quantizers, but 5 are needed, and codec_padding is exact"),
    ],
)
def test_contradicting_settings_are_all_named(of_codec, mimi_folder, asked, told):
    with pytest.raises(ShardError, match=told):
        of_codec.check_codec(str(mimi_folder), *asked)


@pytest.mark.parametrize("same_name", [False, True])
def test_other_weights_are_refused(of_codec, mimi_folder, tmp_path, same_name):
    from transformers import MimiModel

    folder = Path(of_codec.header["audio_tokenizer"]) if same_name else tmp_path
    model = MimiModel.from_pretrained(mimi_folder, dtype=torch.float32)
    model.quantizer.acoustic_residual_vector_quantizer.layers[2].codebook.embed_sum[7] += 1
    model.save_pretrained(folder)
    with pytest.raises(ShardError, match=f"whose weights differ from those of {folder}"):
        of_codec.check_codec(str(folder), 4, "exact", "full")


def test_codec_that_is_not_there_is_named(of_codec, tmp_path):
    with pytest.raises(CodecError, match="no codec could be loaded from there"):
        of_codec.check_codec(str(tmp_path / "none"), 4, "exact", "full")


# --- writing


def test_failed_writes_leave_nothing_behind(tmp_path, monkeypatch):
    class FullDisk:
        def __init__(self, path):
            self.file = path.open("wb")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:10])
            raise OSError(28, "No space left on device")

        closed = False
        flush = close = lambda self: None

    monkeypatch.setattr(shards_module, "open_for_writing", FullDisk)
    with pytest.raises(WriteError, match=rf"{tmp_path}: part cannot be written there \(No space left on device\)"):
        write_part(tmp_path / "part", EXPECTED, {"failed": [], "left_out": 0})
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file: part cannot be written there"):
        write_part(tmp_path / "file" / "part", EXPECTED, {"failed": [], "left_out": 0})
