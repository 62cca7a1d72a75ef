"""Uploads to a hub: one folder, one commit, one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lavender.errors import FileError


def upload(
    folder: Path,
    repository: str,
    kind: Literal["dataset", "model"],
    message: str,
    private: bool = True,
    replaced: str | None = None,
) -> str:
    """Upload a folder to a repository, which is made if it is not there. Other files of the repository stay.

    Args:
        folder: the folder.
        repository: hub id of the repository.
        kind: what kind of repository it is.
        message: that of the commit.
        private: whether a new repository is private.
        replaced: pattern of files that the commit removes, if the folder does not have them.

    Returns:
        The address of the commit.

    Raises:
        FileError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    make_repository(repository, kind, private)
    with _asking(repository):
        commit = HfApi(library_name="lavender-vlm").upload_folder(
            repo_id=repository, folder_path=folder, repo_type=kind, commit_message=message, delete_patterns=replaced
        )
    return str(commit)


def make_repository(repository: str, kind: Literal["dataset", "model"], private: bool) -> None:
    """Make a repository if it is not there, before work that takes long. Raises as `upload`."""
    from huggingface_hub import HfApi

    with _asking(repository):
        HfApi(library_name="lavender-vlm").create_repo(repository, repo_type=kind, private=private, exist_ok=True)


@contextmanager
def _asking(repository: str) -> Iterator[None]:
    """Turn errors of the hub, of the connection, and of a name that the hub does not take into a FileError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise FileError(
            f"{repository}, to which nothing was uploaded: {reason}",
            "a repository of yours, a token that may write, and a connection",
            "check the name, run `hf auth login`, or write the folder alone and upload it later",
        ) from error
