"""The models that the benchmarks of evaluations and of continuations run: full sizes, random weights."""

from typing import Any

import torch

QUANTIZERS = 4
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "mid": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "1.3B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192},
}


def make_model(size: str, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A SpeechLM of a tied Llama with ``vocabulary`` ids, of which the last 8,194 are those of audio, and a Mimi of
    kyutai/mimi's size in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM, MimiConfig, MimiModel

    from torchtitan.audio.codec import Codec
    from torchtitan.audio.token_stream import TokenStream
    from torchtitan.models.speech_lm import SpeechLM

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
        mimi = MimiModel(MimiConfig())
        for module in mimi.modules():
            if hasattr(module, "embed_sum"):
                module.embed_sum.normal_()  # type: ignore[operator]
    codec = Codec(mimi, QUANTIZERS).to(device)
    return SpeechLM("random", model.to(device).eval().requires_grad_(False), None, stream, codec)
