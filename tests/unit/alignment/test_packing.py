"""Packing: a batch in one row has the rows, keys, pictures and losses of the batch with a row per sample."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from families.geometry import picture
from lavender.alignment.objective import AlignmentRequest, SameWord, attach, detach
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


def answered(
    model, batch: dict[str, Any], same_word: SameWord | None = None, forced: Tensor | None = None, **settings: Any
) -> tuple[Any, AlignmentRequest, dict[str, Tensor]]:
    """Output, request and gradients of one step with both losses."""
    head = attach(model, AlignmentConfig(layers="all", **settings))
    inputs = {name: value for name, value in batch.items() if name != "alignment"}
    request = AlignmentRequest(head.layers, batch["alignment"], same_word, forced)
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
    is_key, is_row = own["keys"] >= 0, (own["shares"] > 0).any(1)
    assert torch.equal(alignment["keys"] >= 0, is_key)
    places = (row["input_ids"][0] == image).nonzero()[:, 0]
    assert alignment["keys"][is_key].tolist() == places.tolist()
    ids = batch["input_ids"].gather(1, own["rows"])
    assert row["input_ids"][0, alignment["rows"]][is_row].tolist() == ids[is_row].tolist()
    assert all(alignment[name] is own[name] for name in own.keys() - {"rows", "keys"})


def assert_same(apart: tuple, together: tuple) -> None:
    """Sums are in other orders: rounding of float32, which gradients add up over layers."""
    (output, request, gradients), (packed_output, row, theirs) = apart, together
    torch.testing.assert_close(packed_output.loss, output.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed_output.attention_loss, output.attention_loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(row.losses, request.losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(row.student_maps, request.student_maps, rtol=1e-4, atol=1e-5)
    assert torch.equal(row.matched, request.matched)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


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
    assert_same(*results)


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
def test_forced_rows_and_learned_projections_are_those_of_a_row_per_sample(model, batch, kernel, monkeypatch):
    use_flash(monkeypatch)
    set_kernel(model, kernel)
    row, present = packed(batch, adapter_for(model.config)), batch["alignment"]["present"]
    plain = answered(model, batch, attention_loss="mass")
    for some in (present & (torch.arange(3) != 1), present & (torch.arange(4) == 2)[:, None]):
        forced = [answered(model, given, forced=some, attention_loss="mass") for given in (batch, row)]
        assert_same(*forced)
        # the words of these rows are read from elsewhere
        assert abs(forced[0][0].loss - plain[0].loss) > 100 * 1e-5 * plain[0].loss
    learned = []
    for given in (batch, row):
        torch.manual_seed(7)
        learned.append(answered(model, given, attention_loss="published", pooling="learn"))
    assert_same(*learned)


@pytest.mark.parametrize("match", ["exact", "root"])
def test_matched_words_are_those_of_a_row_per_sample(model, batch, match):
    """The token of the second word is the first choice of the model; as a root, so is every word of one token."""
    with torch.no_grad():
        chosen = model(**{name: one for name, one in batch.items() if name != "alignment"}).logits.argmax(-1)
    rows = batch["alignment"]["rows"]
    batch["input_ids"].scatter_(1, rows[:, -1:] + 1, chosen.gather(1, rows[:, -1:]))

    settings: dict[str, Any] = {"match": match}
    if match == "root":
        settings["same_word"] = lambda chosen, true: len(true) == 1
    results = [answered(model, given, **settings) for given in (batch, packed(batch, adapter_for(model.config)))]
    assert_same(*results)
    assert 0 < results[0][1].matched.sum() < batch["alignment"]["present"].sum()


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
