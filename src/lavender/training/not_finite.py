"""Find which sample, word or weight made a loss NaN or infinite.

Everything needed is kept from the forward pass, on the device, so no forward runs twice. This works with FSDP and
ZeRO, where a forward needs every process.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import ProcessorMixin

from lavender.errors import NotFiniteError

NUM_NAMED = 3
_SHOWN_TEXT = 80  # characters of a conversation


class Health(NamedTuple):
    """What of a batch is finite.

    Attributes:
        answers: whether each sample's predictions are finite, bool (sample,); None where unknown.
        present: which words the samples have, bool (sample, word).
        losses: the loss of each present word, (word,).
    """

    answers: Tensor | None
    present: Tensor
    losses: Tensor


def answers_finite(output: Mapping[str, Any], labels: Tensor, cuts: Tensor | None = None) -> Tensor | None:
    """Whether each sample's predictions of its labels are finite, bool (sample,); None if the output has none.

    Args:
        cuts: where the samples of a packed row begin and end, (sample + 1,).
    """
    if output.get("log_probs") is not None:  # TRL's fused head; 0 where there is no label
        return _by_sample(output["log_probs"].detach().isfinite(), cuts)
    if output.get("logits") is None or output["logits"].shape[:2] != labels.shape:
        return None
    sums_BT = (
        output["logits"].detach()[:, :-1].sum(dim=-1, dtype=torch.float32)
    )  # not finite if a logit is NaN or infinite
    return _by_sample(sums_BT.isfinite() | (labels[:, 1:] == -100), cuts)


def _by_sample(finite_BT: Tensor, cuts: Tensor | None) -> Tensor:
    if cuts is None:
        return finite_BT.all(dim=1)
    return torch.stack([own.all() for own in finite_BT[0].tensor_split(cuts[1:-1].tolist())])


def not_finite_error(
    step: int,
    model: nn.Module,
    processor: ProcessorMixin,
    inputs: Mapping[str, Any],
    health: Health,
) -> NotFiniteError:
    """The error that names what is not finite in a batch whose loss is not.

    Args:
        step: optimiser step, from 1.
        inputs: the batch, with its `alignment`.
        health: what of the batch is finite, after its forward pass.
    """
    places = health.present.nonzero()[~health.losses.isfinite()].tolist()
    answers = [] if health.answers is None else (~health.answers).nonzero().flatten().tolist()
    affected = sorted({*answers, *(sample for sample, _ in places)})
    named = [_described(sample, sample in answers, places, processor, inputs) for sample in affected[:NUM_NAMED]]
    if len(affected) > NUM_NAMED:
        named.append(f"and {len(affected) - NUM_NAMED} more samples")
    got = f"a loss that is not finite, in step {step}: {'; '.join(named) or 'no sample that stands out'}"
    expected = "finite L_VLM and L_att"
    broken = _broken_weight(model)
    if broken:
        return NotFiniteError(
            f"{got}. The weights are not finite either, such as {broken}",
            expected,
            "lower the learning rate, clip gradients (max_grad_norm), or train in bfloat16 or float32; the weights "
            "diverged in an earlier step",
        )
    if not affected or (len(affected) == len(health.present) > 1):
        return NotFiniteError(
            f"{got}. That is every sample of the batch" if affected else got,
            expected,
            "lower the learning rate, or train in bfloat16 or float32: it is the model that overflows, not a sample",
        )
    return NotFiniteError(
        got,
        expected,
        "repair or remove what is named; if its picture and text are sound, the model overflows on it: lower the "
        "learning rate, or train in bfloat16 or float32",
    )


def _described(
    sample: int, answer: bool, places: list[list[int]], processor: ProcessorMixin, inputs: Mapping[str, Any]
) -> str:
    alignment, cuts = inputs["alignment"], inputs.get("cu_seq_lens_q")
    if cuts is None:
        ids = inputs["input_ids"][sample, inputs["attention_mask"][sample].bool()]
    else:  # a packed row, which has no padding
        ids = inputs["input_ids"][0, cuts[sample] : cuts[sample + 1]]
    text = " ".join(str(processor.tokenizer.decode(ids, skip_special_tokens=True)).split())
    texts = [alignment["words"][sample][word] for index, word in places if index == sample]
    words = list(dict.fromkeys(texts))  # a word that is predicted and read is there twice
    faults = ["L_VLM"] if answer else []
    if words:
        faults.append(f"L_att of {', '.join(repr(word) for word in words)}")
    return (
        f"{' and '.join(faults)} of sample {sample} ({textwrap.shorten(text, _SHOWN_TEXT)!r}, "
        f"{alignment['names'][sample]})"
    )


def _broken_weight(model: nn.Module) -> str:
    """The name of a parameter that is not finite in this process's share of it, or ""."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not local.detach().isfinite().all():
            return name
    return ""
