"""Negative log-likelihoods of token sequences under a causal language model of transformers.

Sequences are sorted by length and padded on the right into batches. Attention is causal, so padding needs no mask. Two
sequences with a common beginning, such as the two sides of many pairs, share a row that contains the beginning once.
Only the hidden states of real targets go through the output head, in blocks of :data:`LOGITS_BLOCK`: with 136,450
columns, the fp32 logits of a batch would not fit into memory.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from torchtitan.eval.store import ArrayStore, digest
from torchtitan.tools.errors import UserError

LOGITS_BLOCK = 512
CPU_COLUMNS = 8192
# Two sequences share a row if their common beginning is at least this share of both lengths together.
SHARED = 0.125


@torch.inference_mode()
def score(
    model: Any,
    sequences: Sequence[torch.Tensor],
    batch_size: int = 16,
    on_progress: Callable[[int], Any] | None = None,
    store: ArrayStore | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[torch.Tensor | None]:
    """The negative log-likelihood of every token of a sequence after the first.

    Equal sequences are computed once, so equal clips have exactly equal scores.

    Args:
        model: a causal language model of transformers. Its logits must be its output head applied to its hidden states.
        sequences: int64 ids [L], L >= 2.
        batch_size: sequences in one forward pass. It changes the results only by rounding (1e-5 in fp32).
        on_progress: called with the number of sequences done since the last call.
        store: results of an earlier call, which are not computed again; new results are added.
        share: this rank's number and the number of ranks, which take the batches in turn.

    Returns:
        for each sequence, in the given order, float32 [L - 1] on the CPU, in nats; None for sequences of other ranks.

    Raises:
        UserError: the model changes its logits after the output head, for example by scaling or capping them.
    """
    places: dict[bytes, list[int]] = {}  # equal sequences, by content
    for i, ids in enumerate(sequences):
        places.setdefault(digest(ids.numpy().tobytes()), []).append(i)
    sequences_of = {key: sequences[found[0]] for key, found in places.items()}
    order = sorted(places, key=lambda key: (-len(sequences_of[key]), places[key][0]))
    scores: dict[int, torch.Tensor] = {}

    def take(key: bytes, nll: torch.Tensor) -> None:
        scores.update((i, nll) for i in places[key])
        if on_progress is not None:
            on_progress(len(places[key]))

    # The batches of a rank do not depend on the store, so the ranks may have read different stores.
    rank, ranks = share
    checked = False
    for batch in _batches(order, sequences_of, batch_size, _may_share(model))[rank::ranks]:
        rows = []
        for row in batch:
            missing = []
            for key in row:
                if store is not None and (found := store.get(key)) is not None:
                    take(key, torch.from_numpy(found[0].copy()))
                else:
                    missing.append(key)
            if missing:
                rows.append(tuple(missing))
        if not rows:
            continue
        if not checked:
            _require_plain_head(model, sequences_of[rows[0][0]][:8])
            checked = True
        nlls = _score_batch(model, [tuple(sequences_of[key] for key in row) for row in rows])
        for key, nll in zip((key for row in rows for key in row), nlls, strict=True):
            if store is not None:
                store.put(key, nll.numpy())
            take(key, nll)
    return [scores.get(i) for i in range(len(sequences))]


def _may_share(model: Any) -> bool:
    """Whether two sequences can share a row: the model must take its attention from the mask alone."""
    config = model.config
    return config.model_type == "llama" and config._attn_implementation in ("sdpa", "eager")


def _batches(
    order: Sequence[bytes], sequences: dict[bytes, torch.Tensor], batch_size: int, share: bool
) -> list[list[tuple[bytes, ...]]]:
    """Batches of rows with one sequence, or with two that share a beginning. The latter and longer ones come first."""
    pairs = _alike(order, sequences) if share and batch_size > 1 else []
    paired = {key for pair in pairs for key in pair}
    place = {key: number for number, key in enumerate(order)}
    pairs.sort(key=lambda pair: (-sum(len(sequences[key]) for key in pair), place[pair[0]]))
    batches: list[list[tuple[bytes, ...]]] = []
    half = max(1, batch_size // 2)
    batches.extend([*pairs[start : start + half]] for start in range(0, len(pairs), half))
    single = [key for key in order if key not in paired]
    batches.extend([(key,) for key in single[i : i + batch_size]] for i in range(0, len(single), batch_size))
    return batches


def _alike(order: Sequence[bytes], sequences: dict[bytes, torch.Tensor]) -> list[tuple[bytes, bytes]]:
    """Pairs of sequences with a long common beginning. Each sequence is in at most one pair.

    Sequences with a common beginning are neighbours in lexicographic order. Pairs with the longest beginnings go first.
    """
    in_order = sorted(order, key=lambda key: sequences[key].numpy().astype(">u4").tobytes())
    found = []
    for i, (one, other) in enumerate(pairwise(in_order)):
        first, second = sequences[one], sequences[other]
        common = _common_inputs(first, second)
        if common >= SHARED * (len(first) + len(second)):
            found.append((-common, i, one, other))
    taken: set[bytes] = set()
    pairs = []
    for _, _, one, other in sorted(found):
        if not taken & {one, other}:
            taken |= {one, other}
            pairs.append((one, other))
    return pairs


def _common_inputs(first: torch.Tensor, second: torch.Tensor) -> int:
    """The number of leading inputs that two sequences share, together with their targets."""
    length = min(len(first), len(second))
    differ = (first[:length] != second[:length]).nonzero()
    return max(0, (int(differ[0]) if len(differ) else length) - 1)


def _score_batch(model: Any, rows: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """The NLLs of the sequences in the rows, one after the other.

    A row of two sequences is first[:-1], second[common:-1], so it contains their common beginning once. The tokens of
    the second one keep the positions of their own sequence, and do not attend to the rest of the first one.
    """
    device = model.get_input_embeddings().weight.device
    common = [_common_inputs(*row) if len(row) > 1 else 0 for row in rows]
    joined = [
        torch.cat([row[0][:-1], *(other[n:-1] for other in row[1:])]) for row, n in zip(rows, common, strict=True)
    ]
    targets = torch.cat(
        [part for row, n in zip(rows, common, strict=True) for part in (row[0][1:], *(o[n + 1 :] for o in row[1:]))]
    ).to(device)
    lengths = [len(ids) for ids in joined]
    padded = torch.nn.utils.rnn.pad_sequence(joined, batch_first=True).to(device)  # padding with id 0
    valid = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    inputs: dict[str, Any] = {"input_ids": padded, "use_cache": False}
    if any(len(row) > 1 for row in rows):
        positions = torch.arange(max(lengths)).repeat(len(rows), 1)
        seen = torch.ones(len(rows), max(lengths), max(lengths), dtype=torch.bool).tril()
        for i, (row, n) in enumerate(zip(rows, common, strict=True)):
            if len(row) > 1:
                second = len(row[0]) - 1
                positions[i, second:] -= second - n
                seen[i, second:, n:second] = False
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        inputs |= {"position_ids": positions.to(device), "attention_mask": mask[:, None].to(device)}
    hidden = model.base_model(**inputs).last_hidden_state[valid]  # [targets, D]
    head = model.get_output_embeddings()
    blocks = zip(hidden.split(LOGITS_BLOCK), targets.split(LOGITS_BLOCK), strict=True)
    nll = torch.cat([_block_nll(block, head.weight, head.bias, ids) for block, ids in blocks]).cpu()
    found = []
    for row, n, part in zip(rows, common, nll.split(lengths), strict=True):
        first = len(row[0]) - 1
        found.append(part[:first])
        if len(row) > 1:
            found.append(torch.cat((part[:n], part[first:])))
    return found


def _block_nll(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The negative log-likelihoods, fp32 [N], of targets [N] after hidden states [N, D], under a head [V, D].

    On a CPU the columns are computed in groups, so that their logits stay in the caches.
    """
    width = CPU_COLUMNS if hidden.device.type == "cpu" else weight.shape[0]
    top = torch.full(targets.shape, -math.inf, device=hidden.device)
    total, picked = torch.zeros_like(top), torch.zeros_like(top)
    for first in range(0, weight.shape[0], width):
        columns = slice(first, first + width)
        logits = F.linear(hidden, weight[columns], None if bias is None else bias[columns]).float()
        own = targets - first
        here = (own >= 0) & (own < logits.shape[1])
        picked = torch.where(here, logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], picked)
        # In place, since a new tensor of this size would cost more than the exponentials.
        higher = torch.maximum(top, logits.amax(dim=1))
        total = total * (top - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(dim=1)
        top = higher
    return top + total.log() - picked


def _require_plain_head(model: Any, ids: torch.Tensor) -> None:
    ids = ids[None].to(model.get_input_embeddings().weight.device)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    found = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise UserError(
            f"The model ({type(model).__name__}) changes its logits after its output head; the evaluations can only "
            "score a plain output head."
        )
