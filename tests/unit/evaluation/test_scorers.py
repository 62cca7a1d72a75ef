"""Each scorer has the value of the benchmark's own scorer; `scorer_values/` holds those values, with their source.

The values were computed by running the reference. The cases have empty answers, other scripts, articles, number words,
ties, refusals, several right answers, and one class only.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lavender.errors import ConfigError, DataError, LavenderError
from lavender.evaluation.scorers import (
    anls,
    auroc,
    bleu,
    cider,
    exact_match,
    extract_choice,
    hallusion_bench,
    is_refusal,
    mme,
    multiple_choice,
    ocrbench,
    read_yes_no,
    refusals,
    relaxed_accuracy,
    rouge_l,
    vqa_accuracy,
    with_refusals,
    yes_no,
)
from lavender.evaluation.scorers.ptb_tokens import ptb_tokens


def values(name: str) -> dict[str, Any]:
    found = json.loads((Path(__file__).parent / "scorer_values" / f"{name}.json").read_text(encoding="utf-8"))
    assert found["source"]
    assert len(found["cases"]) >= 20
    return found


def column(cases: list[dict[str, Any]], name: str) -> list[Any]:
    return [case[name] for case in cases]


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_tokens_are_those_of_cocos_tokenizer():
    wrong = [
        (text, ptb_tokens(text), tokens)
        for text, tokens in values("ptb_tokens")["cases"]
        if ptb_tokens(text) != tokens.split()
    ]
    assert not wrong


def test_caption_scores():
    expected = values("captions")
    predictions, references = column(expected["cases"], "prediction"), column(expected["cases"], "references")
    scores = cider(predictions, references)
    assert list(scores.per_sample) == close(column(expected["cases"], "cider"))
    assert scores.aggregate == {"cider": close(expected["cider"])}
    scores = bleu(predictions, references)
    assert list(scores.per_sample) == close(column(expected["cases"], "bleu_4"))
    assert [scores.aggregate[f"bleu_{order}"] for order in (1, 2, 3, 4)] == close(expected["bleu"])
    assert next(iter(scores.aggregate)) == "bleu_4"
    scores = rouge_l(predictions, references)
    assert list(scores.per_sample) == close(column(expected["cases"], "rouge_l"))
    assert scores.aggregate == {"rouge_l": close(expected["rouge_l"])}


def test_caption_scores_by_hand():
    # with one sample each n-gram is in all samples, so it has no weight
    assert cider(["a red bus"], [["a red bus"]]).aggregate["cider"] == 0
    # LCS "a b d" of 3: precision 3/3, recall 3/4
    assert rouge_l(["a b d"], ["a b c d"], str.split).per_sample == (close(2.44 * 0.75 / (0.75 + 1.44)),)
    # all n-grams match; only the brevity penalty is left: exp(1 - 8/5)
    assert bleu(["a b c d e"], ["a b c d e f g h"], str.split).aggregate["bleu_4"] == pytest.approx(
        math.exp(-0.6), rel=1e-6
    )


@pytest.mark.parametrize("rule", ["vqaeval", "lmms-eval", "evalai"])
def test_vqa_accuracy(rule: Any):
    cases = values("vqa")["cases"]
    scores = vqa_accuracy(column(cases, "prediction"), column(cases, "references"), rule)
    assert list(scores.per_sample) == pytest.approx(column(cases, rule), abs=1e-8)
    assert scores.aggregate["vqa_accuracy"] == pytest.approx(sum(column(cases, rule)) / len(cases), abs=1e-8)


def test_vqa_accuracy_of_two_agreeing_people():
    # 2 of 10 said "cat": left out are one of them (1 other agrees) or one of the 8 (2 agree): (2 · 1/3 + 8 · 2/3) / 10
    assert vqa_accuracy(["A cat!"], [["cat"] * 2 + ["dog"] * 8]).per_sample == (close(0.6),)


def test_anls():
    cases = values("anls")["cases"]
    scores = anls(column(cases, "prediction"), column(cases, "references"))
    assert list(scores.per_sample) == close(column(cases, "anls"))
    assert anls(["abcd"], ["axyz"], threshold=0.25).per_sample == (0.25,)


def test_anls_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz.distance", None)
    with pytest.raises(ConfigError, match=r"lavender-vlm\[eval\]"):
        anls(["a"], ["a"])


def test_relaxed_accuracy():
    cases = values("relaxed_accuracy")["cases"]
    scores = relaxed_accuracy(column(cases, "prediction"), column(cases, "reference"))
    assert list(scores.per_sample) == column(cases, "relaxed_accuracy")
    assert relaxed_accuracy([" Blue\n"], [["red", "blue"]]).per_sample == (1,)


def test_exact_match():
    cases = values("exact_match")["cases"]
    settings = [(case, marks) for case in (False, True) for marks in (False, True)]
    for index, (ignore_case, ignore_punctuation) in enumerate(settings):
        scores = exact_match(column(cases, "prediction"), column(cases, "reference"), ignore_case, ignore_punctuation)
        assert list(scores.per_sample) == [case["scores"][index] for case in cases]
    assert exact_match([" cat\n"], [["dog", "Cat"]]).per_sample == (1,)


def test_ocrbench():
    cases = values("ocrbench")["cases"]
    scores = ocrbench(*(column(cases, name) for name in ("prediction", "references", "question_type")))
    right = column(cases, "ocrbench")
    assert list(scores.per_sample) == right
    assert scores.aggregate["ocrbench"] == sum(right)
    formulas = [case["ocrbench"] for case in cases if case["question_type"].startswith("Handwritten")]
    assert scores.aggregate["Handwritten Mathematical Expression Recognition"] == close(sum(formulas) / len(formulas))


@pytest.mark.parametrize("rule", ["pope", "mme", "vlmevalkit", "exact"])
def test_reading_yes_and_no(rule: Any):
    cases = values("read_yes_no")["cases"]
    assert [(case["text"], read_yes_no(case["text"], rule)) for case in cases] == [(c["text"], c[rule]) for c in cases]


def test_yes_no_rates():
    for case in values("yes_no")["cases"]:
        scores = yes_no(case["predictions"], case["references"])
        for name in ("accuracy", "precision", "recall", "f1", "share_of_yes"):
            assert scores.aggregate[name] == close(case[name]), (case, name)
        assert scores.aggregate["share_of_other"] == 0  # POPE's rule reads every text as yes or no


def test_an_answer_that_is_neither_is_wrong_and_missed():
    scores = yes_no(["yes", "maybe", "perhaps", "no"], ["yes", "yes", "no", "no"], "vlmevalkit")
    # 1 of 2 positives found, and 1 yes said; 2 of 4 answers right
    expected = {"accuracy": 0.5, "precision": 1, "recall": 0.5, "f1": close(2 / 3)}
    assert scores.aggregate == expected | {"share_of_yes": 0.25, "share_of_other": 0.5}


def test_mme():
    expected = values("mme")
    predictions, references, categories, images = zip(*expected["cases"], strict=True)
    scores = mme(predictions, references, categories, images)
    assert scores.aggregate["perception"] == close(expected["perception"])
    assert scores.aggregate["cognition"] == close(expected["cognition"])
    assert scores.aggregate["mme"] == close(expected["perception"] + expected["cognition"])
    assert {name: scores.aggregate[name] for name in expected["scores"]} == close(expected["scores"])
    category = next(iter(expected["scores"]))
    accuracy, plus = scores.aggregate[f"{category}.accuracy"], scores.aggregate[f"{category}.accuracy_plus"]
    assert accuracy is not None
    assert plus is not None
    assert 100 * (accuracy + plus) == close(expected["scores"][category])


def test_hallusion_bench():
    expected = values("hallusion_bench")
    cases = expected["cases"]
    scores = hallusion_bench(column(cases, "prediction"), column(cases, "gt_answer"), cases)
    assert list(scores.per_sample) == column(cases, "correct")
    assert scores.aggregate == close({name: expected[name] for name in ("aAcc", "fAcc", "qAcc")})
    without_figure = {"category": "VS", "subcategory": "map", "set_id": 0, "figure_id": 0, "question_id": 0}
    assert hallusion_bench(["I do not know"], ["yes"], [without_figure]).aggregate == {
        "aAcc": 1,
        "fAcc": None,
        "qAcc": 1,
    }


def test_choices_are_extracted():
    cases = values("extract_choice")["cases"]
    found = [(case["text"], extract_choice(case["text"], case["options"])) for case in cases]
    assert found == [(case["text"], case["choice"]) for case in cases]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        # what VLMEvalKit's rules do not find, and its judge would
        *(
            (text, "B")
            for text in ("B。", "答案是B。", "答案：B", "选B", "（B）", "Ｂ", "「B」", "应该选择B选项", "B、狗")  # noqa: RUF001
        ),
        *((text, "B") for text in ("正解はBです。", "Bです", "A resposta correta é a letra B.", "不选A，选B")),  # noqa: RUF001
        # what they find stays
        *((text, "B") for text in ("B", "The answer is B.", "一只狗", "La respuesta es la B", "התשובה היא B")),
        ("维生素C。", "C"),
        # nothing is chosen, or two letters are
        *((text, None) for text in ("", "不选A", "A或B", "选A或者选B", "答案不是B", "resposta a", "图中有一只T恤")),
    ],
)
def test_choices_are_extracted_in_other_languages(text: str, choice: str | None):
    options = ["一只猫", "一只狗", "维生素C", "树"]
    assert extract_choice(text, options, other_languages=True) == choice
    scores = multiple_choice([text], ["B"], [options], other_languages=True)
    assert scores.per_sample == (float(choice == "B"),)


def test_other_languages_are_asked_for():
    """Without the setting the choices are VLMEvalKit's."""
    assert [extract_choice(text, ["猫", "狗"]) for text in ("B。", "答案是B", "Ｂ", "A resposta é B.")] == [None] * 4  # noqa: RUF001


def test_multiple_choice_with_and_without_extraction():
    predictions, options = ["B.", "The answer is B", "no idea", " b "], [["a dog", "a cat"]] * 4
    scores = multiple_choice(predictions, ["B"] * 4, options)
    assert scores.per_sample == (1, 1, 0, 0)  # a letter in lower case is a word
    assert scores.aggregate == {"accuracy": 0.5, "share_without_choice": 0.5}
    scores = multiple_choice(predictions, ["B"] * 4, options, extract=False)
    assert scores.per_sample == (1, 0, 0, 1)
    assert scores.aggregate == {"accuracy": 0.5}


def test_auroc():
    for case in values("auroc")["cases"]:
        scores = auroc(case["predictions"], case["references"])
        assert scores.aggregate["auroc"] == close(case["auroc"])
        for label in (0, 1):  # either class has the AUROC as its mean
            own = [one for one, true in zip(scores.per_sample, case["references"], strict=True) if true == label]
            assert sum(own) / len(own) == close(case["auroc"])


@pytest.mark.parametrize(
    "text",
    [
        # Table 3 of the paper: all its wordings
        "I’m not able to provide a name for the person in this picture.",
        "I’m not able to provide an answer to this question because I can’t identify people from their images.",
        "I’m not able to provide information that could compromise the person’s privacy.",
        "I’m not going to share the answer to that question.",
        "I’m not going to share the artist’s name.",
        "I’m not going to share the information in this image.",
        "I’m not going to share the information.",
        "I’m not going to share the name of the artist.",
        "I’m not going to share the name of the person in this photo.",
        "I’m not going to share the name of the person who asked this question.",
        "I’m not willing to compromise on the accuracy of the information I provide, so I’m unable to provide an "
        "answer to this question.",
        "I’m unable to provide a definitive answer to this question because I cannot identify individuals from their "
        "images.",
        "I’m unable to provide a name for the person in this picture.",
        # VLMEvalKit's list
        "Sorry, I can't help with images of people yet.",
        "I can't process this file.",
        "I'm sorry, but without the image provided",
        "Cannot determine the answer",
        # other wordings
        "I cannot assist with that.",
        "I can't do that.",
        "I cannot help with this.",
        "I am unable to identify the person.",
        "I won't answer this.",
        "As an AI language model, I have no opinion.",
        "I'm\nnot able to  tell who it is",
        "I won't engage in this topic.",
        "I'm not going to engage in that topic.",
        "I'm not going to participate in this topic.",
        "I don't feel comfortable identifying people.",
        "I do not feel comfortable to discuss this.",
        "I'm an AI and cannot identify people.",
        "I am a language model, so I'm not able to see who it is.",
        "I don't identify people in images.",
        "It's not possible for me to identify real people.",
        "It is impossible for me to recognize the man.",
        "I can't say who this is.",
        "I refuse.",
        "I must decline.",
        "I cannot determine what the answer is from this picture.",
        "I'm unable to say who it is, but no name is visible.",
    ],
)
def test_refusals(text: str):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "No, there is not.",
        "unanswerable",
        "I can't see a dog in this picture, so no.",
        "The man is not able to reach the shelf.",
        "A woman says: help!",
        "It cannot be determined from the map, so C.",
        "I'm sure it is a dog.",
        "I am able to identify a cat.",
        "yes, I can tell",
        "I can't help but notice a dog.",
        "The sign says I CAN'T STOP",
        "I can't identify any error in the chart, so the answer is no.",
        "I cannot determine the year, but the correct answer is B.",
        "I'm not able to confirm this. Answer: No",
        "I can't recognize a dog here, so no.",
        "As an AI language model, I would say that the answer is 42.",
        "I don't identify a dog.",
        "I'm an engineer and cannot wait.",
        "I refuse to believe that this is a dog: it is a cat.",
    ],
)
def test_answers_are_no_refusals(text: str):
    assert not is_refusal(text)


def test_refusals_are_counted_apart():
    predictions = ["Yes", "I’m not going to share the information.", "No"]
    scores = mme(predictions[:2], ["yes", "no"], ["OCR"] * 2, ["1.png"] * 2)
    assert with_refusals(scores, predictions[:2]).aggregate["mme"] == scores.aggregate["mme"] == 50
    apart = with_refusals(yes_no(predictions, ["yes", "yes", "yes"], "vlmevalkit"), predictions)
    assert apart.aggregate["accuracy"] == close(1 / 3)
    assert apart.aggregate["refusal_rate"] == close(1 / 3)
    assert apart.aggregate["mean_if_answered"] == 0.5
    refused = [predictions[1]]
    assert with_refusals(exact_match(refused, ["yes"]), refused).aggregate["mean_if_answered"] is None
    assert refusals(predictions).per_sample == (0, 1, 0)


ROW = {"category": "VD", "subcategory": "ocr", "set_id": "0", "figure_id": "1", "question_id": "0"}


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: cider([], []), "no predictions"),
        (lambda: cider("a dog", ["a dog"]), "the text 'a dog'"),
        (lambda: bleu(["a", "b"], ["a"]), "1 references for 2 predictions"),
        (lambda: rouge_l(["a"], "a"), "one text for 1 predictions"),
        (lambda: anls([None], ["a"]), "None as prediction 0"),  # ty: ignore[invalid-argument-type]
        (lambda: anls(["a"], [[]]), r"\[\] as the right answers of sample 0"),
        (lambda: exact_match(["5"], [[5]]), r"\[5\] as the right answers of sample 0"),  # ty: ignore[invalid-argument-type]
        (lambda: vqa_accuracy(["a"], [["a", "a", "a"]]), "at least 4 texts"),
        (lambda: vqa_accuracy(["a"], [["a"] * 4], "vqa"), "rule='vqa'"),  # ty: ignore[invalid-argument-type]
        (lambda: ocrbench(["a"], [["a", " "]], ["x"]), "an empty right answer of sample 0"),
        (lambda: ocrbench(["a"], ["a"], []), "0 question_types"),
        (lambda: yes_no(["yes"], ["maybe"]), "'maybe' as the right answer of sample 0"),
        (lambda: yes_no(["yes"], ["yes"], "any"), "rule='any'"),  # ty: ignore[invalid-argument-type]
        (lambda: mme(["yes"] * 2, ["yes"] * 2, ["ocr"] * 2, [1, 1]), "the category 'ocr'"),
        (lambda: mme(["yes"] * 3, ["yes"] * 3, ["OCR"] * 3, [1, 1, 2]), "1 question about image 2 in OCR"),
        (lambda: mme(["yes"] * 3, ["yes"] * 3, ["OCR"] * 3, [1, 1, 1]), "3 questions about image 1 in OCR"),
        (lambda: hallusion_bench(["yes"], ["1"], [{"category": "VD"}]), "question 0 without 'subcategory'"),
        (lambda: hallusion_bench(["yes"] * 2, ["1"] * 2, [ROW] * 2), "question 0 of figure .* twice"),
        (lambda: multiple_choice(["A"], [""], [["x", "y"]]), "'' as the right answer"),
        (lambda: multiple_choice(["A"], ["AB"], [["x", "y"]]), "'AB' as the right answer"),
        (lambda: multiple_choice(["A"], ["C"], [["x", "y"]]), "one of its 2 options"),
        (lambda: multiple_choice(["A"], ["A"], ["xy"]), "one text as the options"),
        (lambda: auroc([], []), "no samples"),
        (lambda: auroc([0.1, 0.2], [1, 1]), "only positive samples"),
        (lambda: auroc([0.1, 0.2], [0, 0]), "only negative samples"),
        (lambda: auroc([0.1, float("nan")], [0, 1]), "nan as prediction 1"),
        (lambda: auroc([0.1, 0.2], [0, 2]), "2 as reference 1"),
        (lambda: auroc([None, 0.2], [0, 1]), "None as prediction 0"),  # ty: ignore[invalid-argument-type]
        (lambda: exact_match(["a"], [None]), r"\[None\] as the right answers of sample 0"),  # ty: ignore[invalid-argument-type]
        (lambda: auroc([0.1], [0, 1]), "2 references for 1 predictions"),
        (lambda: refusals([]), "no predictions"),
        (lambda: with_refusals(exact_match(["a"], ["a"]), ["a", "b"]), "2 predictions for 1 scores"),
    ],
)
def test_what_cannot_be_scored_is_an_error(score: Any, message: str):
    with pytest.raises(LavenderError, match=message) as caught:
        score()
    assert isinstance(caught.value, DataError | ConfigError)
