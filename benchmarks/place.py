"""How much an untuned student gains if it is told where a thing is (location oracle).

    python benchmarks/place.py --json place.json
    python benchmarks/place.py --quick --json place.json    # smoke test: two scenes of each kind

Measured: the probability that a base gives to the name of a scene's first thing, after its article, on development
scenes. The oracle keeps some of the picture's patches and replaces the others by their mean. Kept are all patches
(`all`), those that show the thing (`thing`), those that do not (`rest`), or none (`none`).

In scenes with several things, the oracle also tells which of them the caption names first. In scenes with one thing, it
tells the location alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.evaluation.leave_out import logits_keeping
from lavender.students.image_keys import overlap_matrix
from lavender.students.registry import adapter_for
from lavender.training.run import load_run
from lavender.world import STUDENT_PATHS
from lavender.world.language import article
from lavender.world.scenes import Scene, scenes
from lavender.world.student_models import CAPTION_PROMPT, STUDENTS, text_batch

CELLS = (64, 64)  # (rows, cols) on which masks and patches are compared
MIN_SHARE = 0.15  # a patch shows a thing that covers more than this share of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: two scenes of each kind")
    parser.add_argument("--scenes", type=int, default=300, help="development scenes (300)")
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers")
    options = parser.parse_args()
    drawn = list(scenes("development", options.scenes))
    groups = {"one thing": [scene for scene in drawn if len(scene.things) == 1]}
    groups["several things"] = [scene for scene in drawn if len(scene.things) > 1]
    if options.quick:
        groups = {group: members[:2] for group, members in groups.items()}
    results = {
        student: {group: name_probabilities(student, members) for group, members in groups.items()}
        for student in STUDENTS
    }
    if options.json:
        counts = {group: len(members) for group, members in groups.items()}
        options.json.write_text(json.dumps({"scenes": counts, "students": results}, indent=1))
    for student, by_group in results.items():
        for group, by_kept in by_group.items():
            print(f"{student}, {group}: " + ", ".join(f"{kept} {value:.3f}" for kept, value in by_kept.items()))


@torch.inference_mode()
def name_probabilities(student: str, drawn: Sequence[Scene]) -> dict[str, float]:
    """Which patches are kept → mean probability of the first thing's name."""
    model, processor = load_run(STUDENT_PATHS[student])
    family = STUDENTS[student]
    images = dict(processor.image_processor([[scene.image] for scene in drawn], return_tensors="pt"))
    images = {key: value for key, value in images.items() if isinstance(value, Tensor)}
    batch = text_batch(
        family,
        processor,
        [(CAPTION_PROMPT, f"{article(scene.things[0].name)} {scene.things[0].name}") for scene in drawn],
        images,
    )
    labels = batch.pop("labels")
    sizes = [[(scene.pixels.shape[0], scene.pixels.shape[1])] for scene in drawn]
    adapter = adapter_for(model.config)
    boxes = adapter.image_boxes(batch | images, sizes, processor).boxes
    shows_thing = torch.stack(
        [_shows_thing(scene, scene_boxes) for scene, scene_boxes in zip(drawn, boxes, strict=True)]
    )
    probabilities = {}
    for kept, mask in (
        ("all", torch.ones_like(shows_thing)),
        ("thing", shows_thing),
        ("rest", ~shows_thing),
        ("none", torch.zeros_like(shows_thing)),
    ):
        logits = logits_keeping(model, adapter, batch | images, mask).log_softmax(dim=-1)
        probabilities[kept] = _name_probability(processor, drawn, labels, logits)
    return probabilities


def _shows_thing(scene: Scene, boxes: Tensor) -> Tensor:
    """Which image keys show the scene's first thing, bool (key,)."""
    mask = torch.from_numpy(scene.things[0].mask).float()[None, None]
    return overlap_matrix(boxes, CELLS) @ F.adaptive_avg_pool2d(mask, CELLS).flatten() > MIN_SHARE


def _name_probability(processor, drawn: Sequence[Scene], labels: Tensor, logits: Tensor) -> float:
    """The mean probability of the names; `logits` are log-probabilities, (scene, token, vocabulary)."""
    total = 0.0
    for row, scene in enumerate(drawn):
        answer = (labels[row] != -100).nonzero().flatten()
        num_tokens = len(processor.tokenizer(f" {scene.things[0].name}", add_special_tokens=False)["input_ids"])
        name_tokens = answer[1 : 1 + num_tokens]  # the first token is the article
        total += logits[row, name_tokens - 1, labels[row, name_tokens]].sum().exp().item()
    return total / len(drawn)


if __name__ == "__main__":
    main()
