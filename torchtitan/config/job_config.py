"""The manual: every setting of a training run, with its default and its meaning.

Each key has its explanation directly under it; ``--help`` prints them. Most names are those of TorchTitan in mid-2025;
the others are this project's own. torchtitan/config/keys.py has the allowed values and TorchTitan's retired keys.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Job:
    """The run as a whole."""

    config_file: str | None = None
    """TOML file with the settings of this run. Only the command line can set this key."""

    dump_folder: str = "./outputs"
    """Folder for everything that runs write. Each run has its own folder in it, named after the run."""

    description: str = "default job"
    """Free text, logged at the start."""

    print_args: bool = False
    """Log all settings at the start."""

    wandb_run_name: str | None = None
    """
    Name of the run in Weights & Biases, and of its folder under job.dump_folder. The default is made from the model,
    the data set, the number of quantizers and the sequence length. So the same settings find the same folder again
    and resume from it.
    """


@dataclass
class Profiling:
    """Profiles of time and GPU memory, written by torch.profiler."""

    enable_profiling: bool = False
    """Write a trace every profiling.profile_freq steps."""

    save_traces_folder: str = "profile_traces"
    """Folder for traces, inside the run's folder."""

    profile_freq: int = 10
    """Steps between two traces."""

    enable_memory_snapshot: bool = False
    """Write snapshots of the GPU memory allocator at the same steps, and when memory runs out."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder for memory snapshots, inside the run's folder."""


@dataclass
class Metrics:
    """What a run reports during training, and where."""

    log_freq: int = 10
    """Steps between two console lines, and between two points in TensorBoard and Weights & Biases."""

    enable_tensorboard: bool = False
    """Write the figures for TensorBoard."""

    log_format: Literal["text", "json"] = "text"
    """
    Format of log lines. "json" writes one object per line, with time, level, rank and message. Lines about a step, a
    validation or an evaluation also contain its figures, under the names that metrics.jsonl uses.
    """

    disable_color_printing: bool = False
    """Print console lines without colours."""

    save_tb_folder: str = "tb"
    """Folder for TensorBoard's files, inside the run's folder."""

    save_samples: bool = False
    """Write which recordings each step trained on, to samples.rank*.jsonl in the run's folder."""

    save_for_all_ranks: bool = False
    """Every rank writes its own TensorBoard and Weights & Biases figures, not only rank 0."""

    enable_wandb: bool = False
    """
    Send the figures to Weights & Biases. The environment variables WANDB_PROJECT and WANDB_TEAM name project and team.
    WANDB_MODE=offline keeps everything on this machine.
    """


@dataclass
class Model:
    """The language model, and the codec that turns speech into its tokens."""

    name: str = "meta-llama/Llama-3.2-1B"
    """
    A Llama in Hugging Face format, as a hub name or a local folder. Its config.json gives the architecture, its
    tokenizer gives the text tokens. A model that already has the audio tokens (llm-jp/Llama-Mimi-1.3B) is trained
    further.
    """

    flavor: Literal["", "debug", "debugmodel", "1B", "3B", "8B", "70B", "405B"] = ""
    """
    Empty: the architecture of model.name. "debug" (or TorchTitan's "debugmodel"): a small architecture of the same kind
    for tests, with the tokenizer of model.name; there are no weights for it, so it needs model.pretrained = false. A
    size such as "1B" changes nothing; it only checks that model.name contains this size.
    """

    tokenizer_path: str | None = None
    """
    Hub name or folder of another tokenizer than that of model.name. It must give the ids that the model was trained
    with; some of them may be missing.
    """

    pretrained: bool = True
    """Start from the weights of model.name. False: start from random weights."""

    num_quantizers: int = 4
    """Codes per frame of 80 ms (Q). The first one is semantic; the others are acoustic, from coarse to fine."""

    audio_tokenizer: str = "kyutai/mimi"
    """The Mimi codec, as a hub name or a local folder."""

    codec_padding: Literal["exact", "aligned"] = "exact"
    """
    How the codec encodes the last, incomplete frame of a clip. "exact": as if the clip were encoded alone and without
    padding; the published models were trained this way. "aligned": each clip is first padded with silence to whole
    frames.
    """

    codec_window: Literal["codec", "full"] = "codec"
    """
    How far back the codec's encoder attends. "codec": 10 s, as Mimi was designed. "full": to the start of the clip, as
    older versions of transformers did when the published models were trained. Only clips longer than 10 s differ.
    """

    resampler: Literal["torchaudio", "soxr_hq", "ffmpeg"] = "torchaudio"
    """
    Method that resamples recordings to 24 kHz; it changes some of the codes. The datasets library used "soxr_hq" (the
    package soxr) before version 4, and uses "ffmpeg" (torchcodec and FFmpeg's libraries) since then.
    """

    converters: list[str] = field(default_factory=list)
    """Conversions of the model: "float8" or "mx". The sections of these names have their settings."""

    print_after_conversion: bool = False
    """Log the structure of the model after its conversion by model.converters."""


@dataclass
class Optimizer:
    """The optimizer and its hyperparameters."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Which optimizer."""

    lr: float = 3e-4
    """Highest learning rate: between warm-up and decay."""

    beta1: float = 0.9
    """Decay rate of the running mean of gradients."""

    beta2: float = 0.95
    """Decay rate of the running mean of squared gradients."""

    eps: float = 1e-8
    """Number added to the denominator of an update."""

    weight_decay: float = 0.1
    """Weight decay."""

    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """How an update is computed: one kernel (fastest), a few kernels over many tensors, or tensor by tensor."""

    early_step_in_backward: bool = False
    """
    Update each parameter during the backward pass, as soon as its gradient is computed. This saves memory, because the
    gradients never exist all at once. Gradient clipping is then impossible (training.max_norm must be 0). A gradient
    that is not finite spoils the weights before the run stops, so the run has to resume from its last checkpoint.
    """


@dataclass
class LRScheduler:
    """The learning rate over time: linear warm-up, plateau, decay."""

    warmup_steps: int = 200
    """Steps in which the learning rate rises from 0 to optimizer.lr. At most the length of the run."""

    decay_ratio: float | None = None
    """
    Share of all steps, at the end of the run, in which the learning rate decays. Between warm-up and decay it stays at
    optimizer.lr. Not set: the decay begins right after the warm-up.
    """

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay: a line, one minus a square root, or half a cosine."""

    lr_min: float = 0.0
    """
    End of the decay, as a fraction of optimizer.lr: 0.1 is a tenth of it. As in TorchTitan, the decay would reach this
    value one step after the last step, so the last step still uses a higher learning rate.
    """


@dataclass
class Training:
    """Data, batch sizes, length and number formats of training."""

    dataset: str = "peoples_speech"
    """
    Name of a data set. torchtitan/datasets/hf_dataset.py lists the names. With [[training.source]] tables, this key
    only names the run.
    """

    dataset_path: str | None = None
    """Local folder or hub name of training.dataset, if it is not at its usual place."""

    source: list[dict[str, Any]] = field(default_factory=list)
    """
    Data sets to train on together, instead of training.dataset: one [[training.source]] table each. The end of --help
    explains the keys of a table. Only a file can have tables, not the command line.
    """

    task: Literal["a2a", "tts", "asr"] = "a2a"
    """
    What a sample contains. "a2a": only the speech. "tts": the transcription, then the speech. "asr": the speech, then
    the transcription.
    """

    max_seconds: float = 20.0
    """Recordings longer than this many seconds are cut or split (see training.long_clips)."""

    long_clips: Literal["cut", "split"] = "cut"
    """
    What happens to a recording that is longer than training.max_seconds or than a row. "cut": only its beginning is
    used; the lost frames are counted. "split": it becomes several samples, so that no audio is lost;
    training.packing_window says how they are mixed. "split" needs task a2a, because a transcription belongs to the
    whole recording.
    """

    end_cut_clips: bool = True
    """
    End every sample with `</audio>`, even if its recording was cut or split there. The published models were trained
    this way, so they tend to stop after 20 s whatever is being said. False: `</audio>` stands only at the real end of a
    recording, so the model learns to stop when the speech is over.
    """

    packing: Literal["none", "best_fit"] = "none"
    """
    How samples fill rows. "none": one sample per row, followed by padding. "best_fit": several whole samples share a
    row. They do not attend to each other, and positions start from 0 in each of them. The losses stay the same; the
    number of rows is smaller.
    """

    packing_window: int = 2048
    """
    Number of samples that are packed into rows together. A larger window leaves less padding. If audio is tokenized
    during training, the whole window is tokenized before its first row is ready; if such audio is also split
    (training.long_clips), the samples of a window are shuffled, even without packing.
    """

    num_workers: int = 2
    """Threads per rank that decode audio ahead of training (prefetch). 0: the thread that prepares batches decodes."""

    read_retries: int = 5
    """How often a failed read (network, file system) is tried again. Each wait is twice as long as the last."""

    max_bad_share: float = 0.2
    """
    Largest allowed share of bad recordings, which cannot be read or used. bad_rows.tsv in the run's folder lists them.
    If the share is larger, the run stops. It is checked from 1,000 recordings on. 1: never stop.
    """

    local_batch_size: int = 8
    """Rows in a microbatch: one forward pass of one rank."""

    global_batch_size: int = -1
    """
    Rows in a step, over all ranks and microbatches. It must be a multiple of training.local_batch_size times the
    data-parallel degree. -1: exactly this product, so there is no gradient accumulation.
    """

    seq_len: int = 1024
    """Tokens in a row. 20 s of speech with 4 quantizers are 1,003 tokens."""

    max_norm: float = 1.0
    """
    Gradient clipping: gradients with a larger norm are scaled down to this norm. 0 turns clipping off; it is only
    allowed with optimizer.early_step_in_backward.
    """

    steps: int = 10000
    """Number of steps (weight updates) in the run."""

    audio_head: bool = False
    """
    Compute logits and softmax over the audio tokens only. This saves about a fifth of the work at 1.3B, and needs task
    a2a. It changes what the model learns: losses are lower, because text tokens get no probability, and the logits of
    text tokens are not trained. These logits mean nothing afterwards, so generation and scoring must also be restricted
    to the audio tokens.
    """

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in CPU memory."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of forward and backward passes. The optimizer always updates float32 weights."""

    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Number format in which ranks sum their gradients."""

    compile: bool = False
    """Compile each block of the model with torch.compile."""

    gc_freq: int = 50
    """Steps between two runs of Python's garbage collector, on all ranks at once."""

    gc_debug: bool = False
    """Collect garbage at every step, to find reference cycles that hold GPU memory."""

    seed: int | None = 42
    """Seed of everything random, such as initial weights and data order. `none` (command line): a new seed each run."""

    deterministic: bool = False
    """Use only deterministic algorithms, even if they are slower."""


@dataclass
class Validation:
    """The loss on held-out speech, measured during training."""

    enabled: bool = False
    """Validate every validation.freq steps."""

    dataset: str = "librispeech_asr_test"
    """Name of the data set, as in training.dataset."""

    dataset_path: str | None = None
    """Local folder or hub name of validation.dataset, if it is not at its usual place."""

    source: list[dict[str, Any]] = field(default_factory=list)
    """Data sets to validate on together: [[validation.source]] tables, as in training.source."""

    local_batch_size: int = 8
    """Rows in one forward pass of one rank."""

    seq_len: int = 1024
    """Tokens in a row."""

    freq: int = 10
    """Training steps between two validations."""

    steps: int = -1
    """Batches per rank in one validation; always the same batches. -1: the whole data set."""


@dataclass
class Evaluation:
    """
    A small benchmark during training: the share of pairs in which the model prefers the better clip, by the rule of
    eval/salmon.py. The scripts in eval/ run the full benchmarks after training.
    """

    enable_evaluation: bool = False
    """Score pairs every evaluation.freq steps, and after the last step."""

    freq: int = 1000
    """Steps between two evaluations."""

    dataset_path: str = "slprl/SALMon"
    """
    Local folder or hub name of pairs in the layout of slprl/SALMon: one folder of parquet files per task, with the
    columns positive_audio and negative_audio. The tasks are those of SALMon; if none of these is there, each folder is
    a task.
    """

    max_pairs_per_task: int = 25
    """Pairs that are used of each task; always the same pairs. 0: all."""

    batch_size: int = 16
    """Clips in one forward pass of one rank."""

    seq_len: int = 1024
    """Clips are cut to this many tokens, and to 20 s."""


@dataclass
class Parallelism:
    """How the ranks share the work. The product of all degrees is the number of ranks."""

    data_parallel_replicate_degree: int = 1
    """Copies of the (sharded) model. Each copy trains on different data."""

    data_parallel_shard_degree: int = -1
    """Ranks over which one copy of the model is sharded (FSDP). -1: all ranks that the other degrees leave."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """
    Free gathered weights after the forward pass, and gather them again for the backward pass: less memory, more
    communication. "default": only those of the blocks, and none with pipeline parallelism. The backward pass needs the
    final norm and the head at once.
    """

    tensor_parallel_degree: int = 1
    """Ranks over which each layer is split."""

    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits before the loss."""

    enable_async_tensor_parallel: bool = False
    """With tensor parallelism: overlap communication and computation."""

    pipeline_parallel_degree: int = 1
    """Ranks over which the blocks are split, in consecutive stages."""

    pipeline_parallel_split_points: list[str] = field(default_factory=list)
    """Modules at which a new pipeline stage begins."""

    pipeline_parallel_layers_per_stage: int | None = None
    """Blocks in a pipeline stage."""

    pipeline_parallel_schedule: str = "1F1B"
    """Order of the forward and backward passes in a pipeline."""

    pipeline_parallel_schedule_csv: str | None = None
    """CSV file with that order, instead of a name: a line per rank, such as 0F0,0F1,0B0,0B1 (see docs/training.md)."""

    pipeline_parallel_microbatch_size: int = 1
    """Rows in a microbatch of the pipeline."""

    context_parallel_degree: int = 1
    """Ranks over which each row is split, along its sequence."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """With context parallelism: how keys and values are exchanged."""

    enable_compiled_autograd: bool = False
    """
    Compile the backward pass as a whole, with torch's compiled autograd. It needs training.compile, and works on a
    single rank only, because FSDP2 keeps its part of the backward pass out of compiled graphs.
    """


@dataclass
class Checkpoint:
    """What a run saves, and what it starts from."""

    enable_checkpoint: bool = False
    """
    Save checkpoints, and resume from the run's latest checkpoint. Checkpoints are folders of
    torch.distributed.checkpoint: <job.dump_folder>/<run>/<checkpoint.folder>/step-N.
    """

    folder: str = "checkpoint"
    """Folder for checkpoints, inside the run's folder."""

    initial_load_path: str | None = None
    """
    What the run starts from if it has no checkpoint of its own yet: a checkpoint folder (the step-N of any run), or a
    model in Hugging Face format with the same sizes and vocabulary, which has weights only.
    """

    initial_load_model_only: bool = True
    """Load only the weights from checkpoint.initial_load_path. False: also optimizer, schedule, data and step."""

    interval: int = 500
    """Steps between two checkpoints. The last step is always saved."""

    last_save_model_only: bool = False
    """Save only the weights at the last step. The run can then not be continued with more steps."""

    last_save_in_hf: bool = False
    """
    Also write the last checkpoint in Hugging Face format, to <job.dump_folder>/<run>/hf/step-N, as
    scripts/convert_dcp_to_hf.py does for any checkpoint. Rank 0 then holds the whole model in memory, in fp32.
    """

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Number format of the weights that checkpoint.last_save_model_only and checkpoint.last_save_in_hf save."""

    create_seed_checkpoint: bool = False
    """
    Save the initial weights and state as step-0, on one rank, and stop. The real run then starts from this checkpoint,
    on any number of ranks and with any parallelism.
    """

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """
    Save while training goes on. "async": training waits until the tensors are copied to CPU memory; a thread writes
    them. "async_with_pinned_mem": the tensors are copied to pinned memory while the next step computes its gradients,
    and a separate process writes them; this is faster and needs more memory. Only one save runs at a time.
    """

    keep_latest_k: int = 10
    """Number of checkpoints to keep; older ones are deleted. 0: keep all."""

    load_step: int = -1
    """Step of the checkpoint to resume from. -1: the latest."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """
    Parts of a checkpoint that are not loaded, now and at any later resume. optimizer: its state starts anew.
    lr_scheduler: the schedule starts anew with its warm-up, over the steps that are left. dataloader: the data start
    from the beginning, and may be other data. random: the random state. Weights and step are always loaded.
    """

    enable_first_step_checkpoint: bool = False
    """Also save after the first step, to see early that saving works."""


@dataclass
class ActivationCheckpoint:
    """Less memory for more computation: the backward pass recomputes activations that were not kept."""

    mode: Literal["none", "selective", "full"] = "none"
    """
    "none": keep all activations. "full": keep only the input of each block. "selective": see
    activation_checkpoint.selective_ac_option.
    """

    selective_ac_option: str = "op"
    """
    For mode "selective". "op": keep the results of attention and of every second matrix product; recompute the rest. A
    number n: every n-th block (0, n, 2n, ...) keeps only its input; the other blocks keep everything.
    """

    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])
    """
    For option "op": parts of layer names (feed_forward.w2). The matrix products of these layers, and all others of the
    same shape, are always recomputed. The default names a layer that this model does not have.
    """


@dataclass
class Compile:
    """torch.compile."""

    components: list[str] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled: model (each block by itself), loss (the softmax over the vocabulary, and its gradient)."""


@dataclass
class Float8:
    """Matrix products of the blocks in 8-bit floats: model.converters = ["float8"] (needs torchao)."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather the weights in float8, for recipe tensorwise on several ranks."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all weights at once after each step."""

    force_recompute_fp8_weight_in_bwd: bool = False
    """Recompute float8 weights in the backward pass. Since 2025 torchao always does so."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """
    How values are scaled. "tensorwise" (default, fastest): one scale per tensor. "rowwise": one scale per row.
    "rowwise_with_gw_hp" (most accurate): one scale per row, and weight gradients in high precision.
    """

    filter_fqns: list[str] = field(default_factory=list)
    """Parts of names of layers that are not converted (attention.wk). Embedding and head never are."""

    emulate: bool = False
    """Compute the same on hardware without float8. This is slow."""


@dataclass
class MX:
    """
    Matrix products of the blocks in MXFP8, which are 8-bit floats with one scale per 32 values: model.converters =
    ["mx"] (needs torchao).
    """

    use_fp8_dim1_cast_triton_kernel: bool = True
    """Cast with Triton kernels. False: cast in plain torch, which torch.compile fuses."""

    recipe_name: Literal["mxfp8"] = "mxfp8"
    """Which MX format."""

    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Parts of names of layers that are not converted (attention.wk). Embedding and head never are."""

    emulate: bool = False
    """Compute the same on hardware without MX formats. This is slow."""


@dataclass
class Comm:
    """Communication between ranks."""

    init_timeout_seconds: int = 300
    """Time limit of a collective before and during the first step, when models load and kernels compile."""

    train_timeout_seconds: int = 100
    """Time limit of a collective after the first step."""

    trace_buf_size: int = 20000
    """Collectives that NCCL's flight recorder keeps and writes out after a timeout. 0: none."""


@dataclass
class MemoryEstimation:
    """An estimate of a run's memory without running it."""

    enabled: bool = False
    """
    Only print what the run needs on the ranks that were started (GPU memory by component, an upper bound of the speed,
    storage), and exit. scripts/estimate.py does the same for any number of GPUs; see docs/estimate.md.
    """

    gpu: str = ""
    """GPU whose memory and speed are assumed, such as H200. Default: the GPU of this machine, else an H100."""


@dataclass
class Experimental:
    """Python modules from outside this repository."""

    custom_import: str = ""
    """Python module to import at the start. It can register kernels, for example."""

    custom_args_module: str = ""
    """
    Python module with a dataclass JobConfig. Its sections and keys are added to those here, so that the module of
    custom_import has its settings in the same file and on the same command line.
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
