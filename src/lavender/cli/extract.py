"""`lavender extract`: word maps of pictures and texts, from a diffusion teacher or from people's annotations."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lavender.cli.options import add_columns, columns_of
from lavender.cli.output import progress, report
from lavender.cli.stopping import DONE
from lavender.errors import ConfigError
from lavender.files import data_path, expanded, writing

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from lavender.config import ExtractionConfig
    from lavender.data.samples import Samples
    from lavender.teachers.launch import Launch
    from lavender.teachers.summary import Summary

HELP = "make word maps of pictures and texts; a stopped run can be resumed"
DESCRIPTION = """Map each word of each text onto its picture, and write the maps to a map store.
The same command continues a store that is not complete."""
SHOWN_DROPS = 10
ANNOTATIONS = ("coco-panoptic", "flickr30k-entities")
FLAGS = {"num_steps": "steps", "batch_size": "batch-size", "parts_of_speech": "words"}
"""Settings of `ExtractionConfig` → their flag, where it has another name."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=data_path,
        default=None,
        help="folder or file of pictures and texts; docs/data.md has the formats",
    )
    add_columns(parser)
    parser.add_argument("--out", type=expanded, required=True, metavar="DIR", help="folder of the map store")
    source = parser.add_argument_group("source of the maps, one of").add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--teacher",
        type=os.path.expanduser,
        metavar="MODEL",
        help="folder or hub id of a pipeline: Stable Diffusion, Flux, PixArt-Σ, Sana or Qwen-Image; `world` is the "
        "built-in teacher",
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


def _add_teacher_options(group: argparse._ActionsContainer) -> None:
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
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local (default): this process, or those of `accelerate launch` on one host; ray: workers on the Ray "
        "cluster of RAY_ADDRESS, or of this host (docs/scale.md)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="teachers of --engine ray (default: one per GPU of the cluster, or with --device cpu per CPU but one)",
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


def _refuse_teacher_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for an option with --annotations that only a teacher reads."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_teacher_options(parser)
    unread = {name: value for name, value in vars(parser.parse_args([])).items() if name != "engine"}
    given = [name for name, default in unread.items() if getattr(options, name) != default]
    if given:
        flag = "--" + given[0].replace("overrides", "set").replace("_", "-")
        raise ConfigError(f"{flag} with --annotations", f"{flag} only with --teacher", f"leave {flag} out")
    if options.data is None and columns_of(options):
        got = "--columns with --annotations, without --data"
        raise ConfigError(got, "the data set that has these columns", "leave --columns out, or add --data")


def _extract_annotations(options: argparse.Namespace) -> int:
    from lavender.data.samples import read_samples
    from lavender.teachers.annotations.extract import extract_annotations, open_annotations
    from lavender.teachers.launch import Launch

    if options.engine == "ray" or Launch.of_environment() is not None:
        got = "--annotations with --engine ray" if options.engine == "ray" else "--annotations in several processes"
        raise ConfigError(got, "one process, which is fast enough", "run `lavender extract` without a launcher")
    _refuse_teacher_options(options)

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
    with writing(options.out), progress(options, total=total, unit="text", desc="maps") as bar:
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
    _report(options, summary, data_file)
    return DONE


def _extract_teacher(options: argparse.Namespace) -> int:
    from lavender.data.samples import read_samples
    from lavender.teachers.launch import Launch

    config = _config(options)
    launch = Launch.of_environment()
    if options.engine == "ray" and launch is not None:
        raise ConfigError("--engine ray in several processes", "one process, which starts the workers", "run it alone")
    if options.workers is not None and options.engine != "ray":
        raise ConfigError("--workers without --engine ray", "both, or neither", "add --engine ray, or leave it out")
    device = _usable_device(options.device, options.engine, launch)
    samples = read_samples(options.data, columns=columns_of(options))
    total = sum(len(sample.pairs_of(config.texts)) for sample in samples) // (launch.num_processes if launch else 1)
    shows = launch is None or launch.rank == 0
    with writing(options.out), progress(options, total=total, unit="text", desc="maps", disable=not shows) as bar:
        if options.engine == "ray":
            summary = _on_ray(options, samples, config, device, bar)
        else:
            summary = _here(options, samples, config, device, launch, bar)
    if shows:
        _report(options, summary)
    return DONE


def _config(options: argparse.Namespace) -> ExtractionConfig:
    from lavender.config import ExtractionConfig
    from lavender.training.run import overridden
    from lavender.type_checks import from_mapping

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
    try:
        return from_mapping(ExtractionConfig, overridden(settings, options.overrides), "--set")
    except ConfigError as error:
        typed = settings.keys() - {override.partition("=")[0] for override in options.overrides}
        raise ConfigError(*(_as_typed(part, typed) for part in (error.got, error.expected, error.do))) from error


def _as_typed(text: str, names: Iterable[str]) -> str:
    """Part of a message about these settings, with the flags by which they were given: "--steps 20"."""
    for name in names:
        flag = "--" + FLAGS.get(name, name)
        text = re.sub(rf"\b{name}=", f"{flag} ", text)
        text = re.sub(rf"\b(leave|change|of) {name}\b", rf"\1 {flag}", text)
    return text


def _here(
    options: argparse.Namespace,
    samples: Samples,
    config: ExtractionConfig,
    device: str,
    launch: Launch | None,
    bar: tqdm,
) -> Summary:
    """Extract in this process, or in those of its launch."""
    from lavender.teachers.diffusion.teacher import Teacher
    from lavender.teachers.extract import Estimate, extract

    path, dtype = _teacher_path(options), _dtype(options, device)
    teacher = Teacher.from_pretrained(path, config, device=device, dtype=dtype, name=options.teacher)

    def show_estimate(estimate: Estimate) -> None:
        whose = "" if launch is None else f" for each of {launch.num_processes} processes"
        duration = _duration(estimate.seconds)
        bar.write(f"{estimate.texts} texts{whose}: about {duration} on {device}, {estimate.megabytes:.1f} MB")

    return extract(
        samples,
        teacher,
        options.out,
        strict=options.strict,
        on_estimate=(lambda estimate: None) if bar.disable else show_estimate,
        on_progress=bar.update,
        launch=launch,
    )


def _on_ray(options: argparse.Namespace, samples: Samples, config: ExtractionConfig, device: str, bar: tqdm) -> Summary:
    """Extract with the workers of a Ray cluster."""
    from lavender.teachers.ray_engine import TeacherPlan, extract_on_ray

    plan = TeacherPlan(_teacher_path(options), config, device, _dtype(options, device), options.teacher)
    return extract_on_ray(
        samples, plan, options.out, workers=options.workers, strict=options.strict, on_progress=bar.update
    )


def _teacher_path(options: argparse.Namespace) -> str:
    from lavender.world import TEACHER_NAME, TEACHER_PATH

    return str(TEACHER_PATH) if options.teacher == TEACHER_NAME else options.teacher


def _dtype(options: argparse.Namespace, device: str) -> torch.dtype:
    import torch

    return getattr(torch, options.dtype or ("float16" if device.startswith("cuda") else "float32"))


def _usable_device(name: str | None, engine: str, launch: Launch | None) -> str:
    """The device of this name, or the best one; of a launch, each process's own GPU.

    Raises:
        ConfigError: PyTorch cannot use it here. That of a Ray worker is not tried, because it is on another host.
    """
    import torch

    from lavender.cli.placement import usable_device

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if engine == "ray" and name == "cpu" and os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
            got = "--engine ray without --device, on a host without a GPU"
            do = "write --device cuda if the cluster's workers have GPUs, else --device cpu"
            raise ConfigError(got, "the device of the workers", do)
    if engine == "ray":
        if name not in ("cpu", "cuda"):
            raise ConfigError(
                f"--device {name!r} with --engine ray", "cpu or cuda", "write cuda: each worker has a GPU of its own"
            )
        return name
    if launch is not None and name.startswith("cuda:"):
        do = "write cuda: each process has a GPU of its own"
        raise ConfigError(f"--device {name!r} in {launch.num_processes} processes", "a GPU for each process", do)
    if launch is not None and name == "cuda":
        if launch.num_processes > torch.cuda.device_count():
            got = f"{launch.num_processes} processes, and {torch.cuda.device_count()} GPUs"
            raise ConfigError(got, "a GPU for each process", "lower --num_processes of accelerate launch")
        name = f"cuda:{launch.rank}"
    return usable_device(name)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _report(options: argparse.Namespace, summary: Summary, data_file: Path | None = None) -> None:
    from dataclasses import asdict

    out, lines = options.out, []
    if summary.reconstruction is not None:
        lines.append(
            f"  mean squared error of the latents after null-text inversion: {summary.reconstruction:.3f}; "
            "raise --steps, or null_text_iterations with --set, to reduce it"
        )
    if summary.without_picture:
        lines.append(f"  samples without a picture, which need no maps: {summary.without_picture}")
    lines += [f"  dropped {drop.what}: {drop.reason}" for drop in summary.dropped[:SHOWN_DROPS]]
    if len(summary.dropped) > SHOWN_DROPS:
        lines.append(f"  … and {len(summary.dropped) - SHOWN_DROPS} more; {out / 'extraction.json'} lists all")
    lines += [] if data_file is None else [f"data set: {data_file}"]
    lines.append(
        f"{summary.records} texts with {summary.words} word maps written to {out} in {_duration(summary.seconds)}; "
        f"{summary.already_there} were already there; {len(summary.dropped)} dropped"
    )
    facts = asdict(summary) | {"out": str(out), "data": None if data_file is None else str(data_file)}
    report(options, facts, end=lines)
