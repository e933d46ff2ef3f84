"""Read the files of a checkpoint without trusting them.

torch.distributed.checkpoint lists what a folder holds in ``.metadata``, a pickle that could run any code. Here it may
name only the few classes that real metadata consist of. Items that are no tensors are pickles too: our checkpoints have
none, and they are refused. torch.load reads tensors with ``weights_only=True``.
"""

import io
import pickle
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType

from torchtitan.tools.errors import UserError, last_line

_METADATA = "torch.distributed.checkpoint.metadata"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# The names in the metadata of torch 2.11 to 2.14.
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata")),
    (_METADATA, "TensorProperties"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", dtype) for dtype in _DTYPES),
    *((module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The metadata in a file.

    Raises:
        UserError: they are damaged, or hold anything but the facts of tensors.
    """
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        items = dict(metadata.state_dict_metadata)
        places = {info.relative_path for info in (metadata.storage_data or {}).values()}
    except Exception as error:  # A damaged pickle may raise anything.
        raise UserError(f"{path}: the checkpoint's metadata are damaged or not to be trusted ({error}).") from None
    for name, item in items.items():
        if not isinstance(item, TensorStorageMetadata):
            raise UserError(f"{path.parent}: {name} is not a tensor; reading it could run code, so it is refused.")
    for place in places:
        if place != Path(place).name:
            raise UserError(f"{path}: the checkpoint's metadata name a file in another folder, {place}.")
    return metadata


class CheckpointReader(FileSystemReader):
    """torch's reader of checkpoint folders, without plain unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path) / ".metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise UserError(f"{self.path}: {item.storage_index.fqn} is not a tensor, so it is refused.")
        return super().read_data(plan, planner)


def read_tensors(tensors: dict[str, torch.Tensor], checkpoint: Path, no_dist: bool = False) -> None:
    """Fill tensors, sharded or not, from a checkpoint folder. All ranks call it, unless ``no_dist`` is set.

    Raises:
        UserError: the folder is damaged, not to be trusted, or lacks a tensor.
    """
    try:
        with warnings.catch_warnings():  # about loading without a process group, which is intended
            warnings.simplefilter("ignore", UserWarning)
            reader = CheckpointReader(checkpoint)
            reader.read_metadata()  # checks first, because dcp.load of torch 2.11 ignores its errors
            dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # the latter, with what any rank met, is no Exception
        raise UserError(f"{checkpoint}: the checkpoint is damaged or incomplete ({last_line(error)}).") from error


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def find_damage(checkpoint: Path, files: dict[str, list[int]], share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a checkpoint, or None.

    Args:
        files: size and checksum of each file when it was written. Other files are only checked for their minimum size.
        share: this rank's number and the number of ranks that share the files.
    """
    try:
        metadata = read_metadata(checkpoint / ".metadata")
    except UserError as error:
        return str(error)
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name in sorted(needed)[share[0] :: share[1]]:
        path = checkpoint / name
        if not path.is_file():
            return f"{path}: the file is missing."
        if path.stat().st_size < needed[name]:
            return f"{path}: the file is cut off."
        if name in files and files[name] != [path.stat().st_size, checksum(path)]:
            return f"{path}: the file has changed since it was written."
    return None
