"""Scores of a VLM's answers by the metrics of its benchmarks, each with the values of the benchmark's own scorer.

Every scorer takes one prediction per sample and the right answers in the same order. It returns `Scores`: a number per
sample, and the numbers that the benchmark reports. Cut off prompts and reasoning before: the whole text is scored.

    CIDEr, BLEU-4, ROUGE-L (COCO, Flickr30k)        cider, bleu, rouge_l
    VQA accuracy (VQAv2, OK-VQA, TextVQA, VizWiz)   vqa_accuracy
    Exact match (OCR-VQA)                           exact_match
    Multiple choice (MMBench, MMMU, AI2D, …)        multiple_choice
    Yes and no (POPE)                               yes_no
    Pairs and groups (MME, HallusionBench)          mme, hallusion_bench
    ANLS (DocVQA, InfoVQA)                          anls
    Relaxed accuracy (ChartQA)                      relaxed_accuracy
    Contains (OCRBench)                             ocrbench
    AUROC (Hateful Memes)                           auroc
    Refusals                                        refusals, with_refusals
"""

from lavender.evaluation.scorers.captions import bleu, cider, rouge_l
from lavender.evaluation.scorers.choices import extract_choice, multiple_choice
from lavender.evaluation.scorers.ranking import auroc
from lavender.evaluation.scorers.refusals import is_refusal, refusals, with_refusals
from lavender.evaluation.scorers.scores import Scores
from lavender.evaluation.scorers.short_answers import anls, exact_match, ocrbench, relaxed_accuracy
from lavender.evaluation.scorers.vqa import vqa_accuracy
from lavender.evaluation.scorers.yes_no import hallusion_bench, mme, read_yes_no, yes_no

__all__ = [
    "Scores",
    "anls",
    "auroc",
    "bleu",
    "cider",
    "exact_match",
    "extract_choice",
    "hallusion_bench",
    "is_refusal",
    "mme",
    "multiple_choice",
    "ocrbench",
    "read_yes_no",
    "refusals",
    "relaxed_accuracy",
    "rouge_l",
    "vqa_accuracy",
    "with_refusals",
    "yes_no",
]
