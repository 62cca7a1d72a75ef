"""What a run was made from, as digests of content: its model, data, maps, and the files that its settings name.

Models and maps are read whole: BLAKE2b takes about a second a gigabyte and core, little beside training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lavender.data.samples import Samples

FILE_SETTINGS = ("chat_template_path", "deepspeed", "fsdp_config")
"""Settings of training that may name a file of the user's."""
_UNREAD_BY_TRAINING = ("extraction.json", "writer.lock")
_UNREAD_ENDINGS = (".md", ".jsonl")


def digest_of_folder(folder: Path) -> str:
    """Of the names and contents of all files that loading may read: not hidden ones, READMEs, or logs of a store."""
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
        return _digest((str(path.relative_to(folder)), one) for path, one in zip(files, digests, strict=True))


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of_model(model: str, commit: str | None) -> str:
    """Of a folder its content; of a hub id the commit that it stands for, which names the content."""
    return digest_of_folder(Path(model)) if Path(model).is_dir() else f"commit {commit}"


def digest_of_data(samples: Samples) -> str:
    """Of texts and pixels in their order. The samples come from `readable`, which knows the pictures."""
    pairs = zip(samples, samples.identities, strict=True)
    return _digest((one.messages, pictures) for one, pictures in pairs)


def digests_of_settings(training: Mapping[str, Any]) -> dict[str, str]:
    """Of each file that a setting of training names."""
    named = {key: training[key] for key in FILE_SETTINGS if isinstance(training.get(key), str)}
    return {key: digest_of_file(Path(path)) for key, path in named.items() if Path(path).is_file()}


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()
