"""Which words of a conversation are aligned, which map each of them takes, and in which rows.

A word takes its own map from the map store. With `attributes="noun"` an adjective takes its noun's map, and where the
data has a column `about`, a word of an answer takes the map of the words that it is about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavender.alignment.attributes import described_nouns
from lavender.alignment.coverage import LEAST_CONFIDENT, NO_NOUN, NO_RECORD, NOT_OF_TEXTS, NOUN_WITHOUT, SUBJECT_WITHOUT
from lavender.alignment.examples import describe
from lavender.config import ROLES, AlignmentConfig, Rows, WordTokens
from lavender.data.about import Link, Place
from lavender.data.conversations import text_of
from lavender.data.store import MapStore, SeveralStores
from lavender.errors import ConfigError, StoreError
from lavender.maps import Word, WordMaps
from lavender.words import subjects_and_objects


class WordRows(NamedTuple):
    """Rows of a word.

    Attributes:
        rows: their positions.
        reads: whether they read the word's tokens, or predict them.
    """

    rows: tuple[int, ...]
    reads: bool


def rows_of_word(predicting: tuple[int, ...], rows: Rows, tokens: WordTokens) -> list[WordRows]:
    """The rows of a word to align: one entry, or with `rows="both"` two.

    Examples:
        >>> from lavender.alignment.word_targets import rows_of_word
        >>> [tuple(entry) for entry in rows_of_word((7, 8), "both", "first")]
        [((7,), False), ((8,), True)]

    Args:
        predicting: positions of the rows that predict the word's tokens. The next position reads the token.
        rows, tokens: the settings of `AlignmentConfig`.
    """
    predicting = predicting[:1] if tokens == "first" else predicting
    reading = tuple(row + 1 for row in predicting)
    return {
        "predict": [WordRows(predicting, False)],
        "read": [WordRows(reading, True)],
        "both": [WordRows(predicting, False), WordRows(reading, True)],
    }[rows]


class Target(NamedTuple):
    """A word or phrase of a turn, the map that it takes, (rows, cols), and the teacher's confidence in this map."""

    word: Word
    map: Tensor
    confidence: float


class TurnTargets(NamedTuple):
    """The words of one turn that have a map on one picture.

    Attributes:
        picture: index of the picture in the sample.
        turn: index of the message.
        text: the message's text.
        targets: the words, in their order; no two overlap.
    """

    picture: int
    turn: int
    text: str
    targets: list[Target]


class WordTargets:
    """Chooses the words of conversations that are aligned, and their maps.

    Args:
        store: the teacher's maps.
        config: which turns and words to align.

    Raises:
        ConfigError: the store was made without maps of the turns that are to be aligned.
    """

    def __init__(self, store: MapStore | SeveralStores, config: AlignmentConfig):
        self.store, self._config = store, config
        self._roles = ROLES[config.texts]
        missing = [] if store.roles is None else [role for role in self._roles if role not in store.roles]
        if missing:
            raise ConfigError(
                f"texts={config.texts!r} with a map store that has no maps of the {missing[0]}'s turns",
                "maps of every turn that is to be aligned",
                f"extract with --texts {config.texts} to another folder, or change texts",
            )

    def of(
        self,
        example: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        identities: Sequence[str],
        links: Sequence[Link],
        dropped: Counter[str],
    ) -> list[TurnTargets] | None:
        """The words of a sample that are aligned, picture by picture and turn by turn.

        Args:
            example: the sample, for messages.
            messages: its conversation.
            identities: the `image_id` of each of its pictures.
            links: its words that are about others.
            dropped: counter of the reasons why words have no map. It is updated.

        Returns:
            None if the store has no maps of this sample.

        Raises:
            StoreError: a map or confidence in the store is not finite or out of range.
        """
        texts = {turn: text_of(message["content"]) for turn, message in enumerate(messages)}
        turns = [turn for turn, message in enumerate(messages) if message["role"] in self._roles and texts[turn]]
        chosen, found, linked = [], set(), set()
        for picture, identity in enumerate(identities):
            for turn in turns:
                own_links = [link for link in links if link.word.turn == turn]
                maps = self.store.get(identity, texts[turn])
                targets = [] if maps is None else self._own(maps, own_links, example, dropped)
                for link in own_links:
                    subject = self.store.get(identity, texts[link.about.turn])
                    target = None if subject is None else _linked(link, texts[turn], subject, example)
                    if target is not None:
                        targets.append(target)
                        linked.add(link)
                if maps is not None or targets:
                    found.add(turn)
                    chosen.append(TurnTargets(picture, turn, texts[turn], sorted(targets, key=_start)))
        dropped[SUBJECT_WITHOUT] += sum(link.word.turn in turns and link not in linked for link in links)
        dropped[NOT_OF_TEXTS] += sum(link.word.turn not in turns for link in links)
        if found and self._config.texts != "answers":
            dropped[NO_RECORD] += len(turns) - len(found)
        return chosen if found else None

    def _own(
        self, maps: WordMaps, links: Sequence[Link], example: Mapping[str, Any], dropped: Counter[str]
    ) -> list[Target]:
        """The chosen words of a record, each with a map of this record, without those that `links` give another map."""
        config, takes_noun = self._config, self._config.attributes == "noun"
        heads = subjects_and_objects(maps.text) if config.subjects_and_objects else None
        taken: list[Word | Place] = [link.word for link in links]
        chosen = {
            word: [place]
            for place, word in enumerate(maps.words)
            if not (takes_noun and word.part_of_speech == "adjective")
            and (config.parts_of_speech is None or word.part_of_speech in config.parts_of_speech)
            and (heads is None or word.start in heads)
            and not _overlaps(word, taken)
        }
        if takes_noun:
            taken += chosen
            for adjective, noun in described_nouns(maps.text).items():
                if _overlaps(adjective, taken):  # "hot" of the phrase "hot dog"
                    continue
                places = [] if noun is None else _places(maps, noun.start, noun.end)
                if places:
                    chosen[adjective] = places[:1]
                else:
                    dropped[NO_NOUN if noun is None else NOUN_WITHOUT] += 1
        targets = [_target(word, maps, places, example) for word, places in chosen.items()]
        return _most_confident(targets, config.word_share, dropped)


def _most_confident(targets: list[Target], share: float, dropped: Counter[str]) -> list[Target]:
    """This share of the targets, at least one: those with the most confident maps. The others are counted.

    More are kept where several are as confident as the last one of the share: all of them, in a store without
    confidences. The order of words decides nothing.
    """
    if share == 1 or not targets:
        return targets
    num_kept = max(1, round(share * len(targets)))
    least = sorted(target.confidence for target in targets)[-num_kept]
    kept = [target for target in targets if target.confidence >= least]
    dropped[LEAST_CONFIDENT] += len(targets) - len(kept)
    return kept


def _linked(link: Link, text: str, subject: WordMaps, example: Mapping[str, Any]) -> Target | None:
    """A phrase with the mean map of the words that it is about; None if these have no map."""
    places = _places(subject, link.about.start, link.about.end)
    start, end = link.word.start, link.word.end
    return _target(Word(text[start:end], start, end, "", "other"), subject, places, example) if places else None


def _target(word: Word, maps: WordMaps, places: Sequence[int], example: Mapping[str, Any]) -> Target:
    """A word with the mean of a record's maps at these places. Raises StoreError for numbers without a meaning."""
    for place in places:
        confidence = float(maps.confidence[place])
        is_sure = 0 <= confidence <= 1  # NaN is not
        if not (is_sure and maps.maps[place].isfinite().all()):
            raise StoreError(
                f"{'a map that is not finite' if is_sure else f'a confidence of {confidence}'} for "
                f"{maps.words[place].text!r} in the map store, of {describe(example)}",
                "finite maps, and confidences from 0 to 1",
                "run `lavender inspect` on the store, and extract what is damaged anew",
            )
    if len(places) == 1:
        return Target(word, maps.maps[places[0]], float(maps.confidence[places[0]]))
    chosen = torch.tensor(places)
    return Target(word, maps.maps[chosen].mean(dim=0), float(maps.confidence[chosen].mean()))


def _places(maps: WordMaps, start: int, end: int) -> list[int]:
    """The places in a record of the words that overlap the characters [start, end)."""
    return [place for place, word in enumerate(maps.words) if _overlap(word, start, end)]


def _overlap(word: Word, start: int, end: int) -> bool:
    return word.start < end and word.end > start


def _overlaps(word: Word, others: Iterable[Word | Place]) -> bool:
    return any(_overlap(word, other.start, other.end) for other in others)


def _start(target: Target) -> int:
    return target.word.start
