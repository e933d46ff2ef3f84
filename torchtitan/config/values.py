"""Read the values of files and command lines, and check their types."""

import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan.config.keys import show

# The origin of a value that no file gave.
COMMAND_LINE = "on the command line"


def without_none(kind: Any) -> tuple[Any, bool]:
    """`int | None` to (int, True), `int` to (int, False)."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    return next(k for k in get_args(kind) if k is not type(None)), True


def expected(kind: Any) -> str:
    """The values of a type, in words."""
    kind, optional = without_none(kind)
    if get_origin(kind) is Literal:
        said = "one of " + ", ".join(show(choice) for choice in get_args(kind))
    elif get_origin(kind) in (list, tuple):
        said = "a list of names"
    else:
        said = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    return said + (" or none" if optional else "")


def typed(kind: Any, value: Any) -> Any:
    """`value` as `kind`. It only converts int to float, "a,b" to a list, and "" to none. Raises ValueError."""
    kind, optional = without_none(kind)
    if optional and (value is None or value == ""):
        return None
    if get_origin(kind) is Literal:
        ok = isinstance(value, str) and value in get_args(kind)
    elif get_origin(kind) in (list, tuple):
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
    """A text of the command line as `kind`. Raises ValueError."""
    plain, optional = without_none(kind)
    if optional and text.lower() == "none":
        return None
    if plain is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if text and plain in (int, float):
        return plain(text)
    return text
