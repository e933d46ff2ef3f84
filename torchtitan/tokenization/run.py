"""A tokenization from its options to its last shard."""

import os
import sys

import torch

from torchtitan.datasets.bad_rows import BAD_ROWS_FILE
from torchtitan.datasets.decoding import num_cores, num_threads
from torchtitan.datasets.shards import WriteError
from torchtitan.tokenization.plan import (
    CONTINUE,
    Options,
    Plan,
    prepare,
    remove_stale_files,
    survey,
    write_settings,
)
from torchtitan.tokenization.processes import (
    Progress,
    check_share,
    run_processes,
    settle,
    terminable,
    write_bad_rows,
)
from torchtitan.tokenization.worker import ShardTokenizer
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import quiet_transformers


def choose_devices(name: str, num_processes: int | None, local_rank: int | None = None) -> list[torch.device]:
    """The device of each process.

    Raises:
        UserError: the name is unknown, or there is no such device here.
    """
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if num_gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}.") from None
    available = {"cpu": 1, "cuda": num_gpus, "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        raise UserError(f"device {name!r} is not available on this machine; cpu always is.")
    if device.type == "cuda" and device.index is None:
        if local_rank is not None:
            return [torch.device("cuda", local_rank % num_gpus)]
        return [torch.device("cuda", number % num_gpus) for number in range(num_processes or num_gpus)]
    if local_rank is not None:
        return [device]
    return [device] * (num_processes or (num_cores() if device.type == "cpu" else 1))


def finish(plan: Plan) -> str | None:
    """Write totals and failed rows once all shards are there; a sentence about them, or None if some are missing.

    Raises:
        UserError: too many rows failed.
    """
    counts, missing = survey(plan, range(plan.num_shards))
    if missing:
        return None
    write_bad_rows(plan)
    check_share(plan, counts, 1)
    totals = {
        "recordings": counts.recordings,
        "hours": counts.seconds / 3600,
        "frames": counts.frames,
        "failed": counts.failed,
        "left_out": counts.left_out,
        "bad_files": len(plan.index.bad_files),
    }
    write_settings(plan, totals)
    told = (
        f"{plan.output}: {plan.num_shards:,} shards hold {counts.recordings:,} recordings, "
        f"{counts.seconds / 3600:,.2f} h, {counts.frames:,} frames of {plan.num_quantizers} codes"
    )
    if counts.left_out:
        told += f"; {counts.left_out:,} rows are shorter or longer than the source's limits"
    if counts.failed or plan.index.bad_files:
        files = f" and {len(plan.index.bad_files):,} files" if plan.index.bad_files else ""
        told += f"; {counts.failed:,} rows{files} could not be used and are listed in {BAD_ROWS_FILE}"
    return told + "."


def tokenize(options: Options) -> str:
    """Do all of it, or what is left of it.

    Returns:
        what to tell at the end, in a sentence.

    Raises:
        UserError: something in the way that its message names; nothing finished is lost.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if ranked and (options.num_processes or 1) > 1:
        raise UserError("num_processes is for runs without torchrun, whose ranks are the processes.")
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if ranked else None
    devices = choose_devices(options.device, options.num_processes, local_rank)
    quiet_transformers()
    plan = prepare(options)
    remove_stale_files(plan)
    shards = range(rank, plan.num_shards, world_size) if ranked else range(plan.num_shards)
    done, missing = survey(plan, shards)
    if not missing and (told := finish(plan)):
        return f"all was done already. {told}"
    progress = Progress(plan, done, sum(len(plan.rows(shard)) for shard in shards))
    try:
        with terminable():
            if len(devices) == 1:
                settle(devices[0])
                threads = num_threads(devices[0], world_size if ranked else 1)
                worker = ShardTokenizer(plan, devices[0], threads, progress.report)
                for shard in missing:
                    worker.make_parts(shard, range(plan.num_parts(shard)))
                    worker.merge(shard)
            else:
                run_processes(plan, missing, devices, progress)
    except (KeyboardInterrupt, SystemExit):
        progress.close()
        print(f"stopped; nothing finished is lost: {CONTINUE}.", file=sys.stderr)
        raise
    except WriteError as error:
        raise UserError(f"{str(error).rstrip('.')}; nothing finished is lost: {CONTINUE}.") from None
    finally:
        progress.close()
    told = finish(plan) or f"{plan.output}: rank {rank} is done, others are not yet."
    return f"{told} {progress.speed():.0f} s of audio a second."
