"""`lavender study … --quick` with still fewer steps and scenes: for tests of how a study runs, not of what it shows."""

import sys
from dataclasses import replace
from unittest import mock

from lavender.cli import main
from lavender.world.scenes import Split
from lavender.world.studies import registry
from lavender.world.studies.cells import Arm
from lavender.world.studies.registry import Scale

NUM_SCENES, STEPS, SCORED = 32, 8, 20


def smaller(arm: Arm, steps: int | None) -> Arm:
    return replace(arm, num_scenes=NUM_SCENES, steps=STEPS)


def small_scale(quick: bool, split: Split | None, seeds: tuple[int, ...] | None) -> Scale:
    scale = scale_of(quick, split, seeds)
    return replace(scale, scoring=replace(scale.scoring, count=SCORED))


scale_of = Scale.of

if __name__ == "__main__":
    # the processes of a study get their arm and its scoring from this one
    with mock.patch.object(registry, "_smaller", smaller), mock.patch.object(Scale, "of", small_scale):
        sys.exit(main(sys.argv[1:]))
