"""Recordings that cannot be used: named in one place, and too many of them end the work."""

from pathlib import Path

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

BAD_ROWS_FILE = "bad_rows.tsv"
# A few rows at the start prove nothing: from so many on, the share of the bad ones is looked at.
MIN_JUDGED = 1000


class BadRows:
    """Names every recording that could not be used: once in the log, and once in a file, over resumed runs too.

    Args:
        file: lines of name, tab, reason.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self._known: set[str] = set()
        if file and file.is_file():
            self._known = {line.partition("\t")[0] for line in file.read_text(errors="replace").splitlines()}

    def add(self, key: str, reason: str) -> None:
        key, reason = one_line(key), one_line(reason)
        if key in self._known:
            return
        self._known.add(key)
        logger.warning("skipped %s: %s", key, reason)
        if self.file:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a") as file:
                    file.write(f"{key}\t{reason}\n")
            except OSError as error:  # no reason to end a run
                logger.warning("%s cannot be written (%s)", self.file, error.strerror)
                self.file = None


def one_line(text: str) -> str:
    """A text without line breaks, tabs and what UTF-8 cannot hold: file names need not be text."""
    return " ".join(text.encode(errors="replace").decode().split())


def require_usable(bad: int, rows: int, max_share: float, setting: str, file: Path | None) -> None:
    """Stop when too many recordings are bad.

    Args:
        bad: of the ``rows``.
        setting: the name of ``max_share``.
        file: where they are listed.

    Raises:
        UserError: more than ``max_share`` are.
    """
    if bad > max_share * rows:
        listed = f"; {file} lists them" if file else ""
        raise UserError(
            f"{bad:,} of {rows:,} recordings could not be used, more than the share of {max_share:g} that {setting} "
            f"allows{listed}."
        )
