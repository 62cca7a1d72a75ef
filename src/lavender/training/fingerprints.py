"""Digests of what a run is made from, besides its model: its data, and the files that its settings name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavender.data.fingerprints import digest_of, digest_of_file
from lavender.data.samples import Samples
from lavender.training.settings import PATHS


def digest_of_data(samples: Samples) -> str:
    """Digest of texts, pixels and `about` in their order, of samples from `lavender.data.samples.readable`."""
    pairs = zip(samples, samples.identities, strict=True)
    return digest_of(
        (sample.messages, pictures, *([sample.about] if sample.about else [])) for sample, pictures in pairs
    )


def digests_of_settings(training: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each file that a training setting names."""
    named = {key: training[key] for key in PATHS if isinstance(training.get(key), str)}
    return {key: digest_of_file(Path(path)) for key, path in named.items() if Path(path).is_file()}
