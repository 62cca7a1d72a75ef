"""Packing: the samples of a batch one behind another in one row, without padding.

Positions start anew at each sample, and there is no mask: by the positions, or by the lengths, every attention kernel
keeps samples apart. So a word's rows see the image keys of their own sample alone, as in a row of its own.

Axis suffixes: B sample, T token, R row, W word, K key.
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
    """The batch in one row: one sample for the model, with the words, keys and pictures of all.

    Args:
        batch: of `AlignmentCollator`, or of plain fine-tuning without `alignment`. Padding may be at either side.
        adapter: the adapter of the model's family.

    Returns:
        The tensors of a value per token as (1, token); `position_ids` in place of `attention_mask`; the lengths that
        flash kernels take; `alignment`, of one sample; all else as it was, such as pixels.

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
        row["alignment"] = _packed_alignment(batch["alignment"], mask_BT.cumsum(dim=1) - 1 + starts_B[:, None])
    return row


def _packed_alignment(alignment: Mapping[str, Any], places_BT: Tensor) -> dict[str, Any]:
    """The alignment of one row. `places_BT` are the positions of the tokens in it."""
    present_BW, pictures_BK = alignment["present"], alignment["pictures"]
    is_key_BK, is_row_BR = pictures_BK >= 0, (alignment["shares"] > 0).any(dim=1)
    num_pictures_B = torch.tensor([len(own[own >= 0].unique()) for own in pictures_BK])
    earlier_B1 = (num_pictures_B.cumsum(0) - num_pictures_B)[:, None]  # pictures of earlier samples
    shares = [own[words][:, rows] for own, words, rows in zip(alignment["shares"], present_BW, is_row_BR, strict=True)]
    tensors = {
        "rows": places_BT.gather(1, alignment["rows"])[is_row_BR],
        "word_pictures": (alignment["word_pictures"] + earlier_B1)[present_BW],
        **{name: alignment[name][present_BW] for name in ("present", "weights", "targets", "reads")},
    }
    if not present_BW.any():  # a word of padding takes the place, as in a row of its own
        tensors = {name: one.new_zeros(1, *one.shape[1:]) for name, one in tensors.items()}
        shares = [alignment["shares"].new_zeros(1, 1)]
    tensors |= {
        "shares": torch.block_diag(*shares),
        "keys": places_BT.gather(1, alignment["keys"].clamp_min(0))[is_key_BK],
        "pictures": (pictures_BK + earlier_B1)[is_key_BK],
        "boxes": alignment["boxes"][is_key_BK],
        "is_packed": torch.tensor(True),
    }
    row = {name: one[None] for name, one in tensors.items()}
    row["words"] = [[word for own in alignment["words"] for word in own]]
    row["names"] = ["; ".join(alignment["names"])]
    return dict(alignment) | row
