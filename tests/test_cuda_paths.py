"""What runs on a GPU only, run without one: tensors on CUDA that have a shape and a type but no values, and graphs.

torch's fake tensors refuse whatever would need a value on the host (``.item()``, ``nonzero``, an index by a mask), so
what they go through does not wait for the GPU; :class:`Watch` counts the copies that they would allow. The graphs of
torch.compile are counted with compilers that compile nothing.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as varlen
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MimiConfig, MimiModel

from torchtitan.audio.codec import ACTIVATION_BYTES, BATCH_SECONDS, FRAME_SIZE, FREE_MEMORY_SHARE, Codec, _State
from torchtitan.audio.streaming import StreamingDecoder
from torchtitan.audio.token_stream import TokenStream
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.checkpoint.speech_lm import SpeechLM
from torchtitan.components.gradients import FiniteGuard, clip_grad_norm
from torchtitan.generation import Engine, Request, Sampling
from torchtitan.generation import linear as linear_module
from torchtitan.generation.engine import Generation, _plan
from torchtitan.models import loss as loss_module
from torchtitan.models.llama3 import attention
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.attention import Documents
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.parallelize import compile_blocks
from torchtitan.models.llama3.pipeline import Pipeline
from torchtitan.models.llama3.weights import init_random, materialize
from torchtitan.models.loss import CHUNK_TOKENS, Columns, _ChunkedNLLSum, chunked_nll, chunked_nll_sum

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS, LENGTH, VOCAB, DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 272, 64, 2, 4, 2, 16
QUANTIZERS = 2
DTYPES = [torch.float32, torch.bfloat16]
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_}


# --- a GPU without values


class Watch(TorchDispatchMode):
    """Keeps count of what is computed, and of what is copied between the host and CUDA.

    Attributes:
        ops: how often each operation ran.
        results: operation, type and shape of each tensor that one gave.
        to_host, from_host: copies. What a GPU takes as one number, a 0-dimensional tensor of the host, is none.
    """

    def __init__(self):
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.results: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self.to_host = self.from_host = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # nothing computed, and torch asks all the time
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in given}
        copies = func.overloadpacket in COPIES
        if copies and devices == {"cpu"} and any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            # Fake tensors of one value know it, and would be copied to a GPU that there is not.
            dtype = next((x for x in leaves if isinstance(x, torch.dtype)), given[0].dtype)
            result: Any = torch.empty(given[0].shape, dtype=dtype, device="cuda")
        else:
            result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        places = {x.device.type for x in made}
        self.to_host += "cuda" in devices and "cpu" in places
        self.from_host += "cuda" in places and any(x.device.type == "cpu" and (copies or x.dim()) for x in given)
        name = str(func.overloadpacket)
        self.ops[name] += 1
        self.results += [(name, x.dtype, tuple(x.shape)) for x in made]
        return result

    @property
    def largest(self) -> int:
        """Numbers in the largest tensor."""
        return max(torch.Size(shape).numel() for _, _, shape in self.results)

    @property
    def copies(self) -> int:
        return self.to_host + self.from_host


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Within it tensors have no values, and may be on CUDA."""
    with FakeTensorMode():
        try:
            torch.empty(1, device="cuda")
        except (AssertionError, RuntimeError) as error:
            pytest.skip(f"this build of torch makes no tensors on CUDA without one ({error})")
        yield


@contextmanager
def gpu() -> Iterator[Watch]:
    """:func:`fake_gpu`, watched, which torch.compile does not take."""
    with fake_gpu(), Watch() as watch:
        yield watch


def on_cuda(module: Any, dtype: torch.dtype | None = None) -> Any:
    """The module, with parameters (in ``dtype``) and buffers of :func:`gpu` in place of its own."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old not in made:
                new = torch.empty(old.shape, dtype=dtype or old.dtype, device="cuda")
                made[old] = nn.Parameter(new, requires_grad=old.requires_grad)
            part._parameters[name] = None if old is None else made[old]
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device="cuda")
        if hasattr(part, "embed_sum"):
            part._embed = None
    return module


def assert_is(x: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    assert x.device.type == "cuda"
    assert x.dtype == dtype
    assert tuple(x.shape) == shape


def test_values_that_are_read_are_noticed():
    with gpu() as watch:
        x = torch.ones(3, device="cuda")
        total = torch.where(x > 0, x.exp(), 0.0).sum()
        assert watch.copies == 0 and watch.ops["aten.exp"] == 1
        for read in (total.item, total.tolist, lambda: bool(total > 0), lambda: torch.equal(x, x + 1)):
            with pytest.raises(DataDependentOutputException):
                read()
        for choose in (x.nonzero, x.unique, lambda: x[x > 0]):
            with pytest.raises(DynamicOutputShapeException):
                choose()
        x.cpu(), x.to("cpu", torch.float64), torch.empty(3).copy_(x)
        assert (watch.to_host, watch.from_host) == (3, 0)
        torch.ones(3).to("cuda"), torch.tensor([1, 2], device="cuda"), torch.tensor([], device="cuda"), x.copy_(x.cpu())
        assert (watch.to_host, watch.from_host) == (4, 4)


# --- the model


def make_args(tied: bool = False, n_layers: int = LAYERS) -> Llama3Args:
    return Llama3Args(VOCAB, DIM, n_layers, HEADS, KV_HEADS, HEAD_DIM, hidden_dim=96, tied=tied)


def make_llama(dtype: torch.dtype = torch.float32, tied: bool = False, n_layers: int = LAYERS) -> Llama3:
    """A model on the GPU of :func:`gpu`, in training mode, with rotary tables in fp32."""
    with torch.device("meta"):
        model = Llama3(make_args(tied, n_layers))
    on_cuda(model, dtype).rotary.reset(LENGTH, CUDA)
    return model.train()


def make_ids(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_computes_without_a_value(dtype, tied):
    with gpu() as watch:
        model, ids = make_llama(dtype, tied), make_ids()
        assert (model.output.weight is model.tok_embeddings.weight) == tied
        between = []
        for layer in model.layers.values():
            layer.register_forward_hook(lambda _, __, output: between.append(output))
        assert_is(model(ids, ids), torch.float32)
        assert_is(model(ids), dtype, ROWS, LENGTH, VOCAB)
        assert_is(model.eval()(ids, ids), torch.float32, ROWS, LENGTH)
        assert len(between) == 3 * LAYERS
        for hidden in between:
            assert_is(hidden, dtype, ROWS, LENGTH, DIM)
        assert watch.copies == 0


@pytest.fixture
def flash(monkeypatch) -> None:
    """A GPU that has the flash kernel, and how that gets grouped heads, which is tried out otherwise."""
    named = "enable_gqa" in (varlen.varlen_attn.__kwdefaults__ or {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention, "_grouping", "named" if named else "as they are")


@pytest.fixture
def flash_calls(monkeypatch, flash) -> list[tuple]:
    """The arguments of the flash kernel's calls."""
    kernel, calls = varlen.varlen_attn, []

    def spy(*args, **kwargs):
        calls.append((*args, kwargs))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", spy)
    return calls


def documents_of(model: Llama3) -> list[Documents]:
    """A list that each block adds its documents to."""
    seen: list[Documents] = []
    for layer in model.layers.values():
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[3]))
    return seen


@pytest.mark.parametrize(("count", "size"), [(2, 2), (3, 4), (8, 8), (9, 16)])
def test_packed_rows_in_16_bits_go_to_the_flash_kernel(flash_calls, count, size):
    with gpu() as watch:
        model, ids = make_llama(torch.bfloat16), make_ids()
        seen = documents_of(model)
        assert_is(model(ids, ids, ids, count), torch.float32)
        assert watch.copies == 0
    assert len(seen) == len(flash_calls) == LAYERS
    for documents, (q, k, v, *offsets, longest_q, longest_k, options) in zip(seen, flash_calls, strict=True):
        assert documents.lengths is None and documents.mask is None
        assert_is(documents.offsets, torch.int32, size + 1)
        assert all(given is documents.offsets for given in offsets)
        assert_is(q, torch.bfloat16, ROWS * LENGTH, HEADS, HEAD_DIM)
        for keys in (k, v):  # once for all heads of queries that share them
            assert_is(keys, torch.bfloat16, ROWS * LENGTH, KV_HEADS, HEAD_DIM)
        assert longest_q == longest_k == LENGTH
        assert options.pop("window_size") == (-1, 0)
        assert options == ({"enable_gqa": True} if attention._grouping == "named" else {})


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, (9, 0)), (torch.bfloat16, (7, 5))])
def test_packed_rows_that_the_flash_kernel_does_not_take_have_a_mask(monkeypatch, flash_calls, dtype, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with gpu() as watch:
        model, ids = make_llama(dtype), make_ids()
        seen = documents_of(model)
        assert_is(model(ids, ids, ids, 3), torch.float32)
        assert_is(model.eval()(ids, ids, ids), torch.float32, ROWS, LENGTH)  # nobody needs to have counted
        assert watch.copies == 0
    assert not flash_calls
    assert len(seen) == 2 * LAYERS
    for documents in seen:
        assert documents.lengths is None and documents.offsets is None
        assert_is(documents.mask, torch.bool, ROWS, 1, LENGTH, LENGTH)


def test_documents_that_nobody_counted_are_waited_for(flash_calls):
    with gpu():
        model, ids = make_llama(torch.bfloat16), make_ids()
        with pytest.raises(DataDependentOutputException):
            model(ids, ids, ids)
    assert not flash_calls


def test_a_pipeline_counts_the_documents_of_its_microbatches():
    """Its stages would wait for the GPU to count them otherwise."""
    pipeline, given = Pipeline.__new__(Pipeline), []
    pipeline.rows, pipeline.device, pipeline.stages, pipeline.num_stages = 2, CPU, {1: None}, 3
    pipeline.schedule = SimpleNamespace(step=lambda *args, **kwargs: given.append(kwargs))
    ids, positions = torch.zeros(4, LENGTH, dtype=torch.int64), torch.arange(LENGTH).repeat(4, 1)
    positions[1] %= 16
    positions[3] %= 32
    assert pipeline.backward(ids, ids, positions, 1.0) == 0
    assert given[0]["num_documents"] == max(1 + 4, 1 + 2)
    assert torch.equal(given[0]["positions"], positions)
    pipeline.backward(ids, ids, None, 1.0)
    assert "positions" not in given[1]


# --- the loss


class Context:
    """Stands for autograd's, which needs a GPU: what is to have gradients, and which ones were kept."""

    def __init__(self, *needs: bool):
        self.needs_input_grad = (*needs, False, False, False)

    def save_for_backward(self, *kept: torch.Tensor | None) -> None:
        self.kept = kept


def make_head(tokens: int, dtype: torch.dtype, columns: int = 384) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, rows of the head and targets."""
    hidden = torch.empty(tokens, DIM, dtype=dtype, device="cuda")
    weight = torch.empty(columns, DIM, dtype=dtype, device="cuda")
    return hidden, weight, torch.zeros(tokens, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("columns", [Columns(), Columns(128, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_makes_gradients_chunk_by_chunk(dtype, columns):
    with gpu() as watch:
        hidden, weight, targets = make_head(4 * CHUNK_TOKENS - 100, dtype)
        context = Context(True, True)
        assert_is(_ChunkedNLLSum.forward(context, hidden, weight, targets, columns, False), torch.float32)
        for kept, of in zip(context.kept, (hidden, weight), strict=True):
            assert_is(kept, dtype, *of.shape)
        assert watch.largest == CHUNK_TOKENS * len(weight)  # logits and their gradients, of one chunk
        assert watch.copies == 0
    # The head's gradient is summed over chunks in fp32.
    summed = [found for found in watch.results if found[0] in ("aten.add_", "aten.addmm_") and found[2]]
    name = "aten.addmm_" if dtype == torch.float32 else "aten.add_"
    assert summed == [(name, torch.float32, tuple(weight.shape))] * 3


@pytest.mark.parametrize(("needs", "products"), [((False, False), 0), ((True, False), 1), ((False, True), 1)])
def test_loss_makes_no_gradient_that_is_not_needed(needs, products):
    with gpu() as watch:
        context = Context(*needs)
        _ChunkedNLLSum.forward(context, *make_head(CHUNK_TOKENS, torch.bfloat16), Columns(), False)
    assert [kept is not None for kept in context.kept] == list(needs)
    assert watch.ops["aten.mm"] == 1 + products  # that of the logits is one


@pytest.mark.parametrize("columns", [Columns(), Columns(128, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_of_each_target_is_computed_chunk_by_chunk(dtype, columns):
    with gpu() as watch:
        hidden, weight, targets = make_head(3 * CHUNK_TOKENS, dtype)
        hidden, targets = hidden.view(6, -1, DIM), targets.view(6, -1)
        assert_is(chunked_nll(hidden, weight, targets, columns), torch.float32, *targets.shape)
        assert watch.largest == CHUNK_TOKENS * len(weight)
        assert watch.copies == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_audio_head_computes_its_columns_alone(dtype):
    first = 130
    with gpu() as watch:
        model, ids = make_llama(dtype), make_ids()
        model.output.first_id = first
        assert_is(model(ids, ids), torch.float32)
        assert_is(model.eval()(ids, ids), torch.float32, ROWS, LENGTH)
        assert watch.copies == 0
    widths = {shape[1] for name, _, shape in watch.results if name == "aten.mm" and shape[0] == ROWS * LENGTH}
    padded = make_args().padded_vocab_size
    assert padded - first in widths and padded not in widths


# --- the norm of the gradients


def make_step(dtype: torch.dtype, **options: bool) -> tuple[Any, torch.optim.Optimizer]:
    """A model that has gradients, as clipping sees it, and its optimizer."""
    model = make_llama(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stand_in = SimpleNamespace(pipeline=None, parts=[model], weights=model.weights)
    return stand_in, torch.optim.AdamW(model.parameters(), **options)


def test_gradients_are_clipped_without_a_value():
    with gpu() as watch:
        model, _ = make_step(torch.float32)
        norm = clip_grad_norm(model, 1.0)
        assert_is(norm.total, torch.float32)
        assert_is(norm.of_each, torch.float32, len(norm.names))
        assert norm.names == [name for name, _ in model.weights()]
        assert watch.ops["aten._foreach_mul_"] == 1
        assert watch.copies == 0


@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_looked_at_two_later_where_the_kernel_skips_them(monkeypatch, fused):
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=int, synchronize=int))
    with gpu() as watch:
        model, optimizer = make_step(torch.float32, fused=fused)
        guard, copied = FiniteGuard(optimizer, CUDA), []
        norm = clip_grad_norm(model, 1.0)
        for step in range(2 * fused):
            guard.check(step, norm.total, norm, [])
            optimizer.step()
            copied.append(watch.to_host)
        with pytest.raises(DataDependentOutputException):
            guard.check(2, norm.total, norm, [])
        assert copied == ([1, 2] if fused else [])  # the flags, while the GPU goes on
        assert watch.from_host == 0


# --- the engine


STREAM = TokenStream(VOCAB, QUANTIZERS, bos_id=0)
SAMPLINGS = {
    "greedy": [Sampling(temperature=0.0)],
    "top_k": [Sampling()],
    "top_p": [Sampling(top_k=None, top_p=0.9)],
    "penalty": [Sampling(top_k=None, repetition_penalty=1.2)],
    "mixed": [Sampling(top_k=5, top_p=0.9, repetition_penalty=1.2), Sampling(temperature=0.0)],
}
FRAME = QUANTIZERS + 2  # with the two flags


def make_hf_llama(device: torch.device, n_layers: int = LAYERS) -> Any:
    config = LlamaConfig(
        vocab_size=STREAM.vocab_size,
        hidden_size=DIM,
        intermediate_size=96,
        num_hidden_layers=n_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_lm(model: Any, device: torch.device) -> SpeechLM:
    codec: Any = SimpleNamespace(device=device)  # of which the engine needs no more
    return SpeechLM("random", model, None, STREAM, codec)


@pytest.fixture
def make_engine(monkeypatch) -> Callable[..., Engine]:
    """A function that makes an engine of a type of numbers, within :func:`gpu`."""

    def make(kind: str, rows: int = 4, **options: bool) -> Engine:
        if kind == "int8":
            pytest.importorskip("triton")
            from torchtitan.generation.int8_kernel import int8_linear

            # It is tried once, which needs a GPU.
            monkeypatch.setattr(linear_module, "int8_product", lambda device, dtype: int8_linear)
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        return Engine(make_lm(on_cuda(model, dtype), CUDA), rows, int8=kind == "int8", **options)

    model = make_hf_llama(torch.device("meta"))
    return make


@pytest.mark.parametrize(
    ("kind", "constrained"), [("float32", True), ("bfloat16", True), ("bfloat16", False), ("int8", True)]
)
def test_frames_are_drawn_without_a_value(make_engine, kind, constrained):
    """Nothing comes from the host either, so that a frame can be captured."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    found = {}
    with fake_gpu(), torch.inference_mode():
        engine = make_engine(kind, constrained=constrained)
        for name, samplings in SAMPLINGS.items():
            with Watch() as watch:
                engine._frame(4, 256, _plan(samplings))
            assert watch.copies == 0, name
            found[name] = watch.ops
            assert_is(engine._output, torch.int64, 4, FRAME)
            assert_is(engine._hidden, dtype, 4, DIM)
            assert_is(engine.llama.keys, dtype, LAYERS, 4, KV_HEADS, 512, HEAD_DIM)
    for name, ops in found.items():
        limited = name in ("top_k", "top_p", "mixed")
        assert ops["aten.topk"] == (QUANTIZERS if limited else 0)
        greedy, draws = name in ("greedy", "mixed"), name != "greedy"
        assert ops["aten.argmax"] == QUANTIZERS * (greedy + draws)
        assert ops["aten.log1p"] == QUANTIZERS * draws
        assert ops["aten.index_copy_"] == QUANTIZERS * LAYERS * 2  # keys and values
        assert ops["aten.rms_norm"] == QUANTIZERS * (LAYERS * 2 + 1)  # in one kernel each
        assert ops["torchtitan.int8_linear"] == (QUANTIZERS * (LAYERS * 4 + 1) if kind == "int8" else 0)


def test_prompts_are_read_with_wider_products(make_engine):
    with gpu() as watch, torch.inference_mode():
        engine = make_engine("int8")
        for length, products in ((64, LAYERS * 4), (65, 0)):
            before = watch.ops["torchtitan.int8_linear"]
            assert_is(engine.llama.prefill(1, make_ids(1, length)[0]), torch.bfloat16, DIM)
            assert watch.ops["torchtitan.int8_linear"] - before == products


def test_rehearsal_of_a_frame_needs_no_value(make_engine):
    with fake_gpu(), torch.inference_mode():
        engine = make_engine("bfloat16")
        with Watch() as watch:
            engine._rehearse(2, 128, _plan(SAMPLINGS["greedy"]))
        assert watch.copies == 0
        assert watch.ops["aten.argmax"] == 2 * QUANTIZERS


@pytest.mark.parametrize(("rows", "batch"), [(3, 3), (16, 4)])
def test_a_frame_is_read_while_the_next_one_is_computed(monkeypatch, make_engine, rows, batch):
    """Three requests are a batch of a power of two, at lengths that are one too."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=int, synchronize=int))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    launched = []
    generations = [Generation(Request(torch.zeros(QUANTIZERS, 0, dtype=torch.int64), 5)) for _ in range(3)]
    for generation, length in zip(generations, (20, 300, 7), strict=True):
        generation.length = length
    with gpu() as watch:
        engine = make_engine("bfloat16", rows)
        monkeypatch.setattr(engine, "_replay", lambda *how: launched.append(how) or engine._frame(*how))
        engine._active = list(generations)
        before = watch.from_host
        assert engine.advance() == []
        assert (watch.to_host, watch.from_host - before) == (1, 0)  # the frame, while the host goes on
        with pytest.raises(DataDependentOutputException):
            engine.advance()
        assert watch.to_host == 2
    assert [how[:2] for how in launched] == [(batch, 512)] * 2
    assert [generation.launched for generation in generations] == [2, 2, 2]


# --- the codec


@pytest.fixture(scope="module")
def make_codec() -> Callable[..., Codec]:
    """A function that gives a codec of one padding, within :func:`gpu`; its weights are checked before, on the CPU."""
    config = MimiConfig(
        num_filters=4,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        upsample_groups=32,
        num_quantizers=4,
    )
    model = MimiModel(config)
    for part in model.modules():
        if hasattr(part, "embed_sum"):
            part.embed_sum.normal_()

    codecs = {padding: Codec(model, 4, padding) for padding in ("exact", "aligned")}

    def make(padding: str = "exact") -> Codec:
        on_cuda(model)
        codecs[padding]._largest = 0.0
        return codecs[padding]

    return make


@pytest.mark.parametrize(("lengths", "masked"), [([4000], 0), ([4000, 9000, 1], 1), ([7000, 7679], None)])
@pytest.mark.parametrize("padding", ["exact", "aligned"])
def test_clips_are_encoded_without_a_value(make_codec, padding, lengths, masked):
    if masked is None:  # The clips have as many frames.
        masked = int(padding == "exact")
    with gpu() as watch, torch.inference_mode():
        codec = make_codec(padding)
        assert codec.device.type == "cuda"
        padded, before = torch.zeros(len(lengths), 1, max(lengths), device="cuda"), watch.from_host
        latents = codec._latents(padded, lengths, None)
        frames = -(-max(lengths) // FRAME_SIZE)
        assert_is(latents, torch.float32, len(lengths), 32, frames)
        assert_is(codec._quantize(latents), torch.int64, len(lengths), 4, frames)
        assert watch.to_host == 0
        assert watch.from_host - before == masked  # the lengths, where clips end before their rows


def test_chunks_of_a_clip_are_encoded_without_a_value(make_codec):
    with gpu() as watch, torch.inference_mode():
        codec = make_codec()
        state = _State(cache=DynamicCache(config=codec._transformer.config))
        for frames, samples in ((3, 3 * FRAME_SIZE), (2, 2 * FRAME_SIZE), (2, FRAME_SIZE + 7)):
            latents = codec._latents(torch.zeros(1, 1, samples, device="cuda"), [samples], state)
            assert_is(codec._quantize(latents), torch.int64, 1, 4, frames)
        assert all(tail.device.type == "cuda" for tail in state.tails.values()) and state.tails
        assert watch.to_host == 0


def test_speech_is_decoded_piece_by_piece_without_a_value(make_codec):
    with gpu() as watch:
        decoder, copies = StreamingDecoder(make_codec()), []
        for frames in (1, 2, 1):
            before = watch.to_host, watch.from_host
            assert tuple(decoder.decode(torch.zeros(4, frames, dtype=torch.int64)).shape) == (frames * FRAME_SIZE,)
            copies.append((watch.to_host - before[0], watch.from_host - before[1]))
        assert [to_host for to_host, _ in copies] == [1, 1, 1]  # the waveform
        assert [from_host for _, from_host in copies][1:] == [1, 1]  # the codes, once the cache is there


def test_speech_is_decoded_at_once_without_a_value(make_codec):
    with gpu() as watch:
        codec = make_codec()
        assert tuple(codec.decode(torch.zeros(4, 3, dtype=torch.int64)).shape) == (3 * FRAME_SIZE,)
        assert watch.to_host == 1


def seconds_that_fit(seconds: float) -> int:
    """Free memory in which a batch of so many seconds has its share."""
    return round(seconds * ACTIVATION_BYTES / FREE_MEMORY_SHARE)


@pytest.mark.parametrize(
    ("fit", "largest", "expected"),
    [
        (10_000.0, 0.0, BATCH_SECONDS["cuda"]),
        (100.0, 0.0, 100.0),
        (2.5, 0.0, 2.5),
        (2.5, 40.0, 40.0),  # whose memory the codec's stream has already
        (100.0, 40.0, 100.0),
        (0.0, 1000.0, BATCH_SECONDS["cuda"]),
    ],
)
def test_batches_follow_the_free_memory(monkeypatch, make_codec, fit, largest, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (seconds_that_fit(fit), 0))
    with gpu():
        codec = make_codec()
    codec._largest = largest
    assert codec._batch_seconds() == pytest.approx(expected)
    batches = codec._batches([SAMPLE_RATE] * 400)
    assert sorted(i for batch in batches for i in batch) == list(range(400))
    full = int(expected + 1e-6)
    assert [len(batch) for batch in batches] == [full] * (400 // full) + [400 % full] * (400 % full > 0)


def test_clips_are_encoded_in_batches_that_fit(monkeypatch, make_codec):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (seconds_that_fit(1.0), 0))
    lengths = [4000, 5000, 100, 10_000, 9000]
    with gpu() as watch:
        codec, sizes = make_codec(), []
        latents = codec._latents
        monkeypatch.setattr(codec, "_own_cuda_stream", nullcontext)
        monkeypatch.setattr(codec, "_latents", lambda x, *more: sizes.append(len(x)) or latents(x, *more))
        codes = codec.encode([torch.zeros(length) for length in lengths])
        assert [tuple(each.shape) for each in codes] == [(4, -(-length // FRAME_SIZE)) for length in lengths]
        assert all(each.device.type == "cpu" and each.dtype == torch.int64 for each in codes)
        assert watch.to_host == len(lengths)  # the codes
    assert sizes == [2, 3]
    assert codec._largest == pytest.approx(20_000 / SAMPLE_RATE)


# --- graphs


@pytest.fixture
def compile_by(monkeypatch) -> Iterator[Callable[[Any], None]]:
    """A function that sets what torch.compile compiles with. No graph of another test is left, nor one of this."""

    def forget() -> None:
        torch._dynamo.reset()
        counters.clear()
        loss_module._compiled.cache_clear()

    real = torch.compile
    forget()
    yield lambda backend: monkeypatch.setattr(torch, "compile", functools.partial(real, backend=backend))
    assert not counters["graph_break"]
    forget()


@pytest.fixture
def graphs(compile_by) -> CompileCounterWithBackend:
    """Counts graphs, which are run as they are."""
    counter = CompileCounterWithBackend("eager")
    compile_by(counter)
    return counter


@pytest.fixture
def both_graphs(compile_by) -> Counter[str]:
    """Counts the graphs of forward and backward passes, which are run as they are."""
    found: Counter[str] = Counter()

    def count(kind: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            found[kind] += 1
            return make_boxed_func(graph.forward)

        return compiler

    compile_by(
        aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"), inference_compiler=count("inference"))
    )
    return found


def random_llama(n_layers: int) -> Llama3:
    with torch.device("meta"):
        model = Llama3(make_args(n_layers=n_layers))
    materialize(model, CPU, LENGTH)
    init_random(model, 0)
    return model.train()


def random_ids(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_one_graph_serves_all_blocks_and_batches(both_graphs):
    plain, model = random_llama(3), random_llama(3)
    compile_blocks(model)
    for packed in (False, True):
        for seed in range(3):
            ids, targets = random_ids(seed, ROWS, LENGTH), random_ids(seed + 9, ROWS, LENGTH)
            # More documents, shorter ones, as the seed grows.
            positions = torch.arange(LENGTH).remainder(30 // (seed + 1)).expand(ROWS, LENGTH) if packed else None
            losses = [each(ids, targets, positions) for each in (model, plain)]
            for loss in losses:
                loss.backward()
            assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
            # One for whole rows and one for packed ones.
            assert both_graphs == {"forward": 1 + packed, "backward": 1 + packed}
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-3, atol=1e-4), name
    with torch.no_grad():
        for seed in range(2):
            model.eval()(random_ids(seed, ROWS, LENGTH), random_ids(seed, ROWS, LENGTH))
    assert both_graphs == {"forward": 2, "backward": 2, "inference": 1}


def test_one_graph_serves_numbers_of_documents_up_to_a_power_of_two(graphs, flash):
    found = []
    with fake_gpu():
        model, ids = make_llama(torch.bfloat16, n_layers=3), make_ids()
        compile_blocks(model)
        for count in (None, 5, 8, 7, 9, 17):
            assert_is(model(ids, ids, None if count is None else ids, count), torch.float32)
            found.append(graphs.frame_count)
    assert found == [1, 2, 2, 2, 3, 4]


def test_graphs_of_the_loss_are_few(graphs):
    """Two functions are compiled: the counts are of both together."""
    hidden, weight = torch.randn(3 * CHUNK_TOKENS, DIM), torch.randn(384, DIM)
    found = []
    # Whole chunks; shorter last ones of any length; less than a chunk; and a single target.
    for count in (2048, 1024, 2500, 1500, 3000, 300, 7, 1, 2500, 300):
        inputs = [(x.clone()).requires_grad_() for x in (hidden[:count], weight)]
        targets = random_ids(count, count)
        compiled = chunked_nll_sum(*inputs, targets, Columns(0, VOCAB), compiled=True)
        plain = chunked_nll_sum(*inputs, targets, Columns(0, VOCAB))
        assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)
        for gradients in zip(*(torch.autograd.grad(loss, inputs) for loss in (compiled, plain)), strict=True):
            assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)
        found.append(graphs.frame_count)
    assert found == [2, 2, 4, 4, 4, 6, 6, 8, 8, 8]
    assert found[-1] / 2 < torch._dynamo.config.recompile_limit


def test_graphs_of_the_loss_are_two_on_a_gpu_where_rows_keep_their_size(graphs):
    """One for whole chunks, one for the last; of two functions."""
    with fake_gpu():
        for _ in range(2):
            context = Context(True, True)
            made = make_head(2 * CHUNK_TOKENS + 100, torch.bfloat16)
            assert_is(_ChunkedNLLSum.forward(context, *made, Columns(0, VOCAB), True), torch.float32)
            assert [kept.dtype for kept in context.kept] == [torch.bfloat16] * 2
            assert graphs.frame_count == 4


def test_graphs_of_the_engine_are_few(graphs):
    engine, found = Engine(make_lm(make_hf_llama(CPU, 3), CPU), 4, compile_layers=True), []
    with torch.inference_mode():
        for length in (128, 256, 128, 384):
            for rows in (1, 2, 4):
                engine._frame(rows, length, _plan([Sampling()]))
                found.append(graphs.frame_count)
    # A single row has graphs of its own; the second size and the second length are each taken for any.
    assert found == [1, 2, 2, 3, 4, 4, *[4] * 6]
    assert found[-1] < torch._dynamo.config.recompile_limit


def test_graphs_of_the_engine_are_as_few_on_a_gpu(graphs, make_engine):
    found = []
    with fake_gpu(), torch.inference_mode():
        engine = make_engine("int8", compile_layers=True)
        for rows, length in ((2, 128), (4, 256), (2, 384), (4, 128), (4, 512), (2, 512)):
            engine._frame(rows, length, _plan([Sampling()]))
            found.append(graphs.frame_count)
    # One for the first size and length, one for any, and one for the whole cache.
    assert found == [1, 2, 2, 2, 3, 3]
