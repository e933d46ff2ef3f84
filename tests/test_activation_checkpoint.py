"""Activation checkpointing changes what is kept, not what comes out."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.config_manager import ConfigManager
from torchtitan.models.llama3.activation_checkpoint import checkpoint_activations
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.parallelize import compile_blocks
from torchtitan.models.llama3.weights import init_random, materialize
from torchtitan.tools.errors import ConfigError

ARGS = Llama3Args(vocab_size=200, dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=128)
NONE, FULL, OP = (ActivationCheckpoint(mode) for mode in ("none", "full", "selective"))
SECOND = ActivationCheckpoint("selective", "2")
FORCED = ActivationCheckpoint("selective", "op", ["feed_forward"])


def make(config: ActivationCheckpoint) -> Llama3:
    with torch.device("meta"):
        model = Llama3(ARGS)
    checkpoint_activations(model, config)
    materialize(model, torch.device("cpu"), 32)
    init_random(model, 1)
    return model.train()


def batch(packed: bool) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(200, (2, 32), generator=random) for _ in range(2))
    if not packed:
        return tokens, targets
    positions = torch.arange(32).repeat(2, 1)
    positions[:, 11:] -= 11
    return tokens, targets, positions


def step(model: Llama3, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(*batch(packed))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [FULL, OP, SECOND, FORCED])
def test_losses_and_gradients_are_the_same(config, packed):
    loss, gradients = step(make(NONE), packed)
    found_loss, found = step(make(config), packed)
    assert found_loss == loss
    assert found.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(found[name], gradients[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("config", [FULL, OP, SECOND])
def test_compiled_blocks_give_the_same(config):
    loss, gradients = step(make(NONE), True)
    model = make(config)
    compile_blocks(model)
    found_loss, found = step(model, True)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    for name in gradients:
        torch.testing.assert_close(found[name], gradients[name], rtol=1e-4, atol=1e-4)


class Count(TorchDispatchMode):
    """How often an operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(config: ActivationCheckpoint) -> dict[str, int]:
    model = make(config)
    with Count() as count:
        model(*batch(False)).backward()
    return count.counts


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def test_what_is_computed_again():
    blocks = ARGS.n_layers
    counts = {name: counted(c) for name, c in (("none", NONE), ("full", FULL), ("op", OP), ("second", SECOND))}
    assert {name: c[ATTENTION] for name, c in counts.items()} == {
        "none": blocks,
        "full": 2 * blocks,
        "op": blocks,
        "second": blocks + blocks // 2,
    }
    products = {name: c["mm"] - counts["none"]["mm"] for name, c in counts.items()}
    # Of the seven products of a block the last one, w2, is not needed again in the backward pass.
    assert products["none"] == 0
    assert products["full"] == 2 * products["second"]
    assert 0 < products["op"] < products["full"]


def test_named_layers_are_always_computed_again():
    assert counted(FORCED)["mm"] > counted(OP)["mm"]


def kept_bytes(config: ActivationCheckpoint) -> int:
    model = make(config)
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*batch(False))
    del loss
    return sum(size for place, size in held.items() if place not in weights)


def test_less_is_kept():
    assert kept_bytes(FULL) < kept_bytes(SECOND) < kept_bytes(NONE)


def test_names_stay():
    assert [name for name, _ in make(OP).named_parameters()] == [name for name, _ in make(NONE).named_parameters()]


@pytest.mark.parametrize("option", ["0", "ops", "-1", "1.5"])
def test_other_options_are_refused(option):
    with pytest.raises(ConfigError, match="a whole number from 1 on"):
        ConfigManager().parse_args(["--activation_checkpoint.selective_ac_option", option])
