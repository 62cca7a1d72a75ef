"""Train the weights that the package ships: `python -m lavender.world.training.make all`, or `make weights`.

This takes hours on a CPU. It needs the drawings of `lavender.world.hands`. Seeds are fixed: one machine with one number
of threads trains the same weights again, to the bit. A stopped training continues from its last checkpoint in the work
folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file

from lavender.config import ExtractionConfig, Space
from lavender.errors import FileError
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world import WEIGHTS_PATH
from lavender.world.hands import HANDS
from lavender.world.judging import held_out_scenes, score_student, score_teacher
from lavender.world.scenes import Scene, scenes
from lavender.world.sprites import NEW_NAMES
from lavender.world.training.joint_teacher import train_joint_teacher
from lavender.world.training.students import train_student
from lavender.world.training.teacher import train_teacher
from lavender.world.tuning import GRID

TEACHER_SETTINGS: dict[str, Any] = {"steps": 7000, "vae_steps": 1200, "num_scenes": 24_000, "batch": 32, "seed": 0}
JOINT_TEACHER_SETTINGS = {name: value for name, value in TEACHER_SETTINGS.items() if name != "vae_steps"}
_MLLAMA: dict[str, Any] = {"family": "mllama", "vision_steps": 6000, "num_scenes": 30_000, "batch": 32, "seed": 0}
_LLAVA: dict[str, Any] = {"family": "llava", "steps": 600, "batch": 32, "seed": 0}
STUDENT_SETTINGS: dict[str, dict[str, Any]] = {
    "mllama_new_words": _MLLAMA | {"steps": 900, "new_names": NEW_NAMES},
    "mllama": _MLLAMA | {"steps": 900},
    "llava": _LLAVA | {"vision_steps": 3000, "num_scenes": 20_000, "style": "plain", "freeze_vision": False},
    "llava_local": _LLAVA | {"vision_steps": 6000, "num_scenes": 30_000, "paste_weight": 5.0},
}
SHARED_WORK = {"mllama_new_words": "mllama"}
"""Student → the student in whose work folder it is trained, because it shares pictures and vision stage with it."""
NUM_SCORED, NUM_SCORED_OF_HAND = 300, 100
log = logging.getLogger(__name__)

TEACHER_CARD = """# The built-in world's teacher

A Stable Diffusion folder: `StableDiffusionPipeline.from_pretrained` loads it. AutoencoderKL (factor 4),
UNet2DConditionModel with cross-attention at 16 × 16 and 8 × 8, CLIPTextModel with 2 causal layers, a CLIP tokenizer so
small that the longer names split into several tokens. ε-prediction, Stable Diffusion's noise schedule.

It was trained on drawings in several hands (`lavender.world.hands`), never OpenMoji's, on textured backgrounds,
squashed to 64 × 64. It is a fixture for tests, the demo and the studies, not an image generator.

Two choices differ from a plain recipe: captions vary around their nouns, and tokens outside names are often hidden from
the UNet in training. `lavender/world/training/teacher.py` explains why.

"""
JOINT_TEACHER_CARD = """# The built-in world's teacher with joint attention

A Stable Diffusion 3 folder without T5: `StableDiffusion3Pipeline.from_pretrained` loads it. Drawings, captions and the
hiding of tokens are those of the other teacher; see `lavender/world/training/joint_teacher.py`.

"""
STUDENT_CARDS = {
    "mllama": """# The built-in world's cross-attending student

An `MllamaForConditionalGeneration` checkpoint with its processor: 3 + 1 vision layers of width 96, at most two tiles of
64 × 64 pixels, 4 text layers of width 128, of which layers 1 and 3 cross-attend.
""",
    "llava": """# The built-in world's self-attending student

A `LlavaForConditionalGeneration` checkpoint with its processor: 4 CLIP layers of width 96, of which the last is not
used, pictures squashed to 80 × 80 pixels (100 patches among the text's tokens), 4 Llama layers of width 128.
""",
}
STUDENT_CARD = """
First the vision tower learned which names a picture shows. Then the model was trained on captions (three of four
samples) and questions. Training stopped early on purpose, so that fine-tuning can improve it.
"""
HANDS_NOTE = """The training scenes show things in several drawing hands (`lavender.world.hands`), but never OpenMoji's,
and no photographs. Vision tower and projector were frozen in the second stage.

"""
STUDENT_NOTES = {
    "mllama": HANDS_NOTE,
    "mllama_new_words": f"""{HANDS_NOTE}The second stage had neither pictures nor texts with these names:
{", ".join(NEW_NAMES)}. Only the vision tower knows them. Tower and projector are those of `student_mllama`.

""",
    "llava": """The training scenes show Twemoji drawings only.

This student is a counter-example: its tower moves the evidence for a thing away from the thing's patches. Attention to
these patches reads nothing, so alignment cannot help. `lavender check` has to find that out.

""",
    "llava_local": f"""{HANDS_NOTE}In the first stage, a second loss kept evidence local: a patch had to look the same
after its surroundings were pasted into another picture (`lavender.world.training.students.paste_loss`).

""",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lavender.world.training.make", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="+",
        choices=["all", "teacher", "joint_teacher", *STUDENT_SETTINGS],
        help="which weights to train; joint_teacher is not shipped, and not in all",
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS_PATH, help="folder of the weights (default: the package)")
    parser.add_argument("--work", type=Path, default=Path("weights-work"), help="folder of checkpoints and loss curves")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    parts = [*STUDENT_SETTINGS, "teacher"] if "all" in arguments.parts else arguments.parts
    for part in parts:
        if part == "teacher":
            make_teacher(arguments.work, arguments.out / "teacher")
        elif part == "joint_teacher":
            make_joint_teacher(arguments.work, arguments.out / "joint_teacher")
        else:
            make_student(part, arguments.work / SHARED_WORK.get(part, part), arguments.out / f"student_{part}")


def make_teacher(work: Path, out: Path) -> None:
    """Train, convert to float16, score on development scenes, write the model card."""
    trained = train_teacher(work, work / "teacher_float32", **TEACHER_SETTINGS)
    shutil.copytree(trained, out, dirs_exist_ok=True)
    to_half(out)
    teacher = Teacher.from_pretrained(out, ExtractionConfig(grid=GRID, batch_size=16))
    scores = {domain: score_teacher(teacher, drawn).to_dict() for domain, drawn in scored_scenes().items()}
    pointing = {domain: domain_scores["pointing"] for domain, domain_scores in scores.items()}
    write_card(
        out,
        TEACHER_CARD,
        TEACHER_SETTINGS,
        [work / "vae.jsonl", work / "teacher.jsonl"],
        {"pointing": with_mean_of_hands(pointing), "in_domain": scores["in_domain"]},
    )


def make_joint_teacher(work: Path, out: Path) -> None:
    """Train, convert to float16, score on development scenes in both spaces, write the model card."""
    trained = train_joint_teacher(work, work / "joint_teacher_float32", **JOINT_TEACHER_SETTINGS)
    shutil.copytree(trained, out, dirs_exist_ok=True)
    to_half(out)
    spaces: tuple[Space, ...] = get_args(Space)
    scores: dict[str, Any] = {}
    for space in spaces:
        teacher = Teacher.from_pretrained(out, ExtractionConfig(space=space, grid=GRID, batch_size=16))
        scores[space] = score_teacher(teacher, held_out_scenes("development", NUM_SCORED)["in_domain"]).to_dict()
    curves = [work / "joint_teacher.jsonl"]
    write_card(out, JOINT_TEACHER_CARD, JOINT_TEACHER_SETTINGS, curves, scores, target="weights-joint")


def make_student(name: str, work: Path, out: Path) -> None:
    """Train, score on development scenes, write the model card."""
    settings = STUDENT_SETTINGS[name]
    train_student(name, work, out, **settings)
    scores, _ = score_student(out, scored_scenes())
    del scores["entropies"]
    lead = STUDENT_CARDS[settings["family"]] + STUDENT_CARD + STUDENT_NOTES[name]
    write_card(out, lead, settings, [work / "student_vision.jsonl", work / f"{name}.jsonl"], with_mean_of_hands(scores))


def scored_scenes() -> dict[str, list[Scene]]:
    """Domain → development scenes: in domain, OpenMoji, each other hand of training and, if there, the cut-outs."""
    drawn = held_out_scenes("development", NUM_SCORED)
    for hand in HANDS[1:]:
        drawn[f"hand_{hand}"] = list(scenes("development", NUM_SCORED_OF_HAND, "mixed", hands=(hand,)))
    try:
        drawn["cutouts"] = list(scenes("development", NUM_SCORED, "cutout"))
    except FileError as error:
        log.warning("No scores on cut-outs. %s", error)
    return drawn


def with_mean_of_hands(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores, and the mean of those of the hands of training other than Twemoji, rounded to four digits."""
    mean = fmean(scores[f"hand_{hand}"] for hand in HANDS[1:])
    return {name: round(score, 4) for name, score in {**scores, "other_training_hands": mean}.items()}


def to_half(folder: Path) -> None:
    """Convert every safetensors file of a folder to float16."""
    for path in folder.rglob("*.safetensors"):
        halved = {name: value.half() for name, value in load_file(path).items()}
        save_file(halved, path, metadata={"format": "pt"})


def write_card(
    out: Path,
    lead: str,
    settings: dict[str, Any],
    curves: list[Path],
    scores: dict[str, Any],
    target: str = "weights",
) -> None:
    """Write README.md beside the weights: settings, the target of make, loss curves, training time, scores."""
    parts = [lead, f"Settings and seed: `{json.dumps(settings)}`. One seed. Rebuilt by `make {target}`.\n"]
    for curve in curves:
        logged = [json.loads(line) for line in curve.read_text().splitlines()]
        lines = list({line["step"]: line for line in logged}.values())  # a continued training logs some steps twice
        keys = [key for key in lines[-1] if key not in ("step", "seconds")]
        indices = sorted({*range(0, len(lines), max(1, len(lines) // 10)), len(lines) - 1})
        shown = [lines[index] for index in indices]
        table = [f"| step | {' | '.join(keys)} |", "| --- " * (len(keys) + 1) + "|"]
        table += [f"| {line['step']} | {' | '.join(str(line[key]) for key in keys)} |" for line in shown]
        parts.append(
            f"\n`{curve.stem}`, smoothed, {lines[-1]['seconds']:.0f} s on one CPU core:\n\n" + "\n".join(table)
        )
    parts.append(f"\n\nScores on {NUM_SCORED} development scenes:\n\n```json\n{json.dumps(scores, indent=1)}\n```\n")
    (out / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
