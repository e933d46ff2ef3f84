"""Negative log-likelihoods of id sequences under a transformers causal language model.

Sequences are sorted by length and right-padded into batches. Attention is causal, so what stands to the right of a
sequence changes nothing in it and no mask is needed. Only the hidden states of real targets go through the output head,
a block of :data:`LOGITS_BLOCK` at a time: with 136,450 columns the fp32 logits of a batch would not fit into memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torchtitan.eval.store import ArrayStore, digest
from torchtitan.tools.errors import UserError

LOGITS_BLOCK = 512
CPU_COLUMNS = 8192


@torch.inference_mode()
def score(
    model: Any,
    sequences: Sequence[torch.Tensor],
    batch_size: int = 16,
    on_progress: Callable[[int], Any] | None = None,
    store: ArrayStore | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[torch.Tensor | None]:
    """The negative log-likelihood of every id after a sequence's first.

    Equal sequences are computed once and get the same bits, so equal clips tie exactly, whatever batch they are in.

    Args:
        model: a transformers causal language model whose logits are its output embedding applied to its hidden states.
        sequences: int64 ids [L], L >= 2.
        batch_size: sequences in one forward pass. It changes the results by rounding only (1e-5 in fp32).
        on_progress: called with the number of sequences done since the last call.
        store: holds results of an earlier call, which are not computed again, and takes the new ones.
        share: this rank's number and the number of ranks. Each has the batches that are its turn.

    Returns:
        for each sequence, in the given order, float32 [L - 1] on the CPU, in nats; None for those of other ranks.

    Raises:
        UserError: the model computes its logits in another way, by scaling or capping them.
    """
    places: dict[bytes, list[int]] = {}  # equal sequences, by content
    for i, ids in enumerate(sequences):
        places.setdefault(digest(ids.numpy().tobytes()), []).append(i)
    order = sorted(places, key=lambda key: (-len(sequences[places[key][0]]), places[key][0]))
    scores: dict[int, torch.Tensor] = {}

    def take(key: bytes, nll: torch.Tensor) -> None:
        scores.update((i, nll) for i in places[key])
        if on_progress is not None:
            on_progress(len(places[key]))

    # Which are a rank's own does not depend on what is stored, so ranks need not have read the same.
    rank, ranks = share
    missing = []
    for number, key in enumerate(order):
        if number // batch_size % ranks != rank:
            continue
        if store is not None and (found := store.get(key)) is not None:
            take(key, torch.from_numpy(found[0].copy()))
        else:
            missing.append(key)
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        ids = [sequences[places[key][0]] for key in batch]
        if start == 0:
            _require_plain_head(model, ids[0][:8])
        for key, nll in zip(batch, _score_batch(model, ids), strict=True):
            if store is not None:
                store.put(key, nll.numpy())
            take(key, nll)
    return [scores.get(i) for i in range(len(sequences))]


def _score_batch(model: Any, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    device = model.get_input_embeddings().weight.device
    lengths = [len(ids) - 1 for ids in sequences]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)  # 0 is an id like any other
    valid = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    hidden = model.base_model(input_ids=padded[:, :-1], use_cache=False).last_hidden_state[valid]  # [targets, D]
    targets = padded[:, 1:][valid]
    head = model.get_output_embeddings()
    blocks = zip(hidden.split(LOGITS_BLOCK), targets.split(LOGITS_BLOCK), strict=True)
    nll = torch.cat([_block_nll(rows, head.weight, head.bias, ids) for rows, ids in blocks])
    return list(nll.cpu().split(lengths))


def _block_nll(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The negative log-likelihoods, fp32 [N], of targets [N] after hidden states [N, D], under a head [V, D].

    On a CPU the columns are taken some at a time, so that their logits stay in its caches.
    """
    width = CPU_COLUMNS if hidden.device.type == "cpu" else weight.shape[0]
    total = torch.full(targets.shape, -math.inf, device=hidden.device)
    picked = torch.zeros_like(total)
    for first in range(0, weight.shape[0], width):
        columns = slice(first, first + width)
        logits = F.linear(hidden, weight[columns], None if bias is None else bias[columns]).float()
        total = torch.logaddexp(total, logits.logsumexp(dim=1))
        own = targets - first
        here = (own >= 0) & (own < logits.shape[1])
        picked = torch.where(here, logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], picked)
    return total - picked


def _require_plain_head(model: Any, ids: torch.Tensor) -> None:
    ids = ids[None].to(model.get_input_embeddings().weight.device)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    found = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise UserError(
            f"The model ({type(model).__name__}) does more to its logits than apply its output embedding; "
            "the evaluations can score a plain head only."
        )
