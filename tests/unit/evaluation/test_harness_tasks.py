"""Tasks of ours for the paper's benchmarks: rows of their data sets, answers, and the numbers worked out by hand."""

from __future__ import annotations

import base64
import io
import math
import re

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from lmms_eval.tasks.mme import utils as lmms_mme
from lmms_eval.tasks.pope import utils as lmms_pope
from lmms_eval.tasks.scienceqa import utils as lmms_scienceqa
from PIL import Image

from lavender.evaluation.harness import paper_tasks as tasks
from lavender.evaluation.scorers import exact_match, read_yes_no

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


def test_answers_without_a_choice_are_counted_apart():
    """Of "B", "我不知道" and "B。" the last is a choice in Chinese alone."""
    for results, share in ((tasks.mmbench_results, 2 / 3), (tasks.mmbench_chinese_results, 1 / 3)):
        items = [results(ROW, [answer])["share_without_choice"] for answer in ("B", "我不知道", "B。")]
        assert tasks.share_without_choice(items) == pytest.approx(share)
        assert tasks.mean_score(items) == pytest.approx(1 - share)
    row = ROW | {"correct_option": "B"}
    assert tasks.worldmedqa_results(row, ["答案是B。"])["share_without_choice"]["without_choice"] == 1
    assert tasks.worldmedqa_local_results(row, ["答案是B。"])["share_without_choice"]["without_choice"] == 0
    assert "refusals" not in tasks.worldmedqa_local_results(row, ["B"])


def test_pope_reads_the_word_and_counts_refusals_as_missed():
    """200 questions, half of them yes. lmms-eval's own functions on the same answers, for what they leave out."""
    golds = ["yes"] * 100 + ["no"] * 100
    stopped = ["yes"] + ["Yes."] * 99 + ["No."] * 100
    refusing = ["yes"] * 20 + ["I'm not able to say."] * 80 + ["no"] * 100
    for answers, expected in (
        (stopped, {"f1": 1, "accuracy": 1, "recall": 1, "share_of_other": 0, "share_of_yes": 0.5}),
        # 2 · 20 / (20 said + 100 true) = 1/3
        (refusing, {"f1": 1 / 3, "accuracy": 0.6, "precision": 1, "recall": 0.2, "share_of_other": 0.4}),
    ):
        rows = [({"answer": gold, "question_id": ""}, [said]) for gold, said in zip(golds, answers, strict=True)]
        items = [tasks.pope_results(*row)["f1"] for row in rows]
        assert tasks.mean_score(items) == expected["accuracy"]
        for name, value in expected.items():
            assert getattr(tasks, f"pope_{name}")(items) == pytest.approx(value), name
        theirs = [lmms_pope.pope_process_results(*row)["pope_f1_score"] for row in rows]
        assert lmms_pope.pope_aggregate_f1_score(theirs) == 1


def test_scienceqas_rule_of_lmms_eval_is_exact_match_but_for_a_letter_with_a_stop():
    """What the table says of its scorer."""
    for said in ("B", "b", " B\n", "(B)", "B)", "B:", "b.", "**B**", "B,", "", "B.", "B. cat", "A. B", "AB", "É. B"):
        theirs = lmms_scienceqa.sqa_process_results({"choices": ["a", "b"], "answer": 1}, [said])["exact_match"]
        letter = re.sub(r"^\s*([A-ZÉ])\..*", r"\1", said)
        assert exact_match([letter], ["B"]).per_sample == (theirs,), said


def test_mmes_rule_differs_from_lmms_evals_where_the_table_says_so():
    for said in ("yes", "No.", "know", "Yes, it is", "no way", "maybe", ""):
        assert lmms_mme.parse_pred_ans(said) == read_yes_no(said, "mme")
    for said, theirs in (("Y", "yes"), ("n", "no"), ("N.o", "no"), ("    Yes", "yes"), ("...yes", "yes")):
        assert (lmms_mme.parse_pred_ans(said), read_yes_no(said, "mme")) == (theirs, "other")


def test_seed_asks_about_images_alone():
    rows = [{"image": [png(colour)], "data_type": kind} for colour, kind in (("red", "image"), ("blue", "video"))]
    found = tasks.seed_images(Dataset.from_list([*rows, rows[0]]))
    assert found["data_type"] == ["image", "image"]


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
    assert tasks.hallusion_share_of_other(items) == 0
    unsure = tasks.hallusion_results(rows[0], ["I'm not able to say."])["share_of_other"]
    assert tasks.hallusion_share_of_other([*items, unsure]) == 1 / 4


def test_memes_are_ranked_by_the_probability_of_yes():
    """Losses of yes and no, in nats: a smaller loss of yes is a larger probability."""
    losses = [(0.1, 3.0, 1), (2.0, 2.0, 0), (3.0, 0.5, 1), (5.0, 0.1, 0)]
    items = [tasks.memes_results({"label": label}, [(yes, False), (no, True)])["auroc"] for yes, no, label in losses]
    assert items[1]["probability"] == 1 / 2
    assert items[0]["probability"] == pytest.approx(1 / (1 + math.exp(-2.9)))
    assert tasks.area_under_curve(items) == 3 / 4  # of the four pairs, one is the wrong way round: third and second
