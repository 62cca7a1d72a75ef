"""`lavender check`: will alignment pay for this model, data and maps? Measured before any tuning.

Alignment moves attention to the place of a word. That can pay in two cases:

- **Known words**, which the model can name: if it predicts them better once it is told where to look. So they are
  predicted from the whole picture, and from parts of it (`lavender.evaluation.leave_out`).
- **New words**, which the model cannot name yet, wherever it looks: if a reader of the model's own image features can
  learn them from their places, and not from the rest of the picture (`lavender.evaluation.place_probe`).

Every figure is a mean over pictures, of the picture's mean over its words. Its margin is half a 95 % interval.

Figures are {"mean": …, "margin": …}:

- `loss`, −ln p of a word in nats: from the `whole` picture; from the keys where the word is (`there`); from
  the others (`elsewhere`); from those of all `candidates`, the words of the same part of speech among which the
  word's row has to choose; from those where a word of another picture is (`control`). Keys that are left out
  are replaced by the mean key.
- `gain`: whole − there. `gain_of_place`: whole − candidates, what knowing places alone is worth.
  `over_control`: control − there. `cost_without`: elsewhere − whole.
- `attention_mass` and `attention_mass_control`: the share of the model's attention on the picture that lies
  on the word's map, and on the control's.
- `read`: the share of words that a linear reader of the features of these keys gets right, `there`, on the
  `control` and on the `whole` picture, for words that several pictures have, as they have another word of its
  kind: known or new, of one part of speech. `gain_of_reading`: there − the better one of the others.

`alone`: the words that are the only one of their kind, with their number. A reader has nothing to tell them from.

`hidden`, measured where maps are not above the control: `part`, by how much the loss of known words rises
when the worst ninth of the picture is hidden; `all`, when everything is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from lavender.alignment.attributes import described_nouns
from lavender.alignment.word_targets import WordTargets
from lavender.config import AlignmentConfig, Attributes
from lavender.data.about import Link, links_of
from lavender.data.images import image_id
from lavender.data.samples import Sample, Samples, read_samples, readable
from lavender.data.store import MapStore, SeveralStores
from lavender.errors import DataError, NotFiniteError
from lavender.evaluation.compare import readings_of
from lavender.evaluation.leave_out import Case, Measured, measure
from lavender.evaluation.place_probe import read_words
from lavender.evaluation.placement import ON_CPU, Placement
from lavender.evaluation.promise import SURPRISE, is_local, promise
from lavender.evaluation.sampling import evenly, left_out, require_limit, spread
from lavender.evaluation.taken import taken
from lavender.maps import Word
from lavender.students.loading import load_reader

Kind = tuple[str, bool]
"""Words that a reader tells from each other: (part of speech, whether they are new)."""
BLOCKS = 3
"""The picture is cut into BLOCKS × BLOCKS parts to find out whether hiding any of them matters."""
NUM_HIDDEN = 32
"""Words of which parts of the picture are hidden."""


def check_model(
    model_path: str | Path,
    data: Path,
    maps: Path,
    limit: int = 64,
    attributes: Attributes = "own",
    trust_remote_code: bool = False,
    columns: Mapping[str, str] | None = None,
    place: Placement = ON_CPU,
) -> dict[str, Any]:
    """Whether alignment will pay, and the figures behind it.

    Args:
        model_path: a run folder, model folder or hub id.
        data: what `lavender.data.read_samples` reads.
        maps: map store with the teacher's maps of the answers, or several.
        limit: number of samples to use, spread evenly over the data.
        attributes: the map of an adjective, as in `AlignmentConfig`. Words with an entry in the column `about` take
            the map that it names.
        trust_remote_code: whether code that comes with the model may run.
        columns: the data's own names of columns, as in `read_samples`.
        place: how the model runs.

    Returns:
        Among others `verdict` and `reasons`, see `lavender.evaluation.promise.Promise`, and `groups`: the figures of
        all words, of `known` and of `new` words; this module's first lines list them. A group is None if it has no
        word. A word is new if the model gives its form less than 5 % on average (`SURPRISE`), from the whole picture
        and from the word's place.

    Raises:
        NotFiniteError: a loss is NaN or infinite.
        DataError: no mapped word to ask for, or mapped words in one picture alone.
        ModelError: the model is missing or damaged.
    """
    require_limit(limit)
    store = SeveralStores.open(maps)
    read = read_samples(data, columns=columns)
    usable = taken(readable(Samples(spread(read.samples, limit))), [load_reader(model_path, trust_remote_code)])
    dropped: Counter[str] = Counter()
    cases = cases_of(usable.samples, store, attributes, dropped)
    model, processor = place.load(model_path, trust_remote_code)
    measured = measure(model, processor, cases, dropped, batch_size=place.batch_size)
    measured = _checked(str(model_path), measured, dropped, place.dtype)
    result = {
        "model": str(model_path),
        "device": place.device,
        "dtype": place.dtype,
        "samples": len(usable),
        "left_out": [*left_out(read), *(f"left out {drop.what}: {drop.reason}" for drop in usable.dropped)],
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "groups": groups_of(measured),
        "hidden": None,
    }
    if not is_local(result):
        result["hidden"] = _cost_of_hiding(model, processor, measured, place.batch_size)
    return {**result, **promise(result)._asdict()}


def cases_of(
    samples: Sequence[Sample], store: MapStore | SeveralStores, attributes: Attributes, dropped: Counter[str]
) -> list[Case]:
    """The mapped words of the samples' first answers, with the maps that training would align them to.

    Raises:
        DataError: no word has a map, or all words are in one picture.
    """
    word_targets = WordTargets(store, AlignmentConfig(attributes=attributes))
    cases: list[Case] = []
    numbers: dict[str, int] = {}  # of pictures: several samples may have the same one
    for sample, (picture, _) in zip(samples, readings_of(samples, store), strict=True):
        identity = image_id(picture.image)
        index = numbers.setdefault(identity, len(numbers))
        links = links_of(sample.about, sample.messages)
        turn = next(place for place, message in enumerate(sample.messages) if message["role"] == "assistant")
        example = {"messages": sample.messages, "images": list(sample.sources)}
        chosen = word_targets.of(example, sample.messages, [identity], links, dropped) or []
        targets = [target for of_turn in chosen if of_turn.turn == turn for target in of_turn.targets]
        links = [link for link in links if link.word.turn == turn]
        nouns = described_nouns(picture.answer) if attributes == "noun" else {}
        for target in targets:
            alike = [other for other in targets if other.word.part_of_speech == target.word.part_of_speech]
            choice = [target] if _place_is_told(target.word, links, nouns) else alike
            union = torch.stack([candidate.map for candidate in choice]).amax(dim=0)
            cases.append(Case(picture, index, target.word, torch.stack([target.map, union])))
    if len({case.index for case in cases}) < 2:
        raise DataError(
            f"{'mapped words in one picture alone' if cases else 'no word with a map'}",
            "maps of this data's answers, of two pictures at least",
            "extract maps for this data set, or name its store; if they are there, raise the limit",
        )
    return [replace(case, maps=torch.cat([case.maps, _control(cases, place)])) for place, case in enumerate(cases)]


def _place_is_told(word: Word, links: Sequence[Link], nouns: Mapping[Word, Word | None]) -> bool:
    """Whether the text before a word says which thing the word is about, so that its row can know where to look."""
    noun = nouns.get(word)
    if noun is not None and noun.end <= word.start:
        return True
    return any(
        link.word.start <= word.start < link.word.end
        and (link.about.turn < link.word.turn or link.about.end <= word.start)
        for link in links
    )


def _control(cases: Sequence[Case], place: int) -> Tensor:
    """The map of a word of another picture, of the same part of speech if there is one: (1, rows, cols)."""
    case = cases[place]
    others = [other for other in cases if other.index != case.index]
    same = [other for other in others if other.word.part_of_speech == case.word.part_of_speech] or others
    return same[(place + len(same) // 2) % len(same)].maps[:1]


def _checked(model_path: str, measured: Measured | None, dropped: Counter[str], dtype: str) -> Measured:
    """What was measured, if anything was, with finite losses. Raises as `check_model` does."""
    if measured is None:
        raise DataError(
            f"no mapped word that {model_path} could be asked for, {dict(dropped)} left out",
            "one at least",
            "see why they are left out, and check other data",
        )
    wrong = [view for view, values in measured.losses.items() if not values.isfinite().all()]
    if wrong:
        raise NotFiniteError(
            f"NaN or infinity in the loss of {model_path} from the patches: {', '.join(wrong)}",
            "finite losses",
            "add --dtype bfloat16 or float32: float16 overflows in some models"
            if dtype == "float16"
            else "check the model's weights; one that was trained to NaN is of no use",
        )
    return measured


def groups_of(measured: Measured) -> dict[str, dict[str, Any] | None]:
    """The figures of all words, of known and of new ones. See `check_model`."""
    labels = [case.label for case in measured.cases]
    surprise = torch.minimum(measured.losses["whole"], measured.losses["there"])
    is_new = _mean_of_equals(surprise, labels) > SURPRISE
    kinds = [(case.word.part_of_speech, new) for case, new in zip(measured.cases, is_new.tolist(), strict=True)]
    hits = {name: _read(features, measured.cases, kinds) for name, features in measured.features.items()}
    readable, alone = _readable(measured.cases, kinds)
    masks = {"all": torch.ones_like(is_new), "known": ~is_new, "new": is_new}
    return {name: _group(measured, hits, readable, alone, mask) if mask.any() else None for name, mask in masks.items()}


def _readable(cases: Sequence[Case], kinds: Sequence[Kind]) -> tuple[Tensor, Tensor]:
    """Of which cases a reader's hits mean something, and which have the only word of their kind: bool (case,) each.

    Several pictures have a readable word, and another one of its kind. Else a reader has nothing to tell it from, and
    is right by construction.
    """
    pictures_of: dict[Kind, dict[str, set[int]]] = {}
    for case, kind in zip(cases, kinds, strict=True):
        pictures_of.setdefault(kind, {}).setdefault(case.label, set()).add(case.index)
    repeated = {
        kind: {label for label, pictures in of_kind.items() if len(pictures) > 1}
        for kind, of_kind in pictures_of.items()
    }
    readable = [
        case.label in repeated[kind] and len(repeated[kind]) > 1 for case, kind in zip(cases, kinds, strict=True)
    ]
    return torch.tensor(readable), torch.tensor([len(pictures_of[kind]) == 1 for kind in kinds])


def _read(features: Tensor, cases: Sequence[Case], kinds: Sequence[Kind]) -> Tensor:
    """Which words a reader gets right: (case,). It chooses among the words of a kind.

    "red" and "dog" may have the same place, so a reader of all words could not tell which of them is asked for.
    """
    hits = torch.zeros(len(cases))
    for kind in set(kinds):
        chosen = [place for place, other in enumerate(kinds) if other == kind]
        labels = [cases[place].label for place in chosen]
        classes = [sorted(set(labels)).index(label) for label in labels]
        hits[chosen] = read_words(features[chosen], classes, [cases[place].index for place in chosen])
    return hits


def _mean_of_equals(values: Tensor, labels: Sequence[str]) -> Tensor:
    """For each case the mean of the values of all cases with its label."""
    inverse = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    sums = torch.zeros(int(inverse.max()) + 1).index_add(0, inverse, values.float())
    return (sums / inverse.bincount())[inverse]


def _group(
    measured: Measured, hits: Mapping[str, Tensor], readable: Tensor, alone: Tensor, mask: Tensor
) -> dict[str, Any]:
    pictures = torch.tensor([case.index for case in measured.cases])
    losses = measured.losses

    def figure(values: Tensor, of: Tensor = mask) -> dict[str, float | None]:
        return estimate(values[of], pictures[of])

    def forms(of: Tensor) -> Counter[str]:
        return Counter(case.label for case, chosen in zip(measured.cases, of.tolist(), strict=True) if chosen)

    readable = mask & readable
    return {
        "words": int(mask.sum()),
        "pictures": len(pictures[mask].unique()),
        "forms": len(forms(mask)),
        "loss": {view: figure(values) for view, values in losses.items()},
        "gain": figure(losses["whole"] - losses["there"]),
        "gain_of_place": figure(losses["whole"] - losses["candidates"]),
        "over_control": figure(losses["control"] - losses["there"]),
        "cost_without": figure(losses["elsewhere"] - losses["whole"]),
        "attention_mass": figure(measured.level),
        "attention_mass_control": figure(measured.chance),
        "keys_that_show_a_word": figure(measured.area),
        "read_words": int(readable.sum()),
        "read_forms": len(forms(readable)),
        "read_pictures": len(pictures[readable].unique()),
        "alone": dict(forms(mask & alone)),
        "read": {name: figure(values, readable) for name, values in hits.items()} if readable.any() else None,
        "gain_of_reading": _gain_of_reading(hits, readable, figure) if readable.any() else None,
    }


def _gain_of_reading(
    hits: Mapping[str, Tensor], readable: Tensor, figure: Callable[[Tensor, Tensor], dict[str, float | None]]
) -> dict[str, float | None]:
    """Reading there − the better one of reading the control and the whole, by their means."""
    gains = [figure(hits["there"] - hits[name], readable) for name in ("control", "whole")]
    return min(gains, key=lambda gain: gain["mean"] or 0.0)


def estimate(values: Tensor, pictures: Tensor) -> dict[str, float | None]:
    """Mean over pictures of each picture's mean, and half its 95 % interval, None for a single picture.

    Words of one picture are not independent, so pictures are the units. The interval is Student's, approximately.

    Examples:
        >>> import torch
        >>> from lavender.evaluation.check import estimate
        >>> estimate(torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0, 0, 1]))["mean"]
        3.0
    """
    means = torch.stack([values[pictures == picture].double().mean() for picture in pictures.unique()])
    count = len(means)
    margin = (1.96 + 2.5 / (count - 1)) * means.std().item() / count**0.5 if count > 1 else None
    return {"mean": means.mean().item(), "margin": margin}


def _cost_of_hiding(
    model: PreTrainedModel, processor: ProcessorMixin, measured: Measured, batch_size: int
) -> dict[str, float]:
    """By how much the loss of words rises if the worst part of the picture is hidden, and if all of it is."""
    labels = [case.label for case in measured.cases]
    surprise = _mean_of_equals(torch.minimum(measured.losses["whole"], measured.losses["there"]), labels)
    known = [case for case, value in zip(measured.cases, surprise.tolist(), strict=True) if value <= SURPRISE]
    known = known or measured.cases
    chosen = evenly(known, NUM_HIDDEN)
    count = BLOCKS**2
    parts = torch.cat([torch.eye(count).view(count, BLOCKS, BLOCKS), torch.zeros(1, BLOCKS, BLOCKS)])
    views = {str(part): (part, False) for part in range(count)} | {"nothing": (count, True)}
    cases = [replace(case, maps=parts) for case in chosen]
    hidden = measure(model, processor, cases, Counter(), views, batch_size)
    assert hidden is not None, "these words were measured before"
    costs = {view: values - hidden.losses["whole"] for view, values in hidden.losses.items()}
    worst = torch.stack([costs[str(part)] for part in range(count)]).amax(dim=0)
    return {"words": len(chosen), "part": worst.mean().item(), "all": costs["nothing"].mean().item()}
