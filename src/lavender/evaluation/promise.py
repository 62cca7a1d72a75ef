"""What the figures of `lavender check` promise: alignment pays, or gains nothing, or the figures cannot say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

Verdict = Literal["pays", "no gain", "cannot say"]

SURPRISE = 3.0
"""A word is new if its loss is above this, in nats: a probability below 5 %."""
LEAST_GAIN = 0.25
"""Knowing places pays if the loss of a known word falls by more than this, in nats."""
LEAST_READ = 0.05
"""New words pay if a reader gets a share of them right that is larger by more than this from their places."""
LOCAL = 0.25
"""A model keeps things in places if hiding one part of the picture costs this share of what hiding all of it costs."""
FEW = 0.2
"""A group with a smaller share of the words decides nothing, unless it pays."""
LEAST_PER_FORM = 4
"""A reader needs this many samples per word, on average, before its failure means something."""
LEAST_PICTURES = 8
"""Intervals over fewer pictures mean little."""


class Promise(NamedTuple):
    """The verdict, and for `known` and `new` words the reason with an advice.

    Attributes:
        verdict: "pays" if alignment pays for known or for new words; else "cannot say" if that holds for one of them.
            A group with few words (`FEW`) decides nothing, unless it pays. Neither few known words nor known words in
            few pictures (`LEAST_PICTURES`) speak against new ones.
        reasons: group → reason.
    """

    verdict: Verdict
    reasons: dict[str, str]


class Part(NamedTuple):
    """The verdict on one group of words, and its reason."""

    verdict: Verdict
    reason: str


def promise(result: Mapping[str, Any]) -> Promise:
    """The verdict on a result of `lavender.evaluation.check.check_model`.

    Args:
        result: at least its keys `samples`, `groups` and `hidden`.
    """
    known, new = result["groups"]["known"], result["groups"]["new"]
    parts: dict[str, Part] = {}
    if known is not None:
        parts["known"] = _of_known(known, result["hidden"], result["samples"])
    if new is not None:
        all_words = result["groups"]["all"]["words"]
        # without enough known words the reader alone decides
        holds = known is None or _is_small(known, all_words) or _maps_hold(known)
        is_spread = not holds and "known" in parts and parts["known"].verdict == "no gain"
        parts["new"] = _of_new(new, holds, is_spread, result["samples"])
    deciding = [name for name in parts if result["groups"][name]["words"] >= FEW * result["groups"]["all"]["words"]]
    verdicts = [part.verdict for name, part in parts.items() if name in deciding or part.verdict == "pays"]
    order: tuple[Verdict, ...] = ("pays", "cannot say", "no gain")
    verdict = next(verdict for verdict in order if verdict in verdicts)
    return Promise(verdict, {name: part.reason for name, part in parts.items()})


def is_local(result: Mapping[str, Any]) -> bool:
    """Whether known words are read from where the maps show them, better than from the places of other pictures."""
    known = result["groups"]["known"]
    return known is not None and _maps_hold(known)


def hits(outcomes: Iterable[tuple[Verdict, bool]]) -> dict[str, float | int | None]:
    """How often verdicts were right.

    Args:
        outcomes: for each base and data the verdict, and whether alignment did pay.

    Returns:
        `right`, `wrong` and `open` (where it could not say): numbers of verdicts; `hit_rate`, right ÷ (right + wrong),
        None without any.
    """
    outcomes = list(outcomes)
    judged = [(verdict == "pays") == paid for verdict, paid in outcomes if verdict != "cannot say"]
    right = sum(judged)
    rate = right / len(judged) if judged else None
    return {"right": right, "wrong": len(judged) - right, "open": len(outcomes) - len(judged), "hit_rate": rate}


def _of_known(known: Mapping[str, Any], hidden: Mapping[str, float] | None, samples: int) -> Part:
    few = _too_few(known["pictures"], known["words"], samples)
    if few:
        return few
    if not _maps_hold(known):
        return _without_places(known, hidden, samples)
    gain, whole = known["gain_of_place"], known["loss"]["whole"]["mean"]
    told = (
        f"told where to choose, the model's loss per known word falls by {_shown(gain)} of {whole:.2f} nats "
        f"({known['words']} words in {known['pictures']} pictures)"
    )
    looks = f"{known['attention_mass']['mean']:.0%} of its attention is there already"
    low, high = _interval(gain)
    if low > LEAST_GAIN:
        return Part("pays", f"{told}, more than {LEAST_GAIN}; {looks}. Align, beside a plain run of equal steps.")
    if high < LEAST_GAIN:
        return Part("no gain", f"{told}, less than {LEAST_GAIN}; {looks}. Plain fine-tuning does as well.")
    return Part("cannot say", f"{told}, which may be {LEAST_GAIN} or not. {_more(gain, LEAST_GAIN, known, samples)}")


def _without_places(known: Mapping[str, Any], hidden: Mapping[str, float] | None, samples: int) -> Part:
    """Known words are not read from where the maps show them: because of the model, the maps, or the number."""
    over = known["over_control"]
    assert hidden is not None, "it is measured for every model whose maps do not hold"
    costs = f"hiding the worst ninth of the picture costs {hidden['part']:.2f} nats per word, hiding all of it"
    if hidden["all"] < LEAST_GAIN:
        return Part(
            "cannot say",
            f"the model does not use the picture for these words: hiding all of it costs {hidden['all']:.2f} nats per "
            f"word. Connect it first by plain training on captions, and check the result.",
        )
    if hidden["part"] < LOCAL * hidden["all"]:
        return Part(
            "no gain",
            f"{costs} {hidden['all']:.2f}: this model keeps what it sees of a thing all over the picture, not in the "
            f"thing's place. Choose a model, or a vision tower, that keeps it in place.",
        )
    against = f"from the maps' places a word is predicted better than from another picture's by {_shown(over)} nats"
    if _interval(over)[1] > LEAST_GAIN:
        return Part("cannot say", f"{against}. {_more(over, 0.0, known, samples)}")
    return Part(
        "cannot say",
        f"the maps say nothing about this model's words: {against}, though {costs} {hidden['all']:.2f}. Look at the "
        f"maps with `lavender look MAPS --data DATA --worst`, and take another teacher.",
    )


def _of_new(new: Mapping[str, Any], holds: bool, is_spread: bool, samples: int) -> Part:
    """The verdict on new words.

    Args:
        new: their figures.
        holds: whether the model reads known words from where the maps show them, if there are
            enough to tell.
        is_spread: whether it keeps what it sees of known words all over the picture.
        samples: number of samples that were checked.
    """
    if is_spread and (new["gain_of_reading"] is None or _interval(new["gain_of_reading"])[0] <= LEAST_READ):
        return Part(
            "no gain",
            "this model keeps no thing in its place, as known words show, and no reading of new words from their "
            "places speaks against it.",
        )
    unread = _unread(new, samples)
    if unread:
        return unread
    gain, read = new["gain_of_reading"], new["read"]
    told = (
        f"a linear reader of the model's image features gets {read['there']['mean']:.0%} of the new words right from "
        f"their places, {read['control']['mean']:.0%} from another picture's places, {read['whole']['mean']:.0%} from "
        f"the whole picture ({new['read_words']} words in {new['read_pictures']} pictures)"
    )
    low, high = _interval(gain)
    if low > LEAST_READ and holds:
        return Part("pays", f"{told}. Align these words, beside a plain run of equal steps.")
    if low > LEAST_READ:
        return Part(
            "cannot say",
            f"{told}, but the model does not read known words from their places. Connect it first by plain training "
            f"on captions of known words, and check the result.",
        )
    if high > LEAST_READ:
        return Part("cannot say", f"{told}. {_more(gain, LEAST_READ, new, samples)}")
    if holds and new["read_words"] >= LEAST_PER_FORM * new["read_forms"]:
        return Part("no gain", f"{told}: their places tell no more. Plain fine-tuning does as well.")
    return Part(
        "cannot say",
        f"{told}: there are too few samples per word ({new['read_words']} of {new['read_forms']} words), or the maps "
        "do not show these words. Check more samples with --limit, and look at the maps with "
        "`lavender look MAPS --data DATA --worst`.",
    )


def _maps_hold(group: Mapping[str, Any]) -> bool:
    """Whether a word is predicted better from its map's place than from that of another picture, beyond the margin."""
    return _interval(group["over_control"])[0] > 0


def _is_small(group: Mapping[str, Any], all_words: int) -> bool:
    return group["pictures"] < LEAST_PICTURES or group["words"] < FEW * all_words


def _unread(new: Mapping[str, Any], samples: int) -> Part | None:
    """What to say of new words most of which have none to be told from, or of which too few can be read."""
    if sum(new["alone"].values()) > new["words"] / 2:
        return Part(
            "cannot say",
            f"a reader would have nothing to tell {', '.join(new['alone'])} from: there is no other new word of the "
            f"same part of speech. Train a short run with alignment and a plain run of equal steps, and compare them "
            f"with `lavender eval`; or check again with pictures of at least one other such word.",
        )
    which = " that recur, beside another new word of their part of speech that recurs,"
    return _too_few(new["read_pictures"], new["read_words"], samples, which)


def _too_few(pictures: int, words: int, samples: int, which: str = "") -> Part | None:
    if pictures >= LEAST_PICTURES:
        return None
    wanted = math.ceil(samples * LEAST_PICTURES / max(1, pictures))
    return Part(
        "cannot say",
        f"{words} words{which} in {pictures} pictures of {samples} samples are too few; {LEAST_PICTURES} pictures are "
        f"the least. Check about {wanted} samples (--limit {wanted}), or add pictures if the data has fewer.",
    )


def _more(figure: Mapping[str, float | None], least: float, group: Mapping[str, Any], samples: int) -> str:
    """How many samples would tell a figure from `least`."""
    mean, margin = figure["mean"] or 0.0, figure["margin"] or 0.0
    distance = abs(mean - least)
    times = (margin / distance) ** 2 if distance > margin / 10 else 100.0
    wanted = math.ceil(samples * max(1.0, times) * 1.1)
    about = "more than" if times >= 100 else "about"
    return f"To tell, check {about} {wanted} samples (--limit {wanted})."


def _interval(figure: Mapping[str, float | None]) -> tuple[float, float]:
    mean, margin = figure["mean"] or 0.0, figure["margin"]
    return (-math.inf, math.inf) if margin is None else (mean - margin, mean + margin)


def _shown(figure: Mapping[str, float | None]) -> str:
    return f"{figure['mean']:.2f} ± {figure['margin']:.2f}"
