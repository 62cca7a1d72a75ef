"""Packing: a batch in one row has the rows, keys, pictures and losses of the batch with a row per sample."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from families.geometry import picture
from lavender.alignment.objective import AlignmentRequest, attach, detach
from lavender.alignment.packing import IGNORED, packed
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError
from lavender.students.capture import row_tensors
from lavender.students.kernels import set_kernel
from lavender.students.loading import load_run
from lavender.students.registry import adapter_for
from lavender.world import STUDENT_PATHS
from reference_kernels import use_flash, use_flex_with_gradient

KERNELS = ("eager", "sdpa", "flash_attention_2", "flex_attention")
GRID = (5, 4)
ANSWERS = ("a red dog and a cat", "one small blue thing near the house", "a sun", "no picture here")
PICTURES = (2, 1, 1, 0)


@pytest.fixture(scope="module")
def loaded():
    return load_run(STUDENT_PATHS["llava"])


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded[0]).train()


@pytest.fixture(params=["left", "right"])
def batch(request, loaded) -> dict[str, Any]:
    """Four samples of different lengths, with two pictures, one and none; words on each picture."""
    model, processor = loaded
    images: list[list[Image.Image]] = [
        [picture((80, 80), 10 * sample + index) for index in range(number)] for sample, number in enumerate(PICTURES)
    ]
    messages = [
        [
            {"role": "user", "content": [*({"type": "image"} for _ in own), {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for own, answer in zip(images, ANSWERS, strict=True)
    ]
    texts = [processor.apply_chat_template(own, tokenize=False) for own in messages]
    inputs = processor(images=images, text=texts, padding=True, padding_side=request.param, return_tensors="pt")
    inputs = dict(inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED))
    first = inputs["attention_mask"].cumsum(1) == 1  # predicted from nothing, or from padding at the left
    inputs["labels"][first & (inputs["attention_mask"] == 1)] = IGNORED
    words, of_pictures = [], []
    for own, number in zip(inputs["attention_mask"], PICTURES, strict=True):
        last = int(own.nonzero()[-1])
        words.append([(last - 3, last - 2), (last - 1,), (last - 2,)] if number else [])
        of_pictures.append([0, number - 1, 0] if number else [])
    tensors = row_tensors(words, of_pictures)
    sizes = [[(80, 80)] * number for number in PICTURES]
    tensors |= adapter_for(model.config).key_tensors(inputs, sizes, processor)
    targets = torch.rand(*tensors["present"].shape, *GRID, generator=torch.Generator().manual_seed(8))
    described = {"words": [["w"] * len(own) for own in words], "names": list(ANSWERS), "faults": [], "counts": 0}
    return inputs | {"alignment": tensors | {"targets": targets, "reads": tensors["present"]} | described}


def answered(model, batch: dict[str, Any], **settings: Any) -> tuple[Any, AlignmentRequest, dict[str, Tensor]]:
    """Output, request and gradients of one step with both losses."""
    head = attach(model, AlignmentConfig(layers="all", **settings))
    inputs = {name: value for name, value in batch.items() if name != "alignment"}
    request = AlignmentRequest(head.layers, batch["alignment"])
    output = model(**inputs, use_cache=False, attention_request=request)
    (output.loss + output.attention_loss).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    detach(model)
    return output, request, gradients


def test_every_value_of_a_token_is_at_its_place(loaded, batch):
    row = packed(batch, adapter_for(loaded[0].config))
    mask, alignment, own = batch["attention_mask"].bool(), row["alignment"], batch["alignment"]
    lengths = mask.sum(1)
    assert row["input_ids"].tolist() == [batch["input_ids"][mask].tolist()]
    assert row["position_ids"].tolist() == [[index for length in lengths for index in range(length)]]
    assert row["cu_seq_lens_q"].tolist() == [0, *lengths.cumsum(0).tolist()]
    assert row["max_length_q"] == lengths.max()
    assert (row["labels"] == IGNORED).sum() == len(ANSWERS)
    assert "attention_mask" not in row
    assert row["pixel_values"] is batch["pixel_values"]
    image = loaded[0].config.image_token_index
    assert row["input_ids"][0, alignment["keys"][0]].tolist() == [image] * int((own["keys"] >= 0).sum())
    assert alignment["pictures"].unique().tolist() == [0, 1, 2, 3]
    assert alignment["word_pictures"].tolist() == [[0, 1, 0, 2, 2, 2, 3, 3, 3]]
    ids = [batch["input_ids"][sample, one] for sample, rows in enumerate(own["rows"]) for one in rows]
    real = (own["shares"] > 0).any(1).flatten()
    assert row["input_ids"][0, alignment["rows"][0]].tolist() == torch.stack(ids)[real].tolist()
    assert alignment["names"] == ["; ".join(ANSWERS)]


@pytest.mark.parametrize("loss", ["mass", "kl", "published"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_losses_and_gradients_are_those_of_a_row_per_sample(model, batch, kernel, loss, monkeypatch):
    use_flash(monkeypatch)
    use_flex_with_gradient(monkeypatch)
    set_kernel(model, kernel)
    results = []
    for given in (batch, packed(batch, adapter_for(model.config))):
        torch.manual_seed(7)  # of the Aligner
        results.append(answered(model, given, attention_loss=loss))
    (apart, request, gradients), (together, row, theirs) = results
    # sums in other orders
    torch.testing.assert_close(together.loss, apart.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(together.attention_loss, apart.attention_loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(row.losses, request.losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(row.student_maps, request.student_maps, rtol=1e-4, atol=1e-5)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_capture_of_a_packed_row_changes_no_bit(model, batch, kernel, monkeypatch):
    use_flash(monkeypatch)
    use_flex_with_gradient(monkeypatch)
    set_kernel(model, kernel)
    row = packed(batch, adapter_for(model.config))
    alignment = row.pop("alignment")
    model.eval()
    plain = model(**row, use_cache=False)
    head = attach(model, AlignmentConfig())
    output = model(**row, use_cache=False, attention_request=AlignmentRequest(head.layers, alignment))
    assert torch.equal(output.logits, plain.logits)
    assert torch.equal(output.loss, plain.loss)


def test_a_batch_without_words(model, batch):
    batch["alignment"] |= row_tensors([[]] * 4) | {"targets": torch.zeros(4, 1, *GRID)}
    batch["alignment"]["reads"] = batch["alignment"]["present"]
    row = packed(batch, adapter_for(model.config))
    output, *_ = answered(model, row)
    assert output.attention_loss == 0


def test_a_flow_of_packed_samples_is_refused(model, batch):
    with pytest.raises(ConfigError, match="Got pooling='flow-sum' of samples packed in one row"):
        answered(model, packed(batch, adapter_for(model.config)), attention_loss="published", pooling="flow-sum")


def test_models_that_need_more_are_refused(batch):
    model, _ = load_run(STUDENT_PATHS["mllama"])
    with pytest.raises(ConfigError, match="Got a model of the type 'mllama', which may need more"):
        packed(batch, adapter_for(model.config))
