"""Llama 3 in plain PyTorch: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, tied or untied head.

The same function as transformers' ``LlamaForCausalLM`` on the same weights (rotate-half rotary layout, so no weight is
permuted on the way). Parallelism is applied from outside (parallelize.py). The module is made on the meta device and
gets its values from the functions of weights.py.
"""

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.attention import Documents, attend, find_documents
from torchtitan.models.loss import Columns, chunked_nll, chunked_nll_sum


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the scale is computed in fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary_frequencies(args: Llama3Args, device: torch.device | None = None) -> torch.Tensor:
    """Angular frequencies [head_dim / 2] of the rotary embedding, with Llama 3.1's rescaling where asked.

    Llama 3.1: wavelengths over ``original / low_freq_factor`` are slowed down by ``factor``, those under
    ``original / high_freq_factor`` are left, in between both are blended linearly.
    """
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.int64, device=device).float() / args.head_dim
    frequencies = 1.0 / (args.rope_theta**exponent)
    if args.rope_scaling is None:
        return frequencies
    factor, low, high, original = (
        args.rope_scaling[key]
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / factor + keep * frequencies


class RotaryTables(nn.Module):
    """The cosines and sines of the rotary embedding, in fp32."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, args: Llama3Args):
        super().__init__()
        self.args = args
        self.register_buffer("cos", torch.empty(0, args.head_dim), persistent=False)
        self.register_buffer("sin", torch.empty(0, args.head_dim), persistent=False)

    def reset(self, seq_len: int, device: torch.device) -> None:
        """Compute the tables [seq_len, head_dim] on ``device``."""
        angles = torch.outer(torch.arange(seq_len, device=device).float(), rotary_frequencies(self.args, device))
        angles = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(
        self, length: int, dtype: torch.dtype, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [length, head_dim], or those at ``positions`` [B, S] as [B, 1, S, head_dim].

        Raises:
            ValueError: the tables are shorter than ``length``.
        """
        if length > self.cos.shape[0]:
            raise ValueError(f"rows of {length} ids need rotary tables of that length, not {self.cos.shape[0]}")
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        return (cos, sin) if positions is None else (cos[positions][:, None], sin[positions][:, None])


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, heads, S, head_dim] by cos and sin; halves are rotated against each other.

    cos and sin are [S, head_dim], or [B, 1, S, head_dim] where rows differ.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys."""
    return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)


def swiglu(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * x."""
    return F.silu(gate) * x


class Attention(nn.Module):
    """Causal grouped-query attention, in packed rows within each document."""

    def __init__(self, args: Llama3Args):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.rotate, self.attend = rotate_both, attend

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, documents: Documents | None = None
    ) -> torch.Tensor:
        """x [B, S, dim] to [B, S, dim]."""
        batch, length, _ = x.shape
        # With tensor parallelism a rank has only some of the heads.
        q, k, v = (w(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, k, cos, sin)
        out = self.attend(q, k, v, documents)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: Llama3Args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.gate = swiglu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.gate(self.w1(x), self.w3(x)))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, args: Llama3Args):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, documents: Documents | None = None
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, documents)
        return x + self.feed_forward(self.ffn_norm(x))


class OutputHead(nn.Module):
    """The projection onto the vocabulary, and the loss over it. Alignment rows of the weight [rows, dim] have no part.

    Attributes:
        first_id: ids below are left out of the softmax, see training.audio_head.
        compiled: the loss is computed with torch.compile in training.
    """

    def __init__(self, weight: nn.Parameter, vocab_size: int):
        super().__init__()
        self.weight, self.vocab_size = weight, vocab_size
        self.first_id = 0
        self.compiled = False

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [B, S, dim] to logits [B, S, vocab_size].

        With ``targets`` [B, S] the logits are never held whole: the result is the sum of the negative
        log-likelihoods (a scalar, with gradients) in training mode, and each target's [B, S] in eval mode.
        """
        if targets is None:
            return F.linear(hidden, self.weight[: self.vocab_size])
        columns = Columns(self.first_id, self.vocab_size - self.first_id)
        return self.nll(hidden, self.weight[self.first_id :] if self.first_id else self.weight, targets, columns)

    def nll(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, columns: Columns) -> torch.Tensor:
        """The loss over some columns of the logits, of which ``weight`` has the rows."""
        if self.training:
            return chunked_nll_sum(hidden, weight, targets, columns, self.compiled)
        return chunked_nll(hidden, weight, targets, columns)


class Llama3(nn.Module):
    """The decoder. Construct under ``torch.device("meta")`` for large sizes.

    Attributes:
        first, last: whether this is the beginning, the end of the model. A stage of a pipeline is a model without the
            modules of the other stages: the first one takes ids, the others hidden states [B, S, dim], and all but the
            last one return them.
        compiled: the blocks are compiled.
    """

    def __init__(self, args: Llama3Args):
        super().__init__()
        self.args = args
        self.compiled = False
        self.first = self.last = True
        size = (args.padded_vocab_size, args.dim)
        # Without values nn.Embedding draws some. On the meta device that imports torch's compiler, which takes seconds.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(size), freeze=False)
        self.rotary = RotaryTables(args)
        self.find_documents: Callable[..., Documents] = find_documents
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args) for i in range(args.n_layers)})
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = OutputHead(nn.Parameter(torch.empty(size)), args.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding's parameter, if the model is tied and has both."""
        if self.args.tied and self.first and self.last:
            self.output.weight = cast(nn.Parameter, self.tok_embeddings.weight)

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under their names in the whole model, in which a tied head is the embedding."""
        for name, parameter in self.named_parameters():
            yield ("tok_embeddings.weight" if self.is_copy(name) else name), parameter

    def is_copy(self, name: str) -> bool:
        """Whether a parameter is the head of a tied model of which the embedding is on another stage."""
        return self.args.tied and name == "output.weight"

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        num_documents: int | None = None,
    ) -> torch.Tensor:
        """Ids [B, S] to logits [B, S, vocab_size], or with targets [B, S] to their losses (see OutputHead).

        ``positions`` [B, S] packs several documents into a row: it is each id's position within its document, and a
        document begins wherever it is 0. Documents do not see each other. Each has the losses that it has in a row of
        its own, if its last id has no target. Padding is a document too. Without positions each row is one document.
        ``num_documents`` is how many there are, or a few more; without it the CPU waits for a GPU that counts them.

        Raises:
            ValueError: the rows are longer than the rotary tables.
        """
        x = self.tok_embeddings(tokens) if self.first else tokens
        cos, sin = self.rotary((tokens if targets is None else targets).shape[1], x.dtype, positions)
        documents = None
        if positions is not None:
            documents = self.find_documents(positions, x.dtype, self.args.head_dim, self.compiled, num_documents)
        for layer in self.layers.values():
            x = layer(x, cos, sin, documents)
        return self.output(self.norm(x), targets) if self.last else x
