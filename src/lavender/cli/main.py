"""The command line. `lavender --help` imports no torch: every verb imports what it needs."""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lavender import __version__
from lavender.cli.quiet import debugging, only_our_lines
from lavender.cli.stopping import Stopped, signals_stop, unexpected
from lavender.errors import ConfigError, LavenderError
from lavender.files import expanded, file_error, writing

if TYPE_CHECKING:
    from lavender.teachers.summary import Summary

DONE, FAILED, WRONG_USAGE = 0, 1, 2
SHOWN_DROPS = 10


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lavender",
        description="Diffusion Instruction Tuning: word maps of a diffusion model pull a VLM's attention "
        "while it is fine-tuned.",
    )
    parser.add_argument("--version", action="version", version=f"lavender-vlm {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="the whole method on the built-in world, some minutes on a CPU")
    demo.add_argument("--out", type=expanded, default=Path("lavender-demo"), help="folder (default: %(default)s)")

    _add_extract(verbs)

    check = verbs.add_parser("check", help="can alignment help this model? What knowing where is worth, before tuning")
    check.add_argument("model", type=os.path.expanduser, help="model folder or hub id, or run folder")
    check.add_argument("--data", type=expanded, required=True)
    check.add_argument("--maps", type=expanded, required=True, help="map store of that data")
    check.add_argument("--limit", type=int, default=64, help="samples to look at (default: %(default)s)")

    train = verbs.add_parser("train", help="fine-tune with the alignment loss")
    train.add_argument("run", type=expanded, help="YAML file: model, data, maps, out, …; or a run's config.yaml")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    train.add_argument("--restart", action="store_true", help="remove the run in its folder, and begin anew")

    evaluate = verbs.add_parser("eval", help="base, baseline and run side by side")
    evaluate.add_argument("run", type=expanded, help="run folder, as `lavender train` writes it")
    evaluate.add_argument("--against", type=expanded, action="append", default=[], help="another run or checkpoint")
    evaluate.add_argument("--data", type=expanded, default=None, help="held-out data; default: the training data")
    evaluate.add_argument("--maps", type=expanded, default=None, help="map store of that data")
    evaluate.add_argument("--limit", type=int, default=64, help="samples to look at (default: %(default)s)")

    _add_study(verbs)

    report = verbs.add_parser("report", help="one HTML page of a run")
    report.add_argument("run", type=expanded, help="run folder; what `lavender eval` found is shown if it was run")
    report.add_argument("--out", type=expanded, default=None, help="default: RUN/report.html")

    export = verbs.add_parser("export", help="a run's tuned model as one ordinary checkpoint, LoRA merged")
    export.add_argument("run", type=expanded, help="run folder, as `lavender train` writes it")
    export.add_argument("--out", type=expanded, required=True, help="new folder")

    inspect = verbs.add_parser("inspect", help="what the library sees in a model or a map store")
    inspect.add_argument("target", type=os.path.expanduser, help="model folder or hub id, or map store")
    inspect.add_argument(
        "--picture",
        type=expanded,
        default=None,
        help="load the weights; write a picture with the model's maps over it here",
    )
    inspect.add_argument("--json", action="store_true", help="as JSON, which a pipe or a file gets anyway")
    for verb in (check, evaluate, report, export, inspect):
        verb.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    return parser


def _add_study(verbs: argparse._SubParsersAction) -> None:
    study = verbs.add_parser("study", help="does it work, and why? A study of the built-in world, over seeds")
    study.add_argument(
        "name",
        help="main, teacher-controls, entropy, scaling, pooling, aligner, words, layers, "
        "pretraining, lambda, learning-rate or switching",
    )
    study.add_argument("--out", type=expanded, default=Path("lavender-studies"), help="folder (default: %(default)s)")
    study.add_argument("--quick", action="store_true", help="smaller, one seed, on development scenes; not a result")
    study.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 1 2 3; with --quick 40")
    study.add_argument(
        "--split",
        choices=("development", "sealed"),
        default=None,
        help="scenes of the scores; default: sealed, with --quick development",
    )
    study.add_argument("--jobs", type=int, default=None, help="runs side by side, one core each; default: all cores")
    study.add_argument("--json", action="store_true", help="print results.json instead of the page")


def _add_extract(verbs: argparse._SubParsersAction) -> None:
    extract = verbs.add_parser("extract", help="pictures and texts → per-word maps, resumable")
    extract.add_argument("--data", type=expanded, default=None, help="folder or file; see docs/data.md for the layouts")
    makers = extract.add_mutually_exclusive_group(required=True)
    makers.add_argument(
        "--teacher",
        type=os.path.expanduser,
        help="folder or hub id of a Stable Diffusion 1, 2, XL or 3 pipeline; `world` is the built-in one",
    )
    makers.add_argument(
        "--annotations",
        choices=("coco-panoptic", "flickr30k-entities"),
        help="maps from people's masks or boxes instead",
    )
    extract.add_argument(
        "--from",
        type=expanded,
        default=None,
        dest="source",
        metavar="PATH",
        help="of --annotations: the panoptic JSON, or the Entities folder",
    )
    extract.add_argument("--pictures", type=expanded, default=None, help="of --annotations, if not in the usual place")
    extract.add_argument("--captions", type=expanded, default=None, help="of coco-panoptic, likewise")
    extract.add_argument("--split", default=None, help="of flickr30k-entities: train, val or test")
    extract.add_argument("--out", type=expanded, required=True, help="folder of the map store")
    extract.add_argument(
        "--mode",
        choices=("noise", "ddim", "null-text"),
        default="noise",
        help="one noising (default), DDIM inversion, or the paper's null-text inversion",
    )
    extract.add_argument(
        "--timesteps",
        type=int,
        nargs="+",
        default=None,
        metavar="T",
        help="noise of --mode noise, of 1000; several are averaged",
    )
    extract.add_argument("--steps", type=int, default=10, help="of the other modes (default: %(default)s)")
    extract.add_argument("--grid", type=int, default=32, help="rows and columns of a map (default: %(default)s)")
    extract.add_argument("--seed", type=int, default=0)
    extract.add_argument("--batch-size", type=int, default=8)
    extract.add_argument(
        "--words",
        nargs="+",
        default=None,
        metavar="PART",
        help="parts of speech: noun adjective verb other (default: all but other)",
    )
    extract.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="any other setting, such as geometry=letterbox; see docs/teachers.md",
    )
    extract.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    extract.add_argument("--dtype", default=None, choices=("float32", "float16", "bfloat16"))
    extract.add_argument(
        "--strict", action="store_true", help="stop at what cannot be used, and at pictures outside the data's folder"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code: 0 done, 1 failed, 2 wrong usage or settings, 130 and 143 stopped by a signal."""
    options = build_parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with signals_stop(), only_our_lines():
            return _ended_well(options)
    except Stopped as stop:
        print("\nstopped; what was written stays", file=sys.stderr)
        return stop.exit_code


def _ended_well(options: argparse.Namespace) -> int:
    """The verb's exit code; what goes wrong is one line on stderr."""
    try:
        return VERBS[options.verb](options)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LavenderError as error:
        wrong = error
    except OSError as error:
        wrong = file_error(error, getattr(options, "out", None))
    except Exception as error:
        if debugging():
            raise
        wrong = unexpected(error)
    print(f"lavender {options.verb}: {wrong}", file=sys.stderr)
    return WRONG_USAGE if isinstance(wrong, ConfigError) else FAILED


def _demo(options: argparse.Namespace) -> int:
    from lavender.world.demo import run_demo

    with writing(options.out):
        run_demo(options.out)
    return DONE


def _extract(options: argparse.Namespace) -> int:
    if options.annotations is not None:
        if options.source is None:
            raise ConfigError("--annotations without --from", "--from PATH", "say where the annotations are")
        return _extract_annotations(options)
    given = [name for name in ("source", "pictures", "captions", "split") if getattr(options, name) is not None]
    if given:
        flag = "--" + given[0].replace("source", "from")
        raise ConfigError(f"{flag} with --teacher", "it with --annotations alone", "leave it out")
    if options.data is None:
        raise ConfigError("--teacher without --data", "--data PATH", "say which pictures and texts to map")
    return _extract_teacher(options)


def _extract_annotations(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lavender.data.samples import read_samples
    from lavender.teachers.annotations.extract import extract_annotations, open_annotations

    layout = open_annotations(
        options.annotations,
        options.source,
        pictures=options.pictures,
        captions=options.captions,
        split=options.split,
        parts_of_speech=tuple(options.words) if options.words else None,
    )
    samples = layout.samples() if options.data is None else read_samples(options.data)
    data_file = options.out / f"{layout.label}.jsonl" if options.data is None else None
    total = sum(len(sample.pairs) for sample in samples)
    with writing(options.out), tqdm(total=total, unit="text", desc="maps") as bar:
        summary = extract_annotations(
            samples,
            layout,
            options.out,
            grid=(options.grid, options.grid),
            data_file=data_file,
            strict=options.strict,
            on_progress=bar.update,
        )
    _print_summary(summary, options.out)
    if data_file is not None:
        print(f"data set: {data_file}")
    return DONE


def _extract_teacher(options: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from lavender.config import ExtractionConfig, from_mapping
    from lavender.data.samples import read_samples
    from lavender.teachers.diffusion.teacher import Teacher
    from lavender.teachers.extract import Estimate, extract
    from lavender.training.run import read_overrides

    settings = {
        "mode": options.mode,
        "timesteps": options.timesteps,
        "num_steps": options.steps,
        "seed": options.seed,
        "grid": (options.grid, options.grid),
        "batch_size": options.batch_size,
        "parts_of_speech": options.words,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= read_overrides(options.overrides)
    config = from_mapping(ExtractionConfig, settings, "--set")
    device = _device(options.device)
    samples = read_samples(options.data)
    dtype = getattr(torch, options.dtype or ("float16" if device.startswith("cuda") else "float32"))
    path = options.teacher
    if path == "world":
        from lavender.world import TEACHER_PATH

        path = str(TEACHER_PATH)
    teacher = Teacher.from_pretrained(path, config, device=device, dtype=dtype, name=options.teacher)
    total = sum(len(sample.pairs) for sample in samples)
    with writing(options.out), tqdm(total=total, unit="text", desc="maps") as bar:

        def show(estimate: Estimate) -> None:
            bar.write(
                f"{estimate.texts} texts: about {_duration(estimate.seconds)} on {device}, {estimate.megabytes:.1f} MB"
            )

        summary = extract(
            samples, teacher, options.out, strict=options.strict, on_estimate=show, on_progress=bar.update
        )
    _print_summary(summary, options.out)
    return DONE


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name!r}, which cannot be used here",
            "cpu, or cuda with such a device",
            "choose another, or leave it out",
        ) from error
    return name


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _print_summary(summary: Summary, out: Path) -> None:
    print(
        f"{summary.records} texts with {summary.words} word maps written to {out} in {_duration(summary.seconds)}; "
        f"{summary.already_there} were already there; {len(summary.dropped)} dropped"
    )
    if summary.reconstruction is not None:
        print(
            f"  null-text led back to latents with a mean squared error of {summary.reconstruction:.3f}, "
            "where 0 is the picture: more null_text_iterations or num_steps bring it down"
        )
    if summary.without_picture:
        print(f"  samples without a picture, which need no map: {summary.without_picture}")
    for drop in summary.dropped[:SHOWN_DROPS]:
        print(f"  dropped {drop.what}: {drop.reason}")
    if len(summary.dropped) > SHOWN_DROPS:
        print(f"  … and {len(summary.dropped) - SHOWN_DROPS} more, all in {out / 'extraction.json'}")


def _check(options: argparse.Namespace) -> int:
    from lavender.evaluation.check import check_model

    found = check_model(options.model, options.data, options.maps, options.limit, options.trust_remote_code)
    print(json.dumps(found, indent=1))
    error = found["gain_standard_error"] or 0.0
    if found["gain"] < 2 * error:
        print("Knowing where a word is saves this model nothing: alignment has little to give here.", file=sys.stderr)
    else:
        saved = f"{found['gain']:.3f} (± {error:.3f}) of {found['loss']['whole']:.3f} nats a token"
        print(f"Knowing where a word is would save at most {saved}.", file=sys.stderr)
    return DONE


def _train(options: argparse.Namespace) -> int:
    from accelerate import PartialState

    from lavender.training.run import read_run, train

    run = read_run(options.run, options.overrides)
    with writing(run.out):
        folder = train(run, options.restart)
    state = PartialState()
    if state.is_main_process:
        print(f"run folder: {folder}")
    # a group's threads must end while Python still runs, and models that wait in cycles of references hold on to it
    gc.collect()
    state.destroy_process_group()
    return DONE


def _eval(options: argparse.Namespace) -> int:
    from lavender.evaluation.runs import evaluate_runs

    with writing(options.run):
        result = evaluate_runs(
            options.run, options.against, options.data, options.maps, options.limit, options.trust_remote_code
        )
    names = list(next(iter(result["arms"].values())))
    print(f"{result['samples']} samples of {result['data']}")
    print("  ".join(["arm".ljust(16), *(name.rjust(14) for name in names)]))
    for arm, scores in result["arms"].items():
        cells = ["–".rjust(14) if scores[name] is None else f"{scores[name]:14.4f}" for name in names]
        print("  ".join([arm.ljust(16), *cells]))
    for note in result["notes"]:
        print(f"note: {note}")
    return DONE


def _study(options: argparse.Namespace) -> int:
    from lavender.world.studies.registry import Scale, run_study

    seeds = tuple(options.seeds) if options.seeds else None
    scale = Scale.of(options.quick, options.split, seeds)
    said = ["lavender", "study", options.name, *(["--quick"] if options.quick else [])]
    said += ["--seeds", *map(str, seeds)] if seeds else []
    said += ["--split", options.split] if options.split else []
    jobs = (os.cpu_count() or 1) if options.jobs is None else options.jobs
    with writing(options.out):
        results = run_study(options.name, options.out, scale, jobs, " ".join(said))
    folder = options.out / options.name
    print(json.dumps(results, indent=1) if options.json else (folder / "page.md").read_text())
    print(f"written: {folder / 'page.md'}, results.json, plot.png", file=sys.stderr)
    return DONE


def _report(options: argparse.Namespace) -> int:
    from lavender.evaluation.runs import report_run

    with writing(options.out or options.run):
        page = report_run(options.run, options.out, options.trust_remote_code)
    print(f"report: {page}")
    return DONE


def _export(options: argparse.Namespace) -> int:
    from lavender.training.run import export_run

    with writing(options.out):
        folder = export_run(options.run, options.out, options.trust_remote_code)
    print(f"model: {folder}")
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    from lavender.evaluation.inspect import as_text, inspect_target

    with writing(options.picture or options.target):
        facts = inspect_target(options.target, options.picture, options.trust_remote_code)
    page = sys.stdout.isatty() and not options.json
    print(as_text(facts) if page else json.dumps(facts, indent=1, ensure_ascii=False))
    return DONE


VERBS = {
    "demo": _demo,
    "extract": _extract,
    "check": _check,
    "train": _train,
    "eval": _eval,
    "study": _study,
    "report": _report,
    "export": _export,
    "inspect": _inspect,
}

if __name__ == "__main__":
    sys.exit(main())
