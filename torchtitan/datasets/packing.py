"""Which samples share a row: best fit, decreasing."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into as few rows as this well-known rule finds.

    From the longest to the shortest, each goes into the row where it leaves the least room (Johnson 1973, who showed
    that at most 11/9 of the fewest possible rows, and a constant, are used).

    Args:
        lengths: of the samples, each at most ``capacity``.

    Returns:
        for each row the numbers of its samples, in rising order. The same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # different amounts of room that rows have left, in rising order
    having: dict[int, list[int]] = {}  # rows by the room they have left
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
