"""Documents of the world's tasks in lmms-eval: the `process_docs`, `doc_to_visual` and `doc_to_text` of their files.

The tasks are `world_captions`, `world_pope_random`, …, their groups `world_pope`, `world_ood` and `world`. Their YAML
files in `lavender/evaluation/harness/tasks/world` name the functions here and in `suite_scoring`. Tasks are on
development scenes; those that end in `_sealed` are for reported numbers. Nothing is downloaded: pictures are drawn.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any, cast

from datasets import Dataset
from PIL import Image

from lavender.world.scenes import Split
from lavender.world.suite import picture_of, suite_items


def _docs(named: Dataset, task: str) -> Dataset:
    """The items of a task as rows. `named` has one row with the name of the split, as lmms-eval gives no other hint."""
    (split,) = named["split"]
    rows = [{"number": number, **asdict(item)} for number, item in enumerate(suite_items(task, cast(Split, split)))]
    return Dataset.from_list(rows)


captions = partial(_docs, task="captions")
attributes = partial(_docs, task="attributes")
where = partial(_docs, task="where")
counting = partial(_docs, task="counting")
pope_random = partial(_docs, task="pope_random")
pope_popular = partial(_docs, task="pope_popular")
pope_adversarial = partial(_docs, task="pope_adversarial")
signs = partial(_docs, task="signs")
ood_hand = partial(_docs, task="ood_hand")
ood_outline = partial(_docs, task="ood_outline")
ood_photographs = partial(_docs, task="ood_photographs")
ood_cutouts = partial(_docs, task="ood_cutouts")
ood_combination = partial(_docs, task="ood_combination")
ood_question = partial(_docs, task="ood_question")


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture, drawn when it is asked for: no task holds its pictures in memory."""
    return [picture_of(doc["drawn"], doc["seed"])]


def text(doc: dict[str, Any], prompts: dict[str, str] | None = None) -> str:
    """The question. `prompts` may have a `pre_prompt` and a `post_prompt`, as lmms-eval's own tasks have."""
    prompts = prompts or {}
    return f"{prompts.get('pre_prompt', '')}{doc['question']}{prompts.get('post_prompt', '')}"


def target(doc: dict[str, Any]) -> str:
    """The first right answer, for the log."""
    return doc["answers"][0]
