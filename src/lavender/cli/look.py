"""`lavender look`: where a model looks, what a teacher maps, what a map store holds, as one HTML page."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lavender.cli.options import Several, add_columns, add_trust_remote_code, columns_of
from lavender.cli.output import progress, report
from lavender.cli.placement import add_placement, placement_of
from lavender.cli.stopping import DONE
from lavender.errors import ConfigError
from lavender.files import data_path, expanded, prepare_place, writing

if TYPE_CHECKING:
    from tqdm import tqdm

    from lavender.evaluation.look.kinds import Kind
    from lavender.evaluation.look.looking import Looked

HELP = "see where a model looks for each word, on your own photo"
DESCRIPTION = """Write one HTML page that opens from disk. Of a vision-language model (also a run, a LoRA adapter or an
export; no training is needed) and of a diffusion teacher: each word's map over the photo, its level and its place. Of a
map store: a gallery, worst first. What TARGET is, is found from its files."""
_DEFAULT_STEPS = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        type=os.path.expanduser,
        help="model folder, hub id, run folder, teacher, or folder of a map store; `world` is the built-in teacher",
    )
    parser.add_argument("photo", nargs="?", type=expanded, default=None, help="a picture, for a model or a teacher")
    parser.add_argument(
        "text", nargs="?", default=None, help="its caption; for a model also a question, which ends in a question mark"
    )
    parser.add_argument(
        "--out", type=expanded, default=Path("look.html"), metavar="FILE", help="the page (default: %(default)s)"
    )
    parser.add_argument("--png", type=expanded, default=None, metavar="FILE", help="also draw the maps to this file")
    parser.add_argument(
        "--words",
        action=Several,
        default=None,
        metavar="PART",
        help="parts of speech to map, of noun, adjective, verb and other (default: all but other)",
    )
    add_placement(parser, "default: float32 on cpu; on cuda bfloat16 for a model, float16 for a teacher")
    _add_model_options(parser.add_argument_group("with a model"))
    _add_store_options(parser.add_argument_group("with a map store"))


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--answer", default=None, metavar="TEXT", help="take the text as a question, and this answer")
    group.add_argument(
        "--generate", action="store_true", help="take the text as a question, and let the model answer it"
    )
    group.add_argument(
        "--faithfulness",
        action="store_true",
        help="hide the places that the maps mark, and measure what that does to the answer",
    )
    group.add_argument(
        "--steps",
        type=int,
        default=None,
        metavar="N",
        help=f"steps in which --faithfulness hides the picture (default: {_DEFAULT_STEPS})",
    )
    add_trust_remote_code(group)


def _add_store_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", type=data_path, default=None, help="required: the data that the maps were made of")
    add_columns(group)
    group.add_argument(
        "--against",
        type=expanded,
        default=None,
        metavar="MAPS",
        help="another store of this data. Of annotated masks: worst is what points outside them; else what disagrees "
        "with it (default: worst is the map with the highest entropy)",
    )
    group.add_argument("--limit", type=int, default=None, metavar="N", help="show N texts (default: 64)")
    group.add_argument("--word", default=None, metavar="WORD", help="only texts with this word")
    group.add_argument(
        "--worst", action="store_true", help="show the worst of all texts, not texts spread evenly over the store"
    )


def run(options: argparse.Namespace) -> int:
    from lavender.world import TEACHER_NAME

    if options.target == TEACHER_NAME:
        kind: Kind = "teacher"
    else:
        from lavender.evaluation.look.kinds import kind_of

        kind = kind_of(options.target)
    _check_options(options, kind)
    for place in filter(None, (options.out, options.png)):
        prepare_place(place)
    looked = {"model": _look_at_model, "teacher": _look_at_teacher, "maps": _look_at_maps}[kind](options)
    with writing(options.out):
        from lavender.files import write_whole

        write_whole(options.out, looked.html)
    if options.png is not None:
        from lavender.evaluation.report.figure import draw_figure

        with writing(options.png):
            draw_figure(looked.panels, options.png)
    facts = {"kind": kind, "lines": list(looked.lines), "page": str(options.out)}
    facts["picture"] = None if options.png is None else str(options.png)
    end = f"page: {options.out}" + (f", picture: {options.png}" if options.png is not None else "")
    report(options, facts, looked.lines, [end])
    return DONE


_OF_KINDS: dict[str, tuple[str, ...]] = {
    "answer": ("model",),
    "generate": ("model",),
    "faithfulness": ("model",),
    "steps": ("model",),
    "trust_remote_code": ("model",),
    "data": ("maps",),
    "columns": ("maps",),
    "against": ("maps",),
    "limit": ("maps",),
    "word": ("maps",),
    "worst": ("maps",),
    "words": ("model", "teacher"),
    "device": ("model", "teacher"),
    "dtype": ("model", "teacher"),
}
"""The kinds of target that take an option."""


def _check_options(options: argparse.Namespace, kind: Kind) -> None:
    """Raise ConfigError for an option that this kind of target does not take, or that lacks another."""
    from lavender.evaluation.look.kinds import NAMES
    from lavender.world import TEACHER_NAME

    is_here = options.target == TEACHER_NAME or os.path.isdir(options.target)
    taken_as = NAMES[kind] if is_here else f"no folder here, so it is taken as the hub id of {NAMES[kind]}"
    what = f"{options.target}, which is {taken_as}"
    for name, kinds in _OF_KINDS.items():
        if getattr(options, name) not in (None, False) and kind not in kinds:
            option = f"--{name.replace('_', '-')}"
            do = f"leave {option} out" if is_here else f"check the path, or leave {option} out"
            raise ConfigError(f"{option} with {what}", f"{option} with {_any_of(kinds)}", do)
    if kind != "maps":
        _parts(options)  # first: it may have taken PHOTO and TEXT
    if kind == "maps":
        if options.photo is not None:
            raise ConfigError(f"a photo with {what}", "its data", "leave the photo out, and name the data with --data")
        if options.data is None:
            raise ConfigError(f"{what}, without --data", "the data that the maps were made of", "add --data PATH")
    elif options.photo is None or options.text is None:
        missing = "a photo" if options.photo is None else "a text"
        raise ConfigError(f"{what}, without {missing}", "TARGET PHOTO TEXT", "name a picture and its caption")
    if options.png == options.out:
        raise ConfigError(f"{options.out} for --out and for --png", "two files", "give one of them another name")
    if options.generate and options.answer is not None:
        raise ConfigError("--generate with --answer", "one of the two", "leave one out")
    if options.steps is not None and not options.faithfulness:
        raise ConfigError("--steps without --faithfulness", "both, or neither", "add --faithfulness")


def _any_of(kinds: tuple[str, ...]) -> str:
    from lavender.evaluation.look.kinds import NAMES

    return " or ".join(name for kind, name in NAMES.items() if kind in kinds)


def _command() -> str:
    """The command as it was typed, for the page."""
    return shlex.join(["lavender", *sys.argv[1:]]) if "look" in sys.argv[1:2] else "lavender look"


def _parts(options: argparse.Namespace) -> tuple:
    from lavender.config import CONTENT_WORDS, PartOfSpeech

    if options.words is None:
        return CONTENT_WORDS
    known = get_args(PartOfSpeech)
    if unknown := [part for part in options.words if part not in known]:
        got = f"--words {' '.join(map(repr, unknown))}"
        do = "name parts of speech, and put TARGET, PHOTO and TEXT before --words, which takes every word after it"
        raise ConfigError(got, f"some of {', '.join(known)}", do)
    return tuple(options.words)


def _look_at_model(options: argparse.Namespace) -> Looked:
    from lavender.evaluation.look.looking import look_at_model

    place = placement_of(options)
    with progress(options, unit="order", desc="faithfulness", disable=not options.faithfulness) as bar:
        return look_at_model(
            options.target,
            options.photo,
            options.text,
            command=_command(),
            answer=options.answer,
            generate=options.generate,
            parts_of_speech=_parts(options),
            with_faithfulness=options.faithfulness,
            steps=_DEFAULT_STEPS if options.steps is None else options.steps,
            device=place.device,
            dtype=place.dtype,
            trust_remote_code=options.trust_remote_code,
            progress=lambda: _advance(bar),
        )


def _advance(bar: tqdm) -> None:
    bar.update()


def _look_at_teacher(options: argparse.Namespace) -> Looked:
    import torch

    from lavender.evaluation.look.looking import look_at_teacher
    from lavender.world import TEACHER_NAME, TEACHER_NOTES, TEACHER_PATH

    place = placement_of(options, on_gpu="float16")
    return look_at_teacher(
        TEACHER_PATH if options.target == TEACHER_NAME else options.target,
        options.photo,
        options.text,
        command=_command(),
        name=options.target,
        parts_of_speech=_parts(options),
        device=place.device,
        dtype=getattr(torch, place.dtype),
        teacher_notes=TEACHER_NOTES,
    )


def _look_at_maps(options: argparse.Namespace) -> Looked:
    from lavender.evaluation.look.looking import look_at_maps
    from lavender.world import TEACHER_NOTES

    return look_at_maps(
        expanded(options.target),
        options.data,
        command=_command(),
        limit=64 if options.limit is None else options.limit,
        word=options.word,
        against=options.against,
        worst=options.worst,
        columns=columns_of(options),
        teacher_notes=TEACHER_NOTES,
    )
