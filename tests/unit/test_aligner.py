"""The Aligner: its size, its range, what it does with flat maps."""

from __future__ import annotations

import pytest
import torch

from lavender.aligner import Aligner


def test_the_size_of_the_papers():
    assert sum(parameter.numel() for parameter in Aligner(32, 32).parameters()) == 27_681
    # 3 × 3 kernels without bias 2→3, 3→3, 3→2; then 2 weights and a bias
    assert sum(parameter.numel() for parameter in Aligner(2, 3).parameters()) == 9 * (6 + 9 + 6) + 3


def test_maps_go_in_by_heads_and_come_out_one_each():
    aligner = Aligner(3, 5)
    attention = torch.rand(2, 3, 11, 7) * 4
    maps = aligner(attention)
    assert maps.shape == (2, 11, 7)
    assert maps.amin(dim=(1, 2)).tolist() == [0, 0]
    assert maps.amax(dim=(1, 2)).tolist() == pytest.approx([1, 1], abs=1e-4)
    torch.testing.assert_close(aligner(attention[1:]), maps[1:])  # maps do not see each other


def test_it_sees_shape_not_size():
    aligner, attention = Aligner(3, 5), torch.rand(2, 3, 11, 7)
    torch.testing.assert_close(aligner(attention * 7), aligner(attention), rtol=0, atol=1e-3)


def test_a_flat_map_gives_zero_and_finite_gradients():
    aligner, attention = Aligner(3, 5), torch.zeros(2, 3, 11, 7, requires_grad=True)
    maps = aligner(attention)
    assert maps.tolist() == torch.zeros(2, 11, 7).tolist()
    maps.sum().backward()
    assert attention.grad is not None
    assert attention.grad.isfinite().all()


def test_gradients_reach_every_head_and_parameter():
    aligner, attention = Aligner(3, 5), torch.rand(2, 3, 11, 7, requires_grad=True)
    aligner(attention).square().sum().backward()
    assert attention.grad is not None
    assert (attention.grad.abs().amax(dim=(2, 3)) > 0).all()
    grads = {name: parameter.grad for name, parameter in aligner.named_parameters()}
    # the last bias moves all cells alike, which min-max takes out
    assert [name for name, grad in grads.items() if grad is None or grad.abs().max() < 1e-4] == ["9.bias"]
