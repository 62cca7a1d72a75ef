"""A run on real photographs, made once: four pictures that scikit-image carries, with captions written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

from forking import Parent, parent_of_verbs

CAPTIONS = {
    "astronaut": [
        "A woman in an orange space suit smiles at the camera.",
        "An astronaut stands in front of a flag and a model of a shuttle.",
        "A smiling astronaut holds her white helmet.",
        "The portrait shows a woman with short curly hair.",
        "A flag with stars hangs behind an astronaut.",
    ],
    "chelsea": [
        "A cat with green eyes looks past the camera.",
        "A striped cat lies on a brown blanket.",
        "The face of a ginger cat with long whiskers.",
        "A tired cat with pointed ears rests on a sofa.",
        "Close view of a cat and its pink nose.",
    ],
    "coffee": [
        "A cup of black coffee stands on a wooden table.",
        "A spoon lies on a saucer beside a cup.",
        "Espresso in a white cup, seen from above.",
        "A round saucer with a cup and a small spoon.",
        "Someone left a full cup of coffee on the table.",
    ],
    "rocket": [
        "A white rocket rises from the launch pad with a bright flame.",
        "A rocket launches at night beside a tall tower.",
        "Smoke and fire below a rocket in the dark sky.",
        "Four towers stand around a rocket.",
        "The launch of a rocket lights the clouds.",
    ],
}
QUESTION, ANSWER = "What animal is in the picture?", "A cat with green eyes."
PROMPT = "describe the picture."
LAYOUTS = ("imagefolder", "flickr30k", "jsonl")


@dataclass(frozen=True)
class PhotographRun:
    """Everything that the path from photographs to a report leaves behind."""

    data: dict[str, Path]  # layout → what `--data` was given
    maps: dict[str, Path]  # layout → its map store
    runs: dict[str, Path]  # "full" and "lora" → run folder
    said: dict[str, str]  # verb → what it wrote to stdout


Lavender = Callable[..., str]


@pytest.fixture(scope="session")
def verbs() -> Iterator[Parent]:
    with parent_of_verbs() as parent:
        yield parent


@pytest.fixture(scope="session")
def lavender_process(verbs, tmp_path_factory) -> Lavender:
    """Runs `lavender` in a process of its own; what it wrote to stdout. tests/test_documented_commands.py starts each
    verb as a user does."""
    folder = tmp_path_factory.mktemp("said")

    def run(*arguments: object) -> str:
        out, err = folder / "out", folder / "err"
        for file in (out, err):
            file.write_text("")
        code = verbs.start(*arguments, out=out, err=err).wait(timeout=500)
        said = err.read_text()
        assert code == 0, f"{arguments}\n{out.read_text()}\n{said[-4000:]}"
        assert "Traceback" not in said
        return out.read_text()

    return run


def photographs() -> dict[str, Image.Image]:
    import skimage.data

    return {name: Image.fromarray(getattr(skimage.data, name)()) for name in CAPTIONS}


def write_imagefolder(folder: Path) -> Path:
    """PNG files and `metadata.jsonl`, a row a picture with a list of captions."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as lines:
        for name, image in photographs().items():
            image.save(folder / f"{name}.png")
            lines.write(json.dumps({"file_name": f"{name}.png", "caption": CAPTIONS[name]}) + "\n")
    return folder


def write_flickr30k(folder: Path) -> Path:
    """The published layout: pictures in a folder beside `results.csv`; here backwards and under other names."""
    pictures = folder / "flickr30k_images"
    pictures.mkdir(parents=True)
    with (folder / "results.csv").open("w") as lines:
        lines.write("image_name| comment_number| comment\n")
        for number, (name, image) in reversed(list(enumerate(photographs().items()))):
            image.save(pictures / f"{1000 + number}.png")
            lines.writelines(f"{1000 + number}.png| {at}| {text}\n" for at, text in enumerate(CAPTIONS[name]))
    return folder


def write_jsonl(folder: Path) -> Path:
    """`images` + `messages`, the captions in another order, with a question and its answer more."""
    folder.mkdir()
    rows: list[dict] = []
    for name, image in photographs().items():
        image.save(folder / f"the {name}.png")
        rows += [
            {
                "images": [f"the {name}.png"],
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
                    {"role": "assistant", "content": [{"type": "text", "text": text}]},
                ],
            }
            for text in CAPTIONS[name][::-1]
        ]
    asked = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    rows.insert(7, {"images": ["the chelsea.png"], "messages": asked})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


@pytest.fixture(scope="session")
def photograph_run(lavender_process, tmp_path_factory) -> PhotographRun:
    """extract on each layout; train fully, with LoRA, and a LLaVA on the jsonl; eval two of them; report."""
    from lavender.world import STUDENT_PATHS

    root = tmp_path_factory.mktemp("photographs")
    writers = dict(zip(LAYOUTS, (write_imagefolder, write_flickr30k, write_jsonl), strict=True))
    data = {layout: write(root / layout) for layout, write in writers.items()}
    maps, runs, said = {layout: root / f"{layout}-maps" for layout in LAYOUTS}, {}, {}
    for layout in LAYOUTS:
        said[f"extract {layout}"] = lavender_process(
            "extract", "--data", data[layout], "--teacher", "world", "--out", maps[layout], "--grid", 16
        )
    for kind in ("full", "lora", "llava"):
        runs[kind] = root / kind
        settings = {
            "model": str(STUDENT_PATHS["llava" if kind == "llava" else "mllama"]),
            "data": str(data["jsonl"]),
            "maps": str(maps["jsonl"]),
            "out": str(runs[kind]),
            "prompt": PROMPT,
            "dtype": "float32",
            "lora": kind == "lora",
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "activation_checkpointing": False,
            "disable_tqdm": True,
        }
        (root / f"{kind}.yaml").write_text(yaml.safe_dump(settings))
        said[f"train {kind}"] = lavender_process("train", root / f"{kind}.yaml")
    said["eval"] = lavender_process("eval", runs["lora"], "--against", runs["full"], "--limit", 6)
    said["report"] = lavender_process("report", runs["lora"])
    return PhotographRun(data, maps, runs, said)
