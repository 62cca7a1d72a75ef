"""How well maps point at the things of a scene: the teacher's and a student's, judged alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.config import ExtractionConfig
from lavender.data.images import image_id
from lavender.evaluation.answers import exact_set, generate_answers, names_said, object_f1
from lavender.evaluation.compare import Observed, answer_nll
from lavender.evaluation.map_scores import ENTROPY_GRID, JudgedMap, best_threshold, kl_from_mask, resize_map, score_maps
from lavender.maps import WordMaps, entropy
from lavender.students.loading import load_run
from lavender.students.word_maps import AnsweredPicture, student_maps
from lavender.teachers.diffusion.teacher import Job, Teacher
from lavender.words import content_words
from lavender.world.language import Caption, caption_scene
from lavender.world.scenes import Scene
from lavender.world.sprites import NAMES
from lavender.world.student_models import CAPTION_PROMPT


def judge(scene: Scene, caption: Caption, maps: WordMaps) -> list[JudgedMap]:
    """One judged map for each mention whose words have one; `wrong` is the next mention's map."""
    found = [(mention, maps.map_of(mention.start, mention.end)) for mention in caption.mentions]
    found = [(mention, one) for mention, one in found if one is not None]
    judged = []
    for index, (mention, own) in enumerate(found):
        wrong = found[(index + 1) % len(found)][1] if len(found) > 1 else None
        judged.append(JudgedMap(own, scene.mask_of(mention.name), mention.order, wrong))
    return judged


def job_of(scene: Scene, text: str, config: ExtractionConfig) -> Job:
    """What the teacher needs to map a text about a scene."""
    return Job(scene.image, image_id(scene.image), text, content_words(text, config.parts_of_speech))


def judge_teacher(teacher: Teacher, scenes: Sequence[Scene]) -> list[JudgedMap]:
    """Judged maps of every thing in the scenes' captions."""
    judged: list[JudgedMap] = []
    size = teacher.config.batch_size
    for start in range(0, len(scenes), size):
        group = scenes[start : start + size]
        captions = [caption_scene(scene) for scene in group]
        jobs = [job_of(scene, caption.text, teacher.config) for scene, caption in zip(group, captions, strict=True)]
        for scene, caption, maps in zip(group, captions, teacher(jobs), strict=True):
            judged += judge(scene, caption, maps)
    return judged


def score_student(path: Path, held_out: Mapping[str, list[Scene]]) -> tuple[dict[str, Any], Observed]:
    """How well a student names things and where it looks.

    Captions: object F1 of each domain's greedy captions and, in domain, the share of exact sets.
    `held_out_loss`: nats a token of the true captions. Attention, pooled before any Aligner: pointing, with
    another word's map as control; entropy; KL from the things' true masks.
    """
    model, processor = load_run(path)
    scores: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    for domain, drawn in held_out.items():
        answers[domain] = generate_answers(
            model, processor, [scene.image for scene in drawn], [CAPTION_PROMPT] * len(drawn), batch_size=50
        )
        said = [names_said(text, NAMES) for text in answers[domain]]
        present = [set(scene.names) for scene in drawn]
        scores[domain] = object_f1(said, present)
        scores[f"{domain}_exact_set"] = exact_set(said, present)
    drawn = held_out["in_domain"]
    readings = [reading_of(scene) for scene in drawn]
    scores["held_out_loss"] = answer_nll(model, processor, readings, batch_size=50)
    maps = student_maps(model, processor, readings, batch_size=50)
    judged = [one for scene, own in zip(drawn, maps, strict=True) for one in judge(scene, caption_scene(scene), own)]
    return scores | score_attention(judged), Observed(answers["in_domain"], maps, {})


def score_attention(judged: Sequence[JudgedMap]) -> dict[str, Any]:
    """Where maps look: pointing and its controls, entropy (also of every map), KL from the true masks."""
    found = score_maps(judged, best_threshold(judged)[0])
    entropies = [round(entropy(resize_map(one.map, ENTROPY_GRID)).item(), 4) for one in judged]
    return {
        "pointing": found.pointing,
        "entropy": found.entropy,
        "wrong_word_pointing": found.wrong_word_pointing,
        "uniform_pointing": found.uniform_pointing,
        "centre_pointing": found.centre_pointing,
        "mask_kl": fmean(kl_from_mask(one.map, one.mask) for one in judged),
        "entropies": entropies,
    }


def reading_of(scene: Scene) -> AnsweredPicture:
    text = caption_scene(scene).text
    return AnsweredPicture(scene.image, CAPTION_PROMPT, text, content_words(text, ExtractionConfig.parts_of_speech))
