"""Train a Llama on speech: ``torchrun --nproc_per_node=N -m torchtitan.train --job.config_file FILE.toml``.

What happens, from top to bottom of :func:`main`:

1. the config is read and checked, and every file it names looked up, before any process group exists;
2. :func:`build` makes model, optimizer, data loaders and checkpoints of this rank;
3. :func:`train` repeats: fetch the microbatches of a step, count their targets over all ranks, run each forward and
   backward with its loss divided by that count, clip, update; log, validate and save at their intervals.

Runs on 1..N GPUs (nccl) or CPU processes (gloo); without torchrun it is a run of one rank.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from torchtitan.audio.codec import Codec
from torchtitan.checkpoint.hf_export import export_checkpoint, write_hf_files
from torchtitan.checkpoint.manager import (
    CheckpointManager,
    find_start,
    is_hf_folder,
    load_checkpoint,
    read_state,
    restore_random_state,
)
from torchtitan.components.dataloader import LENGTH_MULTIPLE, Batch, LoaderSettings, SpeechDataLoader, max_frames_of
from torchtitan.components.gradients import FiniteGuard, clip_grad_norm, total_norm
from torchtitan.components.lr_scheduler import lr_factor
from torchtitan.components.metrics import MetricsLogger
from torchtitan.components.optimizer import AnyOptimizer, OptimizerInBackward, build_optimizer
from torchtitan.components.profiling import memory_snapshots, profile
from torchtitan.components.validate import ValidationResult, Validator
from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys import row_lengths
from torchtitan.config_manager import ConfigManager, from_dict, run_name, to_dict
from torchtitan.datasets.bad_rows import BAD_ROWS_FILE, BadRows
from torchtitan.datasets.corpora import FoundData, find_data, open_corpora
from torchtitan.datasets.recordings import Ranks
from torchtitan.datasets.samples import Counters
from torchtitan.datasets.sources import sources_from_config
from torchtitan.distributed.parallel_dims import ParallelDims, accumulation_steps
from torchtitan.distributed.utils import (
    broadcast_object,
    init_distributed,
    rank,
    shorten_timeout,
    sum_over_ranks,
    world_size,
)
from torchtitan.estimate import estimate_here
from torchtitan.eval.data import Task
from torchtitan.eval.evaluator import Evaluator, find_pairs
from torchtitan.models.base import BaseModel
from torchtitan.models.float8 import check_float8
from torchtitan.models.llama3.parallel_model import ParallelModel, check_split
from torchtitan.models.llama3.weights import init_random, load_hf
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.models.mx import check_mx
from torchtitan.rules import check
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.locks import locked
from torchtitan.tools.logging import init_logger, logger, quiet_transformers
from torchtitan.tools.signals import StopRequest, end_with_parent, stop_requests
from torchtitan.tools.utils import DTYPES, GarbageCollection

# How long a rank waits for the data of the others.
DATA_TIMEOUT = timedelta(minutes=30)


@dataclass
class Inputs:
    """All that a run reads, found and checked before the process group exists."""

    config: JobConfig
    folder: Path
    base: BaseModel
    codec: Codec | None  # None: all data are codes already
    train_data: FoundData
    validation_data: FoundData | None
    pairs: list[Task]  # to evaluate on
    checkpoints: CheckpointManager
    latest: Path | None  # checkpoint to resume from
    initial: Path | None  # checkpoint to start from where there is none to resume from


@dataclass
class Trainer:
    """The parts of a run on this rank."""

    inputs: Inputs
    dims: ParallelDims
    device: torch.device
    data_group: Any  # all ranks, with a long timeout for reading data
    model: ParallelModel
    optimizer: AnyOptimizer
    guard: FiniteGuard
    loader: SpeechDataLoader
    validator: Validator | None
    evaluator: Evaluator | None
    metrics: MetricsLogger
    step: int = 0
    tokens_seen: int = 0
    schedule_start: int = 0  # step before the first one of the schedule of the learning rate
    data_state: dict[str, Any] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    stop: StopRequest = field(default_factory=StopRequest)  # of this rank
    stops: float = 0.0  # ranks that were asked to stop, as of the begun step
    validation: ValidationResult | None = None


def find_inputs(config: JobConfig) -> Inputs:
    """Check a config and open what it names.

    Raises:
        UserError: a value, the arithmetic of ranks and batches, or a file is wrong.
    """
    check(config, world_size())
    if config.experimental.custom_import:
        try:
            import_module(config.experimental.custom_import)
        except ImportError as error:
            raise UserError(f"experimental.custom_import: the module cannot be imported ({error}).") from None
    # Several ranks count rows later, one for all: that may read a header from each of thousands of files.
    retries, counts = config.training.read_retries, world_size() == 1
    train_data = find_data(sources_from_config(config.training, "training"), retries, counts)
    validation_data = None
    if config.validation.enabled:
        validation_data = find_data(sources_from_config(config.validation, "validation"), retries, counts)
    model, saving = config.model, config.checkpoint
    codec_settings = (model.audio_tokenizer, model.num_quantizers, model.codec_padding, model.codec_window)
    for data in filter(None, (train_data, validation_data)):
        for codes in data.shards.values():
            codes.check_codec(*codec_settings, model.resampler)
    if config.profiling.enable_memory_snapshot and not torch.cuda.is_available():
        raise UserError("profiling.enable_memory_snapshot = true: snapshots are of CUDA memory, and there is none.")
    folder = Path(config.job.dump_folder).expanduser() / run_name(config)
    checkpoints = CheckpointManager(folder / saving.folder, saving.keep_latest_k, saving.async_mode)
    latest = checkpoints.latest(saving.load_step) if saving.enable_checkpoint else None
    initial = None
    if saving.initial_load_path and latest is None:
        initial = find_start(saving.initial_load_path, saving.initial_load_model_only)
    if (resumed := latest or (None if saving.initial_load_model_only else initial)) is not None:
        require_same_run(resumed, config)
    codec = None
    pairs = find_pairs(config.evaluation) if config.evaluation.enable_evaluation else []
    if train_data.files or (validation_data and validation_data.files) or pairs:
        codec = Codec.load(*codec_settings, resampler=model.resampler)
    base = BaseModel.load(model)
    base.warn_of_other_conventions(model)
    if initial is not None and is_hf_folder(initial):
        base.require_same_sizes(initial)
    check_split(config, base.args)
    check_float8(config)
    check_mx(config)
    for key, length in row_lengths(config).items():
        if length > base.args.max_seq_len:
            raise UserError(f"{key} = {length}: {model.name} was made for rows of at most {base.args.max_seq_len} ids.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"job.dump_folder: {folder} cannot be created ({error.strerror}).") from None
    return Inputs(config, folder, base, codec, train_data, validation_data, pairs, checkpoints, latest, initial)


# Settings that a run cannot change on the way: they decide what a token means and where it is in the data.
FIXED_KEYS = (
    *(f"model.{key}" for key in ("num_quantizers", "audio_tokenizer", "codec_padding", "codec_window", "resampler")),
    *(f"training.{key}" for key in ("task", "max_seconds", "long_clips", "end_cut_clips")),
    *(f"training.{key}" for key in ("seq_len", "packing", "packing_window")),
)
NEW_RUN = "start a new run (job.wandb_run_name) from its weights with checkpoint.initial_load_path."


def require_same_run(checkpoint: Path, config: JobConfig) -> None:
    """Refuse to resume a checkpoint of other samples or another token stream, or one without optimizer state.

    Raises:
        UserError: what differs.
    """
    state = read_state(checkpoint)
    saved = from_dict(state["config"])
    for name in FIXED_KEYS:
        before, now = attrgetter(name)(saved), attrgetter(name)(config)
        if before != now:
            raise UserError(
                f"{checkpoint}: it was made with {name} = {before!r}, not {now!r}, so it cannot be resumed; {NEW_RUN}"
            )
    if state["model_only"] and state["step"] < config.training.steps:
        raise UserError(f"{checkpoint}: it holds only weights, so the run cannot be made longer; {NEW_RUN}")


def build(inputs: Inputs) -> Trainer:
    """Make the parts of a run, and bring them to where its latest checkpoint left off; called by all ranks."""
    config, base = inputs.config, inputs.base
    device = init_distributed(config.comm, inputs.folder)
    # A group for data alone: reads that are tried again may take longer than any other collective.
    group = dist.new_group(backend="gloo", timeout=DATA_TIMEOUT)
    share_data(inputs, group)
    latest, initial = choose_checkpoint(inputs, group)
    seed_everything(config, latest)

    dims = ParallelDims.from_config(config, rank(), world_size())
    first_id = base.stream.base_size if config.training.audio_head else 0
    model = ParallelModel(config, base.args, dims, device, first_id)
    start = latest or initial
    resumes = start is not None and not is_hf_folder(start)
    if start is None and config.model.pretrained:
        load_hf(model, base.folder, base.known_vocab_size)
    elif start is None:
        init_random(model, config.training.seed or 0)
    elif not resumes:
        load_hf(model, start, base.args.vocab_size)
        logger.info("weights loaded from %s", start)
    optimizer = build_optimizer(model, config.optimizer)
    guard = FiniteGuard(optimizer, device, group)

    if inputs.codec is not None:
        inputs.codec.to(device)
    bad_rows = BadRows(inputs.folder / BAD_ROWS_FILE)
    loader = build_loader(inputs, dims, bad_rows, group, validation=False)
    validator = None
    if inputs.validation_data:
        validation_loader = build_loader(inputs, dims, bad_rows, group, validation=True)
        validator = Validator(validation_loader, base.stream, config.validation.steps, group, dims.counts_rows)

    evaluator = None
    if inputs.pairs and inputs.codec is not None:
        share, compiled = (dims.data_rank, dims.data_degree), config.training.compile
        evaluator = Evaluator(
            config.evaluation, inputs.pairs, inputs.codec, base.stream, share, dims.counts_rows, group, compiled
        )

    metrics = MetricsLogger(config, inputs.folder, rank(), device, base.args.flops_per_token)
    trainer = Trainer(inputs, dims, device, group, model, optimizer, guard, loader, validator, evaluator, metrics)
    if start is not None and resumes:
        load(trainer, start, weights_only=latest is None and config.checkpoint.initial_load_model_only)
    logger.info(
        "%s: %s parameters, %d ranks on %s, %d rows a step, run folder %s",
        run_name(config),
        f"{base.args.num_params:,}",
        world_size(),
        device.type,
        config.training.local_batch_size * accumulation_steps(config, world_size()) * dims.data_degree,
        inputs.folder,
    )
    return trainer


def choose_checkpoint(inputs: Inputs, group: Any) -> tuple[Path | None, Path | None]:
    """The checkpoint to resume from, and what to start from if there is none; called by all ranks.

    A damaged checkpoint is set aside, and the one before it is taken.

    Raises:
        UserError: the one that checkpoint.load_step names, or the one to start from, is damaged.
    """
    saving = inputs.config.checkpoint
    # Another rank may have looked a moment later, at a folder that is being written.
    latest, initial = broadcast_object((inputs.latest, inputs.initial), group)
    if saving.enable_checkpoint and saving.load_step < 0:
        newest = inputs.checkpoints.newest_intact(group)
        if newest != latest and newest is not None:
            require_same_run(newest, inputs.config)
        if newest is None and latest is not None and saving.initial_load_path:
            initial = find_start(saving.initial_load_path, saving.initial_load_model_only)
        latest = newest
    named = latest if saving.load_step >= 0 else (None if latest else initial)
    if named is not None and not is_hf_folder(named) and (damage := inputs.checkpoints.damage(named, group)):
        raise UserError(damage)
    if saving.load_step >= 0 and rank() == 0:
        inputs.checkpoints.set_aside_after(saving.load_step)
    return latest, initial


def share_data(inputs: Inputs, group: Any) -> None:
    """Have rank 0 count the rows of all files, tell the others, and make sure that all see the same data.

    Raises:
        UserError: the data cannot be used, or a rank has other files.
    """
    for data in filter(None, (inputs.train_data, inputs.validation_data)):
        if rank() == 0 and not data.indices:
            data.count_rows(inputs.config.training.read_retries)
        data.indices = broadcast_object(data.indices, group)
        expected = broadcast_object(data.fingerprint, group)
        if data.fingerprint != expected:
            paths = ", ".join(source.path for source in data.sources)
            raise UserError(f"{paths}: rank {rank()} finds other data there than rank 0.")


def seed_everything(config: JobConfig, latest: Path | None) -> None:
    """Settle the seed: the configured one, or the resumed run's, or a new one, the same on all ranks."""
    if config.training.seed is None:
        saved = read_state(latest)["config"]["training"]["seed"] if latest else random.SystemRandom().getrandbits(31)
        config.training.seed = broadcast_object(saved)
    torch.manual_seed(config.training.seed)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def build_loader(
    inputs: Inputs, dims: ParallelDims, bad_rows: BadRows, group: Any, validation: bool
) -> SpeechDataLoader:
    """The loader of the training data, endless and shuffled, or of the validation data, once and as it lies."""
    config, base = inputs.config, inputs.base
    training, part = config.training, config.validation if validation else config.training
    data = inputs.validation_data if validation else inputs.train_data
    assert data is not None
    if rank() == 0:
        for path, reason in data.bad_files:
            bad_rows.add(path, f"the unreadable part of the file is left out: {reason}")
    # A piece of a split recording never has to be cut, so it fits a row.
    max_frames, split = max_frames_of(training.max_seconds), training.long_clips == "split"
    if split:
        max_frames = min(max_frames, base.stream.max_frames(part.seq_len))
    seed, packing = training.seed or 0, training.packing == "best_fit"
    mixes = split and bool(data.files)  # pieces in code shards are drawn one by one
    corpora, mixture = open_corpora(data, seed, max_frames, split, training.read_retries, shuffle=not validation)
    settings = LoaderSettings(
        training.task,
        part.seq_len,
        part.local_batch_size,
        training.max_seconds,
        split=split,
        end_cut=training.end_cut_clips,
        # A validation of some batches is not to wait for a whole window, and its losses are the same.
        packing=packing and not validation,
        window=training.packing_window if (packing or mixes) and not validation else 1,
        seed=seed,
        num_workers=training.num_workers,
        # Compiled graphs and the buffers of a pipeline are for one length.
        fixed_length=training.compile or (dims.pipeline > 1 and not validation),
        # Each rank of a row has a multiple of LENGTH_MULTIPLE, too, where products in 8 bits need it.
        length_multiple=dims.padded_multiple(LENGTH_MULTIPLE * (dims.context if config.model.converters else 1)),
        read_retries=training.read_retries,
        max_bad_share=training.max_bad_share,
        num_bad_files=len(data.bad_files),
    )
    ranks = Ranks(rank(), world_size(), group, (dims.data_rank, dims.data_degree))
    return SpeechDataLoader(corpora, mixture, base.stream, inputs.codec, base.tokenizer, settings, ranks, bad_rows)


def require_same_data(checkpoint: Path, state: dict[str, Any], inputs: Inputs) -> None:
    """Refuse a checkpoint of other data.

    Raises:
        UserError: the data are others.
    """
    if state["data"] and state["data_fingerprint"] != inputs.train_data.fingerprint:
        raise UserError(
            f"{checkpoint}: it was made with other data (files, rows, weights or limits), in which its place means "
            f"nothing, so it cannot be resumed; {NEW_RUN}"
        )


def load(trainer: Trainer, checkpoint: Path, weights_only: bool) -> None:
    """Continue from a checkpoint: all of it, or only its weights.

    Raises:
        UserError: it does not fit this run.
    """
    excluded = trainer.inputs.config.checkpoint.exclude_from_loading
    optimizer = None if weights_only or "optimizer" in excluded else trainer.optimizer
    state = load_checkpoint(checkpoint, trainer.model, optimizer, trainer.inputs.base.args)
    if weights_only:
        logger.info("weights loaded from %s", checkpoint)
        return
    seed = state["config"]["training"]["seed"]
    if state["data"] and "dataloader" not in excluded:
        if seed != trainer.inputs.config.training.seed:
            raise UserError(
                f"{checkpoint}: it was made with training.seed = {seed}, and another seed orders the data in another "
                f"way, so it cannot be resumed; {NEW_RUN}"
            )
        require_same_data(checkpoint, state, trainer.inputs)
        trainer.loader.load_state_dict(state["data"])
        trainer.data_state = state["data"]
    trainer.step, trainer.tokens_seen = state["step"], state["tokens_seen"]
    trainer.schedule_start = state["step"] if "lr_scheduler" in excluded else state.get("schedule_start", 0)
    if rank() < len(state["ranks"]) and "random" not in excluded:
        restore_random_state(state["ranks"][rank()]["random"])
    logger.info("resumed from %s", checkpoint)


def save(trainer: Trainer) -> None:
    """Save the current step; called by all ranks."""
    config, base = trainer.inputs.config, trainer.inputs.base
    weights_only = trainer.step == config.training.steps and config.checkpoint.last_save_model_only
    state = {
        "model_args": base.args.to_dict(),
        "tokens_seen": trainer.tokens_seen,
        "schedule_start": trainer.schedule_start,
        "data": trainer.data_state,
        "data_fingerprint": trainer.inputs.train_data.fingerprint,
        "config": to_dict(config),
        "validation": asdict(trainer.validation) if trainer.validation else None,
    }
    path = trainer.inputs.checkpoints.save(
        trainer.step,
        trainer.model,
        None if weights_only else trainer.optimizer,
        state,
        lambda folder: write_hf_files(folder, base.args, base.tokenizer, base.stream, config.model),
        DTYPES[config.checkpoint.export_dtype],
    )
    background = config.checkpoint.async_mode != "disabled"
    logger.info("checkpoint %s to %s", "is being saved" if background else "saved", path)


def save_hf(inputs: Inputs, step: int) -> None:
    """Write a checkpoint in Hugging Face format too; called by rank 0."""
    output = hf_folder(inputs, step)
    output.parent.mkdir(exist_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    export_checkpoint(inputs.checkpoints.folder / f"step-{step}", output, DTYPES[inputs.config.checkpoint.export_dtype])
    logger.info("model in Hugging Face format saved to %s", output)


def hf_folder(inputs: Inputs, step: int) -> Path:
    """Where checkpoint.last_save_in_hf writes the model."""
    return inputs.folder / "hf" / f"step-{step}"


def train(trainer: Trainer) -> None:
    """The training loop."""
    config, steps = trainer.inputs.config, trainer.inputs.config.training.steps
    if config.checkpoint.create_seed_checkpoint:
        if trainer.step:
            raise UserError(
                f"{trainer.inputs.checkpoints.folder}: the run has checkpoints already, it cannot have a seed."
            )
        save(trainer)
        return
    accumulation = accumulation_steps(config, world_size())
    if trainer.step >= steps:
        logger.info("nothing to do: the run is at step %d of %d", trainer.step, steps)
        return
    garbage = GarbageCollection(config.training.gc_freq, config.training.gc_debug)
    first_step = trainer.step + 1
    with (
        closing(iter(trainer.loader)) as batches,
        profile(config.profiling, trainer.inputs.folder, rank(), trainer.step) as profiler,
        memory_snapshots(config.profiling, trainer.inputs.folder, rank()) as snapshot,
    ):
        while trainer.step < steps:
            trainer.step += 1
            garbage.run(trainer.step)
            microbatches = fetch(trainer, batches, accumulation)
            loss, grad_norm, lr = train_step(trainer, microbatches)

            last, saving = trainer.step == steps, config.checkpoint
            logs = trainer.step == first_step or last or trainer.step % config.metrics.log_freq == 0
            saves = saving.enable_checkpoint and (
                last
                or trainer.stops > 0
                or trainer.step % saving.interval == 0
                or (trainer.step == 1 and saving.enable_first_step_checkpoint)
            )
            validates = trainer.validator and (last or trainer.step % config.validation.freq == 0)
            evaluates = trainer.evaluator and (last or trainer.step % config.evaluation.freq == 0)
            if logs or saves or validates or evaluates:
                trainer.guard.settle()
            if logs:
                report(trainer, loss, grad_norm, lr)
            with trainer.metrics.paused():
                if validates:
                    validate(trainer)
                if evaluates:
                    evaluate(trainer)
                if saves:
                    save(trainer)
            if profiler:
                profiler.step()
            snapshot(trainer.step)
            if trainer.step == first_step:
                groups = trainer.dims.groups(trainer.device.type) if world_size() > 1 else []
                shorten_timeout(config.comm, trainer.device, groups)
            if trainer.stops:
                break
    if trainer.step < steps:
        saved = config.checkpoint.enable_checkpoint
        logger.warning(
            "stopped at step %d of %d by %s; %s",
            trainer.step,
            steps,
            trainer.stop.name or "a signal to another rank",
            "the same command goes on from there" if saved else "checkpoint.enable_checkpoint is off: nothing is saved",
        )
    elif config.checkpoint.last_save_in_hf:
        trainer.inputs.checkpoints.wait()
        dist.barrier()
        if rank() == 0:
            save_hf(trainer.inputs, trainer.step)


def fetch(trainer: Trainer, batches: Iterator[Batch], accumulation: int) -> list[Batch]:
    """The microbatches of one step, and the time that waiting for them took."""
    microbatches = []
    for _ in range(accumulation):
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        counts = trainer.dims.counts_rows
        trainer.metrics.add(
            batch.num_tokens * counts, batch.tokens.numel() * counts, batch.num_squares * counts, waited
        )
        if trainer.inputs.config.metrics.save_samples:
            rows = json.dumps({"step": trainer.step, "rows": batch.keys}, ensure_ascii=False)
            with (trainer.inputs.folder / f"samples.rank{rank()}.jsonl").open("a") as file:
                file.write(f"{rows}\n")
        trainer.data_state, trainer.counters = batch.state, batch.counters
        microbatches.append(batch)
    return microbatches


def train_step(trainer: Trainer, microbatches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One update. Returns this rank's share of the mean loss, the gradient norm before clipping, and the rate.

    The loss of every target of the step, on whichever rank and in whichever microbatch, has the same weight.
    """
    config = trainer.inputs.config
    targets = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in microbatches)
    tokens = sum(batch.num_tokens for batch in microbatches)
    counted = [float(count * trainer.dims.counts_rows) for count in (targets, tokens)]
    # The first collective after the data are fetched: here all ranks wait for the slowest one.
    targets, tokens, trainer.stops = sum_over_ranks([*counted, float(bool(trainer.stop))], trainer.data_group)
    trainer.tokens_seen += int(tokens)
    step, steps = (n - trainer.schedule_start for n in (trainer.step, config.training.steps))
    lr = config.optimizer.lr * lr_factor(step, steps, config.lr_scheduler)
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr

    def backward(batch: Batch) -> torch.Tensor:
        return trainer.model.backward(batch.tokens, batch.targets, batch.positions, targets)

    total = torch.zeros((), device=trainer.device)
    for batch in microbatches[:-1]:
        total += backward(batch)
    if isinstance(trainer.optimizer, OptimizerInBackward):
        trainer.inputs.checkpoints.wait_for_staging()
        with trainer.optimizer.updates():
            total += backward(microbatches[-1])
        norm = total_norm(trainer.model, trainer.optimizer.norms)
    else:
        total += backward(microbatches[-1])
        norm = clip_grad_norm(trainer.model, config.training.max_norm)
    trainer.guard.check(trainer.step, total, norm, [batch.keys for batch in microbatches])
    trainer.inputs.checkpoints.wait_for_staging()
    trainer.optimizer.step()
    trainer.model.after_update()
    trainer.optimizer.zero_grad(set_to_none=True)
    return total, norm.total, lr


def report(trainer: Trainer, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float) -> None:
    """Sum the loss over ranks, and log the step."""
    (mean,) = sum_over_ranks([loss.item() * trainer.dims.counts_loss])
    trainer.metrics.report(trainer.step, mean, grad_norm.item(), lr, asdict(trainer.counters))


def publish(trainer: Trainer, figures: dict[str, float], message: str, *values: Any) -> None:
    """Log a message that begins with the step, and write its figures."""
    extra = {"figures": {"step": trainer.step, **figures}}
    logger.info(f"step: %d  {message}", trainer.step, *values, extra=extra)
    trainer.metrics.write(trainer.step, figures)


def validate(trainer: Trainer) -> None:
    """Run the validation and log it."""
    assert trainer.validator is not None
    result = trainer.validation = trainer.validator.run(trainer.model.losses)
    by_quantizer = {f"validation/loss_q{q}": loss for q, loss in enumerate(result.quantizers)}
    publish(
        trainer,
        {"validation/loss": result.loss, "validation/code_entropy": result.entropy, **by_quantizer},
        "validation loss: %.4f  by quantizer: %s  (%s targets; entropy of the codes: %.4f)",
        result.loss,
        " ".join(f"{loss:.3f}" for loss in result.quantizers),
        f"{result.num_targets:,}",
        result.entropy,
    )


def evaluate(trainer: Trainer) -> None:
    """Run the evaluation and log it."""
    assert trainer.evaluator is not None
    result = trainer.evaluator.run(trainer.model.losses)
    by_task = {f"evaluation/accuracy_{name}": accuracy for name, accuracy in result.by_task.items()}
    publish(
        trainer,
        {"evaluation/accuracy": result.accuracy, **by_task},
        "evaluation: %.1f%%%s of %d pairs  %s",
        100 * result.accuracy,
        "" if result.standard_error is None else f" +- {100 * result.standard_error:.1f}",
        result.pairs,
        "  ".join(f"{name}: {100 * accuracy:.0f}%" for name, accuracy in result.by_task.items()),
    )


def main(argv: list[str] | None = None) -> int:
    """Run a training; returns the exit code."""
    init_logger()
    quiet_transformers()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may be killed before it can end its ranks
        end_with_parent(signal.SIGTERM)
    try:
        config = ConfigManager().parse_args(argv)
        if config.memory_estimation.enabled:
            if rank() == 0:
                print(estimate_here(config, world_size()))
            return 0
        inputs = find_inputs(config)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # each node may lack another file
            print(f"error: {error}", file=sys.stderr)
        return 2
    init_logger(config.metrics.log_format == "json")
    if config.job.print_args:
        logger.info("%s", to_dict(config))
    logger.info("%s", config.job.description)
    try:
        if inputs.latest and (done := read_state(inputs.latest)["step"]) >= config.training.steps:
            if rank() == 0 and "dataloader" not in config.checkpoint.exclude_from_loading:
                if not inputs.train_data.indices:
                    inputs.train_data.count_rows(config.training.read_retries)
                require_same_data(inputs.latest, read_state(inputs.latest), inputs)
            logger.info("nothing to do: the run is at step %d of %d (%s)", done, config.training.steps, inputs.latest)
            # The run may have been killed while it wrote the model.
            if config.checkpoint.last_save_in_hf and rank() == 0 and not hf_folder(inputs, done).exists():
                save_hf(inputs, done)
            return 0
        with locked(inputs.folder) if rank() == 0 else nullcontext():
            trainer = build(inputs)
            # Signals are noted until the last save is written.
            with stop_requests() as trainer.stop, closing(inputs.checkpoints), closing(trainer.metrics):
                train(trainer)
            if trainer.stop.name == "SIGINT":
                return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized() and world_size() > 1:
            # Other ranks may wait in a collective: torchrun ends them, and shows this error in its report, also where
            # this rank's output is filtered away.
            get_error_handler().initialize()
            get_error_handler().record_exception(error)
            os._exit(2)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_command(main)
