"""Bad rows: recordings that cannot be used. They are listed in one file, and too many of them end the run."""

from pathlib import Path

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

BAD_ROWS_FILE = "bad_rows.tsv"
# Number of rows from which on the share of bad rows is checked: a few rows at the start prove nothing.
MIN_JUDGED = 1000


class BadRows:
    """Names every bad row once in the log and once in a file, also over resumed runs.

    Args:
        file: has lines of name, tab, reason.
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
    """A text without line breaks, tabs and characters that UTF-8 cannot encode, which file names may contain."""
    return " ".join(text.encode(errors="replace").decode().split())


def require_usable(bad: int, rows: int, max_share: float, setting: str, file: Path | None) -> None:
    """Stop if too many rows are bad.

    Args:
        bad: number of bad rows among ``rows``.
        setting: the name of the setting ``max_share``.
        file: the list of bad rows.

    Raises:
        UserError: the share of bad rows is above ``max_share``.
    """
    if bad > max_share * rows:
        listed = f"; {file} lists them" if file else ""
        raise UserError(
            f"{bad:,} of {rows:,} recordings could not be used, more than the share of {max_share:g} that {setting} "
            f"allows{listed}."
        )
