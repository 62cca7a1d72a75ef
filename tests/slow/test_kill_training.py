"""`lavender train`, killed again and again, ends with the weights of an undisturbed run, bit by bit."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from closeness import close, moved
from command_line import write_scenes
from forking import Forked, Parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 24
KILLS = 4


@pytest.fixture(scope="module")
def folder(some_scenes, captions, store_path, make_student, processor, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("killed")
    make_student().save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    (path / "data").mkdir()
    write_scenes(path / "data", some_scenes, captions)
    return path


def begin(verbs: Parent, folder: Path, out: Path, store: Path, **settings: Any) -> Forked:
    """A run that writes a checkpoint at every step, so that many kills hit one that is being written."""
    ours: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "data"),
        "maps": str(store),
        "out": str(out),
        "prompt": "describe the picture.",
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 3,
        "activation_checkpointing": False,
        "disable_tqdm": True,
    }
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(ours | settings))
    log = out.with_suffix(".log")
    return verbs.start("train", file, out=log, err=log)


def steps_begun(out: Path) -> set[str]:
    return {path.name for path in (out / "trainer").glob("checkpoint-*")}


def kill_at_random(process: Forked, out: Path, chance: random.Random) -> None:
    """Soon after some new checkpoint was begun: while it is written, or in the next step."""
    wanted, seen, until = chance.randint(1, 3), steps_begun(out), time.monotonic() + 300
    while len(steps_begun(out) - seen) < wanted:
        assert process.poll() is None, f"it ended by itself:\n{out.with_suffix('.log').read_text()[-3000:]}"
        assert time.monotonic() < until
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.15))
    process.kill()
    assert process.wait() == -9


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = [*out.glob("alignment_head.safetensors"), *(out / "checkpoint").glob("*.safetensors")]
    return {f"{file.name}: {name}": one for file in files for name, one in load_file(file).items()}


@pytest.mark.parametrize("kind", ["full", "lora, published", "learn"])
def test_killed_at_random_it_ends_with_the_same_weights(kind, verbs, folder, store_path, tmp_path):
    """LoRA with dropout, so that random numbers count too. A run of several epochs, in shuffled order."""
    settings: dict[str, Any] = {"lora": {"r": 3, "dropout": 0.1}} if "lora" in kind else {}
    settings |= {"attention_loss": "published"} if kind != "full" else {}
    settings |= {"pooling": "learn"} if kind == "learn" else {}
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def start(out: Path) -> Forked:
        return begin(verbs, folder, out, store_path, **settings)

    assert start(whole).wait(timeout=300) == 0, whole.with_suffix(".log").read_text()
    chance = random.Random(kind)
    for _ in range(KILLS):
        kill_at_random(start(broken), broken, chance)
    # one that was certainly not written to its end: the last, without its last file
    last = max((broken / "trainer").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (last / "trainer_state.json").unlink(missing_ok=True)
    ended = start(broken).wait(timeout=300)
    said = broken.with_suffix(".log").read_text()
    assert ended == 0, said[-3000:]
    assert f"passed over {last}, which was not written to its end" in said
    assert "going on from" in said

    assert moved(weights(whole), weights(broken)) == []
    counted = [json.loads((out / "coverage.json").read_text()) for out in (whole, broken)]
    assert counted[0] == counted[1]
    assert counted[0]["samples"] == 2 * STEPS
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, broken)]
    assert len(lines[0]) == len(lines[1])
    logged = [
        [{key: one[key] for key in ("step", "loss", "matched_words")} for one in map(json.loads, own) if "loss" in one]
        for own in lines
    ]
    assert logged[0] == [close(one) for one in logged[1]]
    assert [one["step"] for one in logged[0]] == list(range(1, STEPS + 1))
