"""The paper's 28 benchmarks as tasks of lmms-eval: one table for the command line, docs/benchmarks.md and the tests.

Its numbers are those of the paper's Table 1 (arXiv:2502.06814). The paper scored with VLMEvalKit, whose prompts and
splits differ from lmms-eval's, so differences between base, plain and aligned compare better than values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

PAPER_MODELS = ("Llama-3.2-11B", "+ LoRA", "+ Lavender LoRA", "+ full", "+ Lavender full")
"""Rows of Table 1: the base, then autoregressive and Lavender fine-tuning with LoRA and in full."""

_SCORERS = "tests/unit/evaluation/test_scorers.py"
_TASKS = "tests/unit/evaluation/test_harness_tasks.py"
_NUMBERS = {
    "ai2d": (78.7, 77.8, 79.0, 76.7, 78.7),
    "ccbench": (30.6, 39.8, 39.2, 37.6, 38.6),
    "docvqa": (82.8, 86.0, 90.3, 89.8, 81.6),
    "infovqa": (59.0, 61.0, 65.1, 64.3, 65.0),
    "mmbench_en": (70.8, 73.6, 81.3, 77.5, 80.0),
    "mme": (1692.9, 1664.6, 1871.5, 1697.4, 1695.9),
    "mmmu": (48.0, 43.7, 46.3, 45.6, 49.1),
    "mmstar": (48.3, 45.1, 48.7, 46.8, 49.8),
    "ocrbench": (754.0, 733.0, 764.0, 748.0, 686.0),
    "ocrvqa": (67.7, 70.0, 71.5, 68.6, 70.1),
    "pope": (86.3, 86.9, 88.1, 87.3, 87.6),
    "realworldqa": (61.4, 60.7, 62.1, 59.4, 62.2),
    "seed": (72.9, 73.6, 74.1, 71.8, 73.1),
    "scienceqa": (83.6, 74.6, 84.7, 77.1, 84.3),
    "textvqa": (80.8, 81.1, 88.1, 81.5, 84.9),
    "hallusion": (36.3, 36.6, 41.3, 37.7, 39.5),
}


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's benchmarks, and how lmms-eval runs it.

    Attributes:
        name: as the paper writes it.
        task: its task, lmms-eval's own or one of `TASKS_PATH`; "" if only VLMEvalKit has it.
        split: what the task reads.
        metric: what is reported, in words.
        keys: the task's metrics whose sum is reported.
        scorer: whose scorer gives the number: "lmms-eval", or one of `lavender.evaluation.scorers` with its rule.
        test: the test that holds the scorer, ours or our equal of lmms-eval's, to its reference.
        scale: what the harness's number is multiplied by, to be on the paper's scale.
        vlmevalkit: its name there, "" if it has none.
        kind: the class of the data set in VLMEvalKit.
        paper: Table 1's numbers, one per model of `PAPER_MODELS`; None if the paper only draws them.
        note: what differs from the paper, or is not known of it.
        scored_alone: lmms-eval gives no score per sample. A sample's score is the aggregation of it alone; their mean
            is the reported number.
        english: whether answers are in English. Refusals are known in no other language.
    """

    name: str
    task: str
    split: str
    metric: str
    keys: tuple[str, ...]
    scorer: str
    test: str = _SCORERS
    scale: float = 100.0
    vlmevalkit: str = ""
    kind: str = "ImageVQADataset"
    paper: tuple[float, ...] | None = None
    note: str = ""
    scored_alone: bool = False
    english: bool = True


def _mmbench(name: str, task: str, vlmevalkit: str, note: str = "", key: str = "", english: bool = True) -> Benchmark:
    """One of MMBench's subsets, whose answers VLMEvalKit reads by rules before it asks a judge."""
    return Benchmark(
        name,
        task,
        "dev" if task.endswith("dev") else "test" if task else "",
        "accuracy",
        ("accuracy",) if task else (),
        ("multiple_choice" if english else "multiple_choice(other_languages=True)") if task else "",
        _TASKS if task else "",
        vlmevalkit=vlmevalkit,
        kind="ImageMCQDataset",
        paper=_NUMBERS.get(key),
        note=note,
        english=english,
    )


def _vqa(name: str, task: str, split: str, rule: str, note: str = "") -> Benchmark:
    return Benchmark(
        name,
        task,
        split,
        "VQA accuracy",
        ("exact_match",),
        f'lmms-eval; vqa_accuracy(rule="{rule}") is equal',
        note=note,
    )


_V11 = "version 1.1 has other questions; which four subsets of MMBench the paper took, it does not say"
_JUDGE = (
    "VLMEvalKit may ask a judge model where its rules find no answer; here such an answer is wrong, and "
    "`share_without_choice` is the share of such answers"
)
_CHINESE = (
    f"{_JUDGE}. Beyond these rules, letters as in “答案是B。”, “选B” and “（B）” are found. Refusals are not counted"  # noqa: RUF001
)
_PAPER = (
    Benchmark(
        "AI2D",
        "ai2d",
        "test",
        "exact match of the letter",
        ("exact_match",),
        'lmms-eval; multiple_choice(extract=False) after its filter of "A." is equal',
        vlmevalkit="AI2D_TEST",
        kind="ImageMCQDataset",
        paper=_NUMBERS["ai2d"],
    ),
    Benchmark(
        "ChartQA",
        "chartqa",
        "test",
        "relaxed accuracy",
        ("relaxed_overall",),
        "lmms-eval; relaxed_accuracy is equal",
        vlmevalkit="ChartQA_TEST",
        note="not in Table 1",
    ),
    Benchmark(
        "OCRBench",
        "ocrbench",
        "test",
        "right answers of 1000",
        ("ocrbench_accuracy",),
        "lmms-eval; ocrbench differs for full-width letters only",
        scale=1000.0,
        vlmevalkit="OCRBench",
        kind="OCRBench",
        paper=_NUMBERS["ocrbench"],
    ),
    Benchmark(
        "OCR-VQA",
        "ocrvqa_test",
        "test",
        "exact match",
        ("exact_match",),
        "exact_match",
        _TASKS,
        vlmevalkit="OCRVQA_TESTCORE",
        paper=_NUMBERS["ocrvqa"],
        note="all questions of the test split; the paper's subset is VLMEvalKit's core set, we believe (OCRVQA_TQ)",
    ),
    Benchmark(
        "TextVQA",
        "textvqa_val",
        "validation",
        "VQA accuracy",
        ("exact_match",),
        'lmms-eval; vqa_accuracy(rule="evalai") is equal',
        vlmevalkit="TextVQA_VAL",
        paper=_NUMBERS["textvqa"],
    ),
    Benchmark(
        "DocVQA",
        "docvqa_val",
        "validation",
        "ANLS",
        ("anls",),
        "lmms-eval; anls is equal",
        vlmevalkit="DocVQA_VAL",
        paper=_NUMBERS["docvqa"],
    ),
    Benchmark(
        "InfoVQA",
        "infovqa_val",
        "validation",
        "ANLS",
        ("anls",),
        "lmms-eval; anls is equal",
        vlmevalkit="InfoVQA_VAL",
        paper=_NUMBERS["infovqa"],
    ),
    Benchmark(
        "MME",
        "mme",
        "test",
        "perception + cognition",
        ("mme_perception_score", "mme_cognition_score"),
        'lmms-eval; mme(rule="mme") has the values of MME\'s calculation.py',
        scale=1.0,
        vlmevalkit="MME",
        kind="ImageYORNDataset",
        paper=_NUMBERS["mme"],
        note="the paper does not say what its number adds up; for LLaVA-1.5 it is perception alone. lmms-eval also "
        'takes "y" and "n", and drops full stops and space before it reads the first four characters',
    ),
    _mmbench("MMBench EN", "mmbench_en_rules_dev", "MMBench_DEV_EN", _JUDGE, "mmbench_en"),
    _mmbench("MMBench CN", "mmbench_cn_rules_dev", "MMBench_DEV_CN", f"not in Table 1. {_CHINESE}", english=False),
    _mmbench("MMBench EN 1.1", "", "MMBench_DEV_EN_V11", _V11),
    _mmbench("MMBench CN 1.1", "", "MMBench_DEV_CN_V11", _V11),
    _mmbench(
        "CCBench",
        "ccbench_rules",
        "CCBench",
        f"§7.2 does not name it; Table 1 has it. {_CHINESE}",
        "ccbench",
        english=False,
    ),
    Benchmark(
        "ScienceQA",
        "scienceqa_img",
        "test",
        "exact match of the letter",
        ("exact_match",),
        'lmms-eval; exact_match after its rule for "A." is equal',
        _TASKS,
        vlmevalkit="ScienceQA_TEST",
        kind="ImageMCQDataset",
        paper=_NUMBERS["scienceqa"],
        note="questions with a picture",
    ),
    Benchmark(
        "MMStar",
        "mmstar",
        "val",
        "accuracy, mean over categories",
        ("average",),
        "lmms-eval",
        "",
        vlmevalkit="MMStar",
        kind="ImageMCQDataset",
        paper=_NUMBERS["mmstar"],
    ),
    Benchmark(
        "MMMU",
        "mmmu_val",
        "validation",
        "accuracy",
        ("mmmu_acc",),
        "lmms-eval",
        "",
        vlmevalkit="MMMU_DEV_VAL",
        kind="MMMUDataset",
        paper=_NUMBERS["mmmu"],
        scored_alone=True,
    ),
    Benchmark(
        "RealWorldQA",
        "realworldqa",
        "test",
        "exact match",
        ("exact_match",),
        "lmms-eval",
        "",
        vlmevalkit="RealWorldQA",
        kind="ImageMCQDataset",
        paper=_NUMBERS["realworldqa"],
    ),
    Benchmark(
        "SEED (images)",
        "seedbench_images",
        "test",
        "accuracy on images",
        ("seed_image",),
        "lmms-eval",
        "",
        vlmevalkit="SEEDBench_IMG",
        kind="ImageMCQDataset",
        paper=_NUMBERS["seed"],
        note="lmms-eval's own task, `seedbench`, asks about videos too, with several frames each",
        scored_alone=True,
    ),
    Benchmark(
        "HallusionBench",
        "hallusion_rules",
        "image",
        "mean of aAcc, fAcc and qAcc",
        ("average",),
        'hallusion_bench(rule="vlmevalkit")',
        _TASKS,
        vlmevalkit="HallusionBench",
        kind="ImageYORNDataset",
        paper=_NUMBERS["hallusion"],
        note="the split with pictures; lmms-eval's own scorer asks GPT-4. VLMEvalKit may ask a judge model where its "
        "rule finds neither yes nor no; here such an answer is wrong if there is a figure, and `share_of_other` is the "
        "share of such answers",
    ),
    Benchmark(
        "POPE",
        "pope_rules",
        "test",
        "F1",
        ("f1",),
        'yes_no(rule="vlmevalkit")',
        _TASKS,
        vlmevalkit="POPE",
        kind="ImageYORNDataset",
        paper=_NUMBERS["pope"],
        note="F1 over all three kinds of questions together. lmms-eval's own task, `pope`, takes the bare word only, "
        'and its F1 leaves out every other answer: "Yes.", and refusals',
    ),
)
_WORLDMEDQA = (
    Benchmark(
        "WorldMedQA-V",
        "worldmedqa_v_local",
        "the four countries' own languages",
        "accuracy",
        ("accuracy",),
        "multiple_choice(other_languages=True)",
        _TASKS,
        note="Fig. 16 draws it; the text says 68 % more than the base. worldmedqa_v_english has the translations. "
        "Letters as in “A resposta é B”, “正解はB” are found; `share_without_choice` is the share of answers in which "
        "none is. Refusals are not counted",
        english=False,
    ),
)
_OPENFLAMINGO = (
    Benchmark("COCO captions", "coco_karpathy_cider", "test (Karpathy)", "CIDEr", ("cider",), "cider", _TASKS),
    Benchmark(
        "Flickr30k captions",
        "flickr30k_cider",
        "test",
        "CIDEr",
        ("cider",),
        "cider",
        _TASKS,
        note="lmms-eval's split has all 31,783 pictures; OpenFlamingo scores 1,000 of them",
    ),
    _vqa("VQAv2", "vqav2_val", "validation", "lmms-eval"),
    _vqa("OK-VQA", "ok_vqa_val2014", "val2014", "evalai"),
    _vqa("TextVQA (OpenFlamingo)", "textvqa_val", "validation", "evalai"),
    _vqa("VizWiz", "vizwiz_vqa_val", "val", "evalai"),
    Benchmark(
        "Hateful Memes",
        "hateful_memes",
        "dev (seen)",
        "AUROC of P(yes)",
        ("auroc",),
        "auroc",
        _TASKS,
        note="by the likelihood of yes and no, as OpenFlamingo",
    ),
)

GROUPS: Mapping[str, tuple[Benchmark, ...]] = MappingProxyType(
    {"paper": _PAPER, "worldmedqa": _WORLDMEDQA, "openflamingo": _OPENFLAMINGO}
)
"""Names for `lavender eval --tasks`: the 20 of §7.2, WorldMedQA-V of §7.5, and the seven of Fig. 10."""


def benchmark_of(task: str) -> Benchmark | None:
    """The paper's benchmark that a task of lmms-eval runs, or None."""
    return next((one for group in GROUPS.values() for one in group if one.task == task), None)


def scores_in(metric_list: Iterable[Mapping[str, Any]] | None) -> list[str]:
    """The metrics of a task's `metric_list`, without `submission`, by which lmms-eval writes a file for a server."""
    return [name for metric in metric_list or () if (name := str(metric["metric"])) != "submission"]
