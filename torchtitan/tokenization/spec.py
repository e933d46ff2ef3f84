"""The specification of a tokenization, and how much of it is already done."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torchtitan.audio.codec import FRAME_RATE, Codec
from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.datasets.hf_dataset import ALIASES, SOURCES, Source
from torchtitan.datasets.readers import AudioDataset, DatasetIndex, index_files
from torchtitan.datasets.shards import FORMAT, ShardError, read_part, shard_name, write_atomically
from torchtitan.datasets.sources import find_files, sources_from_config
from torchtitan.tools.errors import UserError

PART_ROWS = 128
SETTINGS_FILE = "tokenization.json"
CONTINUE = "run the same command again to continue"


@dataclass
class Options:
    """Turn a data set into shards of codes, which training reads instead of the recordings."""

    dataset: str
    """A built-in data set, a local folder or file, or a hub name."""
    output: str
    """Output folder."""
    dataset_path: str | None = None
    """Place of a built-in data set: a folder of its layout, or another hub name."""
    split: str | None = None
    """Split to use, if file names contain splits. Default: train."""
    source_file: str | None = None
    """Settings file (TOML) of a training run. dataset then names one of its [[training.source]] tables."""
    audio_tokenizer: str = "kyutai/mimi"
    """Hub name or local folder of the Mimi codec."""
    num_quantizers: int = 8
    """Number of codebooks to store. Models may use fewer."""
    codec_padding: str = "exact"
    """How the codec encodes the last frame of a recording: exact or aligned (see model.codec_padding)."""
    codec_window: str = "codec"
    """Attention window of the codec: codec or full (see model.codec_window)."""
    resampler: str = "torchaudio"
    """Method that resamples recordings to 24 kHz: torchaudio, soxr_hq or ffmpeg."""
    num_processes: int | None = None
    """Number of processes. Default: one per GPU, or one per CPU core."""
    device: str = "auto"
    """Device of the codec: auto, cpu, cuda, cuda:N or mps."""
    max_seconds: float | None = None
    """Encode only this many seconds from the start of each recording. Default: all of it."""
    rows_per_shard: int = 4096
    """Rows of the data set per shard."""
    max_bad_share: float = 0.2
    """Stop if more than this share of the rows is bad (cannot be read or used)."""


@dataclass(frozen=True)
class Spec:
    """What a tokenization is to make; all worker processes have it.

    Attributes:
        header: the common part of the headers of all shards.
    """

    source: Source
    index: DatasetIndex
    output: Path
    audio_tokenizer: str
    num_quantizers: int
    padding: str
    window: str
    max_seconds: float | None
    rows_per_shard: int
    max_bad_share: float
    num_rows: int
    header: dict[str, Any]
    rows_per_part: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """Numbers of a shard's rows in the data set."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def part_rows(self, shard: int, part: int) -> range:
        """Numbers of a part's rows in the data set."""
        return self.rows(shard)[part * self.rows_per_part : (part + 1) * self.rows_per_part]

    def num_parts(self, shard: int) -> int:
        return -(-len(self.rows(shard)) // self.rows_per_part)

    def shard_path(self, shard: int) -> Path:
        return self.output / shard_name(shard, self.num_shards)

    def partial_folder(self, shard: int) -> Path:
        return self.shard_path(shard).with_suffix(".partial")

    def part_path(self, shard: int, part: int) -> Path:
        # Not .arrow, so that an unfinished folder does not look like a data set of Arrow files.
        return self.partial_folder(shard) / f"part-{part:04d}"


@dataclass
class Counts:
    """Counts of all rows, bad rows, rows outside the source's limits, and of what the other rows became."""

    rows: int = 0
    bad: int = 0
    left_out: int = 0
    recordings: int = 0
    seconds: float = 0.0
    frames: int = 0

    def add(self, other: "Counts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def find_source_of(options: Options) -> Source:
    """The source that the options name.

    Raises:
        UserError: there is no such source.
    """
    if options.source_file:
        from torchtitan.config_manager import ConfigManager

        config = ConfigManager().parse_args(["--job.config_file", options.source_file])
        sources = sources_from_config(config.training)
        chosen = [source for source in sources if options.dataset in (source.name, source.path)]
        if len(chosen) != 1:
            names = ", ".join(source.name for source in sources)
            raise UserError(f"{options.source_file}: dataset {options.dataset!r} must be one of its sources ({names}).")
        return chosen[0]
    built_in = options.dataset in SOURCES or options.dataset in ALIASES
    table = {"name" if built_in else "path": options.dataset}
    if options.dataset_path:
        if not built_in:
            raise UserError(f"dataset_path is for built-in data sets; give {options.dataset_path} as the dataset.")
        table["path"] = options.dataset_path
    if options.split:
        table["split"] = options.split
    return sources_from_config(SimpleNamespace(source=[table]))[0]


def check_options(options: Options) -> None:
    """Raise UserError for values that are out of range."""
    if options.rows_per_shard < 1:
        raise UserError(f"rows_per_shard must be at least 1, not {options.rows_per_shard}.")
    if options.num_processes is not None and options.num_processes < 1:
        raise UserError(f"num_processes must be at least 1, not {options.num_processes}.")
    if not 0 <= options.max_bad_share <= 1:
        raise UserError(f"max_bad_share must be a share, 0 to 1, not {options.max_bad_share}.")
    if options.max_seconds is not None and not options.max_seconds > 0:
        raise UserError(f"max_seconds must be more than 0, not {options.max_seconds}.")


def prepare(options: Options) -> Spec:
    """Check the data, the codec and the output folder, and write the settings.

    Raises:
        UserError: one of the three cannot be used, or the folder has a tokenization with other settings.
    """
    check_options(options)
    output = Path(options.output).expanduser()
    source = find_source_of(options)
    index = index_files(source, find_files(source), progress=sys.stderr.isatty())
    num_rows = len(AudioDataset(source, index))
    codec = Codec.load(
        options.audio_tokenizer,
        options.num_quantizers,
        options.codec_padding,
        options.codec_window,
        resampler=options.resampler,
    )
    # The path of a local copy says nothing about the data.
    local = Path(source.path).expanduser().exists()
    described = {key: value for key, value in asdict(source).items() if value not in (None, (), "")}
    for key in ("weight", "hours", "licence", "download", *(["path"] if local else [])):
        described.pop(key, None)
    header = {
        "format": FORMAT,
        "audio_tokenizer": options.audio_tokenizer,
        "codec_fingerprint": codec.fingerprint(),
        "revision": codec.revision,
        "codec_padding": options.codec_padding,
        "codec_window": options.codec_window,
        "num_quantizers": options.num_quantizers,
        "resampler": options.resampler,
        "sample_rate": SAMPLE_RATE,
        "frame_rate": FRAME_RATE,
        "source": described,
        "data_fingerprint": index.fingerprint,
        "max_seconds": options.max_seconds,
        "rows_per_shard": options.rows_per_shard,
    }
    header = json.loads(json.dumps(header))
    header = _agree(output, header)
    spec = Spec(
        source=source,
        index=index,
        output=output,
        audio_tokenizer=options.audio_tokenizer,
        num_quantizers=options.num_quantizers,
        padding=options.codec_padding,
        window=options.codec_window,
        max_seconds=options.max_seconds,
        rows_per_shard=options.rows_per_shard,
        max_bad_share=options.max_bad_share,
        num_rows=num_rows,
        header=header,
        rows_per_part=PART_ROWS,
    )
    if not (output / SETTINGS_FILE).exists():
        write_settings(spec, None)
    return spec


def _agree(output: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The header to use: that of the tokenization in the folder, if it has the same settings, else the new one."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(13, "Permission denied")
        path = output / SETTINGS_FILE
        shards = sorted(output.glob("codes-*"))  # before the settings, which another rank writes before any shard
        if not path.exists():
            if shards:
                raise UserError(f"{output}: {shards[0].name} is there without {SETTINGS_FILE}; give another output.")
            return header
        stored = json.loads(path.read_text())["settings"]
    except OSError as error:
        raise UserError(f"{output}: this folder cannot be written to ({error.strerror or error}).") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{output / SETTINGS_FILE}: the file is damaged; remove the folder or give another output."
        ) from None
    # The weights identify the codec, so its name and its commit may differ.
    named = ("audio_tokenizer", "revision")
    wrong = [key for key in header if key not in named and stored.get(key) != header[key]]
    if wrong:
        told = [
            f"{key} is {json.dumps(stored.get(key))} there and {json.dumps(header[key])} now"
            for key in wrong
            if key not in ("codec_fingerprint", "data_fingerprint")
        ]
        if "codec_fingerprint" in wrong and "num_quantizers" not in wrong:
            told.append(f"the codec {header['audio_tokenizer']} has other weights than {stored.get('audio_tokenizer')}")
        if "data_fingerprint" in wrong:
            told.append("the data differ (names of files, or numbers of rows)")
        raise UserError(
            f"{output}: the folder has a tokenization with other settings: {', and '.join(told)}; give another output, "
            "or the same settings to continue."
        )
    return stored


def write_settings(spec: Spec, totals: dict[str, Any] | None) -> None:
    content = {
        "settings": spec.header,
        "files": len(spec.index.files),
        "rows": spec.num_rows,
        "shards": spec.num_shards,
        "totals": totals,
    }
    write_text(spec.output / SETTINGS_FILE, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file unless it already has this content."""
    data = text.encode(errors="replace")
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, lambda file: file.write(data))


def remove_stale_files(spec: Spec) -> None:
    """Remove temporary files of killed processes of this machine, and parts of finished shards."""
    lead = f"{socket.gethostname()}-"
    for path in [*spec.output.glob(".*.tmp"), *spec.output.glob("codes-*.partial/.*.tmp")]:
        process = path.name.removesuffix(".tmp").rpartition(lead)[2]
        if process.isdigit() and not is_running(int(process)):
            path.unlink(missing_ok=True)
    for folder in spec.output.glob("codes-*.partial"):
        if folder.with_suffix(".arrow").exists():
            shutil.rmtree(folder, ignore_errors=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def count_rows(path: Path, num_rows: int) -> Counts:
    batches, header = read_part(path)
    return Counts(
        rows=num_rows,
        bad=len(header["failed"]),
        left_out=header["left_out"],
        recordings=sum(batch.num_rows for batch in batches),
        seconds=sum(float(batch.column("seconds").to_numpy().sum()) for batch in batches),
        frames=sum(int(batch.column("frames").to_numpy().sum(dtype="int64")) for batch in batches),
    )


def is_whole(part: Path) -> bool:
    if not part.exists():
        return False
    try:
        read_part(part)
    except ShardError:
        part.unlink(missing_ok=True)
        return False
    return True


def survey(spec: Spec, shards: Sequence[int]) -> tuple[Counts, list[int]]:
    """The counts of what is done, and the unfinished shards. Removes damaged parts, so that they are made again."""
    done, missing = Counts(), []
    for shard in shards:
        path = spec.shard_path(shard)
        if path.exists():
            try:
                done.add(count_rows(path, len(spec.rows(shard))))
            except ShardError as error:
                hint = "remove it and run the same command again"
                raise UserError(f"{str(error).rstrip('.')}; {hint}.") from None
            continue
        missing.append(shard)
        for part in range(spec.num_parts(shard)):
            path = spec.part_path(shard, part)
            if is_whole(path):
                with suppress(ShardError):  # merged by another process in between
                    done.add(count_rows(path, len(spec.part_rows(shard, part))))
    return done, missing
