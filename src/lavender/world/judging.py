"""Scores against the world's true masks: of the teacher's maps, and of a student's captions and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.config import ExtractionConfig
from lavender.data.images import image_id
from lavender.evaluation.answers import exact_set, generate_answers, micro_f1, names_said
from lavender.evaluation.compare import Observed, answer_nll
from lavender.evaluation.map_scores import (
    ENTROPY_GRID,
    JudgedMap,
    MapScores,
    best_threshold,
    kl_from_mask,
    resize_map,
    score_maps,
)
from lavender.maps import WordMaps, entropy
from lavender.students.loading import load_run
from lavender.students.word_maps import AnsweredPicture, student_maps
from lavender.teachers.diffusion.teacher import Job, Teacher
from lavender.words import content_words
from lavender.world.language import Caption, Mention, caption_scene
from lavender.world.scenes import Scene, Split, Style, scenes
from lavender.world.sprites import NAMES, NEW_NAMES
from lavender.world.student_models import CAPTION_PROMPT

DOMAINS: dict[str, Style] = {"in_domain": "plain", "out_of_domain": "openmoji", "other_backgrounds": "photograph"}
"""Domain of held-out scenes → their style. Training scenes are plain."""
CALIBRATION_START = 500_000
"""The IoU threshold is chosen on development scenes from this one on, which are used for nothing else."""
BATCH_SIZE = 50


def judge(scene: Scene, caption: Caption, maps: WordMaps) -> list[JudgedMap]:
    """Pair each name of a caption with its map and its true mask, for `lavender.evaluation.map_scores.score_maps`.

    Args:
        scene: the scene, with true masks of (height, width) pixels.
        caption: its caption, from `caption_scene(scene)`.
        maps: word maps of that caption's text, (word, rows, cols).

    Returns:
        One judged map per mention, in the order of mention. The map of a name of several words is their mean. Mentions
        without a map are left out. `wrong`, the control, is the map of the next mention; None in a scene of one.
    """
    mapped = [(mention, maps.map_of(mention.start, mention.end)) for mention in caption.mentions]
    mapped = [(mention, heat) for mention, heat in mapped if heat is not None]
    judged = []
    for index, (mention, heat) in enumerate(mapped):
        wrong = mapped[(index + 1) % len(mapped)][1] if len(mapped) > 1 else None
        judged.append(JudgedMap(heat, scene.mask_of(mention.name), mention.order, wrong))
    return judged


def job_of(scene: Scene, text: str, config: ExtractionConfig) -> Job:
    """A `Teacher`'s input: the scene's picture, the text, and the text's words of the config's parts of speech."""
    return Job(scene.image, image_id(scene.image), text, content_words(text, config.parts_of_speech))


def judge_teacher(teacher: Teacher, drawn: Sequence[Scene]) -> list[JudgedMap]:
    """The teacher's maps of the scenes' captions, judged: one per mention that has a map. See `judge`."""
    judged: list[JudgedMap] = []
    size = teacher.config.batch_size
    for start in range(0, len(drawn), size):
        group = drawn[start : start + size]
        captions = [caption_scene(scene) for scene in group]
        jobs = [job_of(scene, caption.text, teacher.config) for scene, caption in zip(group, captions, strict=True)]
        for scene, caption, maps in zip(group, captions, teacher(jobs), strict=True):
            judged += judge(scene, caption, maps)
    return judged


def score_teacher(teacher: Teacher, held_out: Sequence[Scene]) -> MapScores:
    """Score the teacher's maps on held-out scenes.

    The threshold of `iou_fixed` is chosen on as many development scenes (`CALIBRATION_START`).
    """
    calibration = judge_teacher(teacher, list(scenes("development", len(held_out), start=CALIBRATION_START)))
    return score_maps(judge_teacher(teacher, held_out), best_threshold(calibration)[0])


def held_out_scenes(split: Split, count: int, start: int = 0, domains: Sequence[str] = ()) -> dict[str, list[Scene]]:
    """Held-out scenes for `score_student`: domain → `count` scenes of the split from its `start`-th seed on.

    Args:
        domains: some of `DOMAINS`; default: in domain and out of domain.
    """
    domains = domains or ("in_domain", "out_of_domain")
    return {domain: list(scenes(split, count, DOMAINS[domain], start)) for domain in domains}


def score_student(path: Path, held_out: Mapping[str, list[Scene]]) -> tuple[dict[str, Any], Observed]:
    """Score a student's captions and its attention.

    Args:
        path: a checkpoint or a run folder.
        held_out: domain → scenes, from `held_out_scenes`; "in_domain" is required.

    Returns:
        Scores by name, and what they are of: in-domain captions and attention maps, one per scene.

        - Each domain's name: object F1 of the greedy captions. `…_exact_set`: the share of captions that name exactly
          the scene's things.
        - `held_out_loss`: negative log-likelihood of the true in-domain captions, in nats per token.
        - The scores of `score_attention`, of in-domain attention pooled before the Aligner.
    """
    model, processor = load_run(path)
    scores: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    for domain, drawn in held_out.items():
        images, prompts = [scene.image for scene in drawn], [CAPTION_PROMPT] * len(drawn)
        answers[domain] = generate_answers(model, processor, images, prompts, batch_size=BATCH_SIZE)
        said = [names_said(text, NAMES) for text in answers[domain]]
        present = [set(scene.names) for scene in drawn]
        scores[domain] = micro_f1(said, present)
        scores[f"{domain}_exact_set"] = exact_set(said, present)
    drawn = held_out["in_domain"]
    captioned = [captioned_picture(scene) for scene in drawn]
    scores["held_out_loss"] = answer_nll(model, processor, captioned, batch_size=BATCH_SIZE)
    maps = student_maps(model, processor, captioned, batch_size=BATCH_SIZE)
    judged = [
        judged_map
        for scene, scene_maps in zip(drawn, maps, strict=True)
        for judged_map in judge(scene, caption_scene(scene), scene_maps)
    ]
    return scores | score_attention(judged), Observed(answers["in_domain"], maps)


def score_new_words(path: Path, drawn: Sequence[Scene]) -> tuple[dict[str, Any], Observed]:
    """Score what a student says of new and known names, and its attention.

    Args:
        path: a checkpoint or a run folder.
        drawn: held-out scenes. Some have one thing, some a new name, and some known names alone.

    Returns:
        Scores by name, and what they are of: captions and attention maps, one per scene.

        - `new_names`, `known_names`, `all_names`: F1 of these names in the greedy captions.
        - `single_things`: F1 of all names in the scenes of one thing.
        - `known_loss`: negative log-likelihood of the true captions with known names alone, in nats per token.
        - `new_pointing`, `new_attention_mass`: pointing accuracy and share of attention on the thing, of new names.
        - The scores of `score_attention`, of all names.
    """
    model, processor = load_run(path)
    images, prompts = [scene.image for scene in drawn], [CAPTION_PROMPT] * len(drawn)
    texts = generate_answers(model, processor, images, prompts, batch_size=BATCH_SIZE)
    said, present = [names_said(text, NAMES) for text in texts], [set(scene.names) for scene in drawn]
    new, known = set(NEW_NAMES), set(NAMES) - set(NEW_NAMES)
    single = [index for index, scene in enumerate(drawn) if len(scene.things) == 1]
    captioned = [captioned_picture(scene) for scene in drawn]
    all_known = [picture for scene, picture in zip(drawn, captioned, strict=True) if set(scene.names) <= known]
    maps = student_maps(model, processor, captioned, batch_size=BATCH_SIZE)
    judged = [
        (mention.name, judged_map)
        for scene, scene_maps in zip(drawn, maps, strict=True)
        for mention, judged_map in _judged_mentions(scene, scene_maps)
    ]
    of_new = score_attention([judged_map for name, judged_map in judged if name in new])
    scores = score_attention([judged_map for _, judged_map in judged]) | {
        "new_names": _f1_of(said, present, new),
        "known_names": _f1_of(said, present, known),
        "all_names": micro_f1(said, present),
        "single_things": micro_f1([said[index] for index in single], [present[index] for index in single]),
        "known_loss": answer_nll(model, processor, all_known, batch_size=BATCH_SIZE),
        "new_pointing": of_new["pointing"],
        "new_attention_mass": of_new["attention_mass"],
    }
    return scores, Observed(texts, maps)


def _judged_mentions(scene: Scene, maps: WordMaps) -> list[tuple[Mention, JudgedMap]]:
    """The mentions of a caption that have a map, judged."""
    caption = caption_scene(scene)
    mentions = {mention.order: mention for mention in caption.mentions}
    return [(mentions[judged_map.order], judged_map) for judged_map in judge(scene, caption, maps)]


def _f1_of(said: Sequence[set[str]], present: Sequence[set[str]], names: set[str]) -> float:
    """Object F1 of some of the names."""
    return micro_f1([texts & names for texts in said], [things & names for things in present])


def score_attention(judged: Sequence[JudgedMap]) -> dict[str, Any]:
    """Score maps against the true masks.

    Returns:
        `pointing` and its controls (shares of maps, see `MapScores`); `attention_mass`, the share of attention on the
        thing, mean; `entropy` in nats, mean; `mask_kl`, the mean KL
        divergence from the true mask to the map, in nats; `entropies`, the entropy of every map.
    """
    scores = score_maps(judged, best_threshold(judged)[0])
    return {
        "pointing": scores.pointing,
        "attention_mass": scores.mass,
        "entropy": scores.entropy,
        "wrong_word_pointing": scores.wrong_word_pointing,
        "uniform_pointing": scores.uniform_pointing,
        "centre_pointing": scores.centre_pointing,
        "mask_kl": fmean(kl_from_mask(judged_map.map, judged_map.mask) for judged_map in judged),
        "entropies": [round(entropy(resize_map(judged_map.map, ENTROPY_GRID)).item(), 4) for judged_map in judged],
    }


def captioned_picture(scene: Scene) -> AnsweredPicture:
    """The scene with the caption prompt, its caption, and the words to map, as `student_maps` takes it."""
    text = caption_scene(scene).text
    return AnsweredPicture(scene.image, CAPTION_PROMPT, text, content_words(text, ExtractionConfig.parts_of_speech))
