"""The road from a row to codes: decoded ahead within bounds, encoded in groups, each failure its own recording's."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from torchtitan.datasets import decoding, files
from torchtitan.datasets.bad_rows import BadRows, one_line, require_usable
from torchtitan.datasets.decoding import RecordingDecoder, decode_ahead
from torchtitan.datasets.encoding import encode_each
from torchtitan.datasets.rows import Row
from torchtitan.tools import retries
from torchtitan.tools.errors import UserError


@pytest.fixture
def half_a_second(monkeypatch):
    """Whatever is decoded lasts half a second."""
    monkeypatch.setattr(decoding, "load_beginning", lambda *args: (torch.zeros(12_000), 0.5))


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def rows_of(count: int, read: list[int] | None = None, seconds: float | None = 0.5):
    for number in range(count):
        if read is not None:
            read.append(number)
        yield Row(f"{number}", b"audio", None, seconds)


@pytest.mark.parametrize("stated", [0.5, 0.1])
def test_decoding_ahead_is_bounded(half_a_second, pool, stated):
    """Also where recordings are longer than the data say."""
    read: list[int] = []
    taken = decode_ahead(rows_of(40, read, stated), RecordingDecoder(), pool, seconds=2.0)
    for number in range(1, 30):
        next(taken)
        if stated == 0.5:  # four wait, and the next one is in hand
            wait_for(lambda number=number: len(read) == number + 5)
            time.sleep(0.01)
            assert len(read) == number + 5
        else:
            assert len(read) <= number + 5 + 4 * 5
    assert len(list(taken)) == 11


def test_recordings_longer_than_the_bound_are_decoded_one_by_one(half_a_second, pool):
    taken = list(decode_ahead(rows_of(5), RecordingDecoder(), pool, seconds=0.1))
    assert [decoded.row.key for decoded in taken] == list("01234")


def test_what_is_known_is_passed_on_and_takes_no_room(half_a_second, pool):
    rows = (None if number % 3 else Row(f"{number}", b"audio", None, 0.5) for number in range(9))
    taken = list(decode_ahead(rows, RecordingDecoder(), pool, seconds=0.1))
    assert [decoded and decoded.row.key for decoded in taken] == ["0", None, None, "3", None, None, "6", None, None]


def test_the_reader_ends_when_nobody_takes_the_recordings(half_a_second, pool):
    before = set(threading.enumerate())
    rows = rows_of(1000)
    taken = decode_ahead(rows, RecordingDecoder(), pool, seconds=2.0)
    next(taken)
    taken.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "reader"]
    with pytest.raises(StopIteration):
        next(rows)


def test_errors_of_the_reader_reach_who_takes_the_rows(half_a_second, pool):
    def broken():
        yield Row("0", b"audio", None, 0.5)
        raise RuntimeError("a bug")

    taken = decode_ahead(broken(), RecordingDecoder(), pool, seconds=2.0)
    next(taken)
    with pytest.raises(RuntimeError, match="a bug"):
        next(taken)


def test_one_waveform_that_spoils_a_group_costs_itself_alone():
    def encode(waveforms):
        if any(waveform[0] == 1 for waveform in waveforms):
            raise ValueError("one\nof them")
        return [waveform.long() for waveform in waveforms]

    waveforms = [torch.full((2,), float(number)) for number in (0, 1, 2)]
    first, second, third = encode_each(encode, waveforms)
    assert (first.tolist(), third.tolist()) == ([0, 0], [2, 2])
    assert second == "its audio cannot be encoded (ValueError: one)."
    with pytest.raises(torch.OutOfMemoryError):
        encode_each(lambda waveforms: exec("raise torch.OutOfMemoryError"), waveforms)


def test_a_read_of_a_recordings_own_file_is_tried_again(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"sound")
    fails = iter([OSError(5, "Input/output error")] * 2)

    def open_or_fail(path):
        for error in fails:
            raise error
        return open(path, "rb")

    def load(audio, *arguments):
        if isinstance(audio, str):
            raise OSError(5, "Input/output error")
        return torch.zeros(12_000), 0.5

    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(files, "open_file", open_or_fail)
    monkeypatch.setattr(decoding, "load_beginning", load)
    found = RecordingDecoder(retries=2)(Row("a", str(tmp_path / "a.wav"), None, None))
    assert found.reason is None and found.waveform is not None


def test_whatever_a_recording_brings_about_is_its_own_failure(monkeypatch):
    def broken(*_):
        raise MemoryError("too \udce9 much")

    monkeypatch.setattr(decoding, "load_beginning", broken)
    found = RecordingDecoder()(Row("a", b"audio", None, 0.5))
    assert found.waveform is None
    assert one_line(found.reason) == "its audio: cannot be decoded (MemoryError: too ? much)."


def test_bad_rows_are_named_once_over_resumed_runs_whatever_their_names_are(tmp_path):
    file = tmp_path / "run" / "bad_rows.tsv"
    for _ in range(2):
        bad_rows = BadRows(file)
        for _ in range(2):
            bad_rows.add("caf\udce9 \t a.wav", "two\nlines")
            bad_rows.add("b.wav", "no sound")
    assert file.read_text() == "caf? a.wav\ttwo lines\nb.wav\tno sound\n"


def test_more_than_the_accepted_share_of_bad_rows_ends_the_work(tmp_path):
    require_usable(2, 10, 0.2, "max_bad_share", None)
    with pytest.raises(
        UserError, match=r"^3 of 10 recordings .* share of 0\.2 that max_bad_share allows; b lists them\.$"
    ):
        require_usable(3, 10, 0.2, "max_bad_share", "b")
