"""The manual: every setting of a training run, with its default and what it means.

Each key has its explanation directly under it; ``--help`` prints them. The names are those of TorchTitan in mid-2025,
and this project's own. torchtitan/config/keys.py says which values are allowed, and which keys of TorchTitan are
retired.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Job:
    """The run as a whole."""

    config_file: str | None = None
    """TOML file with the settings of this run. Can only be given on the command line."""

    dump_folder: str = "./outputs"
    """Folder for all that a run writes. Each run has its own folder in it, named after the run."""

    description: str = "default job"
    """Free text, logged at the start."""

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

    flavor: Literal["", "debug", "debugmodel", "1B", "3B", "8B", "70B", "405B"] = ""
    """
    Empty: the architecture of model.name. "debug", or TorchTitan's "debugmodel": a small one of the same kind instead,
    without weights, for tests (needs model.pretrained = false; the tokenizer is still that of model.name). A size: only
    asserts that model.name is of that size, by its name.
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

    resampler: Literal["torchaudio", "soxr_hq", "ffmpeg"] = "torchaudio"
    """
    How recordings at other rates become 24 kHz, which decides some of the codes. "soxr_hq" (the package soxr) is what
    the datasets library did before version 4, "ffmpeg" (torchcodec and FFmpeg's libraries) what it does since.
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
    """
    Where the fall would end, one step after the last, as a ratio of optimizer.lr: 0.1 is a tenth of it. The last step
    itself is still a step of the fall above it, as in TorchTitan.
    """


@dataclass
class Training:
    """Data, batches, length and number formats of training."""

    dataset: str = "peoples_speech"
    """
    Name of a data set. The names and what they stand for are in torchtitan/datasets/hf_dataset.py. With
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
    """Compile each block of the model with torch.compile."""

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
    """Score pairs every evaluation.freq steps, and after the last one."""

    freq: int = 1000
    """Steps from one evaluation to the next."""

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
    experimental: Experimental = field(default_factory=Experimental)
