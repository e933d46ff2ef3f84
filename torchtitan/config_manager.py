"""Every setting of a training run: what it is called, what it means, and where its value comes from.

The dataclasses below are the manual. Each key has its explanation directly under it, and `--help` prints these
explanations. A value is the key's default, unless the TOML file given with `--job.config_file` sets it, unless the
command line sets it (`--training.steps 20`). Names are those that TorchTitan used in mid-2025, and this project's own.

Nothing is silently ignored: a key that is not known is an error, and a key that is known but not built yet is an error
too as soon as it is set to something else than what happens anyway (the table `OFF_ONLY`). All errors are one sentence,
raised as `ConfigError`. Neither torch nor any other package is imported here.
"""

import ast
import difflib
import inspect
import itertools
import json
import math
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan.tools.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(UserError):
    """What a user set cannot be used. The message is one sentence that can be shown as it is."""


# ---------------------------------------------------------------------------------------------------------------------
# The manual
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """The run as a whole."""

    config_file: str | None = None
    """TOML file with the settings of this run. Can only be given on the command line."""

    dump_folder: str = "./outputs"
    """Folder for all that a run writes. Each run has its own folder in it, named after the run."""

    description: str = "Llama-Mimi training"
    """Free text, logged at the start."""

    use_for_integration_test: bool = False
    """A mark that TorchTitan's own test suite puts on its files. It changes nothing."""

    print_args: bool = False
    """Log all settings at the start."""

    wandb_run_name: str | None = None
    """
    Name of the run: of its folder under job.dump_folder, and in Weights & Biases. By default it is made from the
    model, the data set, the number of quantizers and the sequence length, so that the same settings find the same
    folder again and resume from it.
    """


@dataclass
class Profiling:
    """Traces of where time and memory go, written by torch.profiler."""

    enable_profiling: bool = False
    """Write a trace every profiling.profile_freq steps."""

    save_traces_folder: str = "profile_traces"
    """Where traces are written, inside the run's folder."""

    profile_freq: int = 10
    """Steps from one trace to the next."""

    enable_memory_snapshot: bool = False
    """Write snapshots of the GPU memory allocator, at the same steps and when memory runs out."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Where memory snapshots are written, inside the run's folder."""


@dataclass
class Metrics:
    """What is reported during training, and where."""

    log_freq: int = 10
    """Steps from one console line (and one point in TensorBoard and Weights & Biases) to the next."""

    enable_tensorboard: bool = False
    """Write the figures for TensorBoard."""

    log_format: Literal["text", "json"] = "text"
    """
    How log lines are written. "json": one object a line, with time, level, rank and message; lines of a step,
    validation or evaluation also have its figures, under the names that metrics.jsonl uses.
    """

    disable_color_printing: bool = False
    """Print console lines without colours."""

    save_tb_folder: str = "tb"
    """Where TensorBoard's files are written, inside the run's folder."""

    save_samples: bool = False
    """Write which recordings each step was trained on, to samples.rank*.jsonl in the run's folder."""

    save_for_all_ranks: bool = False
    """Let every rank write its own TensorBoard and Weights & Biases figures, not only rank 0."""

    enable_wandb: bool = False
    """
    Send the figures to Weights & Biases. Project and team are taken from the environment (WANDB_PROJECT, WANDB_TEAM);
    WANDB_MODE=offline keeps everything on this machine.
    """


@dataclass
class Model:
    """The language model, and the codec that turns speech into its tokens."""

    name: str = "meta-llama/Llama-3.2-1B"
    """
    A Llama in Hugging Face format, as a hub name or a local folder: its config.json gives the architecture, and its
    tokenizer the text tokens. One that already has the audio tokens (llm-jp/Llama-Mimi-1.3B) is trained further.
    """

    flavor: Literal["", "debug", "1B", "3B", "8B"] = ""
    """
    Empty: the architecture of model.name. "debug": a small one of the same kind instead, without weights, for tests
    (needs model.pretrained = false; the tokenizer is still that of model.name). A size: only asserts that model.name
    is of that size, by its name.
    """

    tokenizer_path: str | None = None
    """
    Hub name or folder of the tokenizer, if it is not that of model.name. Its ids must be those that the model was
    trained with, or fewer.
    """

    pretrained: bool = True
    """Start from the weights of model.name. False: from random weights."""

    num_quantizers: int = 4
    """Codes for each frame of 80 ms (Q): one semantic, the others acoustic, from coarse to fine."""

    audio_tokenizer: str = "kyutai/mimi"
    """The Mimi codec, as a hub name or a local folder."""

    codec_padding: Literal["exact", "aligned"] = "exact"
    """
    How a clip's last, incomplete frame is made. "exact": as when the clip is encoded alone and without padding, which
    is how the published models were trained. "aligned": each clip is first filled up to whole frames with silence.
    """

    codec_window: Literal["codec", "full"] = "codec"
    """
    How far back the encoder looks. "codec": 10 s, as Mimi was made. "full": everything, as older transformers did
    when the published models were trained. It matters for clips above 10 s.
    """

    converters: list[str] = field(default_factory=list)
    """Transformations of the model: "float8" or "mx", see the sections of these names."""

    print_after_conversion: bool = False
    """Log the structure of the model after model.converters were applied."""


@dataclass
class Optimizer:
    """The optimizer and its constants."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Which optimizer."""

    lr: float = 3e-4
    """Learning rate at its highest: after the warm-up and before the decay."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""

    beta2: float = 0.95
    """Decay of the mean of squared gradients."""

    eps: float = 1e-8
    """Added to the denominator of an update."""

    weight_decay: float = 0.1
    """Weight decay."""

    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """How the update is computed: in one kernel (fastest), in a few over many tensors, or tensor by tensor."""

    early_step_in_backward: bool = False
    """
    Update each parameter in the backward pass, as soon as its gradient is there, so that gradients never lie in memory
    all at once. There is then no norm to clip by (training.max_norm = 0), and a gradient that is not finite ends the
    run after the weights were spoilt: it goes on from its last checkpoint.
    """


@dataclass
class LRScheduler:
    """The learning rate over time: a linear rise, a plateau, a decay."""

    warmup_steps: int = 200
    """Steps from 0 to optimizer.lr. Cut to the length of the run if that is shorter."""

    decay_ratio: float | None = None
    """
    Share of all steps, at the end of the run, in which the learning rate falls; before it stays at optimizer.lr.
    Not set: it falls from the end of the warm-up on.
    """

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the fall: a line, one minus a square root, or half a cosine."""

    lr_min: float = 0.0
    """Where the fall ends, as a ratio of optimizer.lr: 0.1 is a tenth of it."""


@dataclass
class DataSource:
    """One data set of several. Only path is needed; what else is not said is found out."""

    name: str | None = None
    """
    A built-in data set, whose facts then hold unless the table says otherwise, or any other name, which is shown in
    messages. By default the last part of path.
    """

    path: str | None = None
    """Local folder or file, or hub name (owner/name). A built-in data set has its own place."""

    format: Literal["auto", "parquet", "arrow", "audio", "manifest", "kaldi", "lhotse", "webdataset", "codes"] = "auto"
    """
    What the files are: tables in parquet or Arrow, audio files, manifests (.jsonl, .csv, .tsv; NeMo's too) that name
    audio files, Kaldi folders (wav.scp, text, segments), lhotse's manifests (cuts, or recordings and supervisions, as
    .jsonl or .jsonl.gz), tars as WebDataset writes them, or codes tokenized beforehand. "auto": whatever lies there.
    """

    subset: str | None = None
    """Only files of this subset: in a folder of that name, or with names that begin with it."""

    split: str | None = None
    """
    Only files of this split, likewise. By default those of split train if the names tell splits, else all files.
    """

    files: list[str] = field(default_factory=list)
    """
    Only files that fit one of these patterns, relative to path: * is any part of a name, **/ any number of folders.
    """

    exclude: list[str] = field(default_factory=list)
    """Names of folders, or beginnings of names of files, to leave out."""

    audio: str = "audio"
    """
    Column or key with the recording: its bytes, a struct of bytes and path or of array and sampling_rate, or a path
    relative to the table. In a tar: the extension of recordings.
    """

    text: str = "text"
    """
    Column or key with the transcription, which only tasks with text need. In a Kaldi folder: the name of the file.
    """

    duration: str | None = None
    """
    Column or key with the length of a recording, in milliseconds if the name ends in _ms, else in seconds. By default
    duration, duration_ms or audio_duration.
    """

    id: str = "id"
    """Column or key with the name of a recording."""

    weight: float | None = None
    """
    Share of the draws that is of this data set, relative to the others' weights. A draw is a recording, of split codes
    a piece. Either all tables have one or none; without, each recording comes once an epoch.
    """

    min_seconds: float | None = None
    """Leave out recordings that are shorter."""

    max_seconds: float | None = None
    """Leave out recordings that are longer (training.max_seconds cuts them instead)."""

    revision: str | None = None
    """Branch, tag or commit, where path is a hub name."""


@dataclass
class Training:
    """Data, batches, length and number formats of training."""

    dataset: str = "peoples_speech"
    """
    Name of a data set. The names and what they stand for are in torchtitan/datasets/sources.py. With
    [[training.source]] tables it only names the run.
    """

    dataset_path: str | None = None
    """Local folder, or hub name, to read training.dataset from instead of from its usual place."""

    source: list[dict[str, Any]] = field(default_factory=list)
    """
    Data sets to train on together, instead of training.dataset: one [[training.source]] table for each, whose keys
    are explained below. Tables are written in a file; they cannot be given on the command line.
    """

    task: Literal["a2a", "tts", "asr"] = "a2a"
    """
    What a sample is. "a2a": the speech alone. "tts": its transcription, then the speech. "asr": the speech, then its
    transcription.
    """

    max_seconds: float = 20.0
    """Length in seconds over which a recording counts as long (see training.long_clips)."""

    long_clips: Literal["cut", "split"] = "cut"
    """
    What becomes of a recording that is longer than training.max_seconds or than a row. "cut": its beginning is used,
    the rest is left out and counted. "split": it becomes as many samples as it needs, so that none of its audio is
    lost, mixed as training.packing_window says; not with a task that has text, which belongs to the whole recording.
    """

    end_cut_clips: bool = True
    """
    Let a sample end in `</audio>` also where the recording went on (it was cut or split there), as the published models
    learned it. They therefore tend to end after 20 s whatever is being said. False: `</audio>` stands only where a
    recording really ends, so a model learns when speech is over, and goes on otherwise.
    """

    packing: Literal["none", "best_fit"] = "none"
    """
    How samples fill rows. "none": one sample a row, the rest of it is padding. "best_fit": several whole samples share
    a row, without seeing each other and each with positions from 0; the losses are the same, with fewer rows.
    """

    packing_window: int = 2048
    """
    With packing: among how many samples rows are put together. More of them leave less padding; where audio is
    tokenized during training, all of them are tokenized before the first row is ready. Where such audio is split, the
    pieces of so many samples are mixed, with or without packing.
    """

    num_workers: int = 2
    """Threads of each rank that decode audio ahead of training. 0: the thread that prepares batches does it itself."""

    read_retries: int = 5
    """How often a read that failed (network, file system) is tried again, each time after twice the wait."""

    max_bad_share: float = 0.2
    """
    The run stops, naming them, once more than this share of the recordings could not be used; looked at from 1,000
    recordings on. 1: never.
    """

    local_batch_size: int = 8
    """Rows in one forward pass of one rank."""

    global_batch_size: int = -1
    """
    Rows in one step, over all ranks and accumulated forward passes: a multiple of training.local_batch_size times
    the data-parallel degree. -1: exactly that product, without accumulation.
    """

    seq_len: int = 1024
    """Tokens in a row. 20 s of speech with 4 quantizers are 1,003."""

    max_norm: float = 1.0
    """
    Gradients with a larger norm than this are scaled down to it. 0, only with optimizer.early_step_in_backward, leaves
    them as they are.
    """

    steps: int = 10000
    """Number of steps (updates of the weights) in the run."""

    audio_head: bool = False
    """
    Compute only the logits of the audio tokens, and the softmax over them alone: about a fifth less work at 1.3B. Only
    for task a2a. It changes what is learnt: losses are lower by what the text ids would get of the softmax, and logits
    of text ids are no longer trained. They mean nothing afterwards, so generation has to be restricted to audio tokens
    and scores to the softmax over them.
    """

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in the memory of the CPU."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of forward and backward passes. The weights that the optimizer updates are float32 always."""

    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Number format in which gradients are summed over ranks."""

    compile: bool = False
    """Compile each block of the model with torch.compile. The same switch as compile.enable."""

    gc_freq: int = 50
    """Steps from one run of Python's garbage collector to the next, on all ranks at once."""

    gc_debug: bool = False
    """Collect garbage at every step, to find reference cycles that hold GPU memory."""

    seed: int | None = 42
    """Seed of everything random: initial weights, order of the data. `none` on the command line: a new one each run."""

    deterministic: bool = False
    """Use only deterministic algorithms, even where they are slower."""


@dataclass
class Validation:
    """The loss on held-out speech, measured during training."""

    enabled: bool = False
    """Validate every validation.freq steps."""

    dataset: str = "librispeech_asr_test"
    """Name of the data set, as in training.dataset."""

    dataset_path: str | None = None
    """Local folder, or hub name, to read validation.dataset from instead of from its usual place."""

    source: list[dict[str, Any]] = field(default_factory=list)
    """Data sets to validate on together, as [[validation.source]] tables, like those of training."""

    local_batch_size: int = 8
    """Rows in one forward pass of one rank."""

    seq_len: int = 1024
    """Tokens in a row."""

    freq: int = 10
    """Training steps from one validation to the next."""

    steps: int = -1
    """Batches of each rank in one validation, always the same ones. -1: the whole data set."""


@dataclass
class Evaluation:
    """
    A small benchmark during training: in how many pairs of clips the model prefers the better one, by the rule of
    eval/salmon.py. All benchmarks in full are run afterwards, by the scripts in eval/.
    """

    enable_evaluation: bool = False
    """Score pairs every evaluation.evaluation_freq steps, and after the last one."""

    evaluation_freq: int = 1000
    """Steps from one evaluation to the next. The same as evaluation.freq."""

    freq: int = 1000
    """Steps from one evaluation to the next. The same as evaluation.evaluation_freq."""

    dataset_path: str = "slprl/SALMon"
    """
    Local folder, or hub name, of pairs in the layout of slprl/SALMon: a folder of parquet files for each task, with
    columns positive_audio and negative_audio. The tasks are SALMon's, or else whatever folders there are.
    """

    max_pairs_per_task: int = 25
    """How many pairs of each task are used, always the same ones. 0: all."""

    batch_size: int = 16
    """Clips in one forward pass of one rank."""

    seq_len: int = 1024
    """Clips are cut to so many tokens, and to 20 s."""


@dataclass
class Parallelism:
    """How the ranks share the work. The degrees multiply to the number of ranks."""

    data_parallel_replicate_degree: int = 1
    """Copies of the (sharded) model, each of which sees other data."""

    data_parallel_shard_degree: int = -1
    """Ranks over which one copy of the model is sharded (FSDP). -1: all that the other degrees leave."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """
    Free the gathered weights of a block after its forward pass, and gather them again for the backward pass: less
    memory, more traffic. "default" does so for all blocks but the last part, which backward needs at once.
    """

    tensor_parallel_degree: int = 1
    """Ranks over which each single layer is split."""

    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits before the loss."""

    enable_async_tensor_parallel: bool = False
    """With tensor parallelism: overlap communication and computation."""

    pipeline_parallel_degree: int = 1
    """Ranks over which the sequence of blocks is split."""

    pipeline_parallel_split_points: list[str] = field(default_factory=list)
    """Modules at which a pipeline stage begins."""

    pipeline_parallel_layers_per_stage: int | None = None
    """Blocks in a pipeline stage."""

    pipeline_parallel_schedule: str = "1F1B"
    """Order of the forward and backward passes in a pipeline."""

    pipeline_parallel_schedule_csv: str | None = None
    """File with that order, instead of a named one: a line a rank, such as 0F0,0F1,0B0,0B1 (see docs/training.md)."""

    pipeline_parallel_microbatch_size: int = 1
    """Rows that go through a pipeline together."""

    context_parallel_degree: int = 1
    """Ranks over which each row is split."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """With context parallelism: how keys and values are exchanged."""

    expert_parallel_degree: int = 1
    """Ranks over which the experts of a mixture are split."""

    enable_compiled_autograd: bool = False
    """
    Compile the backward pass as a whole, with torch's compiled autograd. Needs training.compile, and works on one rank
    alone: FSDP2 keeps its own part of the backward pass out of compiled graphs.
    """


@dataclass
class Checkpoint:
    """What is saved of a run, and what a run starts from."""

    enable_checkpoint: bool = False
    """
    Save checkpoints, and resume from the run's latest one. They are folders of torch.distributed.checkpoint:
    <job.dump_folder>/<run>/<checkpoint.folder>/step-N.
    """

    folder: str = "checkpoint"
    """Where checkpoints are saved, inside the run's folder."""

    initial_load_path: str | None = None
    """
    What to start from while this run has no checkpoint of its own: a checkpoint folder (of any run, with its step-N),
    or a model in Hugging Face format with the run's sizes and vocabulary, of which there are only weights.
    """

    initial_load_model_only: bool = True
    """Take only the weights from checkpoint.initial_load_path. False: also optimizer, schedule, data and step."""

    interval: int = 500
    """Steps from one checkpoint to the next. The last step is always saved."""

    last_save_model_only: bool = False
    """Save only the weights at the last step. The run can then not be made longer afterwards."""

    last_save_in_hf: bool = False
    """
    Write the last checkpoint in Hugging Face format too, to <job.dump_folder>/<run>/hf/step-N, as
    scripts/convert_dcp_to_hf.py does for any checkpoint. Rank 0 then holds the whole model in memory, in fp32.
    """

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Number format of the weights that checkpoint.last_save_model_only and checkpoint.last_save_in_hf save."""

    create_seed_checkpoint: bool = False
    """
    Save the initial weights and state as step-0, and stop; on one rank. The run, on any number of ranks and however it
    is split, then starts from there.
    """

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """
    Save while training goes on. "async": the tensors are copied to the memory of the CPU, which training waits for, and
    written by a thread. "async_with_pinned_mem": they are copied to pinned memory while the next step computes its
    gradients, and written by a process of its own; faster, with more memory. Saves never overlap each other.
    """

    keep_latest_k: int = 10
    """How many checkpoints are kept: older ones are deleted. 0: all."""

    load_step: int = -1
    """Resume from this step's checkpoint. -1: from the latest."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """
    Parts of a checkpoint not to load, now and at any later resume: optimizer (its state starts anew), lr_scheduler (its
    warm-up, and the rest over the steps that are left, starts anew), dataloader (the data start from their beginning,
    and may be others), random (the random state). Weights and step are always loaded.
    """

    enable_first_step_checkpoint: bool = False
    """Save after the first step too, to see early that saving works."""


@dataclass
class ActivationCheckpoint:
    """Trading computation for memory: what the backward pass needs is computed again, not kept."""

    mode: Literal["none", "selective", "full"] = "none"
    """
    "none": keep everything. "full": keep only the input of each block. "selective": see
    activation_checkpoint.selective_ac_option.
    """

    selective_ac_option: str = "op"
    """
    With mode "selective". "op": keep the results of attention and of every second matrix product, compute the rest
    again. A number n: of every n-th block (0, n, 2n, ...) keep only the input, of the others everything.
    """

    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])
    """
    Parts of names of layers (feed_forward.w2) whose matrix products option "op" always computes again, and with them
    those of the same shape. The default names a layer that this model does not have.
    """


@dataclass
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile what components names. The same switch as training.compile."""

    components: list[str] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled: model (each block by itself), loss (the softmax over the vocabulary and its gradient)."""


@dataclass
class Float8:
    """Matrix products of the blocks in 8-bit floats, with model.converters = ["float8"] (needs torchao)."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather weights in float8 (recipe tensorwise, several ranks)."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all weights at once after each step."""

    force_recompute_fp8_weight_in_bwd: bool = False
    """Compute float8 weights again in the backward pass. Since 2025 torchao does so in any case."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """
    How values are scaled: one scale a tensor (fastest, and the default), one a row, or one a row with the gradients of
    weights in high precision (most accurate).
    """

    filter_fqns: list[str] = field(default_factory=list)
    """Parts of names of layers that stay as they are (attention.wk). Embedding and head always do."""

    emulate: bool = False
    """Compute the same on hardware that has no float8, slowly."""

    moe_fqns_prototype: list[str] = field(default_factory=list)
    """Mixture-of-experts modules in float8."""


@dataclass
class MX:
    """
    Matrix products of the blocks in MXFP8, 8-bit floats with a scale for every 32 values, with model.converters =
    ["mx"] (needs torchao).
    """

    use_fp8_dim1_cast_triton_kernel: bool = True
    """Cast with Triton kernels. False: with plain torch, for torch.compile to fuse."""

    recipe_name: Literal["mxfp8"] = "mxfp8"
    """Which MX format."""

    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Parts of names of layers that stay as they are (attention.wk). Embedding and head always do."""

    emulate: bool = False
    """Compute the same on hardware that has no MX formats, slowly."""


@dataclass
class Comm:
    """Communication between ranks."""

    init_timeout_seconds: int = 300
    """How long a collective may take before and in the first step, in which models load and kernels compile."""

    train_timeout_seconds: int = 100
    """How long a collective may take after the first step."""

    trace_buf_size: int = 20000
    """Collectives that NCCL's flight recorder remembers, to be written out after a timeout. 0: none."""


@dataclass
class MemoryEstimation:
    """An estimate of a run's memory without running it."""

    enabled: bool = False
    """
    Only print what the run will need on as many ranks as were started (memory of a GPU by component, a bound of the
    speed, storage), and exit. scripts/estimate.py does the same for any number of GPUs, see docs/estimate.md.
    """

    gpu: str = ""
    """Whose memory and speed are taken, such as H200. By default the GPU at hand, without one an H100."""

    disable_fake_mode: bool = False
    """Estimate with real tensors."""


@dataclass
class FaultTolerance:
    """Training that goes on while replicas fail and return (TorchFT)."""

    enable: bool = False
    """Use TorchFT."""

    process_group: str = "gloo"
    """Backend between replicas."""

    process_group_timeout_ms: int = 10000
    """How long an operation between replicas may take."""

    replica_id: int = 0
    """Number of this replica."""

    group_size: int = 0
    """Number of replicas."""

    min_replica_size: int = 1
    """Replicas that a step needs."""

    semi_sync_method: str | None = None
    """How replicas that are not in step exchange weights."""

    sync_steps: int = 5
    """Steps between such exchanges."""

    should_quantize: bool = False
    """Exchange in fewer bits."""

    fragment_sync_delay: int = 0
    """Steps by which an exchange may lag."""

    fragment_update_alpha: float = 0.0
    """Share of the own weights that an exchange keeps."""


@dataclass
class Experimental:
    """Modules from outside of this repository."""

    custom_import: str = ""
    """Python module to import at the start, such as one that registers kernels."""

    custom_args_module: str = ""
    """
    Python module with a dataclass JobConfig, whose sections and keys are added to these, so that a module from outside
    (custom_import) has settings in the same file and on the same command line.
    """


@dataclass
class JobConfig:
    """All sections."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    float8: Float8 = field(default_factory=Float8)
    mx: MX = field(default_factory=MX)
    comm: Comm = field(default_factory=Comm)
    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    experimental: Experimental = field(default_factory=Experimental)


# The type of keys whose values are tables, each a data set.
TABLES = list[dict[str, Any]]


@dataclass(frozen=True)
class Schema:
    """What can be set.

    Attributes:
        config: all sections.
        sections: their classes by name.
        types: of all keys, "section.key".
    """

    config: type[JobConfig]
    sections: dict[str, type]
    types: dict[str, Any]

    @staticmethod
    def of(config: type[JobConfig]) -> "Schema":
        """What a class of sections says, in its order."""
        sections = get_type_hints(config)
        types = {f"{s}.{key}": kind for s, cls in sections.items() for key, kind in get_type_hints(cls).items()}
        return Schema(config, sections, types)


SCHEMA = Schema.of(JobConfig)
SECTIONS, TYPES = SCHEMA.sections, SCHEMA.types
DEFAULTS: dict[str, Any] = {f"{s}.{key}": v for s, table in asdict(JobConfig()).items() for key, v in table.items()}
# The same for the keys of a [[training.source]] table.
SOURCE_TYPES: dict[str, Any] = get_type_hints(DataSource)
SOURCE_DEFAULTS: dict[str, Any] = asdict(DataSource())


# ---------------------------------------------------------------------------------------------------------------------
# What values are allowed
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Off:
    """A key that is known but not built: only its default, and `also`, are accepted."""

    reason: str
    also: tuple[Any, ...] = ()


OFF_ONLY: dict[str, Off] = {
    "parallelism.expert_parallel_degree": Off("the model has no experts"),
    "float8.moe_fqns_prototype": Off("the model has no experts"),
    "memory_estimation.disable_fake_mode": Off("memory is computed from sizes, with no tensors at all"),
    "fault_tolerance.*": Off("TorchFT is not used; a run that failed goes on from its last checkpoint"),
}


def off_rule(key: str) -> Off | None:
    """The entry of `OFF_ONLY` that binds `key`, if any."""
    return OFF_ONLY.get(key) or OFF_ONLY.get(key.split(".")[0] + ".*")


# A test, and how it is said.
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
    "evaluation.evaluation_freq": _at_least(1),
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

# Two names for one switch: setting either sets both.
TWINS = {
    "training.compile": "compile.enable",
    "compile.enable": "training.compile",
    "evaluation.freq": "evaluation.evaluation_freq",
    "evaluation.evaluation_freq": "evaluation.freq",
}


def check_values(config: JobConfig, origins: dict[str, str] | None = None) -> None:
    """Raises `ConfigError` for values that no machine could run with. `origins` says where a key's value is from."""
    values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in TYPES}

    def refuse(key: str, expected: str) -> None:
        raise ConfigError(f"{_said(key, values[key], (origins or {}).get(key))}: {expected}.")

    for key, value in values.items():
        off = off_rule(key)
        if off and value != DEFAULTS[key] and value not in off.also:
            accepted = " or ".join(_show(v) for v in (DEFAULTS[key], *off.also))
            refuse(key, f"{off.reason}, so only {accepted} can be used here")
        if key in RANGES and value is not None and not RANGES[key][0](value):
            refuse(key, f"it must be {RANGES[key][1]}")

    for key, twin in TWINS.items():
        if values[key] != values[twin]:
            refuse(key, f"{twin} is the same setting, but is {_show(values[twin])}")

    name, flavor = config.model.name, config.model.flavor
    if flavor == "debug" and config.model.pretrained:
        refuse("model.flavor", "there are no weights for it, so it needs model.pretrained = false")
    if flavor not in ("", "debug") and not re.search(rf"(?<![\d.]){flavor}", name, re.IGNORECASE):
        refuse("model.flavor", f'model.name = "{name}" is not of that size by its name; leave model.flavor empty')

    shortest = config.model.num_quantizers + 3
    used = {
        "training.seq_len": True,
        "validation.seq_len": config.validation.enabled,
        "evaluation.seq_len": config.evaluation.enable_evaluation,
    }
    for key in used:
        if values[key] < shortest and used[key]:
            quantizers = config.model.num_quantizers
            refuse(key, f"one frame with model.num_quantizers = {quantizers} needs at least {shortest} tokens")

    for section in (config.training, config.validation):
        key = "training.source" if section is config.training else "validation.source"
        _check_sources(key, section.source, section.dataset_path)

    if config.training.long_clips == "split" and config.training.task != "a2a":
        refuse(
            "training.long_clips", f"the transcription of task {config.training.task} belongs to the whole recording"
        )

    if config.training.audio_head and config.training.task != "a2a":
        refuse("training.audio_head", f"the transcription of task {config.training.task} is not made of audio tokens")

    if config.training.max_norm == 0 and not config.optimizer.early_step_in_backward:
        refuse("training.max_norm", "it must be above 0 but with optimizer.early_step_in_backward")
    if config.optimizer.early_step_in_backward:
        for key, no in (
            ("training.max_norm", 0),
            ("parallelism.pipeline_parallel_degree", 1),
            ("training.enable_cpu_offload", False),
        ):
            if values[key] != no:
                refuse(key, f"with optimizer.early_step_in_backward = true it must be {_show(no)}")

    unknown = [name for name in config.compile.components if name not in ("model", "loss")]
    if unknown:
        refuse("compile.components", "there are model and loss")
    if config.training.compile and not config.compile.components:
        refuse("compile.components", "with training.compile = true it must name something")
    if config.parallelism.enable_compiled_autograd and not (
        config.training.compile and "model" in config.compile.components
    ):
        refuse("parallelism.enable_compiled_autograd", "it needs training.compile = true")

    unknown = [name for name in config.model.converters if name not in CONVERTERS]
    if unknown or len(config.model.converters) > 1:
        refuse("model.converters", 'there are "float8" and "mx", of which one can be chosen')
    for key in ("float8.enable_fsdp_float8_all_gather", "float8.precompute_float8_dynamic_scale_for_fsdp"):
        if values[key] and config.float8.recipe_name not in (None, "tensorwise"):
            refuse(key, 'it needs float8.recipe_name = "tensorwise"')
    if config.float8.precompute_float8_dynamic_scale_for_fsdp and not config.float8.enable_fsdp_float8_all_gather:
        refuse(
            "float8.precompute_float8_dynamic_scale_for_fsdp", "it needs float8.enable_fsdp_float8_all_gather = true"
        )
    option = config.activation_checkpoint.selective_ac_option
    if option != "op" and not re.fullmatch(r"[1-9]\d*", option):
        refuse("activation_checkpoint.selective_ac_option", 'it must be "op" or a whole number from 1 on')
    _check_parallelism(config, refuse)

    saving = config.checkpoint
    if saving.export_dtype != "float32" and not (saving.last_save_model_only or saving.last_save_in_hf):
        refuse(
            "checkpoint.export_dtype",
            "it applies only with checkpoint.last_save_model_only = true or checkpoint.last_save_in_hf = true",
        )
    if not saving.enable_checkpoint:
        for key in ("checkpoint.initial_load_path", "checkpoint.load_step", "checkpoint.exclude_from_loading"):
            if values[key] != DEFAULTS[key]:
                refuse(key, "nothing is loaded unless checkpoint.enable_checkpoint = true")
        for key in ("checkpoint.create_seed_checkpoint", "checkpoint.last_save_in_hf"):
            if values[key]:
                refuse(key, "nothing is saved unless checkpoint.enable_checkpoint = true")
    unknown = [name for name in saving.exclude_from_loading if name not in EXCLUDABLE]
    if unknown:
        refuse("checkpoint.exclude_from_loading", f"there are only {', '.join(EXCLUDABLE)}")


# Parts of a checkpoint that checkpoint.exclude_from_loading can name.
EXCLUDABLE = ("optimizer", "lr_scheduler", "dataloader", "random")
# Converters of the model, each with the number of ids of which its products need a multiple.
CONVERTERS = {"float8": 16, "mx": 32}
# Schedules that compute the gradients of inputs first and those of weights later.
SPLIT_BACKWARD = ("interleavedzerobubble", "zbvzerobubble", "dualpipev")


def _check_parallelism(config: JobConfig, refuse: Callable[[str, str], None]) -> None:
    """Refuses degrees that do not fit the rows and batches, and settings of a parallelism that is not used."""
    part = config.parallelism
    tensor, context, pipeline = (
        part.tensor_parallel_degree,
        part.context_parallel_degree,
        part.pipeline_parallel_degree,
    )
    multiple = tensor * (2 * context if context > 1 else 1)
    sections = ["training"] + ["validation"] * config.validation.enabled
    for section in sections:
        if getattr(config, section).seq_len % multiple:
            refuse(f"{section}.seq_len", f"with these degrees of parallelism it must be a multiple of {multiple}")
    for name in config.model.converters:
        if config.training.seq_len % (CONVERTERS[name] * context):
            refuse(
                "training.seq_len",
                f'with model.converters = ["{name}"] each rank needs a multiple of {CONVERTERS[name]} ids',
            )
    for key, value, degree in (
        ("disable_loss_parallel", part.disable_loss_parallel, tensor),
        ("enable_async_tensor_parallel", part.enable_async_tensor_parallel, tensor),
        ("pipeline_parallel_split_points", part.pipeline_parallel_split_points, pipeline),
        ("pipeline_parallel_layers_per_stage", part.pipeline_parallel_layers_per_stage, pipeline),
        ("pipeline_parallel_schedule_csv", part.pipeline_parallel_schedule_csv, pipeline),
    ):
        if value and degree == 1:
            refuse(f"parallelism.{key}", "there is no such parallelism in this run, its degree is 1")
    if part.enable_async_tensor_parallel and not config.training.compile:
        refuse("parallelism.enable_async_tensor_parallel", "it needs training.compile = true")
    if part.pipeline_parallel_split_points and part.pipeline_parallel_layers_per_stage is not None:
        refuse(
            "parallelism.pipeline_parallel_split_points", "pipeline_parallel_layers_per_stage says the same otherwise"
        )
    if pipeline > 1 and config.training.local_batch_size % part.pipeline_parallel_microbatch_size:
        refuse(
            "training.local_batch_size",
            f"it must be a multiple of parallelism.pipeline_parallel_microbatch_size = "
            f"{part.pipeline_parallel_microbatch_size}",
        )
    csv = part.pipeline_parallel_schedule_csv
    if csv is not None and not os.path.isfile(csv):
        refuse("parallelism.pipeline_parallel_schedule_csv", "there is no such file")


def _check_sources(key: str, tables: list[dict[str, Any]], dataset_path: str | None) -> None:
    """Raises `ConfigError` for tables that contradict each other, themselves or other settings."""
    section = key.split(".")[0]
    if tables and dataset_path is not None:
        raise ConfigError(
            f"{_said(f'{section}.dataset_path', dataset_path)}: the [[{key}]] tables say where the data lie, so it "
            "must not be set."
        )
    for number, table in enumerate(tables, start=1):
        where = f"[[{key}]] {number}"
        for name in ("weight", "max_seconds"):
            if table.get(name, 1) <= 0:
                raise ConfigError(f"{where}: {_said(name, table[name])}: it must be above 0.")
        if table.get("min_seconds", 0) < 0:
            raise ConfigError(f"{where}: {_said('min_seconds', table['min_seconds'])}: it must be at least 0.")
        if table.get("min_seconds", 0) > table.get("max_seconds", math.inf):
            raise ConfigError(
                f"{where}: {_said('min_seconds', table['min_seconds'])}: it is above max_seconds = "
                f"{table['max_seconds']}, so nothing would be left."
            )
        for name in ("name", "path", "audio", "text", "id"):
            if not table.get(name, "x").strip():
                raise ConfigError(f"{where}: {_said(name, table[name])}: it must be not empty.")
        if "name" not in table and "path" not in table:
            raise ConfigError(f"{where}: path must say where the data lie.")
    weighted = sum("weight" in table for table in tables)
    if 0 < weighted < len(tables):
        missing = next(number for number, table in enumerate(tables, start=1) if "weight" not in table)
        raise ConfigError(f"[[{key}]] {missing}: weight is missing; either all tables have one or none.")


def check(config: JobConfig, world_size: int) -> None:
    """Raises `ConfigError` if `config` cannot run here, on `world_size` ranks: values, arithmetic, files."""
    check_values(config)
    accumulation_steps(config, world_size)
    if config.parallelism.enable_compiled_autograd and (world_size > 1 or config.training.enable_cpu_offload):
        raise ConfigError(
            "parallelism.enable_compiled_autograd = true: FSDP2, which splits or offloads the model, keeps its part of "
            "the backward pass out of compiled graphs, so it works on one rank alone, without enable_cpu_offload."
        )
    if config.checkpoint.create_seed_checkpoint and world_size > 1:
        raise ConfigError(f"checkpoint.create_seed_checkpoint = true: it is made by one rank, not by {world_size}.")

    for key, kind in (("model.name", "model"), ("model.audio_tokenizer", "codec")):
        section, field_name = key.split(".")
        _check_source(key, getattr(getattr(config, section), field_name), f"a {kind} folder")
    _check_source("training.dataset_path", config.training.dataset_path, "a data set's folder or file", files=True)
    _check_places("training", config.training)
    if config.validation.enabled:
        _check_source("validation.dataset_path", config.validation.dataset_path, "a data set's folder", files=True)
        _check_places("validation", config.validation)
    if config.evaluation.enable_evaluation:
        _check_source("evaluation.dataset_path", config.evaluation.dataset_path, "a folder of pairs")

    start = config.checkpoint.initial_load_path
    if start is not None and not os.path.isdir(start):
        raise ConfigError(f"{_said('checkpoint.initial_load_path', start)}: there is no such folder.")
    if os.path.exists(config.job.dump_folder) and not os.path.isdir(config.job.dump_folder):
        raise ConfigError(f"{_said('job.dump_folder', config.job.dump_folder)}: this is a file, not a folder.")


def data_parallel_degree(config: JobConfig, world_size: int) -> int:
    """Number of ranks that see different data. Raises `ConfigError` if the degrees do not fit the number of ranks."""
    par = config.parallelism
    model = par.tensor_parallel_degree * par.pipeline_parallel_degree * par.context_parallel_degree
    others = model * par.data_parallel_replicate_degree
    shard = par.data_parallel_shard_degree
    if shard == -1:
        shard = max(world_size // others, 1)
    if shard * others != world_size:
        rest = f" and the other degrees multiply to {others}" if others > 1 else ""
        raise ConfigError(
            f"{_said('parallelism.data_parallel_shard_degree', par.data_parallel_shard_degree)}: "
            f"there are {world_size} ranks{rest}, and all degrees together must multiply to the number of ranks "
            "(-1 takes what is left)."
        )
    return par.data_parallel_replicate_degree * shard


def accumulation_steps(config: JobConfig, world_size: int) -> int:
    """Forward passes of each rank in one step. Raises `ConfigError` if the global batch size is not a whole number."""
    local, rows = config.training.local_batch_size, config.training.global_batch_size
    degree = data_parallel_degree(config, world_size)
    at_once = local * degree
    if rows == -1:
        return 1
    if rows % at_once:
        low = rows // at_once * at_once
        near = f"{low} or {low + at_once}" if low else f"{at_once}"
        raise ConfigError(
            f"{_said('training.global_batch_size', rows)}: it must be a multiple of training.local_batch_size "
            f"({local}) times the data-parallel degree ({degree}), such as {near}."
        )
    return rows // at_once


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _check_source(key: str, value: str | None, what: str, files: bool = False) -> None:
    """A local source must be there; a hub name (`owner/name`) is left to whoever downloads it."""
    found = value is None or os.path.isdir(value) or (files and os.path.isfile(value))
    if not found and not HUB_NAME.fullmatch(value or ""):
        raise ConfigError(f"{_said(key, value)}: this is neither {what} that exists nor a hub name (owner/name).")


def _check_places(section: str, part: Training | Validation) -> None:
    """What the source tables of a section name must be there."""
    if not part.source:
        return
    from torchtitan.datasets.sources import check_place, sources_from_config

    for number, source in enumerate(sources_from_config(part, section), start=1):
        table = part.source[number - 1]
        if "path" not in table:
            check_place(source)
        elif not os.path.exists(os.path.expanduser(source.path)) and not HUB_NAME.fullmatch(source.path):
            raise ConfigError(
                f"[[{section}.source]] {number}: {_said('path', source.path)}: this is neither a data set's folder or "
                "file that exists nor a hub name (owner/name)."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Reading values
# ---------------------------------------------------------------------------------------------------------------------


COMMAND_LINE = "on the command line"


def extended(module: str) -> Schema:
    """The settings here and those of another module's dataclass JobConfig (experimental.custom_args_module).

    Its fields are sections, which may have the names of ours; what we have too must be the same there.

    Raises:
        ConfigError: it cannot be imported, or it has no such class, or a key that is ours otherwise or of no type that
            a file can have.
    """
    key = f"experimental.custom_args_module = {_show(module)}"
    try:
        outside = import_module(module).JobConfig
        theirs, values = Schema.of(outside), asdict(outside())
    except ImportError as error:
        raise ConfigError(f"{key}: the module cannot be imported ({error}).") from None
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"{key}: it has no dataclass JobConfig of sections with defaults ({error}).") from None
    for name, kind in theirs.types.items():
        section, _, last = name.partition(".")
        if name in TYPES and (kind, values[section][last]) != (TYPES[name], DEFAULTS[name]):
            raise ConfigError(f"{key}: {name} is a key of this project, with another type or default.")
        plain = _without_none(kind)[0]
        readable = plain in (bool, int, float, str, list[str]) or get_origin(plain) is Literal
        if name not in TYPES and not readable:
            raise ConfigError(f"{key}: the type of {name} is none that a file can have.")
    sections: dict[str, type] = {}
    for name, cls in theirs.sections.items():
        ours = SECTIONS.get(name)
        sections[name] = (
            cls if ours is None or issubclass(cls, ours) else make_dataclass(cls.__name__, [], bases=(cls, ours))
        )
    added = [(name, cls, field(default_factory=cls)) for name, cls in sections.items()]
    return Schema.of(make_dataclass("JobConfig", added, bases=(JobConfig,)))


def _show(value: Any) -> str:
    """A value as TOML writes it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _said(key: str, value: Any, origin: str | None = None) -> str:
    return f"{key} = {_show(value)}" + (f" {origin}" if origin else "")


def _without_none(kind: Any) -> tuple[Any, bool]:
    """`int | None` to (int, True), `int` to (int, False)."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    return next(k for k in get_args(kind) if k is not type(None)), True


def _expected(kind: Any) -> str:
    kind, optional = _without_none(kind)
    if get_origin(kind) is Literal:
        said = "one of " + ", ".join(_show(choice) for choice in get_args(kind))
    elif get_origin(kind) is list:
        said = "a list of names"
    else:
        said = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    return said + (" or none" if optional else "")


def _typed(kind: Any, value: Any) -> Any:
    """`value` as `kind`. Raises ValueError. The only conversions: int to float, "a,b" to a list, "" to none."""
    kind, optional = _without_none(kind)
    if optional and (value is None or value == ""):
        return None
    if get_origin(kind) is Literal:
        ok = isinstance(value, str) and value in get_args(kind)
    elif get_origin(kind) is list:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        ok = isinstance(value, list) and all(isinstance(item, str) for item in value)
        value = list(value) if ok else value
    elif kind is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        value = float(value) if ok else value
    else:
        ok = type(value) is kind
    if not ok:
        raise ValueError(value)
    return value


def _from_text(kind: Any, text: str) -> Any:
    """What a command line says, as `kind`. Raises ValueError."""
    plain, optional = _without_none(kind)
    if optional and text.lower() == "none":
        return None
    if plain is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if text and plain in (int, float):
        return plain(text)
    return text


def read_sources(key: str, tables: Any, origin: str = "") -> list[dict[str, Any]]:
    """The tables of `key` ("training.source") with names and types checked; each has the keys that were given.

    Raises `ConfigError`.
    """
    after = f" {origin}" if origin else ""
    if origin == COMMAND_LINE:
        raise ConfigError(f"{key}{after}: data sources cannot be given here; write [[{key}]] tables in a TOML file.")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{key}{after}: each data set is a table of its own, which begins with [[{key}]].")
    return [_read_source(f"[[{key}]] {number}{after}", table) for number, table in enumerate(tables, start=1)]


def _read_source(where: str, table: dict[str, Any]) -> dict[str, Any]:
    values = {}
    for name, value in table.items():
        if name not in SOURCE_TYPES:
            close = difflib.get_close_matches(name, SOURCE_TYPES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(SOURCE_TYPES)}."
            raise ConfigError(f"{where}: a data source has no key {name}; {hint}")
        try:
            values[name] = _typed(SOURCE_TYPES[name], value)
        except ValueError:
            raise ConfigError(f"{where}: {_said(name, value)}: expected {_expected(SOURCE_TYPES[name])}.") from None
    return {name: value for name, value in values.items() if value is not None}


def _read(key: str, value: Any, origin: str, schema: Schema) -> Any:
    kind = schema.types[key]
    if kind == TABLES:
        return read_sources(key, value, origin)
    try:
        if origin == COMMAND_LINE:
            value = _from_text(kind, value) if isinstance(value, str) else value
        return _typed(kind, value)
    except ValueError:
        raise ConfigError(f"{_said(key, value, origin)}: expected {_expected(kind)}.") from None


def _unknown(key: str, origin: str, schema: Schema) -> ConfigError:
    section, _, name = key.partition(".")
    known = schema.sections
    problem = f"section {section} has no key {name}" if section in known else f"there is no section {section}"
    # A slip of the fingers, else the right name in the wrong section, else whatever is near.
    close = difflib.get_close_matches(key, schema.types, n=1, cutoff=0.8)
    close = close or [other for other in schema.types if other.split(".")[1] == name]
    close = close or difflib.get_close_matches(key, schema.types, n=1)
    hint = f"did you mean {' or '.join(close)}?" if close else "--help lists all keys."
    return ConfigError(f"{key} {origin}: {problem}; {hint}")


def _read_table(table: dict[str, Any], origin: str, schema: Schema) -> dict[str, Any]:
    """A nested table, as of a TOML file, to {"section.key": value}, with names and types checked."""
    values: dict[str, Any] = {}
    for section, keys in table.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"{_said(section, keys, origin)}: this is outside of any [section].")
        if section not in schema.sections:
            close = difflib.get_close_matches(section, schema.sections, n=1)
            hint = f"did you mean [{close[0]}]?" if close else f"there are {', '.join(schema.sections)}."
            raise ConfigError(f"[{section}] {origin}: there is no such section; {hint}")
        for name, value in keys.items():
            key = f"{section}.{name}"
            if key not in schema.types:
                raise _unknown(key, origin, schema)
            values[key] = _read(key, value, origin, schema)
    for key, twin in TWINS.items():
        if key in values and values.get(twin, values[key]) != values[key]:
            raise ConfigError(f"{_said(key, values[key], origin)}: {twin} is the same setting, set to another value.")
    return values


def _read_toml(path: str) -> dict[str, Any]:
    """A file as the nested table that it is, with nothing checked."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{_said('job.config_file', path)}: the file cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_said('job.config_file', path)}: the file is not valid TOML ({error}).") from None


def _option(argv: list[str], key: str) -> Any:
    """What a command line sets one key to, before the names of the others are known; None if it does not."""
    found = None
    for option, after in itertools.pairwise([*argv, "--"]):
        name, equals, text = option.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == key:
            found = text if equals else after
    return None if found is None or found.startswith("--") else found


def _read_command_line(argv: list[str], schema: Schema) -> dict[str, Any]:
    """["--training.steps", "20"] to {"training.steps": 20}, with names and types checked."""
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        option, equals, text = rest.pop(0).partition("=")
        if not option.startswith("--") or "." not in option:
            raise ConfigError(f"{option} {COMMAND_LINE}: settings are written as --section.key value.")
        key = option[2:].replace("-", "_")
        section, _, name = key.partition(".")
        positive = f"{section}.{name.removeprefix('no_')}"
        if key not in schema.types and name.startswith("no_") and schema.types.get(positive) is bool:
            if equals:
                raise ConfigError(f"{option}={text} {COMMAND_LINE}: {option} takes no value.")
            key, value = positive, False
        elif key not in schema.types:
            raise _unknown(key, COMMAND_LINE, schema)
        elif equals:
            value = text
        elif rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif schema.types[key] is bool:
            value = True
        else:
            raise ConfigError(f"{option} {COMMAND_LINE}: a value is missing, expected {_expected(schema.types[key])}.")
        values[key] = _read(key, value, COMMAND_LINE, schema)
        if key in TWINS:
            values[TWINS[key]] = values[key]
    return values


def _build(values: dict[str, Any], schema: Schema) -> JobConfig:
    """{"section.key": value} to a config. Keys not given have their defaults."""
    config = schema.config()
    for key, value in values.items():
        for target in (key, TWINS.get(key, key)):
            section, name = target.split(".")
            setattr(getattr(config, section), name, value)
    return config


class ConfigManager:
    """Reads a JobConfig from a TOML file and the command line."""

    def parse_args(self, argv: list[str] | None = None) -> JobConfig:
        """
        The settings that `argv` (by default this process's) asks for: defaults, over them the file named by
        `--job.config_file`, over that the command line. Raises `ConfigError` for anything that cannot be right on any
        machine; `check` does the rest. `--help` prints the manual and exits.
        """
        argv = sys.argv[1:] if argv is None else argv
        if "--help" in argv or "-h" in argv:
            print(manual())
            raise SystemExit(0)
        path = _option(argv, "job.config_file")
        table = _read_toml(path) if path else {}
        schema, module = SCHEMA, _option(argv, "experimental.custom_args_module")
        if module is None and isinstance(section := table.get("experimental"), dict):
            module = section.get("custom_args_module")
        if module and isinstance(module, str):
            schema = extended(module)
        given = _read_command_line(argv, schema)
        from_file = _read_table(table, f"in {path}", schema)
        if "job.config_file" in from_file:
            raise ConfigError(f"job.config_file in {path}: it can only be given on the command line.")
        origins = dict.fromkeys(from_file, f"in {path}") | dict.fromkeys(given, COMMAND_LINE)
        config = _build(from_file | given, schema)
        check_values(config, origins)
        return config


def to_dict(config: JobConfig) -> dict[str, Any]:
    """Nested and ready for JSON, the form in which checkpoints keep it."""
    return asdict(config)


def from_dict(table: dict[str, Any]) -> JobConfig:
    """The reverse of `to_dict`. Keys that are missing have their defaults; unknown ones raise `ConfigError`.

    Those that came from a module (experimental.custom_args_module) are left out: a file must not say what is imported.
    """
    if table.get("experimental", {}).get("custom_args_module"):
        known = {section: keys for section, keys in table.items() if section in SECTIONS}
        table = {s: {key: keys[key] for key in keys if f"{s}.{key}" in TYPES} for s, keys in known.items()}
    return _build(_read_table(table, "in the saved config", SCHEMA), SCHEMA)


def run_name(config: JobConfig) -> str:
    """Name of the run and of its folder: the same for the same settings, so that a run finds its checkpoints."""
    if config.job.wandb_run_name:
        return config.job.wandb_run_name
    model = os.path.basename(os.path.abspath(config.model.name))
    dataset = config.training.dataset
    if config.training.source and dataset == DEFAULTS["training.dataset"]:
        # Other data must not resume from the folder of a run on the default data set.
        names = [
            str(table.get("name") or os.path.basename(table["path"].rstrip("/"))) for table in config.training.source
        ]
        dataset = "+".join(names)[:80]
    dataset = dataset.replace("/", "_")
    suffix = "" if config.model.pretrained else "-random"
    return f"{model}_{dataset}-q{config.model.num_quantizers}-s{config.training.seq_len}{suffix}"


# ---------------------------------------------------------------------------------------------------------------------
# --help
# ---------------------------------------------------------------------------------------------------------------------


def explanations(sections: dict[str, type] | None = None) -> dict[str, str]:
    """{"section.key": its explanation}, read from this file: the text directly under each key."""
    tree = ast.parse(Path(__file__).read_text("utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    texts: dict[str, str] = {}
    for section, cls in (SECTIONS if sections is None else sections).items():
        body = classes[cls.__name__].body
        for name, text in itertools.pairwise(body):
            if isinstance(name, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[f"{section}.{ast.unparse(name.target)}"] = inspect.cleandoc(str(text.value.value))
    return texts


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def manual() -> str:
    """All keys with their types, defaults, limits and explanations, as text."""
    texts = explanations()
    lines = [
        "usage: torchrun --nproc_per_node=N -m torchtitan.train --job.config_file FILE.toml [--section.key VALUE ...]",
        "",
        "Settings on the command line win over those in the file, which win over the defaults. A switch is set by",
        "--section.key and unset by --section.no-key; a list is written a,b,c.",
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}] {inspect.getdoc(cls)}"]
        for name in (f.name for f in fields(cls)):
            key = f"{section}.{name}"
            if TYPES[key] == TABLES:
                lines += [f"  [[{key}]]  (tables in a file; default none)", *_paragraph(texts[key])]
                continue
            limits = [_expected(TYPES[key])]
            if key in RANGES:
                limits.append(RANGES[key][1])
            limits.append(f"default {_show(DEFAULTS[key])}")
            notes = texts[key]
            off = off_rule(key)
            if off:
                also = "".join(f" and {_show(value)}" for value in off.also)
                notes += f" Only the default{also} can be used: {off.reason}."
            lines += [f"  --{key}  ({'; '.join(limits)})", *_paragraph(notes)]
    lines += ["", f"[[training.source]] and [[validation.source]] {inspect.getdoc(DataSource)}"]
    for key, text in explanations({"source": DataSource}).items():
        name = key.split(".")[1]
        limits = f"{_expected(SOURCE_TYPES[name])}; default {_show(SOURCE_DEFAULTS[name])}"
        lines += [f"  {name}  ({limits})", *_paragraph(text)]
    return "\n".join(lines)
