"""The collator with samples of several pictures, of one and of none: which word is mapped on which picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.geometry import picture
from lavender.alignment.collator import AlignmentCollator
from lavender.alignment.coverage import NO_PICTURE, OUTSIDE, Coverage
from lavender.alignment.objective import AlignmentRequest, attach
from lavender.alignment.word_targets import rows_of_word
from lavender.config import AlignmentConfig
from lavender.data.images import image_id
from lavender.data.store import MapStore
from lavender.errors import DataError
from lavender.maps import WordMaps, to_heat
from lavender.students.capture import row_tensors
from lavender.students.locate import UNSEEN
from lavender.students.registry import adapter_for
from lavender.words import words_of
from lavender.world.student_models import STUDENTS

DOG, CAT, SUN = "a dog and a cat", "one red apple near the tiny house", "sun"
FIRST, SECOND, THIRD = (picture((60, 100)), picture((100, 70), 1), picture((80, 80), 2))
GRID = (11, 13)


def messages(answer: str, later: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": answer}]
    more = [{"role": "user", "content": "and more?"}, {"role": "assistant", "content": later}]
    return turns + (more if later else [])


def words(text: str, *wanted: str):
    return tuple(word for word in words_of(text) if word.text in wanted)


@pytest.fixture
def store(tmp_path: Path) -> MapStore:
    """A dog and a cat on the first picture, the cat also on the second; the apple on the third."""
    with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, GRID) as writer:
        for image, text, wanted in (
            (FIRST, DOG, ("dog", "cat")),
            (SECOND, DOG, ("cat",)),
            (THIRD, CAT, ("apple",)),
        ):
            own = words(text, *wanted)
            writer.add(WordMaps(image_id(image), text, own, to_heat(torch.rand(len(own), *GRID))))
    return MapStore.open(tmp_path / "maps")


@pytest.fixture(params=["mllama", "llava"])
def student(request, captions) -> tuple[Any, Any]:
    """(model, processor)."""
    family = STUDENTS[request.param]
    processor = family.build_processor([*captions, DOG, CAT], vocabulary=300)
    return family.build_model(processor), processor


def collator_of(student, store: MapStore, config: AlignmentConfig | None = None) -> AlignmentCollator:
    model, processor = student
    base = DataCollatorForVisionLanguageModeling(processor)
    return AlignmentCollator(base, processor, adapter_for(model.config), store, config)


def test_words_are_found_in_the_template_of_the_batch(student, store):
    """TRL has templates of its own, which mark the answers. That of Qwen3.5 writes more before them."""
    model, processor = student
    template = processor.chat_template.replace("{%- generation %}", "{{- 'one red apple ' }}{%- generation %}")
    base = DataCollatorForVisionLanguageModeling(processor, chat_template=template)
    example = {"images": [FIRST], "messages": messages(DOG, "one red apple near the sun")}
    batch = AlignmentCollator(base, processor, adapter_for(model.config), store)([example])
    plain = collator_of(student, store)([example])
    assert batch["input_ids"].shape[1] > plain["input_ids"].shape[1]
    for found in (batch, plain):
        alignment = found["alignment"]
        assert Coverage.of(alignment["counts"]).mapped_samples == 1
        dog = alignment["rows"][0][alignment["shares"][0, 0] > 0] + 1
        assert "dog" in processor.tokenizer.decode(found["input_ids"][0, dog])


def test_a_batch_of_several_none_and_one(student, store):
    """The dog on the first picture; the cat on both, by the same rows; the apple; and a sample of text alone."""
    collator = collator_of(student, store)
    examples = [
        {"images": [FIRST, SECOND], "messages": messages(DOG)},
        {"images": [], "messages": messages(DOG)},
        {"images": [THIRD], "messages": messages(CAT)},
    ]
    batch = collator(examples)
    found = batch["alignment"]
    assert found["present"].tolist() == [[True, True, True], [False] * 3, [True, False, False]]
    assert found["word_pictures"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    dog, cat, cat_again = (set(own.nonzero().flatten().tolist()) for own in found["shares"][0])
    assert cat == cat_again
    assert not dog & cat
    assert torch.equal(found["targets"][0, 0], store.get(image_id(FIRST), DOG).maps[0])
    assert torch.equal(found["targets"][0, 1], store.get(image_id(FIRST), DOG).maps[1])
    assert torch.equal(found["targets"][0, 2], store.get(image_id(SECOND), DOG).maps[0])
    assert found["pictures"].amax(dim=1).tolist() == [1, -1, 0]
    coverage = Coverage.of(found["counts"])
    assert coverage == Coverage(3, 2, 4, Counter({NO_PICTURE: 1}))
    assert coverage.share == 1
    first, second = image_id(FIRST)[:12], image_id(SECOND)[:12]
    assert found["names"][0] == f"picture {first} of 60 × 100 pixels, picture {second} of 100 × 70 pixels"
    assert found["names"][1] == "no picture"
    assert [set(example) for example in examples] == [{"images", "messages"}] * 3  # as the caller left them


@pytest.mark.parametrize("pooling", [None, "layer-mean", "flow-sum", "learn"])
def test_training_on_a_mixed_batch(student, store, pooling):
    """Each word's loss is what it is where its sample is alone in the batch.

    All but: in Mllama a token before any picture sees all keys alike, those of padding too. Without a pooling it is the
    default loss; the poolings are those of the published loss.
    """
    published: dict[str, Any] = {"attention_loss": "published", "pooling": pooling, "aligner_norm": "none"}
    model, _ = student
    torch.manual_seed(7)
    head = attach(model.eval(), AlignmentConfig(**(published if pooling else {})))
    examples = [
        {"images": None, "messages": messages(CAT)},
        {"images": [FIRST, SECOND], "messages": messages(DOG)},
        {"image": THIRD, "messages": messages(CAT)},
    ]

    def loss(chosen: list[dict]) -> torch.Tensor:
        batch = collator_of(student, store)(chosen)
        request = AlignmentRequest(head.layers, batch.pop("alignment"))
        batch.pop("labels")
        return model(**batch, attention_request=request).attention_loss

    together = loss(examples)
    apart = sum(loss([example]) for example in examples)
    assert together > 0
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=0)


@pytest.mark.parametrize("images", [None, [], [None]])
def test_text_alone_is_no_error(student, store, images):
    collator = collator_of(student, store)
    plain = collator._base([{"images": [], "messages": messages(DOG)}])
    examples = [{"images": images, "messages": messages(DOG)}, {"messages": messages(DOG)}]
    for example in examples:
        batch = collator([example])
        alignment = batch.pop("alignment")
        assert not alignment["present"].any()
        assert all(torch.equal(batch[name], plain[name]) for name in batch)
        assert Coverage.of(alignment["counts"]) == Coverage(1, 0, 0, Counter({NO_PICTURE: 1}))
        assert Coverage.of(alignment["counts"]).share == 0


def test_words_that_do_not_see_their_picture_are_dropped(student, store):
    """The second picture stands in the second turn, after the answer that has maps of both."""
    asked = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": DOG}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": SUN}]},
    ]
    collator = collator_of(student, store)
    found = collator([{"images": [FIRST, SECOND], "messages": asked}])["alignment"]
    assert found["word_pictures"].tolist() == [[0, 0]]
    assert found["present"].tolist() == [[True, True]]
    assert Coverage.of(found["counts"]).dropped == {UNSEEN: 1}


def test_mllama_sees_the_last_picture_alone(captions, store):
    """Its mask hides the first picture from what stands after the second; consecutive pictures are seen together."""
    family = STUDENTS["mllama"]
    processor = family.build_processor([*captions, DOG, CAT], vocabulary=300)
    student = family.build_model(processor), processor
    asked = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": SUN}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and both?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": DOG}]},
    ]
    collator = collator_of(student, store)
    found = collator([{"images": [FIRST, SECOND], "messages": asked}])["alignment"]
    assert found["word_pictures"].tolist() == [[1]]
    assert Coverage.of(found["counts"]).dropped == {UNSEEN: 2}


def test_more_pictures_than_their_places_are_refused(student, store):
    asked = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": DOG}]},
    ]
    with pytest.raises(DataError) as caught:
        collator_of(student, store)([{"images": [FIRST, SECOND], "messages": asked}])
    assert str(caught.value) == (
        "Got the sample 'a dog and a cat' with a picture of 100 × 60 pixels, a picture of 70 × 100 pixels, messages "
        "with 1 place for a picture, and 2 pictures. Expected a place for each picture. Do this: put a "
        "part {'type': 'image'} where each picture belongs, or leave the content plain text."
    )


def test_a_picture_that_cannot_be_read_is_refused(student, store):
    with pytest.raises(DataError, match="Got the sample 'a dog and a cat' with .*: its picture with 3 × 3 pixels"):
        collator_of(student, store)([{"images": [FIRST, Image.new("RGB", (3, 3))], "messages": messages(DOG)}])


def test_a_word_in_the_part_that_is_cropped_is_left_out_and_counted(tmp_path, captions):
    """LLaVA-1.5's processor cuts the longer side: of 60 × 120 pixels it sees the middle half."""
    family = STUDENTS["llava"]
    processor = family.build_processor([*captions, DOG, CAT], vocabulary=300)
    processor.image_processor.do_center_crop = True
    processor.image_processor.size = {"shortest_edge": processor.image_processor.crop_size["height"]}
    wide, own = picture((60, 120)), words(DOG, "dog", "cat")
    maps = torch.zeros(2, 8, 8)
    maps[0, 4, 0], maps[1, 4, 4] = 1, 1  # the dog is at the left edge, the cat in the middle
    with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, (8, 8)) as writer:
        writer.add(WordMaps(image_id(wide), DOG, own, maps))
    student = family.build_model(processor), processor
    batch = collator_of(student, MapStore.open(tmp_path / "maps"))([{"images": [wide], "messages": messages(DOG)}])
    assert batch["alignment"]["words"] == [["cat"]]
    assert Coverage.of(batch["alignment"]["counts"]) == Coverage(1, 1, 1, Counter({OUTSIDE: 1}))


def test_rows_of_words():
    """Shared rows are there once; a word's rows have equal shares."""
    found = row_tensors([[(7, 8), (9,), (8, 7)], [], [(3,)]], [[0, 0, 1], [], [0]])
    assert found["rows"].tolist() == [[7, 8, 9], [0, 0, 0], [3, 0, 0]]
    assert found["shares"].tolist() == [
        [[0.5, 0.5, 0], [0, 0, 1], [0.5, 0.5, 0]],
        [[0, 0, 0]] * 3,
        [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]
    assert found["present"].tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert found["word_pictures"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert row_tensors([[(5,)]])["word_pictures"].tolist() == [[0]]
    assert row_tensors([[]])["rows"].shape == (1, 1)


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [
        ("predict", "all", [((7, 8), False)]),
        ("read", "all", [((8, 9), True)]),
        ("both", "all", [((7, 8), False), ((8, 9), True)]),
        ("predict", "first", [((7,), False)]),
        ("both", "first", [((7,), False), ((8,), True)]),
    ],
)
def test_the_rows_of_a_word(rows, tokens, expected):
    assert rows_of_word((7, 8), rows, tokens) == expected


@pytest.mark.parametrize("rows", ["read", "both"])
def test_rows_that_read_stand_at_the_word_itself(student, store, rows):
    """Their tokens spell the word; with "both" a word counts once, and each of its entries weighs half."""
    _, processor = student
    config = AlignmentConfig(rows=rows)
    batch = collator_of(student, store, config)([{"images": [THIRD], "messages": messages(CAT)}])
    found, ids = batch["alignment"], batch["input_ids"][0]
    assert found["words"] == [["apple"] * found["present"].shape[1]]
    assert found["reads"].tolist() == [[True] if rows == "read" else [False, True]]
    assert found["weights"].tolist() == [[1.0] if rows == "read" else [0.5, 0.5]]
    for word, reads in enumerate(found["reads"][0].tolist()):
        at = found["rows"][0][found["shares"][0, word] > 0]
        assert processor.tokenizer.decode(ids[at + (0 if reads else 1)]).strip() == "apple"
    assert Coverage.of(found["counts"]) == Coverage(1, 1, 1)
    plain = collator_of(student, store)([{"images": [THIRD], "messages": messages(CAT)}])
    assert not plain["alignment"]["reads"].any()
