"""The trainer from its command line: resuming, conversion, continuing a converted model, refusals."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import CUT, ROOT, STEPS, figures, launch, require_devices
from torchtitan import train
from torchtitan.checkpoint.manager import find_checkpoint, load_full_parameters, read_state
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.model import Llama3


def test_tests_of_more_ranks_than_gpus_are_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(pytest.skip.Exception, match="2 ranks take a GPU each, and there are 1"):
        launch([], 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_devices(2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(arguments, tmp_path, ranks):
    whole = tmp_path / "whole"
    launch(arguments(whole, ranks), ranks)
    # The same run as if it had been cut off after the first checkpoint.
    cut = tmp_path / "cut"
    shutil.copytree(whole / "run" / "checkpoint" / f"step-{CUT}", cut / "run" / "checkpoint" / f"step-{CUT}")
    launch(arguments(cut, ranks), ranks)

    expected = {key: value for key, value in figures(whole).items() if key[0] > CUT}
    assert len(expected) == (STEPS - CUT) * 3 + 2 * 2
    assert figures(cut) == expected
    before, after = (load_full_parameters(find_checkpoint(folder / "run")) for folder in (whole, cut))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_converted_model_gives_the_trainers_logits(arguments, tmp_path, mimi_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from torchtitan.audio.token_stream import TokenStream
    from torchtitan.checkpoint.hf_export import export_checkpoint as convert

    launch(arguments(tmp_path), 1)
    checkpoint = find_checkpoint(tmp_path / "run")
    folder = convert(checkpoint, tmp_path / "hf", torch.float32)

    args = Llama3Args(**read_state(checkpoint)["model_args"])
    ours = Llama3(args).eval()
    ours.rotary.reset(128, torch.device("cpu"))
    ours.load_state_dict(load_full_parameters(checkpoint), strict=False)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert theirs.config.vocab_size == len(tokenizer) == args.vocab_size
    assert TokenStream.from_tokenizer(tokenizer).num_quantizers == theirs.config.num_quantizers == 4
    assert theirs.config.audio_tokenizer == str(mimi_folder)
    ids = torch.randint(0, args.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_model_with_audio_tokens_is_continued_not_extended(arguments, tmp_path):
    from torchtitan.checkpoint.hf_export import export_checkpoint as convert

    launch(arguments(tmp_path), 1)
    folder = convert(tmp_path / "run", tmp_path / "hf", torch.float32)
    # With a rate of nearly 0 the first step reports the loss of the loaded weights.
    more = ("--model.name", str(folder), "--training.steps", "1", "--optimizer.lr", "1e-20")
    launch(arguments(tmp_path / "further", 1, *more), 1)
    after = figures(tmp_path / "further")[(1, "validation/loss")]
    assert after == pytest.approx(figures(tmp_path)[(STEPS, "validation/loss")], abs=1e-5)
    assert read_state(find_checkpoint(tmp_path / "further" / "run"))["model_args"]["vocab_size"] == 258 + 8192 + 2


def test_weights_of_another_run_are_a_start_not_a_resumption(arguments, tmp_path):
    launch(arguments(tmp_path), 1)
    start = ("--checkpoint.initial_load_path", str(tmp_path / "run" / "checkpoint"), "--optimizer.lr", "1e-20")
    launch(arguments(tmp_path / "new", 1, *start, "--training.steps", "1"), 1)
    result = figures(tmp_path / "new")
    assert result[(1, "validation/loss")] == pytest.approx(figures(tmp_path)[(STEPS, "validation/loss")], abs=1e-5)


def test_the_loss_falls(arguments, tmp_path):
    launch(arguments(tmp_path, 1, "--optimizer.lr", "3e-3", "--training.steps", "20"), 1)
    losses = figures(tmp_path)
    assert losses[(20, "validation/loss")] < losses[(2, "validation/loss")] - 0.5


def test_accumulation_does_not_change_the_update(arguments, tmp_path):
    """The same rows in one microbatch of 4 and in two of 2, of different lengths."""
    launch(arguments(tmp_path / "two"), 1)
    launch(arguments(tmp_path / "one", 1, "--training.local_batch_size", "4"), 1)
    two, one = figures(tmp_path / "two"), figures(tmp_path / "one")
    assert two.keys() == one.keys()
    assert all(two[key] == pytest.approx(one[key], rel=1e-4) for key in two)


@pytest.mark.parametrize(
    "options",
    [
        ("--activation_checkpoint.mode", "full"),
        ("--optimizer.implementation", "foreach"),
        ("--optimizer.implementation", "for-loop"),
        ("--training.deterministic",),
        ("--training.num_workers", "0"),
    ],
)
def test_what_must_not_change_the_losses(arguments, tmp_path, options):
    launch(arguments(tmp_path / "plain"), 1)
    try:
        launch(arguments(tmp_path / "other", 1, *options), 1)
    finally:
        torch.use_deterministic_algorithms(False)
    plain, other = figures(tmp_path / "plain"), figures(tmp_path / "other")
    assert all(plain[key] == pytest.approx(other[key], rel=1e-4) for key in plain)


def test_bf16_stays_close_to_fp32(arguments, tmp_path):
    launch(arguments(tmp_path / "fp32"), 1)
    launch(arguments(tmp_path / "bf16", 1, "--training.mixed_precision_param", "bfloat16"), 1)
    fp32, bf16 = figures(tmp_path / "fp32"), figures(tmp_path / "bf16")
    assert all(fp32[key] == pytest.approx(bf16[key], rel=0.02) for key in fp32 if key[1] == "validation/loss")
    assert all(
        t.dtype == torch.float32 for t in load_full_parameters(find_checkpoint(tmp_path / "bf16" / "run")).values()
    )


def test_figures_reach_tensorboard_and_offline_wandb_across_a_resume(arguments, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    both = ("--metrics.enable_tensorboard", "--metrics.enable_wandb")
    launch(arguments(tmp_path, 1, *both), 1)
    shutil.rmtree(tmp_path / "run" / "checkpoint" / f"step-{STEPS}")
    launch(arguments(tmp_path, 1, *both), 1)
    events = EventAccumulator(str(tmp_path / "run" / "tb" / "rank0"))
    events.Reload()
    assert {"loss", "grad_norm", "validation/loss", "data_wait_share", "padding_share"} <= set(events.Tags()["scalars"])
    runs = {path.name.rsplit("-", 1)[1] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert len(runs) == 1


def test_keep_latest_k_keeps_the_last_ones(arguments, tmp_path):
    launch(arguments(tmp_path, 1, "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "2"), 1)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoint").iterdir()) == ["step-5", "step-6"]


def test_a_last_checkpoint_of_weights_alone(arguments, tmp_path):
    only = ("--checkpoint.last_save_model_only", "--checkpoint.export_dtype", "bfloat16")
    launch(arguments(tmp_path, 1, *only), 1)
    assert read_state(find_checkpoint(tmp_path / "run"))["model_only"]
    assert train.main(arguments(tmp_path, 1, *only, "--training.steps", "9")) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--training.stepz", "3"), "did you mean training.steps"),
        (("--training.steps", "many"), "expected a whole number"),
        (("--training.global_batch_size", "3"), "multiple"),
        (("--training.dataset_path", "./nowhere"), "./nowhere"),
        (("--training.dataset", "nothing"), "unknown data set"),
        (("--model.audio_tokenizer", "./nowhere"), "./nowhere"),
        (("--model.num_quantizers", "9"), "9 quantizers"),
        (("--checkpoint.load_step", "7"), "step 7"),
        (("--training.seq_len", "100000"), "rows of at most"),
        (("--job.dump_folder", "/proc/nowhere"), "cannot be created"),
        (("--profiling.enable_memory_snapshot",), "CUDA"),
        (("--experimental.custom_import", "no.such.module"), "cannot be imported"),
        (("--model.tokenizer_path", "./nowhere"), "no tokenizer could be loaded"),
    ],
)
def test_wrong_input_is_one_line_before_any_process_group(arguments, tmp_path, capfd, monkeypatch, options, sentence):
    monkeypatch.setattr(train, "init_distributed", lambda *_: pytest.fail("a process group was opened"))
    assert train.main(arguments(tmp_path, 1, *options)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert sentence in lines[0]


@pytest.mark.parametrize("packing", [pytest.param("none", marks=pytest.mark.slow), "best_fit"])
def test_another_number_of_ranks_goes_on_with_the_very_next_samples(arguments, tmp_path, packing):
    """Two ranks, and one that goes on from their checkpoint: the losses and samples of one rank that did it all."""
    both = ("--training.global_batch_size", "4", "--metrics.save_samples", "--training.packing", packing)
    one, two, changed = (tmp_path / name for name in ("one", "two", "changed"))
    launch(arguments(one, 1, *both), 1)
    launch(arguments(two, 2, *both), 2)
    shutil.copytree(two / "run" / "checkpoint" / f"step-{CUT}", changed / "run" / "checkpoint" / f"step-{CUT}")
    launch(arguments(changed, 1, *both), 1)
    samples = {folder: {s: sorted(n) for s, n in used_samples(folder).items()} for folder in (one, two, changed)}
    assert samples[one].keys() == set(range(1, STEPS + 1))
    assert samples[two] == samples[one]
    assert samples[changed] == {step: names for step, names in samples[one].items() if step > CUT}
    expected = figures(one)
    assert figures(two) == pytest.approx(expected, rel=1e-4)
    assert figures(changed) == pytest.approx({k: v for k, v in expected.items() if k[0] > CUT}, rel=1e-4)


def used_samples(folder: Path) -> dict[int, list[str]]:
    """Names of the recordings that each step was trained on, by all ranks."""
    used: dict[int, list[str]] = {}
    for path in (folder / "run").glob("samples.rank*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            used.setdefault(line["step"], []).extend(name for row in line["rows"] for name in row)
    return used


def test_packed_and_padded_rows_give_the_same_loss(arguments, tmp_path):
    """All eleven clips are one step, in eleven rows or in a few."""
    rate = ("--optimizer.lr", "1e-20", "--training.steps", "1", "--validation.no-enabled")
    padded = ("--training.local_batch_size", "11", "--training.global_batch_size", "11")
    launch(arguments(tmp_path / "padded", 1, *rate, *padded), 1)
    packed = ("--training.packing", "best_fit", "--training.local_batch_size", "1", "--metrics.save_samples")
    counts = {}
    for rows in (5, 6, 7):  # as many as an epoch is packed into
        folder = tmp_path / f"packed{rows}"
        launch(arguments(folder, 1, *rate, *packed, "--training.global_batch_size", str(rows)), 1)
        counts[rows] = len(used_samples(folder)[1])
    rows = next(rows for rows, count in counts.items() if count == 11)
    expected, found = figures(tmp_path / "padded"), figures(tmp_path / f"packed{rows}")
    for name in ("loss", "grad_norm"):
        assert found[1, name] == pytest.approx(expected[1, name], rel=1e-5)


def test_ranks_that_see_other_data_are_noticed(arguments, tmp_path, speech_folder, make_sound, write_code_shards):
    """Two machines with the same path, on one of which lies an older copy of the codes."""
    require_devices(2)
    codec = arguments(tmp_path)[arguments(tmp_path).index("--model.audio_tokenizer") + 1]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank, count in enumerate((5, 4)):
        machine = tmp_path / str(rank)
        write_code_shards(machine / "codes", {str(i): make_sound(i, 0.3) for i in range(count)}, codec)
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        command = [sys.executable, "-m", "torchtitan.train", *arguments(tmp_path / "out", 2)]
        command += ["--training.dataset_path", "./codes", "--validation.no-enabled"]
        environment = {**os.environ, **place, "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        ranks.append(subprocess.Popen(command, cwd=machine, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert ranks[1].returncode == 2, errors
    assert "./codes: rank 1 finds other data there than rank 0" in errors[1]


def test_another_seed_is_refused(arguments, tmp_path, capfd):
    launch(arguments(tmp_path), 1)
    assert train.main(arguments(tmp_path, 1, "--training.steps", "9", "--training.seed", "7")) == 2
    assert "it was made with training.seed = 42" in capfd.readouterr().err


def test_a_run_is_not_resumed_on_other_data(arguments, tmp_path, capfd, make_sound, write_rows):
    data = write_rows(tmp_path / "data" / "train-0.parquet", [(str(i), make_sound(i, 0.4), "t") for i in range(5)])
    more = ("--training.dataset_path", str(data.parent), "--validation.no-enabled")
    launch(arguments(tmp_path / "out", 1, *more), 1)
    moved = tmp_path / "elsewhere"
    shutil.copytree(data.parent, moved)
    more = ("--training.dataset_path", str(moved), "--validation.no-enabled", "--training.steps")
    launch(arguments(tmp_path / "out", 1, *more, "7"), 1)
    write_rows(moved / "train-0.parquet", [(str(i), make_sound(i, 0.4), "t") for i in range(6)])
    for steps in ("8", "7"):  # there is more to do, or nothing
        assert train.main(arguments(tmp_path / "out", 1, *more, steps)) == 2
        assert "it was made with other data" in capfd.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        *(("--training.task", "tts"), ("--training.seq_len", "100")),
        *(("--model.codec_window", "full"), ("--model.resampler", "soxr_hq")),
    ],
)
def test_a_run_is_not_resumed_with_other_codes_or_data(arguments, tmp_path, capfd, change):
    launch(arguments(tmp_path), 1)
    assert train.main(arguments(tmp_path, 1, "--training.steps", "9", *change)) == 2
    assert f"made with {change[0].removeprefix('--')}" in capfd.readouterr().err


def test_a_finished_run_has_nothing_to_do(arguments, tmp_path):
    launch(arguments(tmp_path, 1, "--checkpoint.last_save_model_only"), 1)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    launch(arguments(tmp_path, 1, "--checkpoint.last_save_model_only"), 1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_going_back_sets_later_checkpoints_aside(arguments, tmp_path):
    launch(arguments(tmp_path), 1)
    launch(arguments(tmp_path, 1, "--checkpoint.load_step", str(CUT), "--training.steps", "4"), 1)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir())
    assert names[:2] == ["step-3", "step-4"] and names[2].startswith("step-6.set-aside")


@pytest.mark.slow  # torchrun gives the other rank half a minute
def test_an_error_of_ranks_whose_output_is_filtered_away_is_in_torchruns_report(arguments, tmp_path, write_rows):
    require_devices(2)
    write_rows(tmp_path / "data" / "train-0.parquet", [(str(i), b"no sound", "t") for i in range(3)])
    more = ("--training.dataset_path", str(tmp_path / "data"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--local-ranks-filter", "2"]
    command = [*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--role", "rank", "--tee", "3"]
    command += ["-m", "torchtitan.train", *arguments(tmp_path / "out", 2, *more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "no recording of a whole epoch could be used" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_debug_config_learns_the_shipped_speech(tmp_path, ranks):
    """Validation ends at least 0.3 nats below the entropy of the validation codes."""
    launch(["--job.config_file", "config/debug.toml", "--job.dump_folder", str(tmp_path)], ranks)
    (run,) = tmp_path.iterdir()
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["validation/loss"] < last["validation/code_entropy"] - 0.3


def test_the_way_back_from_hugging_face_format(arguments, tmp_path):
    """Trained, converted, converted back: the same weights, and the same codec conventions."""
    from scripts.convert_hf_to_dcp import convert as to_dcp
    from torchtitan.checkpoint.hf_export import export_checkpoint as to_hf

    launch(arguments(tmp_path, 1, "--model.codec_padding", "aligned"), 1)
    step = to_dcp(str(to_hf(tmp_path / "run", tmp_path / "hf", torch.float32)), tmp_path / "back")
    before, after = load_full_parameters(find_checkpoint(tmp_path / "run")), load_full_parameters(step)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_state(step)["config"]["model"]["codec_padding"] == "aligned"
    start = ("--checkpoint.initial_load_path", str(tmp_path / "back"), "--training.steps", "1")
    launch(arguments(tmp_path / "new", 1, *start), 1)


def test_log_lines_as_json(arguments, tmp_path):
    """In a process of its own: under pytest the logger has handlers of pytest's."""
    options = arguments(tmp_path, 1, "--metrics.log_format", "json")
    done = subprocess.run(
        [sys.executable, "-m", "torchtitan.train", *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert all({"time", "level", "rank", "message"} <= line.keys() for line in lines)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [{k: v for k, v in line.items() if k not in ("time", "level", "rank", "message")} for line in lines]
    assert [line for line in logged if line] == written


def test_a_tokenizer_from_elsewhere_and_a_module_from_outside(arguments, make_tokenizer, tmp_path, monkeypatch):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "from_outside.py").write_text("import pathlib\npathlib.Path(__file__).with_suffix('.mark').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    more = ("--model.tokenizer_path", str(tmp_path / "tokenizer"), "--experimental.custom_import", "from_outside")
    launch(arguments(tmp_path / "plain"), 1)
    launch(arguments(tmp_path / "other", 1, *more), 1)
    assert (tmp_path / "from_outside.mark").exists()
    assert figures(tmp_path / "other") == figures(tmp_path / "plain")


def test_traces_are_named_after_the_steps_of_the_run(arguments, tmp_path):
    options = ("--profiling.enable_profiling", "--profiling.profile_freq", "2", "--validation.no-enabled")
    launch(arguments(tmp_path, 1, *options, "--training.steps", "3"), 1)
    traces = tmp_path / "run" / "profile_traces"
    assert [path.name for path in traces.iterdir()] == ["step-2"]
    launch(arguments(tmp_path, 1, *options, "--training.steps", "7"), 1)
    assert sorted(path.name for path in traces.iterdir()) == ["step-2", "step-4", "step-6"]
