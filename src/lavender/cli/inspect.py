"""`lavender inspect`: what the library sees in a model or a map store, as a page on a terminal, else as JSON."""

from __future__ import annotations

import argparse
import os
from typing import Any

from lavender.cli.options import add_trust_remote_code
from lavender.cli.output import report
from lavender.cli.placement import add_placement, placement_of
from lavender.cli.stopping import DONE
from lavender.cli.terminal import table, width_of, wrapped
from lavender.errors import ConfigError
from lavender.files import expanded, writing

HELP = "show what Lavender sees in a model or a map store"
DESCRIPTION = """Of a model: its layers, image keys, words of a sample and memory for training. Its config.json is
enough. Of a map store: its size, settings and first texts. A pipe gets JSON."""
WIDTH = 80


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=os.path.expanduser, help="model folder, hub id, run folder, or folder of a map store"
    )
    parser.add_argument(
        "--picture",
        type=expanded,
        default=None,
        metavar="PNG",
        help="load the weights, and draw the model's word maps on a photograph to this file",
    )
    add_placement(parser, "of --picture (default: bfloat16 on cuda, else float32)")
    add_trust_remote_code(parser)


def run(options: argparse.Namespace) -> int:
    from lavender.evaluation.inspect import inspect_target

    if options.picture is None and (options.device or options.dtype):
        got = f"--{'device' if options.device else 'dtype'} without --picture"
        raise ConfigError(got, "both, or neither: nothing runs without a picture", "add --picture, or leave it out")
    place = None if options.picture is None else placement_of(options)
    with writing(options.picture or options.target):
        facts = inspect_target(options.target, options.picture, options.trust_remote_code, place)
    report(options, facts, as_text(facts, min(width_of() or WIDTH, WIDTH)).splitlines(), piped=True)
    return DONE


def as_text(facts: dict[str, Any], width: int = WIDTH) -> str:
    """The facts of `inspect_target` as a page of at most `width` columns; only paths and the table may be wider."""
    lines = _store_lines(facts) if facts["kind"] == "map store" else _model_lines(facts, width)
    return "\n".join(wrapped(line, width, _indent_of(line)) for line in lines)


def _indent_of(line: str) -> str:
    """Continuation lines stand under the values of a `  name   value` line, else a little to the right."""
    is_pair = line.startswith("  ") and not line.startswith("  -")
    return " " * (17 if is_pair else 4)


def _store_lines(facts: dict[str, Any]) -> list[str]:
    rows, cols = facts["grid"]
    lines = [f"map store: {facts['records']} texts with {facts['words']} word maps of {rows} × {cols} cells"]
    lines += [f"  {name:<14} {value}" for name, value in {**facts["identity"], **facts["info"]}.items()]
    for example in facts["examples"]:
        lines += ["", f"  {example['text']!r}", f"  maps of: {', '.join(example['words']) or 'no word'}"]
    return lines


def _model_lines(facts: dict[str, Any], width: int) -> list[str]:
    unknown = facts["sample"].get("missing")  # where the model's own code may not run, the reason for all that follows
    layers = f"{len(facts['usable_layers'])} of {facts['layers']}: {_ranges(facts['usable_layers'])}"
    parameters = f"unknown: {unknown}"
    if facts["parameters"] is not None:
        parameters = f"{facts['parameters']:,} ({_size(facts['bytes_in_bfloat16'])} in bfloat16)"
    memory = _memory_lines(facts["memory"], width) if facts["memory"] else [f"No estimate of memory: {unknown}"]
    return [
        f"{facts['class']}, family {facts['family']}",
        f"  parameters     {parameters}",
        f"  usable layers  {layers}; {facts['heads']} heads per layer",
        f"  image keys     {facts['image_keys']}",
        "",
        *_sample_lines(facts["sample"]),
        "",
        *memory,
    ]


def _sample_lines(sample: dict[str, Any]) -> list[str]:
    if "missing" in sample and "words" not in sample:
        return [f"No words of a sample: {sample['missing']}"]
    lines = [f"Words of {sample['text']!r}"]
    if "located" in sample:
        height, width = sample["picture_size"]
        lines[0] += (
            f" on a picture of {width} × {height} pixels (width × height): {sample['tokens']} tokens, "
            f"{sample['image_keys']} image keys"
        )
        for word in sample["located"]:
            tokens = " ".join(map(repr, word["tokens"]))
            lines.append(f"  {word['word']:<14} row {_ranges(word['rows']):<12} {tokens}")
        lines += [f"  not found: {count} × {reason}" for reason, count in sample["dropped"].items()]
    if "picture" in sample:
        lines.append(f"  maps of {', '.join(sample['words'])} drawn in {sample['picture']}")
    return lines


def _memory_lines(memory: dict[str, Any], width: int) -> list[str]:
    setups = {
        "full fp32": memory["full"],
        "full bf16": memory["full_16_bit"],
        "LoRA": memory["lora"],
        "QLoRA": memory["qlora"],
    }

    rows = [["", *setups]]
    rows += [[part, *(_size(setup[part]) for setup in setups.values())] for part in memory["full"]]
    rows.append(["total", *(_size(sum(setup.values())) for setup in setups.values())])
    rows.append(["published loss, in addition", *[_size(memory["published"])] * len(setups)])
    rows.append(["and with pooling: learn", *[_size(memory["learn"])] * len(setups)])
    lines = ["Memory for training on one GPU, a rough estimate:", *(f"  {line}" for line in table(rows, width - 2))]
    return [*lines, "  Assumptions:", *(f"  - {assumption}" for assumption in memory["assumptions"])]


def _size(count: float) -> str:
    """A number of bytes with a decimal unit: 1 kB is 1000 B."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count:.0f} B"


def _ranges(numbers: list[int]) -> str:
    """3, 4, 5 and 9 as "3–5, 9"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
