"""The page about a run: `lavender report`. What all of its models do on the same samples, and where they look."""

from __future__ import annotations

import gc
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lavender.data.samples import Sample, read_samples
from lavender.data.store import MapStore, SeveralStores
from lavender.drawing import downscaled
from lavender.evaluation.chosen import Chosen, choose, rule
from lavender.evaluation.compare import Observed, Phrase, panels_of, readings_of
from lavender.evaluation.eval_files import SCORES, EvaluatedSample, Evaluation, read_evaluation
from lavender.evaluation.placement import ON_CPU, Placement
from lavender.evaluation.report.page import Report, write_report
from lavender.evaluation.report.panels import Panel
from lavender.evaluation.report.pdf import write_figures
from lavender.evaluation.run_tables import curves_of, differences_of, interval_rows, tables_of
from lavender.evaluation.runs import (
    arms_of,
    chosen_samples,
    differing_settings,
    evaluate_runs,
    fingerprint_of,
    joined,
    open_stores,
    prompt_of,
)
from lavender.files import expanded
from lavender.maps import WordMaps
from lavender.students.word_maps import AnsweredPicture, student_maps
from lavender.training.run_folder import CONFIG, COVERAGE, NOT_RECORDED, flat, read_config

NUM_PICTURES = 12
MAX_WORDS = 12
"""Words of a picture whose maps are shown."""
PAGE = "report.html"


@dataclass(frozen=True)
class Options:
    """What a report shows. Each of None is what RUN/eval.json has, or else the default of `lavender eval`.

    Attributes:
        against, data, maps, limit, columns: as in `lavender.evaluation.runs.evaluate_runs`.
        num_pictures: how many pictures to show.
        by: the score by which they are chosen, one of `lavender.evaluation.chosen.BY`.
        place: how the models run.
        same_dtype: whether scores of another type than `place` has are made again; else those that are there are kept.
    """

    against: tuple[Path, ...] | None = None
    data: Path | None = None
    maps: Sequence[Path] | None = None
    limit: int | None = None
    columns: Mapping[str, str] | None = None
    num_pictures: int = NUM_PICTURES
    by: str = "answer_nll"
    place: Placement = ON_CPU
    same_dtype: bool = False


def report_run(
    run: Path,
    out: Path | None = None,
    options: Options = Options(),
    trust_remote_code: bool = False,
    teacher_notes: Mapping[str, str] = MappingProxyType({}),
    pdf: Path | None = None,
) -> Path:
    """Write a page about a run, its base model and other runs. docs/report.md says what it has.

    Models are scored as `evaluate_runs` does, unless RUN/eval.json has these scores already.

    Args:
        run: run folder, as `lavender train` writes it.
        out: path of the page; None for RUN/report.html.
        options: what it shows.
        trust_remote_code: run the code that comes with a model.
        teacher_notes: teacher name, as map stores record it → a note for pages that show this teacher's maps.
        pdf: path of a PDF with the figures; None for none.

    Returns:
        The path of the page.

    Raises:
        ConfigError: an option is out of its range.
        DataError: no run in the folder, damaged scores or metrics, or data that cannot be read.
        ModelError: a model is missing or damaged.
        StoreError: a map store is missing or damaged.
    """
    run = expanded(run)
    config = read_config(run)
    choose([], "", "", options.by, options.num_pictures)  # checks both before hours of work
    scored, samples, notes = _evaluated(run, config, options, trust_remote_code)
    arms = arms_of(config, run, [Path(path) for path in scored["against"]])
    stores = open_stores(scored["maps"])
    first, second = _compared(arms)
    chosen, choice = choose(samples, first, second, options.by, options.num_pictures)
    shown = _samples_of(scored, samples, prompt_of(config, run), chosen)
    lines = [samples[one.index] for one in chosen]
    seen, dropped = _seen(arms, shown, lines, joined(stores), options.place, trust_remote_code)
    curves, without = curves_of(arms)
    notes += [*scored["notes"], *without, *dropped, *_notes_on(stores, teacher_notes)]
    differences = differences_of(samples, arms)
    page = Report(
        title=f"Run {run.name}",
        lead=_lead(config, arms),
        tables=tables_of(scored, samples, differences, differing_settings(arms)[0]),
        panels=_with_reasons(seen, chosen, (first, second), options.by),
        notes=notes,
        settings=config,
        curves=curves,
        pictures_note=rule(first, second, options.by, len(chosen), choice, len(samples)),
        choose_words=True,
        commands=_commands(arms, run, scored, options, trust_remote_code),
    )
    out = expanded(out or run / PAGE)
    write_report(page, out)
    if pdf is not None:
        write_figures(expanded(pdf), page.title, interval_rows(differences), curves, page.panels)
    return out


def _notes_on(stores: Sequence[MapStore], teacher_notes: Mapping[str, str]) -> list[str]:
    """What readers must know of the teacher's maps, or that there are none."""
    teachers = {str(store.identity.get("teacher")) for store in stores}
    missing = [] if stores else ["no map store: no maps of a teacher, and no map_agreement; pass --maps"]
    return missing + [note for teacher, note in teacher_notes.items() if teacher in teachers]


def _compared(arms: Mapping[str, Any]) -> tuple[str, str]:
    """The run, and what its pictures are compared with: the first of `against`, else the base."""
    names = list(arms)
    return names[-1], names[1] if len(names) > 2 else names[0]


def _lead(config: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    settings = dict(flat(config))
    loss, weight = (settings.get(name, NOT_RECORDED) for name in ("attention_loss", "align_weight"))
    aligned = "without alignment (align_weight 0)" if weight == 0 else f"attention_loss {loss}, align_weight {weight}"
    beside = f" Beside it: {', '.join(list(arms)[:-1])}."
    return f"{config['model']} fine-tuned on {config['data']}, {aligned}.{beside}"


def _evaluated(
    run: Path, config: Mapping[str, Any], options: Options, trust_remote_code: bool
) -> tuple[dict[str, Any], list[EvaluatedSample], list[str]]:
    """The scores of RUN/eval.json with their samples, if they are those asked for; else new ones. And notes."""
    found = read_evaluation(run)
    reason = "the run had none" if found is None else _reason_to_score(found, run, config, options, trust_remote_code)
    if found is not None and found.samples is not None and not reason:
        return found.scored, found.samples, []
    old = found.scored if found is not None else None
    arguments = _arguments(old, config) if old is not None and options.data is None else {}
    given = {"data": options.data, "maps": options.maps, "limit": options.limit, "columns": options.columns}
    arguments |= {name: value for name, value in given.items() if value is not None}
    against = options.against if options.against is not None else (old or {}).get("against", ())
    arguments |= {"trust_remote_code": trust_remote_code, "place": options.place}
    evaluate_runs(run, [Path(path) for path in against], **arguments)
    new = read_evaluation(run)
    assert new is not None
    assert new.samples is not None
    return new.scored, new.samples, [f"these scores were computed by this command: {reason}"]


def _arguments(scored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `evaluate_runs` that gave these scores, without those that were left out."""
    if "arguments" in scored:
        given = scored["arguments"]
    elif scored["data"] == config.get("data"):  # of an earlier version
        given = {"limit": scored["samples"]}
    else:
        given = {
            "data": scored["data"],
            "maps": scored["maps"],
            "columns": scored.get("columns"),
            "limit": scored["samples"],
        }
    return {name: Path(value) if name == "data" else value for name, value in given.items() if value is not None}


def _reason_to_score(
    found: Evaluation, run: Path, config: Mapping[str, Any], options: Options, trust_remote_code: bool = False
) -> str:
    """Why the scores in RUN/eval.json are not those of the page; "" if they are."""
    scored = found.scored
    if found.samples is None:
        return "those of an earlier version have no scores per sample"
    asked = {
        "data": options.data,
        "maps": options.maps,
        "limit": options.limit,
        "columns": options.columns,
        "against": None if options.against is None else [expanded(path) for path in options.against],
    }
    plain = json.loads(json.dumps(asked, default=str))
    if changed := [name for name, value in plain.items() if value is not None and value != scored.get(name)]:
        return f"those in {SCORES} are of other {' and '.join(changed)}"
    arms = arms_of(dict(config), run, [Path(path) for path in scored["against"]])
    if list(arms) != list(scored["arms"]):
        return f"those in {SCORES} are of other models"
    dtype = options.place.one_dtype(arms, trust_remote_code)[0].dtype if options.same_dtype else None
    if dtype not in (None, scored.get("dtype", "float32")):  # an earlier version had float32 alone
        return f"those in {SCORES} are of other dtype"
    for path, fingerprint in zip(scored["maps"] or (), _fingerprints(scored), strict=True):
        if not fingerprint:
            return f"those in {SCORES} do not say of which maps they are, being of an earlier version"
        if fingerprint != MapStore.open(path).fingerprint:
            return f"the map store {path} has changed since {SCORES} was written"
    made = (run / SCORES).stat().st_mtime
    trained = [Path(path) / COVERAGE for path in arms.values()]
    if any(path.is_file() and path.stat().st_mtime > made for path in trained):
        return f"a run was trained after {SCORES} was written"
    return _change_of_data(scored, prompt_of(config, run))


def _change_of_data(scored: Mapping[str, Any], prompt: str) -> str:
    """Why the scores are not those of the samples that would be looked at now; "" if they are."""
    if "fingerprint_of_data" not in scored:
        return f"those in {SCORES} do not say of which samples they are, being of an earlier version"
    _, samples = chosen_samples(scored["data"], prompt, scored.get("columns"), scored["limit"])
    same = fingerprint_of(samples) == scored["fingerprint_of_data"]
    return "" if same else f"the data {scored['data']} have changed since {SCORES} was written"


def _fingerprints(scored: Mapping[str, Any]) -> list[str]:
    """Of each map store of some scores, what it was when they were made; "" if they do not say."""
    return scored.get("fingerprints_of_maps", [""] * len(scored["maps"] or ()))


def _samples_of(
    scored: Mapping[str, Any], samples: Sequence[EvaluatedSample], prompt: str, chosen: Sequence[Chosen]
) -> list[Sample]:
    """The chosen samples of the data, in the order of `chosen`."""
    wanted = {samples[one.index].sample for one in chosen}
    read = read_samples(scored["data"], prompt, scored.get("columns"))
    found = {sample.name: sample for sample in read if sample.name in wanted}
    return [found[samples[one.index].sample] for one in chosen]


def _seen(
    arms: Mapping[str, str | Path],
    shown: Sequence[Sample],
    lines: Sequence[EvaluatedSample],
    store: SeveralStores | None,
    place: Placement,
    trust_remote_code: bool,
) -> tuple[list[Panel], list[str]]:
    """A panel per sample with the maps of all models and of the teacher, and notes on words without a map.

    One model is in memory at a time, and the pictures of one batch; the panels have reduced pictures.
    """
    if not shown:
        return [], []
    observed, notes, place = {}, [], place.one_dtype(arms, trust_remote_code)[0]
    for name, path in arms.items():
        maps = list(_maps_of(place.load(path, trust_remote_code), shown, store, place.batch_size))
        gc.collect()  # some models refer to themselves
        observed[name] = Observed([line.judged[name].answer for line in lines], maps)
        dropped = Counter(drop.reason for one in maps for drop in one.dropped)
        notes += [f"{name}: pictures shown with a {reason}: {count}" for reason, count in dropped.items()]
    readings: list[AnsweredPicture] = []
    teacher: list[WordMaps | None] = []
    for reading, maps in readings_of(shown, store):
        readings.append(replace(reading, image=downscaled(reading.image)))
        teacher.append(maps)
    phrases = [[Phrase(word.text, word.start, word.end) for word in one.words[:MAX_WORDS]] for one in readings]
    if longer := sum(len(reading.words) > MAX_WORDS for reading in readings):
        notes.append(f"more than {MAX_WORDS} words have maps in {longer} of the pictures; those of the first are shown")
    return panels_of(readings, phrases, teacher, observed, [line.sample for line in lines]), notes


def _with_reasons(panels: Sequence[Panel], chosen: Sequence[Chosen], models: tuple[str, str], by: str) -> list[Panel]:
    """The panels under the headings of their groups, each with the scores by which it was chosen."""
    found = []
    for panel, one in zip(panels, chosen, strict=True):
        scores = ", ".join(f"{name} {value:.3f}" for name, value in zip(models, one.values, strict=True))
        outcome = "better" if one.gain > 0 else "worse"
        told = f"{models[0]} is {abs(one.gain):.3f} {outcome}" if one.gain else "both are equal"
        found.append(replace(panel, note=f"{by}: {scores}; {told}.", group=one.group))
    return found


def _maps_of(
    loaded: tuple[Any, Any], shown: Sequence[Sample], store: SeveralStores | None, batch_size: int
) -> Iterator[WordMaps]:
    """Where a model looks in each of the samples, batch by batch. `loaded` is what `load_run` returns."""
    model, processor = loaded
    grid = store.grid if store is not None else (32, 32)
    for start in range(0, len(shown), batch_size):
        readings = [reading for reading, _ in readings_of(shown[start : start + batch_size], store)]
        yield from student_maps(model, processor, readings, grid, batch_size)


def _commands(
    arms: Mapping[str, str | Path], run: Path, scored: Mapping[str, Any], options: Options, trust_remote_code: bool
) -> list[str]:
    """What trains the runs again, and what makes the scores and the page of these runs again."""
    trained = [Path(path) for path in arms.values() if (Path(path) / CONFIG).is_file()]
    commands = [shlex.join(["lavender", "train", str(path / CONFIG), "--set", f"out={path}-again"]) for path in trained]
    shown = ["--by", options.by, "--pictures", str(options.num_pictures)] + ["--trust-remote-code"] * trust_remote_code
    page = shlex.join(["lavender", "report", str(run), *shown]) + options.place.words()
    return [*commands, scored["command"], page]
