"""What the tests' own comparisons see, and on which kernels they run."""

from __future__ import annotations

import os

import pytest
import torch

from closeness import close, moved


def test_last_bits_are_no_move_and_a_step_of_adam_is():
    weights = {"a": torch.rand(7, 11), "b": torch.zeros(13)}
    assert moved(weights, {name: one * (1 + 1e-6) for name, one in weights.items()}) == []
    assert moved(weights, weights | {"b": torch.full((13,), 1e-3)}) == ["b"]
    assert moved(weights, weights | {"b": torch.full((13,), 1e-3)}, step=0.2) == []
    with pytest.raises(AssertionError):
        moved(weights, {"a": weights["a"]})
    assert close(5.0) == 5.00001
    assert close(5.0) != 5.01


def test_a_missing_number_is_a_move():
    assert moved({"a": torch.ones(3)}, {"a": torch.tensor([1.0, float("nan"), 1.0])}) == ["a"]


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" not in os.environ, reason="the kernels are not limited")
def test_limited_kernels_are_in_force():
    """`make test-cpu`: torch falls back silently on a name that it does not know."""
    assert torch.backends.cpu.get_cpu_capability().lower() == os.environ["ATEN_CPU_CAPABILITY"]
