"""Attention forcing: chosen rows attend to the picture as a map says, in place of their own attention.

It is to attention what teacher forcing is to tokens: the layers after the row learn to use what lies in the right place
before the row itself looks there. Only how a row's attention is spread over the image keys that it sees changes; the
share that goes to text stays the row's own. A row that sees no key with heat keeps its own attention. Gradients are
exact: they reach values, and the queries and keys through that share.

Axis suffixes: B sample, N row of the batch (a sample, or several that are packed), H head, G key head, R row, F forced
row, T token, W word, K key, I image key, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lavender.students.image_keys import KeyLayout, on_keys
from lavender.students.rows import Scoring, hidden_score, row_parts, scores_of, select_rows

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
        is_forced_BR = self._weight_BWR.sum(dim=1) > 0
        first_BR = (~is_forced_BR).int().argsort(dim=1, stable=True)  # forced rows before the others
        self._chosen_BF = first_BR[:, : int(is_forced_BR.sum(dim=1).max())]
        self._real = is_forced_BR.gather(1, self._chosen_BF).flatten().nonzero()[:, 0]  # of the chosen, in one row
        self._placed: tuple[Tensor, Tensor] | None = None

    @torch.compiler.disable
    def output(
        self,
        output_NTHD: Tensor,
        query_NHTD: Tensor,
        key_NGKD: Tensor,
        value_NGKD: Tensor,
        scoring: Scoring,
        rows_NR: Tensor,
        keys_BI: Tensor | None,
        mixing_VNP: Tensor | None,
    ) -> Tensor:
        """The output of an attention layer, with its forced rows replaced: (batch row, token, head, head width).

        Autograd keeps the queries of the forced rows alone: in backward all else is computed again, in parts.

        Args:
            output_NTHD: the layer's own output.
            query_NHTD, key_NGKD, value_NGKD, scoring: what the layer computes it from.
            rows_NR, keys_BI: see `AttentionRequest`.
            mixing_VNP: attention of a resampler's latents on its patches; None without one.
        """
        if not len(self._real):
            return output_NTHD
        batch, device = len(query_NHTD), key_NGKD.device
        placed = self._placed_targets(batch, key_NGKD.shape[2], keys_BI, mixing_VNP)
        target_NFK, is_image_NK = (one.to(device) for one in placed)
        # rows_NR holds the rows of several samples one behind another if these are packed
        index_BR = torch.arange(rows_NR.shape[1], device=device).expand_as(rows_NR).reshape(len(self._chosen_BF), -1)
        index_NF = index_BR.gather(1, self._chosen_BF.to(device)).view(batch, -1)
        positions_NF = rows_NR.to(device).gather(1, index_NF)

        def mixed(query_NHFD: Tensor, key_NGKD: Tensor, value_NGKD: Tensor, part: slice) -> Tensor:
            mask = scoring.mask
            mask = None if mask is None else select_rows(mask.expand(batch, -1, -1, -1), index_NF[:, part])
            scores_NHFK = scores_of(query_NHFD, key_NGKD, positions_NF[:, part], scoring._replace(mask=mask))
            target_NHFK = target_NFK[:, None, part] * (scores_NHFK > hidden_score(mask, scores_NHFK) / 2)
            return _mixed(scores_NHFK.softmax(dim=-1), target_NHFK, is_image_NK[:, None, None], value_NGKD)

        query_NHFD = select_rows(query_NHTD, positions_NF)
        forget = partial(checkpoint, mixed, use_reentrant=False, preserve_rng_state=False)
        parts = row_parts(query_NHFD, key_NGKD)
        forced_NFHD = torch.cat([forget(query_NHFD[:, :, part], key_NGKD, value_NGKD, part) for part in parts], dim=1)
        real, positions = self._real.to(output_NTHD.device), positions_NF.to(output_NTHD.device).flatten()
        heads = range(query_NHTD.shape[1]) if self._heads is None else self._heads
        heads = torch.tensor(heads, device=output_NTHD.device)
        places = (real // index_NF.shape[1])[:, None], positions[real][:, None], heads[None]
        forced = forced_NFHD.flatten(0, 1).to(output_NTHD)[real][:, heads]
        return output_NTHD.index_put(places, forced)

    def _placed_targets(
        self, batch: int, num_keys: int, keys_BI: Tensor | None, mixing_VNP: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The forced rows' shares of all keys, (batch row, row, key), and which keys are image keys, (batch row, key).

        Without gradient, and the same in every layer. Shares sum to 1, or to 0 where no key shows a part of the map.
        """
        if self._placed is None:
            mixing = None if mixing_VNP is None else mixing_VNP.detach()
            with torch.autocast(self._heat.device.type, enabled=False):
                heat_BWI = on_keys(self._heat, self._layout, self._word_pictures, mixing)
                shares_BWI = heat_BWI / heat_BWI.sum(dim=-1, keepdim=True).clamp_min(LEAST)
                chosen_BWF = self._chosen_BF[:, None].expand(-1, shares_BWI.shape[1], -1)
                total_BFI = torch.einsum(
                    "bwf,bwi->bfi", self._weight_BWR.gather(2, chosen_BWF).to(shares_BWI), shares_BWI
                )
                target_BFK = total_BFI / total_BFI.sum(dim=-1, keepdim=True).clamp_min(LEAST)
            is_image_BK = self._layout.pictures >= 0
            if keys_BI is not None:
                target_BFK = _on_sequence(target_BFK, keys_BI, num_keys)
                is_image_BK = _on_sequence(is_image_BK[:, None].to(target_BFK), keys_BI, num_keys)[:, 0] > 0
            is_image_NK = is_image_BK.view(batch, -1, num_keys).any(dim=1)
            self._placed = target_BFK.reshape(batch, -1, num_keys), is_image_NK
        return self._placed


def _mixed(own_NHFK: Tensor, target_NHFK: Tensor, is_image_N11K: Tensor, value_NGKD: Tensor) -> Tensor:
    """The values mixed by forced attention: (batch row, row, head, head width).

    Args:
        own_NHFK: the rows' own attention.
        target_NHFK: the map's shares of the keys that a row sees.
        is_image_N11K: which keys are image keys.
        value_NGKD: the layer's values.
    """
    share_NHF1 = (own_NHFK * is_image_N11K).sum(dim=-1, keepdim=True)
    total_NHF1 = target_NHFK.sum(dim=-1, keepdim=True)
    forced_NHFK = own_NHFK.masked_fill(is_image_N11K, 0) + share_NHF1 * target_NHFK / total_NHF1.clamp_min(LEAST)
    forced_NHFK = torch.where(total_NHF1 > LEAST, forced_NHFK, own_NHFK)
    forced_NGQFK = forced_NHFK.unflatten(1, (value_NGKD.shape[1], -1))
    return torch.einsum("ngqfk,ngkd->nfgqd", forced_NGQFK, value_NGKD.to(forced_NGQFK.dtype)).flatten(2, 3)


def _on_sequence(values_BRI: Tensor, keys_BI: Tensor, num_keys: int) -> Tensor:
    """Values of image keys at their positions in the sequence, 0 elsewhere: (sample, row, key)."""
    keys_BI = keys_BI.to(values_BRI.device)
    values_BRI = values_BRI.masked_fill(keys_BI[:, None] < 0, 0)
    index = keys_BI.clamp_min(0)[:, None].expand_as(values_BRI)
    return values_BRI.new_zeros(*values_BRI.shape[:2], num_keys).scatter_add(2, index, values_BRI)
