"""How well maps point at the things of a scene: the teacher's and a student's, judged alike."""

from __future__ import annotations

from collections.abc import Sequence

from lavender.config import ExtractionConfig
from lavender.diffusion.teacher import Job, Teacher
from lavender.evaluation.maps import JudgedMap
from lavender.images import image_id
from lavender.maps import WordMaps
from lavender.words import content_words
from lavender.world.language import Caption, caption_scene
from lavender.world.scenes import Scene


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
