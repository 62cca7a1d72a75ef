"""The Aligner: its forms and sizes, its range, what a cell sees, what it does with flat maps."""

from __future__ import annotations

from typing import cast, get_args

import pytest
import torch
from torch import Tensor, nn

from lavender.alignment.aligner import Aligner
from lavender.config import AlignerActivation, AlignerForm, AlignerKind, AlignerNorm

FORMS = pytest.mark.parametrize("form", get_args(AlignerForm))
KINDS = pytest.mark.parametrize("kind", get_args(AlignerKind))
NORMS = pytest.mark.parametrize("norm", get_args(AlignerNorm))
ACTIVATIONS = pytest.mark.parametrize("activation", get_args(AlignerActivation))


def size_of(aligner: Aligner) -> int:
    return sum(parameter.numel() for parameter in aligner.parameters())


def before_min_max(aligner: Aligner, attention: Tensor) -> Tensor:
    return nn.Sequential.forward(aligner, attention).squeeze(1)


@NORMS
@ACTIVATIONS
@pytest.mark.parametrize(
    ("form", "kind", "size"),
    [
        # 9 or 1 times 32², two, three or five times; then 32 weights and a bias
        ("light", "convolution", 18_465),
        ("sim", "convolution", 27_681),
        ("deep", "convolution", 46_113),
        ("light", "mlp", 2_081),
        ("sim", "mlp", 3_105),
        ("deep", "mlp", 5_153),
    ],
)
def test_the_sizes_of_the_papers(form, kind, norm, activation, size):
    assert size_of(Aligner(32, 32, form, kind, norm, activation)) == size


def test_the_default_is_the_papers():
    # 3 × 3 kernels without bias 2→3, 3→3, 3→2; then 2 weights and a bias
    assert size_of(Aligner(2, 3)) == 9 * (6 + 9 + 6) + 3
    assert [str(layer) for layer in Aligner(2, 3)] == [str(layer) for layer in Aligner(2, 3, "sim")]


@pytest.mark.parametrize(
    ("channels", "form", "layers"),
    [
        (2, "light", "2→5 norm act 5→2 norm act 2→1+"),
        (2, "sim", "2→5 norm act 5→5 norm act 5→2 norm act 2→1+"),
        (2, "deep", "2→5 norm act 5→5 norm act 5→5 act 5→5 act 5→2 norm act 2→1+"),
        (1, "light", "1→5 norm act 5→5 norm act 5→1+"),
        (1, "sim", "1→5 norm act 5→5 norm act 5→5 norm act 5→1+"),
    ],
)
def test_the_order_of_layers(channels, form, layers):
    """Two heads, or heads that are pooled already; width 5; + is a bias."""
    found = []
    for layer in Aligner(channels, 5, form):
        if isinstance(layer, nn.Conv2d):
            found.append(f"{layer.in_channels}→{layer.out_channels}{'+' if layer.bias is not None else ''}")
        else:
            found.append({"InstanceNorm2d": "norm", "ReLU6": "act"}[type(layer).__name__])
    assert " ".join(found) == layers


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("instance", nn.InstanceNorm2d), ("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("none", nn.Identity)],
)
def test_normalisations_have_the_channels_of_the_layer_before(norm, kind):
    layers = list(Aligner(2, 5, norm=norm))
    assert [type(layer) for layer in layers[1::3]] == [kind] * 3
    sizes = [getattr(layer, "num_features", getattr(layer, "num_channels", None)) for layer in layers[1::3]]
    assert sizes == ([None] * 3 if norm == "none" else [5, 5, 2])


@pytest.mark.parametrize(("width", "groups"), [(7, 1), (12, 4), (16, 8), (32, 8), (1, 1)])
def test_groups_divide_the_channels(width, groups):
    """At most eight; a prime number of channels is one group."""
    norm = Aligner(3, width, norm="group")[1]
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups


def test_activations_by_hand():
    values = torch.tensor([-3.0, 0.5, 7.0])
    assert Aligner(2, 3, activation="relu6")[2](values).tolist() == [0, 0.5, 6]
    assert Aligner(2, 3, activation="leaky-relu")[2](values).tolist() == pytest.approx([-0.3, 0.5, 7])


@pytest.mark.parametrize(
    ("form", "kind", "reach"),
    [
        ("light", "convolution", 2),
        ("sim", "convolution", 3),
        ("deep", "convolution", 5),
        ("light", "mlp", 0),
        ("sim", "mlp", 0),
        ("deep", "mlp", 0),
    ],
)
def test_how_far_a_cell_sees(form, kind, reach):
    """One cell a layer of 3 × 3; with "mlp" a cell sees itself alone."""
    aligner, attention = Aligner(3, 5, form, kind, "none", "leaky-relu"), torch.rand(2, 3, 17, 19)
    other = attention.clone()
    other[1, :, 7, 8] += 1
    changed = (before_min_max(aligner, other) != before_min_max(aligner, attention)).nonzero()
    side = 2 * reach + 1
    assert len(changed) == side * side
    assert changed.amin(dim=0).tolist() == [1, 7 - reach, 8 - reach]
    assert changed.amax(dim=0).tolist() == [1, 7 + reach, 8 + reach]


@FORMS
@KINDS
@NORMS
@ACTIVATIONS
def test_every_variant_makes_maps_and_has_gradients(form, kind, norm, activation):
    """Also with prime numbers of heads and channels, and of one channel. A flat word breaks nothing."""
    for channels, width in ((7, 5), (1, 5)):
        aligner, attention = Aligner(channels, width, form, kind, norm, activation), torch.rand(3, channels, 11, 13) * 4
        attention[1] = 1
        attention.requires_grad_()
        maps = aligner(attention)
        assert maps.shape == (3, 11, 13)
        assert maps.amin() == 0
        assert maps.amax() <= 1
        maps.square().sum().backward()
        assert attention.grad is not None
        assert attention.grad.isfinite().all()
        assert all(one.grad is not None and one.grad.isfinite().all() for one in aligner.parameters())


@pytest.mark.parametrize("norm", ["instance", "group", "none"])
def test_maps_do_not_see_each_other(norm):
    aligner, attention = Aligner(3, 5, norm=norm), torch.rand(7, 3, 11, 13)
    torch.testing.assert_close(aligner(attention[2:3]), aligner(attention)[2:3], rtol=0, atol=1e-5)


def test_batch_normalisation_sees_the_batch_in_training_alone():
    aligner, attention = Aligner(3, 5, norm="batch", activation="leaky-relu"), torch.rand(7, 3, 11, 13)
    attention[:2] *= 5
    company, alone = aligner(attention)[:1], aligner(attention[:1])
    assert (company - alone).abs().max() > 1e-2
    norm = aligner[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked == 2
    assert cast(Tensor, norm.running_var).min() < 1  # it began at 1; these numbers spread less
    aligner.eval()
    torch.testing.assert_close(aligner(attention)[:1], aligner(attention[:1]), rtol=0, atol=1e-5)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_each_first_layer_is_normalised(norm):
    """Mean 0 and variance 1: of each channel of all maps, of each channel of a map, of a whole map."""
    values = torch.rand(3, 7, 11, 13) * 5 + 2
    axes = {"batch": (0, 2, 3), "instance": (2, 3), "group": (1, 2, 3)}[norm]
    normed = Aligner(2, 7, norm=norm)[1](values)
    assert normed.mean(dim=axes).abs().max() < 1e-5
    assert (normed.var(dim=axes, correction=0) - 1).abs().max() < 1e-4


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
