"""The pages of `lavender look`: one HTML file each, with its pictures inside and nothing from outside.

A page has one script of its own, which its content security policy names by hash; everything else is forbidden. Every
text is escaped, since it may come from a user's data set.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lavender.errors import DataError
from lavender.evaluation.inline_code import with_code
from lavender.evaluation.legend import legend
from lavender.evaluation.look.attention import ANSWER, QUESTION, ReadWord, WordAttention
from lavender.evaluation.look.tiles import (
    MAX_BYTES,
    Levels,
    atlas,
    coloured,
    detail_grid,
    levels_of,
    palette,
    photo_uri,
    place_of,
    with_means,
)
from lavender.maps import WordMaps

_STILL_SIDE = 120  # pixels of the longest side of a map that is there without scripts
_ON_PICTURE, _REGION, _HIGHEST = "attention on the picture", "in the brightest region", "highest"


def render(template: str, page: Mapping[str, Any]) -> str:
    """A page as HTML.

    Args:
        template: "look" or "gallery", the name of a template and of a script.
        page: its content. All pages have `title`, `lead`, `notes`, `command` and `data`, what the script reads.

    Raises:
        DataError: the page would be larger than `MAX_BYTES`.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_template),
    )
    environment.filters["code"] = with_code
    script = _template(f"{template}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(f"{template}.html").render(
        page=page,
        style=Markup(_template("style.css")),
        script=Markup(script),
        legend=legend(),
        script_hash=f"sha256-{digest}",
        version=version("lavender-vlm"),
    )
    text = text.encode(errors="backslashreplace").decode()  # half characters, of names of files that are not UTF-8
    if len(text.encode()) > MAX_BYTES:
        raise DataError(
            f"a page of {len(text.encode()):,} bytes", f"at most {MAX_BYTES:,}", "give a shorter text, or fewer samples"
        )
    return text


def _template(name: str) -> str:
    return files("lavender.evaluation.look").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def attention_page(seen: WordAttention, image: Image.Image, texts: Sequence[str]) -> dict[str, Any]:
    """The parts of a page that show a model's attention.

    Args:
        seen: what `read_attention` returned.
        image: the picture.
        texts: the question and the answer.
    """
    num_layers, num_heads = seen.maps_WLH.shape[1:3]
    detail = detail_grid(len(seen.words), num_layers, num_heads, seen.grid)
    words, data = [], []
    for index, entry in enumerate(seen.words):
        views, on_picture = with_means(seen.maps_WLH[index]), with_means(seen.on_picture_WLH[index])
        if detail is None:  # the numbers of maps that are left out are left out too: there may be 100,000 of them
            levels, shown_on_picture = levels_of(_summaries(views)), _summaries(on_picture)
        else:
            levels, shown_on_picture = levels_of(views), on_picture
            # the scale of what the page holds: the maximum of the coarser map
            levels.top[1:, 1:] = levels_of(_coarser(views[1:, 1:], detail)).top
        shares = _whole(shown_on_picture.numpy(), levels)
        data.append(
            {
                "word": entry.word.text,
                "summary": atlas(_summaries(views), seen.grid),
                "detail": None if detail is None else atlas(views[1:, 1:].flatten(0, 1), detail),
                "top": [float(f"{value:.3g}") for value in levels.top.flatten()],
                "peak": levels.peak.flatten().tolist(),
                **{name: share.flatten().tolist() for name, share in shares.items()},
            }
        )
        first = {name: int(share.flat[0]) for name, share in shares.items()}
        words.append(_attention_word(entry, views[0, 0], first, int(levels.peak.flat[0]), seen.grid, image))
    return {
        **_picture(image),
        "words": words,
        "turns": _turns(texts, seen.words),
        "dropped": [f"{drop.what} ({drop.reason})" for drop in seen.dropped],
        "layers": list(seen.layers),
        "heads": num_heads,
        "data": {
            "layers": num_layers,
            "heads": num_heads,
            "grid": list(seen.grid),
            "ratio": image.width / image.height,
            "palette": palette(),
            "has_detail": detail is not None,
            "words": data,
        },
    }


def detail_note(seen: WordAttention) -> str:
    """What the page says about the grids of its maps."""
    detail = detail_grid(len(seen.words), *seen.maps_WLH.shape[1:3], seen.grid)
    means = "Means over layers or heads have {} × {} cells".format(*seen.grid)
    if detail == seen.grid:
        return "Maps have {} × {} cells.".format(*seen.grid)
    if detail is None:
        return f"{means}. Maps of one head in one layer are left out: with so many words they do not fit into the page."
    return f"{means}; maps of one head in one layer have {detail[0]} × {detail[1]}, so that all fit into the page."


def teacher_page(maps: WordMaps, image: Image.Image) -> dict[str, Any]:
    """The parts of a page that show a teacher's maps of a caption."""
    levels = levels_of(_shares(maps.maps))
    words, data = [], []
    entries = tuple(ReadWord(ANSWER, word) for word in maps.words)
    for index, entry in enumerate(entries):
        shares = {name: int(share[index]) for name, share in _whole(None, levels).items()}
        more = [f"{float(maps.confidence[index]):.2f}"]
        place = place_of(int(levels.peak[index]), maps.grid)
        word = _word(entry, maps.maps[index], int(levels.peak[index]), maps.grid, image)
        facts = [(_REGION, _region(shares)), (_HIGHEST, place), ("the teacher’s confidence, from 0 to 1", more[0])]
        words.append(word | {"facts": facts, "level": 0})
        data.append(
            {
                "word": entry.word.text,
                "summary": atlas(maps.maps[index][None], maps.grid),
                "detail": None,
                "top": [float(f"{levels.top[index]:.3g}")],
                "peak": [int(levels.peak[index])],
                "more": more,
                **{name: [share] for name, share in shares.items()},
            }
        )
    return {
        **_picture(image),
        "words": words,
        "turns": _turns(["", maps.text], entries),
        "dropped": [f"{drop.what} ({drop.reason})" for drop in maps.dropped],
        "layers": [],
        "heads": 0,
        "data": {
            "layers": 0,
            "heads": 0,
            "grid": list(maps.grid),
            "ratio": image.width / image.height,
            "palette": palette(),
            "has_detail": False,
            "words": data,
        },
    }


def percent(share: int) -> str:
    """A share in ten thousandths, as the page writes it; its script rounds in the same way.

    Examples:
        >>> percent(996), percent(3250), percent(4)
        ('10 %', '33 %', '0.0 %')
    """
    tenths = (share + 5) // 10
    return f"{tenths // 10}.{tenths % 10} %" if tenths < 100 else f"{(share + 50) // 100} %"


def _attention_word(
    entry: ReadWord, heat: Tensor, shares: dict[str, int], peak: int, grid: tuple[int, int], image: Image.Image
) -> dict[str, Any]:
    on_picture, placed = shares["on_picture"], shares["placed"]
    level = percent(on_picture)
    if on_picture - placed > 50:
        level += f"; {percent(on_picture - placed)} without a place"
    facts = [(_ON_PICTURE, level), (_REGION, _region(shares)), (_HIGHEST, place_of(peak, grid))]
    return _word(entry, heat, peak, grid, image) | {"facts": facts, "level": on_picture / 100}


def _word(entry: ReadWord, heat: Tensor, peak: int, grid: tuple[int, int], image: Image.Image) -> dict[str, Any]:
    row, col = divmod(peak, grid[1])
    scale = _STILL_SIDE / max(image.size)
    size = max(1, round(scale * image.height)), max(1, round(scale * image.width))
    return {
        "word": entry.word.text,
        "src": coloured(heat, size),
        "alt": f"Map of “{entry.word.text}”: highest {place_of(peak, grid)}",
        "left": round(100 * (col + 0.5) / grid[1], 2),
        "top": round(100 * (row + 0.5) / grid[0], 2),
    }


def _region(shares: Mapping[str, int]) -> str:
    return f"{percent(shares['region'])}, on {percent(shares['area'])} of the picture"


def _whole(on_picture: np.ndarray | None, levels: Levels) -> dict[str, np.ndarray]:
    """The shares in ten thousandths, as whole numbers."""
    shares = {"placed": levels.placed, "region": levels.region, "area": levels.area}
    shares |= {} if on_picture is None else {"on_picture": on_picture}
    return {name: np.rint(10_000 * np.asarray(share, dtype=np.float64)).astype(int) for name, share in shares.items()}


def _picture(image: Image.Image) -> dict[str, Any]:
    return {"photo": photo_uri(image), "ratio": round(image.width / image.height, 4)}


def _turns(texts: Sequence[str], words: Sequence[ReadWord]) -> list[dict[str, Any]]:
    """The turns to show: their texts in pieces, each with the index of its word or None."""
    turns = []
    names = {QUESTION: "question", ANSWER: "answer" if texts[QUESTION] else "caption"}
    for turn, text in enumerate(texts):
        if not text:
            continue
        pieces, done = [], 0
        own = [(entry.word, index) for index, entry in enumerate(words) if entry.turn == turn]
        for word, index in sorted(own, key=lambda pair: pair[0].start):
            if word.start < done:
                continue  # a word inside another has a card, and no button
            pieces += [(text[done : word.start], None), (text[word.start : word.end], index)]
            done = word.end
        pieces.append((text[done:], None))
        turns.append({"name": names[turn], "pieces": [piece for piece in pieces if piece[0]]})
    return turns


def _shares(maps: Tensor) -> Tensor:
    """Each map (…, rows, cols) divided by its sum; a map of zeros stays zero."""
    return maps / maps.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-30)


def _summaries(views: Tensor) -> Tensor:
    """Of views (1 + layer, 1 + head, …), see `with_means`: the mean, then each layer's, then each head's."""
    return torch.cat([views[:, 0], views[0, 1:]])


def _coarser(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(maps.flatten(0, 1)[:, None], grid)[:, 0].unflatten(0, maps.shape[:2])
