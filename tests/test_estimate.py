"""The estimate of a run against what can be measured without a GPU."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from scripts import estimate as script
from tests.conftest import ROOT, launch
from torchtitan import train
from torchtitan.checkpoint.manager import find_checkpoint, read_state
from torchtitan.components.optimizer import build_optimizer, optimizer_tensors
from torchtitan.config.job_config import ActivationCheckpoint, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.estimate import (
    MODEL_SIZES,
    block_activations,
    built_in_size,
    checkpoint_bytes,
    count_parameters,
    estimate,
    find_gpu,
    flops,
    kept_activations,
    memory,
    rank_parameters,
    traffic,
)
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.model import TransformerBlock
from torchtitan.models.llama3.parallel_model import ParallelModel
from torchtitan.models.llama3.weights import init_random
from torchtitan.tools.errors import ConfigError, UserError

SMALL = Llama3Args(301, 64, 4, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=96)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_parameters_are_those_of_transformers(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    args = built_in_size(size, 4)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**args.to_hf()))
    assert count_parameters(args)["total"] == sum(p.numel() for p in theirs.parameters())


def test_the_published_size():
    assert round(count_parameters(built_in_size("llm-jp/Llama-Mimi-1.3B", 4))["total"] / 1e9, 4) == 1.2526


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_states_are_counted_exactly(tied):
    args = replace(SMALL, tied=tied)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        config = JobConfig()
        config.training.mixed_precision_param = "float32"
        model = ParallelModel(config, args, ParallelDims(), torch.device("cpu"))
        init_random(model, 0)
        optimizer = build_optimizer(model, config.optimizer)
        states = dict(optimizer_tensors(model, optimizer))
    finally:
        dist.destroy_process_group()
    own = rank_parameters(args, args.n_layers)
    assert own.kept == sum(p.numel() for _, p in model.weights())
    assert own.tensors == len(list(model.weights()))
    assert 2 * own.kept + own.tensors == sum(t.numel() for t in states.values())


def saved_bytes(block: TransformerBlock, rows: int, length: int, dtype: torch.dtype) -> int:
    """Storages that autograd keeps of a block, without its weights and the rotary tables."""
    x = torch.randn(rows, length, block.attention.wq.in_features, dtype=dtype, requires_grad=True)
    angles = torch.zeros(length, block.attention.head_dim, dtype=dtype)
    ignored = {p.untyped_storage().data_ptr() for p in block.parameters()} | {angles.untyped_storage().data_ptr()}
    held: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x, angles, angles)
    found = sum(size for place, (size, _) in held.items() if place not in ignored)
    del out
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("args", "rows", "length"),
    [
        (SMALL, 2, 32),
        (Llama3Args(300, 256, 1, n_heads=4, n_kv_heads=4, head_dim=64, hidden_dim=512), 3, 128),
        (Llama3Args(300, 512, 1, n_heads=8, n_kv_heads=2, head_dim=64, hidden_dim=1536), 1, 256),
    ],
)
def test_activations_of_a_block(args, rows, length, dtype):
    block = TransformerBlock(args).to(dtype)
    expected = block_activations(args, rows, length, dtype.itemsize, cuda=False)
    assert saved_bytes(block, rows, length, dtype) == pytest.approx(expected, rel=0.05)


def test_activations_under_checkpointing():
    """A block that is computed again keeps its input [2, 32, 64] in fp32; every second one keeps half of both."""
    config = JobConfig()
    kept = {}
    for mode in (ActivationCheckpoint("none"), ActivationCheckpoint("full"), ActivationCheckpoint("selective", "2")):
        config.activation_checkpoint = mode
        kept[mode.mode] = kept_activations(SMALL, config, 2, 32, 4, 4, cuda=False)[0]
    assert kept["full"] == 4 * 2 * 32 * 64 * 4
    assert kept["selective"] == (kept["none"] + kept["full"]) / 2


def test_size_of_a_checkpoint(arguments, tmp_path):
    launch(arguments(tmp_path), 1)
    step = find_checkpoint(tmp_path / "run")
    args = Llama3Args(**read_state(step)["model_args"])
    on_disk = sum(path.stat().st_size for path in step.glob("*.distcp"))
    assert on_disk == pytest.approx(checkpoint_bytes(args), rel=0.05)  # torch's own header for each tensor


def test_flops():
    args = built_in_size("1.3B", 4)
    config = JobConfig()
    plain = flops(args, config)
    # Six for each weight (the tied embedding is one, as the head) and twelve a layer, channel and position.
    assert plain["model"] == plain["hardware"] == pytest.approx(6 * 1.2526e9 + 12 * 16 * 2048 * 1024, rel=1e-4)
    config.activation_checkpoint.mode = "full"
    assert plain["model"] * 1.2 < flops(args, config)["hardware"] < plain["model"] * 4 / 3
    config.training.audio_head = True
    assert 0.78 < flops(args, config)["model"] / plain["model"] < 0.82


def test_memory_falls_with_what_saves_it():
    args, config = built_in_size("8B", 4), JobConfig()
    config.training.local_batch_size = 4

    def total(num_gpus: int = 8, **changes: object) -> int:
        changed = JobConfig()
        changed.training.local_batch_size = 4
        for key, value in changes.items():
            section, name = key.split("__")
            setattr(getattr(changed, section), name, value)
        return memory(args, changed, num_gpus)["total"]

    plain = total()
    assert total(64) < plain
    assert total(activation_checkpoint__mode="full") < plain
    assert total(training__enable_cpu_offload=True) < plain
    assert total(training__local_batch_size=2) < plain
    assert total(parallelism__tensor_parallel_degree=8) < plain
    assert total(parallelism__data_parallel_replicate_degree=8) > plain


def test_one_gpu_sends_nothing():
    args, config = built_in_size("1.3B", 4), JobConfig()
    assert traffic(args, config, 1) == {}
    two, eight = (sum(traffic(args, config, count).values()) for count in (2, 8))
    assert eight == pytest.approx(two * (7 / 8) / (1 / 2), rel=0.01)


def test_what_does_not_fit_comes_with_changes_by_which_it_does():
    args, config, gpu = built_in_size("1.3B", 4), JobConfig(), find_gpu("H100")
    config.training.local_batch_size = 64
    found = estimate(args, config, 1, gpu)
    assert not found["memory"]["fits"]
    assert [line.split(" (")[0] for line in found["advice"]] == [
        'activation_checkpoint.mode = "full"',
        "training.local_batch_size = 32",
    ]
    for section, name, value in (("activation_checkpoint", "mode", "full"), ("training", "local_batch_size", 32)):
        changed = copy.deepcopy(config)
        setattr(getattr(changed, section), name, value)
        assert estimate(args, changed, 1, gpu)["memory"]["fits"]
    assert estimate(args, config, 1, find_gpu("RTX 4090"))["advice"] == []  # no single change would do


@pytest.mark.parametrize("name", ["h200", "H100-SXM", "A100 80GB", "nvidia b200"])
def test_gpus_are_found(name):
    assert find_gpu(name).flops > 3e14


def test_wrong_input():
    with pytest.raises(UserError, match="known are B200, H200"):
        find_gpu("V100")
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 3
    with pytest.raises(ConfigError, match="must multiply to the number of ranks"):
        estimate(built_in_size("1.3B", 4), config, 8, find_gpu("H100"))


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/estimate.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_script(tmp_path):
    file = tmp_path / "estimate.json"
    config = "config/llama3_2_1b_peoples_speech.toml"
    done = run(config, "--gpus", "8", "--gpu", "H200", "--json", str(file), "--training.steps", "100")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["run"]["steps"] == 100
    assert f"{found['parameters']['total']:,}" in done.stdout
    done = run(config, "--gpu", "Voodoo")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --gpu Voodoo: its data sheet is not known")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (("--mfu", "2"), "--mfu above 0"),
        (("--training.stepz", "2"), "did you mean training.steps"),
        (("--parallelism.tensor_parallel_degree", "16"), "must multiply"),
    ],
)
def test_wrong_options(monkeypatch, wrong, sentence):
    monkeypatch.setattr(sys, "argv", ["estimate.py", str(ROOT / "config" / "llama3_2_1b.toml"), *wrong])
    with pytest.raises(UserError, match=sentence):
        script.main()


def test_the_script_takes_local_models(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["estimate.py", "config/debug.toml", "--gpus", "1"])
    script.main()
    assert "it fits" in capsys.readouterr().out


def test_the_trainer_only_estimates_where_it_is_asked_to(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "32")
    options = [
        "--job.config_file",
        str(ROOT / "config" / "llama3_2_1b.toml"),
        "--job.dump_folder",
        str(tmp_path / "no"),
    ]
    options += ["--memory_estimation.enabled", "--memory_estimation.gpu"]
    assert train.main([*options, "NVIDIA A100-SXM4-40GB"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("32 x A100 40GB")
    assert "of 39.4 GiB" in said
    assert not (tmp_path / "no").exists()
    assert train.main([*options, "Voodoo"]) == 2
    assert capsys.readouterr().err.startswith("error: memory_estimation.gpu = Voodoo: its data sheet is not known")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_gpus_by_the_names_that_cuda_gives_them(name, known):
    assert find_gpu(name).name == known


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the memory of a GPU")
def test_memory_of_a_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training_step

    options = training_step.Options(size="mid", dtype="bfloat16", batch=8, steps=2, turns=1)
    peak = training_step.run_once("ours", options).peak_gib
    config = JobConfig()
    config.training.local_batch_size = 8
    assert memory(options.args(), config, 1, tokenizes=False)["allocated"] / 2**30 == pytest.approx(peak, rel=0.15)
