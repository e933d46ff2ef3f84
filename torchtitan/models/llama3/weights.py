"""Values for a Llama 3 that was built on the meta device: from Hugging Face safetensors, or random.

Every parameter is filled shard by shard, and from a file a rank reads only what it keeps. (Random values are drawn
whole, one parameter at a time.) Both sources give the same values for any number of ranks.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.model import Llama3
from torchtitan.tools.errors import UserError
from torchtitan.tools.torch_private import local_region

_LAYER_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


# Parameters of up to so many elements get their random values from the CPU, where more would take long.
_DRAWN_ON_CPU = 1 << 22


class Weighted(Protocol):
    """A model, or this rank's part of one, whose parameters have the names that they have in the whole."""

    args: Llama3Args

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def hf_names(args: Llama3Args) -> dict[str, str]:
    """Our parameter names to those of transformers' LlamaForCausalLM; a tied head has no name of its own."""
    names = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for i in range(args.n_layers):
        names |= {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in _LAYER_NAMES.items()}
    if not args.tied:
        names["output.weight"] = "lm_head.weight"
    return names


def vocabulary_parameters(args: Llama3Args) -> set[str]:
    """Names of the parameters with one row an id."""
    return {"tok_embeddings.weight"} | (set() if args.tied else {"output.weight"})


def materialize(model: Llama3, device: torch.device, seq_len: int, buffers: torch.device | None = None) -> None:
    """Give a model on the meta device memory on ``device`` (contents undefined) and its rotary tables.

    ``buffers`` is where these are, if the parameters are offloaded.
    """
    model.to_empty(device=device)
    model.tie()
    model.rotary.reset(seq_len, buffers or device)


@torch.no_grad()
def init_random(model: Weighted, seed: int) -> None:
    """Random weights: normal with standard deviation 1 / sqrt(width), the projections back into the residual stream
    smaller by sqrt(2 * layers), norms 1.

    At the width of the 1.3B that is 0.022. A fixed 0.02 makes the logits of small models start so flat that the debug
    model needs three times the steps to find out which quantizer comes next. A parameter's values depend on the seed
    and its name, not on the sharding.
    """
    for name, parameter in model.weights():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        std = model.args.dim**-0.5
        if name.endswith(("wo.weight", "w2.weight")):
            std /= math.sqrt(2 * model.args.n_layers)
        # Devices draw different random numbers: a small model comes from the CPU, so that it is the same on all.
        full = torch.empty(parameter.shape, device="cpu" if parameter.numel() <= _DRAWN_ON_CPU else parameter.device)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        full.normal_(0.0, std, generator=torch.Generator(full.device).manual_seed(int.from_bytes(digest[:7], "big")))
        if name in vocabulary_parameters(model.args):
            full[model.args.vocab_size :] = 0.0
        _fill(parameter, lambda region, full=full: full[region])


@torch.no_grad()
def load_hf(model: Weighted, folder: Path, base_vocab_size: int) -> None:
    """Read a Hugging Face checkpoint (safetensors) into the model's shards, as fp32 or whatever they are.

    Embedding rows from ``base_vocab_size`` on are new: each starts as the mean of the rows before (what transformers'
    ``resize_token_embeddings`` does, up to its tiny noise). Alignment rows are zero.

    Raises:
        UserError: a weight is missing, or has another shape than config.json says.
    """
    args = model.args
    names, vocabulary = hf_names(args), vocabulary_parameters(args)
    with SafetensorsFolder(folder) as files:
        for name, parameter in model.weights():
            shape = list(parameter.shape)
            stored = files.shape(names[name])
            if name in vocabulary:
                if stored[0] < base_vocab_size or stored[1:] != shape[1:]:
                    raise UserError(
                        f"{folder}: {names[name]} is {stored}, but the tokenizer has {base_vocab_size:,} ids and "
                        f"config.json a width of {args.dim}."
                    )
                known = min(base_vocab_size, args.vocab_size)
                mean = _row_mean(parameter, lambda rows, n=names[name]: files.read(n, (rows, slice(None))), known)
                _fill(parameter, lambda region, n=names[name], k=known, m=mean: _rows(files, n, region, k, args, m))
            elif stored != shape:
                raise UserError(f"{folder}: {names[name]} is {stored}, config.json says {shape}.")
            else:
                _fill(parameter, lambda region, n=names[name]: files.read(n, region))


def _rows(
    files: "SafetensorsFolder",
    name: str,
    region: tuple[slice, ...],
    known: int,
    args: Llama3Args,
    mean: torch.Tensor,
) -> torch.Tensor:
    """A region of a vocabulary parameter: known rows from the file, new ones their mean, alignment rows zero."""
    start, stop = region[0].start, region[0].stop
    columns = region[1]
    parts = []
    if start < known:
        parts.append(files.read(name, (slice(start, min(stop, known)), columns)).float())
    new = min(stop, args.vocab_size) - max(start, known)
    if new > 0:
        parts.append(mean[columns].expand(new, -1))
    padding = stop - max(start, args.vocab_size)
    if padding > 0:
        parts.append(torch.zeros(padding, mean[columns].shape[0]))
    return torch.cat(parts)


def _row_mean(
    parameter: torch.Tensor, read_rows: Callable[[slice], torch.Tensor], known: int, block: int = 8192
) -> torch.Tensor:
    """Mean [D] of the first ``known`` rows in fp64, the work shared by the ranks that hold the parameter."""
    mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
    rank, world = (0, 1) if mesh is None else (mesh.mesh.flatten().tolist().index(dist.get_rank()), mesh.size())
    total = torch.zeros(parameter.shape[1], dtype=torch.float64)
    for start in list(range(0, known, block))[rank::world]:
        total += read_rows(slice(start, min(start + block, known))).double().sum(dim=0)
    if mesh is not None:
        total = total.to(mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(total, group=mesh.get_group(dimension))
        total = total.cpu()
    return (total / known).float()


def _fill(parameter: torch.Tensor, read: Callable[[tuple[slice, ...]], torch.Tensor]) -> None:
    """Copy ``read(region)`` into the part of a parameter that this rank holds."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(read(tuple(slice(0, size) for size in parameter.shape)))
        return
    own = parameter.to_local()
    if own.numel():
        own.copy_(read(local_region(parameter)))


class SafetensorsFolder:
    """The tensors of a folder of safetensors files, read region by region.

    Raises:
        UserError: the folder has none, a file is damaged, or a name is asked for that no file holds.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with _open_safetensors(folder / "model.safetensors") as file:
                self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise UserError(f"{folder}: the folder holds no model.safetensors (nor an index of several).")
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError(f"{self.folder}: the weight {name} is missing.")
        path = self.folder / self._file_of[name]
        if path.name not in self._open:
            if not path.is_file():
                raise UserError(f"{path}: the file is missing.")
            self._open[path.name] = self._stack.enter_context(_open_safetensors(path))
        return self._open[path.name].get_slice(name)

    def shape(self, name: str) -> list[int]:
        return self._slice(name).get_shape()

    def read(self, name: str, region: tuple[slice, ...]) -> torch.Tensor:
        return self._slice(name)[region]


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: the file is damaged or cut off ({error}).") from None


def to_hf_tensors(
    args: Llama3Args, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Full parameters under our names to (Hugging Face name, tensor) pairs without the alignment rows."""
    vocabulary = vocabulary_parameters(args)
    for ours, theirs in hf_names(args).items():
        tensor = state[ours]
        if ours in vocabulary:
            tensor = tensor[: args.vocab_size]
        yield theirs, tensor.to(dtype).contiguous()
