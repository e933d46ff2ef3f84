"""The order in which recordings are drawn. It is endless, depends on the seed alone, and is computed, never stored.

Draw number ``d`` of a data set of N items is item ``d % N`` in the order of epoch ``d // N``. So a place in a run is
one number, whatever the number of ranks and workers. :class:`PermutedOrder` orders items that can be read at random
(codes in shards) by one permutation. :class:`BlockOrder` is for recordings in files, where consecutive rows are read
together: it orders blocks of rows, and shuffles rows within windows of several blocks. :class:`Mixture` interleaves
the endless orders of several corpora.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from torchtitan.tools.errors import UserError

# Recordings in a shuffle window of BlockOrder. Each rank holds the audio files of its share of a window.
SHUFFLE_ROWS = 1024
# Draws after which the pattern of a weighted mixture repeats.
PATTERN = 4096

_ROUNDS = 6


class Permutation:
    """A seeded bijection of range(n), which computes single values without storing the others.

    A Feistel network permutes the range up to the next power of four. It is applied again while its value is outside
    of range(n) (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        n: size, at least 1.
        key: everything that the permutation depends on, by its text form.
    """

    def __init__(self, n: int, *key: object):
        self.n = n
        self._half = np.uint64(max(3, -(-max(n - 1, 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.sha512("/".join(map(str, key)).encode()).digest()
        self._keys = np.frombuffer(digest[: 8 * _ROUNDS], dtype="<u8").astype(np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of indices [k] in range(n), int64 [k]."""
        values = self._encrypt(np.asarray(index).astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def all(self) -> np.ndarray:
        """The whole permutation, int64 [n]."""
        return self(np.arange(self.n))

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of splitmix64: every bit of the input affects all bits of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order(Protocol):
    """An endless order of the items of one corpus."""

    def __len__(self) -> int:
        """Number of items in an epoch."""
        ...

    def items(self, draws: np.ndarray) -> np.ndarray:
        """Item numbers, int64 [k], of ascending draws [k]."""
        ...


class PermutedOrder:
    """All items in one seeded permutation per epoch; without ``shuffle`` in their stored order."""

    def __init__(self, num_items: int, seed: int, shuffle: bool = True):
        self.num_items, self.seed, self.shuffle = num_items, seed, shuffle

    def __len__(self) -> int:
        return self.num_items

    def items(self, draws: np.ndarray) -> np.ndarray:
        """Item numbers, int64 [k], of ascending draws [k]."""
        epochs, places = np.divmod(draws, self.num_items)
        if not self.shuffle:
            return places
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = Permutation(self.num_items, self.seed, "items", epoch)(places[chosen])
        return result


class BlockOrder:
    """Blocks in a seeded order, with rows shuffled within windows of :data:`SHUFFLE_ROWS`.

    The rows of a window, in their stored order, are cut into one run per rank. Each rank reads only its run. The order
    of the draws does not depend on which rank reads a row.

    Args:
        block_sizes: number of rows of each of the consecutive blocks that make up the data set.
    """

    def __init__(self, block_sizes: np.ndarray, seed: int, shuffle: bool = True):
        self.block_sizes = np.asarray(block_sizes, dtype=np.int64)
        self.block_starts = np.cumsum(self.block_sizes) - self.block_sizes
        self.num_rows = int(self.block_sizes.sum())
        self.seed, self.shuffle = seed, shuffle
        self._of_epoch = (-1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.num_rows

    def items(self, draws: np.ndarray) -> np.ndarray:
        """Row numbers, int64 [k], of ascending draws [k]."""
        result = np.empty(len(draws), dtype=np.int64)
        for epoch, window, chosen in self._windows(draws):
            lain = self._lain(epoch, window, draws[chosen] % self.num_rows % SHUFFLE_ROWS) + window * SHUFFLE_ROWS
            if self.shuffle:
                order, ends = self._order_blocks(epoch)
                number = np.searchsorted(ends, lain, side="right")
                blocks = order[number]
                lain += self.block_starts[blocks] + self.block_sizes[blocks] - ends[number]
            result[chosen] = lain
        return result

    def readers(self, draws: np.ndarray, world_size: int) -> np.ndarray:
        """Which of ``world_size`` ranks reads each of the ascending draws [k], int64 [k]."""
        result = np.empty(len(draws), dtype=np.int64)
        for epoch, window, chosen in self._windows(draws):
            lain = self._lain(epoch, window, draws[chosen] % self.num_rows % SHUFFLE_ROWS)
            # Runs can differ by a row, so another rank comes first in each window.
            result[chosen] = (lain * world_size // self._window_size(window) + window) % world_size
        return result

    def window_end(self, draw: int) -> int:
        """The first draw after the window that contains ``draw``."""
        epoch, place = divmod(draw, self.num_rows)
        return epoch * self.num_rows + min((place // SHUFFLE_ROWS + 1) * SHUFFLE_ROWS, self.num_rows)

    def _windows(self, draws: np.ndarray) -> Iterator[tuple[int, int, slice]]:
        """(epoch, window, slice of ``draws`` in it) for each window that contains some of the ascending draws."""
        windows_an_epoch = -(-self.num_rows // SHUFFLE_ROWS)
        epochs, places = np.divmod(draws, self.num_rows)
        numbers = epochs * windows_an_epoch + places // SHUFFLE_ROWS
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(draws)]
        for begin, end in pairwise(edges):
            if begin < end:
                epoch, window = divmod(int(numbers[begin]), windows_an_epoch)
                yield epoch, window, slice(begin, end)

    def _window_size(self, window: int) -> int:
        return min(SHUFFLE_ROWS, self.num_rows - window * SHUFFLE_ROWS)

    def _lain(self, epoch: int, window: int, places: np.ndarray) -> np.ndarray:
        """Places in the unshuffled window of the rows that are at ``places`` of the shuffled one."""
        if not self.shuffle:
            return places.astype(np.int64)
        return Permutation(self._window_size(window), self.seed, "rows", epoch, window)(places)

    def _order_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch in their order, and the number of rows up to the end of each."""
        known, blocks, ends = self._of_epoch  # one tuple, because several threads read and set it
        if known != epoch:
            blocks = Permutation(len(self.block_sizes), self.seed, "blocks", epoch).all()
            ends = np.cumsum(self.block_sizes[blocks])
            self._of_epoch = (epoch, blocks, ends)
        return blocks, ends


class Mixture:
    """The orders of several corpora as one order.

    With ``weights``, each corpus has its share of any ``PATTERN`` consecutive draws. The draws follow a fixed pattern,
    and each corpus goes through its own epochs. Without weights, an epoch contains every item of every corpus once, and
    the corpora are evenly interleaved. A finite mixture takes one corpus after the other.

    Raises:
        UserError: a weight is so small that its corpus would never be drawn.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float] | None, seed: int, finite: bool = False):
        if len(orders) > 2 and not (weights or finite):
            raise ValueError("only two corpora can be interleaved without weights")
        self.orders, self.finite = list(orders), finite
        self.sizes = np.array([len(order) for order in orders], dtype=np.int64)
        self.weighted = bool(weights) and not finite and len(orders) > 1
        if self.weighted:
            self._counts = _largest_remainders(np.asarray(weights, dtype=np.float64))
            origins = np.repeat(np.arange(len(orders)), self._counts)
            self._pattern = origins[Permutation(PATTERN, seed, "mixture").all()]
            # For each place in the pattern: how often its corpus was drawn before.
            self._before = np.empty(PATTERN, dtype=np.int64)
            for corpus in range(len(orders)):
                places = self._pattern == corpus
                self._before[places] = np.arange(places.sum())

    def __len__(self) -> int:
        """Number of items in all corpora."""
        return int(self.sizes.sum())

    @property
    def two_epochs(self) -> int:
        """Number of consecutive draws that contain each item of each corpus at least once, wherever they begin."""
        if not self.weighted:
            return 2 * len(self)
        return int((2 * self.sizes // self._counts).max() + 2) * PATTERN

    def ends_epoch(self, draw: int) -> bool:
        """Whether an epoch of all corpora ends just before a draw."""
        return not self.weighted and draw % len(self) == 0

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """For each draw from ``start`` up to ``stop``: the number of its corpus, and its place in the order of it.

        Both are int64 [stop - start].
        """
        draws = np.arange(start, stop)
        if len(self.orders) == 1:
            return np.zeros_like(draws), draws
        if self.finite:
            ends = np.cumsum(self.sizes)
            origins = np.searchsorted(ends, draws, side="right")
            return origins, draws - (ends - self.sizes)[origins]
        if self.weighted:
            turns, places = np.divmod(draws, PATTERN)
            origins = self._pattern[places]
            return origins, turns * self._counts[origins] + self._before[places]
        epochs, places = np.divmod(draws, len(self))
        # The first corpus has its share, rounded down, of the first n draws of an epoch, for each n.
        first = places * self.sizes[0] // len(self)
        origins = 1 - ((places + 1) * self.sizes[0] // len(self) - first)
        return origins, epochs * self.sizes[origins] + np.where(origins == 0, first, places - first)


def _largest_remainders(weights: np.ndarray) -> np.ndarray:
    """Whole numbers that add up to PATTERN, in proportion to the weights (largest remainder method)."""
    exact = weights / weights.sum() * PATTERN
    counts = np.floor(exact).astype(np.int64)
    missing = PATTERN - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    if (counts == 0).any():
        raise UserError(
            f"a source of the mixture has a share of {weights.min() / weights.sum():.2g} of the draws; "
            f"shares under 1/{PATTERN} cannot be drawn, so raise its weight or leave it out."
        )
    return counts
