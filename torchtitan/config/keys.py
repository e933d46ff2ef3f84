"""The keys of the manual with their types, their allowed values, and the retired keys of TorchTitan."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from torchtitan.config.job_config import JobConfig

# The type of keys whose value is a list of tables, one per data set.
TABLES = list[dict[str, Any]]


@dataclass(frozen=True)
class Schema:
    """The sections and keys that can be set.

    Attributes:
        config: the dataclass of all sections.
        sections: the class of each section by its name.
        types: the type of each key "section.key".
    """

    config: type[JobConfig]
    sections: dict[str, type]
    types: dict[str, Any]

    @staticmethod
    def of(config: type[JobConfig]) -> "Schema":
        """The schema of a dataclass of sections, in its order."""
        sections = get_type_hints(config)
        types = {f"{s}.{key}": kind for s, cls in sections.items() for key, kind in get_type_hints(cls).items()}
        return Schema(config, sections, types)


SCHEMA = Schema.of(JobConfig)
SECTIONS, TYPES = SCHEMA.sections, SCHEMA.types
DEFAULTS: dict[str, Any] = {f"{s}.{key}": v for s, table in asdict(JobConfig()).items() for key, v in table.items()}


@dataclass(frozen=True)
class Retired:
    """A key of TorchTitan that has no meaning here. Files may still set it to a value that has no effect.

    Attributes:
        reason: why other values are refused.
        accepted: the values that have no effect.
    """

    reason: str
    accepted: tuple[Any, ...]


_NO_EXPERTS = "the model has no experts"
_NO_TORCHFT = "TorchFT is not used; a failed run resumes from its last checkpoint"
RETIRED: dict[str, Retired] = {
    "job.use_for_integration_test": Retired("it marks files of TorchTitan's own tests", (False, True)),
    "parallelism.expert_parallel_degree": Retired(_NO_EXPERTS, (1,)),
    "float8.moe_fqns_prototype": Retired(_NO_EXPERTS, ([], "")),
    "memory_estimation.disable_fake_mode": Retired("memory is computed from sizes, with no tensors at all", (False,)),
    "fault_tolerance.enable": Retired(_NO_TORCHFT, (False,)),
    "fault_tolerance.process_group": Retired(_NO_TORCHFT, ("gloo",)),
    "fault_tolerance.process_group_timeout_ms": Retired(_NO_TORCHFT, (10_000,)),
    "fault_tolerance.replica_id": Retired(_NO_TORCHFT, (0,)),
    "fault_tolerance.group_size": Retired(_NO_TORCHFT, (0,)),
    "fault_tolerance.min_replica_size": Retired(_NO_TORCHFT, (1,)),
    "fault_tolerance.semi_sync_method": Retired(_NO_TORCHFT, (None, "")),
    "fault_tolerance.sync_steps": Retired(_NO_TORCHFT, (5,)),
    "fault_tolerance.should_quantize": Retired(_NO_TORCHFT, (False,)),
    "fault_tolerance.fragment_sync_delay": Retired(_NO_TORCHFT, (0,)),
    "fault_tolerance.fragment_update_alpha": Retired(_NO_TORCHFT, (0.0,)),
}
# Other names of keys.
RENAMED = {"compile.enable": "training.compile", "evaluation.evaluation_freq": "evaluation.freq"}


# A test of a value, and the text that describes it.
Range = tuple[Callable[[Any], bool], str]


def _at_least(low: float) -> Range:
    return lambda value: value >= low, f"at least {low}"


def _above(low: float) -> Range:
    return lambda value: value > low, f"above {low}"


def _between(low: float, high: float) -> Range:
    return lambda value: low <= value <= high, f"from {low} to {high}"


_BETA: Range = lambda value: 0 <= value < 1, "at least 0 and below 1"
_POSITIVE_OR_ALL: Range = lambda value: value == -1 or value >= 1, "at least 1, or -1"
_PLAIN_NAME: Range = lambda value: "/" not in value and value not in (".", ".."), "a name without slashes"
_NOT_EMPTY: Range = lambda value: bool(value.strip()), "not empty"

RANGES: dict[str, Range] = {
    "job.dump_folder": _NOT_EMPTY,
    "job.wandb_run_name": _PLAIN_NAME,
    "profiling.profile_freq": _at_least(1),
    "metrics.log_freq": _at_least(1),
    "model.num_quantizers": _between(1, 32),
    "optimizer.lr": _at_least(0),
    "optimizer.beta1": _BETA,
    "optimizer.beta2": _BETA,
    "optimizer.eps": _above(0),
    "optimizer.weight_decay": _at_least(0),
    "lr_scheduler.warmup_steps": _at_least(0),
    "lr_scheduler.decay_ratio": _between(0, 1),
    "lr_scheduler.lr_min": _between(0, 1),
    "training.dataset": _NOT_EMPTY,
    "training.max_seconds": _above(0),
    "training.packing_window": _at_least(1),
    "training.num_workers": _at_least(0),
    "training.read_retries": _at_least(0),
    "training.max_bad_share": _between(0, 1),
    "training.local_batch_size": _at_least(1),
    "training.global_batch_size": _POSITIVE_OR_ALL,
    "training.max_norm": _at_least(0),
    "training.steps": _at_least(1),
    "training.gc_freq": _at_least(1),
    "training.seed": _between(0, 2**63 - 1),
    "validation.dataset": _NOT_EMPTY,
    "validation.local_batch_size": _at_least(1),
    "validation.freq": _at_least(1),
    "validation.steps": _POSITIVE_OR_ALL,
    "evaluation.freq": _at_least(1),
    "evaluation.dataset_path": _NOT_EMPTY,
    "evaluation.max_pairs_per_task": _at_least(0),
    "evaluation.batch_size": _at_least(1),
    "parallelism.data_parallel_replicate_degree": _at_least(1),
    "parallelism.data_parallel_shard_degree": _POSITIVE_OR_ALL,
    "parallelism.tensor_parallel_degree": _at_least(1),
    "parallelism.pipeline_parallel_degree": _at_least(1),
    "parallelism.pipeline_parallel_layers_per_stage": _at_least(1),
    "parallelism.pipeline_parallel_microbatch_size": _at_least(1),
    "parallelism.context_parallel_degree": _at_least(1),
    "checkpoint.folder": _NOT_EMPTY,
    "checkpoint.interval": _at_least(1),
    "checkpoint.keep_latest_k": _at_least(0),
    "checkpoint.load_step": _at_least(-1),
    "comm.init_timeout_seconds": _at_least(1),
    "comm.train_timeout_seconds": _at_least(1),
    "comm.trace_buf_size": _at_least(0),
}


# The function with which a rule refuses a value. Its arguments are the key, and a text that says what is wrong.
Refuse = Callable[[str, str], None]


def value_of(config: JobConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def row_lengths(config: JobConfig) -> dict[str, int]:
    """The lengths of rows, by key: of training, and of validation and evaluation if they are enabled."""
    used = {
        "training": True,
        "validation": config.validation.enabled,
        "evaluation": config.evaluation.enable_evaluation,
    }
    return {f"{section}.seq_len": getattr(config, section).seq_len for section in used if used[section]}


def show(value: Any) -> str:
    """A value as TOML writes it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def said(key: str, value: Any, origin: str | None = None) -> str:
    """``key = value``, and where the value comes from."""
    return f"{key} = {show(value)}" + (f" {origin}" if origin else "")
