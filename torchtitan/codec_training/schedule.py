"""When the stages begin, and how fast a step learns."""

import itertools

from torchtitan.codec_training.options import Options

WARM_UP_STEPS = 50
DECAY = 0.95
"""By how much the learning rate falls, as a share of its peak."""
DECODER_SHARE = 0.5
"""Peak learning rate of stage 3, as a share of that of stages 1 and 2."""


class Schedule:
    """The steps of the three stages.

    Attributes:
        quantized, decoder: the first step of stage 2 and of stage 3.
        end: how many steps there are.
    """

    def __init__(self, options: Options):
        before = [0, 0] if options.start_from else [options.continuous_steps, options.quantized_steps]
        self.quantized, self.decoder, self.end = itertools.accumulate([*before, options.decoder_steps])

    def learning_rate(self, step: int) -> float:
        """A share of the peak: linear warm-up and linear decay, over stages 1 and 2 and again over stage 3."""
        last = step >= self.decoder
        start, end = (self.decoder, self.end) if last else (0, self.decoder)
        share = (step - start) / max(1, end - start)
        warm_up = min((step - start + 1) / WARM_UP_STEPS, 1.0)
        return warm_up * (1 - DECAY * share) * (DECODER_SHARE if last else 1.0)
