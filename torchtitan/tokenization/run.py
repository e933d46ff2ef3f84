"""A tokenization, from its options to its last shard."""

import os
import sys

import torch

from torchtitan.datasets.bad_rows import BAD_ROWS_FILE
from torchtitan.datasets.decoding import num_cores, num_threads
from torchtitan.datasets.shards import WriteError
from torchtitan.tokenization.processes import (
    Progress,
    check_share,
    run_processes,
    settle,
    terminable,
    write_bad_rows,
)
from torchtitan.tokenization.spec import (
    CONTINUE,
    Options,
    Spec,
    prepare,
    remove_stale_files,
    survey,
    write_settings,
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


def finish(spec: Spec) -> str | None:
    """Write totals and bad rows if all shards are there.

    Returns:
        a sentence about them; None if shards are missing.

    Raises:
        UserError: too many rows are bad.
    """
    counts, missing = survey(spec, range(spec.num_shards))
    if missing:
        return None
    write_bad_rows(spec)
    check_share(spec, counts, 1)
    totals = {
        "recordings": counts.recordings,
        "hours": counts.seconds / 3600,
        "frames": counts.frames,
        "failed": counts.bad,
        "left_out": counts.left_out,
        "bad_files": len(spec.index.bad_files),
    }
    write_settings(spec, totals)
    told = (
        f"{spec.output}: {spec.num_shards:,} shards hold {counts.recordings:,} recordings, "
        f"{counts.seconds / 3600:,.2f} h, {counts.frames:,} frames of {spec.num_quantizers} codes"
    )
    if counts.left_out:
        told += f"; {counts.left_out:,} rows are shorter or longer than the source's limits"
    if counts.bad or spec.index.bad_files:
        files = f" and {len(spec.index.bad_files):,} files" if spec.index.bad_files else ""
        told += f"; {counts.bad:,} rows{files} could not be used and are listed in {BAD_ROWS_FILE}"
    return told + "."


def tokenize(options: Options) -> str:
    """Tokenize a data set, or continue a tokenization.

    Returns:
        a sentence about the result.

    Raises:
        UserError: the tokenization cannot be finished. Finished parts are kept.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if ranked and (options.num_processes or 1) > 1:
        raise UserError("num_processes is only for runs without torchrun; with torchrun, each rank is a process.")
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if ranked else None
    devices = choose_devices(options.device, options.num_processes, local_rank)
    quiet_transformers()
    spec = prepare(options)
    remove_stale_files(spec)
    shards = range(rank, spec.num_shards, world_size) if ranked else range(spec.num_shards)
    done, missing = survey(spec, shards)
    if not missing and (told := finish(spec)):
        return f"everything was already done. {told}"
    progress = Progress(spec, done, sum(len(spec.rows(shard)) for shard in shards))
    try:
        with terminable():
            if len(devices) == 1:
                settle(devices[0])
                threads = num_threads(devices[0], world_size if ranked else 1)
                worker = ShardTokenizer(spec, devices[0], threads, progress.report)
                for shard in missing:
                    worker.make_parts(shard, range(spec.num_parts(shard)))
                    worker.merge(shard)
            else:
                run_processes(spec, missing, devices, progress)
    except (KeyboardInterrupt, SystemExit):
        progress.close()
        print(f"stopped; nothing finished is lost: {CONTINUE}.", file=sys.stderr)
        raise
    except WriteError as error:
        raise UserError(f"{str(error).rstrip('.')}; nothing finished is lost: {CONTINUE}.") from None
    finally:
        progress.close()
    told = finish(spec) or f"{spec.output}: rank {rank} is done, other ranks are not."
    return f"{told} {progress.speed():.0f} s of audio a second."
