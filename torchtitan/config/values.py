"""Values as files and command lines write them, checked against the type of their key."""

import difflib
import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan.config.keys import SOURCE_TYPES, said, show
from torchtitan.tools.errors import ConfigError

# Where a value is from that no file gave.
COMMAND_LINE = "on the command line"


def without_none(kind: Any) -> tuple[Any, bool]:
    """`int | None` to (int, True), `int` to (int, False)."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    return next(k for k in get_args(kind) if k is not type(None)), True


def expected(kind: Any) -> str:
    kind, optional = without_none(kind)
    if get_origin(kind) is Literal:
        said = "one of " + ", ".join(show(choice) for choice in get_args(kind))
    elif get_origin(kind) is list:
        said = "a list of names"
    else:
        said = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    return said + (" or none" if optional else "")


def typed(kind: Any, value: Any) -> Any:
    """`value` as `kind`. Raises ValueError. The only conversions: int to float, "a,b" to a list, "" to none."""
    kind, optional = without_none(kind)
    if optional and (value is None or value == ""):
        return None
    if get_origin(kind) is Literal:
        ok = isinstance(value, str) and value in get_args(kind)
    elif get_origin(kind) is list:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        ok = isinstance(value, list) and all(isinstance(item, str) for item in value)
        value = list(value) if ok else value
    elif kind is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        value = float(value) if ok else value
    else:
        ok = type(value) is kind
    if not ok:
        raise ValueError(value)
    return value


def from_text(kind: Any, text: str) -> Any:
    """What a command line says, as `kind`. Raises ValueError."""
    plain, optional = without_none(kind)
    if optional and text.lower() == "none":
        return None
    if plain is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if text and plain in (int, float):
        return plain(text)
    return text


def read_sources(key: str, tables: Any, origin: str = "") -> list[dict[str, Any]]:
    """The tables of `key` ("training.source") with names and types checked; each has the keys that were given.

    Raises `ConfigError`.
    """
    after = f" {origin}" if origin else ""
    if origin == COMMAND_LINE:
        raise ConfigError(f"{key}{after}: data sources cannot be given here; write [[{key}]] tables in a TOML file.")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{key}{after}: each data set is a table of its own, which begins with [[{key}]].")
    return [_read_source(f"[[{key}]] {number}{after}", table) for number, table in enumerate(tables, start=1)]


def _read_source(where: str, table: dict[str, Any]) -> dict[str, Any]:
    values = {}
    for name, value in table.items():
        if name not in SOURCE_TYPES:
            close = difflib.get_close_matches(name, SOURCE_TYPES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(SOURCE_TYPES)}."
            raise ConfigError(f"{where}: a data source has no key {name}; {hint}")
        try:
            values[name] = typed(SOURCE_TYPES[name], value)
        except ValueError:
            raise ConfigError(f"{where}: {said(name, value)}: expected {expected(SOURCE_TYPES[name])}.") from None
    return {name: value for name, value in values.items() if value is not None}
