"""What identifies the content of a folder or a model: a digest, or its commit on the Hub.

Folders are read in full. BLAKE2b needs about one second per gigabyte and core, little compared with training or
extraction.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from lavender.errors import ModelError
from lavender.files import expanded

_UNREAD_BY_TRAINING = ("extraction.json", "writer.lock")
_UNREAD_ENDINGS = (".md", ".jsonl")
_INDEX = "model_index.json"
_OF_PARTS = (".safetensors", ".json", ".txt", ".model", ".jinja")


def digest_of_folder(folder: Path) -> str:
    """Digest of names and contents of all files that loading may read: no hidden files, READMEs or logs of a store.

    Links to folders are followed, as loading follows them.
    """
    return _digest_of_files(
        folder,
        [
            path
            for path in _files_in(folder, ())
            if path.name not in _UNREAD_BY_TRAINING and path.suffix not in _UNREAD_ENDINGS
        ],
    )


def digest_of_pipeline(pipeline: str | Path) -> str:
    """As `digest_of_model`, for a pipeline of diffusers: of its index and of what its parts may be loaded from.

    Not of pickles, variants such as fp16, or copies in one file, which are large and never read.
    """
    folder = expanded(pipeline)
    if not folder.is_dir():
        return f"commit {commit_of(str(pipeline), _INDEX)}"
    parts = [path for path in _files_in(folder, ()) if path.parent != folder and path.suffix in _OF_PARTS]
    return _digest_of_files(folder, [folder / _INDEX, *(path for path in parts if not _is_variant(path))])


def _is_variant(path: Path) -> bool:
    """Whether weights are of a variant, as "model.fp16.safetensors", which is read if a caller names it."""
    return path.suffix == ".safetensors" and "." in path.stem


def _digest_of_files(folder: Path, files: list[Path]) -> str:
    files = sorted(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest_of_file, files)
        names = [str(path.relative_to(folder)) for path in files]
        return digest_of(zip(names, digests, strict=True))


def _files_in(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """The files in a folder and in those below it, without hidden ones. `above` are real paths of folders around it."""
    real = os.path.realpath(folder)
    for path in folder.iterdir() if real not in above else ():  # else a circle of links
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_in(path, (*above, real))
        elif path.is_file():
            yield path


def digest_of_file(path: Path) -> str:
    """BLAKE2b of the content, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of(parts: Iterable[Any]) -> str:
    """Digest of JSON values in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def digest_of_model(model: str | Path) -> str:
    """Digest of a model folder's content; for a Hub id its commit, which identifies the content."""
    folder = expanded(model)
    return digest_of_folder(folder) if folder.is_dir() else f"commit {commit_of(str(model))}"


def commit_of(hub_id: str, file: str = "config.json") -> str:
    """The commit of a model's main branch on the Hub, or offline of what the Hub's cache has of it.

    Raises:
        ModelError: the file is out of reach, or its place in the cache names no commit.
    """
    try:
        found = extract_commit_hash(cached_file(hub_id, file), None)
    except OSError as error:
        raise ModelError(
            f"{hub_id}, whose {file} is out of reach: {str(error).splitlines()[0]}",
            "a model folder, or a model on the Hub or in its cache",
            "check the path or the id, and the network",
        ) from error
    if found is None:
        raise ModelError(
            f"{hub_id}, whose files in the Hub's cache are in no commit's folder",
            "the cache as huggingface_hub writes it",
            "remove what is there of this model, or download it to a folder and name that",
        )
    return found
