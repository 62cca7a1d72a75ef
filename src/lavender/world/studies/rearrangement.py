"""What does a fault in the order of patches cost? (App. E)"""

from __future__ import annotations

from functools import partial

from lavender.world.studies.cells import Arm
from lavender.world.studies.forms import PUBLISHED, RECIPE, Settings
from lavender.world.studies.geometry import FAULTS
from lavender.world.studies.new_words import CONTROLLED, fine_tuned
from lavender.world.studies.page import draw_differences
from lavender.world.studies.study import Finding, Scores, Study, compare_pairs

FORMS: dict[str, Settings] = {"recipe": RECIPE, "published": PUBLISHED}
SHOWN = ("new_names", "known_names", "new_pointing", "new_attention_mass")
JUDGED = ("new_names", "all_names", "new_pointing", "new_attention_mass")


def arms(quick: bool) -> dict[str, Arm]:
    """Plain; each form with the right geometry and with every fault. The quick study has one fault."""
    arms = {"plain": fine_tuned(CONTROLLED)}
    for label, form in FORMS.items():
        arms[label] = fine_tuned(CONTROLLED, form)
        for fault in ("reshaped",) if quick else FAULTS:
            arms[f"{label}, {fault}"] = fine_tuned(CONTROLLED, form, fault)
    return arms


def judge(scores: Scores) -> list[Finding]:
    """Every form against plain, and every fault against the right geometry."""
    aligned = [arm for arm in scores if arm != "plain"]
    pairs = [(arm, "plain") for arm in aligned] + [(arm, arm.split(",")[0]) for arm in aligned if "," in arm]
    return compare_pairs(scores, JUDGED, pairs)


STUDY = Study(
    title="What does wrong geometry cost?",
    question="New words from 100 captions, as in the study `new-words`, by a student whose picture is cut into one or "
    "two tiles. The recipe and the published loss with the right places of the patches, and with faults: "
    + "; ".join(f"*{fault}*: {what}" for fault, what in FAULTS.items())
    + ". *reshaped* changes the two fifths of the pictures that have two tiles side by side, *stretched* the three "
    "fifths that are padded, *transposed* all.",
    paper="improper rearrangement leads to misaligned attention maps, correct reconstruction restores them (App. E, "
    "Fig. 23, 24; pictures, without numbers).",
    arms=arms,
    judge=judge,
    draw=partial(draw_differences, metrics=SHOWN),
    metrics=("new_names", "known_names", "all_names", "new_pointing", "new_attention_mass"),
    quick_steps=None,
)
