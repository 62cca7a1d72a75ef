"""When are two trainings the same one?

To the bit may be compared what the very same tensors gave, in one process, at the same shapes, and what is read
back from a file. Two models that were made apart lie elsewhere in memory, and kernels choose by alignment, processor,
shape and number of threads in which order they add: their last bits may differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

Weights = dict[str, torch.Tensor]


def moved(expected: Weights, found: Weights, step: float = 1e-3) -> list[str]:
    """Names of the weights that differ by more than a hundredth of one step of training.

    Args:
        step: by how much one step moves a weight; of Adam the learning rate. It turns last bits of a gradient near 0
            into a step of a single weight, so it is the root of the mean square that counts.
    """
    assert found.keys() == expected.keys()
    return [
        name
        for name, one in expected.items()
        if not (found[name].double() - one.double()).square().mean().sqrt() <= step / 100  # NaN is a move, too
    ]


def close(numbers: Any) -> Any:
    """For `==`: numbers that a training logged, of which last bits may differ."""
    return pytest.approx(numbers, rel=1e-4, abs=1e-5)
