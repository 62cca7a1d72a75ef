"""Command lines of every wrong kind: options with wrong values, paths of every kind that is not the right one."""

from __future__ import annotations

import os
import random
from pathlib import Path

from fuzz.harness import forked, preload, verb, verb_fault

NUMBERS = ("0", "-1", "1.5", "x", "", "99999999999999999999", "nan")
OPTIONS = {
    "extract": {
        "--grid": NUMBERS,
        "--steps": NUMBERS,
        "--seed": NUMBERS,
        "--batch-size": NUMBERS,
        "--timesteps": NUMBERS,
        "--mode": ("x", "", "ddim"),
        "--words": ("x", "", "noun"),
        "--device": ("x", "cuda:99", "", "meta", "mps"),
        "--dtype": ("x", "int8"),
        "--set": ("x", "=", "x=1", "grid=[", "mode=5", "flip=maybe", "geometry=~"),
        "--split": ("train",),
        "--pictures": (".",),
        "--captions": (".",),
    },
    "check": {"--limit": NUMBERS},
    "eval": {"--limit": NUMBERS, "--against": ("x", ".", ""), "--data": ("x", ".")},
    "study": {"--seeds": NUMBERS, "--jobs": NUMBERS, "--split": ("x", "sealed")},
    "report": {"--out": ("", "/", ".")},
    "inspect": {"--picture": ("", "/", ".", "/no/such/place.png", "x.xyz")},
    "train": {"--set": ("x", "=", "model=", "lora=[", "x=1", "maps=5")},
    "export": {"--out": ("", "/", ".", "/dev/null")},
    "data prepare": {"--test-share": NUMBERS, "--seed": NUMBERS, "--captions": ("x", "all"), "--prompt": ("", "x")},
    "data inspect": {"--maps": ("x", "", "."), "--student": ("", "."), "--html": ("", "/", ".", "/dev/null")},
    "data overlap": {"--distance": NUMBERS, "--similarity": NUMBERS, "--out": ("", "/", "/dev/null")},
    "store verify": {"--json": ("",)},
    "store stats": {"--x": ("",)},
    "store merge": {"--out": ("", "/", ".")},
    "store export": {"--out": ("", "/", ".")},
    "store import": {"--data": ("x", "", "."), "--strict": ("x",)},
    "env": {"--x": ("",)},
}


def try_all(count: int, seed: int, work: Path) -> list[str]:
    """`count` command lines; what is wrong with the way they end."""
    preload()
    places = _places(work)
    chance, bad = random.Random(seed), []
    for _ in range(count):
        arguments = _arguments(chance, places, work)
        os.chdir(work)
        ended = forked(verb(*arguments), work / "log")
        if fault := verb_fault(ended):
            bad.append(f"options: lavender {' '.join(map(str, arguments))}: {fault}"[:400])
    return bad


def _arguments(chance: random.Random, places: list[str], work: Path) -> list[str]:
    name = chance.choice(list(OPTIONS))
    place = [chance.choice(places) for _ in range(3)]
    out = chance.choice([str(work / f"out{chance.randrange(3)}"), *places])
    base = {
        "extract": ["--data", place[0], "--teacher", chance.choice(["world", place[1]]), "--out", out],
        "check": [place[0], "--data", place[1], "--maps", place[2]],
        "eval": [place[0]],
        "study": [chance.choice(["mian", "", "x" * 300, *place])],
        "report": [place[0]],
        "inspect": [place[0]],
        "train": [place[0]],
        "export": [place[0], "--out", out],
        "data prepare": [chance.choice(["paper", "flickr30k", "ocrvqa30k"]), "--source", place[0], "--out", out],
        "data inspect": [place[0]],
        "data overlap": place[:2],
        "store verify": place[:2],
        "store stats": [place[0]],
        "store merge": [*place[:2], "--out", out],
        "store export": [place[0], "--out", out],
        "store import": [place[0], "--out", out],
        "env": [],
    }[name]
    option = chance.choice(list(OPTIONS[name]))
    wrong = [option, chance.choice(OPTIONS[name][option])] if chance.random() < 0.7 else []
    return [*name.split(), *base, *wrong]


def _places(work: Path) -> list[str]:
    """Paths that are there and are not what a verb wants."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "empty").mkdir()
    (work / "file").write_text("x")
    (work / "bytes").write_bytes(bytes(range(256)))
    (work / "noright").mkdir()
    os.mkfifo(work / "pipe")
    (work / "loop").symlink_to("loop")
    (work / "dangling").symlink_to("nowhere")
    (work / "run").mkdir()
    (work / "run" / "config.yaml").write_text("model: x\n")
    (work / "half").mkdir()
    (work / "half" / "checkpoint").mkdir()
    (work / "half" / "config.yaml").write_text("- 1\n")
    (work / "store").mkdir()
    (work / "store" / "manifest.json").write_text("{}")
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text('{"model_type": "llava"}')
    names = ("empty", "file", "bytes", "pipe", "loop", "dangling", "run", "half", "store", "model", "nowhere")
    return [*(str(work / name) for name in names), "", "/dev/zero", "/dev/null", "x" * 300, "a/b/c", "nobody/nothing"]
