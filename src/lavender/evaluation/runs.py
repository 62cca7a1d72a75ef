"""Compare a run with its base model and with other runs on the same samples: `lavender eval`."""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavender.config import AlignmentConfig
from lavender.data.samples import Sample, Samples, read_samples, readable
from lavender.data.store import MapStore, SeveralStores
from lavender.errors import DataError
from lavender.evaluation.compare import (
    Judged,
    entropy_tally,
    observe,
    scores_of,
)
from lavender.evaluation.eval_files import EvaluatedSample, write_evaluation
from lavender.evaluation.intervals import ratio
from lavender.evaluation.placement import ON_CPU, Placement
from lavender.evaluation.sampling import left_out, require_limit, spread
from lavender.evaluation.taken import taken
from lavender.files import data_path, expanded
from lavender.students.loading import load_reader
from lavender.training.run_folder import CONFIG, NOT_RECORDED, defaults_before, flat, read_config

LIMIT = 64
"""Samples that are looked at, unless the caller says another number."""


def evaluate_runs(
    run: Path,
    against: Sequence[Path],
    data: Path | None = None,
    maps: str | Path | Sequence[str | Path] | None = None,
    limit: int = LIMIT,
    trust_remote_code: bool = False,
    columns: Mapping[str, str] | None = None,
    place: Placement = ON_CPU,
) -> dict[str, Any]:
    """Score a run, its base model and other models on the same samples. Also writes RUN/eval.json and RUN/eval.jsonl.

    One model is in memory at a time, with the pictures and maps of one batch.

    Args:
        run: run folder, as `lavender train` writes it.
        against: other run folders or checkpoints to compare with.
        data: folder or file of held-out data; None for the data that the run was trained on.
        maps: map store of `data`, or several; None for the run's stores if `data` is None, else no maps.
        limit: the largest number of samples, spread evenly over the data.
        trust_remote_code: run the code that comes with a model.
        columns: names of columns of `data`, as in `read_samples`; None for the run's if `data` is None, else for the
            usual names.
        place: how the models run.

    Returns:
        `arms` (model name → score name → value; see `lavender.evaluation.score_help`), `teacher` (the same of the
        teacher's maps, or None), `samples` (their number), `limit`, `notes` for the reader, `differing_settings`
        (setting → model name → value), `data`, `fingerprint_of_data`, `maps`, `fingerprints_of_maps`, `against`,
        `columns`, the `arguments` given, `device`, `dtype` and `command`.

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
    arm_paths = arms_of(config, run, against)
    readers = [load_reader(path, trust_remote_code) for path in arm_paths.values()]
    place, notes = place.one_dtype(arm_paths, trust_remote_code)
    differing, more = differing_settings(arm_paths)
    paths, on_training_data = None if maps is None else _paths(maps), data is None
    given = _given(run, against, data, paths, limit, columns, trust_remote_code, place)
    data, stores, columns = _sources(config, data, maps, columns)
    read, whole = chosen_samples(data, prompt_of(config, run), columns, limit)
    samples = taken(whole, readers)
    judged = _observe_arms(arm_paths, samples.samples, joined(stores), place, trust_remote_code)
    notes += [*more, *_notes(read, samples, judged, on_training_data)]
    teacher, unmapped = _teacher_scores(samples, joined(stores))
    notes += [f"samples without a map in the store: {unmapped} of {len(samples)}"] if unmapped else []
    facts = {"data": str(data), "fingerprint_of_data": fingerprint_of(whole), "columns": columns}
    result = {**facts, **_identities(stores), "samples": len(samples), **given}
    result |= {"arms": {name: scores_of(found) for name, found in judged.items()}, "teacher": teacher}
    result |= {"notes": notes, "differing_settings": differing}
    write_evaluation(run, result, _lines(samples, judged))
    return result


def chosen_samples(
    data: str | Path, prompt: str, columns: Mapping[str, str] | None, limit: int
) -> tuple[Samples, Samples]:
    """(all samples of the data, those that are looked at and whose pictures can be decoded). Raises DataError."""
    read = read_samples(data, prompt, columns)
    return read, readable(Samples(spread(read.samples, limit)))


def fingerprint_of(samples: Samples) -> str:
    """What identifies the names, the pictures and the texts of the samples that `chosen_samples` returns."""
    lines = [[one.name, ids, one.messages] for one, ids in zip(samples, samples.identities, strict=True)]
    return hashlib.blake2b(json.dumps(lines).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _sources(
    config: Mapping[str, Any],
    data: Path | None,
    maps: str | Path | Sequence[str | Path] | None,
    columns: Mapping[str, str] | None,
) -> tuple[Path, list[MapStore], Mapping[str, str] | None]:
    """Data, map stores and columns: those that are given; without data those of the run."""
    if data is not None:
        return data, open_stores(maps), columns
    stores = open_stores(config["maps"] if maps is None else maps)
    return data_path(config["data"]), stores, config.get("columns") if columns is None else columns


def _identities(stores: Sequence[MapStore]) -> dict[str, list[str] | None]:
    paths, fingerprints = [str(store.path) for store in stores], [store.fingerprint for store in stores]
    return {"maps": paths or None, "fingerprints_of_maps": fingerprints}


def _lines(samples: Samples, judged: Mapping[str, Sequence[Judged]]) -> list[EvaluatedSample]:
    """What every model does on each sample."""
    pairs = enumerate(zip(samples, samples.identities, strict=True))
    return [
        EvaluatedSample(sample.name, ids[0], sample.answers[0], {name: found[index] for name, found in judged.items()})
        for index, (sample, ids) in pairs
    ]


_UNCOUNTED = {
    "answer_nll": "those with an empty answer, or one that no tokenizer takes",
    "content_f1": "those where neither answer nor reference has a content word, such as “yes” and “3”",
}
"""Score of texts → the samples in which it counts nothing."""


def _notes(
    read: Samples, samples: Samples, judged: Mapping[str, Sequence[Judged]], on_training_data: bool
) -> list[str]:
    """Notes on samples that were trained on, that are left out, and in which a score of the texts counts nothing."""
    notes = ["these samples were trained on; pass --data for held-out ones"] if on_training_data else []
    notes += left_out(read)
    notes += [f"left out {drop.what}: {drop.reason}" for drop in samples.dropped]
    for name, found in judged.items():
        for score, what in _UNCOUNTED.items():
            if empty := sum(one.tallies.get(score, (0, 1))[1] == 0 for one in found):
                notes.append(f"{name}: {score} leaves out {empty} of {len(found)} samples, {what}")
    return notes


def _teacher_scores(samples: Samples, store: SeveralStores | None) -> tuple[dict[str, float | None] | None, int]:
    """(the entropy of the teacher's maps of the samples, the number of samples without maps); (None, 0) without them.

    The maps have the grid on which the students' maps are compared, so the entropies can be compared too.
    """
    if store is None:
        return None, 0
    pairs = zip(samples, samples.identities, strict=True)
    found = [store.get(ids[0], sample.answers[0]) for sample, ids in pairs]
    tallies = [entropy_tally(maps) for maps in found if maps is not None]
    return {"entropy": ratio(tallies)}, sum(maps is None for maps in found)


def _given(
    run: Path,
    against: Sequence[Path],
    data: Path | None,
    maps: Sequence[str] | None,
    limit: int,
    columns: Mapping[str, str] | None,
    trust_remote_code: bool,
    place: Placement,
) -> dict[str, Any]:
    """What eval.json has of the arguments, and `command` as a user types it."""
    words = ["lavender", "eval", str(run), *(word for path in against for word in ("--against", str(path)))]
    words += ["--data", str(data)] if data is not None else []
    words += ["--maps", *maps] if maps else []
    words += ["--columns", ",".join(f"{role}={name}" for role, name in columns.items())] if columns else []
    words += ["--limit", str(limit)] + ["--trust-remote-code"] * trust_remote_code
    arguments = {"data": data and str(data), "maps": maps, "limit": limit, "columns": columns}
    paths = [str(path) for path in against]
    facts = {"against": paths, "limit": limit, "arguments": arguments, "device": place.device, "dtype": place.dtype}
    return facts | {"command": shlex.join(words) + place.words()}


def open_stores(maps: str | Path | Sequence[str | Path] | None) -> list[MapStore]:
    return [MapStore.open(path) for path in _paths(maps or ())]


def _paths(maps: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(path) for path in ([maps] if isinstance(maps, (str, Path)) else maps)]


def joined(stores: Sequence[MapStore]) -> SeveralStores | None:
    return SeveralStores(*stores) if stores else None


def prompt_of(config: Mapping[str, Any], run: Path) -> str:
    if "prompt" not in config:
        raise DataError(
            f"{run / CONFIG} without the key `prompt`", "the prompt that the run was trained with", "add it to the file"
        )
    return config["prompt"]


_IGNORED_SETTINGS = ("out", "versions.platform", "later_versions")


def differing_settings(arms: Mapping[str, str | Path]) -> tuple[dict[str, dict[str, Any]], list[str]]:
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
                name: f"{shown_setting(value)} (default, not recorded)" if key in defaults[name] else value
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
        listed = ", ".join(f"{name} {shown_setting(value)}" for name, value in values.items())
        notes.append(f"the runs differ in {key}: {listed}")
    return differing, notes


def shown_setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def arms_of(config: dict[str, Any], run: Path, against: Sequence[Path]) -> dict[str, str | Path]:
    """Name → model path, the base model first and the run last. A name that is taken gets a number."""
    arms: dict[str, str | Path] = {"base": config["model"]}
    for path in (*against, run):
        name = path.resolve().name
        free = (name if number == 1 else f"{name} ({number})" for number in count(1))
        arms[next(one for one in free if one not in arms)] = path
    return arms


def _observe_arms(
    arms: Mapping[str, str | Path],
    samples: Sequence[Sample],
    store: SeveralStores | None,
    place: Placement,
    trust_remote_code: bool,
) -> dict[str, list[Judged]]:
    """What each model does on the samples. One model is in memory at a time."""
    judged: dict[str, list[Judged]] = {}
    with tqdm(total=len(arms) * len(samples), unit="sample", leave=False, disable=None) as bar:
        for name, path in arms.items():
            bar.set_description(name)
            model, processor = place.load(path, trust_remote_code)
            settings: dict[str, Any] = {"batch_size": place.batch_size, "on_progress": bar.update}
            judged[name] = observe(model, processor, samples, store, **settings)
            del model
            gc.collect()  # some models refer to themselves
    return judged
