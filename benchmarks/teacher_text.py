"""How far the map of a name depends on the text around it, and on coloured edges that the teacher never saw.

    python benchmarks/teacher_text.py --json teacher_text.json
    python benchmarks/teacher_text.py --quick --json teacher_text.json    # smoke test: four scenes

The built-in teacher maps the name of the first of two to four things in development scenes, in several texts. Measured:
pointing accuracy, and the share of the map, and of its square, that lies on the thing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from lavender.evaluation.map_scores import JudgedMap, score_maps
from lavender.world.attributes import draw_edged
from lavender.world.judging import job_of
from lavender.world.scenes import SPLITS, Scene, draw_scene
from lavender.world.tuning import load_teacher


def all_names(scene: Scene) -> str:
    """The names of all things, as in a caption; the first thing's comes first."""
    return " and ".join(f"a {name}" for name in scene.names)


TEXTS: dict[str, Callable[[Scene], str]] = {
    "name": lambda scene: f"a {scene.names[0]}",
    "question": lambda scene: f"the {scene.names[0]} is on",
    "all names": all_names,
    "question after all names": lambda scene: f"{all_names(scene)}. the {scene.names[0]} is on",
}
"""Label → the text of a scene. The last mention of the first thing's name is mapped."""
DRAWN: dict[str, Callable[[int], Scene]] = {"plain": draw_scene, "coloured edges": draw_edged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: four scenes")
    parser.add_argument("--scenes", type=int, default=200, help="development scenes (200)")
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers")
    options = parser.parse_args()
    count = 4 if options.quick else options.scenes
    results = {}
    for kind, draw in DRAWN.items():
        several = (scene for scene in map(draw, SPLITS["development"]) if len(scene.things) > 1)
        drawn = list(islice(several, count))
        results[kind] = {label: scores(drawn, [text(scene) for scene in drawn]) for label, text in TEXTS.items()}
    if options.json:
        options.json.write_text(json.dumps({"scenes": count, "kinds": results}, indent=1) + "\n")
    for kind, by_text in results.items():
        for label, found in by_text.items():
            print(f"{kind}, {label}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))


def scores(drawn: Sequence[Scene], texts: Sequence[str]) -> dict[str, float]:
    """Pointing accuracy, and the shares of the map and of its square on the thing: means over the scenes."""
    teacher = load_teacher()
    size, judged = teacher.config.batch_size, []
    for start in range(0, len(drawn), size):
        group = list(zip(drawn, texts, strict=True))[start : start + size]
        mapped = teacher([job_of(scene, text, teacher.config) for scene, text in group])
        for (scene, text), maps in zip(group, mapped, strict=True):
            first = text.rindex(scene.names[0])
            heat = maps.map_of(first, first + len(scene.names[0]))
            assert heat is not None, text
            judged.append(JudgedMap(heat, scene.mask_of(scene.names[0]), 0, None))
    squared = [JudgedMap(one.map**2, one.mask, 0, None) for one in judged]
    plain = score_maps(judged, 0.5)
    return {"pointing": plain.pointing, "mass": plain.mass, "mass_squared": score_maps(squared, 0.5).mass}


if __name__ == "__main__":
    main()
