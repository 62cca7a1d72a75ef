"""Which words of a conversation are aligned, which map each takes, and in which rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.geometry import picture
from lavender.alignment.collator import AlignmentCollator
from lavender.alignment.coverage import (
    LEAST_CONFIDENT,
    NO_MAPS,
    NO_NOUN,
    NO_RECORD,
    NO_WORDS,
    NOT_OF_TEXTS,
    NOUN_WITHOUT,
    SUBJECT_WITHOUT,
    Coverage,
)
from lavender.alignment.examples import ABOUT, SampleError
from lavender.config import AlignmentConfig
from lavender.data.images import image_id
from lavender.data.store import MapStore, SeveralStores
from lavender.errors import ConfigError
from lavender.maps import Word, WordMaps, to_heat
from lavender.students.locate import UNSEEN
from lavender.students.registry import adapter_for
from lavender.words import words_of
from lavender.world.student_models import STUDENTS

QUESTION, ANSWER, LATER = "is the small dog near a tree?", "a red dog on red", "the hat is blue"
FIRST, SECOND = picture((60, 100)), picture((100, 70), 1)
GRID = (11, 13)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> MapStore:
    """Maps of the dog and the tree of the question, of the answer's dog, of the adjectives but "small"."""
    torch.manual_seed(3)
    wanted = {QUESTION: ("dog", "tree"), ANSWER: ("red", "dog"), LATER: ("blue",)}
    path = tmp_path_factory.mktemp("words") / "maps"
    with MapStore.writer(path, {"made by": "tests"}, {}, GRID) as writer:
        for image in (FIRST, SECOND):
            for text, names in wanted.items():
                words = tuple(word for word in words_of(text) if word.text in names)
                maps = to_heat(torch.rand(len(words), *GRID))
                writer.add(WordMaps(image_id(image), text, words, maps, confidence=torch.linspace(0.5, 1, len(words))))
    return MapStore.open(path)


@pytest.fixture(scope="module", params=["mllama", "llava"])
def student(request, captions) -> tuple[Any, Any]:
    """(adapter, processor)."""
    family = STUDENTS[request.param]
    processor = family.build_processor([*captions, QUESTION, ANSWER, LATER, "what?"], vocabulary=300)
    return adapter_for(family.build_model(processor).config), processor


def example(*texts: str, **columns: Any) -> dict[str, Any]:
    turns = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]
    return {"images": [FIRST], "messages": turns} | columns


def collator_of(student, store: MapStore | SeveralStores, **settings: Any) -> AlignmentCollator:
    adapter, processor = student
    base = DataCollatorForVisionLanguageModeling(processor)
    return AlignmentCollator(base, processor, adapter, store, AlignmentConfig(**settings))


def aligned(student, store, sample: dict, **settings: Any) -> tuple[list[tuple[str, bool, torch.Tensor]], Coverage]:
    """(text, reads, map) of each word of a sample, and the coverage."""
    found = collator_of(student, store, **settings)([sample])["alignment"]
    number = int(found["present"].sum())
    words = zip(found["words"][0], found["reads"][0, :number].tolist(), found["targets"][0, :number], strict=True)
    return list(words), Coverage.of(found["counts"])


def map_of(store: MapStore, text: str, name: str, occurrence: int = 0) -> torch.Tensor:
    maps: Any = store.get(image_id(FIRST), text)
    return maps.maps[[place for place, word in enumerate(maps.words) if word.text == name][occurrence]]


def assert_words(found: list, *expected: tuple[str, bool, torch.Tensor]) -> None:
    assert [word[:2] for word in found] == [word[:2] for word in expected]
    for (_, _, heat), (text, _, wanted) in zip(found, expected, strict=True):
        assert torch.equal(heat, wanted), text


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("answers", [("red", False), ("dog", False), ("red", False)]),
        ("questions", [("dog", True), ("tree", True)]),
        ("all", [("dog", True), ("tree", True), ("red", False), ("dog", False), ("red", False)]),
    ],
)
def test_the_turns_that_are_aligned(student, store, texts, expected):
    words, coverage = aligned(student, store, example(QUESTION, ANSWER), texts=texts)
    assert [word[:2] for word in words] == expected
    assert coverage == Coverage(1, 1, len(expected))


@pytest.mark.parametrize("rows", ["predict", "read", "both"])
def test_questions_are_aligned_where_they_are_read(student, store, rows):
    """Whatever `rows` says of answers. The tokens of the rows spell the word; with "first", its beginning."""
    _, processor = student
    batch = collator_of(student, store, texts="all", rows=rows)([example(QUESTION, ANSWER)])
    found, ids = batch["alignment"], batch["input_ids"][0]
    asked = {"predict": [False], "read": [True], "both": [False, True]}[rows] * 3
    assert found["reads"][0].tolist() == [True, True, *asked]
    assert found["weights"][0].tolist() == [1, 1] + [1 / (1 + (rows == "both"))] * len(asked)
    for word, (text, reads) in enumerate(zip(found["words"][0], found["reads"][0].tolist(), strict=True)):
        at = found["rows"][0][found["shares"][0, word] > 0]
        assert processor.tokenizer.decode(ids[at + (0 if reads else 1)]).strip() == text
        assert torch.allclose(found["shares"][0, word].sum(), torch.tensor(1.0))
    assert Coverage.of(found["counts"]).words == 5
    first = collator_of(student, store, texts="all", rows=rows, tokens="first")([example(QUESTION, ANSWER)])
    assert ((first["alignment"]["shares"] > 0).sum(dim=-1) == 1).all()


def test_words_before_the_picture_are_dropped(student, store):
    """A question may name its picture last."""
    parts = [{"type": "text", "text": QUESTION}, {"type": "image"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    rendered = student[1].apply_chat_template(turns, tokenize=False)
    sees = rendered.index("<image>") < rendered.index(QUESTION) if "<image>" in rendered else False
    words, coverage = aligned(student, store, {"images": [FIRST], "messages": turns}, texts="questions")
    assert [word[0] for word in words] == (["dog", "tree"] if sees else [])
    assert coverage.dropped == ({} if sees else {UNSEEN: 2, NO_WORDS: 1})


def test_turns_without_maps_are_counted(student, store):
    """Where questions count; a sample without any is one without maps."""
    sample = example("what?", ANSWER, QUESTION, "no")
    words, coverage = aligned(student, store, sample, texts="all")
    assert [word[0] for word in words] == ["red", "dog", "red", "dog", "tree"]
    assert coverage.dropped == {NO_RECORD: 2}
    assert aligned(student, store, sample)[1].dropped == {}
    assert aligned(student, store, example("what?", ANSWER), texts="questions")[1] == Coverage(
        1, 0, 0, Counter({NO_MAPS: 1})
    )


def test_a_store_without_the_turns_is_refused(student, tmp_path):
    def extracted(name: str, **identity: str) -> MapStore:
        with MapStore.writer(tmp_path / name, {"teacher": "tiny", **identity}, {}, GRID):
            return MapStore.open(tmp_path / name)

    answers, questions = extracted("old"), extracted("questions", texts="questions")
    assert (answers.roles, questions.roles) == ({"assistant"}, {"user"})
    assert extracted("all", texts="all").roles == {"user", "assistant"}
    with pytest.raises(ConfigError) as caught:
        collator_of(student, answers, texts="all")
    assert "Got texts='all' with a map store that has no maps of the user's turns." in str(caught.value)
    with pytest.raises(ConfigError, match="no maps of the assistant's turns"):
        collator_of(student, questions)
    collator_of(student, SeveralStores(answers, questions), texts="all")


def test_attributes_take_the_map_of_their_noun(student, store):
    """The first "red" describes the dog; of the second the grammar is not sure; "small" has no map of its own."""
    words, coverage = aligned(student, store, example(QUESTION, ANSWER), texts="all", attributes="noun")
    asked, answered = map_of(store, QUESTION, "dog"), map_of(store, ANSWER, "dog")
    expected = [("small", True, asked), ("dog", True, asked), ("tree", True, map_of(store, QUESTION, "tree"))]
    assert_words(words, *expected, ("red", False, answered), ("dog", False, answered))
    assert coverage == Coverage(1, 1, 5, Counter({NO_NOUN: 1}))
    words, coverage = aligned(student, store, example("what?", LATER), attributes="noun")
    assert words == []
    assert coverage.dropped == {NOUN_WITHOUT: 1, NO_WORDS: 1}
    chosen = aligned(student, store, example(QUESTION, ANSWER), attributes="noun", parts_of_speech=("adjective",))[0]
    assert_words(chosen, ("red", False, answered))


def test_an_adjective_in_a_chosen_phrase_has_no_target_of_its_own(student, tmp_path):
    """As with people's annotations, whose words may be phrases. The phrase keeps its own map; others take theirs."""
    text = "a hot dog and a red hat"
    phrase, hat = Word("hot dog", 2, 9, "hot dog", "noun"), Word("hat", 20, 23, "hat", "noun")
    with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, GRID) as writer:
        writer.add(WordMaps(image_id(FIRST), text, (phrase, hat), to_heat(torch.rand(2, *GRID))))
    maps = MapStore.open(tmp_path / "maps")
    words, coverage = aligned(student, maps, example("what?", text), attributes="noun")
    dog, of_hat = map_of(maps, text, "hot dog"), map_of(maps, text, "hat")
    assert_words(words, ("hot dog", False, dog), ("red", False, of_hat), ("hat", False, of_hat))
    assert coverage == Coverage(1, 1, 3)
    chosen = aligned(student, maps, example("what?", text), attributes="noun", parts_of_speech=("adjective",))[0]
    assert_words(chosen, ("hot", False, dog), ("red", False, of_hat))


@pytest.mark.parametrize(
    ("confidences", "share", "kept"),
    [
        ((1.0, 1.0, 1.0, 1.0), 0.5, "dog cat hat tree"),
        ((0.5, 0.5, 0.5, 0.9), 0.5, "dog cat hat tree"),
        ((0.2, 0.9, 0.5, 0.9), 0.25, "cat tree"),
        ((0.2, 0.9, 0.5, 0.9), 0.5, "cat tree"),
        ((0.2, 0.9, 0.5, 0.9), 0.75, "cat hat tree"),
    ],
)
def test_words_as_confident_as_the_last_one_kept_are_kept(student, tmp_path, confidences, share, kept):
    """The order of words decides nothing."""
    text = "dog cat hat tree"
    words = tuple(Word(one, text.index(one), text.index(one) + len(one), one, "noun") for one in text.split())
    with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, GRID) as writer:
        maps = to_heat(torch.rand(4, *GRID))
        writer.add(WordMaps(image_id(FIRST), text, words, maps, confidence=torch.tensor(confidences)))
    found, coverage = aligned(student, MapStore.open(tmp_path / "maps"), example("what?", text), word_share=share)
    assert [word[0] for word in found] == kept.split()
    assert coverage.dropped == Counter({LEAST_CONFIDENT: 4 - len(found)} if len(found) < 4 else {})


def test_the_most_confident_words(student, store):
    """Of the answer's red, dog and red, with confidences of 0.5, 0.75 and 1, two thirds are the last two."""
    words, coverage = aligned(student, store, example(QUESTION, ANSWER), word_share=0.67)
    assert_words(
        words, ("dog", False, map_of(store, ANSWER, "dog")), ("red", False, map_of(store, ANSWER, "red", occurrence=1))
    )
    assert coverage == Coverage(1, 1, 2, Counter({LEAST_CONFIDENT: 1}))
    assert len(aligned(student, store, example(QUESTION, ANSWER), word_share=0.01)[0]) == 1


@pytest.mark.parametrize("attributes", ["own", "noun"])
def test_words_that_are_about_others(student, store, attributes):
    """They take the map where the column says, whatever their part of speech and the grammar."""
    about = [{"word": "red", "about": "small dog"}, {"word": "red", "about": "dog near a tree"}]
    sample = example(QUESTION, ANSWER, about=about)
    words, coverage = aligned(student, store, sample, attributes=attributes, parts_of_speech=None)
    dog, tree = map_of(store, QUESTION, "dog"), map_of(store, QUESTION, "tree")
    mean = torch.stack([dog, tree]).mean(dim=0)
    own = map_of(store, ANSWER, "dog")
    assert_words(words, ("red", False, dog), ("dog", False, own), ("red", False, mean))
    assert coverage == Coverage(1, 1, 3)
    weighted = collator_of(student, store, weight_by_confidence=True)([sample])["alignment"]
    assert weighted["weights"].tolist() == [[0.5, 0.75, 0.75]]  # the question's dog and tree have 0.5 and 1


def test_about_needs_no_maps_of_the_answer(student, store):
    """A phrase of the answer, as one word: the mean of its tokens' rows."""
    sample = example(QUESTION, "yes, light green", about={"light green": "tree"})
    words, coverage = aligned(student, store, sample)
    assert_words(words, ("light green", False, map_of(store, QUESTION, "tree")))
    assert coverage == Coverage(1, 1, 1)


def test_about_has_no_effect_where_only_questions_are_aligned(student, store):
    """The words of the answer that have an entry are counted."""
    sample = example(QUESTION, ANSWER, about={"red": "dog"})
    words, coverage = aligned(student, store, sample, texts="questions")
    assert "red" not in [word[0] for word in words]
    assert coverage == Coverage(1, 1, len(words), Counter({NOT_OF_TEXTS: 2}))


def test_about_a_phrase_without_a_map(student, store):
    """The word is not aligned, and not by its own map either."""
    sample = example(QUESTION, ANSWER, about={"red": "near"})
    words, coverage = aligned(student, store, sample)
    assert [word[0] for word in words] == ["dog"]
    assert coverage == Coverage(1, 1, 1, Counter({SUBJECT_WITHOUT: 2}))
    words, coverage = aligned(student, store, example("what dog?", "red", about={"red": "dog"}))
    assert (words, coverage) == ([], Coverage(1, 0, 0, Counter({NO_MAPS: 1, SUBJECT_WITHOUT: 1})))


def test_about_on_several_pictures(student, store):
    sample = example(QUESTION, "red", about={"red": "dog"}) | {"images": [FIRST, SECOND]}
    found = collator_of(student, store)([sample])["alignment"]
    assert found["words"] == [["red", "red"]]
    assert found["word_pictures"].tolist() == [[0, 1]]
    assert torch.equal(found["targets"][0, 0], map_of(store, QUESTION, "dog"))
    assert not torch.equal(found["targets"][0, 0], found["targets"][0, 1])


@pytest.mark.parametrize(
    ("about", "message"),
    [({"blue": "dog"}, "about names 'blue', which is there in no answer"), ("red", "about is no JSON")],
)
def test_a_column_that_does_not_fit_is_refused(student, store, about, message):
    collator = collator_of(student, store)
    with pytest.raises(SampleError) as caught:
        collator([example(QUESTION, ANSWER, about=about)])
    assert message in str(caught.value)
    assert caught.value.reason == ABOUT
    with pytest.raises(SampleError, match="the sample 'a red dog on red' with"):
        collator.screen.check(example(QUESTION, ANSWER, about=about))


def test_the_base_collators_batch_is_unchanged(student, store):
    sample = example(QUESTION, ANSWER)
    plain = collator_of(student, store)([sample])
    more = collator_of(student, store, texts="all", rows="both", attributes="noun")(
        [sample | {"about": {"red": "tree"}}]
    )
    for batch in (plain, more):
        batch.pop("alignment")
    assert plain.keys() == more.keys()
    assert all(torch.equal(plain[name], more[name]) for name in plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_order_nor_padding_changes_a_word(student, store, side):
    """Each sample's words, rows from its first token, maps and weights are as alone."""
    _, processor = student
    settings: dict[str, Any] = {"texts": "all", "rows": "both", "attributes": "noun"}
    samples = [example(QUESTION, ANSWER, about={"on": "dog"}), example("what?", LATER), example(QUESTION * 3, "red")]
    alone = [collator_of(student, store, **settings)([sample]) for sample in samples]
    before = processor.tokenizer.padding_side
    try:
        processor.tokenizer.padding_side = side
        for order in ([0, 1, 2], [2, 0, 1]):
            together = collator_of(student, store, **settings)([samples[index] for index in order])
            for place, index in enumerate(order):
                assert described(together, place) == described(alone[index], 0)
    finally:
        processor.tokenizer.padding_side = before


def described(batch: dict[str, Any], sample: int) -> list[tuple]:
    """Text, rows from the first token, kind, picture, weight and map of each word."""
    found, first = batch["alignment"], int(batch["attention_mask"][sample].argmax())
    return [
        (
            text,
            [row - first for row in found["rows"][sample][found["shares"][sample, word] > 0].tolist()],
            found["reads"][sample, word].item(),
            found["word_pictures"][sample, word].item(),
            found["weights"][sample, word].item(),
            found["targets"][sample, word].tolist(),
        )
        for word, text in enumerate(found["words"][sample])
    ]
