"""The list of all rules about settings. Each rule is defined beside the code that needs it.

:func:`check_values` runs when settings are read, and does not depend on the machine. :func:`check` also checks what
depends on the number of ranks and on the files of this machine. It runs before a process group exists.
"""

import os

from torchtitan.checkpoint.manager import check_saving
from torchtitan.components.optimizer import check_updates
from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys import RANGES, TYPES, Refuse, row_lengths, said, value_of
from torchtitan.datasets.sources import check_places, check_tables
from torchtitan.distributed.parallel_dims import accumulation_steps, check_parallelism
from torchtitan.models.base import check_flavor
from torchtitan.models.llama3.activation_checkpoint import check_mode
from torchtitan.models.llama3.parallel_model import check_compile, check_converters
from torchtitan.tools.errors import ConfigError
from torchtitan.tools.hub import HUB_NAME


def check_samples(config: JobConfig, refuse: Refuse) -> None:
    """Refuse rows that are too short for a frame, and settings that need samples without a transcription."""
    training, shortest = config.training, config.model.num_quantizers + 3
    for key, length in row_lengths(config).items():
        if length < shortest:
            quantizers = config.model.num_quantizers
            refuse(key, f"one frame with model.num_quantizers = {quantizers} needs at least {shortest} tokens")
    if training.long_clips == "split" and training.task != "a2a":
        refuse("training.long_clips", f"the transcription of task {training.task} belongs to the whole recording")
    if training.audio_head and training.task != "a2a":
        refuse("training.audio_head", f"the transcription of task {training.task} has tokens that are not audio tokens")


RULES = (
    check_flavor,
    check_samples,
    check_updates,
    check_compile,
    check_converters,
    check_mode,
    check_parallelism,
    check_saving,
)


def check_values(config: JobConfig, origins: dict[str, str] | None = None) -> None:
    """Refuse values that no machine could run with.

    Args:
        origins: where the value of each key comes from, for the message.

    Raises:
        ConfigError: a value is wrong.
    """

    def refuse(key: str, expected: str) -> None:
        raise ConfigError(f"{said(key, value_of(config, key), (origins or {}).get(key))}: {expected}.")

    for key in TYPES:
        value = value_of(config, key)
        if key in RANGES and value is not None and not RANGES[key][0](value):
            refuse(key, f"it must be {RANGES[key][1]}")
    for section in ("training", "validation"):
        part = getattr(config, section)
        check_tables(section, part.source, part.dataset_path)
    for rule in RULES:
        rule(config, refuse)


def check(config: JobConfig, world_size: int) -> None:
    """Refuse settings that cannot run on this machine and on this number of ranks.

    Raises:
        ConfigError: a setting is wrong.
    """
    check_values(config)
    accumulation_steps(config, world_size)
    if config.parallelism.enable_compiled_autograd and (world_size > 1 or config.training.enable_cpu_offload):
        raise ConfigError(
            "parallelism.enable_compiled_autograd = true: FSDP2, which shards or offloads the model, keeps its part of "
            "the backward pass out of compiled graphs, so it only works on one rank and without enable_cpu_offload."
        )
    if config.checkpoint.create_seed_checkpoint and world_size > 1:
        raise ConfigError(f"checkpoint.create_seed_checkpoint = true: one rank makes it, not {world_size}.")

    for key, kind in (("model.name", "model"), ("model.audio_tokenizer", "codec")):
        section, field_name = key.split(".")
        check_local(key, getattr(getattr(config, section), field_name), f"a {kind} folder")
    check_local("training.dataset_path", config.training.dataset_path, "a data set's folder or file", files=True)
    check_places("training", config.training)
    if config.validation.enabled:
        check_local("validation.dataset_path", config.validation.dataset_path, "a data set's folder", files=True)
        check_places("validation", config.validation)
    if config.evaluation.enable_evaluation:
        check_local("evaluation.dataset_path", config.evaluation.dataset_path, "a folder of pairs")

    start = config.checkpoint.initial_load_path
    if start is not None and not os.path.isdir(start):
        raise ConfigError(f"{said('checkpoint.initial_load_path', start)}: there is no such folder.")
    if os.path.exists(config.job.dump_folder) and not os.path.isdir(config.job.dump_folder):
        raise ConfigError(f"{said('job.dump_folder', config.job.dump_folder)}: this is a file, not a folder.")


def check_local(key: str, value: str | None, what: str, files: bool = False) -> None:
    """Check that a local folder (or file) exists. A hub name (owner/name) is checked by the download.

    Raises:
        ConfigError: the value is neither.
    """
    found = value is None or os.path.isdir(value) or (files and os.path.isfile(value))
    if not found and not HUB_NAME.fullmatch(value or ""):
        raise ConfigError(f"{said(key, value)}: this is neither {what} that exists nor a hub name (owner/name).")
