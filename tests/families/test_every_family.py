"""Every family that the registry names passes the contract."""

from __future__ import annotations

import importlib
from pathlib import Path

from families.contract import Contract
from lavender.students.registry import FAMILIES


def subclasses(parent: type) -> set[type]:
    return {child for direct in parent.__subclasses__() for child in {direct} | subclasses(direct)}


def test_every_family_passes_the_contract():
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"families.{path.stem}")
    assert set(FAMILIES.values()) <= {getattr(test, "adapter", None) for test in subclasses(Contract)}
