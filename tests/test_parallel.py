"""Every way to split the work gives the losses of one rank: 20 steps in fp32, with accumulation and unequal padding.

Groups of ranks are processes of this very file (gloo, CPU), which go through their scenarios one after the other. The
measure is a run of one rank without any of it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from torchtitan import train
from torchtitan.checkpoint.manager import CheckpointManager, load_checkpoint, load_full_parameters
from torchtitan.components.dataloader import Batch
from torchtitan.components.gradients import FiniteGuard
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config.job_config import Parallelism
from torchtitan.config_manager import ConfigManager
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.utils import sum_over_ranks
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.parallel_model import ParallelModel, check_split
from torchtitan.models.llama3.pipeline import SPLIT_BACKWARD, own_stages, split_blocks, splits_backward
from torchtitan.models.llama3.weights import init_random
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools.errors import ConfigError
from torchtitan.tools.signals import StopRequest

STEPS, ACCUMULATION, ROWS, SEQ_LEN, VOCAB_SIZE, FIRST_AUDIO = 20, 2, 4, 32, 301, 100
AUDIO = "--training.audio_head"
OWN_SCHEDULE = Path(__file__).parent / "schedule.csv"  # a V of four stages on two ranks, some backward passes split


def degrees(replicate: int = 1, tensor: int = 1, pipeline: int = 1, context: int = 1, **more: Any) -> list[str]:
    """Options of a scenario: degrees, further keys of [parallelism], and "section__key" of others."""
    keys = {"data_parallel_replicate_degree": replicate, "tensor_parallel_degree": tensor}
    keys |= {"pipeline_parallel_degree": pipeline, "context_parallel_degree": context, **more}
    names = {key: key.replace("__", ".") if "__" in key else f"parallelism.{key}" for key in keys}
    return [option for key, value in keys.items() for option in (f"--{names[key]}", str(value))]


# What changes the losses, with the options that do.
UNCLIPPED = "--training.max_norm"
KINDS = {"": [], AUDIO: [AUDIO], UNCLIPPED: [UNCLIPPED, "1e30"]}


def kind(options: list[str]) -> str:
    return next((name for name in (AUDIO, UNCLIPPED) if name in options), "")


def schedule(name: str, **more: Any) -> list[str]:
    return degrees(pipeline=2, pipeline_parallel_schedule=name, **more)


# Name: (options, tied, packed).
TWO_RANKS: dict[str, tuple[list[str], bool, bool]] = {
    "FSDP": (degrees(), True, True),
    "FSDP, always resharded": (degrees(fsdp_reshard_after_forward="always"), True, False),
    "FSDP, never resharded": (degrees(fsdp_reshard_after_forward="never"), False, False),
    "FSDP, offloaded": (degrees(training__enable_cpu_offload=True), True, False),
    "FSDP, checkpointed": (degrees(activation_checkpoint__mode="full"), True, True),
    "FSDP, updated in the backward pass": (
        degrees(optimizer__early_step_in_backward=True, training__max_norm=0),
        True,
        False,
    ),
    "DDP": (degrees(replicate=2), True, False),
    "TP": (degrees(tensor=2), True, True),
    "TP, untied, logits gathered": (degrees(tensor=2, disable_loss_parallel=True), False, False),
    "TP, head of audio tokens": (degrees(tensor=2, training__audio_head=True), True, False),
    "CP": (degrees(context=2), True, False),
    "CP, packed": (degrees(context=2), True, True),
    "CP, all to all": (degrees(context=2, context_parallel_rotate_method="alltoall"), False, False),
    "CP, all to all, packed": (degrees(context=2, context_parallel_rotate_method="alltoall"), True, True),
    "PP": (degrees(pipeline=2), True, True),
    "PP, GPipe, untied, uneven": (schedule("GPipe", pipeline_parallel_split_points="layers.1"), False, False),
    "PP, microbatches of two rows": (schedule("1F1B", pipeline_parallel_microbatch_size=2), True, False),
    "PP, Interleaved1F1B": (schedule("Interleaved1F1B", pipeline_parallel_layers_per_stage=1), True, False),
    "PP, LoopedBFS": (schedule("LoopedBFS"), True, False),
    "PP, InterleavedZeroBubble": (schedule("InterleavedZeroBubble"), True, True),
    "PP, ZBVZeroBubble": (schedule("ZBVZeroBubble"), True, False),
    "PP, ZBVZeroBubble, checkpointed": (schedule("ZBVZeroBubble", activation_checkpoint__mode="full"), True, False),
    "PP, DualPipeV": (schedule("DualPipeV"), False, False),
    "PP, a schedule of one's own": (
        degrees(pipeline=2, pipeline_parallel_schedule_csv=OWN_SCHEDULE, pipeline_parallel_schedule="zerobubble"),
        True,
        True,
    ),
}
FOUR_RANKS: dict[str, tuple[list[str], bool, bool]] = {
    "HSDP": (degrees(replicate=2), True, True),
    "FSDP x TP": (degrees(tensor=2), True, True),
    "FSDP x CP": (degrees(context=2), True, True),
    "FSDP x PP": (degrees(pipeline=2), True, True),
    "DDP x TP, offloaded": (degrees(2, 2, training__enable_cpu_offload=True), False, False),
    "DDP x CP": (degrees(replicate=2, context=2), True, False),
    "DDP x PP": (schedule("ZBVZeroBubble", data_parallel_replicate_degree=2), True, False),
    "TP of 4, untied": (degrees(tensor=4), False, False),
    "CP of 4": (degrees(context=4), True, True),
    "PP of 4": (degrees(pipeline=4), True, False),
    "TP x CP": (degrees(tensor=2, context=2, context_parallel_rotate_method="alltoall"), True, True),
    "TP x PP": (degrees(tensor=2, pipeline=2), True, True),
    "CP x PP": (schedule("Interleaved1F1B", context_parallel_degree=2), True, True),
}
COMPILED: dict[str, tuple[list[str], bool, bool]] = {
    "FSDP, compiled": (degrees(training__compile=True), True, True),
    "TP, compiled": (degrees(tensor=2, training__compile=True), True, True),
    "CP, compiled": (degrees(context=2, training__compile=True), True, True),
    "PP, compiled and checkpointed": (
        degrees(pipeline=2, training__compile=True, activation_checkpoint__mode="full"),
        False,
        True,
    ),
    "PP, ZBVZeroBubble, compiled": (schedule("ZBVZeroBubble", training__compile=True), True, True),
}
if TorchVersion(torch.__version__) < "2.14":  # which cannot run these schedules
    for table in (TWO_RANKS, COMPILED, FOUR_RANKS):
        for name in [
            name for name in table if any(kind in " ".join(table[name][0]).lower() for kind in SPLIT_BACKWARD)
        ]:
            del table[name]
# Going through all of them takes minutes on two cores.
FEW_OF_TWO = [
    name
    for name in (
        "FSDP",
        "FSDP, offloaded",
        "FSDP, updated in the backward pass",
        "TP",
        "TP, head of audio tokens",
        "CP, packed",
        "PP",
        "PP, ZBVZeroBubble",
    )
    if name in TWO_RANKS
]
FEW_OF_FOUR = ["HSDP", "TP x CP"]
# Where a checkpoint of one split is taken up by another.
SAVED, RESUMED = "PP, Interleaved1F1B", [name for name in ("TP", "PP, ZBVZeroBubble") if name in TWO_RANKS]


def rest(names: Iterable[str], few: list[str]) -> list[str]:
    return [name for name in names if name not in few]


def make(options: list[str], tied: bool, rank: int, world_size: int) -> SimpleNamespace:
    """What train_step needs, with random weights of one seed."""
    settings = ["--training.mixed_precision_param", "float32", "--training.steps", str(STEPS), "--optimizer.lr", "3e-3"]
    settings += ["--training.seq_len", str(SEQ_LEN), "--lr_scheduler.warmup_steps", "2"]
    config = ConfigManager().parse_args([*settings, *options])
    dims = ParallelDims.from_config(config, rank, world_size)
    config.training.local_batch_size = ROWS // dims.data_degree
    args = Llama3Args(VOCAB_SIZE, 64, 4, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=96, tied=tied)
    model = ParallelModel(config, args, dims, torch.device("cpu"), FIRST_AUDIO if AUDIO in options else 0)
    init_random(model, 5)
    optimizer = build_optimizer(model, config.optimizer)
    return SimpleNamespace(
        inputs=SimpleNamespace(config=config, checkpoints=CheckpointManager(Path("unused"))),
        dims=dims,
        device=torch.device("cpu"),
        data_group=None,
        audio=AUDIO in options,
        model=model,
        optimizer=optimizer,
        guard=FiniteGuard(optimizer, torch.device("cpu")),
        stop=StopRequest(),
        schedule_start=0,
        step=0,
        tokens_seen=0,
    )


def microbatch(seed: int, packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows of all ranks: two (nearly) full ones, one of five targets, one of none or a few."""
    random = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(VOCAB_SIZE, (ROWS, SEQ_LEN), generator=random) for _ in range(2))
    for row, length in enumerate((SEQ_LEN, SEQ_LEN - 7, 5, seed % 3)):
        targets[row, length:] = IGNORE_INDEX
    if not packed:
        return tokens, targets, None
    positions = torch.arange(SEQ_LEN).repeat(ROWS, 1)
    for row, cut in enumerate((9, 20, 1, 30)):
        positions[row, cut:] -= cut
    return tokens, targets, positions


def steps(run: SimpleNamespace, first: int, last: int, packed: bool) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, by the trainer's own train_step."""
    curve = []
    own = slice(run.dims.data_rank, None, run.dims.data_degree)
    for step in range(first, last):
        run.step = step + 1
        batches = []
        for number in range(ACCUMULATION):
            tokens, targets, positions = microbatch(ACCUMULATION * step + number, packed)
            if run.audio:
                targets[(targets >= 0) & (targets < FIRST_AUDIO)] += FIRST_AUDIO
            batches.append(
                Batch(tokens[own], targets[own], 0, {}, positions=None if positions is None else positions[own])
            )
        loss, norm, _ = train.train_step(run, batches)
        (total,) = sum_over_ranks([loss.item() * run.dims.counts_loss])
        curve.append((total, norm.item()))
    return curve


def held_out(run: SimpleNamespace) -> torch.Tensor:
    """The loss of each target of three rows of a length that nothing divides."""
    random = torch.Generator().manual_seed(77)
    tokens, targets = (torch.randint(VOCAB_SIZE, (3, 21), generator=random) for _ in range(2))
    targets[0, 10:] = IGNORE_INDEX
    if run.audio:
        targets[(targets >= 0) & (targets < FIRST_AUDIO)] += FIRST_AUDIO
    return run.model.losses(tokens, targets)


def result_of(run: SimpleNamespace, packed: bool) -> dict[str, Any]:
    return {"curve": torch.tensor(steps(run, 0, STEPS, packed)), "losses": held_out(run)}


def checkpoint_state(run: SimpleNamespace) -> dict[str, Any]:
    return {"model_args": run.model.args.to_dict(), "tokens_seen": 0, "config": {}, "data": {}}


def run_rank(rank: int, world_size: int, folder: Path, names: list[str]) -> None:
    """Some scenarios of one of some ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results: dict[str, Any] = {}
    for name in names:
        options, tied, packed = (TWO_RANKS | COMPILED | FOUR_RANKS)[name]
        begin = time.perf_counter()
        results[name] = result_of(make(options, tied, rank, world_size), packed)
        results[name]["seconds"] = time.perf_counter() - begin
    if "PP" in names:
        manager = CheckpointManager(folder / "checkpoint")
        run = make(TWO_RANKS[SAVED][0], True, rank, world_size)
        first = steps(run, 0, STEPS // 2, False)
        path = manager.save(STEPS // 2, run.model, run.optimizer, checkpoint_state(run), Path.mkdir)
        for name in RESUMED:
            run = make(TWO_RANKS[name][0], True, rank, world_size)
            load_checkpoint(path, run.model, run.optimizer, run.model.args)
            results[f"{name}, resumed"] = torch.tensor(first + steps(run, STEPS // 2, STEPS, False))
    torch.save(results, folder / f"results-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def launch(world_size: int, folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """What each of some ranks got."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", __file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder), *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * world_size, "\n".join(out[-3000:] for out in outputs)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two-ranks")
    return folder, launch(2, folder, FEW_OF_TWO)


@pytest.fixture(scope="module")
def two_ranks_more(tmp_path_factory) -> list[dict[str, Any]]:
    return launch(2, tmp_path_factory.mktemp("two-ranks-more"), rest(TWO_RANKS, FEW_OF_TWO))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict[str, Any]]:
    return launch(2, tmp_path_factory.mktemp("compiled"), COMPILED)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return launch(4, tmp_path_factory.mktemp("four-ranks"), FEW_OF_FOUR)


@pytest.fixture(scope="module")
def four_ranks_more(tmp_path_factory) -> list[dict[str, Any]]:
    return launch(4, tmp_path_factory.mktemp("four-ranks-more"), rest(FOUR_RANKS, FEW_OF_FOUR))


@pytest.fixture(scope="module")
def expected() -> Any:
    """A function of a scenario's (options, tied, packed): what one rank gets, without any parallelism."""

    @cache
    def find(name: str, tied: bool, packed: bool) -> dict[str, Any]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        found = result_of(make(KINDS[name], tied, 0, 1), packed)
        dist.destroy_process_group()
        return found

    return lambda options, tied, packed: find(kind(options), tied, packed)


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    torch.testing.assert_close(found["curve"], wanted["curve"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FEW_OF_TWO)
def test_two_ranks_give_the_losses_of_one(two_ranks, expected, name):
    for rank in two_ranks[1]:
        assert_same(rank[name], expected(*TWO_RANKS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", rest(TWO_RANKS, FEW_OF_TWO))
def test_more_splits_over_two_ranks_give_the_losses_of_one(two_ranks_more, expected, name):
    for rank in two_ranks_more:
        assert_same(rank[name], expected(*TWO_RANKS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_give_the_same_losses(compiled, expected, name):
    for rank in compiled:
        assert_same(rank[name], expected(*COMPILED[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_OF_FOUR)
def test_four_ranks_give_the_losses_of_one(four_ranks, expected, name):
    for rank in four_ranks:
        assert_same(rank[name], expected(*FOUR_RANKS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", rest(FOUR_RANKS, FEW_OF_FOUR))
def test_more_splits_over_four_ranks_give_the_losses_of_one(four_ranks_more, expected, name):
    for rank in four_ranks_more:
        assert_same(rank[name], expected(*FOUR_RANKS[name]))


def test_the_curve_is_worth_comparing(expected):
    curve = expected([], True, False)["curve"]
    assert len(curve) == STEPS
    assert len(set(curve[:, 0].tolist())) == STEPS


def test_a_head_of_audio_tokens_is_a_softmax_over_them_alone(expected):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    whole, audio = (make(options, True, 0, 1).model.parts[0].eval() for options in ([], [AUDIO]))
    dist.destroy_process_group()
    tokens = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = tokens.clamp(min=FIRST_AUDIO)
    with torch.no_grad():
        logits = whole(tokens)[..., FIRST_AUDIO:]
        found = audio(tokens, targets)
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), (targets - FIRST_AUDIO).flatten(), reduction="none"
    )
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_backward_pass_gives_the_same_losses(expected, packed):
    options = degrees(training__compile=True, enable_compiled_autograd=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = result_of(make(options, True, 0, 1), packed)
    dist.destroy_process_group()
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"]
    assert_same(found, expected(options, True, packed))


def test_updates_in_the_backward_pass_go_on_from_a_checkpoint(expected, tmp_path):
    options = degrees(optimizer__early_step_in_backward=True, training__max_norm=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run = make(options, False, 0, 1)
    curve = steps(run, 0, STEPS // 2, True)
    assert all(parameter.grad is None for _, parameter in run.model.weights())
    path = CheckpointManager(tmp_path).save(STEPS // 2, run.model, run.optimizer, checkpoint_state(run), Path.mkdir)
    run = make(options, False, 0, 1)
    load_checkpoint(path, run.model, run.optimizer, run.model.args)
    curve += steps(run, STEPS // 2, STEPS, True)
    dist.destroy_process_group()
    wanted = expected(options, False, True)["curve"]
    assert (wanted - expected([], False, True)["curve"]).abs().max() > 1e-3  # without clipping, which was at work
    torch.testing.assert_close(torch.tensor(curve), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_another_split(two_ranks, expected, name):
    for rank in two_ranks[1]:
        torch.testing.assert_close(rank[f"{name}, resumed"], expected([], True, False)["curve"], rtol=1e-5, atol=0)


def test_a_tied_weight_on_two_stages_is_saved_once(two_ranks):
    saved = load_full_parameters(two_ranks[0] / "checkpoint" / f"step-{STEPS // 2}")
    assert len(saved) == 2 + 4 * 9
    assert "output.weight" not in saved


def test_ranks_of_a_split_cover_it_once():
    dims = [ParallelDims(2, 2, 2, 2, 2, rank) for rank in range(32)]
    assert dims[0].world_size == 32
    assert sorted(d.data_rank for d in dims if d.counts_rows) == [0, 1, 2, 3]
    assert [d.pipeline_rank for d in dims] == [0] * 16 + [1] * 16
    assert sum(d.counts_loss for d in dims) == 16


def pipeline(degree: int, **more: Any) -> Parallelism:
    return Parallelism(pipeline_parallel_degree=degree, **more)


@pytest.mark.parametrize(
    ("blocks", "config", "stages"),
    [
        (16, pipeline(2), [8, 8]),
        (16, pipeline(4), [3, 5, 5, 3]),
        (32, pipeline(4, pipeline_parallel_schedule="Interleaved1F1B"), [3, 4, 5, 4, 4, 5, 4, 3]),
        (4, pipeline(4), [1, 1, 1, 1]),
        (5, pipeline(2, pipeline_parallel_split_points=["layers.1"]), [1, 4]),
        (6, pipeline(2, pipeline_parallel_layers_per_stage=2, pipeline_parallel_schedule="GPipe"), None),
        (8, pipeline(2, pipeline_parallel_layers_per_stage=2, pipeline_parallel_schedule="LoopedBFS"), [2, 2, 2, 2]),
    ],
)
def test_blocks_are_dealt_out(blocks, config, stages):
    if stages is None:
        with pytest.raises(ConfigError, match="3 stages, which cannot be dealt out to 2 ranks"):
            split_blocks(blocks, config)
        return
    found = split_blocks(blocks, config)
    assert [i for part in found for i in part] == list(range(blocks))
    assert [len(part) for part in found] == stages


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (pipeline(2, pipeline_parallel_schedule="2F2B"), "there is no such schedule"),
        (pipeline(8), "8 stages are more than the model's 4 blocks"),
        (pipeline(2, pipeline_parallel_split_points=["layers.9"]), "from layers.1 to layers.3"),
        (pipeline(2, pipeline_parallel_split_points=["norm"]), "from layers.1 to layers.3"),
        (pipeline(2, pipeline_parallel_layers_per_stage=1), "takes one stage a rank, not 2"),
        (
            pipeline(2, pipeline_parallel_layers_per_stage=2, pipeline_parallel_schedule="Interleaved1F1B"),
            "takes several stages a rank, not one",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        split_blocks(4, config)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (degrees(tensor=8), "tensor_parallel_degree = 8: .* 4 key and value heads"),
        (degrees(tensor=3, training__seq_len=96), "tensor_parallel_degree = 3: .* 8 heads"),
        (
            degrees(context=8, context_parallel_rotate_method="alltoall"),
            "context_parallel_degree = 8: .* 4 key and value",
        ),
        (degrees(tensor=2, context=4, context_parallel_rotate_method="alltoall"), "2 key and value heads of each"),
        (degrees(pipeline=8), "8 stages are more than the model's 4 blocks"),
        (degrees(pipeline=4, training__local_batch_size=2), "2 microbatches .* fewer than its 4 stages"),
        (schedule("DualPipeV", training__local_batch_size=3), "3 microbatches .* fewer than its 4 stages"),
        (schedule("Interleaved1F1B", training__local_batch_size=5), "5 microbatches .* 2 rounds of 2 ranks"),
        (schedule("PipelineScheduleMulti"), "there is no such schedule"),
    ],
)
def test_degrees_that_do_not_fit_the_model_are_refused(options, sentence):
    args = Llama3Args(VOCAB_SIZE, 64, 4, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=96)
    with pytest.raises(ConfigError, match=sentence):
        check_split(ConfigManager().parse_args(options), args)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (degrees(tensor=4, training__seq_len=1022), "training.seq_len = 1022 .* a multiple of 4"),
        (degrees(tensor=2, context=3), "training.seq_len = 1024.* a multiple of 12"),
        (degrees(pipeline=2, pipeline_parallel_microbatch_size=3), "it must be a multiple of .*microbatch_size = 3"),
        (["--parallelism.disable_loss_parallel"], "its degree is 1"),
        (["--parallelism.pipeline_parallel_layers_per_stage", "2"], "its degree is 1"),
        (
            ["--parallelism.tensor_parallel_degree", "2", "--parallelism.enable_async_tensor_parallel"],
            "training.compile",
        ),
        (["--training.audio_head", "--training.task", "tts"], "tokens that are not audio tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ConfigManager().parse_args(options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0F0,0B0\n1F0,go\n", "cannot be read"),
        ("0F0,0SEND_F0,0B0\n1F0,1B0\n", "0SEND_F0 of rank 0 is none of"),
        ("0F0,0F1,1F0,1F1,1B0,1B1,0B0,0B1\n", "on 2 ranks .*expected 2, actual 1"),
        ("0F0,0B0\n1F0,1B0\n", "does not take 2 microbatches"),
        ("0F0,0F1,0B0,0B1\n2F0,2F1,2B0,2B1\n", r"that makes 2 stages, but the schedule names \[0, 2\]"),
        ("0F0,0F1,0B0,0B1\n1F0,1F1,1W0,1I0,1B1\n", "without first running Backward Input"),
        ("", "schedule_csv: that makes 1 stages, which cannot be dealt out to 2 ranks"),
    ],
)
def test_a_schedule_of_ones_own_that_does_not_fit_is_refused(tmp_path, text, sentence):
    path = tmp_path / "schedule.csv"
    path.write_text(text)
    options = degrees(pipeline=2, pipeline_parallel_schedule_csv=path, training__local_batch_size=2)
    config = ConfigManager().parse_args(options)
    with pytest.raises(ConfigError, match=sentence):
        check_split(config, Llama3Args(VOCAB_SIZE, 64, 4, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=96))


def test_a_schedule_of_ones_own_places_the_stages():
    own = pipeline(2, pipeline_parallel_schedule_csv=str(OWN_SCHEDULE))
    assert [own_stages(4, rank, 2, own) for rank in range(2)] == [[0, 3], [1, 2]]
    assert len(split_blocks(4, own)) == 4
    assert splits_backward(own)


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.14", reason="it cannot run these schedules")
def test_selective_checkpointing_of_operations_is_refused_where_the_backward_pass_is_split():
    args = Llama3Args(VOCAB_SIZE, 64, 4, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=96)
    options = schedule("ZBVZeroBubble", activation_checkpoint__mode="selective")
    with pytest.raises(ConfigError, match="selective_ac_option"):
        check_split(ConfigManager().parse_args(options), args)
    options += ["--activation_checkpoint.selective_ac_option", "2"]
    check_split(ConfigManager().parse_args(options), args)


def test_stages_of_a_rank():
    loop, v = (pipeline(4, pipeline_parallel_schedule=name) for name in ("Interleaved1F1B", "ZBVZeroBubble"))
    assert [own_stages(8, rank, 4, loop) for rank in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [own_stages(8, rank, 4, v) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
