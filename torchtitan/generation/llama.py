"""A Llama with a static cache, which computes one position a step for every row of a batch.

It is the same function as transformers' ``LlamaForCausalLM`` without the head, on the same weights. Projections of one
input are one product, keys and values lie in tensors of constant size, and each row has its own position. Shapes
depend only on the number of rows and of attended positions, so a step can be compiled and captured in a CUDA graph.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtitan.generation.linear import make_linear

# Attended positions are rounded up to a multiple of this, which bounds the number of shapes.
BLOCK = 128


class Layer(nn.Module):
    """One block: pre-norm attention over the cache and SwiGLU, each with a residual connection."""

    def __init__(self, layer: Any, config: Any, capacity: int, **options: bool):
        super().__init__()
        self.capacity = capacity
        attention, mlp = layer.self_attn, layer.mlp
        self.num_kv_heads = config.num_key_value_heads
        self.num_heads = config.num_attention_heads
        self.head_dim = attention.head_dim
        self.eps = config.rms_norm_eps
        self.attention_norm = layer.input_layernorm.weight
        self.mlp_norm = layer.post_attention_layernorm.weight
        self.qkv = _merged([attention.q_proj, attention.k_proj, attention.v_proj], **options)
        self.out = make_linear(attention.o_proj.weight, attention.o_proj.bias, **options)
        self.gate_up = _merged([mlp.gate_proj, mlp.up_proj], **options)
        self.down = make_linear(mlp.down_proj.weight, mlp.down_proj.bias, **options)

    def project(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [n, D] to queries [n, heads, Dh], keys and values [n, kv heads, Dh]; cos and sin [n, 1, Dh].

        The first half of ``sin`` is negative, which makes the rotation a roll by half of the dimensions.
        """
        x = rms_norm(x, self.attention_norm, self.eps)
        rotated = self.num_heads + self.num_kv_heads
        heads = self.qkv(x).view(x.shape[0], rotated + self.num_kv_heads, self.head_dim)
        qk = heads[:, :rotated]
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, dims=-1), sin)
        return qk[:, : self.num_heads], qk[:, self.num_heads :], heads[:, rotated:]

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The block's output [n, D] from its input and what attention gave [n, heads * Dh]."""
        x = x + self.out(attended)
        gate, up = self.gate_up(rms_norm(x, self.mlp_norm, self.eps)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        places: torch.Tensor,
        mask: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """One position of every row.

        Args:
            x: [n, D].
            cos, sin: [n, 1, Dh].
            places: where keys and values go, int64 [n * kv heads], as indices into the cache's first three dimensions.
            mask: [n, 1, 1, L], 0 where a position is attended and -inf elsewhere.
            keys, values: this block's cache, flat [rows * kv heads * capacity, Dh]; n rows and L positions are read.
                (The caller flattens it: compiled code would copy a cache that is flattened here, not update it.)
        """
        q, k, v = self.project(x, cos, sin)
        keys.index_copy_(0, places, k.reshape(-1, self.head_dim))
        values.index_copy_(0, places, v.reshape(-1, self.head_dim))
        rows, length = x.shape[0], mask.shape[-1]
        keys, values = (x.view(-1, self.num_kv_heads, self.capacity, self.head_dim) for x in (keys, values))
        # Queries that share keys are treated as positions of one head, so that keys need not be repeated.
        attended = F.scaled_dot_product_attention(
            q.view(rows, self.num_kv_heads, -1, self.head_dim),
            keys[:rows, :, :length],
            values[:rows, :, :length],
            attn_mask=mask,
        )
        return self.finish(x, attended.reshape(rows, -1))


class CachedLlama(nn.Module):
    """The blocks, the embedding and the cache.

    Args:
        model: a transformers ``LlamaForCausalLM``. Its embedding and norms are shared, the other weights are copied.
        rows: sequences that are decoded together at most.
        capacity: positions that a row can have; rounded up to a multiple of :data:`BLOCK`.
        int8: the weights of the blocks in 8 bits.
        pack: see linear.py; not to be combined with torch.compile.
        consume: remove the weights of the blocks from the model, so that they are not in memory twice.

    Attributes:
        positions: the number of ids that each row has in the cache, int64 [rows].
    """

    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    row_places: torch.Tensor
    head_places: torch.Tensor

    def __init__(
        self, model: Any, rows: int, capacity: int, int8: bool = False, pack: bool = True, consume: bool = False
    ):
        super().__init__()
        config = model.config
        weight = model.get_input_embeddings().weight
        device, dtype = weight.device, weight.dtype
        self.embedding = weight
        self.norm, self.eps = model.model.norm.weight, config.rms_norm_eps
        self.capacity = -(-capacity // BLOCK) * BLOCK
        self.layers = nn.ModuleList()
        for layer in model.model.layers:
            self.layers.append(Layer(layer, config, self.capacity, int8=int8, pack=pack))
            if consume:
                for linear in (part for part in layer.modules() if isinstance(part, nn.Linear)):
                    linear.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)
        self.num_kv_heads = config.num_key_value_heads
        head_dim = model.model.layers[0].self_attn.head_dim
        # Some kinds of scaling depend on the largest position, so none may exceed the model's context.
        positions = torch.arange(self.capacity, device=device).clamp(max=config.max_position_embeddings - 1)
        cos, sin = model.model.rotary_emb(weight[:1, :1], positions[None])
        sin = torch.cat([-sin[..., : head_dim // 2], sin[..., head_dim // 2 :]], dim=-1)
        self.register_buffer("cos", cos[0][:, None])
        self.register_buffer("sin", sin[0][:, None])
        shape = (len(self.layers), rows, self.num_kv_heads, self.capacity, head_dim)
        # Zeros, since masked positions still enter products, where a value that is not finite would spread.
        self.register_buffer("keys", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("mask", torch.full((rows, 1, 1, self.capacity), -torch.inf, device=device, dtype=dtype))
        self.register_buffer("positions", torch.zeros(rows, dtype=torch.int64, device=device))
        self.register_buffer("row_places", torch.arange(rows, device=device) * self.capacity)
        heads = torch.arange(rows * self.num_kv_heads, device=device) * self.capacity
        self.register_buffer("head_places", heads.view(rows, self.num_kv_heads))

    def prefill(self, row: int, ids: torch.Tensor) -> torch.Tensor:
        """Fill a row with ids [n] in place of its contents, and return the hidden state [D] of the last one.

        Each row is read alone, so that its state does not depend on other rows.
        """
        length = ids.shape[0]
        assert 0 < length <= self.capacity
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[:length], self.sin[:length]
        for layer, keys, values in self._blocks():
            q, k, v = (part.transpose(0, 1)[None] for part in layer.project(x, cos, sin))
            keys[row, :, :length], values[row, :, :length] = k[0], v[0]
            keys[row, :, length:], values[row, :, length:] = 0, 0
            with _own_kernels(x.device):
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = layer.finish(x, attended[0].transpose(0, 1).reshape(length, -1))
        self.mask[row] = -torch.inf
        self.mask[row, ..., :length] = 0
        self.positions[row] = length
        return rms_norm(x[-1], self.norm, self.eps)

    def step(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Append one id to each of the first n rows: ids [n] to hidden states [n, D].

        Args:
            length: no row has more than this many ids afterwards; a multiple of :data:`BLOCK`.
        """
        rows = ids.shape[0]
        positions = self.positions[:rows]
        self.mask.view(-1).index_fill_(0, self.row_places[:rows] + positions, 0)
        places = (self.head_places[:rows] + positions[:, None]).view(-1)
        cos, sin, mask = self.cos[positions], self.sin[positions], self.mask[:rows, ..., :length]
        x = F.embedding(ids, self.embedding)
        with _own_kernels(x.device):
            for layer, keys, values in self._blocks():
                x = layer(x, cos, sin, places, mask, *(part.view(-1, layer.head_dim) for part in (keys, values)))
        positions += 1
        return rms_norm(x, self.norm, self.eps)

    def _blocks(self) -> Iterator[tuple[Layer, torch.Tensor, torch.Tensor]]:
        """Each block with its part of the cache."""
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            yield cast(Layer, layer), keys, values

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Give row ``target`` the first ``length`` positions of row ``source``, and its own mask and position."""
        for cache in (self.keys, self.values):
            cache[:, target, :, :length] = cache[:, source, :, :length]
            cache[:, target, :, length:] = 0
        self.mask[target] = self.mask[source]
        self.positions[target] = self.positions[source]


def _own_kernels(device: torch.device) -> AbstractContextManager:
    """On CUDA, attention without cuDNN, which torch prefers on newer GPUs. cuDNN prepares each new length in each
    thread anew, and here lengths change all the time."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, as transformers computes it: the scale in fp32."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    # On a CPU F.rms_norm is slower for such short rows.
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def _merged(linears: list[Any], **options: bool) -> nn.Module:
    """One layer that gives the outputs of several layers of one input side by side."""
    weight = torch.cat([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    return make_linear(weight, None if biases[0] is None else torch.cat(biases), **options)
