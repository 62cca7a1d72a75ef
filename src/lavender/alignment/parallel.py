"""Learned parallel attention (Eq. 15–16): trainable query and key projections beside the pretrained ones.

Alignment alone uses them; the model's output does not change. They are children of the attention modules, so that
sharded training keeps them with their layer. Exports leave them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from lavender.config import ParallelInit
from lavender.errors import UnsupportedModelError
from lavender.students.base import Removable, VlmAdapter
from lavender.students.capture import PARALLEL_NAME, AttentionRequest, select_rows

CROSS_STATES = ("cross_attention_states", "key_value_states")
"""Names under which cross-attention modules get the states that their keys are made of."""
OWN = ("q_proj", "k_proj")
TOLERANCE = 0.05
"""How far a layer's own queries and keys may be from what `_placed` makes, relative to their length. 16 bits round by
less than 0.01; other rotations and norms differ by half and more."""


class ParallelProjections(nn.Module):
    """W′_Q and W′_K of one layer (Eq. 15), with a bias where the layer's own projections have one.

    In float32 even if the layer is not, as PEFT's adapters are: 16 bits round small steps away.

    Args:
        attention: attention module with `q_proj` and `k_proj`.
        init: "pretrained" copies the layer's own projections; "random" keeps torch's initialisation.

    Attributes:
        is_compared: whether the layer's own projections have been compared with what its kernel gets.
    """

    def __init__(self, attention: nn.Module, init: ParallelInit):
        super().__init__()
        pretrained = cast(nn.Linear, attention.q_proj), cast(nn.Linear, attention.k_proj)
        dtype = torch.promote_types(pretrained[0].weight.dtype, torch.float32)  # float32 for quantised weights too
        self.query, self.key = (
            nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=dtype)
            for linear in pretrained
        )
        if init == "pretrained":
            with _gathered([parameter for linear in pretrained for parameter in linear.parameters()]), torch.no_grad():
                for copy, linear in zip((self.query, self.key), pretrained, strict=True):
                    copy.weight.copy_(dequantize_module_weight(linear))
                    if linear.bias is not None:
                        copy.bias.copy_(linear.bias)
        self.is_compared = False
        self._kept: dict[str, Tensor] = {}
        self._watching: list[Removable] = []

    def forward(self, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Project the hidden states of the requested rows, and the states that the keys are made of."""
        dtype = self.query.weight.dtype
        return self.query(hidden.to(dtype)), self.key(context.to(dtype))

    @torch.compiler.disable
    def watch(self, attention: nn.Module) -> None:
        """Keep what the layer's own projections, which PEFT may have wrapped, return in this forward."""
        self.unwatch()
        for name in OWN:
            hook = attention.get_submodule(name).register_forward_hook(partial(self._keep, name))
            self._watching.append(hook)

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._kept[name] = output.detach()

    def unwatch(self) -> Mapping[str, Tensor]:
        """End `watch`. What it kept, by the names in `OWN`; nothing of a projection that a compiled graph ran."""
        kept, self._kept = self._kept, {}
        while self._watching:
            self._watching.pop().remove()
        return kept


def _gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Inside the context every process holds the whole parameters, which ZeRO-3 shards while it loads a model."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def check(attentions: Sequence[nn.Module], adapter: VlmAdapter) -> None:
    """Check that parallel projections can be added to attention modules, before anything is changed.

    Raises:
        UnsupportedModelError: the family makes its queries or keys in another way, or a layer has no such projections.
    """
    if attentions:
        adapter.check_projections()
    for attention in attentions:
        missing = [name for name in OWN if name not in dict(attention.named_children())]
        if missing:
            raise _unsupported(attention, f"has no {' and no '.join(missing)}")


def attach(
    attention: nn.Module, adapter: VlmAdapter, init: ParallelInit = "pretrained"
) -> torch.utils.hooks.RemovableHandle:
    """Add parallel projections to an attention module. They answer every request whose `learned` is True.

    Args:
        attention: attention module of a usable layer, which `check` accepts.
        adapter: the adapter of the model's family.
        init: see `ParallelProjections`.

    Returns:
        The handle of the hook that projects. `detach` removes the projections themselves.

    Raises:
        UnsupportedModelError: in the first forward: the layer does not normalise each head alone, or see `_compare`.
    """
    attention.add_module(PARALLEL_NAME, ParallelProjections(attention, init))
    return attention.register_forward_pre_hook(partial(_project, adapter), with_kwargs=True)


def _check_norms(attention: Any, adapter: VlmAdapter) -> None:
    children = dict(attention.named_children())
    for norm in (children[name] for name in adapter.head_norms if name in children):
        with _gathered(list(norm.parameters())):
            if any(parameter.shape != (attention.head_dim,) for parameter in norm.parameters()):
                raise _unsupported(attention, "normalises heads together, or each with a weight of its own")


def _unsupported(attention: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"pooling 'learn' with a {type(attention).__name__}, which {what}",
        "queries and keys of q_proj and k_proj, which the layer normalises by head and rotates as the family does",
        "choose another pooling or loss",
    )


def detach(model: nn.Module) -> None:
    """Remove the parallel projections of all layers of a model."""
    for module in list(model.modules()):
        parallel = dict(module.named_children()).get(PARALLEL_NAME)
        if isinstance(parallel, ParallelProjections):
            parallel.unwatch()
            delattr(module, PARALLEL_NAME)


def _project(adapter: VlmAdapter, attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    request: AttentionRequest | None = kwargs.get("attention_request")
    if request is None or attention.layer_idx not in request.layers or not request.answered_by_parallel(attention):
        return
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    project = attention.get_submodule(PARALLEL_NAME)
    if not project.is_compared:
        _check_norms(attention, adapter)
    cross_states = [kwargs[name] for name in CROSS_STATES if kwargs.get(name) is not None]
    context = cross_states[0] if cross_states else states
    projections = project(_at_rows(states, request), context)
    tables = None if cross_states else kwargs["position_embeddings"]
    request.projected[attention.layer_idx] = _placed(adapter, attention, request, tables, *projections)
    if not project.is_compared:
        project.watch(attention)
        request.compare[attention.layer_idx] = partial(_compare, adapter, attention, request, tables, states, context)


def _at_rows(states: Tensor, request: AttentionRequest) -> Tensor:
    """States (sample, token, width) at the requested rows."""
    return select_rows(states[:, None], request.rows_BR)[:, 0]


def _placed(
    adapter: VlmAdapter,
    attention: Any,
    request: AttentionRequest,
    tables: tuple[Tensor, Tensor] | None,
    query: Tensor,
    key: Tensor,
) -> tuple[Tensor, Tensor]:
    """Projected states as a kernel gets them: normalised by head and rotated.

    Args:
        adapter, attention, request: of the layer and its forward.
        tables: cosines and sines (1 or sample, token, width) of the positions; None in cross-attention.
        query: projected states of the rows (sample, row, width).
        key: of the keys (…, width). The leading axes are those of the sample and the key, in any split, such as
            (sample · tile, token).

    Returns:
        Queries (sample, head, row, head_dim) and keys (sample, key head, key, head_dim).
    """
    width, is_gated = attention.head_dim, adapter.gated_queries
    key = key.reshape(query.shape[0], -1, key.shape[-1] // width, width).transpose(1, 2)
    query = query.unflatten(-1, (-1, (1 + is_gated) * width))[..., :width].transpose(1, 2)  # without the gates
    norms, (query_norm, key_norm) = dict(attention.named_children()), adapter.head_norms
    if query_norm in norms:  # the layer's own, of each head, before rotation
        query, key = norms[query_norm](query), norms[key_norm](key)
    if tables is not None:
        cos, sin = (table.expand(len(query), -1, -1)[:, None] for table in tables)
        query = adapter.rotate(attention, query, *(select_rows(table, request.rows_BR) for table in (cos, sin)))
        key = adapter.rotate(attention, key, cos, sin)
    return query, key


@torch.no_grad()
def _compare(
    adapter: VlmAdapter,
    attention: Any,
    request: AttentionRequest,
    tables: tuple[Tensor, Tensor] | None,
    states: Tensor,
    context: Tensor,
    query_BHRD: Tensor,
    key_BGKD: Tensor,
) -> None:
    """Check that the layer's own projections, placed as the parallel ones are, are what its kernel gets.

    A text model may rotate in another way, normalise elsewhere, or leave out positions in some layers. Then the rows
    of "learn" would be wrong without a word.

    Raises:
        UnsupportedModelError: they differ by more than `TOLERANCE`.
    """
    project = attention.get_submodule(PARALLEL_NAME)
    kept = project.unwatch()
    if kept.keys() != set(OWN):  # a graph that was compiled before runs no new hook
        kept = {"q_proj": attention.q_proj(states), "k_proj": attention.k_proj(context)}
    query, key = _at_rows(kept["q_proj"], request), kept["k_proj"]
    own = _placed(adapter, attention, request, tables, query, key)
    for found, expected in zip(own, (query_BHRD, key_BGKD), strict=True):
        expected = expected.detach()
        if found.shape != expected.shape:
            raise _unsupported(attention, f"makes {tuple(expected.shape)} of {tuple(found.shape)} projected numbers")
        difference = (found - expected).float().norm() / expected.float().norm()
        if difference > TOLERANCE:  # not so where a number is not finite: the loss says that
            raise _unsupported(attention, f"makes queries or keys in another way: they differ by {difference:.0%}")
    project.is_compared = True
