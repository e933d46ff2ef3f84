"""Files of the Hugging Face hub, fetched with patience.

Whatever is read from the hub goes through here or through the readers of data sets: requests that fail for a reason
that may pass are tried again, with growing waits and a limit, and what was fetched before is kept.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError, first_line
from torchtitan.tools.retries import may_pass, retried

# owner/name
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Weights in formats that are not read where there are safetensors.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".tflite")


class NotOnHub(UserError):
    """There is no such repository or revision on the hub."""


def local_copy(name: str | Path, revision: str | None = None, weights: bool = True) -> str:
    """The folder of a model: a local one as it is, one on the hub downloaded first.

    Args:
        name: a folder, or a hub name (owner/name).
        revision: branch, tag or commit on the hub.
        weights: with its weights; safetensors alone where there are some.

    Raises:
        UserError: it is neither there nor to be had.
    """
    if os.path.isdir(os.path.expanduser(name)):
        return os.path.expanduser(name)

    def wanted(files: list[str]) -> list[str]:
        top = [file for file in files if "/" not in file]
        known = [file for file in top if file.endswith(".safetensors")]
        # Some repositories hold the same weights again, in files of another name.
        known = [file for file in known if file.startswith(("model.", "model-"))] or known
        others = [] if known else [file for file in top if file.endswith(_OTHER_WEIGHTS)]
        rest = [file for file in top if not file.endswith((".safetensors", *_OTHER_WEIGHTS))]
        return rest + (known + others if weights else [])

    folder, _ = fetch(str(name), "model", wanted, revision)
    if folder is None:
        raise NotOnHub(f"{name}: the model's page holds no files.")
    return str(folder)


def commit_of(folder: str | Path) -> str | None:
    """The commit of a folder that :func:`local_copy` gave; None for one that is not of the hub's cache."""
    path = Path(folder)
    return path.name if path.parent.name == "snapshots" else None


def fetch(
    repository: str, kind: str, wanted: Callable[[list[str]], list[str]], revision: str | None = None
) -> tuple[Path | None, str]:
    """Download files of a repository into the hub's cache.

    Args:
        kind: model or dataset.
        wanted: of the names of all files those to download.
        revision: branch, tag or commit; the newest by default.

    Returns:
        the folder that holds them (None if there are none), and the commit they are of. Without a connection, or with
        HF_HUB_OFFLINE=1, the folder is what an earlier download left.

    Raises:
        NotOnHub: there is no such repository or revision.
        UserError: access has not been granted, or it cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = "model" if kind == "model" else "data set"

    def cached() -> Path | None:
        """What an earlier download left, complete or not."""
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
        # By the branch rather than the commit, so that the cache knows the branch without a network, too.
        folder = Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=files))
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise ConnectionError(f"{missing[0]} has not come")
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
            f"{repository}: access to this {what} must be asked for on its page, and `hf auth login` be called once."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotOnHub(f"{repository}: the hub has no such {what} ({first_line(error)}).") from None
    except Exception as error:
        if not may_pass(error):
            raise UserError(f"{repository}: the {what} cannot be downloaded ({first_line(error)}).") from None
        reason = first_line(error)
    if (kept := cached()) is None:
        raise UserError(f"{repository}: the {what} cannot be downloaded ({reason}).")
    return kept, kept.name


def require_model_folder(name: str) -> None:
    """Refuse a name that can only be a local folder but is none, or a folder without config.json.

    Raises:
        UserError: with what is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{name}: the folder holds no config.json, so it is not a model in Hugging Face format, and it is no "
                "training checkpoint either."
            )
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: there is no such folder (a hub name has the form owner/name).")
