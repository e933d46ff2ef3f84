"""The options of scripts/train_codec.py, and the checks that need neither data nor codec."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchtitan.audio.token_stream import CODEBOOK_SIZE
from torchtitan.tools.errors import UserError

QUANTIZERS = 8  # codebooks of a codec
FROM_SCRATCH = ("continuous_steps", "quantized_steps", "num_filters", "hidden_size", "codebook_dim")
FROM_SCRATCH += ("upsampling_ratios", "clusters", "semantic_weight", "refit_every")
"""Options of the encoder and its training, which do not go with `start_from`."""


@dataclass
class Options:
    """Train a small Mimi codec from scratch."""

    data: list[str]
    """Data sets to train on: folders, files or hub ids. The last one is the target domain: see common_entries."""
    output: Path
    """Folder for the codec (config.json, model.safetensors, preprocessor_config.json)."""
    start_from: str | None = None
    """A codec (folder or hub id, of 8 quantizers) to start from instead of random weights. Its encoder is kept, rounded
    to float16; stages 1 and 2 and their options do not apply. Codebooks are fitted and the decoder is trained."""
    work: Path | None = None
    """Folder for the decoded audio and checkpoints; <output>.training by default. It can be deleted at the end."""
    continuous_steps: int = 1500
    """Steps of stage 1."""
    quantized_steps: int = 1000
    """Steps of stage 2."""
    decoder_steps: int = 2500
    """Steps of stage 3."""
    adversarial_from: int = 800
    """Steps of stage 3 before the discriminators set in; decoder_steps or more for none at all."""
    rows: int = 6
    """Rows of a batch: stretches of speech."""
    frames: int = 12
    """Length of a row in frames of 80 ms."""
    learning_rate: float = 0.02
    """Peak learning rate of matrices (Muon); that of vectors (AdamW) is 0.15 of it. It falls linearly over stages 1 and
    2; stage 3 begins again with the half of it."""
    num_filters: int = 24
    """Channels at the waveform; 16 times as many before the last strided convolution."""
    hidden_size: int = 96
    """Channels of latents and transformers."""
    codebook_dim: int = 32
    """Dimensions of codebook entries."""
    upsampling_ratios: tuple[int, int, int, int] = (4, 5, 6, 8)
    """Strides of the decoder, their product 960; the encoder's are the reverse. Mimi has 8 6 5 4; this order, with the
    long stride at the waveform, has a quarter fewer weights."""
    common_entries: tuple[int, ...] = (2048,) * 8
    """For each codebook, how many entries k-means fits at the start of stage 3. With 2,048 it fits them to 100,000
    frames of the last data set and as many of the others. With fewer it fits them to 30,000 frames of the last data
    set, and the other entries lie at rare latents: the codes have a lower entropy, which a small language model can
    learn from little speech."""
    rare_entries: int = 750
    """How many of the other entries lie at rare latents of the last data set; the rest lie at rare latents of all."""
    speaker_directions: int | None = None
    """Directions to remove from the semantic latents at the start of stage 3: those in which clips differ most from
    each other, relative to the variation within clips, which is mostly the speaker. 3; with --start_from 0."""
    clusters: int = 256
    """Clusters of the semantic teacher."""
    semantic_weight: float = 1.0
    """Weight of the semantic loss."""
    adversarial_weight: float = 1.0
    """Weight of the adversarial losses."""
    refit_every: int = 250
    """Steps between two fits of the codebooks in stage 2."""
    checkpoint_every: int = 250
    """Steps between two checkpoints."""
    precision: str = "bfloat16"
    """Precision of convolutions in training: bfloat16 or float32. The codec itself always runs in float32."""
    threads: int = 1
    """Threads on a CPU."""
    seed: int = 0
    """Seed of weights, batches and noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def check_positive(options: Any, *names: str) -> None:
    """Raise UserError for an option that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1.")


def check(options: Options) -> None:
    """Check what needs neither data nor codec.

    Raises:
        UserError: an option does not fit.
    """
    counts = ("rows", "frames", "continuous_steps", "quantized_steps", "decoder_steps", "num_filters", "hidden_size")
    check_positive(options, *counts, "codebook_dim", "refit_every", "checkpoint_every", "threads")
    if not 2 <= options.clusters < 2**15:
        raise UserError(f"--clusters must be from 2 to {2**15 - 1}, not {options.clusters}.")
    if len(options.common_entries) != QUANTIZERS or not all(1 <= n <= CODEBOOK_SIZE for n in options.common_entries):
        raise UserError(f"--common_entries needs 8 numbers from 1 to {CODEBOOK_SIZE}, not {options.common_entries}.")
    if not 0 <= options.rare_entries <= CODEBOOK_SIZE:
        raise UserError(f"--rare_entries must be from 0 to {CODEBOOK_SIZE}, not {options.rare_entries}.")
    if options.start_from is not None:
        default = {field.name: field.default for field in fields(Options)}
        given = [name for name in FROM_SCRATCH if getattr(options, name) != default[name]]
        if given:
            raise UserError(f"--{', --'.join(given)}: not with --start_from, whose codec has its own.")
    if options.precision not in ("bfloat16", "float32"):
        raise UserError(f"--precision must be bfloat16 or float32, not {options.precision!r}.")
