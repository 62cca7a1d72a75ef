"""Damaged folders of models, adapters and teachers, drawn from a seed: each must end in one sentence that names it.

`try_all` is the whole job. A folder may also load, where the damage changes nothing that loading can know.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lavender.config import ExtractionConfig
from lavender.errors import ConfigError, LavenderError
from lavender.evaluation.inspect import inspect_target
from lavender.students.loading import load_run
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world import STUDENT_PATHS, TEACHER_PATH

SECONDS = 20
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 21000000\n"
ODD: tuple[Any, ...] = (
    None,
    True,
    "x",
    "",
    -1,
    0,
    3,
    1e30,
    2.5,
    float("nan"),
    float("inf"),
    10**9,
    10**5,
    10**40,
    [],
    {},
    [1, "a"],
    {"a": {}},
    ["os", "system"],
)
TEMPLATES = (
    "{% for",
    "{{ 1 / 0 }}",
    "{{ messages[9]['role'] }}",
    "{{ raise_exception('no') }}",
    "{% endfor %}",
    "{{ f( }}",
)

Damage = Callable[[Path], None]


def try_all(count: int, seed: int, work: Path) -> list[str]:
    """What went wrong in so many cases: another class than LavenderError's, no name in it, a hang, a silent success."""
    sources, bad = prepared(work / "whole"), []
    for number, (name, kind, damage, must_fail) in zip(range(count), cases(seed, sources), strict=False):
        folder = work / f"case-{number}"
        shutil.copytree(sources[kind], folder, copy_function=os.link)  # a damaged file is written anew
        damage(folder)
        fault = outcome(kind, folder, must_fail, partial(random.Random(f"{seed}/{number}").random))
        bad += [f"case {number} of seed {seed}, {name}: {fault}"] if fault else []
        shutil.rmtree(folder)
    return bad


def outcome(kind: str, folder: Path, must_fail: bool, draw: Callable[[], float]) -> str | None:
    """What is wrong with how a folder is taken; None if nothing is."""

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if kind == "teacher":
            Teacher.from_pretrained(folder, ExtractionConfig(grid=(8, 8)))
        elif draw() < 0.2 and not must_fail and kind != "adapter":
            inspect_target(str(folder))
        else:
            load_run(folder)
    except LavenderError as error:
        said = str(error)
        if isinstance(error.__cause__, TimeoutError):
            return f"hangs: {said}"
        if isinstance(error, ConfigError) and "trust_remote_code" not in said:
            return f"told as a wrong setting: {said}"
        return None if str(folder) in said and "\n" not in said else f"not a sentence that names the folder: {said}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return "loads in silence" if must_fail else None


def prepared(work: Path) -> dict[str, Path]:
    """A whole folder of each kind: the shipped students and teacher, one in parts with an index, and an adapter."""
    found = dict(STUDENT_PATHS) | {"teacher": TEACHER_PATH, "parts": work / "parts", "adapter": work / "adapter"}
    model = AutoModelForImageTextToText.from_pretrained(STUDENT_PATHS["llava"])
    shutil.copytree(STUDENT_PATHS["llava"], found["parts"])
    (found["parts"] / "model.safetensors").unlink()
    model.save_pretrained(found["parts"], max_shard_size="1MB")
    shutil.copytree(STUDENT_PATHS["llava"], found["adapter"])
    (found["adapter"] / "model.safetensors").unlink()
    (found["adapter"] / "config.json").unlink()
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    tuned.peft_config["default"].base_model_name_or_path = str(STUDENT_PATHS["llava"])
    tuned.save_pretrained(str(found["adapter"]))
    return {kind: Path(path) for kind, path in found.items()}


def cases(seed: int, sources: dict[str, Path]) -> Iterator[tuple[str, str, Damage, bool]]:
    """Without an end: a name, the kind of folder, what damages it, and whether it must be refused then."""
    chance = random.Random(seed)
    while True:
        kind = chance.choice(sorted(sources))
        files = [path.relative_to(sources[kind]) for path in sorted(sources[kind].rglob("*")) if path.is_file()]
        file = chance.choice([one for one in files if one.suffix in (".json", ".jinja", ".safetensors")])
        name, damage, must_fail = {".json": _json, ".jinja": _template, ".safetensors": _weights}[file.suffix](chance)
        yield f"{name} in {file} of {kind}", kind, partial(_damaged, file, damage), must_fail


def _damaged(file: Path, damage: Damage, folder: Path) -> None:
    """The file is a link to the whole folder's: what is damaged is a copy."""
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    damage(path)


def _cut(share: float, path: Path) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _replace(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _plain(chance: random.Random) -> tuple[str, Damage, bool]:
    return chance.choice(
        [
            ("a cut", partial(_cut, chance.random()), True),
            ("nothing", partial(_replace, b""), True),
            ("a Git LFS pointer", partial(_replace, POINTER), True),
            ("noise", partial(_replace, chance.randbytes(chance.randint(1, 3000))), True),
        ]
    )


def _json(chance: random.Random) -> tuple[str, Damage, bool]:
    if chance.random() < 0.3:
        return _plain(chance)
    if chance.random() < 0.15:
        text = chance.choice(
            [b"[]", b"3", b"null", b'"x"', b"[" * 200_000, b'{"a":' * 200_000, b'{"a": 1' + b"0" * 6000 + b"}"]
        )
        return f"the JSON {text[:12]!r}…", partial(_replace, text), text[:8] != b'{"a": 10'
    odd, draw = chance.choice(ODD), random.Random(chance.random())
    return f"the value {str(odd)[:40]!r}", partial(_change, odd, draw), False


def _change(odd: Any, draw: random.Random, path: Path) -> None:
    """Set one value, at any depth, to an odd one, or leave it out."""
    settings = json.loads(path.read_text())
    place = settings
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(place[key], dict | list) and draw.random() < 0.7:
            place = place[key]
            continue
        if isinstance(place, dict) and draw.random() < 0.2:
            del place[key]
        else:
            place[key] = odd
        break
    path.write_text(json.dumps(settings))


def _template(chance: random.Random) -> tuple[str, Damage, bool]:
    text = chance.choice(TEMPLATES)
    return f"the template {text!r}", partial(_replace, text.encode()), True


def _weights(chance: random.Random) -> tuple[str, Damage, bool]:
    if chance.random() < 0.4:
        return _plain(chance)
    what, draw = chance.choice(("nan", "inf", "missing", "renamed", "shape", "pickle", "folder")), chance.random()
    return f"weights: {what}", partial(_change_weights, what, random.Random(draw)), True


def _change_weights(what: str, draw: random.Random, path: Path) -> None:
    if what in ("pickle", "folder"):
        path.rename(path.with_suffix(".bin"))
        if what == "folder":
            path.mkdir()
        return
    state = load_file(path)
    name = draw.choice([one for one in sorted(state) if state[one].is_floating_point()])
    if what in ("nan", "inf"):
        state[name].view(-1)[draw.randrange(state[name].numel())] = float(what)
    else:
        tensor = state.pop(name)
        if what == "renamed":
            state[name.replace("weight", "wait") + "_"] = tensor
        if what == "shape":
            state[name] = torch.cat([tensor, tensor])
    save_file(state, path, metadata={"format": "pt"})
