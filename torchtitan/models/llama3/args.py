"""The shape of a Llama 3 model, read from and written to a Hugging Face config.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError

# Rows of the embedding and the head are rounded up to this, so that 136,450 (no multiple of 8) runs on tensor cores.
VOCAB_ALIGNMENT = 128

_REFUSED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1}


@dataclass(frozen=True)
class Llama3Args:
    """Sizes of a Llama 3 decoder.

    ``vocab_size`` is the real number of ids (what is exported); the model pads it to ``padded_vocab_size`` inside.
    ``rope_scaling`` is None or the four numbers of Llama 3.1's rule (factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings).
    """

    vocab_size: int
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 32
    hidden_dim: int = 768
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: dict[str, float] | None = None
    max_seq_len: int = 4096
    tied: bool = True

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str = "config.json") -> "Llama3Args":
        """Read a Llama config.json, as written by transformers 4 or 5.

        Raises:
            UserError: another architecture, or an option this model does not have.
        """
        if config.get("model_type") != "llama":
            raise UserError(f"{source}: model_type is {config.get('model_type')!r}, only llama models can be trained.")
        for key, supported in _REFUSED.items():
            if config.get(key, supported) != supported:
                raise UserError(f"{source}: {key} = {config[key]!r} is not supported (only {supported!r}).")
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise UserError(f"{source}: rope type {rope_type!r} is not supported (only default and llama3).")
        scaling_keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        try:
            heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                dim=config["hidden_size"],
                n_layers=config["num_hidden_layers"],
                n_heads=heads,
                n_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                hidden_dim=config["intermediate_size"],
                norm_eps=config.get("rms_norm_eps", 1e-6),
                rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
                rope_scaling={key: rope[key] for key in scaling_keys} if rope_type == "llama3" else None,
                max_seq_len=config.get("max_position_embeddings", 2048),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise UserError(f"{source}: the key {error.args[0]!r} is missing.") from None

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """A config.json of LlamaForCausalLM that transformers 5 and 4.53 read alike.

        transformers 5 takes ``rope_parameters`` and ``dtype``; version 4 takes ``rope_theta``, ``rope_scaling`` and
        ``torch_dtype`` and ignores the others.
        """
        scaling = {"rope_type": "llama3", **self.rope_scaling} if self.rope_scaling else None
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.hidden_dim,
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_seq_len,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "use_cache": True,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
            "torch_dtype": dtype,
            "dtype": dtype,
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def num_params(self) -> int:
        """Parameters with the real vocabulary, a tied head counted once."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        return self.n_layers * layer + self.dim + self.vocab_size * self.dim * (1 if self.tied else 2)

    def flops_per_token(self, seq_len: float) -> float:
        """Training FLOPs of a token: 6 N + 12 L H T, with N the parameters that are multiplied with (the head once,
        no input look-up), H = heads x head_dim and T = seq_len, the length that attention spans: that of a row, in
        packed rows that of a token's document, on average."""
        multiplied = self.num_params - self.vocab_size * self.dim * (0 if self.tied else 1)
        return 6 * multiplied + 12 * self.n_layers * self.n_heads * self.head_dim * seq_len


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        UserError: it is missing or no JSON.
    """
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: the folder holds no config.json.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON (line {error.lineno}).") from None
