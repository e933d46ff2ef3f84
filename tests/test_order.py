"""The order of draws: every item once an epoch, computed from any place, shared by any number of readers; packing."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from torchtitan.datasets import order
from torchtitan.datasets.order import BlockOrder, Mixture, Permutation, PermutedOrder
from torchtitan.datasets.packing import best_fit_decreasing
from torchtitan.tools.errors import UserError

SIZES = (5, 1, 7, 4)


@pytest.fixture
def small_windows(monkeypatch):
    """Rows are shuffled six at a time."""
    monkeypatch.setattr(order, "SHUFFLE_ROWS", 6)


# --- permutations


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 65, 1000, 4097])
def test_a_permutation_has_every_number_once(n):
    assert sorted(Permutation(n, 42, "x").all()) == list(range(n))


def test_a_permutation_is_a_function_of_its_key():
    first, again, other = (Permutation(1000, key).all().tolist() for key in ("a", "a", "b"))
    assert first == again != other


def test_a_permutation_of_any_size_is_evaluated_where_it_is_needed():
    permutation = Permutation(10**12, 7)
    images = permutation(np.arange(5000))
    assert len(set(images.tolist())) == 5000
    assert images.min() >= 0 and images.max() < 10**12
    assert permutation(np.array([4321]))[0] == images[4321]


def test_permutations_are_known_values():
    """Resuming needs the same order on every machine and in every version of every library."""
    assert Permutation(10, 42, "items", 0).all().tolist() == KNOWN


KNOWN = [1, 9, 8, 6, 7, 3, 4, 0, 5, 2]


def test_all_permutations_are_about_equally_likely():
    counts = Counter(tuple(Permutation(4, seed).all()) for seed in range(2400))
    assert len(counts) == 24
    assert min(counts.values()) > 50 and max(counts.values()) < 160


def test_a_permutation_leaves_no_trace_of_the_order_before():
    images = Permutation(20_000, 3).all()
    assert abs(np.corrcoef(np.arange(20_000), images)[0, 1]) < 0.03
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03


# --- orders


def make_orders(seed: int = 1, shuffle: bool = True) -> list:
    return [PermutedOrder(sum(SIZES), seed, shuffle), BlockOrder(np.array(SIZES), seed, shuffle)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", [0, 1])
def test_every_item_once_an_epoch(small_windows, kind, shuffle):
    chosen = make_orders(shuffle=shuffle)[kind]
    for epoch in range(4):
        draws = np.arange(epoch * len(chosen), (epoch + 1) * len(chosen))
        assert sorted(chosen.items(draws)) == list(range(17))


@pytest.mark.parametrize("kind", [0, 1])
def test_any_stretch_of_an_order_is_the_same_by_itself(small_windows, kind):
    chosen = make_orders()[kind]
    whole = chosen.items(np.arange(60))
    for start, stop in itertools.combinations(range(0, 61, 4), 2):
        assert chosen.items(np.arange(start, stop)).tolist() == whole[start:stop].tolist()
    some = np.array([3, 4, 16, 17, 35, 59])
    assert chosen.items(some).tolist() == whole[some].tolist()


@pytest.mark.parametrize("kind", [0, 1])
def test_epochs_and_seeds_have_different_orders(kind):
    orders = [make_orders(seed)[kind].items(np.arange(51)).reshape(3, 17) for seed in (1, 2)]
    assert len({tuple(epoch) for one in orders for epoch in one}) == 6


def test_epochs_of_a_single_block_have_different_orders_too():
    chosen = BlockOrder(np.array([30]), 1)
    assert len({tuple(epoch) for epoch in chosen.items(np.arange(90)).reshape(3, 30)}) == 3


def test_without_shuffling_items_come_as_they_lie():
    for chosen in make_orders(shuffle=False):
        assert chosen.items(np.arange(20)).tolist() == [*range(17), 0, 1, 2]


def test_rows_of_a_window_are_those_of_a_few_blocks(monkeypatch):
    """What is read for a window lies together: 60 rows in blocks of 10 touch at most 7 blocks, not all 100."""
    monkeypatch.setattr(order, "SHUFFLE_ROWS", 60)
    chosen = BlockOrder(np.full(100, 10), 5)
    for window in range(16):
        rows = chosen.items(np.arange(window * 60, (window + 1) * 60))
        assert len(set(rows // 10)) <= 7
        assert (np.diff(rows) != 1).sum() > 40  # and they are shuffled


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_the_reading_of_each_window_evenly(small_windows, world_size):
    chosen = BlockOrder(np.array(SIZES), 3)
    readers = chosen.readers(np.arange(34), world_size)
    assert readers.min() >= 0 and readers.max() < world_size
    for start, stop in ((0, 6), (6, 12), (12, 17), (17, 23)):
        counts = np.bincount(readers[start:stop], minlength=world_size)
        assert counts.max() - counts.min() <= 1
    assert chosen.readers(np.arange(9, 14), world_size).tolist() == readers[9:14].tolist()


def test_uneven_runs_go_round_the_ranks(small_windows):
    """Four ranks read six rows of each window: over four windows each reads as many."""
    readers = BlockOrder(np.array([24]), 3).readers(np.arange(24), 4)
    assert np.bincount(readers).tolist() == [6, 6, 6, 6]


def test_a_reader_reads_one_run_of_a_window(small_windows):
    chosen = BlockOrder(np.array([100]), 3)
    draws = np.arange(96)
    rows, readers = chosen.items(draws), chosen.readers(draws, 3)
    for start in range(0, 96, 6):
        for rank in range(3):
            own = sorted(rows[start : start + 6][readers[start : start + 6] == rank])
            assert own[-1] - own[0] == len(own) - 1


def test_window_ends(small_windows):
    chosen = BlockOrder(np.array(SIZES), 3)
    assert [chosen.window_end(draw) for draw in (0, 5, 6, 12, 16, 17, 18)] == [6, 6, 12, 17, 17, 23, 23]


# --- mixtures


def test_one_stream_is_its_own_order():
    streams, draws = Mixture([PermutedOrder(5, 0)], None, 0).draw(3, 9)
    assert streams.tolist() == [0] * 6 and draws.tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("weights", "shares"), [([1, 3], [0.25, 0.75]), ([0.7, 0.1, 0.2], [0.7, 0.1, 0.2])])
def test_shares_of_a_mixture(weights, shares):
    mixture = Mixture([PermutedOrder(n, 0) for n in (10, 30, 20)[: len(shares)]], weights, 0)
    streams, _ = mixture.draw(0, 10 * order.PATTERN)
    assert np.bincount(streams) / len(streams) == pytest.approx(shares, abs=1 / order.PATTERN)
    begin = np.bincount(mixture.draw(0, 1000)[0]) / 1000
    assert begin == pytest.approx(shares, abs=0.06)


def test_each_stream_of_a_mixture_goes_through_its_own_order():
    mixture = Mixture([PermutedOrder(n, 0) for n in (10, 30, 20)], [5, 2, 1], 0)
    streams, draws = mixture.draw(0, 3 * order.PATTERN)
    for stream in range(3):
        assert draws[streams == stream].tolist() == list(range((streams == stream).sum()))
    part = mixture.draw(5000, 6000)
    assert part[0].tolist() == streams[5000:6000].tolist() and part[1].tolist() == draws[5000:6000].tolist()


@pytest.mark.parametrize("sizes", [(600, 40), (1, 1), (3, 1000), (7, 5)])
def test_without_weights_every_item_of_two_streams_comes_once_an_epoch(sizes):
    mixture, whole = Mixture([PermutedOrder(n, 0) for n in sizes], None, 0), sum(sizes)
    for epoch in range(3):
        streams, draws = mixture.draw(epoch * whole, (epoch + 1) * whole)
        for stream, size in enumerate(sizes):
            assert draws[streams == stream].tolist() == list(range(epoch * size, (epoch + 1) * size))
    assert [draw for draw in range(1, 2 * whole + 1) if mixture.ends_epoch(draw)] == [whole, 2 * whole]
    streams, _ = mixture.draw(0, whole // 2)
    assert (streams == 0).sum() == pytest.approx(sizes[0] / 2, abs=1)


@pytest.mark.parametrize("weights", [None, [1, 50]])
def test_within_two_epochs_every_item_comes(weights):
    mixture = Mixture([PermutedOrder(n, 0) for n in (300, 20)], weights, 0)
    for start in (0, 111, 5000):
        streams, draws = mixture.draw(start, start + mixture.two_epochs)
        for stream, size in enumerate((300, 20)):
            assert set(mixture.orders[stream].items(draws[streams == stream]).tolist()) == set(range(size))


def test_a_finite_mixture_is_one_stream_after_the_other():
    streams, draws = Mixture([PermutedOrder(n, 0, False) for n in (2, 3)], None, 0, finite=True).draw(1, 5)
    assert streams.tolist() == [0, 1, 1, 1] and draws.tolist() == [1, 0, 1, 2]


def test_a_share_too_small_to_be_drawn_is_refused():
    with pytest.raises(UserError, match="shares under 1/4096 cannot be drawn"):
        Mixture([PermutedOrder(5, 0), PermutedOrder(5, 0)], [1, 1e-6], 0)


# --- packing


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_sample_once_and_no_more_than_fits(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 100) for _ in range(draw.randint(1, 300))]
    rows = best_fit_decreasing(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 100


@pytest.mark.parametrize("seed", range(5))
def test_as_many_rows_as_the_plain_rule(seed):
    """Against best fit, decreasing, as it is usually told: look at every row for every sample."""
    draw = random.Random(seed)
    lengths = [draw.randint(5, 90) for _ in range(200)]
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(100 - length)
    rows = best_fit_decreasing(lengths, 100)
    assert sorted(100 - sum(lengths[i] for i in row) for row in rows) == sorted(spaces)


def test_a_sample_as_long_as_a_row_has_it_alone():
    assert best_fit_decreasing([100, 1, 100], 100) == [[0], [2], [1]]
