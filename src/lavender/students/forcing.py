"""Attention forcing: chosen rows attend to the picture as a map says, in place of their own attention.

It is to attention what teacher forcing is to tokens: the layers after the row learn to use what lies in the right place
before the row itself looks there. Only how a row's attention is spread over the image keys that it sees changes; the
share that goes to text stays the row's own. A row that sees no key with heat keeps its own attention. Gradients are
exact: they reach values, and the queries and keys through that share.

Axis suffixes: B sample, H head, G key head, R row, T token, W word, K key, I image key, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavender.students.image_keys import KeyLayout, on_keys
from lavender.students.rows import Scoring, hidden_score, scores_of, select_rows

LEAST = 1e-8


class Forcing:
    """Which rows are forced in one forward, and how they attend.

    Args:
        heat_BWrc: heat of the words' maps, in [0, 1].
        shares_BWR: 1/n at the n rows of a word, 0 elsewhere.
        forced_BW: bool, the words whose rows are forced.
        layout, word_pictures_BW: as for `lavender.students.image_keys.to_grid`.
        heads: indices of the heads that are forced; None for all.
    """

    def __init__(
        self,
        heat_BWrc: Tensor,
        shares_BWR: Tensor,
        forced_BW: Tensor,
        layout: KeyLayout,
        word_pictures_BW: Tensor,
        heads: Sequence[int] | None = None,
    ):
        self._heat, self._layout, self._word_pictures, self._heads = heat_BWrc, layout, word_pictures_BW, heads
        self._weight_BWR = (shares_BWR > 0) * forced_BW[..., None].to(shares_BWR)
        self._target_BRI: Tensor | None = None

    def output(
        self,
        output_BTHD: Tensor,
        query_BHTD: Tensor,
        key_BGKD: Tensor,
        value_BGKD: Tensor,
        scoring: Scoring,
        rows_BR: Tensor,
        keys_BI: Tensor | None,
        mixing_VNP: Tensor | None,
    ) -> Tensor:
        """The output of an attention layer, with its forced rows replaced: (sample, token, head, head width).

        Args:
            output_BTHD: the layer's own output.
            query_BHTD, key_BGKD, value_BGKD, scoring: what the layer computes it from.
            rows_BR, keys_BI: see `AttentionRequest`.
            mixing_VNP: attention of a resampler's latents on its patches; None without one.
        """
        samples, rows = (self._weight_BWR.sum(dim=1) > 0).nonzero(as_tuple=True)
        if not len(samples):
            return output_BTHD
        target_BRI = self._target(mixing_VNP).to(key_BGKD.device)
        scores_BHRK = scores_of(select_rows(query_BHTD, rows_BR), key_BGKD, rows_BR, scoring)
        own_BHRK = scores_BHRK.softmax(dim=-1)
        is_image_BK = self._is_image(keys_BI, key_BGKD)
        share_BHR = (own_BHRK * is_image_BK[:, None, None]).sum(dim=-1, keepdim=True)
        target_BRK = target_BRI if keys_BI is None else _on_sequence(target_BRI, keys_BI, key_BGKD.shape[2])
        target_BHRK = target_BRK[:, None] * (scores_BHRK > hidden_score(scoring.mask, scores_BHRK) / 2)
        total_BHR = target_BHRK.sum(dim=-1, keepdim=True)
        spread_BHRK = share_BHR * target_BHRK / total_BHR.clamp_min(LEAST)
        forced_BHRK = own_BHRK.masked_fill(is_image_BK[:, None, None], 0) + spread_BHRK
        forced_BHRK = torch.where(total_BHR > LEAST, forced_BHRK, own_BHRK)
        groups = value_BGKD.shape[1]
        forced_BGNRK = forced_BHRK.unflatten(1, (groups, -1))
        mixed = torch.einsum("bgnrk,bgkd->brgnd", forced_BGNRK, value_BGKD.to(forced_BGNRK.dtype)).flatten(2, 3)
        positions = rows_BR.to(samples.device)[samples, rows].to(output_BTHD.device)
        samples, rows = samples.to(output_BTHD.device), rows.to(output_BTHD.device)
        heads = torch.tensor(range(mixed.shape[2]) if self._heads is None else self._heads, device=positions.device)
        places = samples[:, None], positions[:, None], heads[None]
        return output_BTHD.index_put(places, mixed[samples, rows][:, heads].to(output_BTHD.dtype))

    def _target(self, mixing_VNP: Tensor | None) -> Tensor:
        """The forced rows' shares of the image keys: (sample, row, key), without gradient.

        They sum to 1, or to 0 where no key shows a part of the map.
        """
        if self._target_BRI is None:
            mixing = None if mixing_VNP is None else mixing_VNP.detach()
            with torch.autocast(self._heat.device.type, enabled=False):
                heat_BWI = on_keys(self._heat, self._layout, self._word_pictures, mixing)
                shares_BWI = heat_BWI / heat_BWI.sum(dim=-1, keepdim=True).clamp_min(LEAST)
                total_BRI = torch.einsum("bwr,bwi->bri", self._weight_BWR.to(shares_BWI), shares_BWI)
                self._target_BRI = total_BRI / total_BRI.sum(dim=-1, keepdim=True).clamp_min(LEAST)
        return self._target_BRI

    def _is_image(self, keys_BI: Tensor | None, key_BGKD: Tensor) -> Tensor:
        """Which keys of the layer are image keys: bool (sample, key)."""
        if keys_BI is None:
            return self._layout.pictures.to(key_BGKD.device) >= 0
        ones = torch.ones_like(keys_BI, dtype=torch.float32)
        return _on_sequence(ones[:, None], keys_BI, key_BGKD.shape[2])[:, 0].to(key_BGKD.device) > 0


def _on_sequence(values_BRI: Tensor, keys_BI: Tensor, num_keys: int) -> Tensor:
    """Values of image keys at their positions in the sequence, 0 elsewhere: (sample, row, key)."""
    keys_BI = keys_BI.to(values_BRI.device)
    values_BRI = values_BRI.masked_fill(keys_BI[:, None] < 0, 0)
    index = keys_BI.clamp_min(0)[:, None].expand_as(values_BRI)
    return values_BRI.new_zeros(*values_BRI.shape[:2], num_keys).scatter_add(2, index, values_BRI)
