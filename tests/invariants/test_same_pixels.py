"""The student sees the pixels that the teacher saw and that the words' maps are of, however a picture comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.test_qwen_vl import build_processor, config_of
from invariants.picture_kinds import NAMES, kinds
from lavender.alignment.collator import AlignmentCollator
from lavender.data.images import image_id, load_image, picture_size
from lavender.data.store import MapStore
from lavender.maps import WordMaps, to_heat
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture
from lavender.words import words_of
from lavender.world.student_models import STUDENTS

ANSWER = "a dog and a cat"
MESSAGES = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": ANSWER}]


@pytest.fixture(scope="module", params=["mllama", "llava", "qwen2_5_vl"])
def family(request, captions) -> tuple[Any, Any]:
    """(adapter, processor)."""
    if request.param == "qwen2_5_vl":
        processor = build_processor([*captions, ANSWER])
        return adapter_for(config_of(request.param, processor.tokenizer)), processor
    made = STUDENTS[request.param]
    processor = made.build_processor([*captions, ANSWER], vocabulary=300)
    return adapter_for(made.build_model(processor).config), processor


@pytest.mark.parametrize("name", NAMES)
def test_student_and_teacher_see_the_same(family, name, tmp_path):
    """The maps are found by the pixels; the base collator gets them; the batch is that of the plain RGB picture."""
    adapter, processor = family
    source, pixels = kinds(tmp_path)[name]
    plain = Image.fromarray(np.rint(pixels).astype(np.uint8))
    teachers = load_image(source, "a picture")
    assert np.abs(np.asarray(teachers).astype(float) - pixels).max() <= 1  # of rounding
    words = words_of(ANSWER)
    with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, (11, 13)) as writer:
        for identity in {image_id(teachers), image_id(plain)}:
            writer.add(WordMaps(identity, ANSWER, words, to_heat(torch.rand(len(words), 11, 13))))
    base, got = DataCollatorForVisionLanguageModeling(processor), []

    def watched(examples: list[dict[str, Any]]) -> dict[str, Any]:
        got.extend(example["images"] for example in examples)
        return base(examples)

    collator = AlignmentCollator(watched, processor, adapter, MapStore.open(tmp_path / "maps"))
    for example in ({"images": [source], "messages": MESSAGES}, {"image": source, "messages": MESSAGES}):
        got.clear()
        batch = collator([example])
        ((seen,),) = got
        assert seen.mode == "RGB"
        assert np.array_equal(np.asarray(seen), np.asarray(teachers))
        assert batch["alignment"]["present"].sum() == len(words)
        expected = collator([{"images": [plain], "messages": MESSAGES}])
        for key, one in batch["alignment"].items():
            if key in ("boxes", "pictures", "views", "keys"):
                assert torch.equal(one, expected["alignment"][key]), key
        for key in batch.keys() - {"alignment"}:
            if batch[key].is_floating_point():
                torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0.1)  # of one level of 255
            else:
                assert torch.equal(batch[key], expected[key]), key
    assert picture_size(source, "a picture") == pixels.shape[:2]


@pytest.mark.parametrize("name", NAMES)
def test_a_reading_has_the_same_picture(name, tmp_path):
    source, _ = kinds(tmp_path)[name]
    reading = AnsweredPicture(source, "what is it?", ANSWER, words_of(ANSWER))
    assert image_id(reading.image) == image_id(load_image(source, "a picture"))


def test_ordinary_pictures_reach_the_base_collator_unchanged(family, some_scenes, tmp_path):
    adapter, processor = family
    base = DataCollatorForVisionLanguageModeling(processor)
    with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, (11, 13)):
        pass
    examples = [{"images": [scene.image], "messages": MESSAGES} for scene in some_scenes]
    batch = AlignmentCollator(base, processor, adapter, MapStore.open(tmp_path / "maps"))(examples)
    batch.pop("alignment")
    expected = base([dict(example) for example in examples])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], one) for key, one in expected.items())
