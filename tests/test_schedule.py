"""The learning rate: warm-up, plateau, decay, each value worked out by hand."""

import math

import pytest

from torchtitan.components.lr_scheduler import lr_factor
from torchtitan.config.job_config import LRScheduler


def factors(steps: int, **settings) -> list[float]:
    """The factors of steps 1 to ``steps``."""
    config = LRScheduler(**settings)
    return [lr_factor(step, steps, config) for step in range(1, steps + 1)]


def test_warmup_plateau_and_decay():
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert factors(10, warmup_steps=4, decay_ratio=0.4) == expected


def test_lr_min_would_be_reached_one_step_after_the_last():
    expected = [0.5, 1, 1, 1, 1, 0.775, 0.55, 0.325]
    assert factors(8, warmup_steps=2, decay_ratio=0.5, lr_min=0.1) == pytest.approx(expected)


def test_square_root_decay():
    expected = [1, 1, 1 - math.sqrt(0.25), 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    assert factors(5, warmup_steps=1, decay_ratio=0.8, decay_type="sqrt") == expected


def test_cosine_decay():
    expected = [1, 1, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2]
    settings = {"warmup_steps": 1, "decay_ratio": 0.8, "decay_type": "cosine", "lr_min": 0.1}
    assert factors(5, **settings) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("decay_type", "expected"),
    [
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("sqrt", [0.5, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
        ("cosine", [0.5, 1, 1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]),
    ],
)
def test_decay_begins_after_the_warmup_if_no_ratio_is_set(decay_type, expected):
    assert factors(6, warmup_steps=2, decay_type=decay_type) == pytest.approx(expected, rel=1e-15)


def test_no_warmup():
    assert factors(4, warmup_steps=0, decay_ratio=0.5) == [1, 1, 1, 0.5]


def test_decay_that_would_overlap_the_warmup_is_cut_to_what_is_left():
    assert factors(8, warmup_steps=4, decay_ratio=1.0) == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("warmup_steps", [5, 200])
def test_warmup_is_cut_to_the_length_of_the_run(warmup_steps):
    assert factors(5, warmup_steps=warmup_steps, decay_ratio=0.2) == [0.2, 0.4, 0.6, 0.8, 1]


def test_ratio_of_zero_means_no_decay():
    assert factors(4, warmup_steps=1, decay_ratio=0.0) == [1, 1, 1, 1]


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, [1, 1, 1, 1, 1, 0.5]), (0.75, [1, 1, 1, 0.75, 0.5, 0.25])])
def test_a_share_that_is_no_whole_number_of_steps_is_rounded_to_the_even_one(ratio, expected):
    assert factors(6, warmup_steps=0, decay_ratio=ratio) == expected  # 1.5 steps are 2, 4.5 are 4


def test_published_recipe():
    config = LRScheduler(warmup_steps=250, decay_ratio=0.2, lr_min=0.1)
    found = [lr_factor(step, 5000, config) for step in (1, 250, 251, 4001, 4002, 4501, 5000)]
    assert found == pytest.approx([1 / 250, 1, 1, 1, 0.9991, 0.55, 0.1009], rel=1e-15)
