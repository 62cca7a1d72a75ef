"""`lavender data inspect`: what is in a data set, and what of it is broken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lavender.config import ROLES, Texts
from lavender.data.conversations import text_of
from lavender.data.images import image_id
from lavender.data.samples import Sample, Samples, read_samples
from lavender.data.store import SeveralStores
from lavender.evaluation.data_checks.lengths import (
    CLIP_LIMIT,
    StudentCounter,
    fewest_clip_tokens,
    num_words,
    spread,
    student_lengths,
    teacher_counter,
)
from lavender.evaluation.data_checks.scan import extra, look_at_pictures
from lavender.evaluation.sampling import evenly
from lavender.maps import Dropped

FEWEST = "fewest possible"
"""What counts CLIP's tokens without a teacher's tokenizer: `fewest_clip_tokens`."""

_EXAMPLES = 20  # rows that a fact names
_SHOWN = 6  # samples on the page
_LANGUAGE_TEXT = 1000  # characters that tell a language
_SURE = 0.5  # probability of a language; captions of a few words have less
_CAPTION = re.compile(r" caption \d+$")  # in the names of samples of one row, which have the same picture


class _Seen(NamedTuple):
    """What is kept of a picture: its `image_id`, and (height, width) in pixels."""

    identity: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        facts: what the command prints as JSON; `inspect_data` describes it.
        lengths: name of a length → all its values, for histograms.
        shown: some samples whose pictures can be decoded, spread over the data.
    """

    facts: dict[str, Any]
    lengths: dict[str, list[int]] = field(default_factory=dict)
    shown: tuple[Sample, ...] = ()


def inspect_data(
    data: Path,
    maps: str | Path | Sequence[str | Path] | None = None,
    student: str | None = None,
    teacher: str | None = None,
    trust_remote_code: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Inspection:
    """Read a data set whole, decode every picture once, and count.

    Args:
        data: a file or folder, as `read_samples` takes it.
        maps: a map store or several, to find the share of texts that have maps.
        student: a model whose processor counts the tokens of samples. No weights are loaded.
        teacher: a pipeline whose tokenizer counts the tokens of texts.
        trust_remote_code: run the code that comes with the student.
        columns: the data's own names of columns, as `read_samples` takes them.

    Returns:
        An inspection whose `facts` have: `samples`, with those whose picture is broken, and how many are `text_only`;
        `broken`, each row that cannot be used and each sample whose picture cannot be decoded or that the student
        refuses, with the reason; `words` per answer and per question; `clip_tokens` per answer, against the text
        encoder's limit; `student_tokens` per sample, against the model's context; `outside_the_folder`, the number of
        pictures there; `duplicates`; `languages` of the answers; `picture_sizes` in pixels; `maps`. What was not asked
        for is None.

    Raises:
        ConfigError: the extra `data` is not installed; `columns` that the data do not have.
        DataError: nothing usable in the data; map stores of different grids.
        ModelError, UnsupportedModelError: no such teacher or student.
        StoreError: a map store is missing or damaged.
    """
    extra("py3langid")
    counter = StudentCounter(student, trust_remote_code) if student is not None else None
    store = SeveralStores.open(maps) if maps is not None else None
    clip, limit = teacher_counter(teacher) if teacher is not None else (fewest_clip_tokens, CLIP_LIMIT)
    read = read_samples(data, columns=columns)
    samples = read.samples
    looks, broken = look_at_pictures(samples, _see)
    lengths = _lengths(samples, clip)
    facts: dict[str, Any] = {"data": str(data), **_facts(read, looks, broken)}
    questions = [num_words(text) for sample in samples for text in _questions(sample)]
    facts["words"] = {"per_answer": spread(lengths["words per answer"]), "per_question": spread(questions)}
    facts["clip_tokens"] = {"counted_by": teacher or FEWEST, **_against(lengths["CLIP tokens per answer"], limit)}
    facts["maps"] = _share_with_maps(store, samples, looks) if store is not None else None
    facts["student_tokens"] = None
    if counter is not None:
        sizes = [None if look is None else tuple(seen.size for seen in look) for look in looks]
        lengths["student tokens per sample"], refused = student_lengths(counter, samples, sizes)
        facts["student_tokens"] = _against(lengths["student tokens per sample"], counter.context)
        facts["broken"] += [asdict(drop) for drop in refused]
    usable = [index for index, look in enumerate(looks) if look]
    return Inspection(facts, lengths, tuple(samples[index] for index in evenly(usable, _SHOWN)))


def _lengths(samples: Sequence[Sample], clip: Callable[[str], int]) -> dict[str, list[int]]:
    answers = [answer for sample in samples for answer in sample.answers]
    return {
        "words per answer": [num_words(text) for text in answers],
        "CLIP tokens per answer": [clip(text) for text in answers],
    }


def _facts(read: Samples, looks: Sequence[tuple[_Seen, ...] | None], broken: Sequence[Dropped]) -> dict[str, Any]:
    """What needs neither a model nor a store."""
    return {
        "samples": len(read),
        "text_only": sum(not sample.sources for sample in read),
        "broken": [asdict(drop) for drop in (*read.dropped, *broken)],
        "outside_the_folder": len(read.outside),
        "duplicates": _duplicates(read.samples, looks),
        "languages": _languages(read.samples),
        "picture_sizes": _sizes(looks),
    }


def _see(image: Image.Image) -> _Seen:
    return _Seen(image_id(image), (image.height, image.width))


def _questions(sample: Sample) -> list[str]:
    texts = [text_of(message["content"]) for message in sample.messages if message["role"] == "user"]
    return [text for text in texts if text.strip()]


def _against(lengths: Sequence[int], limit: int | None) -> dict[str, Any]:
    longer = None if limit is None else sum(length > limit for length in lengths)
    return {"limit": limit, "longer": longer, **spread(lengths)}


def _duplicates(samples: Sequence[Sample], looks: Sequence[tuple[_Seen, ...] | None]) -> dict[str, Any]:
    """Pictures that are stored more than once, and samples that repeat an earlier one; both by their pixels."""
    first_place: dict[str, Any] = {}
    first_sample: dict[Any, str] = {}
    pictures: dict[Any, list[str]] = {}
    repeated: list[list[str]] = []
    for sample, look in zip(samples, looks, strict=True):
        if look is None:
            continue
        for place, (source, seen) in enumerate(zip(sample.sources, look, strict=True)):
            where = source if isinstance(source, Path) else (_CAPTION.sub("", sample.name), place)
            if where != first_place.setdefault(seen.identity, where):
                pictures.setdefault(where, [sample.name, str(_name(first_place[seen.identity]))])
        key = tuple(seen.identity for seen in look), repr(sample.messages)
        if key in first_sample:
            repeated.append([sample.name, first_sample[key]])
        first_sample.setdefault(key, sample.name)
    return {
        "distinct_pictures": len(first_place),
        "pictures_stored_again": len(pictures),
        "picture_examples": list(pictures.values())[:_EXAMPLES],
        "repeated_samples": len(repeated),
        "sample_examples": repeated[:_EXAMPLES],
    }


def _name(where: Any) -> Any:
    return where if isinstance(where, Path) else where[0]


def _languages(samples: Sequence[Sample]) -> dict[str, Any]:
    """ISO 639 codes of the answers' languages, and the first samples that are not in English."""
    identifier_file = extra("py3langid.langid")
    identifier = identifier_file.LanguageIdentifier.from_model_file(
        identifier_file.MODEL_FILE, norm_probs=True, min_confidence=_SURE
    )
    numbers: Counter[str] = Counter()
    others: list[str] = []
    for sample in samples:
        language, _ = identifier.classify(" ".join(sample.answers)[:_LANGUAGE_TEXT])
        language = "uncertain" if language == "und" else str(language)
        numbers[language] += 1
        if language not in ("en", "uncertain"):
            others.append(sample.name)
    return {"samples": dict(numbers.most_common()), "not_english": len(others), "examples": others[:_EXAMPLES]}


def _sizes(looks: Sequence[tuple[_Seen, ...] | None]) -> dict[str, Any]:
    """Of distinct pictures."""
    sizes = list({seen.identity: seen.size for look in looks if look for seen in look}.values())
    return {
        "height": spread([height for height, _ in sizes]),
        "width": spread([width for _, width in sizes]),
        "width_by_height": spread([width / height for height, width in sizes]),
    }


def _share_with_maps(
    store: SeveralStores, samples: Sequence[Sample], looks: Sequence[tuple[_Seen, ...] | None]
) -> dict[str, Any]:
    """How many pairs of a picture and a text have a record in the stores, and how many a map."""
    roles = store.roles or frozenset(ROLES["answers"])
    texts: Texts = next(name for name in ROLES if frozenset(ROLES[name]) == roles)
    pairs = {
        (look[index].identity, text)
        for sample, look in zip(samples, looks, strict=True)
        if look
        for index, text in sample.pairs_of(texts)
    }
    num_records = num_with_maps = 0
    for pair in pairs:
        if (record := store.get(*pair)) is not None:
            num_records += 1
            num_with_maps += bool(record.words)
    return {
        "stores": [str(path) for path in store.paths],
        "texts": texts,
        "pairs": len(pairs),
        "records": num_records,
        "with_maps": num_with_maps,
        "share_with_maps": round(num_with_maps / len(pairs), 4) if pairs else 0.0,
    }
