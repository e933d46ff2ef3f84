"""The models and rows of ids of the benchmarks: full sizes, small ones for trying things out, random weights."""

from collections.abc import Callable
from typing import Any

import torch

from torchtitan.audio.token_stream import TokenStream
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.loss import IGNORE_INDEX

QUANTIZERS = 4
VOCABULARY = 136_450  # that of Llama 3 with the audio tokens of 4 quantizers
AUDIO_IDS = 2048 * QUANTIZERS + 2
# dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim
SIZES = {
    "tiny": (128, 2, 2, 1, 64, 256),
    "small": (256, 4, 4, 1, 64, 1024),
    "mid": (768, 12, 12, 3, 64, 2048),
    "1.3B": (2048, 16, 32, 8, 64, 8192),
    "8B": (4096, 32, 32, 8, 128, 14336),
}
# A Mimi that encodes at once, for trying things out.
TINY_MIMI = {
    **{"num_filters": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "codebook_dim": 16, "upsample_groups": 32},
    **{"vector_quantization_hidden_dimension": 16, "num_quantizers": 8},
}

Rows = list[list[torch.Tensor]]  # the samples of each row


def llama_args(size: str, vocabulary: int = VOCABULARY) -> Llama3Args:
    """The sizes of a model of this name."""
    return Llama3Args(vocabulary, *SIZES[size], tied=size != "8B")


def make_mimi(tiny: bool = False) -> Any:
    """A MimiModel of kyutai/mimi's size, or a tiny one, in fp32, with random weights and filled codebooks."""
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**(TINY_MIMI if tiny else {})))
    for module in model.modules():
        if hasattr(module, "embed_sum"):
            module.embed_sum.normal_()  # type: ignore[operator]
            module._embed = None
    return model


def make_codec(device: torch.device, tiny: bool = False) -> Any:
    """The codec of :func:`make_mimi`, with the same weights on every device."""
    from torchtitan.audio.codec import Codec

    return Codec(make_mimi(tiny), QUANTIZERS).to(device)


def make_speech_model(size: str, vocabulary: int, dtype: torch.dtype, device: torch.device, codec: Any = None) -> Any:
    """A SpeechLM with ``vocabulary`` ids, of which the last 8,194 are those of audio.

    Args:
        codec: its codec; one of kyutai/mimi's size if none is given.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchtitan.checkpoint.speech_lm import SpeechLM

    torch.manual_seed(0)
    stream = TokenStream(vocabulary - AUDIO_IDS, QUANTIZERS, bos_id=0)
    sizes = llama_args(size, vocabulary).to_hf()
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=stream.bos_id, eos_token_id=None)).to(dtype)
    return SpeechLM("random", model.eval().requires_grad_(False), None, stream, codec or make_codec(device))


def make_train_step(args: Llama3Args, device: torch.device, seq_len: int) -> Callable[..., None]:
    """A training step of Llama3 alone: loss, gradients, clipping and fused AdamW, on a GPU all in bf16.

    Returns:
        what takes tokens, targets and, for packed rows, positions, int64 [B, S], and waits for the result.
    """
    from torchtitan.models.llama3.model import Llama3
    from torchtitan.models.llama3.weights import init_random, materialize

    with torch.device("meta"):
        model = Llama3(args)
    materialize(model, device, seq_len)
    init_random(model, 0)
    model.train().to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(*batch: torch.Tensor) -> None:
        tokens, targets, *positions = (x.to(device, non_blocking=True) for x in batch)
        loss = model(tokens, targets, *positions)
        (loss / (targets != IGNORE_INDEX).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def fill_rows(rows: Rows, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets and positions [B, length] of rows of samples, as the trainer's loader makes them."""
    tokens, positions = torch.zeros(2, len(rows), length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for r, row in enumerate(rows):
        begin = 0
        for sample in row:
            end = begin + sample.numel()
            tokens[r, begin:end], positions[r, begin:end] = sample, torch.arange(sample.numel())
            targets[r, begin : end - 1] = sample[1:]
            begin = end
        positions[r, begin:] = torch.arange(length - begin)
    return tokens, targets, positions


def num_ids(rows: Rows) -> int:
    return sum(sample.numel() for row in rows for sample in row)
