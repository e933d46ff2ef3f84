"""The loader: samples, limits, packing, bad recordings that cost nothing but themselves, state, ranks, threads."""

import io
import itertools
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from torchtitan.audio.token_stream import TokenStream, extend_tokenizer
from torchtitan.audio.waveform import load_audio, load_beginning, resample
from torchtitan.components import dataloader
from torchtitan.components.dataloader import Batch, LoaderSettings, SpeechDataLoader, max_frames_of
from torchtitan.config.job_config import Training
from torchtitan.datasets import order, recordings
from torchtitan.datasets.bad_rows import BadRows
from torchtitan.datasets.corpora import find_data, open_corpora
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.recordings import Ranks
from torchtitan.datasets.sources import sources_from_config
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools import retries
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

BOS = "<|begin_of_text|>"


@pytest.fixture
def small_windows(monkeypatch):
    """Rows are shuffled three at a time."""
    monkeypatch.setattr(order, "SHUFFLE_ROWS", 3)


# --- the loader


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    extend_tokenizer(tokenizer, 4)
    return tokenizer


@pytest.fixture(scope="module")
def make_loader(codec, tokenizer, speech_folder):
    """A function that makes a loader over the synthetic peoples_speech, or over other folders or files.

    ``endless`` draws forever in a shuffled order; otherwise everything comes once, as it lies.
    """
    stream = extend_tokenizer(tokenizer, 4)
    default = str(speech_folder / "peoples_speech")

    def make(*paths, endless: bool = False, sources: list[Source] | None = None, **settings) -> SpeechDataLoader:
        if sources is None:
            sources = [Source(name=Path(path).stem, path=str(path)) for path in paths or (default,)]
        options = {"task": "a2a", "seq_len": 128, "batch_size": 2, "max_seconds": 20.0, **settings}
        own_codec = options.pop("codec", codec)
        options.setdefault("packing", options.get("window", 1) > 1)
        found = find_data(sources, 0)
        seed, split = options.get("seed", 0), options.get("split", False)
        max_frames = max_frames_of(options["max_seconds"])
        if split:
            max_frames = min(max_frames, stream.max_frames(options["seq_len"]))
        corpora, mixture = open_corpora(found, seed, max_frames, split, 0, shuffle=endless)
        texts, bad_rows = options.pop("tokenizer", tokenizer), options.pop("bad_rows", None)
        ranks = Ranks(options.pop("rank", 0), options.pop("world_size", 1), share=options.pop("share", None))
        ids = TokenStream.from_tokenizer(texts)
        chosen = LoaderSettings(num_bad_files=len(found.bad_files), **options)
        return SpeechDataLoader(corpora, mixture, ids, own_codec, texts, chosen, ranks, bad_rows)

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


@pytest.fixture(scope="module")
def clips(speech_folder) -> dict[str, tuple[bytes, str]]:
    """Bytes and text of the synthetic peoples_speech by id, as they lie."""
    import pyarrow.parquet as pq

    files = sorted((speech_folder / "peoples_speech").rglob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {row["id"]: (row["audio"]["bytes"], row["text"]) for row in rows}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_code_shards, codec, clips) -> Path:
    """A folder with the codes of the synthetic peoples_speech, six of whose quantizers are kept, in two shards."""
    sounds = {name: sound for name, (sound, _) in clips.items()}
    texts = {name: text for name, (_, text) in clips.items()}
    return write_code_shards(tmp_path_factory.mktemp("shards"), sounds, codec.name, texts)


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
    """The samples without their padding, out of packed rows too."""
    for batch in batches:
        for row, targets in enumerate(batch.targets):
            starts = [0]
            if batch.positions is not None:
                starts = torch.nonzero(batch.positions[row] == 0)[:, 0].tolist()
            for start, stop in itertools.pairwise([*starts, len(targets)]):
                if (real := int((targets[start:stop] != IGNORE_INDEX).sum())) > 0:
                    yield batch.tokens[row, start : start + real + 1]


def names(batches: list[Batch]) -> list[str]:
    """The recordings' names in the order in which they were used."""
    return [key for batch in batches for row in batch.keys for key in row]


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and (a.positions is None or torch.equal(a.positions, b.positions))
        and (a.state, a.counters, a.keys) == (b.state, b.counters, b.keys)
        for a, b in zip(found, expected, strict=True)
    )


# --- samples and rows


def test_samples_are_the_codes_of_the_clips(make_loader, codec, clips):
    loader = make_loader()
    found = list(samples(take(loader)))
    assert len(found) == len(clips) == 11
    for sample, (sound, _) in zip(found, clips.values(), strict=True):
        codes = codec.encode([load_audio(sound)])[0]
        assert sample.tolist() == loader.collator.stream.sample(codes).tolist()


@pytest.mark.parametrize("split", [True, False])
def test_parts_of_recordings_are_the_codes_of_their_slices(make_loader, codec, tmp_path, make_sound, split):
    """Of what is cut out of a long recording, training takes the same as of its slices in files of their own."""
    (tmp_path / "long.wav").write_bytes(make_sound(0, 3.0, 16_000, "WAV"))
    samples_of_file, rate = soundfile.read(tmp_path / "long.wav", dtype="float32")
    (tmp_path / "wav.scp").write_text("rec long.wav\n")
    (tmp_path / "segments").write_text("a rec 0.1 0.5\nlate rec 2.5 3.5\nb rec 0.5 2.1\n")
    line = {"audio_filepath": "long.wav", "offset": 1.5, "duration": 1.0}
    (tmp_path / "manifest.json").write_text(json.dumps(line))
    batches = take(make_loader(tmp_path / "wav.scp", tmp_path / "manifest.json", max_seconds=0.8, split=split))
    assert batches[-1].counters.bad_rows == 1
    expected = []
    for start, stop in ((0.1, 0.5), (0.5, 2.1), (1.5, 2.5)):
        waveform = resample(torch.from_numpy(samples_of_file[round(start * rate) : round(stop * rate)]), rate)
        codes = codec.encode([waveform if split else waveform[:19_200]])[0]
        expected += [codes[:, at : at + 10] for at in range(0, codes.shape[1], 10)]
    stream = make_loader().collator.stream
    assert [s.tolist() for s in samples(batches)] == [stream.sample(codes).tolist() for codes in expected]
    if not split:
        assert [name.rpartition(":")[2] for name in names(batches)] == ["0 (a)", "2 (b)", "0 (long.wav)"]


def test_decoded_audio_is_encoded(make_loader, codec, clips, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = []
    for sound, _ in clips.values():
        array, rate = soundfile.read(io.BytesIO(sound), dtype="float32")
        cells.append({"path": "x.flac", "array": array, "sampling_rate": rate})
    kind = pa.struct([("path", pa.string()), ("array", pa.list_(pa.float32())), ("sampling_rate", pa.int64())])
    pq.write_table(pa.table({"audio": pa.array(cells, kind)}), tmp_path / "a.parquet")
    loader = make_loader(tmp_path)
    expected = [
        loader.collator.stream.sample(codec.encode([load_audio(sound)])[0]).tolist() for sound, _ in clips.values()
    ]
    assert [sample.tolist() for sample in samples(take(loader))] == expected


def test_samples_carry_the_names_of_their_clips(make_loader, clips):
    found = names(take(make_loader()))
    assert [name.split("(")[1][:-1] for name in found] == list(clips)


def test_targets_are_the_next_ids_and_padding_is_none(make_loader):
    for batch in take(make_loader()):
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            real = int((targets != IGNORE_INDEX).sum())
            assert targets[:real].tolist() == tokens[1 : real + 1].tolist()
            assert (targets[real:] == IGNORE_INDEX).all() and (tokens[real + 1 :] == 0).all()


def test_rows_are_as_long_as_the_longest_sample_rounded_up(make_loader):
    for batch in take(make_loader()):
        longest = max(sample.numel() for sample in samples([batch]))
        assert batch.tokens.shape[1] == -(-longest // 32) * 32


def test_rows_are_never_longer_than_asked(make_loader):
    assert max(batch.tokens.shape[1] for batch in take(make_loader(seq_len=43))) == 43


def test_rows_of_one_length(make_loader):
    for window in (1, 5):
        assert {batch.tokens.shape[1] for batch in take(make_loader(fixed_length=True, window=window))} == {128}


def test_tokens_are_counted(make_loader):
    for batch in [*take(make_loader()), *take(make_loader(window=5))]:
        lengths = [sample.numel() for sample in samples([batch])]
        assert batch.num_tokens == sum(lengths)
        assert batch.num_squares == sum(length**2 for length in lengths)


def test_last_batch_may_be_smaller(make_loader):
    assert [batch.tokens.shape[0] for batch in take(make_loader(batch_size=4))] == [4, 4, 3]


@pytest.mark.parametrize("window", [1, 5])
def test_workers_do_not_change_the_batches(make_loader, window):
    first, *others = (take(make_loader(endless=True, num_workers=workers, window=window), 9) for workers in (0, 1, 3))
    assert all(same(other, first) for other in others)


# --- packing


def test_packed_rows_hold_the_same_samples(make_loader):
    plain, packed = take(make_loader(endless=True), 6), take(make_loader(endless=True, window=50), 5)
    expected, found = (
        Counter(tuple(sample.tolist()) for sample in itertools.islice(samples(batches), 11))
        for batches in (plain, packed)
    )
    assert found == expected
    assert max(len(row) for batch in packed for row in batch.keys) > 1


def test_positions_of_packed_rows(make_loader):
    for batch in take(make_loader(window=50)):
        assert (batch.positions[:, 0] == 0).all()
        steps = batch.positions.diff(dim=1)
        starts = batch.positions[:, 1:] == 0
        assert ((steps == 1) | starts).all()
        # A sample begins with BOS, and no target leads from one sample into another.
        real = batch.targets[:, 1:] != IGNORE_INDEX
        assert (batch.tokens[:, 1:][starts & real] == 256).all()
        assert (batch.targets[:, :-1][starts] == IGNORE_INDEX).all()


def test_packing_leaves_little_padding(make_loader):
    batches = take(make_loader(endless=True, window=50, seq_len=256), 20)
    real = sum(batch.num_tokens for batch in batches)
    assert real / sum(batch.tokens.numel() for batch in batches) > 0.6


def test_a_window_ends_with_the_epoch(make_loader):
    """Each epoch's clips come once before any comes again, though a window could hold several epochs."""
    found = names(take(make_loader(endless=True, window=1000), 15))
    for epoch in range(3):
        assert len(set(found[11 * epoch : 11 * (epoch + 1)])) == 11


def test_packed_rows_are_not_in_the_order_of_their_lengths(make_loader):
    lengths = [
        max(sample.numel() for sample in samples([batch]))
        for batch in take(make_loader(endless=True, window=11, batch_size=1, seq_len=90), 40)
    ]
    assert lengths != sorted(lengths, reverse=True)
    assert len({tuple(lengths[i : i + 8]) for i in range(0, 32, 8)}) > 1


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("window", [1, 6])
def test_ranks_share_the_rows_of_stored_codes(make_loader, shards, window, world_size):
    """Rows of ``world_size`` ranks, dealt out in turn, are those of one rank."""
    options = {"endless": True, "window": window, "seq_len": 90}
    one = take(make_loader(shards, batch_size=1, **options), 4 * world_size)
    ranks = [take(make_loader(shards, rank=rank, world_size=world_size, **options), 2) for rank in range(world_size)]
    dealt = [ranks[i % world_size][i // world_size // 2].keys[i // world_size % 2] for i in range(4 * world_size)]
    assert dealt == [batch.keys[0] for batch in one]
    assert all(batch.state == ranks[0][i].state for rank in ranks for i, batch in enumerate(rank))


# --- stored codes


def test_stored_codes_give_the_same_samples(make_loader, shards):
    online, stored = take(make_loader()), take(make_loader(shards))
    assert [s.tolist() for s in samples(stored)] == [s.tolist() for s in samples(online)]


def test_codes_of_a_built_in_data_set_are_found_under_its_name(make_loader, shards):
    found = take(make_loader(sources=sources_from_config(Training(dataset_path=str(shards)))))
    assert same(found, take(make_loader(shards)))


def test_stored_codes_need_no_codec(make_loader, shards):
    loader = make_loader(shards, endless=True, codec=None)
    assert len(take(loader, 3)) == 3


@pytest.mark.parametrize("task", ["a2a", "tts", "asr"])
def test_stored_codes_are_cut_and_joined_with_text_as_recordings_are(make_loader, shards, task):
    options = {"task": task, "max_seconds": 0.8, "seq_len": 53, "batch_size": 11}
    (online,), (stored,) = take(make_loader(**options)), take(make_loader(shards, **options))
    assert [s.tolist() for s in samples([stored])] == [s.tolist() for s in samples([online])]
    assert stored.counters == online.counters
    assert stored.counters.cut_rows > 3


def test_codes_and_recordings_in_one_mixture(make_loader, shards, speech_folder):
    sources = [
        Source(name="stored", path=str(shards), weight=3.0),
        Source(name="recorded", path=str(speech_folder / "librispeech_asr"), split="test", weight=1.0),
    ]
    found = names(take(make_loader(sources=sources, endless=True), 200))
    recorded = [name for name in found if "1-2-" in name]
    assert len(recorded) / len(found) == pytest.approx(0.25, abs=0.05)
    assert all(len(set(recorded[i : i + 3])) == 3 for i in range(0, 90, 3))


def test_sources_without_weights_are_one_data_set(make_loader, speech_folder):
    sources = [
        Source(name="train", path=str(speech_folder / "peoples_speech")),
        Source(name="test", path=str(speech_folder / "librispeech_asr"), split="test"),
    ]
    found = names(take(make_loader(sources=sources, endless=True), 21))
    for epoch in range(3):
        assert len(set(found[14 * epoch : 14 * (epoch + 1)])) == 14
    assert [name for name in found[:14] if "1-2-" in name] != found[11:14]


# --- limits on the length


def test_frames_that_do_not_fit_are_cut_from_the_end_and_counted(make_loader):
    (whole,), (cut,) = take(make_loader(batch_size=11)), take(make_loader(seq_len=45, batch_size=11))
    rows = list(zip(samples([whole]), samples([cut]), strict=True))
    shorter = [(w, c) for w, c in rows if len(w) > 45]
    assert 0 < len(shorter) < 11
    assert all(torch.equal(w, c) for w, c in rows if len(w) <= 45)
    for w, c in shorter:
        assert len(c) == 43  # ten frames of four codes, and the three marks
        assert torch.equal(c[:-1], w[:42])
        assert c[-1] == w[-1]
    lost = sum(len(w) - len(c) for w, c in shorter) // 4
    assert (cut.counters.cut_rows, cut.counters.cut_frames) == (len(shorter), lost)


def test_audio_after_max_seconds_is_left_out_and_counted(make_loader):
    (whole,), (cut,) = take(make_loader(batch_size=11)), take(make_loader(max_seconds=0.8, batch_size=11))
    lengths = [(w.numel() - 3) // 4 for w in samples([whole])]
    assert [(c.numel() - 3) // 4 for c in samples([cut])] == [min(length, 10) for length in lengths]
    assert cut.counters.cut_rows == sum(length > 10 for length in lengths)
    assert cut.counters.cut_frames == sum(max(0, length - 10) for length in lengths)


@pytest.mark.parametrize("limit", [{"max_seconds": 0.8}, {"seq_len": 43}, {"max_seconds": 0.8, "seq_len": 43}])
def test_a_cut_sample_may_end_without_the_mark(make_loader, limit):
    (marked,), (cut,) = (take(make_loader(batch_size=11, end_cut=end, **limit)) for end in (True, False))
    end = make_loader().collator.stream.audio_end_id
    rows = list(zip(samples([marked]), samples([cut]), strict=True))
    assert all(m[-1] == end for m, _ in rows)
    whole = [sample.numel() <= 43 for sample in samples(take(make_loader()))]
    assert [bool(c[-1] == end) for _, c in rows] == whole
    assert all(torch.equal(c[:42], m[:42]) for m, c in rows)


@pytest.mark.parametrize("window", [1, 7])
@pytest.mark.parametrize("limit", [{"max_seconds": 0.4}, {"seq_len": 24}])
def test_splitting_loses_no_frame(make_loader, shards, limit, window):
    for path in ((), (shards,)):
        whole = take(make_loader(*path, endless=True, seq_len=256), 6)
        split = take(make_loader(*path, endless=True, split=True, window=window, **limit), 40)
        assert all((sample.numel() - 3) // 4 <= 5 for sample in samples(split))
        frames: dict[str, dict[int, list[int]]] = {}
        for name, sample in zip(names(split), samples(split), strict=True):
            clip, _, piece = name.partition("[")
            start = int(piece.split(":")[0]) if piece else 0
            frames.setdefault(clip, {})[start] = sample[2:-1].tolist()
        for name, sample in zip(names(whole), samples(whole), strict=True):
            pieces = frames[name]
            assert sorted(pieces) == list(range(0, (sample.numel() - 3) // 4, 5))
            assert [i for start in sorted(pieces) for i in pieces[start]] == sample[2:-1].tolist()
        assert split[-1].counters.cut_rows == 0


def test_pieces_of_split_recordings_are_mixed(make_loader):
    """Without packing too: a window's rows are not one recording after the other."""
    found = names(take(make_loader(endless=True, split=True, max_seconds=0.2, window=40, packing=False), 20))
    clips = [name.partition("[")[0] for name in found]
    neighbours = sum(a == b for a, b in itertools.pairwise(clips))
    assert neighbours < len(clips) / 2
    assert len(set(found)) == 40


def test_pieces_of_a_split_recording_end_with_the_mark_or_only_the_last_one_does(make_loader, shards):
    end = make_loader().collator.stream.audio_end_id
    for path in ((), (shards,)):
        for marks, expected in ((True, {True}), (False, {True, False})):
            found = list(samples(take(make_loader(*path, split=True, max_seconds=0.4, end_cut=marks))))
            assert {bool(sample[-1] == end) for sample in found} == expected
            assert sum(bool(sample[-1] == end) for sample in found) == (len(found) if marks else 11)


def test_durations_are_filtered(make_loader, shards, speech_folder, clips):
    seconds = {name: len(load_audio(sound)) / 24_000 for name, (sound, _) in clips.items()}
    wanted = [name for name, length in seconds.items() if 0.5 <= length <= 1.0]
    assert 2 < len(wanted) < 9
    for path in (speech_folder / "peoples_speech", shards):
        (batch,) = take(
            make_loader(sources=[Source("few", str(path), min_seconds=0.5, max_seconds=1.0)], batch_size=20)
        )
        assert [name.split("(")[1][:-1] for name in names([batch])] == wanted
        assert batch.counters.bad_rows == 0


def test_durations_that_no_column_tells_are_filtered_too(make_loader, tmp_path, write_rows, make_sound):
    write_rows(tmp_path / "train-0.parquet", [(str(i), make_sound(i, 0.2 + 0.3 * i), "t") for i in range(4)])
    few = [Source("few", str(tmp_path), min_seconds=0.5, max_seconds=1.0)]
    (batch,) = take(make_loader(sources=few, max_seconds=0.3))
    assert [name.split("(")[1] for name in names([batch])] == ["1)", "2)"]
    assert take(make_loader(sources=few, endless=True), 6)[-1].counters.filtered_rows >= 10


def test_limits_that_nothing_keeps_are_an_error(make_loader, shards):
    with pytest.raises(UserError, match="no recording has a duration between"):
        make_loader(sources=[Source("none", str(shards), min_seconds=50.0)])


# --- text


def test_text_comes_before_the_audio(make_loader, tokenizer):
    loader = make_loader(task="tts")
    sample = next(samples(take(loader, 1)))
    text = tokenizer("text 0", add_special_tokens=False)["input_ids"]
    assert sample[: len(text) + 2].tolist() == [
        loader.collator.stream.bos_id,
        *text,
        loader.collator.stream.audio_start_id,
    ]
    assert loader.collator.stream.decode(sample[len(text) + 2 : -1]).shape[1] == 4


def test_text_comes_after_the_audio_of_task_asr(make_loader, tokenizer):
    loader = make_loader(task="asr")
    sample, plain = next(samples(take(loader, 1))), next(samples(take(make_loader(), 1)))
    text = tokenizer("text 0", add_special_tokens=False)["input_ids"]
    assert sample.tolist() == [*plain.tolist(), *text]


@pytest.mark.parametrize("task", ["tts", "asr"])
def test_text_is_never_cut(make_loader, tokenizer, tmp_path, write_rows, make_sound, task):
    path = write_rows(tmp_path / "train-0.parquet", [("a", make_sound(0, 1.0), "a rather long text")])
    (sample,) = samples(take(make_loader(path, task=task, seq_len=32)))
    text = tokenizer("a rather long text", add_special_tokens=False)["input_ids"]
    assert (sample[1 : len(text) + 1] if task == "tts" else sample[-len(text) :]).tolist() == text
    assert sample.numel() == 1 + len(text) + 1 + 2 * 4 + 1  # two of thirteen frames


def test_text_that_leaves_no_room_is_a_bad_row(make_loader, tmp_path, write_rows, make_sound, log):
    rows = [("long", make_sound(0, 0.2), "x" * 60), ("short", make_sound(0, 0.2), "x"), ("none", b"", None)]
    path = write_rows(tmp_path / "train-0.parquet", rows)
    (batch,) = take(make_loader(path, task="tts", seq_len=64))
    assert batch.tokens.shape[0] == 1
    assert any("(long): a transcription of 60 ids leaves no room for audio in 64 ids" in m for m in log)


@pytest.mark.parametrize("task", ["tts", "asr"])
def test_a_row_without_text_is_a_bad_row_of_a_task_with_text(make_loader, tmp_path, write_rows, make_sound, log, task):
    rows = [("none", make_sound(0, 0.2), None), ("some", make_sound(0, 0.2), "x")]
    path = write_rows(tmp_path / "train-0.parquet", rows)
    (batch,) = take(make_loader(path, task=task))
    assert batch.tokens.shape[0] == 1
    assert any(f"(none): the row has no transcription, which task {task} needs" in m for m in log)


# --- bad recordings


def test_bad_rows_are_left_out_and_counted(make_loader, bad_file):
    batches = take(make_loader(bad_file))
    assert [batch.tokens.shape[0] for batch in batches] == [2, 1]
    assert (batches[-1].counters.bad_rows, batches[-1].counters.rows) == (9, 12)


def test_bad_rows_are_named_once_in_log_and_file(make_loader, bad_file, tmp_path, log):
    report = tmp_path / "run" / "bad_rows.tsv"
    take(make_loader(bad_file, endless=True, bad_rows=BadRows(report)), 7)
    lines = report.read_text().splitlines()
    found = [line.split("\t")[0].split("(")[1][:-1] for line in lines]
    assert len(found) == len(set(found)) == 9
    assert all(name.startswith("bad") for name in found)
    assert all(sum(f"({name}): " in message for message in log) == 1 for name in found)
    assert all(line.split("\t")[1].strip() for line in lines)


@pytest.mark.parametrize("window", [1, 4])
def test_bad_rows_do_not_end_an_endless_loader(make_loader, bad_file, window):
    batches = take(make_loader(bad_file, endless=True, window=window, batch_size=1), 15)
    assert batches[-1].state["draw"] > 4 * 12
    assert len({tuple(sample.tolist()) for sample in samples(batches)}) == 3


@pytest.mark.parametrize("size", [1, 40])
def test_data_without_any_good_row_is_an_error_not_a_loop(make_loader, tmp_path, write_rows, size):
    path = write_rows(tmp_path / "train-0.parquet", [(str(i), b"no sound", "t") for i in range(size)])
    with pytest.raises(UserError, match="no recording of a whole epoch could be used"):
        take(make_loader(path, endless=True))


def test_one_good_row_among_many_bad_is_enough(make_loader, tmp_path, write_rows, make_sound):
    rows = [(str(i), b"no sound", "t") for i in range(40)]
    path = write_rows(tmp_path / "train-0.parquet", [*rows, ("good", make_sound(0, 0.2), "t")])
    assert len(take(make_loader(path, endless=True, batch_size=3), 2)) == 2


def test_too_many_bad_rows_stop_the_run_and_say_where_they_are_listed(make_loader, bad_file, tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, "MIN_JUDGED", 20)
    report = tmp_path / "bad_rows.tsv"
    with pytest.raises(UserError, match=r"of \d+ recordings could not be used, .* 0\.7 .*bad_rows.tsv lists them"):
        take(make_loader(bad_file, endless=True, bad_rows=BadRows(report), max_bad_share=0.7))
    assert len(report.read_text().splitlines()) == 9
    assert len(take(make_loader(bad_file, endless=True, max_bad_share=0.8), 30)) == 30


def test_a_few_bad_rows_are_not_judged(make_loader, bad_file):
    assert len(names(take(make_loader(bad_file, max_bad_share=0.0)))) == 3


def test_corrupt_file_is_counted_and_the_others_are_read(make_loader, speech_folder, tmp_path):
    for number, file in enumerate(sorted((speech_folder / "peoples_speech").rglob("*.parquet"))):
        (tmp_path / f"train-{number}.parquet").write_bytes(file.read_bytes())
    (tmp_path / "train-damaged.parquet").write_bytes(b"PAR1 and nothing of use")
    (batch,) = take(make_loader(tmp_path, batch_size=20))
    assert batch.tokens.shape[0] == 11
    assert batch.counters.bad_files == 1


# --- state, ranks and threads


@pytest.mark.parametrize(
    ("split", "window"),
    [(True, 7), (False, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 1), (False, 7)))],
)
def test_state_of_a_batch_resumes_with_the_following_batches(
    make_loader, bad_file, speech_folder, shards, small_windows, split, window
):
    recordings = [str(speech_folder / "peoples_speech"), str(bad_file)]
    for paths in (recordings, [str(shards)]):
        options = {"endless": True, "window": window, "split": split, "seq_len": 60}
        whole = take(make_loader(*paths, **options), 14)
        assert whole[-1].state["draw"] > 11
        for used in range(1, 12):
            resumed = make_loader(*paths, **options)
            resumed.load_state_dict(json.loads(json.dumps(whole[used - 1].state)))
            assert same(take(resumed, 3), whole[used : used + 3])


@pytest.mark.parametrize("window", [1, 7])
def test_other_numbers_of_ranks_go_on_from_a_state(make_loader, shards, window):
    """1, 2, 4, 3 ranks one after the other use the rows that one rank uses."""
    options = {"endless": True, "window": window, "seq_len": 90}
    state, found = SpeechDataLoader.start_state(), []
    for world_size, count in ((1, 3), (2, 2), (4, 2), (3, 1), (1, 2)):
        ranks = []
        for rank in range(world_size):
            loader = make_loader(shards, rank=rank, world_size=world_size, **options)
            loader.load_state_dict(json.loads(json.dumps(state)))
            ranks.append(take(loader, count))
        for i in range(count):
            found += [ranks[row % world_size][i].keys[row // world_size] for row in range(2 * world_size)]
        state = ranks[0][-1].state
    alone = take(make_loader(shards, **options), len(found) // 2)
    assert found == [row for batch in alone for row in batch.keys]
    assert state == alone[-1].state


def test_loader_can_be_set_back_to_its_start(make_loader):
    loader = make_loader()
    first = take(loader)
    loader.load_state_dict(loader.start_state())
    assert same(take(loader), first)


def test_later_epochs_cost_no_encoding(make_loader, monkeypatch):
    loader = make_loader(endless=True, batch_size=11)
    encoded = []
    encode = loader.encoder.codec.encode
    monkeypatch.setattr(loader.encoder.codec, "encode", lambda clips: encoded.append(len(clips)) or encode(clips))
    first = take(loader, 1)
    loader.load_state_dict(first[0].state)
    take(loader, 3)
    assert sum(encoded) <= 22  # what had been read ahead before codes were known is encoded again


def test_what_could_not_be_read_is_tried_again_and_what_is_broken_is_not(
    make_loader, bad_file, speech_folder, monkeypatch
):
    from torchtitan.datasets.readers import AudioDataset

    loader, read = make_loader(bad_file, endless=True, batch_size=3), AudioDataset.read
    wanted: list[int] = []

    def read_or_fail(data, rows):
        wanted.extend(rows)
        for number, row in read(data, rows):
            lost = number == 1 and wanted.count(1) == 1  # a good row, the first time
            yield number, replace(row, audio=None, error="the disk is away") if lost else row

    monkeypatch.setattr(AudioDataset, "read", read_or_fail)
    batches = take(loader, 60)
    assert len({tuple(sample.tolist()) for sample in samples(batches)}) == 3
    assert wanted.count(1) >= 2
    missing_file = 10
    assert wanted.count(missing_file) > 30
    # The others as long as they are read ahead of what is known.
    assert max(wanted.count(row) for row in range(12) if row != missing_file) < 30


def test_a_recordings_own_file_that_was_away_is_used_again(make_loader, tmp_path, make_sound):
    for number in range(4):
        (tmp_path / "data" / f"{number}.flac").parent.mkdir(exist_ok=True)
        (tmp_path / "data" / f"{number}.flac").write_bytes(make_sound(number, 0.3))
    loader = make_loader(tmp_path / "data", endless=True)
    (tmp_path / "data" / "2.flac").rename(tmp_path / "away")
    batches = iter(loader)
    without = [next(batches) for _ in range(4)]
    (tmp_path / "away").rename(tmp_path / "data" / "2.flac")
    later = [next(batches) for _ in range(40)]
    batches.close()
    assert not any("2.flac" in name for name in names(without))
    assert any("2.flac" in name for name in names(later))


def test_a_read_of_a_recordings_own_file_is_tried_again(make_loader, tmp_path, make_sound, monkeypatch):
    from torchtitan.datasets import decoding, files

    (tmp_path / "a.flac").write_bytes(make_sound(0, 0.3))
    fails = iter([OSError(5, "Input/output error")] * 2)

    def load(audio, *arguments, **named):
        if isinstance(audio, str):
            raise OSError(5, "Input/output error")
        return load_beginning(audio, *arguments, **named)

    def open_or_fail(path):
        for error in fails:
            raise error
        return open(path, "rb")

    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(files, "open_file", open_or_fail)
    monkeypatch.setattr(decoding, "load_beginning", load)
    assert take(make_loader(tmp_path, read_retries=2))[0].counters.bad_rows == 0


@pytest.mark.parametrize("back", [True, False])
def test_a_window_that_is_begun_stays_as_it_was(make_loader, tmp_path, make_sound, back):
    """A clip is there again, or no longer, when a run is resumed inside of a window: the others still come once."""
    for number in range(12):
        (tmp_path / f"c{number:02d}.flac").write_bytes(make_sound(number, 0.3 + 0.05 * number))
    (tmp_path / "c00.flac").write_bytes(make_sound(0, 1.0))
    hidden, path = tmp_path / "hidden", tmp_path / "c00.flac"
    options = {"endless": True, "window": 12, "batch_size": 1, "seq_len": 90}

    def hide(hides: bool) -> None:
        (path if hides else hidden).rename(hidden if hides else path)

    before, loader = make_loader(tmp_path, **options), make_loader(tmp_path, **options)
    if back:
        hide(True)
    first = take(before, 3)
    assert first[-1].state["row"] == 3
    hide(not back)
    loader.load_state_dict(json.loads(json.dumps(first[-1].state)))
    rest = take(loader, 12)
    used = Counter()
    for batch in [*first, *rest]:
        used.update(batch.keys[0])
        if batch.state["draw"] == 12:
            break
    assert {name: count for name, count in used.items() if "c00" not in name} == {
        str(tmp_path / f"c{number:02d}.flac"): 1 for number in range(1, 12)
    }


def test_a_recording_that_the_codec_refuses_is_a_bad_row(make_loader, mimi_folder, monkeypatch):
    from torchtitan.audio import codec as codec_module

    monkeypatch.setattr(codec_module, "CPU_CHUNK_SECONDS", 0.5)
    monkeypatch.setattr(codec_module, "FULL_WINDOW_MAX_SECONDS", 1)
    loader = make_loader(endless=True, codec=codec_module.Codec.load(mimi_folder, 4, window="full"))
    batches = take(loader, 11)
    assert batches[-1].counters.bad_rows > 0
    assert 1 < len(set(names(batches))) < 11


def test_audio_beyond_what_a_window_may_hold_is_read_when_its_turn_comes(make_loader, monkeypatch):
    from torchtitan.datasets.readers import AudioDataset

    expected = take(make_loader(endless=True), 12)
    sizes, read = [], AudioDataset.read
    monkeypatch.setattr(AudioDataset, "read", lambda data, rows: sizes.append(len(rows)) or read(data, rows))
    monkeypatch.setattr(recordings, "WINDOW_BYTES", 60_000)
    assert same(take(make_loader(endless=True), 12), expected)
    assert max(sizes) == 11 and sizes.count(1) > 3


def test_closing_does_not_wait_for_a_window_to_be_read(make_loader, monkeypatch):
    import time

    from torchtitan.datasets.readers import AudioDataset

    read = AudioDataset.read

    def slowly(data, rows):
        for number, row in read(data, rows):
            time.sleep(0.2 if seen else 0.0)
            yield number, row

    seen: list[Batch] = []
    monkeypatch.setattr(AudioDataset, "read", slowly)
    monkeypatch.setattr(recordings, "CACHE_BYTES", 0)
    iterator = iter(make_loader(endless=True))
    seen.append(next(iterator))
    begin = time.monotonic()
    iterator.close()
    assert time.monotonic() - begin < 1.5  # eleven rows would take 2.2 s, and the next window again


def test_many_filtered_recordings_of_a_mixture_are_not_an_error(make_loader, tmp_path, write_rows, make_sound):
    write_rows(tmp_path / "good" / "train-0.parquet", [("good", make_sound(1, 0.5), "t")])
    write_rows(tmp_path / "short" / "train-0.parquet", [(str(i), make_sound(i, 0.1), "t") for i in range(3)])
    sources = [
        Source("good", str(tmp_path / "good"), weight=1.0),
        Source("short", str(tmp_path / "short"), weight=99.0, min_seconds=0.3),
    ]
    assert set(names(take(make_loader(sources=sources, endless=True), 2))) == set(
        names(take(make_loader(tmp_path / "good")))
    )
    with pytest.raises(UserError, match="no recording has a duration between"):
        take(make_loader(sources=[replace(sources[1], weight=None)], endless=True))


def test_recordings_and_codes_without_weights_come_once_an_epoch(make_loader, shards, speech_folder):
    sources = [
        Source(name="stored", path=str(shards)),
        Source(name="recorded", path=str(speech_folder / "librispeech_asr"), split="test"),
    ]
    for window in (1, 100):
        found = names(take(make_loader(sources=sources, endless=True, window=window), 24))
        for epoch in range(3):
            assert len(set(found[14 * epoch : 14 * (epoch + 1)])) == 14


@pytest.mark.parametrize("max_seconds", [0.8, 0.75, 0.777])
def test_recordings_and_stored_codes_are_cut_at_the_same_frame(make_loader, shards, max_seconds):
    online, stored = (take(make_loader(*path, max_seconds=max_seconds)) for path in ((), (shards,)))
    assert [s.tolist() for s in samples(online)] == [s.tolist() for s in samples(stored)]


def test_special_tokens_in_a_transcription_make_a_bad_row(make_loader, tmp_path, write_rows, make_sound, log):
    rows = [(str(i), make_sound(0, 0.2), text) for i, text in enumerate(("x", f"x {BOS} y", "x <5_0> y"))]
    path = write_rows(tmp_path / "train-0.parquet", rows)
    (batch,) = take(make_loader(path, task="tts"))
    assert batch.tokens.shape[0] == 1
    assert sum("contains the name of an audio token or of a special token" in message for message in log) == 2


def test_ordinary_text_that_a_tokenizer_calls_special_is_text(
    make_loader, make_tokenizer, tmp_path, write_rows, make_sound, log
):
    """The published models pad with "!", which makes transformers call it special."""
    own = make_tokenizer()
    own.add_special_tokens({"pad_token": "!", "additional_special_tokens": ["[CLS]"]})
    extend_tokenizer(own, 4)
    assert own.added_tokens_decoder[own.pad_token_id].special
    rows = [(str(i), make_sound(0, 0.2), text) for i, text in enumerate(("Stop! Go!", "a [CLS] b"))]
    path = write_rows(tmp_path / "train-0.parquet", rows)
    text = own("Stop! Go!", add_special_tokens=False)["input_ids"]
    assert own.pad_token_id in text
    for task in ("tts", "asr"):
        (batch,) = take(make_loader(path, task=task, tokenizer=own))
        assert str(text)[1:-1] in str(batch.tokens.flatten().tolist())
    assert sum("skipped" in message and "special token" in message for message in log) == 2


def test_bad_rows_are_not_listed_again_by_a_resumed_run(make_loader, bad_file, tmp_path):
    report = tmp_path / "bad_rows.tsv"
    for _ in range(2):
        take(make_loader(bad_file, bad_rows=BadRows(report)))
    assert len(report.read_text().splitlines()) == 9


def test_a_list_of_bad_rows_that_cannot_be_written_ends_nothing(make_loader, bad_file, tmp_path):
    (tmp_path / "file").write_text("")
    assert len(take(make_loader(bad_file, bad_rows=BadRows(tmp_path / "file" / "bad_rows.tsv")))) == 2


@pytest.mark.parametrize("change", [{"audio": "sound"}, {"text": "words"}, {"min_seconds": 1.0}, {"weight": 2.0}])
def test_the_fingerprint_tells_other_samples(speech_folder, change):
    source = Source("s", str(speech_folder / "peoples_speech"))
    found = find_data([source], 0)
    before = found.fingerprint
    found.sources = [replace(source, **change)]
    assert found.fingerprint != before


def test_kept_codes_are_bounded(make_loader, monkeypatch):
    monkeypatch.setattr(recordings, "CACHE_BYTES", 0)
    loader = make_loader()
    take(loader)
    assert not loader.encoder._cache


def test_threads_are_gone_when_the_iterator_is_closed(make_loader):
    before = set(threading.enumerate())
    iterator = iter(make_loader(endless=True))
    next(iterator)
    started = set(threading.enumerate()) - before
    iterator.close()
    assert {"data loader", "reader"} <= {thread.name for thread in started}
    assert not any(thread.is_alive() for thread in started)


def test_threads_are_gone_at_the_end_of_the_data(make_loader):
    before = set(threading.enumerate())
    list(make_loader())
    waiting = ("data loader", "decode", "reader")
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith(waiting)]


def test_an_error_while_preparing_reaches_the_trainer(make_loader, monkeypatch):
    loader = make_loader(endless=True)
    monkeypatch.setattr(loader, "collator", lambda rows, last: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(loader, 1)
