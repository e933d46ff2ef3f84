"""The defaults, settings files and command lines of the published llama-mimi: taken here, and what differs listed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys import DEFAULTS, RENAMED, RETIRED
from torchtitan.config_manager import ConfigManager, from_dict, run_name
from torchtitan.datasets.hf_dataset import find_source
from torchtitan.eval import benchmark, suites
from torchtitan.generation import DEFAULT_MAX_IDS
from torchtitan.rules import check_values
from torchtitan.tools.errors import ConfigError, UserError

REPOSITORY = Path(__file__).parents[1]

# The defaults of its settings.
PUBLISHED: dict[str, dict[str, Any]] = {
    "job": {
        "config_file": None,
        "dump_folder": "./torchtitan/outputs",
        "description": "default job",
        "use_for_integration_test": False,
        "print_args": False,
        "wandb_run_name": None,
    },
    "profiling": {
        "enable_profiling": False,
        "save_traces_folder": "profile_traces",
        "profile_freq": 10,
        "enable_memory_snapshot": False,
        "save_memory_snapshot_folder": "memory_snapshot",
    },
    "metrics": {
        "log_freq": 10,
        "enable_tensorboard": False,
        "disable_color_printing": False,
        "save_tb_folder": "tb",
        "save_for_all_ranks": False,
        "enable_wandb": False,
    },
    "model": {
        "name": "llama3",
        "flavor": "debugmodel",
        "converters": [],
        "print_after_conversion": False,
        "num_quantizers": 4,
        "pretrained": True,
    },
    "optimizer": {
        "name": "AdamW",
        "lr": 0.0008,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-08,
        "weight_decay": 0.1,
        "implementation": "fused",
        "early_step_in_backward": False,
    },
    "lr_scheduler": {"warmup_steps": 200, "decay_ratio": None, "decay_type": "linear", "lr_min": 0.0},
    "training": {
        "dataset": "c4_test",
        "dataset_path": None,
        "local_batch_size": 8,
        "global_batch_size": -1,
        "seq_len": 2048,
        "max_norm": 1.0,
        "steps": 10000,
        "enable_cpu_offload": False,
        "mixed_precision_param": "bfloat16",
        "mixed_precision_reduce": "float32",
        "compile": False,
        "gc_freq": 50,
        "gc_debug": False,
        "seed": None,
        "deterministic": False,
        "task": "a2a",
    },
    "validation": {
        "enabled": False,
        "dataset": "c4_validation",
        "local_batch_size": 8,
        "seq_len": 2048,
        "freq": 10,
        "steps": -1,
    },
    "evaluation": {"enable_evaluation": False, "evaluation_freq": 1000},
    "parallelism": {
        "data_parallel_replicate_degree": 1,
        "enable_compiled_autograd": False,
        "data_parallel_shard_degree": -1,
        "fsdp_reshard_after_forward": "default",
        "tensor_parallel_degree": 1,
        "disable_loss_parallel": False,
        "enable_async_tensor_parallel": False,
        "pipeline_parallel_degree": 1,
        "pipeline_parallel_split_points": [],
        "pipeline_parallel_layers_per_stage": None,
        "pipeline_parallel_schedule": "1F1B",
        "pipeline_parallel_schedule_csv": "",
        "pipeline_parallel_microbatch_size": 1,
        "context_parallel_degree": 1,
        "context_parallel_rotate_method": "allgather",
        "expert_parallel_degree": 1,
    },
    "checkpoint": {
        "enable_checkpoint": False,
        "folder": "checkpoint",
        "initial_load_path": None,
        "initial_load_model_only": True,
        "interval": 500,
        "last_save_model_only": True,
        "export_dtype": "float32",
        "create_seed_checkpoint": False,
        "async_mode": "disabled",
        "keep_latest_k": 10,
        "load_step": -1,
        "exclude_from_loading": [],
        "enable_first_step_checkpoint": False,
        "last_save_in_hf": False,
    },
    "activation_checkpoint": {
        "mode": "selective",
        "selective_ac_option": "2",
        "per_op_sac_force_recompute_mm_shapes_by_fqns": ["moe.router.gate"],
    },
    "float8": {
        "enable_fsdp_float8_all_gather": False,
        "precompute_float8_dynamic_scale_for_fsdp": False,
        "force_recompute_fp8_weight_in_bwd": False,
        "recipe_name": None,
        "filter_fqns": [],
        "emulate": False,
        "moe_fqns_prototype": [],
    },
    "mx": {"use_fp8_dim1_cast_triton_kernel": True, "recipe_name": "mxfp8", "filter_fqns": ["output"]},
    "comm": {"init_timeout_seconds": 300, "train_timeout_seconds": 100, "trace_buf_size": 20000},
    "memory_estimation": {"enabled": False, "disable_fake_mode": False},
    "fault_tolerance": {
        "enable": False,
        "process_group": "gloo",
        "process_group_timeout_ms": 10000,
        "replica_id": 0,
        "group_size": 0,
        "min_replica_size": 1,
        "semi_sync_method": None,
        "sync_steps": 5,
        "should_quantize": False,
        "fragment_sync_delay": 0,
        "fragment_update_alpha": 0.0,
    },
    "experimental": {"custom_import": "", "custom_args_module": ""},
}
# What its trainer does in any case, for which there are keys here.
FIXED = {
    "model.audio_tokenizer": "kyutai/mimi",
    "model.codec_padding": "exact",
    "model.codec_window": "full",
    "model.resampler": "ffmpeg",  # datasets from 4 on, whose torchcodec its dependencies pin; before: "soxr_hq"
    "training.max_seconds": 20.0,
    "training.long_clips": "cut",
    "training.end_cut_clips": True,
    "training.packing": "none",
    "training.audio_head": False,
}
PUBLISHED_KEYS = {f"{s}.{key}": value for s, keys in PUBLISHED.items() for key, value in keys.items()} | FIXED

# Arguments and fixed values of its scripts, by the names that they have here. Texts in <> are no single value.
SCRIPTS: dict[str, dict[str, Any]] = {
    "inference.py": {
        "model_name": "llm-jp/Llama-Mimi-1.3B",
        "audio_tokenizer": "kyutai/mimi",
        "prompt": "<an address>",
        "output": "output.wav",
        "temperature": 0.8,
        "top_k": 30,
        "top_p": "<of generation_config.json>",
        "unconstrained": True,
        "seed": None,
        "num_samples": 1,
        "device": "<cuda, else cpu>",
        "dtype": "bfloat16",
    },
    "eval/*.py": {
        "model_name": "llm-jp/Llama-Mimi-1.3B",
        "audio_tokenizer": "kyutai/mimi",
        "output_dir": "results",
        "limit": None,
        "batch_size": 1,
        "max_seconds": 20.0,
        "splits": ["train"],
        "reduction": "mean",
        "audio_end": True,
        "ties": "wrong",
        "device": "<cuda, else cpu>",
        "dtype": "float16",
    },
}


def table(first: str) -> list[list[str]]:
    """The rows of the table in docs/training.md whose first column is called so, as their cells."""
    text = (REPOSITORY / "docs" / "training.md").read_text("utf-8")
    lines = text.split(f"\n| {first} | ")[-1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def load(name: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, REPOSITORY / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- defaults


def test_the_docs_list_the_keys_whose_defaults_differ():
    kept = {RENAMED.get(key, key): value for key, value in PUBLISHED_KEYS.items() if key not in RETIRED}
    assert kept.keys() <= DEFAULTS.keys()
    assert all(PUBLISHED_KEYS[key] in retired.accepted for key, retired in RETIRED.items() if key in PUBLISHED_KEYS)
    differing = {key: value for key, value in kept.items() if DEFAULTS[key] != value}
    listed = {key.strip("`"): (published, here) for key, published, here, _ in table("key")}
    assert listed.keys() == differing.keys()

    def toml(value: Any) -> str:
        return f"`{'none' if value is None else json.dumps(value)}`"

    assert listed == {key: (toml(value), toml(DEFAULTS[key])) for key, value in differing.items()}


def test_each_difference_has_a_reason():
    assert all(row[-1] for row in [*table("key"), *table("script")])


def test_published_defaults_can_be_set():
    config = from_dict(PUBLISHED)
    assert config.optimizer.lr == 8e-4
    config.model.name, config.model.pretrained = "meta-llama/Llama-3.2-1B", False
    check_values(config)


def test_the_docs_list_the_arguments_whose_defaults_differ():
    ours: dict[str, Any] = {"inference.py": load("inference.py").Options(), "eval/*.py": benchmark.Options("speed")}
    differing = {
        (f"`{script}`", f"`--{name}`")
        for script, values in SCRIPTS.items()
        for name, value in values.items()
        if getattr(ours[script], name) != value
    }
    assert {(script, name) for script, name, *_ in table("script")} == differing
    assert ours["inference.py"].max_seconds is None and DEFAULT_MAX_IDS == 1024
    assert [one.rule.targets for one in suites.BENCHMARKS.values()] == ["all", "semantic", "semantic"]


# --- its settings files, each as the arguments that say the same

COMMON = """
    job.dump_folder=./outputs profiling.enable_profiling=false profiling.save_traces_folder=profile_trace
    profiling.profile_freq=100 metrics.log_freq=1 metrics.enable_tensorboard=true metrics.save_tb_folder=tb
    metrics.enable_wandb=true optimizer.name=AdamW optimizer.lr=3e-4 optimizer.eps=1e-8 training.local_batch_size=8
    training.seq_len=1024 training.max_norm=1.0 training.compile=false
    parallelism.data_parallel_replicate_degree=1 parallelism.data_parallel_shard_degree=-1
    parallelism.tensor_parallel_degree=1 parallelism.pipeline_parallel_degree=1 parallelism.context_parallel_degree=1
    checkpoint.enable_checkpoint=true checkpoint.folder=checkpoint checkpoint.interval=1000
    checkpoint.last_save_model_only=false checkpoint.export_dtype=float32 checkpoint.async_mode=disabled
    activation_checkpoint.mode=none activation_checkpoint.selective_ac_option=op
    float8.enable_fsdp_float8_all_gather=false float8.precompute_float8_dynamic_scale_for_fsdp=false
    float8.filter_fqns=output
"""
SPEECH = """
    model.num_quantizers=4 lr_scheduler.decay_ratio=0.2 lr_scheduler.lr_min=0.1 training.global_batch_size=1024
    training.task=a2a validation.enabled=true validation.local_batch_size=8 validation.seq_len=1024 validation.freq=100
    validation.steps=10 evaluation.enable_evaluation=false evaluation.evaluation_freq=500 checkpoint.keep_latest_k=10
"""
RUNS = {
    "Llama-3.2-1B_peoples_speech-q4-s1024": """
        model.name=meta-llama/Llama-3.2-1B lr_scheduler.warmup_steps=250 training.local_batch_size=32
        training.steps=5000 training.dataset=peoples_speech validation.dataset=librispeech_asr_test
    """,
    "Llama-3.2-1B_all-q4-s1024": """
        model.name=meta-llama/Llama-3.2-1B lr_scheduler.warmup_steps=1500 training.local_batch_size=32
        training.steps=100000 training.dataset=all validation.dataset=librispeech_asr
    """,
    "Llama-3.1-8B_all-q4-s1024": """
        model.name=meta-llama/Llama-3.1-8B lr_scheduler.warmup_steps=1500 training.local_batch_size=8
        training.steps=100000 training.dataset=all validation.dataset=librispeech_asr
    """,
}
PRESETS = {
    "debugmodel": """
        job.use_for_integration_test=true model.tokenizer_path=./tests/assets/tokenizer optimizer.lr=8e-4
        lr_scheduler.warmup_steps=2 lr_scheduler.decay_ratio=0.8 lr_scheduler.decay_type=linear lr_scheduler.lr_min=0.0
        training.seq_len=2048 training.steps=10 training.dataset=c4_test metrics.enable_tensorboard=false
        checkpoint.enable_checkpoint=false activation_checkpoint.mode=selective
        activation_checkpoint.selective_ac_option=2 validation.dataset=c4_validation validation.freq=5
    """,
    "8B": """
        model.tokenizer_path=./assets/tokenizer/Llama-3.1-8B model.num_quantizers=4 lr_scheduler.warmup_steps=200
        training.global_batch_size=256 training.steps=30000 training.dataset=libri_light checkpoint.interval=100
    """,
    "70B": """
        model.tokenizer_path=./assets/tokenizer/Llama-3.1-8B optimizer.lr=1.5e-4 lr_scheduler.warmup_steps=200
        training.seq_len=8192 training.steps=1000 training.dataset=c4 parallelism.tensor_parallel_degree=8
        checkpoint.enable_checkpoint=false checkpoint.last_save_model_only=true activation_checkpoint.mode=full
    """,
    "405B": """
        model.tokenizer_path=./assets/tokenizer/Llama-3.1-8B model.converters=float8 optimizer.lr=8e-5
        lr_scheduler.warmup_steps=600 training.local_batch_size=2 training.seq_len=8192 training.steps=3000
        training.compile=true training.dataset=c4 parallelism.tensor_parallel_degree=8
        parallelism.enable_async_tensor_parallel=true checkpoint.enable_checkpoint=false
        checkpoint.last_save_model_only=true activation_checkpoint.mode=full float8.enable_fsdp_float8_all_gather=true
        float8.precompute_float8_dynamic_scale_for_fsdp=true
    """,
}


def parse(*texts: str) -> JobConfig:
    return ConfigManager().parse_args([f"--{option}" for text in texts for option in text.split()])


@pytest.mark.parametrize("name", RUNS)
def test_its_settings_files_are_taken(name):
    config = parse(COMMON, SPEECH, RUNS[name])
    assert run_name(config) == name
    for dataset in (config.training.dataset, config.validation.dataset):
        assert find_source(dataset)


@pytest.mark.parametrize("flavor", PRESETS)
def test_presets_of_torchtitan_are_refused_with_what_to_write_instead(flavor):
    preset = [COMMON, PRESETS[flavor], "model.name=llama3", f"model.flavor={flavor}"]
    with pytest.raises(
        ConfigError, match=r'^model.name = "llama3" on the command line: .* write model.name = '
    ) as caught:
        parse(*preset)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    instead = message.split('write model.name = "')[1].split('"')[0]
    config = parse(*preset, f"model.name={instead} model.pretrained=false model.tokenizer_path=")
    assert (config.model.flavor, config.model.tokenizer_path) == (flavor, None)
    if config.training.dataset.startswith("c4"):
        with pytest.raises(UserError, match=r"unknown data set 'c4.*\[\[training.source\]\]"):
            find_source(config.training.dataset)


# --- its command lines


def test_the_command_line_of_training():
    line = "--nproc_per_node=8 --local-ranks-filter 0 --role rank --tee 3 -m torchtitan.train --job.config_file"
    file = "config/llama3_2_1b_peoples_speech.toml"
    parsed = get_args_parser().parse_args([*line.split(), file])
    assert (parsed.module, parsed.training_script) == (True, "torchtitan.train")
    option, path = parsed.training_script_args
    config = ConfigManager().parse_args([option, str(REPOSITORY / path)])
    assert run_name(config) == "Llama-3.2-1B_peoples_speech-q4-s1024"


@pytest.mark.parametrize(
    ("script", "name", "dataset"),
    [("salmon", "SALMON", "slprl/SALMon"), ("sLM21", "sLM21", "speed"), ("sStoryCloze", "sStoryCloze", "speed")],
)
def test_the_command_lines_of_evaluation(script, name, dataset, monkeypatch):
    taken: list[Any] = []
    monkeypatch.setattr(benchmark, "command", lambda *arguments: taken.append(arguments) or 0)
    for line in ("", "--model_name llm-jp/Llama-Mimi-1.3B", "--model_name llm-jp/Llama-Mimi-8B --output_dir other"):
        monkeypatch.setattr(sys, "argv", [f"eval/{script}.py", *line.split()])
        assert load(f"eval/{script}.py").main() == 0
    assert [(one.name, options.dataset) for one, options in taken] == [(name, dataset)] * 3
    assert [options.model_name[-4:] for _, options in taken] == ["1.3B", "1.3B", "i-8B"]
    assert taken[2][1].output_dir == "other"


def test_inference_without_arguments(monkeypatch):
    module, taken = load("inference.py"), []
    monkeypatch.setattr(module, "run", taken.append)
    monkeypatch.setattr(sys, "argv", ["inference.py"])
    module.main()
    assert taken == [module.Options()]


def test_conversion_without_arguments(speech_model, tmp_path, monkeypatch):
    """The last step of the published recipe goes where the evaluation's command line may name it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert_dcp_to_hf.py"])
    convert = load("scripts/convert_dcp_to_hf.py")
    run = "Llama-3.2-1B_peoples_speech-q4-s1024"
    with pytest.raises(UserError, match=f"^outputs/{run}/checkpoint/step-5000: there is no complete checkpoint"):
        convert.command()
    folder = tmp_path / "outputs" / run / "checkpoint"
    load("scripts/convert_hf_to_dcp.py").convert(str(speech_model(4)), folder).rename(folder / "step-5000")
    state = folder / "step-5000" / "train_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "step": 5000}))
    convert.command()
    assert (tmp_path / "models" / run / "config.json").is_file()
