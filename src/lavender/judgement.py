"""`lavender eval` and `lavender report`: runs beside their base, as numbers and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lavender.comparison import Observed, Phrase, left_out, observe, panels_of, readings_of, require_limit, spread
from lavender.config import AlignmentConfig
from lavender.data import Sample, Samples, read_samples, readable
from lavender.errors import ConfigError, DataError
from lavender.images import image_id
from lavender.loading import load_run
from lavender.report import Curve, Report, Table, write_report
from lavender.store import MapStore

NUM_PANELS = 6


def evaluate_runs(
    run: Path,
    against: list[Path],
    data: Path | None = None,
    maps: Path | None = None,
    limit: int = 64,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Scores of the run, of its base and of the runs beside it, on the same samples; also in RUN/eval.json."""
    require_limit(limit)
    config = _config_of(run)
    own_data = data is None
    data = Path(config["data"]) if data is None else data
    maps = (Path(config["maps"]) if own_data else None) if maps is None else maps
    store = MapStore.open(maps) if maps is not None else None
    read = read_samples(data, prompt=config["prompt"])
    samples = readable(Samples(spread(read.samples, limit)))
    arms, _ = _observe_arms(_arms(config, run, against), list(samples), store, trust_remote_code)
    notes = ["these samples were trained on; pass --data for held-out ones"] if own_data else []
    notes += left_out(read.samples)
    notes += [f"left out {drop.what}: {drop.reason}" for drop in samples.dropped]
    result = {
        "data": str(data), "maps": str(maps) if maps else None, "samples": len(samples),
        "against": [str(path) for path in against],
        "arms": {name: arm.scores for name, arm in arms.items()}, "notes": notes,
    }  # fmt: skip
    (run / "eval.json").write_text(json.dumps(result, indent=1))
    return result


def report_run(run: Path, out: Path | None = None, trust_remote_code: bool = False) -> Path:
    """Write a page about a run: its losses, what `eval` found, and pictures with everyone's maps."""
    config = _config_of(run)
    found = json.loads((run / "eval.json").read_text()) if (run / "eval.json").is_file() else None
    data, maps = (found["data"], found["maps"]) if found else (config["data"], config["maps"])
    store = MapStore.open(maps) if maps else None
    read = read_samples(data, prompt=config["prompt"]).samples
    samples = _with_maps(spread(read, len(read)), store)
    against = [Path(path) for path in found["against"]] if found else []
    arms, readings = _observe_arms(_arms(config, run, against), samples, store, trust_remote_code)
    tables = []
    if found:
        names = list(next(iter(found["arms"].values())))
        rows = [[arm, *(scores[name] for name in names)] for arm, scores in found["arms"].items()]
        tables.append(Table(f"{found['samples']} samples of {found['data']}", ["arm", *names], rows))
    notes = list(found["notes"]) if found else ["run `lavender eval` for scores", *left_out(read)]
    if store is not None and store.identity.get("teacher") == "world":
        notes.append(
            "The maps come from the built-in teacher, which has only ever seen drawings on textures. On photographs "
            "its maps show that the path works, not where things are."
        )
    teacher = [store.get(image_id(one.image), one.answer) if store is not None else None for one in readings]
    phrases = [[Phrase(word.text, word.start, word.end) for word in one.words] for one in readings]
    panels = panels_of(readings, phrases, teacher, arms, [sample.name for sample in samples])
    align_weight = config["training"].get("align_weight", AlignmentConfig.align_weight)
    lead = f"{config['model']} fine-tuned on {config['data']}, align_weight {align_weight}."
    page = Report(f"Run {run.name}", lead, tables, panels, notes, config, _curves(run))
    out = out or run / "report.html"
    write_report(page, out)
    return out


def _config_of(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"no config.yaml in {run}", "a run folder that `lavender train` wrote", "name such a folder")
    return yaml.safe_load(path.read_text())


def _arms(config: dict[str, Any], run: Path, against: list[Path]) -> dict[str, str | Path]:
    """Name → model path, with base first and the run last; paths of the same name are told apart by their numbers."""
    arms: dict[str, str | Path] = {"base": config["model"]}
    for path in (*against, run):
        name = path.resolve().name
        arms[name if name not in arms else f"{name} ({len(arms)})"] = path
    return arms


def _observe_arms(arms: dict[str, str | Path], samples: list[Sample], store: MapStore | None, trust_remote_code: bool):
    readings = readings_of(samples, store)
    observed: dict[str, Observed] = {}
    for name, path in arms.items():
        model, processor = load_run(path, trust_remote_code=trust_remote_code)
        observed[name] = observe(model, processor, readings, store)
    return observed, readings


def _with_maps(samples: tuple[Sample, ...], store: MapStore | None) -> list[Sample]:
    """The first samples whose first answer has a mapped word."""
    if store is None:
        return list(readable(Samples(samples[:NUM_PANELS])))
    kept = []
    for sample in samples:
        try:
            (image,) = sample.load()
            maps = store.get(image_id(image), sample.answers[0])
        except DataError:  # training dropped it too, and said so
            continue
        if maps is not None and maps.words:
            kept.append(sample)
        if len(kept) == NUM_PANELS:
            break
    return kept


def _curves(run: Path) -> list[Curve]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = []
    for key, label in (("vlm_loss", "L_VLM, nats a token"), ("attention_loss", "L_att, mean square")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            curves.append(Curve(label, "step", label, {run.name: points}))
    return curves
