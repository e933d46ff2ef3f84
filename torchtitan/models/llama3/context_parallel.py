"""Context parallelism: the ranks of a group split each row among themselves, and meet in attention.

A row is cut into 2 * N parts; rank r of N holds parts r and 2 * N - 1 - r, so that under a causal mask all have the
same work. Everything but attention works on a rank's own positions. Attention works in one of two ways, with the same
result:

- ``allgather``: every rank gathers the keys and values of the whole row, and attends from its own positions. Works
  for any number of heads. What a part cannot see, because it comes later, is not computed.
- ``alltoall``: ranks exchange positions for heads (DeepSpeed-Ulysses, arXiv 2309.14509): each attends over whole rows
  with its share of the heads, with the same kernels as without context parallelism, and sends the results back.
  N must divide the number of key and value heads.

Both work on gloo and nccl and keep to the documents of packed rows.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from torchtitan.distributed.collectives import all_gather, exchange, gather
from torchtitan.models.llama3.attention import Documents, attend, document_mask


class ContextParallel:
    """The group in which rows are split, this rank's positions, and attention across the group.

    Args:
        group: the ranks that share rows.
        method: how keys and values meet, see above.
    """

    def __init__(self, group: dist.ProcessGroup, method: Literal["allgather", "alltoall"]):
        self.group, self.method = group, method
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def shard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's positions of a tensor of whole rows, whose length along ``dim`` is a multiple of 2 * N."""
        parts = x.chunk(2 * self.size, dim=dim)
        return torch.cat((parts[self.rank], parts[2 * self.size - 1 - self.rank]), dim=dim)

    def unshard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Whole rows from the positions of all ranks, without gradients; called by all of the group."""
        return self._in_order(all_gather(x, dim, self.group), dim)

    def _in_order(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """From parts 0, 2N - 1, 1, 2N - 2, ... (rank by rank) to parts 0, 1, 2, ..."""
        parts = x.chunk(2 * self.size, dim=dim)
        return torch.cat((*parts[::2], *reversed(parts[1::2])), dim=dim)

    def _by_rank(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The reverse of :meth:`_in_order`."""
        parts = x.chunk(2 * self.size, dim=dim)
        pairs = [(parts[r], parts[2 * self.size - 1 - r]) for r in range(self.size)]
        return torch.cat([part for pair in pairs for part in pair], dim=dim)

    def documents(self, positions: torch.Tensor, *_: Any) -> Documents:
        """The documents of whole rows [B, S] as a mask [B, 1, S / N, S] of the keys that the own queries see.

        For the method ``allgather``, in the place of attention.find_documents.
        """
        starts = positions == 0
        starts[:, 0] = True
        return Documents(mask=self.shard(document_mask(starts), dim=2))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        """Causal attention of the own positions q, k, v [B, heads, S / N, head_dim] over whole rows; like q."""
        if self.method == "alltoall":
            q, k, v = (self._in_order(exchange(x, 1, 2, self.group), dim=2) for x in (q, k, v))
            return exchange(self._by_rank(attend(q, k, v, documents), dim=2), 2, 1, self.group)
        # One collective for keys and values together.
        k, v = self._in_order(gather(torch.cat((k, v.to(k.dtype)), dim=-1), 2, self.group), 2).chunk(2, dim=-1)
        length = q.shape[2] // 2  # of one of the two parts
        masks = None if documents is None else documents.mask
        grouped = q.shape[1] != k.shape[1]
        out = []
        for number, own in zip((self.rank, 2 * self.size - 1 - self.rank), q.split(length, dim=2), strict=True):
            stop = (number + 1) * length
            if masks is None:
                mask = torch.ones(length, stop, dtype=torch.bool, device=q.device).tril(diagonal=stop - length)
            else:
                mask = masks.split(length, dim=2)[len(out)][..., :stop]
            keys, values = k[:, :, :stop], v[:, :, :stop].to(own.dtype)
            out.append(F.scaled_dot_product_attention(own, keys, values, attn_mask=mask, enable_gqa=grouped))
        return torch.cat(out, dim=2)
