"""HTML pages and a plot of what `lavender data inspect` and `overlap` found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image

from lavender.data.conversations import text_of
from lavender.data.samples import Sample
from lavender.evaluation.data_checks.inspect import FEWEST, Inspection
from lavender.evaluation.data_checks.overlap import (
    FEWEST_WORDS,
    FIGURES,
    NAMED,
    BenchmarkOverlap,
    Match,
    Overlap,
    Side,
    kind_of,
)
from lavender.evaluation.report.page import Cell, Curve, Report, Table, write_report
from lavender.evaluation.report.panels import Panel
from lavender.evaluation.sampling import evenly
from lavender.files import write_whole

_ROWS = 100  # of a table of rows; the JSON has all
_NAMES = 5  # of training samples in a row
_PAIRS = 12  # of pictures on the page of an overlap
_SIDE = 256  # pixels of a picture's longer side in a pair
_MAX_TEXT = 600  # characters of a text that is shown
_SPREAD = ("min", "median", "mean", "p95", "max")


def inspection_page(inspection: Inspection) -> Report:
    """The page of an inspection."""
    facts = inspection.facts
    broken = facts["broken"]
    lead = f"{facts['samples']:,} samples, {facts['duplicates']['distinct_pictures']:,} distinct pictures. "
    lead += f"{len(broken):,} rows or pictures are broken." if broken else "Nothing is broken."
    tables = [_counts(facts), _lengths(facts), _languages(facts)]
    if broken:
        note = f"The first {_ROWS:,} of {len(broken):,}." if len(broken) > _ROWS else ""
        rows: list[list[Cell]] = [[row["what"], row["reason"]] for row in broken[:_ROWS]]
        tables.insert(1, Table("Broken", ["row", "reason"], rows, note))
    return Report(
        title=f"Data: {Path(facts['data']).name}",
        lead=lead,
        tables=tables,
        panels=[_sample_panel(sample) for sample in inspection.shown],
        notes=_notes(facts),
        settings={"data": facts["data"], "clip_tokens": facts["clip_tokens"]["counted_by"]},
        curves=[_histogram(name, values) for name, values in inspection.lengths.items() if values],
    )


def _counts(facts: dict[str, Any]) -> Table:
    duplicates = facts["duplicates"]
    rows: list[list[Cell]] = [
        ["samples", facts["samples"]],
        ["samples without a picture", facts["text_only"]],
        ["distinct pictures", duplicates["distinct_pictures"]],
        ["broken rows and pictures", len(facts["broken"])],
        ["pictures outside the folder of the data", facts["outside_the_folder"]],
        ["pictures stored again, by their pixels", duplicates["pictures_stored_again"]],
        ["samples that repeat an earlier one", duplicates["repeated_samples"]],
    ]
    if maps := facts["maps"]:
        rows += [
            [f"pairs of a picture and a text ({maps['texts']})", maps["pairs"]],
            ["of these, pairs with word maps", maps["with_maps"]],
            ["share with word maps", maps["share_with_maps"]],
        ]
    return Table("Counts", ["what", "number"], rows)


def _lengths(facts: dict[str, Any]) -> Table:
    sizes = facts["picture_sizes"]
    spreads = {
        "words per answer": facts["words"]["per_answer"],
        "words per question": facts["words"]["per_question"],
        "CLIP tokens per answer": facts["clip_tokens"],
        "student tokens per sample": facts["student_tokens"] or {},
        "picture height in pixels": sizes["height"],
        "picture width in pixels": sizes["width"],
        "picture width ÷ height": sizes["width_by_height"],
    }
    rows: list[list[Cell]] = [
        [name, *(_short(spread[key]) for key in _SPREAD), spread.get("limit"), spread.get("longer")]
        for name, spread in spreads.items()
        if "min" in spread
    ]
    return Table("Lengths and sizes", ["what", "least", "median", "mean", "95 %", "most", "limit", "over it"], rows)


def _short(value: float) -> Cell:
    return int(value) if float(value).is_integer() else float(value)


def _languages(facts: dict[str, Any]) -> Table:
    rows: list[list[Cell]] = [[language, number] for language, number in facts["languages"]["samples"].items()]
    note = "ISO 639 codes, from the answers. Short texts are often uncertain."
    return Table("Languages", ["language", "samples"], rows, note)


def _notes(facts: dict[str, Any]) -> list[str]:
    clip, student, others = facts["clip_tokens"], facts["student_tokens"], facts["languages"]["not_english"]
    notes = []
    if clip["longer"]:
        notes.append(
            f"{clip['longer']:,} answers are longer than the {clip['limit']} tokens of the teacher's text encoder. "
            "`lavender extract` splits them into windows."
        )
    if clip["counted_by"] == FEWEST:
        notes.append("CLIP's tokens are the fewest possible: one per word, digit and punctuation mark.")
    if student and student["longer"]:
        notes.append(f"{student['longer']:,} samples are longer than the student's {student['limit']:,} tokens.")
    if others:
        notes.append(f"{others:,} samples seem not to be in English. The tagger that finds words knows English.")
    if facts["outside_the_folder"]:
        notes.append("`lavender extract --strict` refuses pictures outside the folder of the data.")
    return notes


def _histogram(name: str, values: Sequence[int]) -> Curve:
    """How many values lie in each of at most 30 bins of whole numbers, as a line over their middles."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // 30))
    edges = np.arange(low, high + width + 1, width)
    numbers, edges = np.histogram(values, edges)
    points = [(float(edge + (width - 1) / 2), float(number)) for edge, number in zip(edges, numbers, strict=False)]
    what, _, counted = name.partition(" per ")
    return Curve(f"{what[0].upper()}{name[1:]}", what, f"{counted}s", {name: points})


def _sample_panel(sample: Sample) -> Panel:
    texts = [(message["role"], text_of(message["content"])) for message in sample.messages]
    answers: dict[str, str] = {}
    for role, text in texts:
        answers[role] = f"{answers[role]}\n{text}" if role in answers else text
    number = len(sample.sources)
    note = f"The first of {number} pictures." if number > 1 else ""
    return Panel(
        sample.load_picture(0), sample.name, [], {role: _cut(text) for role, text in answers.items()}, note=note
    )


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}… ({len(text):,} characters)"


def write_overlap(overlap: Overlap, out: Path) -> None:
    """Write overlap.json with all matches, the plot overlap.png, and the page overlap.html to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    facts = overlap.facts(examples=None)
    write_whole(out / "overlap.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    draw_overlap(overlap, out / "overlap.png")
    write_report(overlap_page(overlap), out / "overlap.html")


def draw_overlap(overlap: Overlap, path: Path) -> None:
    """Draw for each benchmark the share of its samples that the training set has, as bars, to a PNG."""
    from matplotlib.figure import Figure

    # broken into lines, and short: the label of a long path would leave no room for the bars
    names = [fill(_label(one.side.path)[-90:], 30) for one in overlap.benchmarks]
    places = np.arange(len(names))
    figure = Figure(figsize=(7, 1.6 + 0.75 * len(names)), dpi=120, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    bars = (
        ("picture", ("same_picture", "near_picture"), ("#6a3fb0", "#cdb8f0")),
        ("text", ("same_text", "near_text"), ("#c2570c", "#f3c79f")),
        ("picture and text", ("picture_and_text",), ("#0f766e",)),
    )
    for row, (what, figures, colours) in enumerate(bars):
        left = np.zeros(len(names))
        for name, colour in zip(figures, colours, strict=True):
            shares = np.array([100 * one.numbers["shares"][name] for one in overlap.benchmarks])
            label = {"same": f"same {what}", "near": f"near {what}"}.get(name.partition("_")[0], what)
            axes.barh(places + 0.25 * (row - 1), shares, 0.22, left=left, color=colour, label=label)
            left += shares
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of its samples that the training set has")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _label(name: str) -> str:
    """The last two parts of a path: a file alone often has the name of its split."""
    return "/".join(Path(name).parts[-2:])


def overlap_page(overlap: Overlap) -> Report:
    """The page of an overlap: shares and numbers per benchmark, and pairs of pictures."""
    columns = [name.replace("_", " ") for name in FIGURES]
    shares: list[list[Cell]] = [
        [_label(one.side.path), one.numbers["samples"], *(one.numbers["shares"][name] for name in FIGURES)]
        for one in overlap.benchmarks
    ]
    keys = ("samples", "pictures", "plain_pictures", "texts", "short_texts")
    sizes: list[list[Cell]] = [
        [_label(side.path), *(side.numbers[key] for key in keys), len(side.numbers["dropped"])]
        for side in (overlap.train, *(one.side for one in overlap.benchmarks))
    ]
    limits = overlap.thresholds
    pictured = [(one, match) for one in overlap.benchmarks for match in one.matches if match.picture is not None]
    pictured.sort(key=lambda pair: 0 if pair[1].picture is None else pair[1].picture.distance)
    return Report(
        title=f"Overlap with {_label(overlap.train.path)}",
        lead="The share of each benchmark’s samples of which the training set has a picture or a text.",
        tables=[
            Table("Share of samples", ["benchmark", "samples", *columns], shares, "Near excludes same."),
            *([_matches(overlap)] if any(one.matches for one in overlap.benchmarks) else []),
            Table("What was compared", ["data set", *(key.replace("_", " ") for key in keys), "dropped"], sizes),
        ],
        panels=[_pair_panel(one, match, overlap.train) for one, match in evenly(pictured, _PAIRS)],
        notes=[
            f"Pictures are near if at most {limits.distance} of 256 bits of their hashes differ and their colours are "
            "about the same. Cropped, mirrored, turned and recoloured pictures are not found. Plain pictures have no "
            "hash; only equal pixels are found.",
            f"Texts are near if at least {limits.similarity:g} of their word triples are common. Texts of fewer than "
            f"{FEWEST_WORDS} words are not compared.",
            "Pairs under Pictures: the benchmark’s picture on the left, that of the training set on the right.",
        ],
        settings={"train": overlap.train.path, "distance": limits.distance, "similarity": limits.similarity},
    )


def _matches(overlap: Overlap) -> Table:
    """The samples of the benchmarks that overlap, and in which training samples, up to `_ROWS` and `_NAMES` of them."""
    found = [(one, match) for one in overlap.benchmarks for match in one.matches]
    found.sort(key=lambda pair: (not pair[1].both, not pair[1].pictures))  # those with both first
    names = overlap.train.names
    rows: list[list[Cell]] = [
        [
            f"{_label(one.side.path)}: {one.side.names[match.sample]}",
            kind_of(match.picture),
            _listed([names[near.sample] for near in match.pictures], match.num_pictures),
            kind_of(match.text),
            _listed([names[near.sample] for near in match.texts], match.num_texts),
            _listed([names[sample] for sample in match.both], match.num_both),
        ]
        for one, match in found[:_ROWS]
    ]
    more = f"The first {_ROWS} of {len(found):,}. " if len(found) > _ROWS else ""
    columns = ["benchmark’s sample", "picture", "in training samples", "text", "in training samples", "both in"]
    note = (
        "Same or near by the nearest, which comes first. overlap.json names the training samples of all matches, and "
        f"the first {NAMED} of each."
    )
    return Table("What the training set has", columns, rows, more + note)


def _listed(names: Sequence[str], number: int) -> str | None:
    more = f" and {number - _NAMES:,} more" if number > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more if names else None


def _pair_panel(one: BenchmarkOverlap, match: Match, train: Side) -> Panel:
    """The two nearest pictures, with the answers of their samples."""
    assert match.picture is not None
    sides = (
        ("benchmark", one.side, match.sample, match.picture.places[0]),
        ("train", train, match.picture.sample, match.picture.places[1]),
    )
    pictures = [_small(side.samples[index], place) for _, side, index, place in sides]
    height = max(picture.height for picture in pictures)
    pair = Image.new("RGB", (sum(picture.width for picture in pictures) + 8, height), "white")
    pair.paste(pictures[0], (0, 0))
    pair.paste(pictures[1], (pictures[0].width + 8, 0))
    names = [side.names[index] for _, side, index, _ in sides]
    texts = {what: _cut(" / ".join(side.samples[index].answers)) for what, side, index, _ in sides}
    said = "equal pixels" if match.picture.is_same else f"{match.picture.distance} of 256 bits differ"
    return Panel(pair, f"{_label(one.side.path)}: {names[0]}; train: {names[1]}", [], texts, note=said)


def _small(sample: Sample, place: int) -> Image.Image:
    picture = sample.load_picture(place)
    picture.thumbnail((_SIDE, _SIDE))
    return picture
