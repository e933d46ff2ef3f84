"""Matrix products in 8 bits: emulated on the CPU, where torchao is installed; refused in one sentence elsewhere."""

import sys

import pytest
import torch
import torch.distributed as dist

from tests.test_parallel import make, microbatch
from tests.test_train import arguments, figures, launch  # noqa: F401 - a fixture
from torchtitan.config_manager import ConfigManager
from torchtitan.models import float8
from torchtitan.models.float8 import check_float8
from torchtitan.models.mx import check_mx
from torchtitan.tools.errors import ConfigError

EMULATED = ("--model.converters", "float8", "--float8.emulate")
MX = ("--model.converters", "mx", "--mx.emulate")


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        (*EMULATED, "--float8.recipe_name", "tensorwise", "--float8.force_recompute_fp8_weight_in_bwd"),
        (*EMULATED, "--float8.recipe_name", "rowwise"),
        (*EMULATED, "--float8.recipe_name", "rowwise_with_gw_hp"),
        MX,
    ],
)
def test_losses_and_gradients_are_near(one_rank, options):
    pytest.importorskip("torchao.prototype.moe_training.mxfp8_linear" if "mx" in options else "torchao")
    exact = make([], True, 0, 1).model
    eight = make([*options], True, 0, 1).model
    assert [name for name, _ in eight.weights()] == [name for name, _ in exact.weights()]
    losses = [float(model.backward(*microbatch(1, False), 1.0)) for model in (exact, eight)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    for (name, before), (_, after) in zip(exact.weights(), eight.weights(), strict=True):
        angle = torch.nn.functional.cosine_similarity(before.grad.flatten(), after.grad.flatten(), dim=0)
        assert angle > 0.95, name


@pytest.mark.parametrize(("kind", "key"), [(EMULATED, "--float8.filter_fqns"), (MX, "--mx.filter_fqns")])
def test_layers_can_be_left_out(one_rank, kind, key):
    pytest.importorskip("torchao")
    model = make([*kind, key, "attention,feed_forward"], True, 0, 1).model
    exact = make([], True, 0, 1).model
    assert model.backward(*microbatch(1, False), 1.0) == exact.backward(*microbatch(1, False), 1.0)


@pytest.mark.parametrize("options", [EMULATED, (*MX, "--training.mixed_precision_param", "bfloat16")])
def test_a_run_in_eight_bits_saves_plain_weights_and_resumes(arguments, tmp_path, options):  # noqa: F811
    pytest.importorskip("torchao.prototype.moe_training.mxfp8_linear" if "mx" in options else "torchao")
    launch(arguments(tmp_path, 1, *options, "--training.steps", "4"), 1)
    launch(arguments(tmp_path, 1, "--training.steps", "6"), 1)
    assert (6, "loss") in figures(tmp_path)


def test_without_torchao_or_the_hardware_it_is_refused(monkeypatch):
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="uv sync --extra float8"):
        check_float8(ConfigManager().parse_args(EMULATED))
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="it needs GPUs with 8-bit matrix products"):
        check_float8(ConfigManager().parse_args(["--model.converters", "float8"]))
    check_float8(ConfigManager().parse_args(EMULATED))


def test_mx_without_torchao_or_the_hardware_is_refused(monkeypatch):
    pytest.importorskip("torchao.prototype.moe_training.mxfp8_linear")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="it needs GPUs with products in MX formats"):
        check_mx(ConfigManager().parse_args(["--model.converters", "mx"]))
    check_mx(ConfigManager().parse_args(MX))
    monkeypatch.setitem(sys.modules, "torchao.prototype.moe_training", None)
    with pytest.raises(ConfigError, match="uv sync --extra float8"):
        check_mx(ConfigManager().parse_args(MX))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model.converters", "float4"], 'there are "float8" and "mx"'),
        (["--model.converters", "float8,mx"], "of which one can be chosen"),
        (["--model.converters", "float8", "--training.seq_len", "1000"], "training.seq_len .* a multiple of 16"),
        (["--model.converters", "mx", "--training.seq_len", "1040"], "training.seq_len .* a multiple of 32"),
        (["--float8.precompute_float8_dynamic_scale_for_fsdp"], "it needs float8.enable_fsdp_float8_all_gather"),
        (["--float8.enable_fsdp_float8_all_gather", "--float8.recipe_name", "rowwise"], "tensorwise"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ConfigManager().parse_args(options)
