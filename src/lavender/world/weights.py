"""Train the weights that the package ships: `python -m lavender.world.weights`, or `make weights`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from lavender.world import WEIGHTS_PATH
from lavender.world.student_training import train_student
from lavender.world.teacher_training import train_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["teacher", "student"])
    parser.add_argument("--out", type=Path, default=WEIGHTS_PATH)
    parser.add_argument("--work", type=Path, default=Path("weights-work"), help="checkpoints; a stopped run goes on")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.part == "teacher":
        train_teacher(arguments.work, arguments.out / "teacher", steps=4000, vae_steps=800, num_scenes=16_000)
    else:
        train_student(arguments.work, arguments.out / "student_mllama", vision_steps=3000, steps=700, num_scenes=20_000)


if __name__ == "__main__":
    main()
