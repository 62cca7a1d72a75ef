"""Tasks of ours for the paper's benchmarks: rows of their data sets, answers, and the numbers worked out by hand."""

from __future__ import annotations

import base64
import io
import math

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from lavender.evaluation.harness import paper_tasks as tasks

ROW = {
    "index": 7,
    "question": "What is it?",
    "hint": "nan",
    "A": "a cat",
    "B": "a dog",
    "C": "nan",
    "D": None,
    "answer": "B",
}


def png(colour: str) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(written, "PNG")
    return written.getvalue()


def test_the_options_of_a_question_are_those_with_a_text():
    assert tasks.lettered(ROW) == {"A": "a cat", "B": "a dog"}
    post = {"post_prompt": "Answer with the letter."}
    assert tasks.mmbench_text(ROW, post) == (
        "What is it? There are several options:\nA. a cat\nB. a dog\nAnswer with the letter."
    )
    assert tasks.mmbench_text(ROW | {"hint": "It barks."}, post).startswith("It barks. What is it? There")


@pytest.mark.parametrize(
    ("answer", "score"), [("B", 1), ("The answer is B.", 1), ("a dog", 1), ("A", 0), ("a bird", 0), ("", 0)]
)
def test_an_answer_to_a_choice_is_read_by_rules(answer, score):
    found = tasks.mmbench_results(ROW, [answer])
    assert (found["accuracy"]["score"], found["accuracy"]["index"]) == (score, 7)
    assert tasks.worldmedqa_results(ROW | {"correct_option": " b"}, [answer])["accuracy"]["score"] == score


def test_a_question_counts_if_all_its_rotations_are_right():
    """Questions 1 and 2 with two rotations each: only 2 is right in both; three of four rows are right."""
    rows = [(1, 1.0), (2, 1.0), (1_000_001, 0.0), (1_000_002, 1.0)]
    items = [{"index": index, "score": score} for index, score in rows]
    assert tasks.circular_accuracy(items) == 1 / 2
    assert tasks.mean_score(items) == 3 / 4


def test_refusals_are_counted_apart():
    answers = ["B", "I'm not able to provide a name for the person.", "I can't see a dog", "A"]
    assert tasks.refusal_rate([{"prediction": answer} for answer in answers]) == 1 / 4


def test_ocrvqa_has_a_row_per_question_and_keeps_its_pictures():
    covers = [
        {"image": {"bytes": png("red"), "path": None}, "image_id": "r", "questions": ["Who?", "What?"]},
        {"image": {"bytes": png("blue"), "path": None}, "image_id": "b", "questions": ["When?"]},
    ]
    answers = [["Ann", "A Book"], ["1999"]]
    rows = [cover | {"answers": answer, "title": "…"} for cover, answer in zip(covers, answers, strict=True)]
    split = Dataset.from_list(rows).cast_column("image", ImageFeature())
    found = tasks.ocrvqa_questions(split)
    assert found.column_names == ["image", "image_id", "question", "answer"]
    assert [(row["image_id"], row["question"], row["answer"]) for row in found] == [
        ("r", "Who?", "Ann"),
        ("r", "What?", "A Book"),
        ("b", "When?", "1999"),
    ]
    assert [tasks.picture(row)[0].getpixel((0, 0)) for row in found] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
    assert isinstance(found.features["image"], ImageFeature)  # so lmms-eval builds prompts without decoding it
    assert [tasks.ocrvqa_results(found[1], [said])["exact_match"] for said in ("a book", "book")] == [1, 0]


def test_worldmedqa_has_pictures_from_base64():
    texts = [base64.b64encode(png(colour)).decode() for colour in ("red", "lime")]
    split = Dataset.from_list([{"image": text, "question": str(index)} for index, text in enumerate(texts)])
    found = tasks.pictures_from_base64(split)
    assert isinstance(found.features["image"], ImageFeature)
    assert [tasks.picture(row)[0].getpixel((0, 0)) for row in found] == [(255, 0, 0), (0, 255, 0)]


def test_captions_of_either_data_set_are_scored_with_all_references():
    coco = tasks.caption_results({"sentences": ["a red dog", "one dog"]}, ["a red dog"])["cider"]
    flickr = tasks.caption_results({"caption": ["two blue birds fly"]}, ["a tree"])["cider"]
    assert coco == {"prediction": "a red dog", "references": ["a red dog", "one dog"]}
    # of 2 samples: "a red dog" is the first reference (10/2 for its 4 orders, of which 4-grams do not exist: 3/4)
    assert tasks.mean_cider([coco, flickr]) == pytest.approx((10 * 3 / 4 / 2 + shared_words() / 2) / 2, abs=1e-6)


def shared_words() -> float:
    """10 · similarity / 4 of "a red dog" and "one dog": only the word dog is common, idf ln 2 everywhere.

    Norms √3 and √2 in words; CIDEr-D's penalty for lengths 2 and 1 in bigrams, σ = 6.
    """
    return 10 / 4 * math.exp(-1 / 72) / math.sqrt(6)


def test_hallusionbench_is_grouped_by_figure_and_by_question():
    keys = {"category": "VD", "subcategory": "chart", "set_id": "1"}
    rows = [
        keys | {"figure_id": "0", "question_id": "0", "gt_answer": "1"},
        keys | {"figure_id": "0", "question_id": "1", "gt_answer": "0"},
        keys | {"figure_id": "1", "question_id": "0", "gt_answer": "0"},
    ]
    said = ["Yes, it is.", "yes", "No."]
    items = [tasks.hallusion_results(row, [text])["aAcc"] for row, text in zip(rows, said, strict=True)]
    assert [item["score"] for item in items] == [1, 0, 1]
    # figure 0 has a wrong question, figure 1 has none; question 0 is right for both figures, question 1 is not
    assert tasks.hallusion_questions(items) == pytest.approx(2 / 3)
    assert tasks.hallusion_figures(items) == tasks.hallusion_pairs(items) == 1 / 2
    assert tasks.hallusion_average(items) == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)


def test_memes_are_ranked_by_the_probability_of_yes():
    """Losses of yes and no, in nats: a smaller loss of yes is a larger probability."""
    losses = [(0.1, 3.0, 1), (2.0, 2.0, 0), (3.0, 0.5, 1), (5.0, 0.1, 0)]
    items = [tasks.memes_results({"label": label}, [(yes, False), (no, True)])["auroc"] for yes, no, label in losses]
    assert items[1]["probability"] == 1 / 2
    assert items[0]["probability"] == pytest.approx(1 / (1 + math.exp(-2.9)))
    assert tasks.area_under_curve(items) == 3 / 4  # of the four pairs, one is the wrong way round: third and second
