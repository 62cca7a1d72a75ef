"""`lavender eval` and `lavender report`: runs beside their base, as numbers and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lavender.alignment.collator import SeveralStores
from lavender.config import AlignmentConfig
from lavender.data.images import image_id
from lavender.data.samples import Sample, Samples, read_samples, readable
from lavender.data.store import MapStore
from lavender.errors import DataError
from lavender.evaluation.compare import (
    Observed,
    Phrase,
    left_out,
    observe,
    panels_of,
    readings_of,
    require_limit,
    spread,
)
from lavender.evaluation.report.page import Curve, Report, Table, write_report
from lavender.files import expanded, write_whole
from lavender.students.loading import load_run
from lavender.training.run_folder import CONFIG, METRICS, NOT_RECORDED, flat, read_config

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
    run, against = expanded(run), [expanded(path) for path in against]
    config = read_config(run)
    prompt = _prompt_of(config, run)
    arm_paths = _arms(config, run, against)
    differing, notes = _differing(arm_paths)
    own_data = data is None
    data = Path(config["data"]) if data is None else data
    stores = _opened(config["maps"] if maps is None and own_data else maps)
    store = SeveralStores(*stores) if stores else None
    read = read_samples(data, prompt=prompt)
    samples = readable(Samples(spread(read.samples, limit)))
    arms, _ = _observe_arms(arm_paths, list(samples), store, trust_remote_code)
    notes += ["these samples were trained on; pass --data for held-out ones"] if own_data else []
    notes += left_out(read.samples)
    notes += [f"left out {drop.what}: {drop.reason}" for drop in samples.dropped]
    result = {
        "data": str(data),
        "maps": [str(one.path) for one in stores] or None,
        "samples": len(samples),
        "against": [str(path) for path in against],
        "arms": {name: arm.scores for name, arm in arms.items()},
        "differing_settings": differing,
        "notes": notes,
    }
    write_whole(run / "eval.json", json.dumps(result, indent=1))
    return result


def report_run(run: Path, out: Path | None = None, trust_remote_code: bool = False) -> Path:
    """Write a page about a run: its losses, what `eval` found, and pictures with everyone's maps."""
    run = expanded(run)
    config = read_config(run)
    found = _found_by_eval(run)
    data, maps = (found["data"], found["maps"]) if found else (config["data"], config["maps"])
    stores = _opened(maps)
    store = SeveralStores(*stores) if stores else None
    read = read_samples(data, prompt=_prompt_of(config, run)).samples
    samples = _with_maps(spread(read, len(read)), store)
    against = [Path(path) for path in found["against"]] if found else []
    arm_paths = _arms(config, run, against)
    arms, readings = _observe_arms(arm_paths, samples, store, trust_remote_code)
    tables = []
    if found:
        names = list(next(iter(found["arms"].values())))
        rows = [[arm, *(scores[name] for name in names)] for arm, scores in found["arms"].items()]
        tables.append(Table(f"{found['samples']} samples of {found['data']}", ["arm", *names], rows))
    differing, _ = _differing(arm_paths)
    if differing:
        names = list(next(iter(differing.values())))
        rows: list[list[Any]] = [[key, *map(_shown, values.values())] for key, values in differing.items()]
        tables.append(Table("Settings in which the arms differ", ["setting", *names], rows))
    notes = list(found["notes"]) if found else ["run `lavender eval` for scores", *left_out(read)]
    if any(one.identity.get("teacher") == "world" for one in stores):
        notes.append(
            "The maps come from the built-in teacher, which has only ever seen drawings on textures. On photographs "
            "its maps show that the path works, not where things are."
        )
    teacher = [store.get(image_id(one.image), one.answer) if store is not None else None for one in readings]
    phrases = [[Phrase(word.text, word.start, word.end) for word in one.words] for one in readings]
    panels = panels_of(readings, phrases, teacher, arms, [sample.name for sample in samples])
    align_weight = dict(flat(config)).get("align_weight", NOT_RECORDED)
    lead = f"{config['model']} fine-tuned on {config['data']}, align_weight {align_weight}."
    page = Report(f"Run {run.name}", lead, tables, panels, notes, config, _curves(run))
    out = expanded(out or run / "report.html")
    write_report(page, out)
    return out


def _found_by_eval(run: Path) -> dict[str, Any] | None:
    path = run / "eval.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"data", "maps", "against", "samples", "arms", "notes"} <= found.keys():
        raise DataError(f"{path}, which is damaged", "what `lavender eval` wrote", f"run `lavender eval {run}` again")
    return found


def _opened(maps: str | Path | list[str] | None) -> list[MapStore]:
    return [MapStore.open(path) for path in (maps if isinstance(maps, list) else [maps]) if path is not None]


def _prompt_of(config: Mapping[str, Any], run: Path) -> str:
    if "prompt" not in config:
        raise DataError(f"{run / CONFIG}, which does not say `prompt`", "the question it was trained with", "add it")
    return config["prompt"]


def _differing(arms: Mapping[str, str | Path]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Setting → arm → value for each setting in which two runs differ; and what is to be told of it.

    Settings that a run did not record are never filled in: of those of alignment each is named, others are counted.
    """
    recorded = {
        name: {key.removeprefix("record."): value for key, value in flat(read_config(Path(path)))}
        for name, path in arms.items()
        if (Path(path) / CONFIG).is_file()
    }
    every = list(dict.fromkeys(key for own in recorded.values() for key in own if not key.startswith(_UNTOLD)))
    alignment = {one.name for one in fields(AlignmentConfig)}
    differing: dict[str, dict[str, Any]] = {}
    for key in every:
        values = {name: own.get(key, NOT_RECORDED) for name, own in recorded.items()}
        known = [value for value in values.values() if value != NOT_RECORDED]
        if any(value != known[0] for value in known) or (len(known) < len(values) and key in alignment):
            differing[key] = values
    notes = []
    for name, own in recorded.items():
        if lacking := [key for key in every if key not in own]:
            notes.append(f"{name} did not record {len(lacking)} of its settings, such as {', '.join(lacking[:3])}")
    if without := [str(path) for name, path in arms.items() if name != "base" and name not in recorded]:
        notes.append(f"nothing is known of the settings of {', '.join(without)}")
    for key, values in differing.items():
        notes.append(f"the arms differ in {key}: " + ", ".join(f"{name} {_shown(own)}" for name, own in values.items()))
    return differing, notes


_UNTOLD = ("out", "versions.platform", "later_versions")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _arms(config: dict[str, Any], run: Path, against: list[Path]) -> dict[str, str | Path]:
    """Name → model path, with base first and the run last; paths of the same name are told apart by their numbers."""
    arms: dict[str, str | Path] = {"base": config["model"]}
    for path in (*against, run):
        name = path.resolve().name
        arms[name if name not in arms else f"{name} ({len(arms)})"] = path
    return arms


def _observe_arms(
    arms: dict[str, str | Path], samples: list[Sample], store: SeveralStores | None, trust_remote_code: bool
):
    readings = readings_of(samples, store)
    observed: dict[str, Observed] = {}
    for name, path in arms.items():
        model, processor = load_run(path, trust_remote_code=trust_remote_code)
        observed[name] = observe(model, processor, readings, store)
    return observed, readings


def _with_maps(samples: tuple[Sample, ...], store: SeveralStores | None) -> list[Sample]:
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
    path = run / METRICS
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        got = f"{path}, of which a line is damaged: {error}"
        raise DataError(got, "a line of JSON for each logged step", "remove the line, or train again") from error
    curves = []
    for key, label in (("vlm_loss", "L_VLM, nats a token"), ("attention_loss", "L_att, mean square")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            curves.append(Curve(label, "step", label, {run.name: points}))
    return curves
