"""The figures of a run, under the same names in the log, metrics.jsonl, TensorBoard and Weights & Biases."""

import json
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan.config.job_config import JobConfig
from torchtitan.distributed.utils import max_over_ranks, sum_over_ranks, world_size
from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import peak_flops

# One JSON object a line, in full precision; after a resume a step can stand there twice, the later line counts.
METRICS_FILE = "metrics.jsonl"

_COLORS = {"step": "31", "loss": "32", "grad": "33", "speed": "34", "memory": "35", "mfu": "36"}


@dataclass
class StepTotals:
    """Sums since the last report, over the microbatches of a rank."""

    tokens: float = 0
    positions: float = 0
    squares: float = 0
    data_seconds: float = 0.0


class MetricsLogger:
    """Reports figures every ``metrics.log_freq`` steps.

    Args:
        flops_per_token: of one training step, given the length of a token's sample.
    """

    def __init__(
        self,
        config: JobConfig,
        folder: Path,
        rank: int,
        device: torch.device,
        flops_per_token: Callable[[float], float],
    ):
        self.config, self.device, self.flops_per_token = config, device, flops_per_token
        self.peak_flops = peak_flops(device)
        self.totals, self._started = StepTotals(), time.perf_counter()
        plain = config.metrics.disable_color_printing or config.metrics.log_format == "json"
        self._color = sys.stderr.isatty() and not plain
        self._file = folder / METRICS_FILE if rank == 0 else None
        self._writer: Any = None
        self._wandb: Any = None
        if rank == 0 or config.metrics.save_for_all_ranks:
            self._open(folder, rank)

    def _open(self, folder: Path, rank: int) -> None:
        if self.config.metrics.enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / self.config.metrics.save_tb_folder / f"rank{rank}"))
        if self.config.metrics.enable_wandb:
            import wandb

            # One run continues across resumes: its id lies in the run's folder.
            id_file = folder / f"wandb_run_id.rank{rank}"
            if not id_file.exists():
                id_file.parent.mkdir(parents=True, exist_ok=True)
                id_file.write_text(secrets.token_hex(4))
            try:
                self._wandb = wandb.init(
                    id=id_file.read_text().strip(),
                    resume="allow",
                    name=folder.name,
                    project=os.environ.get("WANDB_PROJECT", "llama-mimi"),
                    entity=os.environ.get("WANDB_TEAM"),
                    dir=str(folder),
                    config=asdict(self.config),
                )
            except wandb.errors.Error as error:
                raise UserError(
                    f"metrics.enable_wandb: Weights & Biases cannot be used ({first_line(error)}); run `wandb login`, "
                    "set WANDB_MODE=offline, or switch it off with --metrics.no-enable_wandb."
                ) from None

    def add(self, tokens: int, positions: int, squares: int, data_seconds: float) -> None:
        """Count a microbatch: real tokens, positions computed, squared lengths of samples, seconds waited for it."""
        self.totals.tokens += tokens
        self.totals.positions += positions
        self.totals.squares += squares
        self.totals.data_seconds += data_seconds

    def report(self, step: int, loss: float, grad_norm: float, lr: float, counters: dict[str, int]) -> None:
        """Log what happened since the last report.

        Args:
            loss: mean over the targets of the step, all ranks, in nats.
            counters: of the data loader, which are those of all ranks.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        totals = self._of_all_ranks()
        tokens_per_second = totals.tokens / seconds
        # Padding is no useful work, and a token attends to its own sample only, however rows are filled.
        flops_per_token = self.flops_per_token(totals.squares / max(totals.tokens, 1))
        tflops = tokens_per_second * flops_per_token / 1e12
        memory, share = self._memory()
        figures = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second_per_device": tokens_per_second,
            "tflops_per_device": tflops,
            "memory_gib": memory,
            "data_wait_share": totals.data_seconds / seconds,
            "padding_share": 1 - totals.tokens / max(totals.positions, 1),
            **{f"data/{name}": value for name, value in counters.items()},
        }
        mfu = ""
        if self.peak_flops:
            figures["mfu"] = tflops * 1e12 / self.peak_flops
            mfu = f" ({figures['mfu']:.1%} MFU)"
        of_memory = f" ({share:.0%})" if share else ""
        bad = "".join(f"  bad {of}: {counters[f'bad_{of}']:,}" for of in ("rows", "files") if counters[f"bad_{of}"])
        logger.info(
            "%s  %s  %s  lr: %.3g  %s  %s  %s  data wait: %.1f%%  padding: %.1f%%%s",
            self._paint("step", f"step: {step}"),
            self._paint("loss", f"loss: {loss:.4f}"),
            self._paint("grad", f"grad_norm: {grad_norm:.4f}"),
            lr,
            self._paint("speed", f"tokens/s: {tokens_per_second:,.0f}"),
            self._paint("memory", f"memory: {memory:.2f} GiB{of_memory}"),
            self._paint("mfu", f"TFLOP/s: {tflops:.4g}{mfu}"),
            100 * figures["data_wait_share"],
            100 * figures["padding_share"],
            bad,
            extra={"figures": {"step": step, **figures}},
        )
        self.write(step, figures)
        self.totals, self._started = StepTotals(), time.perf_counter()

    def _of_all_ranks(self) -> StepTotals:
        """Means over the ranks, and the longest wait for data: all ranks wait for the last one. Called by all."""
        own = self.totals
        sums = sum_over_ranks([float(own.tokens), float(own.positions), float(own.squares)])
        tokens, positions, squares = (value / world_size() for value in sums)
        return StepTotals(tokens, positions, squares, max_over_ranks(own.data_seconds))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave work that is not training (validation, checkpoints) out of the training speed."""
        begin = time.perf_counter()
        yield
        self._started += time.perf_counter() - begin

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Send figures to the run's metrics.jsonl, TensorBoard and Weights & Biases."""
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._writer:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        if self._wandb:
            self._wandb.log(figures, step=step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()

    def _memory(self) -> tuple[float, float]:
        """Peak memory in GiB (of the GPU, or of the process) and its share of the GPU's, 0 on a CPU."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak / 2**30, peak / torch.cuda.get_device_properties(self.device).total_memory
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 0.0

    def _paint(self, kind: str, text: str) -> str:
        return f"\033[{_COLORS[kind]}m{text}\033[0m" if self._color else text
