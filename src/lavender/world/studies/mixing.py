"""Does it harm to add a set of pictures to read? (§9, Fig. 27)"""

from __future__ import annotations

from functools import partial

from lavender.world.studies.cells import Arm
from lavender.world.studies.forms import RECIPE, Settings
from lavender.world.studies.page import draw_differences
from lavender.world.studies.study import CAPTIONS, Finding, Scores, Study, compare_pairs
from lavender.world.studies.targets import Target
from lavender.world.studies.tasks import TaskName

STEPS, LONGER = 200, 300
FORMS: dict[str, tuple[Target | None, Settings]] = {
    "plain": (None, ()),
    "published": ("teacher", ()),
    "recipe": ("teacher", RECIPE),
}
MIXED, UNMAPPED, AS_OFTEN = "with signs", "with signs, unmapped", "with signs, as often"
SHOWN = (*CAPTIONS, "reading", "reading_withheld", "pointing")


def arms(quick: bool) -> dict[str, Arm]:
    """The base; each form on captions, and on captions and signs; of aligned forms also with maps of captions alone.

    The full study has runs that see every caption as often as without signs.
    """

    def tuned(form: str, task: TaskName, steps: int = STEPS) -> Arm:
        target, settings = FORMS[form]
        return Arm("mllama", "full", target, 800, steps, settings, task)

    arms: dict[str, Arm] = {"base": Arm("mllama", "none", task="captions-without-signs")}
    for form in FORMS:
        arms[form] = tuned(form, "captions-without-signs")
        arms[f"{form}, {MIXED}"] = tuned(form, "captions-and-signs")
        if form != "plain" and not quick:
            arms[f"{form}, {UNMAPPED}"] = tuned(form, "captions-and-signs-unmapped")
        if not quick:
            arms[f"{form}, {AS_OFTEN}"] = tuned(form, "captions-and-signs", LONGER)
    return arms


def judge(scores: Scores) -> list[Finding]:
    """Signs against captions alone, of each form; each form against plain on the same data; maps of signs or none."""
    pairs = [(arm, arm.split(",")[0]) for arm in scores if "," in arm]
    for arm in scores:
        form, _, data = arm.partition(", ")
        if form in ("published", "recipe"):
            pairs.append((arm, ", ".join(["plain", *([MIXED if data == UNMAPPED else data] if data else [])])))
        if data == UNMAPPED:
            pairs.append((f"{form}, {MIXED}", arm))
    return compare_pairs(scores, SHOWN, pairs)


STUDY = Study(
    title="Does it harm to add a reading set?",
    question="Captions of 800 scenes, alone and with 400 pictures of signs to read (*with signs*): “what does the sign "
    "say?”, “exit”. The word of an answer has the teacher's map of it, though the teacher was never shown letters; "
    "*unmapped*: only words of captions have maps. With as many steps, each caption is seen less often with signs than "
    "without; *as often*: 300 steps in place of 200.",
    paper="adding OCR-VQA to the mix reduced overall performance, which suggests overfitting (§9, App. F.2, Fig. 27).",
    arms=arms,
    judge=judge,
    draw=partial(draw_differences, metrics=SHOWN),
    metrics=SHOWN,
)
