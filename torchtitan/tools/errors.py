"""Errors of users, as one sentence."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input that cannot be used. The message is one clear sentence for the user."""


class ConfigError(UserError):
    """A setting that cannot be used."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop; the type of the error if the message is empty."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0].rstrip(". ") if text else type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of an error's message; the error's kind where it has none."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command-line program: a :class:`UserError` becomes one line on stderr and exit code 2.

    Any other exception is a bug and keeps its stack trace; Ctrl-C exits with 130.
    """
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
