"""Every public name shows an example in its docstring, and the examples run as written."""

from __future__ import annotations

import doctest

import pytest

import lavender


@pytest.mark.parametrize("name", lavender.__all__)
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    examples = doctest.DocTestFinder().find(getattr(lavender, name), name)
    assert any(example.name == name and example.examples for example in examples), f"no example in {name}'s docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    report: list[str] = []
    for example in examples:  # the name's own and those of its methods
        runner.run(example, out=report.append)
    assert not report, "".join(report)
