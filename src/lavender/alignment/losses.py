"""The alignment loss: how far the student's attention on a word is from the teacher's map.

`direct_loss` is of the attention itself, on the image keys. `per_word_loss` is the paper's: of two min–max maps, the
Aligner's output and the teacher's. Min–max maps have a shape, but no level: such a loss is near 0 as soon as attention
is highest in the right place, however much of it lies elsewhere (docs/method.md).

Axis suffixes: L layer, N word of the batch, K image key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavender.config import AttentionLoss
from lavender.maps import min_max

FLOOR = 1e-6  # added to every cell before a map becomes a distribution, so that logarithms are finite
LEAST = 1e-8  # of attention, before a logarithm: softmax of many keys gives shares far below FLOOR


def prepared(maps: Tensor, sharpen: float = 1.0, subtract_background: bool = False) -> Tensor:
    """Teacher's maps as targets: heat in [0, 1], (…, rows, cols). A map without contrast becomes 1 everywhere.

    Args:
        maps: (…, rows, cols), 0 or more.
        sharpen: power to which the heat is raised.
        subtract_background: subtract the median of the map's cells first. A map that this would leave without
            contrast, such as the mask of a thing that covers most of the picture, stays as it is.
    """
    if subtract_background:
        lowered = (maps - maps.flatten(-2).median(dim=-1).values[..., None, None]).clamp_min(0)
        keeps_contrast = lowered.amax(dim=(-2, -1), keepdim=True) > FLOOR * maps.amax(dim=(-2, -1), keepdim=True)
        maps = torch.where(keeps_contrast, lowered, maps)
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    has_contrast = high - low > FLOOR * high
    heat = (maps - low) / torch.where(has_contrast, high - low, 1)
    return torch.where(has_contrast, heat.pow(sharpen), 1.0)


def share_on_map(attention: Tensor, heat: Tensor) -> Tensor:
    """The share of the attention that lies on the map, from 0 to 1: Σ A·h / Σ A over the last axis.

    Args:
        attention: attention on image keys, 0 or more.
        heat: heat of the same keys, in [0, 1].
    """
    return (attention * heat).sum(dim=-1) / attention.sum(dim=-1).clamp_min(LEAST)


def direct_loss(attention_LNK: Tensor, heat_NK: Tensor, kind: AttentionLoss, sees_LN: Tensor | None = None) -> Tensor:
    """The loss of each word's own attention, (word,): mean over the layers in which the word sees its picture.

    "mass" is −ln of the share of attention that lies on the map. It is 0 if all attention lies where the map is 1,
    wherever there. "kl" is KL(map ‖ attention), both as distributions over the keys, so attention must cover the map.

    Examples:
        >>> import torch
        >>> from lavender.alignment.losses import direct_loss
        >>> attention = torch.tensor([[[0.2, 0.2, 0.6]]])  # one layer, one word, three keys
        >>> round(direct_loss(attention, torch.tensor([[1.0, 1.0, 0.0]]), "mass").item(), 4)  # −ln 0.4
        0.9163

    Args:
        attention_LNK: attention on the image keys, 0 or more. It is divided by its sum over the keys.
        heat_NK: heat of each key, in [0, 1].
        kind: "mass" or "kl".
        sees_LN: which layers count: those whose window reaches back to the word's picture. By default those with any
            attention on image keys.

    Returns:
        In nats.
    """
    total_LN1 = attention_LNK.sum(dim=-1, keepdim=True)
    if kind == "mass":
        loss_LN = -torch.log(share_on_map(attention_LNK, heat_NK) + LEAST)
    else:
        attention_LNK = attention_LNK / total_LN1.clamp_min(LEAST)
        target_NK = heat_NK / heat_NK.sum(dim=-1, keepdim=True).clamp_min(LEAST)
        loss_LN = (torch.special.xlogy(target_NK, target_NK) - target_NK * torch.log(attention_LNK + LEAST)).sum(dim=-1)
    sees_LN = total_LN1[..., 0] != 0 if sees_LN is None else sees_LN  # NaN counts, so that the loss is NaN too
    return torch.where(sees_LN, loss_LN, 0).sum(dim=0) / sees_LN.sum(dim=0).clamp_min(1)


def per_word_loss(student: Tensor, teacher: Tensor, kind: AttentionLoss = "published") -> Tensor:
    """The paper's loss of each word, of maps that an Aligner made.

    Examples:
        >>> import torch
        >>> from lavender.alignment.losses import per_word_loss
        >>> per_word_loss(torch.rand(2, 24, 24), torch.rand(2, 24, 24)).shape
        torch.Size([2])

    Args:
        student: the Aligner's output, (word, rows, cols) in [0, 1].
        teacher: the teacher's maps, (word, rows, cols), 0 or more; scaled to [0, 1] here.
        kind: "published" is the squared difference of Eq. 9 as a mean over cells, the authors' form. "published-mse"
            (summed over cells), "published-kl" (teacher ‖ student) and "published-js" (Jensen–Shannon) compare the maps
            as distributions. "published-sum", only to reproduce the paper, is "published" summed over cells, as Eq. 9
            is written.

    Returns:
        (word,). "published" is in [0, 1]; "published-kl" and "published-js" are in nats, the latter at most ln 2.
    """
    teacher = min_max(teacher)
    if kind in ("published", "published-sum"):
        error = (student - teacher).square()
        return error.mean(dim=(-2, -1)) if kind == "published" else error.sum(dim=(-2, -1))
    student, teacher = _distribution(student), _distribution(teacher)
    if kind == "published-mse":
        return (student - teacher).square().sum(dim=(-2, -1))
    if kind == "published-kl":
        return _kl(teacher, student)
    middle = (student + teacher) / 2
    return (_kl(student, middle) + _kl(teacher, middle)) / 2


def _distribution(maps: Tensor) -> Tensor:
    maps = maps + FLOOR
    return maps / maps.sum(dim=(-2, -1), keepdim=True)


def _kl(truth: Tensor, estimate: Tensor) -> Tensor:
    return (truth * (torch.log(truth) - torch.log(estimate))).sum(dim=(-2, -1))
