"""A small benchmark during training: does the model prefer the better clip of a pair, as in SALMon?

The rule and the figures are those of eval/salmon.py. The model that is being trained is scored with its parallelism.
"""

import math
import random
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from torchtitan.audio.codec import Codec
from torchtitan.audio.token_stream import TokenStream
from torchtitan.components.validate import Losses
from torchtitan.config.job_config import Evaluation
from torchtitan.eval.benchmark import encode_pairs
from torchtitan.eval.data import Task, open_tasks, task_folders
from torchtitan.eval.metrics import judge
from torchtitan.eval.results import Clip, samples_table
from torchtitan.eval.suites import SALMON
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


def find_pairs(config: Evaluation) -> list[Task]:
    """The tasks of evaluation.dataset_path: those of SALMon, or all folders if none of these is there.

    Raises:
        UserError: there are none, or they are not in SALMon's layout.
    """
    path = config.dataset_path or ""
    folders = task_folders(path)
    names = [name for name in SALMON.tasks if name in folders] or folders or list(SALMON.tasks)
    return open_tasks(path, names, SALMON.columns, SALMON.as_configurations)[0]


@dataclass(frozen=True)
class EvaluationResult:
    """Shares of pairs in which the better clip has the better score. A tie counts half.

    Attributes:
        accuracy: mean over the tasks.
        standard_error: standard error of this mean, from those of the tasks; None if a task has a single pair.
        by_task: accuracy of each task.
        pairs: number of pairs in all tasks.
    """

    accuracy: float
    standard_error: float | None
    by_task: dict[str, float]
    pairs: int


class Evaluator:
    """Scores pairs of clips.

    Args:
        tasks: the tasks from :func:`find_pairs`.
        codec: the codec, on the device that encodes.
        share: number of this rank among the ranks that see different rows, and the number of such ranks.
        counts: whether the scores of this rank are used, among the ranks that work on the same rows.
        group: process group (on the CPU) in which ranks exchange codes and scores.
        fixed_length: give all batches the same shape, for compiled graphs.
    """

    def __init__(
        self,
        config: Evaluation,
        tasks: list[Task],
        codec: Codec,
        stream: TokenStream,
        share: tuple[int, int],
        counts: bool,
        group: Any = None,
        fixed_length: bool = False,
    ):
        self.config, self.tasks, self.codec, self.stream = config, tasks, codec, stream
        self.share, self.counts, self.group, self.fixed_length = share, counts, group, fixed_length
        self._clips: list[Clip] | None = None

    def run(self, losses_of: Losses) -> EvaluationResult:
        """Score all pairs. All ranks call it and get the same result.

        Args:
            losses_of: gives the negative log-likelihood of each target, see ParallelModel.losses.

        Raises:
            UserError: a task has no usable pair.
        """
        if self._clips is None:
            self._clips = self._encode()
        readable = [clip for clip in self._clips if clip.codes is not None]
        # Equal clips are scored once, so that they have exactly equal scores.
        places: dict[bytes, list[Clip]] = {}
        sequences: dict[bytes, torch.Tensor] = {}
        for clip in readable:
            ids = self.stream.sample(cast(torch.Tensor, clip.codes))
            places.setdefault(ids.numpy().tobytes(), []).append(clip)
            sequences[ids.numpy().tobytes()] = ids
        keys = sorted(sequences, key=lambda key: (-len(sequences[key]), key))
        for key, nll in zip(keys, self._score([sequences[key] for key in keys], losses_of), strict=True):
            for clip in places[key]:
                clip.nll = nll
        results = judge(samples_table(self._clips, self.stream.num_quantizers, {}), SALMON.rule)
        accuracies: dict[str, float] = {}
        errors = []
        for name, result in results.items():
            if result.accuracy is None:
                raise UserError(f"evaluation task {name}: no pair could be used: {result.left_out[0]['reason']}")
            accuracies[name] = result.accuracy
            errors.append(math.nan if result.standard_error is None else result.standard_error)
        error = math.sqrt(sum(e * e for e in errors)) / len(errors)
        mean, pairs = sum(accuracies.values()) / len(accuracies), sum(result.pairs for result in results.values())
        return EvaluationResult(mean, error if math.isfinite(error) else None, accuracies, pairs)

    def _encode(self) -> list[Clip]:
        """The clips of the chosen pairs with their codes. All ranks share the work."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        own: list[Clip] = []
        for task in self.tasks:
            count = self.config.max_pairs_per_task
            chosen = range(task.num_pairs)
            if 0 < count < task.num_pairs:
                chosen = sorted(random.Random(0).sample(chosen, count))
            mine = set(chosen[rank::world_size])
            own += encode_pairs(SALMON, task, self.codec, self.stream, self.config.seq_len, 20.0, chosen=mine)
        gathered: list[list[Clip]] = [[] for _ in range(world_size)]
        dist.all_gather_object(gathered, own, group=self.group)
        order = {task.name: number for number, task in enumerate(self.tasks)}
        clips = [clip for part in gathered for clip in part]
        clips.sort(key=lambda clip: (order[clip.task], clip.pair))
        unreadable = [clip for clip in clips if clip.error]
        if unreadable and rank == 0:
            first = unreadable[0].error
            logger.warning("evaluation: %d clips cannot be read, the first because: %s", len(unreadable), first)
        return clips

    def _score(self, sequences: list[torch.Tensor], losses_of: Losses) -> list[torch.Tensor]:
        """The negative log-likelihoods [L - 1] of each sequence [L]. The sequences are sorted by length."""
        size = self.config.batch_size
        number, degree = self.share
        batches = [range(start, min(start + size, len(sequences))) for start in range(0, len(sequences), size)]
        found: dict[int, torch.Tensor] = {}
        # All ranks must run the model equally often, so a rank without a batch repeats the last one.
        for first in range(0, len(batches), degree):
            batch = batches[min(first + number, len(batches) - 1)]
            length = self.config.seq_len if self.fixed_length else len(sequences[batch[0]]) - 1
            rows = size if self.fixed_length else len(batch)
            tokens = torch.zeros(rows, length, dtype=torch.int64)
            targets = torch.full((rows, length), IGNORE_INDEX)
            for row, place in enumerate(batch):
                ids = sequences[place]
                tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            losses = losses_of(tokens, targets).cpu()
            found.update((place, losses[row, : len(sequences[place]) - 1]) for row, place in enumerate(batch))
        gathered: list[dict[int, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, found if self.counts else {}, group=self.group)
        merged = {place: nll for part in gathered for place, nll in part.items()}
        return [merged[place] for place in range(len(sequences))]
