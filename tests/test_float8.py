"""Matrix products in float8: emulated on the CPU, where torchao is installed; refused in one sentence elsewhere."""

import pytest
import torch
import torch.distributed as dist

from tests.test_parallel import make, microbatch
from tests.test_train import arguments, figures, launch  # noqa: F401 - a fixture
from torchtitan.components import float8
from torchtitan.components.float8 import check_float8
from torchtitan.config_manager import ConfigError, ConfigManager

EMULATED = ("--model.converters", "float8", "--float8.emulate")


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_losses_and_gradients_are_near(one_rank, recipe):
    pytest.importorskip("torchao")
    exact = make([], True, 0, 1).model
    eight = make([*EMULATED, "--float8.recipe_name", recipe], True, 0, 1).model
    assert [name for name, _ in eight.weights()] == [name for name, _ in exact.weights()]
    losses = [float(model.backward(*microbatch(1, False), 1.0)) for model in (exact, eight)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    for (name, before), (_, after) in zip(exact.weights(), eight.weights(), strict=True):
        angle = torch.nn.functional.cosine_similarity(before.grad.flatten(), after.grad.flatten(), dim=0)
        assert angle > 0.95, name


def test_layers_can_be_left_out(one_rank):
    pytest.importorskip("torchao")
    model = make([*EMULATED, "--float8.filter_fqns", "attention,feed_forward"], True, 0, 1).model
    exact = make([], True, 0, 1).model
    assert model.backward(*microbatch(1, False), 1.0) == exact.backward(*microbatch(1, False), 1.0)


def test_a_run_in_float8_saves_plain_weights_and_resumes(arguments, tmp_path):  # noqa: F811
    pytest.importorskip("torchao")
    launch(arguments(tmp_path, 1, *EMULATED, "--training.steps", "4"), 1)
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model.converters", "float4"], 'there is only "float8"'),
        (["--float8.precompute_float8_dynamic_scale_for_fsdp"], "it needs float8.enable_fsdp_float8_all_gather"),
        (["--float8.enable_fsdp_float8_all_gather", "--float8.recipe_name", "rowwise"], "tensorwise"),
        (["--model.converters", "mx", "--mx.no-use_fp8_dim1_cast_triton_kernel"], "no MX training"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ConfigManager().parse_args(options)
