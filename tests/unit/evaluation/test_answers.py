"""Names in texts, scores of answers, and greedy decoding on a tiny Mllama with random weights."""

from __future__ import annotations

import pytest
import torch

from lavender.errors import DataError
from lavender.evaluation.answers import exact_set, generate_answers, micro_f1, names_said
from lavender.evaluation.compare import content_f1
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes
from lavender.world.sprites import NAMES
from lavender.world.student_models import CAPTION_PROMPT, build_mllama, build_mllama_processor


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a hot dog near a palm tree.", {"hot dog", "palm tree"}),
        ("A Hot-Dog and a dog, under the TREE", {"hot dog", "dog", "tree"}),
        ("a caterpillar", {"caterpillar"}),
        ("two dogs, three hot dogs and ice\ncreams", {"dog", "hot dog", "ice cream"}),
        ("grapes", {"grapes"}),
        ("grape", set()),
        ("a dogma, a carpet, buss", set()),
        ("the dog's cake (and a bus)", {"dog", "cake", "bus"}),
        ("", set()),
    ],
)
def test_names_are_whole_words_longest_first(text: str, expected: set[str]):
    assert names_said(text, NAMES) == expected


def test_names_that_begin_or_end_like_others():
    assert names_said("grapes", ["grape", "grapes"]) == {"grapes"}
    assert names_said("grapes", ["grapes", "grape"]) == {"grapes"}
    assert names_said("grapes", ["Grape"]) == {"Grape"}
    assert names_said("a palm tree", ["palm", "palm tree"]) == {"palm tree"}
    assert names_said("a c+ (fast)", ["C+", "fast)"]) == {"C+", "fast)"}


def test_every_caption_of_the_world_says_its_names():
    for scene in scenes("development", 40):
        assert names_said(caption_scene(scene).text, NAMES) == set(scene.names)


def test_f1_is_micro_over_all_pictures():
    said = [{"dog", "cat"}, {"bus"}, set()]
    present = [{"dog"}, {"car", "owl"}, {"pig", "bus"}]
    # one right of three said and five present: 2 · 1 / (3 + 5); the mean over pictures would be 2/9
    assert micro_f1(said, present) == pytest.approx(0.25)
    assert micro_f1([{"dog"}], [set()]) == micro_f1([set()], [{"dog"}]) == 0


def test_empty_sets_are_right_where_nothing_is_true():
    """Of names: all that may be said are known. Other texts can differ in what is no content word."""
    assert micro_f1([set()], [set()]) == exact_set([set()], [set()]) == 1
    for wrong, right in (("no", "yes"), ("5", "3"), ("two", "seven"), ("A", "B"), ("狗", "猫"), ("7 %", "42 %")):
        assert content_f1([wrong] * 3, [right] * 3) is None
    assert content_f1(["of the"], ["a dog"]) == 0
    # "dog" and "park" of 3 + 3 lemmas; an empty pair beside them changes nothing
    texts = ["A big dog in parks", "of the"], ["small dogs in the park", "and"]
    assert content_f1(*texts) == pytest.approx(4 / 6)


def test_exact_set():
    assert exact_set([{"dog"}, {"cat", "dog"}, set()], [{"dog"}, {"cat"}, set()]) == pytest.approx(2 / 3)


def test_unpaired_answers_are_refused():
    with pytest.raises(DataError, match="Got 1 and 2 items"):
        exact_set([{"a"}], [{"a"}, {"b"}])
    with pytest.raises(DataError, match="Got 0 and 0 items"):
        micro_f1([], [])


@pytest.fixture(scope="module")
def student():
    texts = [caption_scene(scene, variant).text for scene in scenes("development", 7) for variant in range(3)]
    processor = build_mllama_processor([*texts, CAPTION_PROMPT], vocabulary=307)
    torch.manual_seed(0)
    model = build_mllama(processor)
    for parameter in model.parameters():  # far from zero, so that answers depend on picture and prompt
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model, processor


PROMPTS = [CAPTION_PROMPT, "is there a dog?", "what is it?", "how many things are there in all?", "x"]


def test_left_padded_batches_answer_like_single_pictures(student):
    model, processor = student
    images = [scene.image for scene in scenes("development", 5)]
    seen: list[int] = []
    single = generate_answers(model, processor, images, PROMPTS, max_new_tokens=11, batch_size=1)
    batched = generate_answers(model, processor, images, PROMPTS, max_new_tokens=11, batch_size=4, progress=seen.append)
    assert batched == single
    assert len(set(single)) == 5
    assert seen == [4, 5]
    assert not any(token in answer for answer in single for token in ("<|", "user", "assistant", CAPTION_PROMPT))


def test_answers_depend_on_the_picture(student):
    model, processor = student
    images = [scene.image for scene in scenes("development", 5)]
    answers = generate_answers(model, processor, images, [CAPTION_PROMPT] * 5, max_new_tokens=11)
    assert len(set(answers)) > 1


def test_the_answer_ends_where_the_model_ends_it(student, monkeypatch):
    model, processor = student
    image = next(scenes("development", 1)).image
    long = generate_answers(model, processor, [image], ["what is it?"], max_new_tokens=11)[0]
    assert generate_answers(model, processor, [image], ["what is it?"], max_new_tokens=3)[0] != long
    first = generate_answers(model, processor, [image], ["what is it?"], max_new_tokens=1)[0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(307)))
    assert generate_answers(model, processor, [image], ["what is it?"], max_new_tokens=11)[0] == first


def test_special_tokens_are_no_answer(student, monkeypatch):
    model, processor = student
    monkeypatch.setattr(model.lm_head.weight, "data", torch.zeros_like(model.lm_head.weight))
    assert processor.tokenizer.convert_ids_to_tokens(0) == "<|begin_of_text|>"  # the first of equal logits
    image = next(scenes("development", 1)).image
    assert generate_answers(model, processor, [image], ["what is it?"], max_new_tokens=3) == [""]


def test_model_and_processor_are_left_as_they_were(student):
    model, processor = student
    model.train()
    model.model.vision_model.eval()  # frozen, while the rest trains
    generate_answers(model, processor, [next(scenes("development", 1)).image], ["x"], max_new_tokens=1)
    assert model.training
    assert model.model.language_model.training
    assert not model.model.vision_model.training
    assert processor.tokenizer.padding_side == "right"


def test_a_failing_model_is_left_as_it_was_too(student):
    model, processor = student
    model.train()
    images = [next(scenes("development", 1)).image] * 2

    def stop(count: int) -> None:
        raise KeyboardInterrupt(count)

    with pytest.raises(KeyboardInterrupt):
        generate_answers(model, processor, images, ["x", "y"], max_new_tokens=1, batch_size=1, progress=stop)
    assert model.training
    assert processor.tokenizer.padding_side == "right"


def test_pictures_without_prompts_are_refused(student):
    model, processor = student
    with pytest.raises(DataError, match="Got 1 and 0 items"):
        generate_answers(model, processor, [next(scenes("development", 1)).image], [])
