"""`lavender extract`: word maps of pictures and texts, from a diffusion teacher or from people's annotations."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lavender.cli.options import add_columns, columns_of
from lavender.cli.stopping import DONE
from lavender.cli.terminal import show
from lavender.errors import ConfigError
from lavender.files import expanded, writing

if TYPE_CHECKING:
    from lavender.teachers.summary import Summary

HELP = "make word maps of pictures and texts; a stopped run can be resumed"
DESCRIPTION = """Map each word of each text onto its picture, and write the maps to a map store.
The same command continues a store that is not complete."""
SHOWN_DROPS = 10
ANNOTATIONS = ("coco-panoptic", "flickr30k-entities")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=expanded, default=None, help="folder or file of pictures and texts; docs/data.md has the formats"
    )
    add_columns(parser)
    parser.add_argument("--out", type=expanded, required=True, metavar="DIR", help="folder of the map store")
    source = parser.add_argument_group("source of the maps, one of").add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--teacher",
        type=os.path.expanduser,
        metavar="MODEL",
        help="folder or hub id of a Stable Diffusion 1, 2, XL or 3 pipeline; `world` is the built-in teacher",
    )
    source.add_argument(
        "--annotations",
        choices=ANNOTATIONS,
        metavar="FORMAT",
        help=f"masks or boxes that people drew: {' or '.join(ANNOTATIONS)}",
    )
    parser.add_argument("--grid", type=int, default=32, metavar="N", help="N × N cells per map (default: %(default)s)")
    parser.add_argument(
        "--words",
        nargs="+",
        default=None,
        metavar="PART",
        help="parts of speech to map, of noun, adjective, verb and other (default: all but other)",
    )
    parser.add_argument(
        "--texts",
        choices=("answers", "questions", "all"),
        default="answers",
        help="turns whose words to map: the assistant's answers (default), the user's questions, or all",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first sample that cannot be used, and refuse pictures outside the folder of the data",
    )
    _add_teacher_options(parser.add_argument_group("with --teacher"))
    _add_annotation_options(parser.add_argument_group("with --annotations"))


def _add_teacher_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mode",
        choices=("noise", "ddim", "null-text"),
        default="noise",
        help="read the attention at one noise level (default), during DDIM inversion, or during the paper's null-text "
        "inversion",
    )
    group.add_argument(
        "--timesteps",
        type=int,
        nargs="+",
        default=None,
        metavar="T",
        help="noise levels of --mode noise, 0 to 999; the maps of several are averaged (default: 50)",
    )
    group.add_argument(
        "--steps", type=int, default=10, metavar="N", help="steps of the other modes (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts per pass (default: %(default)s)")
    group.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    group.add_argument(
        "--dtype",
        default=None,
        choices=("float32", "float16", "bfloat16"),
        help="default: float16 on cuda, else float32",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="any other setting of docs/teachers.md, such as flip=true; may be repeated",
    )


def _add_annotation_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--from",
        type=expanded,
        default=None,
        dest="source",
        metavar="PATH",
        help="required: the panoptic JSON file, or the folder of Flickr30k Entities",
    )
    group.add_argument(
        "--pictures", type=expanded, default=None, metavar="DIR", help="pictures, if they are not in the usual folder"
    )
    group.add_argument(
        "--captions",
        type=expanded,
        default=None,
        metavar="FILE",
        help="captions of coco-panoptic, if they are not in the usual file",
    )
    group.add_argument("--split", default=None, help="of flickr30k-entities: train, val or test")


def run(options: argparse.Namespace) -> int:
    if options.annotations is not None:
        if options.source is None:
            raise ConfigError(
                "--annotations without --from", "--annotations FORMAT --from PATH", "name the annotations with --from"
            )
        return _extract_annotations(options)
    misplaced = [name for name in ("source", "pictures", "captions", "split") if getattr(options, name) is not None]
    if misplaced:
        flag = "--" + misplaced[0].replace("source", "from")
        raise ConfigError(f"{flag} with --teacher", f"{flag} only with --annotations", f"leave {flag} out")
    if options.data is None:
        raise ConfigError(
            "--teacher without --data", "--teacher MODEL --data PATH", "name the pictures and texts with --data"
        )
    return _extract_teacher(options)


def _extract_annotations(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lavender.data.samples import read_samples
    from lavender.teachers.annotations.extract import extract_annotations, open_annotations

    annotations = open_annotations(
        options.annotations,
        options.source,
        pictures=options.pictures,
        captions=options.captions,
        split=options.split,
        parts_of_speech=tuple(options.words) if options.words else None,
    )
    samples = annotations.samples() if options.data is None else read_samples(options.data, columns=columns_of(options))
    data_file = options.out / f"{annotations.label}.jsonl" if options.data is None else None
    total = sum(len(sample.pairs_of(options.texts)) for sample in samples)
    with writing(options.out), tqdm(total=total, unit="text", desc="maps") as bar:
        summary = extract_annotations(
            samples,
            annotations,
            options.out,
            grid=(options.grid, options.grid),
            texts=options.texts,
            data_file=data_file,
            strict=options.strict,
            on_progress=bar.update,
        )
    _print_summary(summary, options.out)
    if data_file is not None:
        show(f"data set: {data_file}")
    return DONE


def _extract_teacher(options: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from lavender.config import ExtractionConfig
    from lavender.data.samples import read_samples
    from lavender.teachers.diffusion.teacher import Teacher
    from lavender.teachers.extract import Estimate, extract
    from lavender.training.run import read_overrides
    from lavender.type_checks import from_mapping
    from lavender.world import TEACHER_NAME, TEACHER_PATH

    settings = {
        "mode": options.mode,
        "timesteps": options.timesteps,
        "num_steps": options.steps,
        "seed": options.seed,
        "grid": (options.grid, options.grid),
        "batch_size": options.batch_size,
        "parts_of_speech": options.words,
        "texts": options.texts,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= read_overrides(options.overrides)
    config = from_mapping(ExtractionConfig, settings, "--set")
    device = _usable_device(options.device)
    samples = read_samples(options.data, columns=columns_of(options))
    dtype = getattr(torch, options.dtype or ("float16" if device.startswith("cuda") else "float32"))
    path = str(TEACHER_PATH) if options.teacher == TEACHER_NAME else options.teacher
    teacher = Teacher.from_pretrained(path, config, device=device, dtype=dtype, name=options.teacher)
    total = sum(len(sample.pairs_of(config.texts)) for sample in samples)
    with writing(options.out), tqdm(total=total, unit="text", desc="maps") as bar:

        def show_estimate(estimate: Estimate) -> None:
            bar.write(
                f"{estimate.texts} texts: about {_duration(estimate.seconds)} on {device}, {estimate.megabytes:.1f} MB"
            )

        summary = extract(
            samples, teacher, options.out, strict=options.strict, on_estimate=show_estimate, on_progress=bar.update
        )
    _print_summary(summary, options.out)
    return DONE


def _usable_device(name: str | None) -> str:
    """The device of this name, or the best one. Raises ConfigError if PyTorch cannot use it."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name!r}, which PyTorch cannot use here",
            "cpu, or the name of a device of this machine such as cuda or cuda:1",
            "choose another device, or leave --device out",
        ) from error
    return name


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _print_summary(summary: Summary, out: Path) -> None:
    show(
        f"{summary.records} texts with {summary.words} word maps written to {out} in {_duration(summary.seconds)}; "
        f"{summary.already_there} were already there; {len(summary.dropped)} dropped"
    )
    if summary.reconstruction is not None:
        show(
            f"  mean squared error of the latents after null-text inversion: {summary.reconstruction:.3f}; "
            "raise null_text_iterations or num_steps to reduce it"
        )
    if summary.without_picture:
        show(f"  samples without a picture, which need no maps: {summary.without_picture}")
    for drop in summary.dropped[:SHOWN_DROPS]:
        show(f"  dropped {drop.what}: {drop.reason}")
    if len(summary.dropped) > SHOWN_DROPS:
        show(f"  … and {len(summary.dropped) - SHOWN_DROPS} more; {out / 'extraction.json'} lists all")
