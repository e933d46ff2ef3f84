"""The model: transformers' function on the same weights, its loss, and its way in and out of Hugging Face format."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from torchtitan.audio.token_stream import extend_tokenizer
from torchtitan.checkpoint.hf_export import write_hf_files, write_weights
from torchtitan.config.job_config import ActivationCheckpoint, JobConfig, Model
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models import loss as loss_module
from torchtitan.models.base import BaseModel
from torchtitan.models.llama3.activation_checkpoint import checkpoint_activations
from torchtitan.models.llama3.args import Llama3Args, read_config
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.parallel_model import ParallelModel
from torchtitan.models.llama3.weights import SafetensorsFolder, hf_names, init_random, load_hf, materialize
from torchtitan.models.loss import IGNORE_INDEX, chunked_nll, chunked_nll_sum
from torchtitan.tools.errors import UserError

CPU = torch.device("cpu")
STORED_ROWS = 272  # of the base model's embedding; its tokenizer has 258 ids
KINDS = [
    pytest.param({"tied": True}, id="tied"),
    pytest.param({"tied": False}, id="untied"),
    pytest.param({"scaled": True}, id="llama3-rope"),
    pytest.param({"scaled": True, "old_config": True}, id="llama3-rope-transformers-4"),
    pytest.param({"old_config": True}, id="transformers-4"),
]


def build(args: Llama3Args, seq_len: int = 64) -> Llama3:
    """A model with memory, as the trainer makes it."""
    with torch.device("meta"):
        model = Llama3(args)
    materialize(model, CPU, seq_len)
    return model.train()


def load(folder: Path, vocab_size: int = STORED_ROWS, known: int = STORED_ROWS) -> Llama3:
    config = {**read_config(folder), "vocab_size": vocab_size}
    model = build(Llama3Args.from_hf(config))
    load_hf(model, folder, known)
    return model


def load_transformers(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def tokens():
    return torch.randint(256, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets():
    """With gaps, and a row that ends early."""
    targets = torch.randint(256, (2, 60), generator=torch.Generator().manual_seed(1))
    targets[0, 5:8] = targets[1, 40:] = IGNORE_INDEX
    return targets


# --- the function


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(make_base_model, tokens, kind):
    folder = make_base_model(**kind)
    with torch.no_grad():
        expected = load_transformers(folder)(tokens).logits
        found = load(folder)(tokens)
    assert expected.std() > 1  # or else the tolerance would say little
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4


def test_rope_scaling_matters_here(make_base_model, tokens):
    with torch.no_grad():
        plain, scaled = (load(make_base_model(scaled=scaled))(tokens) for scaled in (False, True))
    assert (plain - scaled).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradients_equal_transformers(make_base_model, tokens, targets, kind):
    folder = make_base_model(**kind)
    reference, model = load_transformers(folder), load(folder)
    F.cross_entropy(reference(tokens).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    model(tokens, targets).backward()
    expected = dict(reference.named_parameters())
    for ours, theirs in hf_names(model.args).items():
        gradient, wanted = model.get_parameter(ours).grad, expected[theirs].grad
        assert torch.allclose(gradient[: wanted.shape[0]], wanted, atol=1e-4, rtol=1e-4), ours


def test_rows_longer_than_the_rotary_tables_are_refused(make_base_model):
    with pytest.raises(ValueError, match="rows of 65 ids need rotary tables of that length, not 64"):
        load(make_base_model())(torch.zeros(1, 65, dtype=torch.int64))


def test_tied_model_has_one_parameter_for_both_ends(make_base_model):
    model = load(make_base_model(tied=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_number_of_parameters(make_base_model, tied):
    folder = make_base_model(tied=tied)
    assert load(folder).args.num_params == sum(p.numel() for p in load_transformers(folder).parameters())


def test_activation_checkpointing_gives_the_same_gradients(make_base_model, tokens, targets):
    folder = make_base_model()
    plain, recomputed = load(folder), load(folder)
    checkpoint_activations(recomputed, ActivationCheckpoint("full"))
    for model in (plain, recomputed):
        model(tokens, targets).backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_activation_checkpointing_computes_blocks_again(make_base_model, tokens, targets):
    model = load(make_base_model())
    checkpoint_activations(model, ActivationCheckpoint("full"))
    calls = []
    model.layers["0"].attention.register_forward_hook(lambda *_: calls.append(1))
    model(tokens, targets).backward()
    assert len(calls) == 2


# --- the loss


@pytest.fixture
def head():
    """Hidden states [2, 25, 16], a head of 301 rows, and targets of which some are ignored."""
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 25, 16, generator=random)
    weight = torch.randn(301, 16, generator=random)
    targets = torch.randint(301, (2, 25), generator=random)
    targets[0, :3] = targets[1, 20:] = IGNORE_INDEX
    return hidden, weight, targets


def without_choosing_rows(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss as a GPU computes it: rows without a target are in it, and masked."""
    ids = hidden.flatten(0, 1), weight, targets.flatten()
    return loss_module._ChunkedNLLSum.apply(*ids, loss_module.ALL_COLUMNS, False)


def compiled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return chunked_nll_sum(hidden, weight, targets, compiled=True)


SLOWLY_COMPILED = pytest.param(compiled, marks=pytest.mark.slow)


def with_alignment_rows(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss over a head of more rows than there are ids."""
    rows = torch.cat((weight, torch.full((19, weight.shape[1]), 3.0)))
    return chunked_nll_sum(hidden, rows, targets, loss_module.Columns(count=weight.shape[0]))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1024])
@pytest.mark.parametrize("chunked", [chunked_nll_sum, without_choosing_rows, with_alignment_rows, SLOWLY_COMPILED])
def test_chunked_loss_equals_the_whole(head, monkeypatch, chunked, chunk):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    hidden, weight, targets = head
    results = []
    for function in (
        lambda h, w: chunked(h, w, targets),
        lambda h, w: F.cross_entropy((h @ w.T).flatten(0, 1), targets.flatten(), reduction="sum"),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(h, w)
        (value / 17).backward()  # a gradient that is not 1 on the way back
        results.append((value.detach(), h.grad, w.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunked", [chunked_nll_sum, without_choosing_rows])
def test_loss_without_any_target_is_zero_with_zero_gradients(head, chunked):
    hidden, weight, targets = head
    hidden.requires_grad_(), weight.requires_grad_()
    value = chunked(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    value.backward()
    assert value == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_loss_in_bf16_is_summed_in_fp32(head, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 7)
    hidden, weight, targets = head
    hidden, targets = 0.3 * hidden.repeat(20, 1, 1), targets.repeat(20, 1)
    low = chunked_nll_sum(hidden.bfloat16(), weight.bfloat16(), targets)
    exact = chunked_nll_sum(hidden.bfloat16().float(), weight.bfloat16().float(), targets)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact.item(), rel=2e-4)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_loss_of_each_target(head, monkeypatch, chunk):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    hidden, weight, targets = head
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none")
    found = chunked_nll(hidden, weight, targets)
    assert torch.allclose(found, expected.view(2, 25), atol=1e-5)
    assert not found[targets == IGNORE_INDEX].any()


def test_model_gives_the_sum_in_training_and_each_target_in_evaluation(make_base_model, tokens, targets):
    model = load(make_base_model())
    total = model(tokens, targets)
    with torch.no_grad():
        each = model.eval()(tokens, targets)
    assert each.shape == targets.shape
    assert total.item() == pytest.approx(each.sum().item(), rel=1e-5)


def test_alignment_rows_are_outside_the_softmax(make_base_model, tokens, targets):
    model = load(make_base_model())
    assert model.output.weight.shape[0] == 384
    before = model(tokens, targets)
    with torch.no_grad():
        model.output.weight[STORED_ROWS:] = 100.0
    after = model(tokens, targets)
    after.backward()
    assert after.item() == before.item()
    assert not model.output.weight.grad[STORED_ROWS:].any()


def test_one_rank_computes_in_bf16_as_many_do(make_base_model, tokens, targets):
    """All activations in bf16, the residual stream too; weights and their gradients in fp32."""
    folder, config = make_base_model(), JobConfig()
    exact = load(folder)(tokens, targets)
    seen = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        args = Llama3Args.from_hf(read_config(folder))
        model = ParallelModel(config, args, ParallelDims(), torch.device("cpu"))
        load_hf(model, folder, STORED_ROWS)
        for block in model.parts[0].layers.values():
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        low = model.backward(tokens, targets, None, 1.0)
        gradients = [parameter.grad for _, parameter in model.weights()]
    finally:
        dist.destroy_process_group()
    assert config.training.mixed_precision_param == "bfloat16"
    assert seen == [torch.bfloat16] * args.n_layers
    assert low.item() != exact.item()
    assert low.item() == pytest.approx(exact.item(), rel=0.02)
    assert {t.dtype for t in (*gradients, *dict(model.weights()).values())} == {torch.float32}


# --- weights in


def test_bf16_weights_become_fp32(make_base_model, tokens):
    folder = make_base_model(dtype=torch.bfloat16)
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert (model(tokens) - load_transformers(folder)(tokens).logits).abs().max() < 1e-4


def test_weights_in_several_files(make_base_model):
    folder = make_base_model(max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    for p, q in zip(load(folder).parameters(), load(make_base_model()).parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_known(make_base_model, tied):
    folder = make_base_model(tied=tied)
    model = load(folder, vocab_size=301, known=258)
    stored = load_transformers(folder).state_dict()
    for ours, theirs in (("tok_embeddings", "model.embed_tokens"), ("output", "lm_head")):
        rows, old = model.get_submodule(ours).weight.detach(), stored[f"{theirs}.weight"][:258]
        assert torch.equal(rows[:258], old)
        assert torch.allclose(rows[258:301], old.mean(dim=0).expand(43, -1), atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_alignment_rows_are_zero(make_base_model, tied):
    model = load(make_base_model(tied=tied), vocab_size=301, known=258)
    for module in (model.tok_embeddings, model.output):
        assert module.weight.shape[0] == 384
        assert not module.weight[301:].any()


def test_tokenizer_with_more_ids_than_rows_is_refused(make_base_model):
    with pytest.raises(UserError, match=r"\[272, 48\], but the tokenizer has 273 ids"):
        load(make_base_model(), known=273, vocab_size=273)


def copy_with(folder: Path, target: Path, change) -> Path:
    """A copy of a model's folder whose tensors went through ``change``."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_missing_weight_is_named(make_base_model, tmp_path):
    folder = copy_with(make_base_model(), tmp_path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"the weight model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(folder)


def test_weight_of_another_shape_is_named(make_base_model, tmp_path):
    folder = copy_with(make_base_model(), tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(40)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight is \[40\], config\.json says \[48\]"):
        load(folder)


def test_missing_shard_is_named(make_base_model, tmp_path):
    folder = copy_with(make_base_model(), tmp_path, lambda t: None)
    weight_map = dict.fromkeys(hf_names(load(folder).args).values(), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors: the file is missing"):
        load(folder)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_cut_off_weights_are_refused(make_base_model, tmp_path, index):
    folder = copy_with(make_base_model(), tmp_path, lambda t: None)
    weights = folder / "model.safetensors"
    if index:
        weight_map = dict.fromkeys(hf_names(load(folder).args).values(), weights.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: the file is damaged"):
        load(folder)


# --- random weights


def random_model(seed: int, tied: bool = True) -> Llama3:
    model = build(Llama3Args(vocab_size=301, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, tied=tied))
    init_random(model, seed)
    return model


def test_random_weights_are_a_function_of_the_seed():
    first, same, other = (random_model(seed).layers["0"].attention.wq.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_random_weights_have_their_deviations():
    model = random_model(1, tied=False)  # 1 / sqrt(64) = 0.125, and half of it with two layers
    block = model.layers["1"]
    assert model.tok_embeddings.weight[:301].std().item() == pytest.approx(0.125, rel=0.05)
    assert block.feed_forward.w1.weight.std().item() == pytest.approx(0.125, rel=0.05)
    assert block.feed_forward.w2.weight.std().item() == pytest.approx(0.0625, rel=0.05)
    assert block.attention.wo.weight.std().item() == pytest.approx(0.0625, rel=0.05)


def test_random_norms_are_one():
    norms = [p for name, p in random_model(1).named_parameters() if "norm" in name]
    assert len(norms) == 5
    assert all((p == 1).all() for p in norms)


def test_random_head_is_not_the_embedding():
    model = random_model(1, tied=False)
    assert not torch.equal(model.output.weight, model.tok_embeddings.weight)


def test_random_alignment_rows_are_zero():
    weight = random_model(1).tok_embeddings.weight
    assert weight[:301].any(dim=1).all()
    assert not weight[301:].any()


# --- config.json


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"model_type": "mistral"}, "model_type is 'mistral', only llama models"),
    ],
)
def test_other_architectures_are_refused(make_base_model, change, reason):
    with pytest.raises(UserError, match=reason):
        Llama3Args.from_hf({**read_config(make_base_model()), **change})


def test_missing_key_is_named(make_base_model):
    config = read_config(make_base_model())
    del config["hidden_size"]
    with pytest.raises(UserError, match="the key 'hidden_size' is missing"):
        Llama3Args.from_hf(config)


def test_missing_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        read_config(tmp_path)


def test_broken_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{\n"vocab_size": 3,\n}')
    with pytest.raises(UserError, match=r"not valid JSON \(line 3\)"):
        read_config(tmp_path)


@pytest.mark.parametrize("scaled", [True, False])
def test_sizes_survive_the_way_to_config_json_and_back(make_base_model, scaled):
    args = Llama3Args.from_hf(read_config(make_base_model(scaled=scaled)))
    written = args.to_hf()
    assert Llama3Args.from_hf(written) == args
    for_version_4 = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    assert Llama3Args.from_hf(for_version_4) == args


# --- weights out


@pytest.fixture(scope="module")
def export(make_base_model, tmp_path_factory):
    """A function that extends a base model for Q = 1, and exports it: the model, its stream and the folder."""

    def make(**kind):
        settings = Model(name=str(make_base_model(**kind)), num_quantizers=1, audio_tokenizer="some/codec")
        base = BaseModel.load(settings)
        model = build(base.args)
        load_hf(model, base.folder, base.known_vocab_size)
        with torch.no_grad():  # as if trained: new rows are no longer alike
            model.tok_embeddings.weight[base.known_vocab_size :].normal_(0.0, 0.2)
        folder = tmp_path_factory.mktemp("export")
        write_hf_files(folder, base.args, base.tokenizer, base.stream, settings)
        write_weights(folder, base.args, dict(model.named_parameters()), torch.float32)
        return model, base, folder

    return make


def test_further_special_tokens_are_exported_as_every_version_reads_them(make_base_model, tmp_path):
    """transformers 4.53 takes no list under the name that version 5 writes."""
    from transformers import AutoTokenizer

    settings = Model(name=str(make_base_model()), num_quantizers=1, audio_tokenizer="some/codec")
    base = BaseModel.load(settings)
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>", "[MORE]"]})
    write_hf_files(tmp_path, base.args, base.tokenizer, base.stream, settings)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == ["<|more|>", "[MORE]"]
    assert "extra_special_tokens" not in written
    assert {"<|more|>", "[MORE]"} <= set(AutoTokenizer.from_pretrained(tmp_path).all_special_tokens)


@pytest.mark.parametrize("kind", [*KINDS[:3]])
def test_exported_model_gives_the_same_logits_in_transformers(export, kind):
    model, base, folder = export(**kind)
    exported = load_transformers(folder)
    ids = base.stream.sample(torch.tensor([[1, 2047, 700]]), [104, 105])[None]
    with torch.no_grad():
        expected, found = model(ids), exported(ids).logits
    assert exported.config.vocab_size == base.stream.vocab_size == 258 + 2050
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4


def test_exported_tokenizer_has_the_same_ids(export):
    from transformers import AutoTokenizer

    _, base, folder = export()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert extend_tokenizer(tokenizer, 1) == base.stream
    assert len(tokenizer) == base.stream.vocab_size


def test_exported_model_can_be_trained_further(export):
    model, base, folder = export()
    again = BaseModel.load(Model(name=str(folder), num_quantizers=1))
    assert (again.args, again.known_vocab_size, again.stream) == (base.args, base.stream.vocab_size, base.stream)
    loaded = build(again.args)
    load_hf(loaded, again.folder, again.known_vocab_size)
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        size = base.stream.vocab_size if name == "tok_embeddings.weight" else None
        assert torch.equal(p[:size], q[:size]), name


def test_exported_config_tells_the_codec_and_serves_transformers_4(export):
    _, _, folder = export(scaled=True)
    config = read_config(folder)
    keys = ("num_quantizers", "audio_tokenizer", "codec_padding", "codec_window", "resampler")
    told = {key: config[key] for key in keys}
    assert told == {
        "num_quantizers": 1,
        "audio_tokenizer": "some/codec",
        "codec_padding": "exact",
        "codec_window": "codec",
        "resampler": "torchaudio",
    }
    assert (config["rope_theta"], config["rope_scaling"]["factor"], config["torch_dtype"]) == (5_000, 8, "float32")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_export_in_several_files(make_base_model, tmp_path, monkeypatch, tokens):
    monkeypatch.setattr("torchtitan.checkpoint.hf_export.MAX_SHARD_BYTES", 50_000)
    folder = make_base_model()
    model = load(folder)
    (tmp_path / "config.json").write_text(json.dumps(model.args.to_hf()))
    write_weights(tmp_path, model.args, dict(model.named_parameters()), torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        assert (load_transformers(tmp_path)(tokens).logits - model(tokens)).abs().max() < 1e-4


def test_export_in_bf16(make_base_model, tmp_path):
    model = load(make_base_model())
    (tmp_path / "config.json").write_text(json.dumps(model.args.to_hf()))
    write_weights(tmp_path, model.args, dict(model.named_parameters()), torch.bfloat16)
    config = read_config(tmp_path)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    with SafetensorsFolder(tmp_path) as files:
        assert files.read("model.norm.weight", (slice(None),)).dtype == torch.bfloat16


# --- base models


def test_base_model_is_extended(make_base_model):
    base = BaseModel.load(Model(name=str(make_base_model()), num_quantizers=2))
    assert (base.known_vocab_size, base.stream.base_size) == (258, 258)
    assert base.args.vocab_size == base.stream.vocab_size == 258 + 2 * 2048 + 2


def test_debug_flavour_takes_only_the_tokenizer(make_base_model):
    settings = Model(name=str(make_base_model()), num_quantizers=2, flavor="debug", pretrained=False)
    base = BaseModel.load(settings)
    assert base.args == Llama3Args(vocab_size=258 + 2 * 2048 + 2)


def test_debugmodel_has_the_sizes_of_torchtitan(make_base_model):
    settings = Model(name=str(make_base_model()), num_quantizers=1, flavor="debugmodel", pretrained=False)
    args = BaseModel.load(settings).args
    # 6 layers: 4 square projections for 16 heads of 16, 3 of 256 x 768, 2 norms; then a norm, an embedding and a head.
    assert (args.dim, args.n_heads, args.n_kv_heads) == (256, 16, 16)
    assert args.num_params == 6 * (4 * 256**2 + 3 * 256 * 768 + 2 * 256) + 256 + 2 * (258 + 2048 + 2) * 256


def test_speech_model_of_another_q_is_refused_by_name(export):
    _, _, folder = export()
    with pytest.raises(UserError, match="has audio tokens for 1 quantizers, not 4"):
        BaseModel.load(Model(name=str(folder), num_quantizers=4))


def test_folder_without_tokenizer_is_refused(make_base_model, tmp_path):
    (tmp_path / "config.json").write_text((make_base_model() / "config.json").read_text())
    with pytest.raises(UserError, match="no tokenizer could be loaded from there"):
        BaseModel.load(Model(name=str(tmp_path)))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "plain"])
def test_missing_base_model_is_refused(name):
    with pytest.raises(UserError, match="there is no such folder"):
        BaseModel.load(Model(name=name))
