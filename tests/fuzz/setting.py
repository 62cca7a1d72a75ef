"""Run files of every wrong kind: `lavender train` says what is wrong, runs nothing hidden, and never hangs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from fuzz.harness import forked, preload, verb, verb_fault

VALUES: list[Any] = [
    None,
    5,
    -1,
    0,
    1.5,
    "",
    "x",
    "-1",
    "nan",
    [],
    [1],
    ["x"],
    [[1]],
    {},
    {"a": 1},
    {1: 2},
    float("nan"),
    float("inf"),
    -1e9,
    1e30,
    10**30,
    True,
    "a" * 5000,
    "no",
    "\u202e\u0000",
    "'1e-5'",
    [None],
    [{}],
    "~",
    "../..",
]
RAW: dict[str, str | bytes] = {
    "empty": "",
    "a list": "- 1",
    "a text": "x",
    "a tab": "model:\tx\n\t- y",
    "not closed": "model: [",
    "a key twice": "model: a\nmodel: b\n",
    "a number as key": "5: x\n",
    "null as key": "~: x\n",
    "a list as key": "[1]: x\n? {a: 1}\n: y\n",
    "a date as key": "2024-01-01: x\n",
    "no date": "model: 2024-13-45\n",
    "no number": "model: !!int abc\n",
    "no float": "model: !!float abc\n",
    "no truth": "model: !!bool abc\n",
    "no binary": "model: !!binary abc\n",
    "no time": "model: !!timestamp abc\n",
    "sixties": "max_steps: 1:30\n",
    "a huge number": "max_steps: " + "9" * 5000 + "\n",
    "deep": "model: " + "[" * 20000 + "\n",
    "deep keys": "".join(" " * level + "a:\n" for level in range(3000)),
    "a wrong merge": "<<: 5\n",
    "itself": "&a {model: *a}\n",
    "a merge of itself": "a: &a\n  <<: *a\n",
    "no anchor": "model: *x\n",
    "two documents": "model: x\n---\nmodel: y\n",
    "Latin-1": b"prompt: caf\xe9\n",
    "UTF-16": "model: x".encode("utf-16"),
    "a null byte": b"model: \0\n",
    "all bytes": bytes(range(256)),
    "a BOM": b"\xef\xbb\xbfmodel: x\n",
    "a set": "model: !!set {a, b}\n",
    "an omap": "model: !!omap [a: 1]\n",
    "a long key": "a" * 100000 + ": 1\n",
    "1 MB": "prompt: " + "x" * 1_000_000 + "\n",
    "an unknown tag": "model: !x y\n",
}
CODE = (
    "model: !!python/object/apply:os.system ['touch {0}']\n",
    "model: !!python/name:os.system\n",
    "model: !!python/object/new:subprocess.Popen [['touch', '{0}']]\n",
    "model: !!python/module:os\n",
)
ACCEPTED = 77


def try_all(count: int, seed: int, work: Path) -> list[str]:
    """`count` run files; what is wrong with the way `lavender train` ends on them."""
    preload()
    good, canary = good_settings(work), work / "executed"
    cases = _cases(good, canary, seed)[:count]
    with_stub = _stubbed()
    bad = []
    for name, text in cases:
        path = work / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        ended = forked(lambda path=path: with_stub(path), work / "log")
        fault = "" if ended.code == ACCEPTED else verb_fault(ended)
        if canary.exists():
            fault = "it ran code"
            canary.unlink()
        if fault:
            bad.append(f"settings: {name[:80]}: {fault}")
    return bad


def _cases(good: dict[str, Any], canary: Path, seed: int) -> list[tuple[str, str | bytes]]:
    """Raw files, alias bombs, code, then every setting with every wrong value, in an order of the seed."""
    from lavender.config import AlignmentConfig
    from lavender.training.run_config import LoraSettings, RunConfig, training_keys

    first: list[tuple[str, str | bytes]] = [(f"a file with {name}", text) for name, text in RAW.items()]
    first += [("code in a file", text.format(canary)) for text in CODE]
    for key in ("peft", "image_processor", "model", "freeze", "lora", "layers", "model_init_kwargs", "unknown"):
        rest = yaml.safe_dump({name: value for name, value in good.items() if name != key})
        first.append((f"an alias bomb in {key}", rest + _bomb(key)))
    wrong: list[tuple[str, Any]] = []
    names = {field.name for field in (*fields(RunConfig), *fields(AlignmentConfig))} | training_keys()
    for name in sorted(names - {"training"}):
        wrong += [(name, value) for value in VALUES]
    for name in (field.name for field in fields(LoraSettings)):
        wrong += [("lora", {name: value}) for value in VALUES]
    for name in ("peft_type", "r", "target_modules", "task_type", "auto_mapping"):
        wrong += [("peft", {"peft_type": "LORA", "target_modules": ["q_proj"], name: value}) for value in VALUES]
    for name in ("load_in_4bit", "bnb_4bit_quant_type", "x"):
        wrong += [("quantization", {name: value}) for value in VALUES]
    for name in ("size", "do_resize", "resample", "image_mean", "x"):
        wrong += [("image_processor", {name: value}) for value in VALUES]
    random.Random(seed).shuffle(wrong)
    return first + [
        (f"{name}={value!r}", yaml.dump({**good, name: value}, allow_unicode=True)) for name, value in wrong
    ]


def _bomb(key: str) -> str:
    """Lists of lists of lists by reference: 10 to the 9th texts."""
    lines = ["x0: &x0 [l,l,l,l,l,l,l,l,l,l]"]
    lines += [f"x{level}: &x{level} [" + ",".join([f"*x{level - 1}"] * 10) + "]" for level in range(1, 9)]
    return f"{key}:\n" + "".join(f"  {line}\n" for line in lines)


def good_settings(work: Path) -> dict[str, Any]:
    """Settings of a run that could begin: two pictures, their texts, and maps for both."""
    import torch
    from PIL import Image

    from lavender.data.images import image_id, load_image
    from lavender.data.store import MapStore
    from lavender.maps import WordMaps
    from lavender.words import content_words
    from lavender.world import STUDENT_PATH

    data = work / "data"
    data.mkdir(parents=True)
    rows = [{"file_name": f"{colour}.png", "text": f"a {colour} dog and a big hat ."} for colour in ("red", "blue")]
    for row in rows:
        Image.new("RGB", (64, 64), row["file_name"].removesuffix(".png")).save(data / row["file_name"])
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MapStore.writer(work / "maps", {"teacher": "fuzz"}, {}, (8, 8)) as writer:
        for row in rows:
            words = content_words(row["text"], ("noun",))
            identity = image_id(load_image(data / row["file_name"], "a picture"))
            writer.add(WordMaps(identity, row["text"], words, torch.rand(len(words), 8, 8)))
    return {
        "model": str(STUDENT_PATH),
        "data": str(data),
        "maps": str(work / "maps"),
        "out": str(work / "out"),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dtype": "float32",
    }


def _stubbed() -> Callable[[Path], int]:
    """`lavender train` up to the trainer, with model, config and processor loaded once, in the parent."""
    import transformers

    from lavender.students.base import VlmAdapter
    from lavender.world import STUDENT_PATH

    kinds = ("AutoConfig", "AutoProcessor")
    kept = {name: getattr(transformers, name).from_pretrained(STUDENT_PATH) for name in kinds}
    model = transformers.AutoModelForImageTextToText.from_pretrained(STUDENT_PATH)

    def run(path: Path) -> int:
        import lavender.training.trainer

        class Reached:
            def __init__(self, *args: Any, **kwargs: Any):
                raise SystemExit(ACCEPTED)

        for name in kinds:
            kind = getattr(transformers, name)
            kind.from_pretrained = _first_kept(kind.from_pretrained, kept[name], str(STUDENT_PATH))
        setattr(VlmAdapter, "load", lambda self, *args, **kwargs: model)  # noqa: B010
        setattr(lavender.training.trainer, "LavenderTrainer", Reached)  # noqa: B010
        return verb("train", path)()

    return run


def _first_kept(original: Callable, kept: object, path: str) -> Callable:
    return lambda given, *args, **kwargs: kept if str(given) == path else original(given, *args, **kwargs)
