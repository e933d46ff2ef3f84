"""Packed rows: each document has the losses and gradients that it has in a row of its own, in every way to attend.

The two ranks of the FSDP test are processes of this very file, as in test_distributed.py.
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.models.llama3 import attention
from torchtitan.models.llama3.activation_checkpoint import checkpoint_activations
from torchtitan.models.llama3.args import Llama3Args, read_config
from torchtitan.models.llama3.attention import (
    Documents,
    document_lengths,
    document_mask,
    document_offsets,
    find_documents,
)
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.parallelize import compile_blocks, shard
from torchtitan.models.llama3.weights import init_random, load_hf, materialize
from torchtitan.models.loss import IGNORE_INDEX

CPU = torch.device("cpu")
ROW = 64
LENGTHS = (23, 40, 7, 31, 1, 18, 2, 64, 12)  # one fills its row, one has no target, and rows end in padding
KINDS = ["tied", "untied", "llama3-rope", "ungrouped"]
WAYS = ["lengths", "mask", "flash", "flash of torch 2.11", "flash of torch 2.11 that refuses groups"]

Rows = list[list[int]]  # the samples of each row


# --- models


def randomly(args: Llama3Args, mesh=None) -> Llama3:
    with torch.device("meta"):
        model = Llama3(args)
    if mesh is not None:
        checkpoint_activations(model, ActivationCheckpoint("full"))
        shard(model, mesh, torch.float32, torch.float32)
    materialize(model, CPU, ROW)
    init_random(model, 0)
    return model.train()


def small(n_kv_heads: int = 2, mesh=None) -> Llama3:
    """A model with random weights."""
    return randomly(Llama3Args(272, 48, 2, 4, n_kv_heads, head_dim=16, hidden_dim=96, tied=False), mesh)


@pytest.fixture
def make_model(make_base_model):
    """A function that makes a model of one kind; the embedding has 272 rows."""

    def make(kind: str = "tied") -> Llama3:
        if kind == "ungrouped":
            return small(n_kv_heads=4)
        folder = make_base_model(tied=kind != "untied", scaled=kind == "llama3-rope")
        model = randomly(Llama3Args.from_hf(read_config(folder)))
        load_hf(model, folder, 272)
        return model

    return make


def one_document_after_the_other(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q, cu_seq_k, max_q: int, max_k: int, window_size
) -> torch.Tensor:
    """What the flash kernel computes, from its description, for as many heads of keys as of queries."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    offsets = cu_seq_q.tolist()
    assert offsets[0] == 0 and offsets[-1] == len(query) == len(key) == len(value)
    assert window_size == (-1, 0)
    assert query.dtype == key.dtype == value.dtype
    out = torch.empty_like(query)
    for begin, end in pairwise(offsets):
        assert 0 <= end - begin <= max_q == max_k
        q, k, v = (x[begin:end].transpose(0, 1).float() for x in (query, key, value))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        out[begin:end] = (scores.softmax(dim=-1) @ v).transpose(0, 1).to(out.dtype)
    return out


def flash(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (query.shape != key.shape)
    return old_flash(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)


def refusing_flash(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    if query.shape != key.shape:
        raise RuntimeError("as many heads of keys as of queries are needed")
    return old_flash(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)


def old_flash(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """The kernel of torch 2.11 takes fewer heads of keys without being told so."""
    groups = query.shape[1] // key.shape[1]
    assert scale is None and query.shape[1] == groups * key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return one_document_after_the_other(query, key, value, cu_q, cu_k, max_q, max_k, window_size)


@pytest.fixture
def attend_by(monkeypatch):
    """A function that makes a model attend in one of WAYS; the flash kernel, which needs a GPU, is stood in for."""

    def choose(model: Llama3, way: str) -> Llama3:
        model.compiled = way == "mask"
        if way.startswith("flash"):
            import torch.nn.attention.varlen as varlen

            kernel = {WAYS[2]: flash, WAYS[3]: old_flash, WAYS[4]: refusing_flash}[way]
            monkeypatch.setattr(varlen, "varlen_attn", kernel)
            monkeypatch.setattr(attention, "_grouping", None)
            monkeypatch.setattr(attention, "_flash_fits", lambda *_: True)
        used = []

        def find(*arguments: Any) -> Documents:
            documents = find_documents(*arguments)
            used.append(next(name for name, value in documents._asdict().items() if value is not None))
            assert used[-1] == {"lengths": "lengths", "mask": "mask"}.get(way, "offsets")
            return documents

        monkeypatch.setattr(model, "find_documents", find)
        return model

    return choose


# --- rows


def make_samples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (length,), generator=random) for length in lengths]


def best_fit(samples: list[torch.Tensor]) -> Rows:
    """The longest first, each into the fullest row that has room for it."""
    rows: Rows = []
    for i in sorted(range(len(samples)), key=lambda i: -samples[i].numel()):
        room = [ROW - sum(samples[j].numel() for j in row) for row in rows]
        fitting = [r for r, free in enumerate(room) if free >= samples[i].numel()]
        if fitting:
            rows[min(fitting, key=room.__getitem__)].append(i)
        else:
            rows.append([i])
    assert any(len(row) > 2 for row in rows)
    return rows


def other_order(samples: list[torch.Tensor]) -> Rows:
    return [row[::-1] for row in best_fit(samples)[::-1]]


def pack(samples: list[torch.Tensor], rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets and positions [B, ROW]; padding is the last document of its row."""
    tokens, positions = torch.zeros(2, len(rows), ROW, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for r, row in enumerate(rows):
        at = 0
        for sample in (samples[i] for i in row):
            end = at + sample.numel()
            tokens[r, at:end], positions[r, at:end] = sample, torch.arange(sample.numel())
            targets[r, at : end - 1] = sample[1:]
            at = end
        positions[r, at:] = torch.arange(ROW - at)
    return tokens, targets, positions


def unpack(values: torch.Tensor, samples: list[torch.Tensor], rows: Rows) -> list[torch.Tensor]:
    """The part of each sample, in the order of the samples, of what the model gave for packed rows."""
    parts = {}
    for r, row in enumerate(rows):
        lengths = [samples[i].numel() for i in row]
        parts.update(zip(row, values[r, : sum(lengths)].split(lengths), strict=True))
    return [parts[i] for i in range(len(samples))]


def alone(model: Llama3, samples: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the losses of samples in rows of their own, without positions."""
    targets = [torch.cat((sample[1:], torch.tensor([IGNORE_INDEX]))) for sample in samples]
    return sum((model(s[None], t[None]) for s, t in zip(samples, targets, strict=True)), torch.zeros(()))


def gradients(model: Llama3, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Differences of at most ``tolerance``, relative to the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


# --- packed equals unpacked


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_rows_of_their_own(make_model, attend_by, kind, way):
    model, samples = attend_by(make_model(kind), way), make_samples()
    loss = alone(model, samples)
    expected = gradients(model, loss)
    for rows in (best_fit(samples), other_order(samples)):
        packed = model(*pack(samples, rows))
        assert packed.item() == pytest.approx(loss.item(), rel=1e-5)
        assert_close(gradients(model, packed), expected)


@pytest.mark.parametrize("way", WAYS)
def test_each_target_has_its_loss_in_evaluation(make_model, attend_by, way):
    model, samples = attend_by(make_model(), way).eval(), make_samples()
    expected = [F.cross_entropy(model(s[None])[0, :-1], s[1:], reduction="none") for s in samples]
    for rows in (best_fit(samples), other_order(samples)):
        found = unpack(model(*pack(samples, rows)), samples, rows)
        for losses, wanted in zip(found, expected, strict=True):
            assert torch.allclose(losses[:-1], wanted, rtol=1e-5, atol=1e-5)
            assert losses[-1] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["tied", "llama3-rope"])
def test_logits_equal_transformers_on_each_document(make_base_model, make_model, attend_by, kind, way):
    from transformers import AutoModelForCausalLM

    folder = make_base_model(scaled=kind == "llama3-rope")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, samples = attend_by(make_model(kind), way), make_samples()
    rows = best_fit(samples)
    tokens, _, positions = pack(samples, rows)
    with torch.no_grad():
        for found, sample in zip(unpack(model(tokens, positions=positions), samples, rows), samples, strict=True):
            assert (found - reference(sample[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_neighbours_do_not_matter_at_all(make_model, attend_by, way):
    model, samples, others = attend_by(make_model(), way).eval(), make_samples(), make_samples(seed=1)
    rows = best_fit(samples)
    losses = unpack(model(*pack(samples, rows)), samples, rows)
    for i in range(len(samples)):
        changed = [samples[j] if j == i else others[j] for j in range(len(samples))]
        assert torch.equal(unpack(model(*pack(changed, rows)), samples, rows)[i], losses[i])


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_document_are_those_without_positions(make_model, attend_by, way):
    model, (tokens, targets, _) = attend_by(make_model(), way), pack(make_samples(), [[7], [1]])
    loss = model(tokens, targets)
    packed = model(tokens, targets, torch.arange(ROW).expand(2, ROW))
    assert packed.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_close(gradients(model, packed), gradients(model, loss))


@pytest.mark.parametrize("way", WAYS)
def test_rotary_positions_begin_anew_with_each_document(make_model, attend_by, way):
    """Seen in the tables, since the rotary embedding is relative: in fp32 a shift of a document hardly shows."""
    model, samples, seen = attend_by(make_model(), way), make_samples(), []
    for layer in model.layers.values():
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1:3]))
    tokens, _, positions = pack(samples, best_fit(samples))
    model(tokens, positions=positions)
    assert len(seen) == 2
    for cos, sin in seen:
        for row in range(len(tokens)):
            for column in range(ROW):
                assert torch.equal(cos[row, 0, column], model.rotary.cos[positions[row, column]])
                assert torch.equal(sin[row, 0, column], model.rotary.sin[positions[row, column]])


@pytest.mark.parametrize(
    ("kernel", "grouping"), [(flash, "named"), (old_flash, "as they are"), (refusing_flash, "repeated")]
)
def test_how_the_kernel_gets_grouped_heads_is_found_out_by_trying(monkeypatch, kernel, grouping):
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_grouping", None)
    attention._settle_grouping(CPU, torch.bfloat16, 16)
    assert attention._grouping == grouping


def test_a_kernel_that_mistakes_grouped_heads_gets_repeated_ones(monkeypatch):
    import torch.nn.attention.varlen as varlen

    def mistaken(query, key, value, *more, **named):
        """Heads of keys are taken in turn, not each for neighbouring heads of queries."""
        groups = query.shape[1] // key.shape[1]
        return old_flash(query, key.repeat(1, groups, 1), value.repeat(1, groups, 1), *more, **named)

    monkeypatch.setattr(varlen, "varlen_attn", mistaken)
    assert not attention._takes_fewer_heads(CPU, torch.bfloat16, 16)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_close(make_model, attend_by, way):
    model, samples = attend_by(make_model(), way), make_samples()
    exact = alone(model, samples)
    wanted = gradients(model, exact)
    model.bfloat16()
    unpacked, packed = alone(model, samples), model(*pack(samples, best_fit(samples)))
    assert packed.item() != exact.item()
    assert packed.item() == pytest.approx(exact.item(), rel=0.01)
    wanted, usual, found = (
        torch.cat([gradient.flatten().float() for gradient in each.values()])
        for each in (wanted, gradients(model, unpacked), gradients(model, packed))
    )
    # Each way adds up in another order, so rounding differs; it takes the gradients about as far as without packing.
    assert (found - wanted).norm() < 2 * (usual - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpointing_gives_the_same_gradients(make_model, attend_by, way):
    plain, recomputed, samples = make_model(), make_model(), make_samples()
    checkpoint_activations(recomputed, ActivationCheckpoint("full"))
    found = []
    for model in (plain, recomputed):
        attend_by(model, way)
        found.append(gradients(model, model(*pack(samples, best_fit(samples)))))
    assert_close(*found, tolerance=0.0)


@pytest.mark.slow  # up to a minute of compiling
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_compute_the_same_in_one_graph(make_model, checkpointed):
    plain, compiled, samples = make_model(), make_model(), make_samples()
    if checkpointed:
        checkpoint_activations(compiled, ActivationCheckpoint("full"))
    compile_blocks(compiled)
    tokens, targets, _ = pack(samples, [[7], [1]])
    assert_close(gradients(compiled, compiled(tokens, targets)), gradients(plain, plain(tokens, targets)))
    for number, rows in enumerate((best_fit(samples), other_order(samples))):
        # From the second batch on, no new graph is made.
        batch = pack(samples, rows)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            assert_close(gradients(compiled, compiled(*batch)), gradients(plain, plain(*batch)))


# --- where the documents are


@pytest.fixture
def starts():
    """Three rows of documents, and the flat places where they begin: 5 of them, then 1, then 8 of one id."""
    positions = torch.zeros(3, 8, dtype=torch.int64)
    positions[0] = torch.tensor([0, 1, 0, 0, 1, 2, 0, 0])
    positions[1] = torch.arange(8)
    return positions == 0, [0, 2, 3, 6, 7, 8, *range(16, 24)]


def test_documents_by_length(starts):
    where, begins = starts
    expected = [end - begin for begin, end in zip(begins, [*begins[1:], 24], strict=True)]
    assert document_lengths(where) == tuple(expected)


def test_documents_by_offset_are_filled_up_to_a_power_of_two(starts):
    where, begins = starts
    offsets = document_offsets(where)
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == begins + [24] * (1 + 16 - len(begins))
    assert torch.equal(document_offsets(where, len(begins)), offsets)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_last_offset_is_the_end(count):
    where = torch.arange(8)[None] < count
    size = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8}[count]
    assert document_offsets(where).tolist() == [*range(count)] + [8] * (1 + size - count)


def test_documents_by_mask(starts):
    where, _ = starts
    mask = document_mask(where)
    assert mask.shape == (3, 1, 8, 8) and mask.dtype == torch.bool
    for row in range(3):
        for query in range(8):
            for key in range(8):
                seen = key <= query and not where[row, key + 1 : query + 1].any()
                assert mask[row, 0, query, key] == seen


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_apart_though_no_document_begins_there(compiled):
    positions = torch.arange(16).view(2, 8)
    found = find_documents(positions, torch.float32, 16, compiled)
    expected = find_documents(torch.arange(8).expand(2, 8), torch.float32, 16, compiled)
    assert torch.equal(found.mask, expected.mask) if compiled else found.lengths == expected.lengths == (8, 8)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "fits"),
    [
        ("cuda", torch.bfloat16, 64, (9, 0), True),
        ("cuda", torch.float16, 128, (8, 0), True),
        ("cuda", torch.float32, 64, (9, 0), False),
        ("cuda", torch.float16, 64, (7, 5), False),
        ("cuda", torch.bfloat16, 20, (9, 0), False),
        ("cuda", torch.bfloat16, 512, (9, 0), False),
        ("cpu", torch.bfloat16, 64, (9, 0), False),
    ],
)
def test_flash_is_for_16_bit_on_newer_gpus(monkeypatch, device, dtype, head_dim, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert attention._flash_fits(torch.device(device), dtype, head_dim) == fits


def test_flash_is_called_as_this_torch_declares_it():
    """The stand-ins take the arguments that torch's own function has."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    parameters = list(inspect.signature(varlen_attn).parameters.values())
    assert [p.name for p in parameters[:7]] == "query key value cu_seq_q cu_seq_k max_q max_k".split()
    options = {p.name for p in parameters[7:] if p.kind == p.KEYWORD_ONLY}
    stand_in = flash if "enable_gqa" in options else old_flash
    assert set(stand_in.__kwdefaults__) <= options


# --- two ranks


def sharded_step(rows: slice, compiled: bool, mesh=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of some of the rows, and the gradients over the rows of all ranks."""
    model, samples = small(mesh=mesh), make_samples()
    model.compiled = compiled
    loss = model(*(x[rows] for x in pack(samples, best_fit(samples))))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), {name: g.full_tensor() if mesh is not None else g for name, g in found.items()}


def run_rank(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    rows = slice(0, 2) if rank == 0 else slice(2, None)
    results = []
    for compiled in (False, True):
        loss, found = sharded_step(rows, compiled, mesh)
        dist.all_reduce(loss)
        results.append((loss, found))
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_does(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
    loss, expected = sharded_step(slice(None), False)
    for found_loss, found in torch.load(tmp_path / "results.pt"):
        assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert_close(found, expected)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
