"""Settings from a TOML file and the command line.

The command line (``--training.steps 20``) overrides the TOML file of ``--job.config_file``, which overrides the
defaults of the manual (torchtitan/config/job_config.py). Nothing is silently ignored: an unknown key is an error, and
so is a retired key with a value that would have an effect. An error is one sentence, raised as
:class:`~torchtitan.tools.errors.ConfigError`.
"""

import ast
import difflib
import inspect
import itertools
import json
import os
import sys
import textwrap
from dataclasses import asdict, field, fields, make_dataclass
from importlib import import_module
from typing import Any, Literal, get_origin

from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys import (
    DEFAULTS,
    RANGES,
    RENAMED,
    RETIRED,
    SCHEMA,
    SECTIONS,
    TABLES,
    TYPES,
    Schema,
    said,
    show,
)
from torchtitan.config.values import COMMAND_LINE, expected, from_text, typed, without_none
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.sources import SOURCE_DEFAULTS, SOURCE_TYPES, read_sources
from torchtitan.tools.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def extended(module: str) -> Schema:
    """Our settings, and those of another module's dataclass JobConfig (experimental.custom_args_module).

    The fields of that JobConfig are sections, which may have the names of ours. Keys that exist in both must be equal.

    Raises:
        ConfigError: the module cannot be imported, has no such class, has one of our keys with another type or default,
            or has a key of a type that files cannot have.
    """
    key = f"experimental.custom_args_module = {show(module)}"
    try:
        outside = import_module(module).JobConfig
        theirs, values = Schema.of(outside), asdict(outside())
    except ImportError as error:
        raise ConfigError(f"{key}: the module cannot be imported ({error}).") from None
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"{key}: it has no dataclass JobConfig of sections with defaults ({error}).") from None
    for name, kind in theirs.types.items():
        section, _, last = name.partition(".")
        if name in TYPES and (kind, values[section][last]) != (TYPES[name], DEFAULTS[name]):
            raise ConfigError(f"{key}: this project has the key {name} with another type or default.")
        plain = without_none(kind)[0]
        readable = plain in (bool, int, float, str, list[str]) or get_origin(plain) is Literal
        if name not in TYPES and not readable:
            raise ConfigError(f"{key}: a file cannot have the type of {name}.")
    sections: dict[str, type] = {}
    for name, cls in theirs.sections.items():
        ours = SECTIONS.get(name)
        sections[name] = (
            cls if ours is None or issubclass(cls, ours) else make_dataclass(cls.__name__, [], bases=(cls, ours))
        )
    added = [(name, cls, field(default_factory=cls)) for name, cls in sections.items()]
    return Schema.of(make_dataclass("JobConfig", added, bases=(JobConfig,)))


_RETIRED_SECTIONS = {key.split(".")[0] for key in RETIRED}


def _without_retired(values: dict[str, Any], origins: dict[str, str]) -> dict[str, Any]:
    """The values without retired keys, whose values must have no effect."""
    for key, retired in RETIRED.items():
        value = values.get(key, retired.accepted[0])
        written = [json.dumps(accepted) for accepted in retired.accepted]  # as on a command line
        if value not in (*retired.accepted, *written):
            allowed = " or ".join(show(accepted) for accepted in retired.accepted)
            raise ConfigError(
                f"{said(key, value, origins.get(key))}: {retired.reason}, so only {allowed} can be used here."
            )
    return {key: value for key, value in values.items() if key not in RETIRED}


def _other_name(key: str) -> str:
    return RENAMED.get(key) or next(old for old, new in RENAMED.items() if new == key)


def _read(key: str, value: Any, origin: str, schema: Schema) -> Any:
    kind = schema.types[RENAMED.get(key, key)]
    if kind == TABLES:
        return read_sources(key, value, origin)
    try:
        if origin == COMMAND_LINE:
            value = from_text(kind, value) if isinstance(value, str) else value
        return typed(kind, value)
    except ValueError:
        raise ConfigError(f"{said(key, value, origin)}: expected {expected(kind)}.") from None


def _unknown(key: str, origin: str, schema: Schema) -> ConfigError:
    section, _, name = key.partition(".")
    known = schema.sections
    problem = f"section {section} has no key {name}" if section in known else f"there is no section {section}"
    # A typing error, else the right name in the wrong section, else the most similar key.
    close = difflib.get_close_matches(key, schema.types, n=1, cutoff=0.8)
    close = close or [other for other in schema.types if other.split(".")[1] == name]
    close = close or difflib.get_close_matches(key, schema.types, n=1)
    hint = f"did you mean {' or '.join(close)}?" if close else "--help lists all keys."
    return ConfigError(f"{key} {origin}: {problem}; {hint}")


def _read_table(table: dict[str, Any], origin: str, schema: Schema) -> dict[str, Any]:
    """Turn the nested table of a TOML file into {"section.key": value}, with names and types checked."""
    values: dict[str, Any] = {}
    for section, keys in table.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"{said(section, keys, origin)}: it is outside of any [section].")
        if section not in schema.sections and section not in _RETIRED_SECTIONS:
            close = difflib.get_close_matches(section, schema.sections, n=1)
            hint = f"did you mean [{close[0]}]?" if close else f"the sections are {', '.join(schema.sections)}."
            raise ConfigError(f"[{section}] {origin}: there is no such section; {hint}")
        for name, value in keys.items():
            key = f"{section}.{name}"
            if key in RETIRED:
                values[key] = value
                continue
            own = RENAMED.get(key, key)
            if own not in schema.types:
                raise _unknown(key, origin, schema)
            value = _read(key, value, origin, schema)
            if values.setdefault(own, value) != value:
                raise ConfigError(
                    f"{said(key, value, origin)}: {_other_name(key)} is the same setting and has another value."
                )
    return values


def _read_toml(path: str) -> dict[str, Any]:
    """The nested table of a file, without checks."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{said('job.config_file', path)}: the file cannot be read ({error.strerror}).") from None
    except RecursionError:
        raise ConfigError(f"{said('job.config_file', path)}: the file is nested too deeply.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{said('job.config_file', path)}: the file is not valid TOML ({error}).") from None


def _option(argv: list[str], key: str) -> Any:
    """The value of one key on a command line whose other keys are not known yet; None if it is not set."""
    found = None
    for option, after in itertools.pairwise([*argv, "--"]):
        name, equals, text = option.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == key:
            found = text if equals else after
    return None if found is None or found.startswith("--") else found


def _read_command_line(argv: list[str], schema: Schema) -> dict[str, Any]:
    """Turn ["--training.steps", "20"] into {"training.steps": 20}, with names and types checked."""
    values: dict[str, Any] = {}
    rest = list(argv)

    def kind_of(key: str) -> Any:
        if key in RETIRED:
            return bool if isinstance(RETIRED[key].accepted[0], bool) else str
        return schema.types.get(RENAMED.get(key, key))

    while rest:
        option, equals, text = rest.pop(0).partition("=")
        if not option.startswith("--") or "." not in option:
            raise ConfigError(f"{option} {COMMAND_LINE}: settings are written as --section.key value.")
        key = option[2:].replace("-", "_")
        section, _, name = key.partition(".")
        positive = f"{section}.{name.removeprefix('no_')}"
        value: Any
        if kind_of(key) is None and name.startswith("no_") and kind_of(positive) is bool:
            if equals:
                raise ConfigError(f"{option}={text} {COMMAND_LINE}: {option} takes no value.")
            key, value = positive, False
        elif kind_of(key) is None:
            raise _unknown(key, COMMAND_LINE, schema)
        elif equals:
            value = text
        elif rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif kind_of(key) is bool:
            value = True
        else:
            raise ConfigError(f"{option} {COMMAND_LINE}: a value is missing, expected {expected(kind_of(key))}.")
        if key in RETIRED:
            values[key] = value
        else:
            values[RENAMED.get(key, key)] = _read(key, value, COMMAND_LINE, schema)
    return values


def _build(values: dict[str, Any], schema: Schema) -> JobConfig:
    """Turn {"section.key": value} into a config. Other keys have their defaults."""
    config = schema.config()
    for key, value in values.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    return config


class ConfigManager:
    """Reads a JobConfig from a TOML file and the command line."""

    def parse_args(self, argv: list[str] | None = None) -> JobConfig:
        """
        The settings of the command line `argv` (default: that of this process) and of its `--job.config_file`. Raises
        `ConfigError` for settings that no machine could run; `torchtitan.rules.check` checks the rest. `--help` prints
        the manual and exits.
        """
        argv = sys.argv[1:] if argv is None else argv
        if "--help" in argv or "-h" in argv:
            print(manual())
            raise SystemExit(0)
        path = _option(argv, "job.config_file")
        table = _read_toml(path) if path else {}
        schema, module = SCHEMA, _option(argv, "experimental.custom_args_module")
        if module is None and isinstance(section := table.get("experimental"), dict):
            module = section.get("custom_args_module")
        if module and isinstance(module, str):
            schema = extended(module)
        given = _read_command_line(argv, schema)
        from_file = _read_table(table, f"in {path}", schema)
        if "job.config_file" in from_file:
            raise ConfigError(f"job.config_file in {path}: only the command line can set it.")
        origins = dict.fromkeys(from_file, f"in {path}") | dict.fromkeys(given, COMMAND_LINE)
        config = _build(_without_retired(from_file | given, origins), schema)
        from torchtitan.rules import check_values  # imports torch, which --help does not need

        check_values(config, origins)
        return config


def to_dict(config: JobConfig) -> dict[str, Any]:
    """The settings as a nested dictionary for JSON, as checkpoints store it."""
    return asdict(config)


def from_dict(table: dict[str, Any]) -> JobConfig:
    """The reverse of `to_dict`. Missing keys have their defaults. Unknown keys raise `ConfigError`.

    Keys of experimental.custom_args_module are left out, because a checkpoint must not decide what is imported.
    """
    if table.get("experimental", {}).get("custom_args_module"):
        known = {section: keys for section, keys in table.items() if section in SECTIONS}
        table = {s: {key: keys[key] for key in keys if f"{s}.{key}" in TYPES} for s, keys in known.items()}
    values = _read_table(table, where := "in the saved config", SCHEMA)
    return _build(_without_retired(values, dict.fromkeys(values, where)), SCHEMA)


def run_name(config: JobConfig) -> str:
    """Name of the run and of its folder. Equal settings give equal names, so that a run finds its checkpoints."""
    if config.job.wandb_run_name:
        return config.job.wandb_run_name
    model = os.path.basename(os.path.abspath(config.model.name))
    dataset = config.training.dataset
    if config.training.source and dataset == DEFAULTS["training.dataset"]:
        # A run on other data must not resume from a run on the default data set.
        names = [
            str(table.get("name") or os.path.basename(table["path"].rstrip("/"))) for table in config.training.source
        ]
        dataset = "+".join(names)[:80]
    dataset = dataset.replace("/", "_")
    suffix = "" if config.model.pretrained else "-random"
    return f"{model}_{dataset}-q{config.model.num_quantizers}-s{config.training.seq_len}{suffix}"


# ---------------------------------------------------------------------------------------------------------------------
# --help
# ---------------------------------------------------------------------------------------------------------------------


def explanations(sections: dict[str, type] | None = None) -> dict[str, str]:
    """{"section.key": its explanation}, which is the text directly under each key in the source."""
    texts: dict[str, str] = {}
    for section, cls in (SECTIONS if sections is None else sections).items():
        (parsed,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(parsed, ast.ClassDef)
        for name, text in itertools.pairwise(parsed.body):
            if isinstance(name, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[f"{section}.{ast.unparse(name.target)}"] = inspect.cleandoc(str(text.value.value))
    return texts


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def manual() -> str:
    """All keys with their types, defaults, limits and explanations, as text."""
    texts = explanations()
    lines = [
        "usage: torchrun --nproc_per_node=N -m torchtitan.train --job.config_file FILE.toml [--section.key VALUE ...]",
        "",
        "The command line overrides the file, which overrides the defaults. --section.key sets a switch, and",
        "--section.no-key unsets it. A list is written a,b,c.",
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}] {inspect.getdoc(cls)}"]
        for name in (f.name for f in fields(cls)):
            key = f"{section}.{name}"
            if TYPES[key] == TABLES:
                lines += [f"  [[{key}]]  (tables in a file; default none)", *_paragraph(texts[key])]
                continue
            limits = [expected(TYPES[key])]
            if key in RANGES:
                limits.append(RANGES[key][1])
            limits.append(f"default {show(DEFAULTS[key])}")
            lines += [f"  --{key}  ({'; '.join(limits)})", *_paragraph(texts[key])]
    lines += ["", f"[[training.source]] and [[validation.source]] {inspect.getdoc(Source)}"]
    for key, text in explanations({"source": Source}).items():
        name = key.split(".")[1]
        limits = f"{expected(SOURCE_TYPES[name])}; default {show(SOURCE_DEFAULTS[name])}"
        lines += [f"  {name}  ({limits})", *_paragraph(text)]
    return "\n".join(lines)
