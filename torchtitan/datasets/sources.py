"""From settings to the files of data sets.

A ``[[training.source]]`` table describes a data set, or changes a built-in one of hf_dataset.py
(:func:`sources_from_config`). :func:`find_files` lists its files, local or on the hub.
:mod:`torchtitan.datasets.readers` reads them.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import quote

from torchtitan.config.job_config import Training, Validation
from torchtitan.config.keys import said
from torchtitan.config.values import COMMAND_LINE, expected, typed
from torchtitan.datasets.hf_dataset import ALIASES, SOURCES, Source, find_source
from torchtitan.tools.errors import ConfigError, UserError, first_line
from torchtitan.tools.hub import HUB_NAME
from torchtitan.tools.logging import logger
from torchtitan.tools.retries import may_pass, retried

# The keys of a [[training.source]] table, with their types and defaults.
SOURCE_TYPES: dict[str, Any] = {
    name: kind for name, kind in get_type_hints(Source).items() if name not in ("hours", "licence", "download")
} | {"name": str | None, "path": str | None}
SOURCE_DEFAULTS: dict[str, Any] = {
    f.name: None if f.default is MISSING else f.default for f in fields(Source) if f.name in SOURCE_TYPES
}
# Extensions of files that libsndfile reads.
AUDIO_EXTENSIONS = frozenset("wav flac ogg oga opus mp3 aiff aif aifc au snd caf w64 rf64 sph nist voc wve".split())
MANIFEST_EXTENSIONS = frozenset("jsonl json csv tsv".split())
# Names of a table that lists the recordings of its own folder.
MANIFEST_NAMES = frozenset(f"metadata.{extension}" for extension in ("jsonl", "csv", "tsv"))
# Names of manifests in lhotse's recipes: cuts.jsonl.gz, librispeech_recordings_train-clean-100.jsonl.gz.
_LHOTSE = re.compile(r"(?:.*[-._])?(cuts|recordings|supervisions)(?:[-._].*)?\.jsonl(?:\.gz)?")
# Folders that repeat a Kaldi folder in parts.
_KALDI_PARTS = re.compile(r"(?:^|/)split\d+(?:utt)?/")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".gz")
# Names of held-out splits. Training uses them only if the settings name them.
HELD_OUT = frozenset("test validation valid val dev eval".split())
WHAT_THEY_ARE = {
    "parquet": "parquet files",
    "arrow": "Arrow files",
    "audio": "audio files",
    "manifest": "manifests",
    "kaldi": "Kaldi folders",
    "lhotse": "lhotse manifests",
    "webdataset": "tars",
    "codes": "code shards",
}


def sources_from_config(part: Any, what: str = "training") -> list[Source]:
    """The sources of a section of the settings.

    Args:
        part: ``config.training`` or ``config.validation``. Its ``source`` tables count if there are any; otherwise its
            built-in ``dataset``, at ``dataset_path`` if that is given.
        what: name of the section, for messages.

    Raises:
        UserError: a table is wrong, or the data set is unknown.
    """
    if not part.source:
        source = find_source(part.dataset)
        return [_at(source, part.dataset_path) if part.dataset_path else _at_home(source)]
    tables = read_sources(f"{what}.source", part.source)
    return [_from_table(table, f"[[{what}.source]] {number}") for number, table in enumerate(tables, start=1)]


def read_sources(key: str, tables: Any, origin: str = "") -> list[dict[str, Any]]:
    """The tables of `key` ("training.source") with names and types checked. Raises `ConfigError`."""
    after = f" {origin}" if origin else ""
    if origin == COMMAND_LINE:
        raise ConfigError(f"{key}{after}: only a TOML file can have data sources; write [[{key}]] tables.")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{key}{after}: each data set needs its own table, which begins with [[{key}]].")
    return [_read_source(f"[[{key}]] {number}{after}", table) for number, table in enumerate(tables, start=1)]


def _read_source(where: str, table: dict[str, Any]) -> dict[str, Any]:
    values = {}
    for name, value in table.items():
        if name not in SOURCE_TYPES:
            close = difflib.get_close_matches(name, SOURCE_TYPES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"its keys are {', '.join(SOURCE_TYPES)}."
            raise ConfigError(f"{where}: a data source has no key {name}; {hint}")
        try:
            values[name] = typed(SOURCE_TYPES[name], value)
        except ValueError:
            raise ConfigError(f"{where}: {said(name, value)}: expected {expected(SOURCE_TYPES[name])}.") from None
    return {name: value for name, value in values.items() if value is not None}


def _from_table(table: dict[str, Any], where: str) -> Source:
    """The source of a checked table. A built-in data set of its name gives the defaults."""
    name, path = table.get("name"), table.get("path")
    if name in SOURCES or name in ALIASES:
        source = _at(find_source(name), path) if path or "revision" in table else _at_home(find_source(name))
        if "split" in table and "files" not in table:
            # The built-in patterns are for another split. Folders that repeat other files stay excluded.
            kept = tuple(word for word in source.exclude if word not in HELD_OUT)
            source = replace(source, files=(), exclude=kept)
    elif path is None:
        known = ", ".join(sorted([*SOURCES, *ALIASES]))
        said = f"name = {name!r} is not a built-in data set ({known}), so path" if name else "path"
        raise ConfigError(f"{where}: {said} must say where the data are.")
    else:
        source = Source(name=name or (Path(path).expanduser().resolve().name if _is_local(path) else path), path=path)
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items() if key != "name"}
    source = replace(source, **values)
    if "revision" in table and _is_local(source.path):
        raise ConfigError(
            f"{where}: revision = {source.revision!r} needs a hub name, but path = {source.path!r} is local."
        )
    return source


def _at(source: Source, path: str | None) -> Source:
    """A built-in source at another path: a folder of its layout, a folder of its codes, or a file of any format."""
    if not path:
        return source
    place = Path(path).expanduser()
    if place.is_file():
        return replace(source, path=path, format="auto")
    if place.is_dir() and any(place.glob("codes-*.arrow")):
        return replace(source, path=path, format="codes", files=(), exclude=())
    return replace(source, path=path)


def _at_home(source: Source) -> Source:
    """A built-in source of the hub, read from ./data/NAME if its files are there, as the README downloads them."""
    if _is_local(source.path):
        return source
    for name in dict.fromkeys((source.name, source.path.rsplit("/", 1)[-1])):
        place = f"./data/{name}"
        if os.path.isdir(place):
            local = _at(source, place)
            try:
                find_files(local)
            except UserError as error:
                logger.warning("%s is read from the hub (%s)", source.name, first_line(error))
                continue
            logger.info("%s is read from %s", source.name, place)
            return local
    return source


def _is_local(path: str) -> bool:
    """Whether a path is local. It is a hub name if it has the form ``owner/name`` and does not exist locally."""
    return os.path.exists(os.path.expanduser(path)) or not HUB_NAME.fullmatch(path)


def check_place(source: Source) -> None:
    """Refuse a source whose local folder or file does not exist. Hub names are not checked here.

    Raises:
        UserError: the folder is missing. For a built-in data set, the message says how to download it.
    """
    if _is_local(source.path) and not os.path.exists(os.path.expanduser(source.path)):
        hint = f"; for {source.name}, {source.download}" if source.download else ""
        if "/" not in source.path:  # the name of a built-in data set, perhaps
            hint = f", and the built-in data sets are {', '.join(sorted([*SOURCES, *ALIASES]))}"
        raise UserError(f"{source.path}: there is no such data set folder{hint}.")


def check_tables(section: str, tables: list[dict[str, Any]], dataset_path: str | None) -> None:
    """Refuse source tables that contradict each other, themselves or other settings.

    Raises:
        ConfigError: what is wrong.
    """
    key = f"{section}.source"
    if tables and dataset_path is not None:
        raise ConfigError(
            f"{said(f'{section}.dataset_path', dataset_path)}: the [[{key}]] tables say where the data are, so "
            "it must not be set."
        )
    for number, table in enumerate(tables, start=1):
        where = f"[[{key}]] {number}"
        for name in ("weight", "max_seconds"):
            if table.get(name, 1) <= 0:
                raise ConfigError(f"{where}: {said(name, table[name])}: it must be above 0.")
        if table.get("min_seconds", 0) < 0:
            raise ConfigError(f"{where}: {said('min_seconds', table['min_seconds'])}: it must be at least 0.")
        if table.get("min_seconds", 0) > table.get("max_seconds", math.inf):
            raise ConfigError(
                f"{where}: {said('min_seconds', table['min_seconds'])}: it is above max_seconds = "
                f"{table['max_seconds']}, so no recording would be left."
            )
        for name in ("name", "path", "audio", "text", "id"):
            if not table.get(name, "x").strip():
                raise ConfigError(f"{where}: {said(name, table[name])}: it must not be empty.")
        if "name" not in table and "path" not in table:
            raise ConfigError(f"{where}: path must say where the data are.")
    weighted = sum("weight" in table for table in tables)
    if 0 < weighted < len(tables):
        missing = next(number for number, table in enumerate(tables, start=1) if "weight" not in table)
        raise ConfigError(f"[[{key}]] {missing}: weight is missing; either all tables have a weight or none.")


def check_places(section: str, part: Training | Validation) -> None:
    """Check that the paths in the source tables of a section exist, or are hub names.

    Raises:
        ConfigError: a path is neither.
    """
    if not part.source:
        return
    for number, source in enumerate(sources_from_config(part, section), start=1):
        table = part.source[number - 1]
        if "path" not in table:
            check_place(source)
        elif not os.path.exists(os.path.expanduser(source.path)) and not HUB_NAME.fullmatch(source.path):
            raise ConfigError(
                f"[[{section}.source]] {number}: {said('path', source.path)}: this is neither an existing folder or "
                "file nor a hub name (owner/name)."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def lhotse_name(name: str) -> str | None:
    """The kind of a lhotse manifest by its file name: cuts, recordings or supervisions; None for other files."""
    found = _LHOTSE.fullmatch(name)
    return found[1] if found else None


def kind_of(path: str, alone: bool = False) -> str | None:
    """The format of a file by its name; None if it holds no data.

    Args:
        alone: the path of the source is this file, so any table is a manifest. In a folder only ``metadata.*`` is.
    """
    name = path.rsplit("/", 1)[-1].lower()
    extension = name.rsplit(".", 1)[-1] if "." in name else ""
    if extension == "parquet":
        return "parquet"
    if extension == "arrow":
        # cache-* are intermediate files of the datasets library.
        return "codes" if name.startswith("codes-") else None if name.startswith("cache-") and not alone else "arrow"
    if extension == "tar":
        return "webdataset"
    if name == "wav.scp":
        return None if _KALDI_PARTS.search(path) and not alone else "kaldi"
    if word := lhotse_name(name):
        return None if word == "supervisions" else "lhotse"
    if name in MANIFEST_NAMES or (alone and extension in MANIFEST_EXTENSIONS):
        return "manifest"
    return "audio" if extension in AUDIO_EXTENSIONS else None


def find_files(source: Source) -> list[str]:
    """Sorted paths (local, or ``hf://`` for a hub name) of a data set's files, all of one format.

    Without patterns (``files``), only files of split ``train`` are used if the names contain splits.

    Raises:
        UserError: no such folder or repository, no matching file, or files of several formats.
    """
    folder = Path(source.path).expanduser()
    if folder.is_file():
        return [_single_file(source, str(folder))]
    if folder.is_dir():
        found, prefix = _walk(str(folder)), f"{folder}/"
        # The folder may be an inner one of the layout: librispeech_asr/clean, or librispeech_asr/clean/test.
        inside = f"{folder.resolve().parent.name}/{folder.resolve().name}/"
    elif _is_local(source.path):
        check_place(source)
        raise UserError(f"{source.path}: this is neither a file nor a folder.")
    else:
        found, prefix, inside = *_find_on_hub(source.path, source.revision), ""
    return [prefix + path for path in _select(source, found, inside)]


def _single_file(source: Source, path: str) -> str:
    kind = source.format if source.format != "auto" else kind_of(path, alone=True)
    if kind in (None, "lhotse") and lhotse_name(path.rsplit("/", 1)[-1]) == "supervisions":
        raise UserError(f"{path}: these are supervisions; give the file of recordings beside it, or the folder.")
    if path.lower().endswith(COMPRESSED) and kind != "lhotse":
        raise UserError(f"{path}: compressed files are not read; unpack the file and give the folder.")
    if kind is None:
        raise UserError(
            f"{path}: this kind of file is not read (only .parquet, .arrow, .tar, .jsonl, .json, .csv, .tsv, wav.scp "
            "and audio files are)."
        )
    return path


def _walk(folder: str) -> list[str]:
    """Paths of all files below a folder, relative to it. It follows links to folders, except links back up."""
    found = []
    for top, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(top) + os.sep
        folders[:] = [f for f in folders if not here.startswith(os.path.realpath(os.path.join(top, f)) + os.sep)]
        below = os.path.relpath(top, folder)
        lead = "" if below == "." else f"{below}/"
        found += [lead + name for name in names]
    return found


def _find_on_hub(repository: str, revision: str | None) -> tuple[list[str], str]:
    """Paths of all files of a repository, relative to it, and the prefix of their full paths."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    root = f"datasets/{repository}" + (f"@{quote(revision, safe='')}" if revision else "")
    try:
        listed: Iterable[str] = retried(repository, lambda: HfFileSystem().find(root))  # type: ignore[assignment]
        # The hub may quote the revision in another way.
        return [re.sub(rf"datasets/{re.escape(repository)}(@[^/]*)?/", "", path, count=1) for path in listed], (
            f"hf://{root}/"
        )
    except Exception as error:
        if not (isinstance(error, (OSError, HfHubHTTPError)) or may_pass(error)):
            raise
        raise UserError(f"{repository}: the data set cannot be read from the hub ({first_line(error)}).") from None


def _select(source: Source, found: Iterable[str], inside: str) -> list[str]:
    """The sorted paths of the source's data among ``found``; ``inside`` as in :func:`_fitting`."""
    ruled_out = set(source.exclude)
    fits = _fitting(source.files, inside)
    any_table = source.format == "manifest" or any(file.endswith(tuple(MANIFEST_EXTENSIONS)) for file in source.files)
    by_kind: dict[str, list[str]] = {}
    compressed = []
    for path in found:
        parts = path.split("/")
        if any(part.startswith(".") or _first_word(part) in ruled_out for part in parts) or not fits(path):
            continue
        kind = source.format if source.format != "auto" and source.files else kind_of(path, any_table)
        if kind:
            by_kind.setdefault(kind, []).append(path)
        elif path.lower().endswith(COMPRESSED):
            compressed.append(path)
    if source.format != "auto":
        by_kind = {kind: paths for kind, paths in by_kind.items() if kind == source.format}
    elif by_kind.keys() & {"manifest", "kaldi", "lhotse"}:  # they list the recordings beside them
        by_kind.pop("audio", None)
    cuts = [path for path in by_kind.get("lhotse", []) if lhotse_name(path.rsplit("/", 1)[-1]) == "cuts"]
    if cuts and not (source.files and source.format == "lhotse"):
        by_kind["lhotse"] = cuts  # cuts refer to the recordings beside them
    by_kind = {kind: _of_split(source, paths, kind, inside) for kind, paths in by_kind.items()}
    by_kind = {kind: paths for kind, paths in by_kind.items() if paths}
    if len(by_kind) > 1:
        what = " and ".join(WHAT_THEY_ARE[kind] for kind in sorted(by_kind))
        choices = " or ".join(f'"{kind}"' for kind in sorted(by_kind))
        raise UserError(f"{source.path}: {what} are there; choose one kind with format = {choices}.")
    if by_kind:
        return sorted(next(iter(by_kind.values())))
    if compressed:
        raise UserError(f"{source.path}: {min(compressed)} is compressed; unpack it first.")
    limits = "".join(
        f" of {key} {value!r}" for key, value in (("subset", source.subset), ("split", source.split)) if value
    )
    if source.files:
        raise UserError(
            f"{source.path}: no file{limits} there matches {' or '.join(source.files)} (describe data of another "
            "layout in a [[training.source]] table)."
        )
    anything = "parquet or Arrow files, tars, manifests (metadata.jsonl, wav.scp, cuts.jsonl) or audio files"
    what = WHAT_THEY_ARE.get(source.format, anything)
    raise UserError(f"{source.path}: there are no {what}{limits}.")


def _fitting(patterns: tuple[str, ...], inside: str) -> Callable[[str], bool]:
    """A test whether a path, relative to a root ``inside`` (``parent/name/``), matches one of the patterns."""
    if not patterns:
        return lambda path: True
    # "**/" matches any number of folders, "*" a name or a part of it.
    parts = [re.escape(p).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*") for p in patterns]
    fits = re.compile("|".join(f"(?:{part})" for part in parts)).fullmatch
    parent, name, _ = inside.split("/") if inside else ("", "", "")
    leads = ("", f"{name}/", f"{parent}/{name}/") if inside else ("",)
    return lambda path: any(fits(lead + path) for lead in leads)


def _of_split(source: Source, paths: list[str], kind: str, inside: str) -> list[str]:
    """The paths (all of one kind) of the source's subset and split."""
    # The name of a recording says nothing about its split: it may be called test.wav.
    by_name = kind != "audio"
    if source.subset:
        paths = _named(paths, source.subset, by_name, inside)
    if source.split:
        held_out = frozenset() if _first_word(source.split) in HELD_OUT else HELD_OUT
        paths = [path for path in paths if not _splits(path, by_name) & held_out]
        return _named(paths, source.split, by_name, inside)
    if source.files:
        return paths
    told = {path: _splits(path, by_name) for path in paths}
    if any("train" in splits for splits in told.values()):
        return [path for path, splits in told.items() if "train" in splits and not splits & HELD_OUT]
    names = sorted(set().union(*told.values()))
    if names:
        raise UserError(
            f"{source.path}: there are only files of split {' and '.join(names)}, none of train; "
            f'choose one with split = "{names[0]}".'
        )
    return paths


def _first_word(name: str) -> str:
    return re.split(r"[-._]", name, maxsplit=1)[0]


def _splits(path: str, by_name: bool) -> set[str]:
    """Names of splits in the folders of a path, and with ``by_name`` in the name of its file."""
    *folders, name = path.split("/")
    words = {_first_word(folder) for folder in folders}
    if by_name:
        words.update(re.split(r"[-._]", name)[:-1])
    return words & {"train", *HELD_OUT}


def _named(paths: list[str], name: str, by_name: bool, inside: str) -> list[str]:
    """Paths with a folder whose name begins with ``name``, or with a file whose name contains it.

    If the root already is such a folder, all paths count.
    """
    word = re.compile(rf"(?:^|[-._]){re.escape(name)}(?:[-._]|$)")
    starts = re.compile(rf"{re.escape(name)}(?:[-._]|$)")

    def fits(path: str) -> bool:
        *folders, file = path.split("/")
        return any(starts.match(folder) for folder in folders) or (by_name and bool(word.search(file)))

    return [path for path in paths if fits(path)] or (
        paths if any(starts.match(part) for part in inside.split("/") if part) else []
    )
