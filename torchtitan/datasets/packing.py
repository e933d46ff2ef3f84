"""Which samples share a row: best fit decreasing, within windows of the order."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from torchtitan.datasets.order import Mixture, Permutation
from torchtitan.datasets.samples import Counters, Sample
from torchtitan.tools.errors import UserError


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack samples into few rows.

    From the longest to the shortest, each sample goes into the row where it leaves the least room. Johnson (1973)
    showed that this takes at most 11/9 of the minimum number of rows, plus a constant.

    Args:
        lengths: the length of each sample, at most ``capacity``.

    Returns:
        the numbers of the samples in each row, in rising order. The same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # the different amounts of room left in rows, in rising order
    having: dict[int, list[int]] = {}  # rows by the room left in them
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[sample]
        found = bisect_left(spaces, length)
        if found == len(spaces):
            row, space = len(rows), capacity
            rows.append([sample])
        else:
            space = spaces[found]
            row = having[space].pop()
            rows[row].append(sample)
            if not having[space]:
                del having[space], spaces[found]
        left = space - length
        if left in having:
            having[left].append(row)
        elif left > 0:
            having[left] = [row]
            insort(spaces, left)
    return [sorted(row) for row in rows]


class PackedRow(NamedTuple):
    """The samples of a row, and the place and the counters after it."""

    samples: list[Sample]
    place: "Place"
    counters: Counters


@dataclass
class Place:
    """A place in the order, as checkpoints store it. Any number of ranks can continue from it.

    Attributes:
        draw: the first draw of the current window.
        row: number of rows of the window that are already used.
        counters: counters at the start of the window.
        window: for a window whose rows are partly used, the draw ``after`` it, and [draw, start, length] of its
            ``samples``. So the rows of the window stay the same even if a recording becomes readable or unreadable.
    """

    draw: int = 0
    row: int = 0
    counters: Counters = field(default_factory=Counters)
    window: dict[str, Any] | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Place":
        return cls(state["draw"], state["row"], Counters(**state["counters"]), state.get("window"))

    def state(self) -> dict[str, Any]:
        """The place as JSON."""
        state = {"draw": self.draw, "row": self.row, "counters": asdict(self.counters)}
        return {**state, "window": self.window} if self.window else state


class RowPacker:
    """Puts samples into rows.

    Args:
        mixture: the order in which the samples are drawn.
        seq_len: maximum length of a row, in ids.
        window: number of samples that are packed together, and whose rows are shuffled. Without packing, shuffling
            separates the pieces of a long recording. 1 keeps the order of the draws.
        packing: whether several samples share a row.
        seed: seed for shuffling the rows of a window.
        keeps_window: whether a state stores the samples of a window whose rows are partly used.
    """

    def __init__(self, mixture: Mixture, seq_len: int, window: int, packing: bool, seed: int, keeps_window: bool):
        self.mixture, self.seq_len, self.window, self.packing = mixture, seq_len, window, packing
        self.seed, self.keeps_window = seed, keeps_window and window > 1

    def rows(self, drawn: Iterable[tuple[int, list[Sample]]], place: Place, counters: Counters) -> Iterator[PackedRow]:
        """Rows in the global order.

        Args:
            drawn: the samples of each draw from ``place.draw`` on.
            place: where to continue.
            counters: counters that the producer of ``drawn`` updates.

        Raises:
            UserError: an epoch had no usable recording.
        """
        window: list[Sample] = []
        unused = 0
        for draw, samples in drawn:
            window += samples
            unused = 0 if samples else unused + 1
            if unused > self.mixture.two_epochs:
                raise UserError(
                    "no recording of a whole epoch could be used; the log has the reason for each of them."
                    if counters.bad_rows
                    else "no recording has a duration between min_seconds and max_seconds."
                )
            after = draw + 1
            if place.window:
                complete = after == place.window["after"]
            else:
                complete = len(window) >= self.window or (bool(window) and self.mixture.ends_epoch(after))
            if complete:
                end = Place(after, 0, replace(counters))
                yield from islice(self._window_rows(window, place, end), place.row, None)
                place, window = end, []
        if window:
            end = Place(len(self.mixture), 0, replace(counters))
            yield from islice(self._window_rows(window, place, end), place.row, None)

    def _window_rows(self, window: list[Sample], begin: Place, end: Place) -> Iterator[PackedRow]:
        found: Sequence[Sample | None] = window
        facts = [[sample.draw, sample.start, sample.length] for sample in window]
        if begin.window:
            here = {(sample.draw, sample.start): sample for sample in window}
            facts = begin.window["samples"]
            # A sample that has changed since then leaves its place empty.
            found = [s if (s := here.get((d, start))) and s.length == length else None for d, start, length in facts]
        rows = [[i] for i in range(len(found))]
        if self.packing:
            rows = best_fit_decreasing([length for _, _, length in facts], self.seq_len)
        if self.window > 1:
            # Training must not see rows sorted by length, nor the pieces of a recording in a row.
            rows = [rows[i] for i in Permutation(len(rows), self.seed, "rows of a window", begin.draw).all()]
        kept = {"after": end.draw, "samples": facts} if self.keeps_window else None
        for number, row in enumerate(rows, start=1):
            place = end if number == len(rows) else replace(begin, row=number, window=kept)
            yield PackedRow([sample for i in row if (sample := found[i])], place, end.counters)
