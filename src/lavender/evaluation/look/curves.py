"""Insertion and deletion curves as the page of `lavender look` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lavender.evaluation.faithfulness import Faithfulness

COLUMNS = ("deletion AUC", "in random orders", "insertion AUC", "in random orders", "against random")
_LEFT, _RIGHT, _UPPER, _BOTTOM = 46, 292, 26, 146  # of a drawing of 300 × 170


def faithfulness_view(judged: Faithfulness, steps: int) -> dict[str, Any]:
    """The table and the curves of `faithfulness`.

    Returns:
        `lead`; `columns`; `num_random`; `rows`, one per target: `name`, `cells`, `verdict` and its two `curves`.
    """
    number = len(judged.of_random)
    rows = []
    for target, (name, own) in enumerate(zip(judged.names, judged.of_maps, strict=True)):
        random_deletion = [float(curves.deletion_auc[target]) for curves in judged.of_random]
        random_insertion = [float(curves.insertion_auc[target]) for curves in judged.of_random]
        deletion, insertion = float(own.deletion_auc[0]), float(own.insertion_auc[0])
        verdict = f"deletion {_against(deletion, random_deletion)}, insertion {_against(insertion, random_insertion)}"
        mean_deletion = torch.stack([curves.deletion[:, target] for curves in judged.of_random]).mean(dim=0)
        mean_insertion = torch.stack([curves.insertion[:, target] for curves in judged.of_random]).mean(dim=0)
        rows.append(
            {
                "name": name,
                "verdict": verdict,
                "cells": [
                    _number(deletion),
                    _range(random_deletion),
                    _number(insertion),
                    _range(random_insertion),
                    verdict,
                ],
                "curves": [
                    _drawn("deletion", "hidden", own.shares, own.deletion[:, 0], mean_deletion),
                    _drawn("insertion", "shown", own.shares, own.insertion[:, 0], mean_insertion),
                ],
            }
        )
    lead = (
        f"The picture is hidden in {steps} steps, the brightest places of a word’s map first (deletion); or it is "
        "shown in this order, from all hidden (insertion). After each step the model says how likely it finds the "
        "word. If the word depends on these places, deletion is lower than in random orders, and insertion higher. "
        f"The area under a curve (AUC) is its mean. With {number} random orders a difference is a hint, not a test."
    )
    return {"lead": lead, "columns": list(COLUMNS), "num_random": number, "rows": rows}


def _against(value: float, others: Sequence[float]) -> str:
    if value < min(others):
        return f"below all {len(others)}"
    return f"above all {len(others)}" if value > max(others) else f"within the {len(others)}"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _range(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{_number(mean)} ({_number(min(values))} to {_number(max(values))})"


def _drawn(name: str, axis: str, shares: Tensor, own: Tensor, control: Tensor) -> dict[str, Any]:
    """Two lines in the coordinates of a drawing of 300 × 170."""
    low, high = float(torch.cat([own, control]).min()), float(torch.cat([own, control]).max())
    span = (high - low) or 1.0

    def points(values: Tensor) -> str:
        return " ".join(
            f"{_LEFT + share * (_RIGHT - _LEFT):.1f},{_BOTTOM - (value - low) / span * (_BOTTOM - _UPPER):.1f}"
            for share, value in zip(shares.tolist(), values.tolist(), strict=True)
        )

    return {
        "name": name,
        "axis": axis,
        "map": points(own),
        "control": points(control),
        "low": _number(low),
        "high": _number(high),
        "upper": _UPPER,
        "bottom": _BOTTOM,
        "description": f"from {_number(float(own[0]))} to {_number(float(own[-1]))} in the order of the map",
    }
