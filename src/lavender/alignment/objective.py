"""The alignment objective of one batch: attention rows → words → grid → Aligner → loss. Knows no trainer.

`attach` makes it part of a model: the Aligner becomes a submodule, and a forward hook adds
`attention_loss` to the model's output whenever the call carries an `AlignmentRequest`. Everything
that wraps a model's forward (PEFT, DDP, FSDP, TRL) then carries it along.
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
from lavender.alignment.losses import per_word_loss
from lavender.alignment.pooling import flow, is_flow, num_channels, pooled, pooled_heads
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, ConfigError
from lavender.students.base import VlmAdapter
from lavender.students.capture import PARALLEL_NAME, AttentionRequest, CaptureSession, real_keys, select_rows
from lavender.students.image_keys import KeyLayout, to_grid, word_attention
from lavender.students.registry import adapter_for

HEAD_NAME = "alignment_head"
TRAINED_PARTS = (HEAD_NAME, PARALLEL_NAME)
"""Names of the submodules that alignment adds to a model; every export leaves them out."""


def is_alignment_part(name: str) -> bool:
    """Whether a parameter of this name is one that alignment adds."""
    return not set(name.split(".")).isdisjoint(TRAINED_PARTS)


SameWord = Callable[[list[int], list[int]], bool]


class AlignmentRequest(AttentionRequest):
    """An attention request with what its rows shall be compared to.

    Args:
        layers: decoder layers to capture; of none only `matched` is found, and no loss.
        tensors: `rows` long (sample, row); `shares` float (sample, word, row), 1/n at a word's n rows;
            `boxes`, `pictures` and for a resampler `views`: a `KeyLayout`;
            `keys` long (sample, key), if the pictures' keys are part of a longer sequence;
            `targets` float (sample, word, rows, cols), heat maps;
            `word_pictures` long (sample, word), which of its sample's pictures a word's map is of;
            `present` bool (sample, word), False where a sample has fewer words than the batch's most;
            `weights` float (sample, word), what each word counts, 0 where there is none.
        same_word: for `match="root"`: whether tokens that are predicted are a form of those that stand there.

    Attributes:
        matched: bool (sample, word), the words that count in the loss; known after the forward pass, as what follows.
        chosen_BR: the tokens that the model predicts at the rows, where that had to be computed; else None.
        losses: the loss of each present word, (word,), without gradient.
        student_maps: where the student looks for each present word, mean over layers and heads before any Aligner,
            (word, rows, cols), without gradient; of a flow, the flow.
    """

    learned = True

    def __init__(
        self,
        layers: tuple[int, ...],
        tensors: dict[str, Tensor],
        same_word: SameWord | None = None,
    ):
        super().__init__(tensors["rows"], layers, tensors.get("keys"))
        self.shares, self.word_pictures = tensors["shares"], tensors["word_pictures"]
        self.layout = KeyLayout(tensors["boxes"], tensors["pictures"], tensors.get("views"))
        self.targets, self.present, self.weights = tensors["targets"], tensors["present"], tensors["weights"]
        self.same_word, self.chosen_BR = same_word, cast(Tensor | None, None)
        self.matched = self.present
        self.losses, self.student_maps = self.targets.new_zeros(0), self.targets.new_zeros(0, *self.targets.shape[2:])

    def text_positions(self) -> Tensor:
        """Which of the text's tokens each row is, long (sample, row): a sequence's picture tokens do not count."""
        if self.keys_BK is None:
            return self.rows_BR
        before_BRK = real_keys(self.keys_BK)[:, None] & (self.keys_BK[:, None] < self.rows_BR[..., None])
        return self.rows_BR - before_BRK.sum(dim=-1)

    def match_predicted(self, output: ModelOutput, input_ids: Tensor) -> None:
        """Keep the words whose every token is the model's first choice (the paper's exact match).

        With `same_word` also those whose first choices make up another form of the word (root match, §6).
        """
        true_BR = input_ids.gather(1, (self.rows_BR + 1).clamp_max(input_ids.shape[1] - 1))
        chosen_BR = self.chosen_BR  # known where the model's own logits are not
        if chosen_BR is None and output.get("logits") is not None:
            chosen_BR = select_rows(output["logits"].detach()[:, None], self.rows_BR)[:, 0].argmax(dim=-1)
        if chosen_BR is not None:
            hits_BR = chosen_BR == true_BR
        elif "is_top1" in output and self.same_word is None:  # TRL's fused head; one entry less than tokens
            hits_BT = output["is_top1"].bool()
            hits_BR = hits_BT.gather(1, self.rows_BR.clamp_max(hits_BT.shape[1] - 1))
        else:
            raise ConfigError(
                f"match={'exact' if self.same_word is None else 'root'!r} with a model output that has {list(output)}",
                "the model's predictions",
                "set match='label', or switch off the fused loss that hides them",
            )
        missed_BW = ((self.shares > 0) & ~hits_BR[:, None]).any(dim=-1)
        self.matched = self.present & ~missed_BW
        if self.same_word is not None and chosen_BR is not None:
            self._match_roots(self.same_word, chosen_BR, true_BR)

    def _match_roots(self, same_word: SameWord, chosen_BR: Tensor, true_BR: Tensor) -> None:
        """Add the words of which another form is chosen."""
        for sample, word in (self.present & ~self.matched).nonzero().tolist():
            own_R = (self.shares[sample, word] > 0).nonzero()[:, 0]
            own_R = own_R[self.rows_BR[sample, own_R].argsort()]
            chosen, true = chosen_BR[sample, own_R].tolist(), true_BR[sample, own_R].tolist()
            self.matched[sample, word] = same_word(chosen, true)


def matched_weight(request: AlignmentRequest) -> Tensor:
    """The weights of a micro-batch's words that count, summed: a scalar. Known after its forward."""
    return (request.weights * request.matched).sum()


class AlignmentHead(nn.Module):
    """The trainable part of the objective, beside the parallel projections of `pooling="learn"`."""

    def __init__(self, num_heads: int, layers: tuple[int, ...], config: AlignmentConfig):
        super().__init__()
        self.layers, self.config = layers, config
        self.num_channels = num_channels(config.pooling, len(config.heads) if config.heads else num_heads)
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
        """Weighted sum over the batch's matched words of ‖Aligner(A) − A_DM‖² (Eq. 9, a mean over cells): a scalar."""
        words = request.present
        if not words.any():
            # a word of padding stands in, whose loss counts 0: sharded training needs every process to have gradients
            # of the same parameters, and in the same order
            words = torch.zeros_like(words)
            words[0, 0] = True
        losses = per_word_loss(self.maps(request, words), request.targets[words], self.config.attention_loss)
        request.losses = losses.detach()[request.present[words]]
        return (losses * (request.weights * request.matched)[words]).sum()

    def maps(self, request: AlignmentRequest, words: Tensor | None = None) -> Tensor:
        """The student's map of each present word, (word, rows, cols) in [0, 1]; or of `words`, bool (sample, word)."""
        words = request.present if words is None else words
        attention = self.attention(request).permute(0, 1, 3, 2, 4, 5)[:, words]
        request.student_maps = attention.detach().float().mean(dim=(0, 2))[request.present[words]]
        dtype = next(self.aligner.parameters()).dtype
        return pooled(attention.to(dtype), self.config.pooling, self.aligner)

    def attention(self, request: AlignmentRequest) -> Tensor:
        """Attention on the picture before the Aligner: (layer, sample, head, word, rows, cols); one layer of a flow."""
        grid = (request.targets.shape[-2], request.targets.shape[-1])
        if not request.layout.pictures.numel():  # a batch of text alone, in which some models skip these layers
            samples, words = request.present.shape
            return request.targets.new_zeros(1, samples, self.num_channels, words, *grid)
        rows = request.stacked()
        if self.training and torch.is_grad_enabled() and not rows.requires_grad and not self.vlm_is_frozen:
            raise CaptureError(
                "attention rows without gradient while training",
                "rows that carry gradient to the model's queries and keys",
                "use non-reentrant checkpointing, and train parameters at or before the attention layers",
            )
        if self.config.heads is not None:
            rows = rows[:, :, list(self.config.heads)]
        if is_flow(self.config.pooling):
            rows = flow(rows, request.text_positions(), self.config.pooling)
        words = word_attention(rows, request.shares.to(rows))
        return to_grid(words, request.layout, request.word_pictures, grid, request.mixing)


def attach(model: PreTrainedModel, config: AlignmentConfig) -> AlignmentHead:
    """Make the alignment objective part of a model. `detach` undoes it.

    The logits do not change. A forward call with `attention_request=AlignmentRequest(...)` returns the model's output
    with one more field, `attention_loss`. The model can be copied with `copy.deepcopy` and saved with `torch.save`.

    Args:
        model: a model of a supported family.
        config: settings of the objective.

    Returns:
        The head, which is now the submodule `HEAD_NAME` of the model. It holds the Aligner.

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
    session = CaptureSession(model, adapter)
    head = AlignmentHead(adapter.num_heads(), layers, config)
    model.add_module(HEAD_NAME, head.to(model.device))
    session.handles += [
        model.register_forward_pre_hook(_pool_heads, with_kwargs=True),
        model.register_forward_hook(_add_attention_loss, with_kwargs=True),
    ]
    if config.pooling == "learn":
        session.handles += [
            parallel.attach(adapter.attention_module(model, layer), config.parallel_init, adapter.head_norms)
            for layer in layers
        ]
    if config.match == "root" and model.base_model is not model:
        choose = partial(_choose_tokens, model)
        session.handles.append(model.base_model.register_forward_hook(choose, with_kwargs=True))
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
    if config.layers is None and config.pooling == "learn" and not adapter.cross_attends:
        return adapter.layers("middle", share=0.2)  # each has projections of its own; the paper's share (§4.2.3)
    return adapter.layers(config.layers, config.layer_share)


@cache
def _with_attention_loss(output_type: type[ModelOutput]) -> type[ModelOutput]:
    """The output class with one more field. Plain extra keys are refused by ModelOutput."""
    extra = [("attention_loss", Tensor | None, field(default=None))]
    return cast(type[ModelOutput], make_dataclass(f"{output_type.__name__}WithAlignment", extra, bases=(output_type,)))


def without_attention_loss(output: ModelOutput) -> ModelOutput:
    """The model's own output, of its own class."""
    own = {name: value for name, value in output.items() if name != "attention_loss"}
    return type(output).__bases__[0](**own) if "attention_loss" in output else output


def _pool_heads(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    request = kwargs.get("attention_request")
    if isinstance(request, AlignmentRequest):
        config = cast(AlignmentHead, model.get_submodule(HEAD_NAME)).config
        request.heads = pooled_heads(config.pooling) if config.heads is None else "all"


@torch.no_grad()
def _choose_tokens(model: PreTrainedModel, base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """What the model predicts at the rows: a fused loss, TRL's default, makes no logits."""
    request = kwargs.get("attention_request")
    if isinstance(request, AlignmentRequest):
        rows_BRD = select_rows(output.last_hidden_state[:, None], request.rows_BR)[:, 0]
        head = model.get_output_embeddings()  # asked each time: PEFT may have replaced it
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
    loss = head(request)
    return _with_attention_loss(type(output))(**output, attention_loss=loss)
