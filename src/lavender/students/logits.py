"""Logits of chosen rows: those of all tokens of a batch of large pictures need more memory than the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def logits_at(model: Any, inputs: Mapping[str, Any], rows: Iterable[int], **more: Any) -> Tensor:
    """The logits of some rows in float32: (sample, row, vocabulary).

    Others are not computed where the model's forward takes a tensor `logits_to_keep`, as transformers' models do.

    Args:
        model: a vision-language model.
        inputs: of its processor.
        rows: different positions in the sequence, in the order of the result.
        more: further arguments of its forward.
    """
    index = torch.tensor(list(rows), dtype=torch.long, device=model.device)
    if _takes_rows(model):
        return model(**inputs, logits_to_keep=index, **more).logits.float()
    return model(**inputs, **more).logits[:, index].float()


def last_row(model: Any) -> dict[str, int]:
    """What keeps a forward from computing more logits than those of the last row, where nobody reads logits."""
    return {"logits_to_keep": 1} if _takes_rows(model) else {}


def _takes_rows(model: Any) -> bool:
    found = inspect.signature(type(model).forward).parameters.get("logits_to_keep")
    return found is not None and "Tensor" in str(found.annotation)
