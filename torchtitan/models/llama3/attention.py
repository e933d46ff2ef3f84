"""Attention within the documents of packed rows: each id sees the earlier ids of its own document, and no other.

There are three ways to the same result. :func:`find_documents` chooses one in each forward pass:

- 16-bit on CUDA: one call of the variable-length flash kernel over the flattened rows.
- CPU: one causal call a document. Nothing outside the documents is computed: with four documents a row this takes a
  third of the time of a mask, with eleven less than a tenth.
- Else (fp32 on CUDA, older GPUs, and compiled blocks on CPU, where lengths as Python numbers would mean a new graph for
  every batch): a mask.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F


class Documents(NamedTuple):
    """Where the documents of rows [B, S] are. Exactly one field is set: the one that the attention at hand needs.

    A tuple, because activation checkpointing and FSDP look for tensors only in containers that they know.

    Attributes:
        lengths: length of each document, in order, over all rows one after the other; they add up to B * S.
        offsets: int32 [N + 1], where each document begins in the flattened rows; the last ones are B * S.
        mask: bool [B, 1, S, S], true where the query (third dimension) sees the key (fourth).
    """

    lengths: tuple[int, ...] | None = None
    offsets: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def find_documents(
    positions: torch.Tensor,
    dtype: torch.dtype,
    head_dim: int,
    compiled: bool = False,
    num_documents: int | None = None,
) -> Documents:
    """The documents of ``positions`` [B, S], as they suit the device.

    Args:
        positions: position of each id within its document; 0 begins a document.
        dtype: what attention is computed in.
        head_dim: width of a head.
        compiled: the blocks are compiled, with fixed shapes.
        num_documents: how many there are, or a few more; without it the CPU waits for a GPU that counts them.
    """
    starts = positions == 0
    starts[:, 0] = True  # No document goes on from row to row.
    if _flash_fits(positions.device, dtype, head_dim):
        _settle_grouping(positions.device, dtype, head_dim)
        return Documents(offsets=document_offsets(starts, num_documents))
    if positions.device.type == "cpu" and not compiled:
        return Documents(lengths=document_lengths(starts))
    return Documents(mask=document_mask(starts))


def _flash_fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def document_lengths(starts: torch.Tensor) -> tuple[int, ...]:
    """Lengths of the documents that begin where ``starts`` [B, S] is true."""
    begins = starts.flatten().nonzero()[:, 0]
    return tuple(begins.diff(append=begins.new_tensor([starts.numel()])).tolist())


def document_offsets(starts: torch.Tensor, num_documents: int | None = None) -> torch.Tensor:
    """Where the documents of ``starts`` [B, S] begin in the flattened rows: int32 [N + 1], the end of the rows last.

    N is the number of documents rounded up to a power of two, filled with documents of no ids, so that compiled blocks
    meet only a few shapes. A bound on the number instead of the number itself would be far too high, or wrong for short
    documents; and the kernel starts threads, and allocates in its backward pass, for every document of every layer,
    empty ones too.
    """
    count = int(starts.sum()) if num_documents is None else num_documents
    size = 1 << (count - 1).bit_length()
    begins = torch.nonzero_static(starts.flatten(), size=size + 1, fill_value=starts.numel())
    return begins[:, 0].to(torch.int32)


def document_mask(starts: torch.Tensor) -> torch.Tensor:
    """Which keys each query sees, [B, 1, S, S], with documents that begin where ``starts`` [B, S] is true."""
    number = starts.cumsum(dim=1)
    return (number[:, None, :, None] == number[:, None, None, :]).tril()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None) -> torch.Tensor:
    """Causal attention of q [B, heads, S, head_dim] to k and v [B, kv_heads, S, head_dim]; the result is like q.

    Without ``documents`` each row is one.
    """
    grouped = q.shape[1] != k.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if documents.mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=grouped)
    length = q.shape[2]
    # All rows one after the other, [B * S, heads, head_dim].
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    if documents.offsets is not None:
        out = _attend_flash(q, k, v, documents.offsets, length)
    else:
        assert documents.lengths is not None
        out = _attend_one_by_one(q, k, v, documents.lengths)
    return out.unflatten(0, (-1, length)).transpose(1, 2)


def _attend_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int
) -> torch.Tensor:
    # Imported late: in newer versions of torch this imports torch._dynamo, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {}
    if (groups := q.shape[1] // k.shape[1]) > 1:
        if _grouping == "named":
            more["enable_gqa"] = True
        elif _grouping == "repeated":
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), **more)
    return cast(torch.Tensor, out)  # A pair only when more is asked for.


# How the flash kernel gets keys and values that several heads of queries share: "named" by enable_gqa, "as they are"
# (torch 2.11 has no name for it), or "repeated" for each head, which costs the memory of as many heads as queries have.
# A variable of the module, since a compiled block cannot find out.
_grouping: str | None = None


def _settle_grouping(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Find out once, by trying."""
    global _grouping
    if _grouping is None:
        from torch.nn.attention.varlen import varlen_attn

        named = "enable_gqa" in (varlen_attn.__kwdefaults__ or {})
        _grouping = "named" if named else "as they are" if _takes_fewer_heads(device, dtype, head_dim) else "repeated"


@torch.enable_grad()
def _takes_fewer_heads(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel's results and gradients for fewer heads of keys and values are those for repeated ones."""
    from torch.nn.attention.varlen import varlen_attn

    length, heads, groups = 64, 2, 2
    offsets = torch.tensor([0, 24, length], dtype=torch.int32, device=device)
    # Not random numbers: those of the run must not depend on this.
    values = torch.arange(length * heads * groups * head_dim, dtype=torch.float32, device=device)
    q = values.view(length, heads * groups, head_dim).sin().to(dtype).requires_grad_()
    k, v = ((q.detach()[:, :heads] * factor).requires_grad_() for factor in (0.7, -1.3))
    found = []
    for repeats in (1, groups):
        keys, values = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k, v))
        try:
            out: Any = varlen_attn(q, keys, values, offsets, offsets, length, length, window_size=(-1, 0))
            found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        except (RuntimeError, ValueError):
            return False
    return all(torch.allclose(x.float(), y.float(), rtol=0.05, atol=0.05) for x, y in zip(*found, strict=True))


def _attend_one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    # Split once, not sliced a document: the gradient of a slice is as large as the whole.
    documents = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
    out = [F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=grouped) for document in documents]
    return torch.cat(out, dim=2)[0].transpose(0, 1)
