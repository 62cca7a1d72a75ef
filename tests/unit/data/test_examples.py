"""The examples in the docstrings of maps, words and data run as printed."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

MODULES = ("maps", "words", "data.images", "data.samples", "data.store")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run_as_printed(name):
    failed, attempted = doctest.testmod(import_module(f"lavender.{name}"))
    assert attempted > 0
    assert failed == 0
