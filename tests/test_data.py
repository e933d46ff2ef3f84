"""The data: every row once an epoch, exact positions, and bad rows that cost nothing but themselves."""

import io
import itertools
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from torchtitan.audio.token_stream import extend_tokenizer
from torchtitan.audio.waveform import load_audio
from torchtitan.components import dataloader
from torchtitan.components.dataloader import BadRows, Batch, SpeechDataLoader, collate
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.datasets import hf_dataset
from torchtitan.datasets.hf_dataset import HuggingFaceDataset, Position, Row, find_files, find_source
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

SOURCE = find_source("peoples_speech")

# --- the data set: rows, order, position


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_rows) -> list[str]:
    """Four files of 5, 1, 7 and 4 rows whose audio is a few letters."""
    folder = tmp_path_factory.mktemp("rows")
    return [
        str(write_rows(folder / f"train-{n}.parquet", [(f"{n}-{i}", b"x", "t") for i in range(size)]))
        for n, size in enumerate((5, 1, 7, 4))
    ]


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows are shuffled three at a time."""
    monkeypatch.setattr(hf_dataset, "SHUFFLE_ROWS", 3)


def epoch(files: list[str], position: Position | None = None, **settings) -> list[tuple[Row, Position]]:
    return list(HuggingFaceDataset(SOURCE, files, **settings).epoch(position or Position()))


def keys(rows: list[tuple[Row, Position]]) -> list[str]:
    return [row.key for row, _ in rows]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("num_files", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_once_an_epoch(files, small_blocks, world_size, num_files, number, shuffle):
    chosen = files[-num_files:]
    ranks = [
        epoch(chosen, Position(epoch=number), rank=rank, world_size=world_size, shuffle=shuffle)
        for rank in range(world_size)
    ]
    found = [key for rank in ranks for key in keys(rank)]
    expected = [f"{path}:{i} ({Path(path).stem[-1]}-{i})" for path in chosen for i in range(_size(path))]
    assert sorted(found) == sorted(expected)


def _size(path: str) -> int:
    return (5, 1, 7, 4)[int(Path(path).stem[-1])]


@pytest.mark.parametrize(
    ("num_files", "settings"),
    [
        (1, {}),
        (4, {}),
        (4, {"shuffle": False}),
        (3, {"rank": 1, "world_size": 2}),
        (1, {"rank": 1, "world_size": 2}),
    ],
)
def test_resume_from_every_position(files, small_blocks, num_files, settings):
    chosen = files[-num_files:]
    whole = epoch(chosen, **settings)
    assert len(whole) > 1
    for used, (_, following) in enumerate(whole[:-1], start=1):
        stored = Position(**json.loads(json.dumps(following.to_dict())))
        assert epoch(chosen, stored, **settings) == whole[used:]


def test_position_after_the_last_row_is_the_next_epoch(files):
    assert epoch(files)[-1][1] == Position(epoch=1)


@pytest.mark.parametrize("chosen", [slice(None), slice(2, 3)], ids=["of files", "of rows"])
def test_epochs_have_different_orders(files, chosen):
    orders = [keys(epoch(files[chosen], Position(epoch=number))) for number in range(3)]
    assert len({tuple(order) for order in orders}) == 3


def test_order_is_a_function_of_the_seed(files):
    orders = [keys(epoch(files, seed=seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_unshuffled_rows_come_as_they_lie(files):
    found = [row.key.split("(")[1][:-1] for row, _ in epoch(files, shuffle=False)]
    assert found == [f"{n}-{i}" for n, size in enumerate((5, 1, 7, 4)) for i in range(size)]


def test_rows_carry_bytes_text_and_a_name(speech_folder):
    path = find_files(SOURCE, str(speech_folder / "peoples_speech"))[0]
    row = epoch([path], shuffle=False)[3][0]
    assert row.key == f"{path}:3 (clip-3)"
    assert row.text == "text 3"
    assert row.audio[:4] == b"fLaC"


def test_row_without_bytes_keeps_its_path(tmp_path, write_rows):
    path = write_rows(tmp_path / "train-0.parquet", [("a", {"bytes": None, "path": "/sounds/a.flac"}, None)])
    assert epoch([str(path)])[0][0].audio == "/sounds/a.flac"


def test_corrupt_file_costs_that_file_only(files, tmp_path, small_blocks):
    damaged = tmp_path / "train-damaged.parquet"
    damaged.write_bytes(Path(files[2]).read_bytes()[:-20])
    reports = []
    mixed = [files[0], str(damaged), files[3]]
    found = epoch(mixed, shuffle=False, on_bad_file=lambda path, reason: reports.append(path))
    assert keys(found) == keys(epoch([files[0], files[3]], shuffle=False))
    assert reports == [str(damaged)]


def test_corruption_inside_a_file_costs_the_rest_of_it_only(files, tmp_path, make_sound, write_rows):
    import pyarrow.parquet as pq

    damaged = write_rows(tmp_path / "train-damaged.parquet", [(f"d-{i}", make_sound(i, 0.3), "t") for i in range(4)])
    pq.write_table(pq.read_table(damaged), damaged, row_group_size=2)
    column = pq.ParquetFile(damaged).metadata.row_group(1).column(1)
    content = bytearray(damaged.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    damaged.write_bytes(content)
    reports = []
    mixed = [files[0], str(damaged), files[3]]
    found = keys(epoch(mixed, shuffle=False, on_bad_file=lambda path, reason: reports.append(path)))
    assert [key for key in found if "damaged" not in key] == keys(epoch([files[0], files[3]], shuffle=False))
    assert len([key for key in found if "damaged" in key]) <= 2
    assert reports == [str(damaged)]


def test_no_audio_column(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train-0.parquet"
    pq.write_table(pa.table({"id": ["a"], "sound": ["b"]}), path)
    with pytest.raises(UserError, match=r"there is no column 'audio' \(columns: id, sound\)"):
        find_files(find_source("peoples_speech"), str(tmp_path))


def test_folders_inside_of_the_layout_links_and_whole_words(tmp_path, make_sound, write_rows):
    rows = [("a", make_sound(0, 0.1), "t")]
    for name in ("elsewhere/clean/test/0000.parquet", "data/latest/train-0.parquet", "data/test/train-0.parquet"):
        write_rows(tmp_path / name, rows)
    test = find_source("librispeech_asr_test")
    for root in ("elsewhere", "elsewhere/clean", "elsewhere/clean/test"):
        assert [Path(file).name for file in find_files(test, str(tmp_path / root))] == ["0000.parquet"]
    write_rows(tmp_path / "disk" / "train-1.parquet", rows)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "disk")
    found = find_files(find_source("mixture"), str(tmp_path / "data"))
    assert [Path(file).relative_to(tmp_path / "data").as_posix() for file in found] == [
        "latest/train-0.parquet",
        "linked/train-1.parquet",
    ]


def test_audio_may_be_named_relative_to_its_table(tmp_path, make_sound):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.flac").write_bytes(make_sound(0, 0.1))
    path = tmp_path / "train-0.parquet"
    pq.write_table(pa.Table.from_pylist([{"audio": {"bytes": None, "path": "a.flac"}, "text": "t"}]), path)
    ((row, _),) = HuggingFaceDataset(find_source("peoples_speech"), [str(path)]).epoch(Position())
    assert row.audio == str(tmp_path / "a.flac")


# --- which files


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found_files(name: str, folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in find_files(find_source(name), str(folder))]


def test_peoples_speech_is_its_train_files(tmp_path):
    train = ["clean/train-00000-of-00002.parquet", "clean/train-00001-of-00002.parquet", "dirty/train-0.parquet"]
    other = ["clean/validation-00000.parquet", "clean/test-00000.parquet", "microset/train-0.parquet", "README.md"]
    held_out = ["validation/train-0.parquet", "test/train-0.parquet"]
    assert found_files("peoples_speech", touch(tmp_path, *train, *other, *held_out)) == train


def test_librispeech_train_and_test_are_apart(tmp_path):
    train = ["clean/train.100/0000.parquet", "other/train.500/0000.parquet"]
    test, other = ["clean/test/0000.parquet"], ["clean/validation/0000.parquet", "all/train.clean.100/0000.parquet"]
    touch(tmp_path, *train, *test, *other)
    assert found_files("librispeech_asr_train", tmp_path) == train
    assert found_files("librispeech_asr_test", tmp_path) == test


def test_mixture_is_all_train_files_below_a_folder(tmp_path):
    train = ["a/clean/train-0.parquet", "b/en/train/0000.parquet", "c/train.360/0.parquet"]
    touch(tmp_path, *train, "a/clean/test-0.parquet", "b/en/dev/train-0.parquet", "c/validation/train-0.parquet")
    assert found_files("mixture", tmp_path) == train


@pytest.mark.parametrize(("alias", "name"), [("all", "mixture"), ("librispeech_asr", "librispeech_asr_test")])
def test_aliases(alias, name):
    assert find_source(alias) is find_source(name)


def test_unknown_data_set_lists_the_known(files):
    with pytest.raises(UserError, match=r"unknown data set 'speach' \(known: all, .*peoples_speech"):
        find_source("speach")


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "plain"])
def test_missing_folder(name):
    with pytest.raises(UserError, match=f"{name}: there is no such data set folder"):
        find_files(SOURCE, name)


def test_folder_without_a_fitting_file(tmp_path):
    touch(tmp_path, "clean/validation-0.parquet")
    with pytest.raises(UserError, match=r"no file fits \*\*/train-\*\.parquet there"):
        find_files(SOURCE, str(tmp_path))


def test_single_file_is_taken_as_it_is(files):
    assert find_files(SOURCE, files[1]) == [files[1]]


# --- the loader


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    extend_tokenizer(tokenizer, 4)
    return tokenizer


@pytest.fixture(scope="module")
def make_loader(codec, tokenizer, speech_folder):
    """A function that makes a loader over the synthetic peoples_speech, or over other files."""
    stream = extend_tokenizer(tokenizer, 4)
    default = find_files(SOURCE, str(speech_folder / "peoples_speech"))

    def make(files=None, data=None, rank=0, world_size=1, **settings) -> SpeechDataLoader:
        dataset = HuggingFaceDataset(SOURCE, [str(f) for f in files or default], rank, world_size, **(data or {}))
        defaults = {"task": "a2a", "seq_len": 128, "batch_size": 2, "max_seconds": 20.0, "infinite": False}
        return SpeechDataLoader(dataset, stream, codec, tokenizer, **{**defaults, **settings})

    return make


@pytest.fixture(scope="module")
def bad_file(tmp_path_factory, make_sound, write_rows) -> Path:
    """Three good rows among nine bad ones, whose ids start with ``bad``."""
    not_a_number = io.BytesIO()
    soundfile.write(not_a_number, np.full(2400, np.nan, dtype=np.float32), 24_000, "FLOAT", format="WAV")
    flac = make_sound(1, 1.0)
    rows = [
        ("bad-empty", b"", "t"),
        ("good-0", make_sound(2, 0.5), "t"),
        ("bad-garbage", bytes(range(256)) * 4, "t"),
        ("bad-nan", not_a_number.getvalue(), "t"),
        ("bad-none", None, "t"),
        ("bad-nothing-inside", {"bytes": None, "path": None}, "t"),
        ("good-1", make_sound(3, 0.7), "t"),
        ("bad-truncated", flac[: len(flac) // 2], "t"),
        ("bad-header-only", flac[:60], "t"),
        ("bad-text", b"this is not sound", "t"),
        ("bad-path", {"bytes": None, "path": "/no/such/sound.flac"}, "t"),
        ("good-2", make_sound(4, 0.6), "t"),
    ]
    return write_rows(tmp_path_factory.mktemp("bad") / "train-0.parquet", rows)


@pytest.fixture
def log():
    """The messages of the run's logger."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def take(loader: SpeechDataLoader, count: int | None = None, seconds: float = 60.0) -> list[Batch]:
    """The first batches of a loader; fails rather than waits if they do not come."""
    batches: list[Batch] = []
    errors: list[BaseException] = []

    def run() -> None:
        iterator = iter(loader)
        try:
            batches.extend(itertools.islice(iterator, count))
        except BaseException as error:
            errors.append(error)
        finally:
            iterator.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "the loader gives neither batches nor an error"
    if errors:
        raise errors[0]
    return batches


def samples(batches: list[Batch]) -> Iterator[torch.Tensor]:
    """The samples without their padding."""
    for batch in batches:
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            yield tokens[: int((targets != IGNORE_INDEX).sum()) + 1]


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.state == b.state
        for a, b in zip(found, expected, strict=True)
    )


def test_samples_are_the_codes_of_the_clips(make_loader, codec, speech_folder):
    loader = make_loader(data={"shuffle": False})
    found = list(samples(take(loader)))
    files = find_files(SOURCE, str(speech_folder / "peoples_speech"))
    assert len(found) == 11
    for sample, (row, _) in zip(found, epoch(files, shuffle=False), strict=True):
        codes = codec.encode([load_audio(row.audio)])[0]
        assert sample.tolist() == loader.stream.sample(codes).tolist()


def test_targets_are_the_next_ids_and_padding_is_none():
    tokens, targets = collate([torch.tensor([7, 8, 9]), torch.tensor([5, 6, 7, 8, 9])], max_length=64)
    assert tokens.shape == targets.shape == (2, 32)
    assert tokens[0, :4].tolist() == [7, 8, 9, 0]
    assert targets[0, :4].tolist() == [8, 9, IGNORE_INDEX, IGNORE_INDEX]
    assert targets[1, :5].tolist() == [6, 7, 8, 9, IGNORE_INDEX]
    assert (targets[:, 5:] == IGNORE_INDEX).all()


@pytest.mark.parametrize(("fixed", "longest", "length"), [(False, 33, 64), (False, 64, 64), (True, 3, 100)])
def test_length_of_rows(fixed, longest, length):
    tokens, _ = collate([torch.ones(longest, dtype=torch.int64)], 100, fixed)
    assert tokens.shape == (1, length)


def test_rows_are_never_longer_than_asked():
    assert collate([torch.ones(98, dtype=torch.int64)], 100)[0].shape == (1, 100)


def test_padding_is_counted(make_loader):
    batches = take(make_loader())
    assert [batch.num_tokens for batch in batches] == [sum(s.numel() for s in samples([batch])) for batch in batches]


def test_last_batch_may_be_smaller(make_loader):
    assert [batch.tokens.shape[0] for batch in take(make_loader(batch_size=4))] == [4, 4, 3]


def test_workers_do_not_change_the_batches(make_loader):
    assert same(take(make_loader(num_workers=0)), take(make_loader(num_workers=3)))


def test_ranks_share_the_rows(make_loader):
    ranks = [take(make_loader(rank=rank, world_size=2)) for rank in range(2)]
    found = [sample.tolist() for batches in ranks for sample in samples(batches)]
    assert sorted(found) == sorted(sample.tolist() for sample in samples(take(make_loader())))


# --- the loader: limits


def test_frames_that_do_not_fit_are_cut_from_the_end_and_counted(make_loader):
    settings = {"data": {"shuffle": False}, "batch_size": 11}
    (whole,), (cut,) = take(make_loader(**settings)), take(make_loader(seq_len=45, **settings))
    counted = cut.state["counters"]
    rows = list(zip(samples([whole]), samples([cut]), strict=True))
    shorter = [(w, c) for w, c in rows if len(w) > 45]
    assert 0 < len(shorter) < 11
    assert all(torch.equal(w, c) for w, c in rows if len(w) <= 45)
    for w, c in shorter:
        assert len(c) == 43  # ten frames of four codes, and the three marks
        assert torch.equal(c[:-1], w[:42])
        assert c[-1] == w[-1]
    lost = sum(len(w) - len(c) for w, c in shorter) // 4
    assert (counted["cut_rows"], counted["cut_frames"]) == (len(shorter), lost)


def test_audio_after_max_seconds_is_not_encoded(make_loader):
    (batch,) = take(make_loader(max_seconds=0.8, batch_size=11))
    assert max(sample.numel() for sample in samples([batch])) == 10 * 4 + 3
    assert batch.state["counters"]["cut_frames"] == 0


def test_text_comes_before_the_audio(make_loader, tokenizer):
    loader = make_loader(task="tts", data={"shuffle": False})
    sample = next(samples(take(loader, 1)))
    text = tokenizer("text 0", add_special_tokens=False)["input_ids"]
    assert sample[: len(text) + 2].tolist() == [loader.stream.bos_id, *text, loader.stream.audio_start_id]
    assert loader.stream.decode(sample[len(text) + 2 : -1]).shape[1] == 4


def test_text_is_never_cut(make_loader, tokenizer, tmp_path, write_rows, make_sound):
    path = write_rows(tmp_path / "train-0.parquet", [("a", make_sound(0, 1.0), "a rather long text")])
    (sample,) = samples(take(make_loader([path], task="tts", seq_len=32)))
    text = tokenizer("a rather long text", add_special_tokens=False)["input_ids"]
    assert sample[1 : len(text) + 1].tolist() == text
    assert sample.numel() == 1 + len(text) + 1 + 2 * 4 + 1  # two of thirteen frames


def test_text_that_leaves_no_room_is_a_bad_row(make_loader, tmp_path, write_rows, make_sound, log):
    rows = [("long", make_sound(0, 0.2), "x" * 60), ("short", make_sound(0, 0.2), "x"), ("none", b"", None)]
    path = write_rows(tmp_path / "train-0.parquet", rows)
    (batch,) = take(make_loader([path], task="tts", seq_len=64, data={"shuffle": False}))
    assert batch.tokens.shape[0] == 1
    assert any("(long): a transcription of 60 ids leaves no room for audio in 64 ids" in m for m in log)


def test_row_without_text_is_a_bad_row_of_task_tts(make_loader, tmp_path, write_rows, make_sound, log):
    rows = [("none", make_sound(0, 0.2), None), ("some", make_sound(0, 0.2), "x")]
    path = write_rows(tmp_path / "train-0.parquet", rows)
    (batch,) = take(make_loader([path], task="tts"))
    assert batch.tokens.shape[0] == 1
    assert any("(none): the row has no transcription" in m for m in log)


# --- the loader: bad rows


def test_bad_rows_are_left_out_and_counted(make_loader, bad_file):
    batches = take(make_loader([bad_file], batch_size=2))
    assert [batch.tokens.shape[0] for batch in batches] == [2, 1]
    counters = batches[-1].state["counters"]
    assert (counters["bad_rows"], counters["rows"] - counters["bad_rows"]) == (9, 3)


def test_bad_rows_at_the_end_of_the_data_are_counted_too(make_loader, tmp_path, write_rows, make_sound):
    path = write_rows(tmp_path / "train-0.parquet", [("a", make_sound(0, 0.2), "t"), ("b", b"", "t")])
    (batch,) = take(make_loader([path], data={"shuffle": False}))
    assert batch.state["counters"]["bad_rows"] == 1


def test_bad_rows_are_named_once_in_log_and_file(make_loader, bad_file, tmp_path, log):
    report = tmp_path / "run" / "bad_rows.tsv"
    take(make_loader([bad_file], infinite=True, bad_rows=BadRows(report)), 5)
    lines = report.read_text().splitlines()
    names = [line.split("\t")[0].split("(")[1][:-1] for line in lines]
    assert sorted(names) == sorted({name for name in names if name.startswith("bad")})
    assert len(names) == 9
    assert all(sum(f"({name}): " in message for message in log) == 1 for name in names)
    assert all(line.split("\t")[1].strip() for line in lines)


def test_bad_rows_do_not_end_an_endless_loader(make_loader, bad_file):
    batches = take(make_loader([bad_file], infinite=True), 9)
    assert batches[-1].state["position"]["epoch"] >= 5
    good = {tuple(sample.tolist()) for sample in samples(batches)}
    assert len(good) == 3


@pytest.mark.parametrize("size", [1, 40])
def test_data_without_any_good_row_is_an_error_not_a_loop(make_loader, tmp_path, write_rows, size):
    path = write_rows(tmp_path / "train-0.parquet", [(str(i), b"no sound", "t") for i in range(size)])
    with pytest.raises(UserError, match="no row of a whole epoch could be used"):
        take(make_loader([path], infinite=True))


def test_one_good_row_among_many_bad_is_enough(make_loader, tmp_path, write_rows, make_sound):
    rows = [(str(i), b"no sound", "t") for i in range(40)]
    path = write_rows(tmp_path / "train-0.parquet", [*rows, ("good", make_sound(0, 0.2), "t")])
    assert len(take(make_loader([path], infinite=True, batch_size=3), 2)) == 2


def test_corrupt_file_is_named_and_the_others_are_read(make_loader, speech_folder, tmp_path):
    files = find_files(SOURCE, str(speech_folder / "peoples_speech"))
    damaged = tmp_path / "train-damaged.parquet"
    damaged.write_bytes(b"PAR1 and nothing of use")
    report = tmp_path / "bad_rows.tsv"
    found = take(make_loader([*files, damaged], bad_rows=BadRows(report), batch_size=20))
    assert found[0].tokens.shape[0] == 11
    assert report.read_text().startswith(f"{damaged}\tthe rest of the file is left out: ")


def test_data_without_any_readable_file_is_an_error(make_loader, tmp_path):
    damaged = tmp_path / "train-damaged.parquet"
    damaged.write_bytes(b"PAR1 and nothing of use")
    with pytest.raises(UserError, match="holds no readable row"):
        take(make_loader([damaged], infinite=True))


def test_rank_without_rows_has_nothing_to_validate(make_loader, tmp_path, write_rows, make_sound):
    path = write_rows(tmp_path / "train-0.parquet", [("a", make_sound(0, 0.2), "t")])
    assert [len(take(make_loader([path], rank=rank, world_size=2))) for rank in range(2)] == [1, 0]


def test_a_file_without_audio_is_left_out_and_counted(make_loader, tmp_path, write_rows, make_sound):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train-0.parquet"
    pq.write_table(pa.table({"id": ["a"]}), path)
    good = write_rows(tmp_path / "train-1.parquet", [("a", make_sound(0, 0.2), "t")])
    (batch,) = take(make_loader([path, good]))
    assert batch.state["counters"]["bad_files"] == 1 and batch.state["counters"]["rows"] == 1


# --- the loader: state and threads


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_of_a_batch_resumes_with_the_following_batches(
    make_loader, bad_file, speech_folder, small_blocks, world_size
):
    files = [*find_files(SOURCE, str(speech_folder / "peoples_speech")), str(bad_file)]
    settings = {"files": files, "infinite": True, "rank": 0, "world_size": world_size, "batch_size": 3}
    whole = take(make_loader(**settings), 12)
    assert whole[-1].state["position"]["epoch"] > 0
    for used in range(1, 10):
        resumed = make_loader(**settings)
        resumed.load_state_dict(json.loads(json.dumps(whole[used - 1].state)))
        assert same(take(resumed, 3), whole[used : used + 3])


def test_loader_can_be_set_back_to_its_start(make_loader):
    loader = make_loader()
    first = take(loader)
    loader.load_state_dict({"position": Position().to_dict(), "counters": {}})
    assert same(take(loader), first)


def test_later_epochs_cost_no_encoding(make_loader, monkeypatch):
    loader = make_loader(infinite=True, batch_size=11)
    encoded = []
    encode = loader.codec.encode
    monkeypatch.setattr(loader.codec, "encode", lambda clips: encoded.append(len(clips)) or encode(clips))
    take(loader, 3)
    assert sum(encoded) == 11


def test_kept_codes_are_bounded(make_loader, monkeypatch):
    monkeypatch.setattr(dataloader, "CACHE_BYTES", 0)
    loader = make_loader()
    take(loader)
    assert not loader._codes


def test_threads_are_gone_when_the_iterator_is_closed(make_loader):
    before = set(threading.enumerate())
    iterator = iter(make_loader(infinite=True))
    next(iterator)
    started = set(threading.enumerate()) - before
    iterator.close()
    assert "data loader" in {thread.name for thread in started}
    assert not any(thread.is_alive() for thread in started)


def test_threads_are_gone_at_the_end_of_the_data(make_loader):
    before = set(threading.enumerate())
    list(make_loader())
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith(("data loader", "decode"))]
