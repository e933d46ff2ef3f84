"""Files of the Hugging Face hub, downloaded with retries.

All access to the hub goes through this module or through the readers of data sets. A request that fails for a temporary
reason is tried again a few times, with growing waits. Downloaded files stay in the hub's cache.
"""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.retries import may_pass, retried

# owner/name
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# How transformers loads models: without Python code of theirs, and where we name the model, without pickled weights.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
SAFE: dict[str, Any] = {**NO_CODE, "use_safetensors": True}
# Formats of weights that are not needed if there are safetensors.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".tflite")


class NotOnHub(UserError):
    """There is no such repository or revision on the hub."""


def local_copy(name: str | Path, revision: str | None = None, weights: bool = True) -> str:
    """The local folder of a model. A model on the hub is downloaded first.

    Args:
        name: a folder, or a hub name (owner/name).
        revision: branch, tag or commit on the hub.
        weights: also download the weights; only safetensors if there are some.

    Raises:
        FileNotFoundError: the folder does not exist, and the name cannot be a hub name.
        UserError: the model cannot be downloaded, or it comes with code.
    """
    if os.path.isdir(os.path.expanduser(name)):
        refuse_code(os.path.expanduser(name), str(name))
        return os.path.expanduser(name)
    if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(name))

    def wanted(files: list[str]) -> list[str]:
        top = [file for file in files if "/" not in file]
        known = [file for file in top if file.endswith(".safetensors")]
        # Some repositories have the same weights again under another name.
        known = [file for file in known if file.startswith(("model.", "model-"))] or known
        others = [] if known else [file for file in top if file.endswith(_OTHER_WEIGHTS)]
        rest = [file for file in top if not file.endswith((".safetensors", *_OTHER_WEIGHTS))]
        return rest + (known + others if weights else [])

    folder, _ = fetch(str(name), "model", wanted, revision)
    if folder is None:
        raise NotOnHub(f"{name}: the repository of the model has no files.")
    refuse_code(folder, str(name))
    return str(folder)


def refuse_code(folder: str | Path, name: str) -> None:
    """Refuse a model that wants Python code of its own to be run.

    Raises:
        UserError: one of its JSON files does.
    """
    for path in sorted(Path(folder).glob("*config.json")):
        try:
            wants_code = "auto_map" in json.loads(path.read_bytes())
        except (OSError, ValueError, TypeError, RecursionError):  # whoever needs the file says what is wrong with it
            continue
        if wants_code:
            raise UserError(f"{name}: {path.name} asks for Python code of the model (auto_map), which is never run.")


def commit_of(folder: str | Path) -> str | None:
    """The commit of a folder from :func:`local_copy`; None for a folder outside the hub's cache."""
    path = Path(folder)
    return path.name if path.parent.name == "snapshots" else None


def fetch(
    repository: str, kind: str, wanted: Callable[[list[str]], list[str]], revision: str | None = None
) -> tuple[Path | None, str]:
    """Download files of a repository into the hub's cache.

    Args:
        kind: model or dataset.
        wanted: selects the files to download from the names of all files.
        revision: branch, tag or commit. Default: the newest.

    Returns:
        the folder of the files (None if there are none), and their commit. Without a connection, or with
        HF_HUB_OFFLINE=1, it is the folder of an earlier download.

    Raises:
        NotOnHub: there is no such repository or revision.
        UserError: access is not granted, or the hub cannot be reached and the cache has no copy.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = "model" if kind == "model" else "data set"

    def cached() -> Path | None:
        """The folder of an earlier download, complete or not."""
        options: dict[str, Any] = {"local_files_only": True, "allow_patterns": []}
        try:
            return Path(snapshot_download(repository, repo_type=kind, revision=revision, **options))
        except (OSError, ValueError):
            return None

    def ask() -> Any:
        try:
            return HfApi().repo_info(repository, repo_type=kind, revision=revision)
        except Exception as error:
            if type(error).__name__ == "ConnectError" and cached() is not None:  # there is no network at all
                return None
            raise

    def download(files: list[str]) -> Path:
        # By branch, not by commit, so that the cache also knows the branch when there is no network.
        folder = Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=files))
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise ConnectionError(f"{missing[0]} was not downloaded")
        return folder

    reason = "HF_HUB_OFFLINE is set, and it is not in the cache"
    try:
        if not constants.HF_HUB_OFFLINE and (info := retried(f"{repository} on the hub", ask)) is not None:
            files = wanted([sibling.rfilename for sibling in info.siblings or []])
            if not files:
                return None, info.sha
            folder = retried(f"{repository} on the hub", lambda: download(files))
            return folder, folder.name
    except GatedRepoError:
        raise UserError(
            f"{repository}: request access to this {what} on its page, and call `hf auth login` once."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotOnHub(f"{repository}: the hub has no such {what} ({first_line(error)}).") from None
    except Exception as error:
        if not may_pass(error):
            raise UserError(f"{repository}: the {what} cannot be downloaded ({first_line(error)}).") from None
        reason = first_line(error)
    if (kept := cached()) is None:
        raise UserError(f"{repository}: the {what} cannot be downloaded ({reason}; there is no such folder either).")
    return kept, kept.name


def require_model_folder(name: str) -> None:
    """Refuse a folder that does not exist or has no config.json. Hub names pass.

    Raises:
        UserError: the folder or its config.json is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{name}: the folder has no config.json, so it is not a model in Hugging Face format, and it is not a "
                "training checkpoint either."
            )
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: there is no such folder (a hub name has the form owner/name).")
