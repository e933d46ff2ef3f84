"""Data sources: what is built in, what tables say, and which files are meant."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchtitan.datasets.hf_dataset import ALIASES, SOURCES, Source, find_source
from torchtitan.datasets.sources import HELD_OUT, SOURCE_TYPES, check_place, find_files, kind_of, sources_from_config
from torchtitan.tools.errors import ConfigError, UserError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(source: Source | str, folder: Path, **changes) -> list[str]:
    source = find_source(source) if isinstance(source, str) else source
    files = find_files(replace(source, path=str(folder), **changes))
    return [str(Path(path).relative_to(folder)) for path in files]


def plain(folder: Path, **facts) -> list[str]:
    """Files of a folder that only its path describes."""
    return found(Source("mine", str(folder), **facts), folder)


def refused(source: Source | str, folder: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        found(source, folder, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def described(*tables: dict, what: str = "training", dataset: str = "peoples_speech", path: str | None = None):
    part = SimpleNamespace(source=list(tables), dataset=dataset, dataset_path=path)
    return sources_from_config(part, what)


# --- the built-in ones


def test_every_entry_is_complete():
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.files and source.format != "auto"
        assert not source.path.startswith("./") or source.download
        assert name == "mixture" or (source.hours and source.licence)
    assert set(ALIASES.values()) <= set(SOURCES)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("all", "mixture"),
        ("librispeech_asr", "librispeech_asr_test"),
        ("librispeech", "librispeech_960"),
    ],
)
def test_aliases(alias, name):
    assert find_source(alias) is find_source(name)


def test_unknown_data_set_lists_the_known():
    with pytest.raises(UserError, match=r"unknown data set 'speach' \(known: all, .*peoples_speech"):
        find_source("speach")


def test_peoples_speech_is_its_train_files(tmp_path):
    train = ["clean/train-00000-of-00002.parquet", "clean/train-00001-of-00002.parquet", "dirty/train-0.parquet"]
    other = ["clean/validation-00000.parquet", "clean/test-00000.parquet", "microset/train-0.parquet", "README.md"]
    held_out = ["validation/train-0.parquet", "test/train-0.parquet", ".cache/clean/train-1.parquet"]
    assert found("peoples_speech", touch(tmp_path, *train, *other, *held_out)) == train
    assert found("peoples_speech", tmp_path, subset="dirty") == train[2:]


def test_librispeech_train_and_test_are_apart(tmp_path):
    train = ["clean/train.100/0000.parquet", "other/train.500/0000.parquet"]
    test, other = ["clean/test/0000.parquet"], ["clean/validation/0000.parquet", "all/train.clean.100/0000.parquet"]
    touch(tmp_path, *train, *test, *other)
    assert found("librispeech_960", tmp_path) == train
    assert found("librispeech_asr_train", tmp_path) == train[1:], "train.other.500, as in the published recipe"
    assert found("librispeech_asr_test", tmp_path) == test


def test_mixture_is_all_train_files_below_a_folder(tmp_path):
    train = ["a/clean/train-0.parquet", "b/en/train/0000.parquet", "c/train.360/0.parquet"]
    touch(tmp_path, *train, "a/clean/test-0.parquet", "b/en/dev/train-0.parquet", "c/validation/train-0.parquet")
    assert found("mixture", tmp_path) == train


@pytest.mark.parametrize(
    ("name", "train", "others"),
    [
        (
            "libri_light",
            ["large/1/book/a.flac", "medium/2/book/b.flac", "small/100/sea_fairies_0812_librivox/c.flac"],
            ["duplicate/1/a.flac", "small/100/book/c.json", "abx/dev-clean/a.flac"],
        ),
        (
            "emilia",
            ["Emilia/EN/EN-B000000.tar"],
            ["Emilia/DE/DE-B000000.tar", "Emilia-YODAS/EN/EN-B000000.tar", "README.md"],
        ),
        ("emilia_yodas", ["Emilia-YODAS/EN/EN-B000000.tar"], ["Emilia/EN/EN-B000000.tar"]),
        (
            "voxpopuli",
            ["data/en/train/train_part_0/a.wav"],
            ["data/en/test/test_part_0/b.wav", "data/de/train/train_part_0/c.wav", "data/en/train/train_part_0.tar.gz"],
        ),
        ("mls_english", ["data/train-00000-of-01416.parquet"], ["data/dev-0.parquet", "data/test-0.parquet"]),
        (
            "gigaspeech",
            ["data/audio/l_files_additional/l_chunks_0000/a.wav", "data/audio/xs_files/xs_chunks_0000/b.wav"],
            ["data/audio/dev_files/dev_chunks_0000/c.wav", "data/audio/test_files/test_chunks_0000/d.wav"],
        ),
    ],
)
def test_public_layouts(tmp_path, name, train, others):
    assert found(name, touch(tmp_path, *train, *others)) == train


def test_folders_inside_of_the_layout_links_and_whole_words(tmp_path):
    touch(tmp_path, "elsewhere/clean/test/0000.parquet", "data/latest/train-0.parquet", "data/test/train-0.parquet")
    for root in ("elsewhere", "elsewhere/clean", "elsewhere/clean/test"):
        assert [Path(name).name for name in found("librispeech_asr_test", tmp_path / root)] == ["0000.parquet"]
    touch(tmp_path, "disk/train-1.parquet", "light/small/1/a.flac")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "disk")
    assert found("mixture", tmp_path / "data") == ["latest/train-0.parquet", "linked/train-1.parquet"]
    assert found("libri_light", tmp_path / "light" / "small") == ["1/a.flac"]


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "plain"])
def test_missing_folder(name):
    source = replace(find_source("peoples_speech"), path=name)
    for check in (find_files, check_place):
        with pytest.raises(UserError, match=f"{name}: there is no such data set folder"):
            check(source)


@pytest.mark.parametrize("name", ["libri_light", "voxpopuli", "gigaspeech"])
def test_what_is_not_on_the_hub_says_how_to_get_it(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"\./data/{name}: there is no such .* for {name}, .*unpack"):
        find_files(find_source(name))


def test_folder_without_a_fitting_file(tmp_path):
    touch(tmp_path, "clean/validation-0.parquet")
    assert refused("peoples_speech", tmp_path).startswith(f"{tmp_path}: no file there matches **/train-*.parquet")


# --- any other folder


def test_single_file_is_taken_as_it_is(tmp_path):
    for name in ("a.parquet", "a.arrow", "a.tar", "a.jsonl", "a.csv", "a.tsv", "a.json", "a.flac", "test.parquet"):
        touch(tmp_path, name)
        path = str(tmp_path / name)
        assert find_files(Source("mine", path)) == [path]
        assert find_files(described({"name": "peoples_speech", "path": path})[0]) == [path]
        assert find_files(described(path=path)[0]) == [path]
    touch(tmp_path, "notes.txt", "a.tar.gz")
    for name, said in (
        ("notes.txt", "this kind of file is not read"),
        ("a.tar.gz", "compressed files are not read; unpack"),
    ):
        with pytest.raises(UserError, match=said):
            find_files(Source("mine", str(tmp_path / name)))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["codes-00000.arrow", "codes-00001.arrow", "info.json"], "codes"),
        (["a/0.parquet", "b/1.parquet", "README.md"], "parquet"),
        (["data-00000-of-00001.arrow", "dataset_info.json", "state.json", "cache-12ab.arrow"], "arrow"),
        (["000.tar", "001.tar"], "webdataset"),
        (["metadata.jsonl", "a.flac", "b/c.wav"], "manifest"),
        (["a/metadata.csv", "a/b.mp3"], "manifest"),
        (["train/wav.scp", "train/text", "train/segments", "a.flac", "train/split2/1/wav.scp"], "kaldi"),
        (["cuts.jsonl.gz", "x-cuts_raw.jsonl", "a.flac"], "lhotse"),
        (["x_recordings_1.jsonl.gz", "x_supervisions_1.jsonl.gz", "b.recordings.jsonl", "a.wav"], "lhotse"),
        (["a.WAV", "b.opus", "c/d.mp3", "notes.txt", "a.json"], "audio"),
    ],
)
def test_the_format_is_what_lies_there(tmp_path, names, kind):
    files = plain(touch(tmp_path, *names))
    assert files == sorted(name for name in names if kind_of(name) == kind)
    assert files and plain(tmp_path, format=kind) == files


def test_two_formats_need_a_word(tmp_path):
    touch(tmp_path, "a.parquet", "b.flac", "c.tar.gz")
    message = refused(Source("mine", str(tmp_path)), tmp_path)
    assert all(fact in message for fact in ("audio files and parquet files", 'format = "audio"', '"parquet"')), message
    assert plain(tmp_path, format="audio") == ["b.flac"]
    assert plain(tmp_path, format="parquet") == ["a.parquet"]
    assert plain(tmp_path, files=("*.flac",)) == ["b.flac"]
    assert refused(Source("mine", str(tmp_path)), tmp_path, format="webdataset").startswith(str(tmp_path))


def test_compressed_tars_ask_to_be_unpacked(tmp_path):
    touch(tmp_path, "train/a.tar.gz", "train/b.tgz")
    assert "train/a.tar.gz is compressed; unpack it first" in refused(Source("mine", str(tmp_path)), tmp_path)


def test_an_empty_folder(tmp_path):
    assert refused(Source("mine", str(tmp_path)), tmp_path).startswith(f"{tmp_path}: there are no ")
    assert "no tars of split 'train'" in refused(
        Source("mine", str(tmp_path)), tmp_path, format="webdataset", split="train"
    )


@pytest.mark.parametrize("held_out", sorted(HELD_OUT))
def test_without_a_split_it_is_train_if_the_names_tell(tmp_path, held_out):
    train = ["data/train-00000-of-00001.parquet", "en/set-train-00001.parquet", "en/train/0.parquet"]
    touch(tmp_path, *train, f"data/{held_out}-0.parquet", f"en/{held_out}/0.parquet", f"{held_out}/train-0.parquet")
    assert plain(tmp_path) == train
    touch(tmp_path / "other", f"{held_out}-0.parquet")
    assert f'split = "{held_out}"' in refused(Source("mine", ""), tmp_path / "other")


def test_without_splits_it_is_all_files(tmp_path):
    names = ["a/0.parquet", "b/latest-1.parquet", "trainer.parquet"]
    assert plain(touch(tmp_path, *names)) == names


def test_recordings_are_not_of_a_split_by_their_own_name(tmp_path):
    assert plain(touch(tmp_path / "a", "test.wav", "train.wav")) == ["test.wav", "train.wav"]
    names = ["dev-clean/1/2/a.flac", "train-clean-100/3/4/b.flac"]
    assert plain(touch(tmp_path / "b", *names)) == names[1:]
    assert plain(tmp_path / "b", split="dev-clean") == names[:1]
    assert plain(tmp_path / "b", split="dev") == names[:1]


@pytest.mark.parametrize(
    "layout",
    [
        "en/validation-00000-of-00001.parquet",
        "en/validation/0000.parquet",
        "data/en/validation/0.parquet",
        "en/set-validation.parquet",
        "en-validation-0.parquet",
        "en/validation.clean/0.parquet",
    ],
)
def test_subset_and_split_find_the_usual_layouts(tmp_path, layout):
    touch(tmp_path, layout, *(layout.replace("validation", "train"), layout.replace("en", "de", 1)))
    touch(tmp_path, layout.replace("validation", "prevalidation"))
    assert plain(tmp_path, subset="en", split="validation") == [layout]


def test_splits_of_any_name(tmp_path):
    names = ["9_hours-0.parquet", "train-0.parquet", "test/train-0.parquet"]
    touch(tmp_path, *names)
    assert plain(tmp_path, split="9_hours") == names[:1]
    assert plain(tmp_path, split="train") == names[1:2]


def test_the_root_may_be_the_subset_or_split_itself(tmp_path):
    touch(tmp_path, "en/train/0.parquet", "de/train/1.parquet")
    assert plain(tmp_path / "en" / "train", subset="en", split="train") == ["0.parquet"]
    assert "of subset 'de'" in refused(Source("mine", ""), tmp_path / "en", subset="de")


def test_patterns_and_exclusions(tmp_path):
    names = ["a/x-0.parquet", "a/x-1.parquet", "b/c/y-0.parquet", "skip/x-0.parquet", "skipped/x.parquet"]
    touch(tmp_path, *names)
    assert plain(tmp_path, exclude=("skip",)) == [*names[:3], names[4]]
    assert plain(tmp_path, files=("**/x-*.parquet",), exclude=("skip",)) == names[:2]
    assert plain(tmp_path, files=("a/*", "b/**/*.parquet")) == names[:3]
    assert plain(tmp_path, files=("a/*.parquet",), split="x") == names[:2]


def test_named_manifests(tmp_path):
    touch(tmp_path, "train.jsonl", "dev.jsonl", "a.flac", "dataset_info.json")
    assert plain(tmp_path, files=("*.jsonl",), split="train") == ["train.jsonl"]
    assert plain(tmp_path, format="manifest", files=("train.*",)) == ["train.jsonl"]


# --- the hub


class Hub:
    """Stands in for the hub's file system: a list of paths."""

    paths: list[str] = []  # noqa: RUF012
    error: Exception | None = None

    def find(self, root: str) -> list[str]:
        if self.error:
            raise self.error
        return [f"{root}/{path}" for path in self.paths]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfFileSystem", Hub)
    monkeypatch.setattr(Hub, "paths", ["README.md", "clean/train-0.parquet", "clean/test-0.parquet"])
    monkeypatch.setattr(Hub, "error", None)
    return monkeypatch


def test_files_on_the_hub(hub):
    assert find_files(find_source("peoples_speech")) == ["hf://datasets/MLCommons/peoples_speech/clean/train-0.parquet"]
    assert find_files(Source("mine", "owner/name")) == ["hf://datasets/owner/name/clean/train-0.parquet"]
    at = find_files(Source("mine", "owner/name", split="test", revision="refs/convert/parquet"))
    assert at == ["hf://datasets/owner/name@refs%2Fconvert%2Fparquet/clean/test-0.parquet"]


@pytest.mark.parametrize("name", ["peoples_speech", "librispeech_asr_test", "mls_english"])
@pytest.mark.parametrize("table", [False, True])
def test_a_named_data_set_is_read_from_its_usual_folder_if_it_lies_there(tmp_path, monkeypatch, caplog, name, table):
    files = {
        "peoples_speech": "data/peoples_speech/clean/train-0.parquet",
        "librispeech_asr_test": "data/librispeech_asr/clean/test/0000.parquet",
        "mls_english": "data/mls_eng/data/train-00000-of-01416.parquet",
    }
    monkeypatch.chdir(tmp_path)
    asked: tuple = ({"name": name},) if table else ()
    assert described(*asked, dataset=name) == [find_source(name)]
    (tmp_path / files[name]).parents[1].mkdir(parents=True)
    assert described(*asked, dataset=name) == [find_source(name)], "an empty folder is none"
    touch(tmp_path, files[name])
    (source,) = described(*asked, dataset=name)
    assert find_files(source) == [files[name]]
    if table:
        assert described({"name": name, "revision": "main"})[0].path == find_source(name).path


def test_a_failing_hub_is_one_sentence(hub):
    hub.setattr(Hub, "error", OSError("no route\nto host"))
    hub.setattr("torchtitan.tools.retries.FIRST_WAIT", 0.0)
    with pytest.raises(UserError, match=r"^owner/name: the data set cannot be read from the hub \(no route\)\.$"):
        find_files(Source("mine", "owner/name"))


# --- tables of a settings file


def test_without_tables_it_is_the_named_data_set(tmp_path):
    assert described(dataset="all") == [find_source("mixture")]
    (source,) = described(path=str(tmp_path))
    assert source == replace(find_source("peoples_speech"), path=str(tmp_path))
    with pytest.raises(UserError, match="unknown data set 'speach'"):
        described(dataset="speach")


def test_tables_describe_sources(tmp_path):
    table = {
        "name": "mine",
        "path": "owner/name",
        "format": "parquet",
        "subset": "en",
        "split": "train",
        "files": ["*.parquet"],
        "exclude": ["old"],
        "audio": "speech",
        "text": "words",
        "duration": "length_ms",
        "id": "key",
        "weight": 2,
        "min_seconds": 1,
        "max_seconds": 30.0,
        "revision": "v2",
    }
    assert set(table) == set(SOURCE_TYPES)
    (source,) = described(json.loads(json.dumps(table)))
    for key, value in table.items():
        assert getattr(source, key) == (tuple(value) if isinstance(value, list) else value)


def test_a_path_is_enough(tmp_path):
    folder = touch(tmp_path / "my speech", "a.wav")
    local, hub, named = described({"path": f"{folder}/"}, {"path": "owner/name"}, {"path": str(folder), "name": "x"})
    assert (local.name, hub.name, named.name) == ("my speech", "owner/name", "x")
    assert local.format == "auto" and find_files(named) == [str(folder / "a.wav")]


def test_the_facts_of_a_built_in_name_are_defaults(tmp_path):
    touch(
        tmp_path, "clean/train-0.parquet", "clean/train-old.parquet", "microset/train-0.parquet", "test/train-0.parquet"
    )
    (source,) = described({"name": "peoples_speech", "path": str(tmp_path), "text": "words"})
    assert source == replace(find_source("peoples_speech"), path=str(tmp_path), text="words")
    assert len(find_files(source)) == 2
    (source,) = described({"name": "peoples_speech", "path": str(tmp_path), "exclude": []})
    assert len(find_files(source)) == 4
    assert described({"name": "librispeech"}) == [find_source("librispeech_960")]


def test_another_split_of_a_built_in_data_set(tmp_path):
    touch(tmp_path, "clean/train-0.parquet", "clean/validation-0.parquet", "microset/validation-0.parquet")
    (source,) = described({"name": "peoples_speech", "path": str(tmp_path), "split": "validation"}, what="validation")
    assert [Path(path).relative_to(tmp_path).as_posix() for path in find_files(source)] == [
        "clean/validation-0.parquet"
    ]


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ({"name": "mine"}, ["name = 'mine' is not a built-in", "peoples_speech", "path"]),
        ({"split": "train"}, ["path must say where the data are"]),
        ({"path": ".", "revision": "main"}, ["revision = 'main' needs a hub name", "path = '.' is local"]),
        ({"path": ".", "fromat": "audio"}, ["no key fromat", "did you mean format?"]),
        ({"path": ".", "format": "mp3"}, ['format = "mp3"', '"webdataset"']),
        ({"path": ".", "weight": "much"}, ['weight = "much"', "a number"]),
    ],
)
def test_wrong_tables(table, parts):
    with pytest.raises(ConfigError) as caught:
        described({"path": "owner/name"}, table)
    message = str(caught.value)
    assert message.startswith("[[training.source]] 2: ") and "\n" not in message
    assert all(part in message for part in parts), message


def test_the_modules_are_cheap_to_import():
    code = (
        "import sys, torchtitan.datasets.readers\n"
        "print([name for name in ('torch', 'pyarrow', 'huggingface_hub', 'datasets') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
