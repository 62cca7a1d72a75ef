"""The alignment objective of one batch: attention rows → words → loss. It knows no trainer.

The direct losses compare the attention of words with maps laid onto the image keys. The published loss resamples it to
the maps' grid, and an Aligner makes it one map.

`attach` makes the objective part of a model. An Aligner becomes a submodule, and a forward hook adds `attention_loss`
to the output of every call with an `AlignmentRequest`. So it works inside whatever wraps the model: PEFT, DDP, FSDP,
TRL.

Axis suffixes: B sample, R row, T token, W word, K key, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, make_dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lavender.alignment import parallel
from lavender.alignment.aligner import Aligner
from lavender.alignment.losses import direct_loss, per_word_loss, prepared, share_on_map
from lavender.alignment.pooling import POOLINGS, flow, num_channels, pooled
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, ConfigError
from lavender.students.base import VlmAdapter
from lavender.students.capture import PARALLEL_NAME, AttentionRequest, CaptureSession, real_keys, select_rows
from lavender.students.forcing import Forcing
from lavender.students.image_keys import KeyLayout, is_of_word, on_keys, to_grid, word_attention
from lavender.students.registry import adapter_for

HEAD_NAME = "alignment_head"
TRAINED_PARTS = (HEAD_NAME, PARALLEL_NAME)
"""Names of the submodules that alignment adds to a model. Exports leave them out."""


def is_alignment_part(name: str) -> bool:
    """Whether alignment has added the parameter of this name."""
    return not set(name.split(".")).isdisjoint(TRAINED_PARTS)


SameWord = Callable[[list[int], list[int]], bool]
"""Whether the predicted token ids are a form of the word that the true token ids spell."""


class AlignmentRequest(AttentionRequest):
    """An attention request with the teacher's maps that its words are compared to.

    Args:
        layers: indices of the decoder layers to capture. Without layers there is no loss; only `matched` is computed.
        tensors: `rows` long (sample, row), positions of the rows;
            `shares` float (sample, word, row), 1/n at the n rows of a word;
            `boxes`, `pictures` and, for a resampler, `views`: see `KeyLayout`;
            `keys` long (sample, key), if the image keys are tokens of the sequence: see `VlmAdapter.image_keys`;
            `targets` float (sample, word, rows, cols), the teacher's heat maps;
            `word_pictures` long (sample, word), index of the picture within the sample that a word's map is of;
            `present` bool (sample, word), False at padding;
            `weights` float (sample, word), weight of a word in the loss, 0 at padding;
            `is_packed`, only of `lavender.alignment.packing.packed`: the model gets all samples in one row.
        same_word: needed for `match="root"`.
        forced: bool (sample, word), the words whose rows attend as their maps say; None for no word.

    Attributes:
        matched: bool (sample, word), the words that count in the loss. Like the rest, known after the forward.
        chosen_BR: token ids that the model predicts at the rows, if they had to be computed; else None.
        losses: loss of each present word, (word,), without gradient.
        student_maps: the student's map of each present word before the Aligner, (word, rows, cols), without gradient:
            mean over layers and heads; with a flow pooling, the flow.
        map_shares: the share of its attention on the picture that lies on its map, of each present word, (word,),
            without gradient; mean over layers and heads.
    """

    learned = True

    def __init__(
        self,
        layers: tuple[int, ...],
        tensors: dict[str, Tensor],
        same_word: SameWord | None = None,
        forced: Tensor | None = None,
    ):
        super().__init__(tensors["rows"], layers, tensors.get("keys"), "is_packed" in tensors)
        self.shares, self.word_pictures = tensors["shares"], tensors["word_pictures"]
        self.layout = KeyLayout(tensors["boxes"], tensors["pictures"], tensors.get("views"))
        self.targets, self.present, self.weights = tensors["targets"], tensors["present"], tensors["weights"]
        self.matched, self.same_word, self.chosen_BR = self.present, same_word, cast(Tensor | None, None)
        self.losses, self.student_maps = self.targets.new_zeros(0), self.targets.new_zeros(0, *self.targets.shape[2:])
        self.map_shares, self.forced = self.targets.new_zeros(0), forced

    def text_positions(self) -> Tensor:
        """Position of each row among the tokens that are not image keys: long (sample, row)."""
        if self.keys_BK is None:
            return self.rows_BR
        before_BRK = real_keys(self.keys_BK)[:, None] & (self.keys_BK[:, None] < self.rows_BR[..., None])
        return self.rows_BR - before_BRK.sum(dim=-1)

    def match_predicted(self, output: ModelOutput, input_ids: Tensor) -> None:
        """Set `matched` to the words whose every token is the model's first choice (the paper's exact match).

        With `same_word`, words count too if the first choices make up another form of the word (root match, §6).

        Raises:
            ConfigError: the output holds neither logits nor first choices.
        """
        true_BR = input_ids.gather(1, (self.rows_BR + 1).clamp_max(input_ids.shape[1] - 1))
        chosen_BR = self.chosen_BR  # set if a fused loss hides the logits
        if chosen_BR is None and output.get("logits") is not None:
            chosen_BR = select_rows(output["logits"].detach()[:, None], self.rows_BR)[:, 0].argmax(dim=-1)
        if chosen_BR is not None:
            hits_BR = chosen_BR == true_BR
        elif "is_top1" in output and self.same_word is None:  # of TRL's fused loss, for all tokens but the last
            hits_BT = output["is_top1"].bool()
            hits_BR = hits_BT.gather(1, self.rows_BR.clamp_max(hits_BT.shape[1] - 1))
        else:
            raise ConfigError(
                f"match={'exact' if self.same_word is None else 'root'!r} with a model output that has {list(output)}",
                "the model's predictions",
                "set match='label', or switch off the fused loss that hides them",
            )
        missed_BW = ((self.shares > 0) & ~hits_BR.view(len(self.shares), 1, -1)).any(dim=-1)
        self.matched = self.present & ~missed_BW
        if self.same_word is not None and chosen_BR is not None:
            self._match_roots(self.same_word, chosen_BR, true_BR)

    def _match_roots(self, same_word: SameWord, *at_rows: Tensor) -> None:
        """Add to `matched` the words of which another form is predicted, by the chosen and the true ids at the rows."""
        rows_BR, chosen_BR, true_BR = (one.view(len(self.shares), -1) for one in (self.rows_BR, *at_rows))
        for sample, word in (self.present & ~self.matched).nonzero().tolist():
            rows_R = (self.shares[sample, word] > 0).nonzero()[:, 0]
            rows_R = rows_R[rows_BR[sample, rows_R].argsort()]
            chosen, true = chosen_BR[sample, rows_R].tolist(), true_BR[sample, rows_R].tolist()
            self.matched[sample, word] = same_word(chosen, true)


def matched_weight(request: AlignmentRequest) -> Tensor:
    """Sum of the weights of the words that count in the loss: a scalar. Known after the forward."""
    return (request.weights * request.matched).sum()


class AlignmentHead(nn.Module):
    """The objective as a part of the model. Only the Aligner of a published loss has parameters.

    Args:
        num_heads: number of attention heads of a layer.
        layers: indices of the aligned decoder layers.
        config: settings of the objective.

    Attributes:
        aligner: the Aligner; None with a direct loss.
        num_channels: number of its input channels.
        vlm_is_frozen: set it while only the head is trained; else rows without gradient are an error.
    """

    def __init__(self, num_heads: int, layers: tuple[int, ...], config: AlignmentConfig):
        super().__init__()
        self.layers, self.config = layers, config
        self.num_channels = num_channels(config.pooling, len(config.heads) if config.heads else num_heads)
        self.aligner = None
        if not config.is_direct:
            self.aligner = Aligner(
                self.num_channels,
                config.aligner_width,
                config.aligner,
                config.aligner_kind,
                config.aligner_norm,
                config.aligner_activation,
            )
        self.vlm_is_frozen = False

    def forward(self, request: AlignmentRequest) -> Tensor:
        """Loss of the batch: the weighted sum of the losses of its matched words, a scalar."""
        words = request.present
        if not words.any():
            # Sharded training needs gradients of the same parameters, in the same order, in every process. So a padded
            # word, of weight 0, takes the place.
            words = torch.zeros_like(words)
            words[0, 0] = True
        if self.aligner is None:
            losses = self._direct_losses(request, words)
        else:
            losses = per_word_loss(self.maps(request, words), self._targets(request)[words], self.config.attention_loss)
        request.losses = losses.detach()[request.present[words]]
        return (losses * (request.weights * request.matched)[words]).sum()

    def maps(self, request: AlignmentRequest, words: Tensor | None = None) -> Tensor:
        """The Aligner's output, (word, rows, cols) in [0, 1].

        Args:
            words: bool (sample, word), the words whose maps are wanted; by default those present.
        """
        assert self.aligner is not None, "a direct loss has no Aligner"
        words = request.present if words is None else words
        attention = self.attention(request)
        self._observe(request, attention)
        dtype = next(self.aligner.parameters()).dtype
        chosen = attention.permute(0, 1, 3, 2, 4, 5)[:, words]
        return pooled(chosen.to(dtype), self.config.pooling, self.aligner)

    def _direct_losses(self, request: AlignmentRequest, words: Tensor) -> Tensor:
        """Losses of the attention itself, (word,): on the image keys; with a resampler, KL is on the maps' grid."""
        if not request.layout.pictures.numel():  # a batch of text alone
            return request.targets.new_zeros(int(words.sum()))
        rows = self._rows(request).mean(dim=2, keepdim=True)
        if POOLINGS[self.config.pooling].layers_first:
            rows = rows.mean(dim=0, keepdim=True)
        attention = word_attention(rows, request.shares.to(rows))
        heat, kind = self._targets(request), self.config.attention_loss
        grid = (heat.shape[-2], heat.shape[-1])

        def on_grid(attention: Tensor) -> Tensor:
            return to_grid(attention, request.layout, request.word_pictures, grid, request.mixing)

        if request.mixing is not None and kind == "kl":  # a latent has no place of its own
            maps = on_grid(attention)
            self._observe(request, maps)
            return direct_loss(maps[:, :, 0][:, words].flatten(-2), heat[words].flatten(-2), kind)
        with torch.no_grad():
            self._observe(request, on_grid(attention.mean(dim=0, keepdim=True)))
        heat = on_keys(heat.to(rows), request.layout, request.word_pictures, request.mixing)
        attention_LNK = (attention[:, :, 0] * (request.layout.pictures >= 0).to(rows)[:, None])[:, words]
        own_LNK = attention_LNK.detach() * is_of_word(request.layout, request.word_pictures).to(rows)[words]
        return direct_loss(attention_LNK, heat[words], kind, sees_LN=own_LNK.sum(dim=-1) != 0)

    def _targets(self, request: AlignmentRequest) -> Tensor:
        """The maps that the loss is of: (sample, word, rows, cols)."""
        config = self.config
        if not config.is_direct and config.sharpen == 1 and not config.subtract_background:
            return request.targets  # the published loss scales them itself
        return prepared(request.targets, config.sharpen, config.subtract_background)

    @torch.no_grad()
    def _observe(self, request: AlignmentRequest, attention: Tensor) -> None:
        """Set `student_maps` and `map_shares` of a request, from (layer, sample, head, word, rows, cols)."""
        request.student_maps = attention.detach().float().mean(dim=(0, 2))[request.present]
        heat = prepared(request.targets[request.present])
        request.map_shares = share_on_map(request.student_maps.flatten(-2), heat.flatten(-2))

    def attention(self, request: AlignmentRequest) -> Tensor:
        """Attention on the pictures before the Aligner: (layer, sample, head, word, rows, cols).

        With a flow pooling there is one layer.
        """
        grid = (request.targets.shape[-2], request.targets.shape[-1])
        if not request.layout.pictures.numel():  # a batch of text alone: some models skip these layers
            samples, words = request.present.shape
            return request.targets.new_zeros(1, samples, self.num_channels, words, *grid)
        rows = self._rows(request)
        if POOLINGS[self.config.pooling].flow:
            if request.is_packed:  # it weighs a row by its place among those of its sample
                got = f"pooling={self.config.pooling!r} of samples packed in one row"
                raise ConfigError(got, "a sample per row", "choose a pooling without flow, or do not pack")
            rows = flow(rows, request.text_positions(), self.config.pooling)
        words = word_attention(rows, request.shares.to(rows))
        return to_grid(words, request.layout, request.word_pictures, grid, request.mixing)

    def _rows(self, request: AlignmentRequest) -> Tensor:
        """The captured rows of the aligned heads: (layer, sample, head, row, key).

        Raises:
            CaptureError: the rows carry no gradient in training.
        """
        rows = request.stacked()
        if self.training and torch.is_grad_enabled() and not rows.requires_grad and not self.vlm_is_frozen:
            raise CaptureError(
                "attention rows without gradient while training",
                "rows that carry gradient to the model's queries and keys",
                "use non-reentrant checkpointing, and train parameters at or before the attention layers",
            )
        return rows if self.config.heads is None else rows[:, :, list(self.config.heads)]


def attach(model: PreTrainedModel, config: AlignmentConfig) -> AlignmentHead:
    """Make the alignment objective part of a model. `detach` undoes it.

    The logits do not change. A forward call with `attention_request=AlignmentRequest(...)` returns the model's output
    with one more field, `attention_loss`. The model can be copied with `copy.deepcopy` and saved with `torch.save`.

    Args:
        model: a model of a supported family.
        config: settings of the objective.

    Returns:
        The head, which is now the submodule `HEAD_NAME` of the model. It holds the Aligner, if the loss has one.

    Raises:
        UnsupportedModelError: a model of an unknown family, or with an attention kernel that cannot be captured.
        ConfigError: the model has a head already, or `config` names layers or heads that the model does not have.
    """
    if HEAD_NAME in dict(model.named_children()):
        raise ConfigError(
            "a model with an alignment head", "a model without one", "call lavender.alignment.objective.detach first"
        )
    adapter = adapter_for(model.config)
    layers = _layers(adapter, config)
    if config.heads is not None and not all(0 <= head < adapter.num_heads() for head in config.heads):
        raise ConfigError(f"heads={config.heads}", f"numbers from 0 to {adapter.num_heads() - 1}", "change heads")
    learned = [adapter.attention_module(model, layer) for layer in layers] if POOLINGS[config.pooling].learned else []
    parallel.check(learned, adapter)
    session = CaptureSession(model, adapter)
    head = AlignmentHead(adapter.num_heads(), layers, config)
    model.add_module(HEAD_NAME, head.to(model.device))
    session.handles += [
        model.register_forward_pre_hook(_pool_heads, with_kwargs=True),
        model.register_forward_hook(_add_attention_loss, with_kwargs=True),
        *(parallel.attach(attention, adapter, config.parallel_init) for attention in learned),
    ]
    if config.match == "root" and (backbone := adapter.backbone(model)) is not model:
        session.handles.append(backbone.register_forward_hook(partial(_choose_tokens, model), with_kwargs=True))
    return head


def detach(model: PreTrainedModel) -> None:
    """Leave a model as it was before `attach`: its own kernel, no hook, no head. Works for a copy of the model too.

    Raises:
        ConfigError: the model has no alignment head.
    """
    session = CaptureSession.of(model)
    if session is None or HEAD_NAME not in dict(model.named_children()):
        raise ConfigError(
            "a model without an alignment head",
            "the model that lavender.alignment.objective.attach changed, or a copy of it",
            "pass that model, without a wrapper around it",
        )
    session.close(model)
    parallel.detach(model)
    delattr(model, HEAD_NAME)


def _layers(adapter: VlmAdapter, config: AlignmentConfig) -> tuple[int, ...]:
    if config.layers is None and POOLINGS[config.pooling].learned and not adapter.cross_attends:
        return adapter.layers("middle", share=0.2)  # the paper's share (§4.2.3): each layer adds parameters
    return adapter.layers(config.layers, config.layer_share)


@cache
def _with_attention_loss(output_type: type[ModelOutput]) -> type[ModelOutput]:
    """The output class with one more field. `ModelOutput` refuses keys that are not fields."""
    extra = [("attention_loss", Tensor | None, field(default=None))]
    return cast(type[ModelOutput], make_dataclass(f"{output_type.__name__}WithAlignment", extra, bases=(output_type,)))


def without_attention_loss(output: ModelOutput) -> ModelOutput:
    """The model's output in its own class, without `attention_loss`."""
    fields = {name: value for name, value in output.items() if name != "attention_loss"}
    return type(output).__bases__[0](**fields) if "attention_loss" in output else output


def _pool_heads(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    request = kwargs.get("attention_request")
    if isinstance(request, AlignmentRequest):
        config = cast(AlignmentHead, model.get_submodule(HEAD_NAME)).config
        pooled_heads = "mean" if config.is_direct else POOLINGS[config.pooling].heads
        request.heads = pooled_heads if config.heads is None else "all"
        if request.forced is not None:
            heat = prepared(request.targets, config.sharpen, config.subtract_background)
            request.forcing = Forcing(
                heat, request.shares, request.forced, request.layout, request.word_pictures, config.heads
            )


@torch.no_grad()
def _choose_tokens(model: PreTrainedModel, base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Store the tokens that the model predicts at the rows. A fused loss, TRL's default, computes no logits."""
    request = kwargs.get("attention_request")
    if isinstance(request, AlignmentRequest):
        rows_BRD = select_rows(output.last_hidden_state[:, None], request.rows_BR)[:, 0]
        head = model.get_output_embeddings()  # looked up in each call: PEFT may have replaced it
        request.chosen_BR = head(rows_BRD).argmax(dim=-1)


def _adapter(model: nn.Module) -> VlmAdapter:
    session = CaptureSession.of(model)
    assert session is not None, "attach opens one"
    return session.adapter


def _add_attention_loss(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], output: ModelOutput
) -> ModelOutput | None:
    request = kwargs.get("attention_request")
    if not isinstance(request, AlignmentRequest):
        return None
    head = cast(AlignmentHead, model.get_submodule(HEAD_NAME))
    if head.config.match != "label":
        if head.config.match == "root" and request.same_word is None:
            raise CaptureError("match='root' without same_word", "a request that knows the words", "pass same_word")
        request.match_predicted(output, _adapter(model).token_ids(kwargs))
    if not request.layers:
        return None
    # PEFT's wrapper opens autocast around the model, in which the loss would be computed in 16 bits
    with torch.autocast(request.targets.device.type, enabled=False):
        loss = head(request)
    return _with_attention_loss(type(output))(**output, attention_loss=loss)
