"""Settings: where values come from, what is refused and how it is said."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys import RETIRED, TYPES
from torchtitan.config_manager import ConfigManager, explanations, from_dict, run_name, to_dict
from torchtitan.datasets.hf_dataset import Source
from torchtitan.datasets.sources import SOURCE_TYPES
from torchtitan.distributed.parallel_dims import accumulation_steps, data_parallel_degree
from torchtitan.rules import check
from torchtitan.tools.errors import ConfigError, UserError

CONFIGS = sorted((Path(__file__).parents[1] / "config").glob("*.toml"))


def parse(*argv: str) -> JobConfig:
    return ConfigManager().parse_args(list(argv))


def error(*argv: str) -> str:
    """The message that `argv` is refused with: always one line."""
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def toml(tmp_path):
    """Writes a TOML file and gives the option that reads it."""

    def write(text: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(text, "utf-8")
        return f"--job.config_file={path}"

    return write


@pytest.fixture
def here(tmp_path):
    """A config whose local files all exist."""
    return parse(f"--model.name={tmp_path}", f"--model.audio_tokenizer={tmp_path}", f"--job.dump_folder={tmp_path}")


# --- where values come from


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(toml):
    option = toml("[training]\nsteps = 100\nseq_len = 512\n")
    config = parse(option, "--training.steps", "20")
    assert config.training.steps == 20
    assert config.training.seq_len == 512
    assert config.training.local_batch_size == JobConfig().training.local_batch_size
    assert config.job.config_file == option.partition("=")[2]


def test_without_arguments_all_is_default():
    assert parse() == JobConfig()


def test_the_process_arguments_are_the_default_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--training.steps", "3"])
    assert ConfigManager().parse_args().training.steps == 3


def test_the_file_can_come_after_the_options_that_override_it(toml):
    assert parse("--training.steps", "20", toml("[training]\nsteps = 100\n")).training.steps == 20


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--metrics.enable_wandb"], True),
        (["--metrics.enable-wandb"], True),
        (["--metrics.enable_wandb=true"], True),
        (["--metrics.enable_wandb", "True"], True),
        (["--metrics.enable_wandb", "--training.steps", "3"], True),
        (["--metrics.no-enable_wandb"], False),
        (["--metrics.no_enable_wandb"], False),
        (["--metrics.no-enable-wandb"], False),
        (["--metrics.enable_wandb=false"], False),
        (["--metrics.enable_wandb", "false"], False),
        (["--metrics.enable_wandb", "--metrics.no-enable_wandb"], False),
    ],
)
def test_every_way_to_write_a_switch(toml, argv, expected):
    opposite = toml(f"[metrics]\nenable_wandb = {str(not expected).lower()}\n")
    assert parse(opposite, *argv).metrics.enable_wandb is expected


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
        (["--training.local-batch-size", "4"], "training.local_batch_size", 4),
        (["--optimizer.lr", "1e-3"], "optimizer.lr", 1e-3),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--lr_scheduler.decay_ratio", "none"], "lr_scheduler.decay_ratio", None),
        (["--training.seed=None"], "training.seed", None),
        (["--evaluation.freq", "3", "--evaluation.evaluation_freq", "4"], "evaluation.freq", 4),
        (["--evaluation.evaluation_freq", "4", "--evaluation.freq", "3"], "evaluation.freq", 3),
        (["--training.dataset_path", ""], "training.dataset_path", None),
        (["--job.description", "a = b, --c"], "job.description", "a = b, --c"),
        (["--job.description=--x"], "job.description", "--x"),
        (["--float8.filter_fqns", "output"], "float8.filter_fqns", ["output"]),
        (["--model.converters", ""], "model.converters", []),
    ],
)
def test_values_on_the_command_line(argv, key, value):
    section, name = key.split(".")
    read = getattr(getattr(parse(*argv), section), name)
    assert read == value and type(read) is type(value)


def test_a_whole_number_in_a_file_is_accepted_for_a_real_one(toml):
    max_norm = parse(toml("[training]\nmax_norm = 1\n")).training.max_norm
    assert max_norm == 1.0 and type(max_norm) is float


@pytest.mark.parametrize("key", ["training.compile", "compile.enable"])
def test_both_names_of_the_compile_switch_set_it(toml, key):
    section, name = key.split(".")
    for config in (parse(f"--{key}"), parse(toml(f"[{section}]\n{name} = true\n"))):
        assert config.training.compile
    other = {"training.compile": "--compile.no-enable", "compile.enable": "--training.no-compile"}[key]
    config = parse(toml(f"[{section}]\n{name} = true\n"), other)
    assert not config.training.compile


def test_the_compile_switch_cannot_contradict_itself(toml):
    assert "compile.enable" in error(toml("[training]\ncompile = true\n[compile]\nenable = false\n"))


# --- what is refused, and how it is said


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--training.stpes", "3"], ["training.stpes", "did you mean training.steps?"]),
        (["--trainig.steps", "3"], ["no section trainig", "did you mean training.steps?"]),
        (["--training.lr", "3"], ["training.lr", "did you mean optimizer.lr?"]),
        (["--training.no-stpes"], ["training.no_stpes"]),
        (["--training.no-steps"], ["training.no_steps"]),
        (["--xyz.abc", "3"], ["no section xyz", "--help"]),
        (["--steps", "3"], ["--steps", "--section.key"]),
        (["run.toml"], ["run.toml", "--section.key"]),
        (["-v"], ["-v", "--section.key"]),
        (["--training.steps", "3", "4"], ["4", "--section.key"]),
        (["--training.steps"], ["--training.steps", "value is missing", "whole number"]),
        (["--training.steps", "--metrics.enable_wandb"], ["--training.steps", "value is missing"]),
        (["--training.steps", "ten"], ['training.steps = "ten"', "whole number"]),
        (["--training.steps", "1.5"], ['training.steps = "1.5"', "whole number"]),
        (["--training.steps="], ["training.steps", "whole number"]),
        (["--optimizer.lr", "fast"], ['optimizer.lr = "fast"', "a number"]),
        (["--training.max_norm", "nan"], ["training.max_norm", "a number"]),
        (["--training.max_norm", "inf"], ["training.max_norm", "a number"]),
        (["--metrics.enable_wandb", "maybe"], ['metrics.enable_wandb = "maybe"', "true or false"]),
        (["--metrics.no-enable_wandb=true"], ["--metrics.no-enable_wandb=true", "no value"]),
        (["--training.task", "stt"], ['training.task = "stt"', '"a2a"', '"tts"', '"asr"']),
        (["--training.long_clips", "drop"], ['training.long_clips = "drop"', '"cut"', '"split"']),
        (["--training.packing", "best"], ['training.packing = "best"', '"none"', '"best_fit"']),
        (["--training.source", "a"], ["training.source", "on the command line", "[[training.source]] tables"]),
        (["--validation.source=[]"], ["validation.source", "on the command line", "[[validation.source]] tables"]),
        (["--optimizer.name", "SGD"], ['optimizer.name = "SGD"', '"AdamW"']),
        (["--lr_scheduler.decay_type", "exp"], ["lr_scheduler.decay_type", '"cosine"']),
        (["--model.codec_padding", "none"], ["model.codec_padding", '"exact"', '"aligned"']),
        (["--model.codec_window", "10"], ["model.codec_window", '"full"']),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(argv, parts):
    message = error(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[training]\nstpes = 3\n", ["training.stpes", "did you mean training.steps?"]),
        ("[trainig]\nsteps = 3\n", ["[trainig]", "did you mean [training]?"]),
        (
            "[model]\nseq_len = 3\n",
            ["model.seq_len", "did you mean training.seq_len or validation.seq_len or evaluation.seq_len?"],
        ),
        ("steps = 3\n", ["steps = 3", "outside of any [section]"]),
        ('[training]\nsteps = "10"\n', ['training.steps = "10"', "whole number"]),
        ("[training]\nsteps = 10.0\n", ["training.steps = 10.0", "whole number"]),
        ("[training]\nsteps = true\n", ["training.steps = true", "whole number"]),
        ("[training]\nmax_norm = true\n", ["training.max_norm = true", "a number"]),
        ("[training]\nmax_norm = nan\n", ["training.max_norm", "a number"]),
        ('[optimizer]\nlr = "3e-4"\n', ['optimizer.lr = "3e-4"', "a number"]),
        ("[training]\ncompile = 1\n", ["training.compile = 1", "true or false"]),
        ('[training]\ncompile = "false"\n', ['training.compile = "false"', "true or false"]),
        ("[training]\ndataset = 3\n", ["training.dataset = 3", "a text"]),
        ("[model]\nconverters = [1]\n", ["model.converters = [1]", "a list of names"]),
        ("[training.steps]\nx = 1\n", ["training.steps", "whole number"]),
        ("[training]\nsteps = 1979-05-27\n", ["training.steps", "whole number"]),
        ("[training]\nsteps = 0\n", ["training.steps = 0", "at least 1"]),
        ('[job]\nconfig_file = "other.toml"\n', ["job.config_file", "command line"]),
        ("[training]\nsteps 3\n", ["not valid TOML", "line 2"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(toml, text, parts):
    message = error(toml(text))
    assert all(part in message for part in [*parts, "run.toml"]), message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert "nowhere.toml" in error("--job.config_file", str(tmp_path / "nowhere.toml"))
    assert str(tmp_path) in error("--job.config_file", str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b'[job]\ndescription = "\xe9"\n')
    assert "latin.toml" in error("--job.config_file", str(tmp_path / "latin.toml"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_quantizers", "0"),
        ("model.num_quantizers", "33"),
        ("training.steps", "0"),
        ("training.local_batch_size", "0"),
        ("training.global_batch_size", "0"),
        ("training.global_batch_size", "-2"),
        ("training.seq_len", "6"),
        ("training.max_seconds", "0"),
        ("training.max_norm", "0"),
        ("training.max_norm", "-1"),
        ("training.num_workers", "-1"),
        ("training.packing_window", "0"),
        ("training.read_retries", "-1"),
        ("training.max_bad_share", "1.5"),
        ("training.seed", "-1"),
        ("training.dataset", ""),
        ("optimizer.lr", "-1"),
        ("optimizer.beta1", "1"),
        ("optimizer.eps", "0"),
        ("lr_scheduler.warmup_steps", "-1"),
        ("lr_scheduler.decay_ratio", "1.5"),
        ("lr_scheduler.lr_min", "2"),
        ("validation.steps", "0"),
        ("validation.freq", "0"),
        ("parallelism.data_parallel_shard_degree", "0"),
        ("checkpoint.interval", "0"),
        ("checkpoint.keep_latest_k", "-1"),
        ("checkpoint.load_step", "-2"),
        ("comm.init_timeout_seconds", "0"),
        ("job.wandb_run_name", "../elsewhere"),
    ],
)
def test_values_out_of_range_are_refused_by_name(key, value):
    assert error(f"--{key}", value).startswith(f"{key} = ")


def test_the_shortest_row_holds_one_frame():
    assert parse("--model.num_quantizers=8", "--training.seq_len=11").training.seq_len == 11
    assert "at least 11" in error("--model.num_quantizers=8", "--training.seq_len=10")
    assert "validation.seq_len" in error("--validation.enabled", "--validation.seq_len=6")
    assert parse("--validation.seq_len=6").validation.seq_len == 6  # nothing is validated


@pytest.mark.parametrize("key", RETIRED)
def test_a_retired_key_may_ask_for_nothing_and_is_refused_by_name_otherwise(toml, key):
    section, name = key.split(".")
    retired = RETIRED[key]
    assert key not in TYPES
    for value in retired.accepted:
        if value is not None:
            parse(toml(f"[{section}]\n{name} = {json.dumps(value)}\n"))
            parse(f"--{key}={json.dumps(value)}")
            from_dict({section: {name: value}})
    if True not in retired.accepted:
        for argv in ([f"--{key}", "7"], [toml(f"[{section}]\n{name} = 7\n")]):
            assert re.match(rf"^{key} = .*{retired.reason[:20]}", error(*argv))


def test_a_second_name_of_a_key_is_read_as_the_key(toml):
    assert parse("--evaluation.evaluation_freq", "7").evaluation.freq == 7
    assert parse(toml("[evaluation]\nevaluation_freq = 7\n")).evaluation.freq == 7
    assert "is the same setting" in error(toml("[evaluation]\nevaluation_freq = 7\nfreq = 8\n"))


def test_a_refused_value_in_a_file_can_be_taken_back_on_the_command_line(toml):
    option = toml("[parallelism]\nexpert_parallel_degree = 2\n")
    assert "run.toml" in error(option)
    assert parse(option, "--parallelism.expert_parallel_degree=1").parallelism == JobConfig().parallelism


def test_updates_in_the_backward_pass_exclude_what_needs_all_gradients():
    early = "--optimizer.early_step_in_backward"
    assert "training.max_norm = 1.0" in error(early)
    assert parse(early, "--training.max_norm=0").optimizer.early_step_in_backward
    for other in ("--parallelism.pipeline_parallel_degree=2", "--training.enable_cpu_offload"):
        message = error(early, "--training.max_norm=0", other)
        assert message.startswith(other[2:].split("=")[0]) and "early_step_in_backward" in message


def test_what_can_be_compiled():
    assert "there are model and loss" in error("--compile.components=model,optimizer")
    assert "it must name something" in error("--training.compile", "--compile.components=")
    assert parse("--training.compile", "--compile.components=loss").compile.components == ["loss"]
    backward = "--parallelism.enable_compiled_autograd"
    assert "needs training.compile" in error(backward)
    assert "needs training.compile" in error(backward, "--training.compile", "--compile.components=loss")
    assert parse(backward, "--training.compile").parallelism.enable_compiled_autograd


def test_a_compiled_backward_pass_is_for_one_rank(here):
    here.training.compile = here.parallelism.enable_compiled_autograd = True
    check(here, 1)
    with pytest.raises(ConfigError, match=r"enable_compiled_autograd = true: FSDP2.*only works on one rank"):
        check(here, 2)


# --- settings of a module from outside

OUTSIDE = """
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Training:
    my_factor: float = 0.5
    my_kind: Literal["a", "b"] = "a"


@dataclass
class Mine:
    names: list[str] = field(default_factory=list)
    on: bool = True


@dataclass
class JobConfig:
    training: Training = field(default_factory=Training)
    mine: Mine = field(default_factory=Mine)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Writes a module that can be imported, under a name of its own, and gives the option that takes it up."""

    def write(text: str) -> str:
        name = f"outside_{tmp_path.name}_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        return f"--experimental.custom_args_module={name}"

    return write


def test_a_module_from_outside_adds_settings(outside, toml):
    option = outside(OUTSIDE)
    file = toml('[training]\nmy_factor = 2\nsteps = 7\n[mine]\nnames = ["x"]\n')
    config: Any = parse(option, file, "--mine.no-on", "--training.my_kind", "b")
    assert (config.training.my_factor, config.training.my_kind, config.training.steps) == (2.0, "b", 7)
    assert (config.mine.names, config.mine.on) == (["x"], False)
    assert isinstance(config, JobConfig)
    assert "training.my_factor" in error(file)  # nothing stays behind
    default: Any = parse(option)
    assert (default.training.my_factor, default.mine.names, default.mine.on) == (0.5, [], True)
    name = option.partition("=")[2]
    from_file: Any = parse(toml(f'[experimental]\ncustom_args_module = "{name}"\n[mine]\non = false\n'))
    assert not from_file.mine.on


def test_values_of_added_settings_are_checked(outside):
    option = outside(OUTSIDE)
    assert 'mine.on = "3"' in error(option, "--mine.on", "3")
    assert "training.my_kind" in error(option, "--training.my_kind", "c")
    assert "did you mean mine.names?" in error(option, "--mine.name", "c")


def test_a_saved_config_is_read_without_the_module_that_added_to_it(outside):
    config: Any = parse(outside(OUTSIDE), "--mine.no-on", "--training.steps", "9")
    table = json.loads(json.dumps(to_dict(config)))
    assert table["mine"] == {"names": [], "on": False}
    assert table["training"]["my_factor"] == 0.5
    table["experimental"]["custom_args_module"] = "no.such.module"
    saved = from_dict(table)
    assert saved.training.steps == 9
    assert not hasattr(saved, "mine")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("class JobConfig", "class Other"), "no dataclass JobConfig"),
        (("on: bool = True", "on: bool"), "no dataclass JobConfig"),
        (("my_factor: float = 0.5", "steps: int = 3"), "this project has the key training.steps"),
        (("on: bool = True", "on: dict = field(default_factory=dict)"), "the type of mine.on"),
        (("on: bool = True", "on: list[int] = field(default_factory=list)"), "the type of mine.on"),
    ],
)
def test_modules_that_cannot_add_settings(outside, change, said):
    assert change[0] in OUTSIDE
    message = error(outside(OUTSIDE.replace(*change)))
    assert said in message and "experimental.custom_args_module" in message


def test_a_module_that_is_not_there():
    assert "cannot be imported" in error("--experimental.custom_args_module", "no.such.module")


# --- data sources


SOURCES = """
[training]
dataset = "both"

[[training.source]]
name = "books"
path = "{path}"
format = "audio"
files = ["**/*.flac"]
weight = 1
min_seconds = 0.5

[[training.source]]
name = "peoples_speech"
weight = 2.5
"""


def test_data_sources_are_tables(toml, tmp_path):
    config = parse(toml(SOURCES.format(path=tmp_path)))
    books, speech = config.training.source
    assert books == {
        "name": "books",
        "path": str(tmp_path),
        "format": "audio",
        "files": ["**/*.flac"],
        "weight": 1.0,
        "min_seconds": 0.5,
    }
    assert speech == {"name": "peoples_speech", "weight": 2.5}
    assert config.validation.source == []
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert run_name(config) == "Llama-3.2-1B_both-q4-s1024"


def test_runs_on_other_sources_have_other_names(toml):
    text = '[[training.source]]\npath = "./my/speech/"\n[[training.source]]\nname = "emilia"\n'
    assert run_name(parse(toml(text))) == "Llama-3.2-1B_speech+emilia-q4-s1024"


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ('paht = "."', ["no key paht", "did you mean path?"]),
        ('zzz = "."', ["no key zzz", "its keys are name, path, format"]),
        ("path = 3", ["path = 3", "a text or none"]),
        ('path = "."\nformat = "mp3"', ['format = "mp3"', '"audio"']),
        ('path = "."\nfiles = [1]', ["files = [1]", "a list of names"]),
        ('path = "."\nweight = "2"', ['weight = "2"', "a number"]),
        ('path = "."\nmin_seconds = true', ["min_seconds = true", "a number"]),
        ('path = "."\nweight = 0', ["weight = 0.0", "above 0"]),
        ('path = "."\nmax_seconds = 0.0', ["max_seconds = 0.0", "above 0"]),
        ('path = "."\nmin_seconds = -1', ["min_seconds = -1.0", "at least 0"]),
        ('path = "."\nmin_seconds = 3\nmax_seconds = 2', ["min_seconds = 3.0", "above max_seconds = 2.0"]),
        ('path = "."\naudio = ""', ['audio = ""', "must not be empty"]),
        ('split = "train"', ["path must say"]),
    ],
)
@pytest.mark.parametrize("section", ["training", "validation"])
def test_wrong_source_tables_are_refused_in_one_line(toml, section, table, parts):
    message = error(toml(f'[[{section}.source]]\npath = "."\n[[{section}.source]]\n{table}\n'))
    assert message.startswith(f"[[{section}.source]] 2")
    assert all(part in message for part in parts), message


def test_sources_that_contradict_other_settings(toml):
    two = '[[training.source]]\npath = "a/b"\nweight = 1\n[[training.source]]\npath = "c/d"\n'
    assert error(toml(two)).startswith("[[training.source]] 2: weight is missing")
    both = '[training]\ndataset_path = "a/b"\n[[training.source]]\npath = "a/b"\n'
    assert error(toml(both)).startswith('training.dataset_path = "a/b": the [[training.source]] tables say')
    for wrong in ('[training.source]\npath = "a/b"\n', "[training]\nsource = 3\n", '[training]\nsource = ["a/b"]\n'):
        assert "begins with [[training.source]]" in error(toml(wrong))
    with pytest.raises(ConfigError, match=r"\[\[training.source\]\] 1.*no key paht"):
        from_dict({"training": {"source": [{"paht": "a/b"}]}})


def test_sources_must_be_there(here, tmp_path):
    here.training.source = [{"path": str(tmp_path)}, {"path": "owner/name"}, {"name": "peoples_speech"}]
    check(here, 1)
    here.training.source.append({"path": "./no-such-folder"})
    with pytest.raises(ConfigError, match=r"^\[\[training.source\]\] 4: path = \"./no-such-folder\": this is neither"):
        check(here, 1)
    here.training.source = [{"name": "mine"}]
    with pytest.raises(ConfigError, match=r"^\[\[training.source\]\] 1: name = 'mine' is not a built-in"):
        check(here, 1)
    here.training.source = []
    here.validation.source = [{"path": "./no-such-folder"}]
    check(here, 1)  # nothing is validated
    here.validation.enabled = True
    with pytest.raises(ConfigError, match=r"^\[\[validation.source\]\] 1: path"):
        check(here, 1)


def test_a_built_in_source_that_must_be_downloaded_says_how(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here.training.source = [{"name": "libri_light"}]
    with pytest.raises(UserError, match=r"\./data/libri_light: there is no such .*download small.tar"):
        check(here, 1)


def test_settings_that_would_have_no_effect_are_refused():
    assert "last_save_model_only" in error("--checkpoint.export_dtype=bfloat16")
    accepted = parse("--checkpoint.export_dtype=bfloat16", "--checkpoint.last_save_model_only")
    assert accepted.checkpoint.export_dtype == "bfloat16"
    assert "enable_checkpoint" in error("--checkpoint.load_step=5")
    assert "enable_checkpoint" in error("--checkpoint.initial_load_path=/tmp")


def test_flavors():
    assert "pretrained" in error("--model.flavor=debug")
    assert parse("--model.flavor=debug", "--model.no-pretrained").model.flavor == "debug"
    assert parse("--model.flavor=1B", "--model.name=meta-llama/Llama-3.2-1B").model.flavor == "1B"
    assert "not of that size" in error("--model.flavor=3B", "--model.name=llm-jp/Llama-Mimi-1.3B")
    assert "model.flavor" in error("--model.flavor=tiny")


# --- arithmetic and files, which depend on the machine


@pytest.mark.parametrize(
    ("rows", "world_size", "steps"), [(-1, 1, 1), (-1, 8, 1), (8, 1, 1), (64, 8, 1), (64, 1, 8), (64, 2, 4)]
)
def test_accumulation_follows_from_the_global_batch(here, rows, world_size, steps):
    here.training.local_batch_size = 8
    here.training.global_batch_size = rows
    check(here, world_size)
    assert accumulation_steps(here, world_size) == steps


@pytest.mark.parametrize(("rows", "world_size", "near"), [(4, 1, "8"), (24, 2, "16 or 32"), (100, 3, "96 or 120")])
def test_an_impossible_global_batch_is_refused_with_what_would_do(here, rows, world_size, near):
    here.training.local_batch_size = 8
    here.training.global_batch_size = rows
    with pytest.raises(ConfigError, match=rf"training.global_batch_size = {rows}.*such as {near}"):
        check(here, world_size)


def test_degrees_multiply_to_the_number_of_ranks(here):
    assert data_parallel_degree(here, 6) == 6
    here.parallelism.data_parallel_shard_degree = 4
    assert data_parallel_degree(here, 4) == 4
    with pytest.raises(ConfigError, match=r"parallelism.data_parallel_shard_degree = 4: there are 6 ranks"):
        check(here, 6)
    here.parallelism.data_parallel_shard_degree = -1
    here.parallelism.tensor_parallel_degree = 2
    assert data_parallel_degree(here, 6) == 3
    with pytest.raises(ConfigError, match=r"multiply to 2"):
        data_parallel_degree(here, 5)


@pytest.mark.parametrize("key", ["model.name", "model.audio_tokenizer", "training.dataset_path"])
@pytest.mark.parametrize("value", ["/no/such/folder", "./no-such-folder", "../no", "~/no", "no-slash", "a/b/c"])
def test_local_folders_must_exist(here, key, value):
    section, name = key.split(".")
    setattr(getattr(here, section), name, value)
    with pytest.raises(ConfigError, match=f'^{key} = "{value}"'):
        check(here, 1)


def test_hub_names_are_left_to_the_hub(here):
    here.model.name = "meta-llama/Llama-3.2-1B"
    here.model.audio_tokenizer = "kyutai/mimi"
    here.training.dataset_path = "MLCommons/peoples_speech"
    check(here, 1)


def test_other_files_must_exist(here, tmp_path):
    here.validation.dataset_path = "/no/such/folder"
    check(here, 1)  # nothing is validated
    here.validation.enabled = True
    with pytest.raises(ConfigError, match=r"validation.dataset_path"):
        check(here, 1)
    here.validation.enabled = False
    here.checkpoint.enable_checkpoint = True
    here.checkpoint.initial_load_path = str(tmp_path / "step-3")
    with pytest.raises(ConfigError, match=r"checkpoint.initial_load_path.*no such folder"):
        check(here, 1)
    (tmp_path / "step-3").mkdir()
    check(here, 1)
    (tmp_path / "file").touch()
    here.job.dump_folder = str(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"job.dump_folder"):
        check(here, 1)


# --- the files that ship, old files, names, and the manual


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_are_accepted(path):
    config = parse("--job.config_file", str(path))
    assert accumulation_steps(config, 8) >= 1


def test_the_public_recipe():
    config = parse("--job.config_file", str(CONFIGS[0].parent / "llama3_2_1b_peoples_speech.toml"))
    assert accumulation_steps(config, 8) == 4
    assert run_name(config) == "Llama-3.2-1B_peoples_speech-q4-s1024"


OLD_FILE = """
[job]
dump_folder = "./outputs"
description = "an older run"
use_for_integration_test = false

[profiling]
enable_profiling = false
save_traces_folder = "profile_trace"
profile_freq = 100

[metrics]
log_freq = 1
enable_tensorboard = true
save_tb_folder = "tb"
enable_wandb = true

[model]
name = "meta-llama/Llama-3.1-8B"
flavor = "8B"
tokenizer_path = ""
num_quantizers = 4
converters = []

[optimizer]
name = "AdamW"
lr = 3e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 1500
decay_ratio = 0.2
lr_min = 0.1

[training]
local_batch_size = 8
global_batch_size = 1024
seq_len = 1024
max_norm = 1.0
steps = 100_000
compile = false
dataset = "all"
task = "a2a"

[validation]
enabled = true
dataset = "librispeech_asr"
local_batch_size = 8
seq_len = 1024
freq = 100
steps = 10

[evaluation]
enable_evaluation = false
evaluation_freq = 500

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
pipeline_parallel_degree = 1
context_parallel_degree = 1
expert_parallel_degree = 1

[checkpoint]
enable_checkpoint = true
folder = "checkpoint"
interval = 1000
last_save_model_only = false
export_dtype = "float32"
async_mode = "disabled"
keep_latest_k = 10

[activation_checkpoint]
mode = "none"
selective_ac_option = "op"

[float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]

[mx]
recipe_name = "mxfp8"
filter_fqns = ["output"]

[fault_tolerance]
enable = false
"""


def test_an_older_file_is_accepted_unchanged(toml):
    config = parse(toml(OLD_FILE))
    assert config.training.dataset == "all" and config.validation.dataset == "librispeech_asr"
    assert accumulation_steps(config, 64) == 2


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "Llama-3.2-1B_peoples_speech-q4-s1024"),
        (["--model.no-pretrained", "--model.num_quantizers=8"], "Llama-3.2-1B_peoples_speech-q8-s1024-random"),
        (["--model.name=./models/small/", "--training.seq_len=512"], "small_peoples_speech-q4-s512"),
        (["--job.wandb_run_name=mine", "--model.no-pretrained"], "mine"),
    ],
)
def test_the_run_is_named_after_its_settings(argv, name):
    assert run_name(parse(*argv)) == name


def test_a_saved_config_is_read_back_equal(toml):
    config = parse(toml(OLD_FILE), "--training.seed=none", "--training.dataset_path=/data", "--training.compile")
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_saved_config_may_lack_keys_but_not_have_unknown_ones():
    assert from_dict({"training": {"steps": 3}}).training.steps == 3
    with pytest.raises(ConfigError, match=r"training.stpes"):
        from_dict({"training": {"stpes": 3}})


def test_configs_do_not_share_lists():
    first, second = JobConfig(), JobConfig()
    first.float8.filter_fqns.append("output")
    assert second.float8.filter_fqns == []


def test_every_key_is_explained():
    texts = explanations()
    assert list(texts) == list(TYPES)
    assert all(text.strip().endswith(".") for text in texts.values())


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for key, text in explanations().items():
        assert (f"[[{key}]] (" if key.endswith(".source") else f"--{key} (") in printed
        assert " ".join(text.split()) in printed


def test_help_explains_every_key_of_a_source(capsys):
    texts = explanations({"source": Source})
    assert [key.split(".")[1] for key in texts] == list(SOURCE_TYPES)
    with pytest.raises(SystemExit):
        parse("--help")
    printed = " ".join(capsys.readouterr().out.split())
    for key, text in texts.items():
        assert f" {key.split('.')[1]} (" in printed
        assert text.endswith(".") and " ".join(text.split()) in printed
