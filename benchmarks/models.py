"""The models that the benchmarks run: full sizes (and one for trying things out), random weights."""

from typing import Any

import torch

QUANTIZERS = 4
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "mid": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "1.3B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192},
}
# A Mimi that encodes at once, for trying things out.
TINY_MIMI = {
    **{"num_filters": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "codebook_dim": 16, "upsample_groups": 32},
    **{"vector_quantization_hidden_dimension": 16, "num_quantizers": 8},
}


def make_codec(device: torch.device, tiny: bool = False) -> Any:
    """A codec of kyutai/mimi's size, or a tiny one, in fp32, with random weights and filled codebooks."""
    from transformers import MimiConfig, MimiModel

    from torchtitan.audio.codec import Codec

    torch.manual_seed(0)
    # The same weights for every device.
    model = MimiModel(MimiConfig(**(TINY_MIMI if tiny else {})))
    for module in model.modules():
        if hasattr(module, "embed_sum"):
            module.embed_sum.normal_()  # type: ignore[operator]
            module._embed = None
    return Codec(model, QUANTIZERS).to(device)


def make_model(size: str, vocabulary: int, dtype: torch.dtype, device: torch.device, codec: Any = None) -> Any:
    """A SpeechLM of a tied Llama with ``vocabulary`` ids, of which the last 8,194 are those of audio.

    Args:
        codec: its codec; one of kyutai/mimi's size if none is given.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchtitan.audio.token_stream import TokenStream
    from torchtitan.checkpoint.speech_lm import SpeechLM

    torch.manual_seed(0)
    sizes = SIZES[size]
    stream = TokenStream(vocabulary - 2048 * QUANTIZERS - 2, QUANTIZERS, bos_id=0)
    config = LlamaConfig(
        **sizes,  # type: ignore[arg-type]
        num_key_value_heads=max(1, sizes["num_attention_heads"] // 4),
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=stream.bos_id,
        eos_token_id=None,
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).to(dtype)
    codec = codec or make_codec(device)
    return SpeechLM("random", model.to(device).eval().requires_grad_(False), None, stream, codec)
