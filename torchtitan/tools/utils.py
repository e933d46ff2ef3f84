"""Number formats, facts about devices, and the garbage collector under control."""

import gc
import re

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense bf16 peak in FLOP/s, from the vendors' data sheets.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s; None if it is unknown."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by its name; None if it is unknown."""
    return next((peak for part, peak in _PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


class GarbageCollection:
    """Collects garbage at the same steps on all ranks. A rank that pauses alone makes all others wait."""

    def __init__(self, freq: int, debug: bool = False):
        self.freq = 1 if debug else freq
        gc.disable()
        gc.collect(1)

    def run(self, step: int) -> None:
        if step > 1 and step % self.freq == 0:
            gc.collect(1)
