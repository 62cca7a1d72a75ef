"""Is knowing where worth anything to a student? An oracle of place, nothing tuned.

The probability that a base gives to the name of a scene's first thing, after "a ", while some of the picture's
patches are replaced by the mean patch: none (`all`), all that do not show the thing (`thing`), those that do
(`rest`), all of them (`none`). Development scenes. With several things the oracle also tells which of them the
caption names first, which no picture tells; with one thing it tells the place alone.

    python benchmarks/place.py --json PATH
    python benchmarks/place.py --quick --json PATH    # that it runs: two scenes of each kind
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.evaluation.check import logits_keeping
from lavender.students.image_keys import overlap_matrix
from lavender.students.registry import adapter_for
from lavender.training.run import load_run
from lavender.world import STUDENT_PATHS
from lavender.world.scenes import Scene, scenes
from lavender.world.student_models import CAPTION_PROMPT, STUDENTS, text_batch

CELLS = (64, 64)  # on which masks and patches are compared
SHOWS = 0.15  # a patch shows a thing that covers this share of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="that it runs: two scenes of each kind")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    drawn = list(scenes("development", options.scenes))
    groups = {"one thing": [scene for scene in drawn if len(scene.things) == 1]}
    groups["several things"] = [scene for scene in drawn if len(scene.things) > 1]
    if options.quick:
        groups = {name: own[:2] for name, own in groups.items()}
    results = {name: {group: probabilities(name, own) for group, own in groups.items()} for name in STUDENTS}
    if options.json:
        counts = {group: len(own) for group, own in groups.items()}
        options.json.write_text(json.dumps({"scenes": counts, "students": results}, indent=1))
    for name, found in results.items():
        for group, own in found.items():
            print(f"{name}, {group}: { ({kept: round(value, 3) for kept, value in own.items()}) }")


@torch.inference_mode()
def probabilities(name: str, drawn: Sequence[Scene]) -> dict[str, float]:
    """Mean probability of the first thing's name for each choice of patches."""
    model, processor = load_run(STUDENT_PATHS[name])
    family = STUDENTS[name]
    images = dict(processor.image_processor([[scene.image] for scene in drawn], return_tensors="pt"))
    images = {key: value for key, value in images.items() if isinstance(value, Tensor)}
    batch = text_batch(family, processor, [(CAPTION_PROMPT, f"a {scene.things[0].name}") for scene in drawn], images)
    labels = batch.pop("labels")
    sizes = [[(scene.pixels.shape[0], scene.pixels.shape[1])] for scene in drawn]
    adapter = adapter_for(model.config)
    boxes = adapter.image_boxes(batch | images, sizes, processor).boxes
    own = torch.stack([_shows(scene, box) for scene, box in zip(drawn, boxes, strict=True)])
    found = {}
    for kept, mask in (
        ("all", torch.ones_like(own)),
        ("thing", own),
        ("rest", ~own),
        ("none", torch.zeros_like(own)),
    ):
        logits = logits_keeping(model, adapter, batch | images, mask).log_softmax(dim=-1)
        found[kept] = _name_probability(processor, drawn, labels, logits)
    return found


def _shows(scene: Scene, boxes: Tensor) -> Tensor:
    """Which image keys show the scene's first thing: bool (key,)."""
    mask = torch.from_numpy(scene.things[0].mask).float()[None, None]
    return overlap_matrix(boxes, CELLS) @ F.adaptive_avg_pool2d(mask, CELLS).flatten() > SHOWS


def _name_probability(processor, drawn: Sequence[Scene], labels: Tensor, logits: Tensor) -> float:
    total = 0.0
    for row, scene in enumerate(drawn):
        answer = (labels[row] != -100).nonzero().flatten()
        num_tokens = len(processor.tokenizer(f" {scene.things[0].name}", add_special_tokens=False)["input_ids"])
        places = answer[1 : 1 + num_tokens]  # the first token is "a"
        total += logits[row, places - 1, labels[row, places]].sum().exp().item()
    return total / len(drawn)


if __name__ == "__main__":
    main()
