"""Compare a run with its base model and other runs: scores (`lavender eval`) and an HTML page (`lavender report`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lavender.config import AlignmentConfig
from lavender.data.images import image_id
from lavender.data.samples import Sample, Samples, read_samples, readable
from lavender.data.store import MapStore, SeveralStores
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
from lavender.files import data_path, expanded, write_whole
from lavender.students.loading import load_run
from lavender.students.word_maps import AnsweredPicture
from lavender.training.run_folder import CONFIG, METRICS, NOT_RECORDED, defaults_before, flat, read_config

NUM_PANELS = 6


def evaluate_runs(
    run: Path,
    against: Sequence[Path],
    data: Path | None = None,
    maps: str | Path | Sequence[str | Path] | None = None,
    limit: int = 64,
    trust_remote_code: bool = False,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score a run, its base model and other models on the same samples. Also writes the result to RUN/eval.json.

    Args:
        run: run folder, as `lavender train` writes it.
        against: other run folders or checkpoints to compare with.
        data: folder or file of held-out data; None for the data that the run was trained on.
        maps: map store of `data`, or several; None for the run's stores if `data` is None, else no maps.
        limit: the largest number of samples, spread evenly over the data.
        trust_remote_code: run the code that comes with a model.
        columns: names of columns of `data`, as in `read_samples`; None for the run's if `data` is None, else for the
            usual names.

    Returns:
        `arms` (model name → score name → value; see `Observed`), `samples` (their number), `notes` for the reader,
        `differing_settings` (setting → model name → value), the paths `data`, `maps` and `against`, and `columns`.

    Raises:
        ConfigError: `limit` is below 1.
        DataError: no run in the folder, or no sample that can be scored.
        ModelError: a model is missing or damaged.
        NotFiniteError: a model's loss is NaN or infinite.
        StoreError: a map store is missing or damaged.
    """
    require_limit(limit)
    run, against = expanded(run), [expanded(path) for path in against]
    config = read_config(run)
    prompt = _prompt_of(config, run)
    arm_paths = _arms(config, run, against)
    differing, notes = _differing_settings(arm_paths)
    on_training_data = data is None
    data = data_path(config["data"]) if data is None else data
    stores = _open_stores(config["maps"] if maps is None and on_training_data else maps)
    columns = config.get("columns") if columns is None and on_training_data else columns
    read = read_samples(data, prompt, columns)
    samples = readable(Samples(spread(read.samples, limit)))
    arms, _ = _observe_arms(arm_paths, list(samples), _joined(stores), trust_remote_code)
    notes += ["these samples were trained on; pass --data for held-out ones"] if on_training_data else []
    notes += left_out(read.samples)
    notes += [f"left out {drop.what}: {drop.reason}" for drop in samples.dropped]
    result = {
        "data": str(data),
        "columns": columns,
        "maps": [str(store.path) for store in stores] or None,
        "samples": len(samples),
        "against": [str(path) for path in against],
        "arms": {name: arm.scores for name, arm in arms.items()},
        "differing_settings": differing,
        "notes": notes,
    }
    write_whole(run / "eval.json", json.dumps(result, indent=1))
    return result


def report_run(
    run: Path,
    out: Path | None = None,
    trust_remote_code: bool = False,
    teacher_notes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an HTML page about a run: losses, scores of `evaluate_runs` if it was called, and pictures with maps.

    Args:
        run: run folder, as `lavender train` writes it.
        out: path of the page; None for RUN/report.html.
        trust_remote_code: run the code that comes with a model.
        teacher_notes: teacher name, as map stores record it → a note for pages that show this teacher's maps.

    Returns:
        The path of the page.

    Raises:
        DataError: no run in the folder, or a damaged eval.json or metrics.jsonl.
        ModelError: a model is missing or damaged.
        StoreError: a map store is missing or damaged.
    """
    run = expanded(run)
    config = read_config(run)
    scored = _read_scores(run)
    data, maps = (scored["data"], scored["maps"]) if scored else (config["data"], config["maps"])
    stores = _open_stores(maps)
    store = _joined(stores)
    columns = (scored or config).get("columns")
    read = read_samples(data, _prompt_of(config, run), columns).samples
    samples = _with_maps(spread(read, len(read)), store)
    arm_paths = _arms(config, run, [Path(path) for path in scored["against"]] if scored else [])
    arms, readings = _observe_arms(arm_paths, samples, store, trust_remote_code)
    notes = list(scored["notes"]) if scored else ["run `lavender eval` for scores", *left_out(read)]
    teachers = {str(opened.identity.get("teacher")) for opened in stores}
    notes += [note for teacher, note in teacher_notes.items() if teacher in teachers]
    teacher_maps = [
        None if store is None else store.get(image_id(reading.image), reading.answer) for reading in readings
    ]
    phrases = [[Phrase(word.text, word.start, word.end) for word in reading.words] for reading in readings]
    settings = dict(flat(config))
    loss, weight = (settings.get(name, NOT_RECORDED) for name in ("attention_loss", "align_weight"))
    aligned = "without alignment (align_weight 0)" if weight == 0 else f"attention_loss {loss}, align_weight {weight}"
    page = Report(
        title=f"Run {run.name}",
        lead=f"{config['model']} fine-tuned on {config['data']}, {aligned}.",
        tables=_tables(scored, arm_paths),
        panels=panels_of(readings, phrases, teacher_maps, arms, [sample.name for sample in samples]),
        notes=notes,
        settings=config,
        curves=_curves(run),
    )
    out = expanded(out or run / "report.html")
    write_report(page, out)
    return out


def _tables(scored: Mapping[str, Any] | None, arm_paths: Mapping[str, str | Path]) -> list[Table]:
    """The scores of `eval`, and the settings in which the models differ."""
    tables = []
    if scored:
        names = list(next(iter(scored["arms"].values())))
        rows: list[list[Any]] = [[arm, *(scores[name] for name in names)] for arm, scores in scored["arms"].items()]
        tables.append(Table(f"{scored['samples']} samples of {scored['data']}", ["model", *names], rows))
    differing, _ = _differing_settings(arm_paths)
    if differing:
        names = list(next(iter(differing.values())))
        rows = [[key, *map(_shown, values.values())] for key, values in differing.items()]
        tables.append(Table("Settings that differ", ["setting", *names], rows))
    return tables


def _read_scores(run: Path) -> dict[str, Any] | None:
    """What `evaluate_runs` wrote to RUN/eval.json; None if there is no such file."""
    path = run / "eval.json"
    if not path.is_file():
        return None
    try:
        scored = json.loads(path.read_text())
    except ValueError:
        scored = None
    if not isinstance(scored, dict) or not {"data", "maps", "against", "samples", "arms", "notes"} <= scored.keys():
        raise DataError(f"{path}, which is damaged", "what `lavender eval` wrote", f"run `lavender eval {run}` again")
    return scored


def _open_stores(maps: str | Path | Sequence[str | Path] | None) -> list[MapStore]:
    return [MapStore.open(path) for path in ([maps] if isinstance(maps, (str, Path)) else maps or ())]


def _joined(stores: Sequence[MapStore]) -> SeveralStores | None:
    return SeveralStores(*stores) if stores else None


def _prompt_of(config: Mapping[str, Any], run: Path) -> str:
    if "prompt" not in config:
        raise DataError(
            f"{run / CONFIG} without the key `prompt`", "the prompt that the run was trained with", "add it to the file"
        )
    return config["prompt"]


_IGNORED_SETTINGS = ("out", "versions.platform", "later_versions")


def _differing_settings(arms: Mapping[str, str | Path]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(setting → model name → value for each setting in which two runs differ, notes about them).

    A setting that a run did not record, because it is from before the setting, has its default, and is named as such.
    A run of the first versions did not record all of its settings, and these never get today's default: the run may be
    older than the default. Settings of alignment that it lacks count as different; the others are only counted in a
    note.
    """
    configs = {name: read_config(Path(path)) for name, path in arms.items() if (Path(path) / CONFIG).is_file()}
    recorded = {
        name: {key.removeprefix("record."): value for key, value in flat(config)} for name, config in configs.items()
    }
    defaults = {name: defaults_before(config) for name, config in configs.items()}
    all_keys = dict.fromkeys(key for settings in recorded.values() for key in settings)
    keys = [key for key in all_keys if not key.startswith(_IGNORED_SETTINGS)]
    alignment = {setting.name for setting in fields(AlignmentConfig)}
    differing: dict[str, dict[str, Any]] = {}
    for key in keys:
        values = {name: (defaults[name] | settings).get(key, NOT_RECORDED) for name, settings in recorded.items()}
        known = [value for value in values.values() if value != NOT_RECORDED]
        if any(value != known[0] for value in known) or (len(known) < len(values) and key in alignment):
            differing[key] = {
                name: f"{_shown(value)} (default, not recorded)" if key in defaults[name] else value
                for name, value in values.items()
            }
    notes = []
    for name, settings in recorded.items():
        missing = [key for key in keys if key not in settings]
        if since := [key for key in missing if key in defaults[name]]:
            notes.append(f"{name} is from before {', '.join(since)}; the default counts")
        if others := [key for key in missing if key not in defaults[name]]:
            notes.append(f"{name} did not record {len(others)} of its settings, such as {', '.join(others[:3])}")
    if unknown := [str(path) for name, path in arms.items() if name != "base" and name not in recorded]:
        notes.append(f"no settings are recorded in {', '.join(unknown)}")
    for key, values in differing.items():
        listed = ", ".join(f"{name} {_shown(value)}" for name, value in values.items())
        notes.append(f"the runs differ in {key}: {listed}")
    return differing, notes


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _arms(config: dict[str, Any], run: Path, against: Sequence[Path]) -> dict[str, str | Path]:
    """Name → model path, the base model first and the run last. A name that is taken gets a number."""
    arms: dict[str, str | Path] = {"base": config["model"]}
    for path in (*against, run):
        name = path.resolve().name
        arms[name if name not in arms else f"{name} ({len(arms)})"] = path
    return arms


def _observe_arms(
    arms: dict[str, str | Path], samples: list[Sample], store: SeveralStores | None, trust_remote_code: bool
) -> tuple[dict[str, Observed], list[AnsweredPicture]]:
    """What each model does on the samples; and the samples as readings. One model is in memory at a time."""
    readings = readings_of(samples, store)
    observed: dict[str, Observed] = {}
    for name, path in arms.items():
        model, processor = load_run(path, trust_remote_code=trust_remote_code)
        observed[name] = observe(model, processor, readings, store)
    return observed, readings


def _with_maps(samples: tuple[Sample, ...], store: SeveralStores | None) -> list[Sample]:
    """The first `NUM_PANELS` samples whose first answer has a mapped word; without a store, the first readable ones."""
    if store is None:
        return list(readable(Samples(samples[:NUM_PANELS])))
    kept = []
    for sample in samples:
        try:
            (image,) = sample.load()
            maps = store.get(image_id(image), sample.answers[0])
        except DataError:  # training dropped and reported it too
            continue
        if maps is not None and maps.words:
            kept.append(sample)
        if len(kept) == NUM_PANELS:
            break
    return kept


def _curves(run: Path) -> list[Curve]:
    """The losses of training over the steps, as RUN/metrics.jsonl has them."""
    path = run / METRICS
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise DataError(
            f"{path} with a damaged line: {error}", "one JSON object per line", "delete the line, or train again"
        ) from error
    curves = []
    for key, label in (("vlm_loss", "L_VLM, nats per token"), ("attention_loss", "L_att")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            curves.append(Curve(label, "step", label, {run.name: points}))
    return curves
