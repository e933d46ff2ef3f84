"""Warm-up, stable, decay: the learning rate as a function of the step alone."""

import math

from torchtitan.config.job_config import LRScheduler


def lr_factor(step: int, steps: int, config: LRScheduler) -> float:
    """The learning rate of one step, relative to optimizer.lr.

    The rule is TorchTitan's, to the digit. The factor rises linearly over the first ``warmup_steps``, stays at 1, and
    falls over the last ``decay_ratio`` of all steps (over all of them after the warm-up if that is not set). The fall
    reaches ``lr_min`` one step after the last, so that no step is spent at a rate of zero. A warm-up longer than the
    run is cut to it, a decay that would begin within the warm-up begins after it.

    Args:
        step: 1 for the first step.
        steps: length of the run.
    """
    warmup = min(config.warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    decay = steps - warmup
    if config.decay_ratio is not None:
        decay = min(decay, round(config.decay_ratio * steps))
    into_decay = step - 1 - (steps - decay)
    if into_decay <= 0:
        return 1.0
    progress = into_decay / decay
    fall = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.decay_type]
    return config.lr_min + (1 - config.lr_min) * fall
