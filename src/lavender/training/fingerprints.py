"""Digests of what a run is made from: its model, data and maps, and the files that its settings name.

Models and maps are read in full. BLAKE2b needs about one second per gigabyte and core, little compared with training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from lavender.data.samples import Samples
from lavender.errors import ModelError
from lavender.model_files import loading
from lavender.training.settings import PATHS

_UNREAD_BY_TRAINING = ("extraction.json", "writer.lock")
_UNREAD_ENDINGS = (".md", ".jsonl")


def digest_of_folder(folder: Path) -> str:
    """Digest of names and contents of all files that loading may read: no hidden files, READMEs or logs of a store."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in _UNREAD_BY_TRAINING
        and path.suffix not in _UNREAD_ENDINGS
    ]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest_of_file, files)
        names = [str(path.relative_to(folder)) for path in files]
        return _digest(zip(names, digests, strict=True))


def digest_of_file(path: Path) -> str:
    """BLAKE2b of the content, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of_model(model: str) -> str:
    """Digest of a model folder's content; for a Hub id its commit, which identifies the content."""
    return digest_of_folder(Path(model)) if Path(model).is_dir() else f"commit {commit_of(model)}"


def commit_of(hub_id: str) -> str:
    """The commit of a model's main branch on the Hub, or offline of what the Hub's cache has of it.

    Raises:
        ModelError: the model's config is out of reach, or its place in the cache names no commit.
    """
    with loading("model", hub_id):
        found = extract_commit_hash(cached_file(hub_id, "config.json"), None)
    if found is None:
        raise ModelError(
            f"{hub_id}, whose files in the Hub's cache are in no commit's folder",
            "the cache as huggingface_hub writes it",
            "remove what is there of this model, or download it to a folder and name that",
        )
    return found


def digest_of_data(samples: Samples) -> str:
    """Digest of texts, pixels and `about` in their order, of samples from `lavender.data.samples.readable`."""
    pairs = zip(samples, samples.identities, strict=True)
    return _digest((sample.messages, pictures, *([sample.about] if sample.about else [])) for sample, pictures in pairs)


def digests_of_settings(training: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each file that a training setting names."""
    named = {key: training[key] for key in PATHS if isinstance(training.get(key), str)}
    return {key: digest_of_file(Path(path)) for key, path in named.items() if Path(path).is_file()}


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()
