"""Damaged run folders and checkpoints: every verb that reads one says what is wrong, or goes on from what is whole."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from fuzz.harness import forked, preload, verb, verb_fault
from fuzz.setting import good_settings

TEXTS = ("", "{}", "[]", "null", "5", '"x"', "{", "\x00", '{"a": 1}', "model: x\n", "- 1\n", "NaN")


def try_all(count: int, seed: int, work: Path) -> list[str]:
    """`count` damaged run folders; what is wrong with the way a verb ends on them."""
    preload()
    work.mkdir(parents=True, exist_ok=True)
    settings = good_settings(work) | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "probe_size": 0}
    (work / "run.yaml").write_text(yaml.safe_dump(settings))
    first = forked(verb("train", work / "run.yaml"), work / "log", limit=300)
    if first.code:
        return [f"run folders: the run itself fails: {first.last_line()}"]
    out, whole, chance, bad = Path(str(settings["out"])), work / "whole", random.Random(seed), []
    out.rename(whole)
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        arguments, said = chance.choice(VERBS)(work, out), _damage(out, chance)
        shutil.rmtree(work / "exported", ignore_errors=True)
        ended = forked(verb(*arguments), work / "log", limit=60)
        if fault := verb_fault(ended):
            bad.append(f"run folders: {arguments[0]} after {said}: {fault}")
    return bad


VERBS: list[Callable[[Path, Path], tuple[object, ...]]] = [
    lambda work, out: ("report", out),
    lambda work, out: ("eval", out, "--limit", "1"),
    lambda work, out: ("export", out, "--out", work / "exported"),
    lambda work, out: ("train", work / "run.yaml"),
    lambda work, out: ("train", work / "run.yaml", "--set", "max_steps=3"),
]


def _damage(out: Path, chance: random.Random) -> str:
    path = chance.choice(sorted(path for path in out.rglob("*") if path.is_file()))
    content, kind = path.read_bytes(), chance.choice(("flipped", "cut", "noise", "another text", "gone", "a folder"))
    if kind == "flipped" and content:
        flipped = bytearray(content)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content) + 1)])
    elif kind == "noise":
        path.write_bytes(chance.randbytes(100))
    elif kind == "another text":
        path.write_text(chance.choice(TEXTS))
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.unlink()
    return f"{path.relative_to(out)} was {kind}"
