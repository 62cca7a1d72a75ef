"""Every public name shows an example in its docstring, and the examples run as written."""

from __future__ import annotations

import doctest

import pytest

import lavender


class Checker(doctest.OutputChecker):
    """Compares output only where the example shows some: training logs as it pleases."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", lavender.__all__)
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    docstrings = doctest.DocTestFinder().find(getattr(lavender, name), name)  # the name's and those of its methods
    lines = next((docstring.examples for docstring in docstrings if docstring.name == name), [])
    assert any(line.want and not line.options.get(doctest.SKIP) for line in lines), f"{name} shows no example that runs"
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    report: list[str] = []
    for docstring in docstrings:
        runner.run(docstring, out=report.append)
    assert not report, "".join(report)
