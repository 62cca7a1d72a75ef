"""What `lavender look` does with each kind of target: read it, and make its page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavender.config import CONTENT_WORDS, ExtractionConfig, PartOfSpeech
from lavender.data.images import image_id, load_image, named
from lavender.data.store import MapStore
from lavender.errors import DataError
from lavender.evaluation.answers import generate_answers
from lavender.evaluation.faithfulness import BLUR, faithfulness
from lavender.evaluation.look.attention import ANSWER, WordAttention, no_word, read_attention, require_template
from lavender.evaluation.look.curves import faithfulness_view
from lavender.evaluation.look.gallery import SCORE_NAMES, gallery_page, read_gallery
from lavender.evaluation.look.page import attention_page, detail_note, render, teacher_page
from lavender.evaluation.look.tiles import REGION
from lavender.evaluation.report.panels import Panel, WordRow
from lavender.files import printable
from lavender.maps import Dropped, WordMaps, entropy, to_heat
from lavender.students.loading import load_run
from lavender.students.word_maps import AnsweredPicture
from lavender.words import content_words

PROMPT = "Describe the image."
"""The question that a caption answers."""
MAX_NEW_TOKENS = 64
"""Where a generated answer is cut off."""
MAX_WORDS = 40
"""The most words of a text that a page shows, the first."""
MAX_FAITHFUL = 12
"""The most words whose maps are tested by occlusion, the first of the answer."""
PANELS = 6
"""Texts of a gallery that `--png` draws."""
_COMMON_NOTES = (
    f"The brightest region of a map is all cells with at least {100 * REGION:.0f} % of its maximum.",
    "“What exceeds the mean of the words” takes the mean of all words’ maps from each: models often look at the same "
    "few places whatever the word is.",
)


@dataclass(frozen=True, eq=False)
class Looked:
    """A look at a model, a teacher or a map store.

    Attributes:
        html: the page.
        panels: pictures with maps, for `lavender.evaluation.report.figure.draw_figure`.
        lines: what the page shows, in words.
    """

    html: str
    panels: list[Panel]
    lines: list[str]


def look_at_model(
    model_path: str | Path,
    picture: str | Path | Image.Image,
    text: str,
    *,
    command: str = "lavender look",
    answer: str | None = None,
    generate: bool = False,
    parts_of_speech: Sequence[PartOfSpeech] = CONTENT_WORDS,
    with_faithfulness: bool = False,
    steps: int = 10,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Callable[[], None] | None = None,
) -> Looked:
    """A page about where a vision-language model looks for each word, in each of its layers and heads.

    Args:
        model_path: a model folder, hub id, LoRA adapter or run folder.
        picture: a photograph.
        text: a question if it ends in "?", or with `answer` or `generate`; else a caption: the answer to `PROMPT`.
        command: what the page names as its maker.
        answer: the answer to the question, instead of the model's own.
        generate: take `text` as a question also without "?", and let the model answer.
        parts_of_speech: the words to map.
        with_faithfulness: add insertion and deletion curves; see `lavender.evaluation.faithfulness`.
        steps: of these curves.
        device, dtype: where and with which numbers the model runs.
        trust_remote_code: whether code that comes with the model may run.
        progress: called after each order of `with_faithfulness`.

    Raises:
        DataError: the picture cannot be decoded, the model answers nothing, or no word has a map.
        ModelError: the model is missing or damaged, or has no chat template.
        UnsupportedModelError: no adapter for this model.
    """
    image = load_image(picture, named(picture, "the picture"))
    model, processor = _loaded(model_path, device, dtype, trust_remote_code)
    is_question = generate or answer is not None or text.rstrip().endswith("?")
    prompt, is_generated = (text if is_question else PROMPT), is_question and answer is None
    generated = _answer_of(model, processor, image, prompt, str(model_path)) if is_generated else text
    answer = generated if answer is None else answer
    words, beyond = _first(content_words(answer, parts_of_speech))
    asked, asked_beyond = _first(content_words(prompt, parts_of_speech) if is_question else (), len(words))
    reading = AnsweredPicture(image, prompt, answer, words)
    seen = read_attention(model, processor, reading, asked)
    notes = [*_model_notes(seen, is_question, is_generated), *beyond, *asked_beyond]
    page = attention_page(seen, image, (prompt, answer)) | {"faithfulness": None}
    if with_faithfulness:
        maps, left_out = _answer_maps(seen, reading)
        judged = faithfulness(model, processor, reading, maps, steps, progress=progress)
        page["faithfulness"] = faithfulness_view(judged, steps)
        notes += [*left_out, f"A part is hidden by a Gaussian blur of {100 * BLUR:.0f} % of the longest side."]
    name, file = str(model_path), _file_of(picture)
    lead = f"{file}: the attention of {name} on the picture when it predicts each word."
    page |= _shell(f"Where {_short(name)} looks", lead, notes, command) | {"picture_name": file}
    rows = [WordRow(entry.word.text, {"attention": heat}) for entry, heat in zip(seen.words, _means(seen), strict=True)]
    panel = Panel(image, file, rows, {"question": prompt, "answer": answer}, note=f"Attention of {name}")
    return Looked(render("look", page), [panel], [*_turn_lines(prompt, answer, is_generated), *_word_lines(page)])


def look_at_teacher(
    teacher_path: str | Path,
    picture: str | Path | Image.Image,
    caption: str,
    *,
    command: str = "lavender look",
    name: str | None = None,
    parts_of_speech: Sequence[PartOfSpeech] = CONTENT_WORDS,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    teacher_notes: Mapping[str, str] = MappingProxyType({}),
) -> Looked:
    """A page with a diffusion teacher's maps of a caption, with the default settings of extraction.

    Args:
        teacher_path: a pipeline folder or hub id.
        picture: a photograph.
        caption: its caption.
        command: what the page names as its maker.
        name: what the page calls the teacher; by default its path.
        parts_of_speech: the words to map.
        device, dtype: where and with which numbers the teacher runs.
        teacher_notes: teacher name → a note for pages that show its maps.

    Raises:
        DataError: the picture cannot be decoded, or no word has a map.
        ModelError: the teacher is missing or damaged.
        UnsupportedModelError: no supported family has this pipeline class.
    """
    from lavender.teachers.diffusion.teacher import Teacher

    image = load_image(picture, named(picture, "the picture"))
    name, file = name or str(teacher_path), _file_of(picture)
    config = ExtractionConfig(parts_of_speech=tuple(parts_of_speech))
    teacher = Teacher.from_pretrained(teacher_path, config, device=device, dtype=dtype, name=name)
    maps, beyond = _first_maps(teacher.maps(image, caption))
    page = teacher_page(maps, image) | {"faithfulness": None}
    notes = [
        "A word’s map is the attention of the diffusion model’s layers to the word’s tokens, at one noise level: where "
        "the word lies in the picture.",
        *_COMMON_NOTES,
        f"The teacher’s confidence is {float(maps.confidence.mean()):.2f} on average.",
        *([teacher_notes[name]] if name in teacher_notes else []),
        *beyond,
    ]
    lead = f"{file}: a map for each content word."
    page |= _shell(f"Word maps of the teacher {_short(name)}", lead, notes, command) | {"picture_name": file}
    rows = [WordRow(word.text, {"teacher": heat}) for word, heat in zip(maps.words, maps.maps, strict=True)]
    panel = Panel(image, file, rows, {"caption": caption}, note=f"Word maps of {name}")
    return Looked(render("look", page), [panel], [f"caption: {caption}", *_word_lines(page)])


def look_at_maps(
    maps: Path,
    data: str | Path,
    *,
    command: str = "lavender look",
    limit: int = 64,
    word: str | None = None,
    against: Path | None = None,
    worst: bool = False,
    columns: Mapping[str, str] | None = None,
    teacher_notes: Mapping[str, str] = MappingProxyType({}),
) -> Looked:
    """A gallery of a map store on its pictures, worst first. The arguments are those of `read_gallery`.

    Raises:
        ConfigError, DataError, StoreError: see `read_gallery`.
    """
    store = MapStore.open(maps)
    other = None if against is None else MapStore.open(against)
    gallery = read_gallery(store, data, limit, word, other, worst, columns)
    page, number = gallery_page(gallery)
    shown = gallery.records[:number]
    teacher = str(store.identity.get("teacher", "an unknown teacher"))
    chosen = "the worst of all" if worst else "spread evenly over the store"
    only, judged_by = (f" with the word “{word}”", "this word") if word else ("", "its worst word")
    notes = [
        f"{number} of {gallery.total} text{'s' * (gallery.total != 1)}{only} {'is' if number == 1 else 'are'} shown: "
        f"{chosen}. Worst first by {SCORE_NAMES[gallery.by]}; a text has the place of {judged_by}.",
        *_judge_notes(gallery.by, against, store.grid),
    ]
    if gallery.without_picture:
        missing = "without their picture and text in the data, or with a picture that cannot be read"
        notes.append(f"Also chosen, but {missing}: {gallery.without_picture}.")
    if gallery.not_compared:
        missing = f"words of the texts searched that are not in {against}"
        notes.append(f"Without a score, as {missing}: {gallery.not_compared}.")
    if number < len(gallery.records):
        notes.append(f"{len(gallery.records) - number} more did not fit into a page of 10 MB.")
    notes += [teacher_notes[teacher]] if teacher in teacher_notes else []
    page |= _shell(
        f"The map store {_short(str(maps))}", f"Maps of the teacher {teacher} for {printable(data)}.", notes, command
    )
    panels = [
        Panel(
            record.image,
            record.name,
            [
                WordRow(f"{own.text}\n{judged.text}", {"map": heat})
                for own, heat, judged in zip(record.maps.words, record.maps.maps, record.judged, strict=True)
            ],
            {"text": record.maps.text},
        )
        for record in shown[:PANELS]
    ]
    heats = torch.cat([record.maps.maps for record in shown]) if shown else torch.empty(0)
    mean = [f"mean entropy of the maps shown: {float(entropy(heats).mean()):.2f} nats"] if len(heats) else []
    return Looked(render("gallery", page), panels, [*notes, *mean])


def _shell(title: str, lead: str, notes: list[str], command: str) -> dict[str, Any]:
    """What every page has."""
    return {"title": title, "lead": lead, "notes": notes, "command": command}


def _loaded(model_path: str | Path, device: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model on its device, and its processor, which has a chat template."""
    model, processor = load_run(model_path, dtype, trust_remote_code, device)
    require_template(processor, model_path)
    return model, processor


def _answer_of(model: Any, processor: Any, image: Image.Image, prompt: str, name: str) -> str:
    """The model's greedy answer. Raises DataError if it is empty."""
    (answer,) = generate_answers(model, processor, [image], [prompt], MAX_NEW_TOKENS)
    if not answer.strip():
        got = f"no answer of {name} to {prompt!r}"
        raise DataError(got, "an answer with words to map", "ask something else, or give --answer")
    return answer


def _first_maps(maps: WordMaps) -> tuple[WordMaps, list[str]]:
    """The maps that a page has room for, and a note about the others. Raises DataError if there is no map."""
    if not maps.words:
        reasons = "; ".join(f"{drop.what}: {drop.reason}" for drop in maps.dropped)
        raise no_word(f"the caption {maps.text!r}", maps.text, reasons)
    kept, beyond = _first(maps.words)
    number = len(kept)
    first = WordMaps(maps.image_id, maps.text, kept, maps.maps[:number], maps.dropped, maps.confidence[:number])
    return first, beyond


def _model_notes(seen: WordAttention, is_question: bool, is_generated: bool) -> list[str]:
    read = "The answer is the one that was given."
    if is_generated:
        read = f"The model answered greedily. Its answer is cut off after {MAX_NEW_TOKENS} tokens."
    if not is_question:
        read = f"The text was read as a caption: as the answer to “{PROMPT}” A text that ends in “?” is a question."
    level = (
        "These layers attend to the picture alone, so their share of attention on it is always 100 %."
        if seen.sees_picture_alone
        else "The attention on the picture is that on all image keys; the rest of a row’s attention is on the text."
    )
    return [
        read,
        "A word’s map is the attention of the rows that predict its tokens, while the model reads the whole text. By "
        "default it is the mean over all layers that see the picture, and over their heads.",
        level,
        "Attention without a place is on keys that show no part of the picture, such as class tokens and padding.",
        *_COMMON_NOTES,
        "Attention says where a model looks, not why it answers so. The option --faithfulness hides these places "
        "and measures what that does to the answer.",
        detail_note(seen),
    ]


def _judge_notes(by: str, against: Path | None, grid: tuple[int, int]) -> list[str]:
    if by == "pointing":
        return [f"The masks are those of {against}. A hit is a map whose maximum lies in the mask of its word."]
    if by == "disagreement":
        return [f"Maps are compared with those of {against}, by the Pearson correlation over cells."]
    return [
        "Entropy says how far a map is spread out, not whether it is right. It is at most "
        f"{math.log(grid[0] * grid[1]):.2f} nats, that of a flat map. With the option --against and another "
        "store, maps are judged by disagreement, or with annotated masks by pointing."
    ]


def _first(words: tuple[Any, ...], taken: int = 0) -> tuple[tuple[Any, ...], list[str]]:
    """The words that a page has room for, and a note about the others."""
    room = max(0, MAX_WORDS - taken)
    beyond = len(words) - room
    note = [f"{beyond} more words are not shown: a page has at most {MAX_WORDS}."] if beyond > 0 else []
    return words[:room], note


def _means(seen: WordAttention) -> Tensor:
    """The mean maps over layers and heads (word, rows, cols), with maximum 1."""
    return to_heat(seen.maps_WLH.mean(dim=(1, 2)))


def _answer_maps(seen: WordAttention, reading: AnsweredPicture) -> tuple[WordMaps, list[str]]:
    """The mean maps of the answer's words, at most `MAX_FAITHFUL`, and a note about the others."""
    own = [index for index, entry in enumerate(seen.words) if entry.turn == ANSWER]
    if not own:
        raise DataError(
            f"the answer {reading.answer!r}, of which no word has a map",
            "one, to test its map",
            "leave --faithfulness out",
        )
    kept = own[:MAX_FAITHFUL]
    words = tuple(seen.words[index].word for index in kept)
    maps = WordMaps(image_id(reading.image), reading.answer, words, _means(seen)[kept], tuple[Dropped, ...]())
    left = len(own) - len(kept)
    return maps, [f"The maps of {left} more words were not tested by occlusion."] if left else []


def _turn_lines(prompt: str, answer: str, is_generated: bool) -> list[str]:
    return [f"question: {prompt}", f"answer{' (generated)' if is_generated else ''}: {answer}"]


def _word_lines(page: Mapping[str, Any]) -> list[str]:
    lines = []
    for word in page["words"]:
        facts = "; ".join(f"{name} {value}" for name, value in word["facts"])
        lines.append(f"  {word['word']}: {facts}")
    lines += [f"  without a map: {dropped}" for dropped in page["dropped"]]
    for row in (page["faithfulness"] or {"rows": []})["rows"]:
        lines.append(f"  faithfulness of {row['name']}: {row['verdict']}")
    return lines


def _file_of(picture: str | Path | Image.Image) -> str:
    return printable(Path(picture).name) if isinstance(picture, str | Path) else "the picture"


def _short(name: str) -> str:
    """The last part of a path or hub id."""
    return printable(Path(name).name or name)
