"""The versions that pyproject.toml allows: none with a known advisory that a fix is out for; the tested ones fit."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EVERY = [Requirement(one) for one in PROJECT["dependencies"]]
EVERY += [Requirement(one) for extra in PROJECT["optional-dependencies"].values() for one in extra]
PINNED = {
    canonicalize_name(name): version
    for name, version in (
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")
    )
}
UNTESTED = ("num2words", "sentencepiece", "torchvision")
"""Of extras for published models, which no test has."""
# name → the first version without the advisory
SAFE = {
    "jinja2": "3.1.6",  # CVE-2025-27516: out of the sandbox, in which chat templates run
    "pillow": "11.3",  # CVE-2025-48379: a DDS picture is written beyond its buffer
    "tqdm": "4.66.3",  # CVE-2024-34062: arguments of its command line are run
    "pyarrow": "14.0.1",  # CVE-2023-47248: a data file runs code
    "pyyaml": "5.4",  # CVE-2020-14343: full_load runs code
    "ray": "2.52",  # CVE-2025-62593: a web page reaches a cluster's job interface
    "torch": "2.6",  # CVE-2025-32434: torch.load(weights_only=True) runs code
    "transformers": "4.53",  # CVE-2025-6921 and others: regular expressions that do not end
}


def floor(name: str) -> Version:
    (found,) = (one for one in EVERY if canonicalize_name(one.name) == name)
    return max(Version(one.version) for one in found.specifier if one.operator == ">=")


@pytest.mark.parametrize("name", SAFE)
def test_no_version_with_a_known_advisory_is_allowed(name):
    assert floor(name) >= Version(SAFE[name])


@pytest.mark.parametrize("requirement", EVERY, ids=str)
def test_the_tested_version_is_an_allowed_one(requirement):
    if requirement.name in UNTESTED:
        return
    assert requirement.specifier.contains(PINNED[canonicalize_name(requirement.name)], prereleases=True)
