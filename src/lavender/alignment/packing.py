"""Packing: the samples of a batch one behind another in one row, without padding.

Positions start anew at each sample, and there is no mask: by the positions, or by the lengths, every attention kernel
keeps samples apart. So a word's rows see the image keys of their own sample alone, as in a row of its own.

Axis suffixes: B sample, T token, R row, K key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lavender.errors import ConfigError
from lavender.students.base import VlmAdapter

IGNORED = -100
"""Label of a token that is not predicted."""


def packed(batch: Mapping[str, Any], adapter: VlmAdapter) -> dict[str, Any]:
    """The batch in one row: one sample for the model, while words, keys and pictures stay with their samples.

    Args:
        batch: of `AlignmentCollator`, or of plain fine-tuning without `alignment`. Padding may be at either side.
        adapter: the adapter of the model's family.

    Returns:
        The tensors of a value per token as (1, token); `position_ids` in place of `attention_mask`; the lengths that
        flash kernels take; `alignment`, by sample as before, with positions in the row; all else as it was, such as
        pixels.

    Raises:
        ConfigError: the family does not pack, see `VlmAdapter.packs`.
    """
    if not adapter.packs:
        raise ConfigError(
            f"a model of the type {adapter.model_type!r}, which may need more than a row without padding",
            "a family that is known to pack",
            "train with a row per sample",
        )
    mask_BT = batch["attention_mask"].bool()
    rest = {name: value for name, value in batch.items() if name not in ("attention_mask", "alignment")}
    row: dict[str, Any] = {
        name: value[mask_BT][None] if isinstance(value, Tensor) and value.shape == mask_BT.shape else value
        for name, value in rest.items()
    }
    lengths_B = mask_BT.sum(dim=1)
    starts_B = lengths_B.cumsum(0) - lengths_B
    row["position_ids"] = (mask_BT.cumsum(dim=1) - 1)[mask_BT][None]
    if "labels" in row:  # else a sample's last token would predict the next sample's first
        row["labels"] = row["labels"].masked_fill(row["position_ids"] == 0, IGNORED)
    cuts = torch.cat([starts_B, lengths_B.sum()[None]]).int()
    row |= {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts}
    row |= {"max_length_q": int(lengths_B.max()), "max_length_k": int(lengths_B.max())}
    if "alignment" in batch:
        alignment, places_BT = batch["alignment"], (mask_BT.cumsum(dim=1) - 1).clamp_min(0) + starts_B[:, None]
        rows_BR, keys_BK = alignment["rows"], alignment["keys"]
        row["alignment"] = dict(alignment) | {
            "rows": places_BT.gather(1, rows_BR),
            "keys": places_BT.gather(1, keys_BK.clamp_min(0)).where(keys_BK >= 0, -1),
            "is_packed": torch.tensor(True),
        }
    return row
