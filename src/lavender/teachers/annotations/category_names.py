"""Find the words of a text that name a category.

A category is named by its name, its plural and its synonyms. The longest name wins: "hot dog" does not name a dog. A
one-word name is matched by nouns only: "an orange shirt" does not name an orange.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from lavender.maps import Word
from lavender.words import plain

_COCO_SYNONYMS = {
    "person": (
        "man, woman, boy, girl, child, kid, baby, toddler, people, guy, lady, gentleman, adult, crowd, "
        "player, batter, pitcher, catcher, umpire, skier, snowboarder, surfer, skateboarder, rider, cyclist, "
        "biker, motorcyclist, pedestrian, passenger, worker, officer, policeman, chef, bride, groom"
    ),
    "bicycle": "bike",
    "motorcycle": "bike, motorbike",
    "car": "automobile, taxi",
    "truck": "lorry",
    "airplane": "plane, aeroplane, jet, airliner",
    "boat": "ship, canoe, kayak, sailboat",
    "traffic light": "traffic signal, stoplight",
    "fire hydrant": "hydrant",
    "bird": "seagull, duck, goose, pigeon, parrot",
    "cat": "kitten",
    "dog": "puppy",
    "horse": "pony",
    "sheep": "lamb",
    "cow": "cattle, bull, calf",
    "handbag": "purse",
    "tie": "necktie",
    "suitcase": "luggage",
    "sports ball": "ball, soccer ball, tennis ball",
    "baseball bat": "bat",
    "baseball glove": "mitt",
    "tennis racket": "racket, racquet, tennis racquet",
    "surfboard": "surf board",
    "skateboard": "skate board",
    "snowboard": "snow board",
    "hot dog": "hotdog",
    "donut": "doughnut",
    "couch": "sofa",
    "potted plant": "plant, houseplant",
    "dining table": "table",
    "tv": "television, monitor",
    "laptop": "laptop computer",
    "mouse": "computer mouse",
    "remote": "remote control",
    "cell phone": "phone, cellphone, smartphone, mobile phone",
    "microwave": "microwave oven",
    "oven": "stove",
    "refrigerator": "fridge",
    "hair drier": "hair dryer, hairdryer, blow dryer",
    "playingfield": "playing field, field, court, tennis court, baseball field, soccer field",
    "railroad": "railway, track, train track, railroad track",
    "road": "street",
    "sea": "ocean",
    "sand": "beach",
    "stairs": "staircase",
    "pillow": "cushion",
    "mountain": "hill",
    "table": "desk",
    "pavement": "sidewalk",
    "cabinet": "cupboard",
    "sky": "cloud",
    "building": "skyscraper",
    "rock": "stone, boulder",
    "rug": "carpet",
    "grass": "lawn",
}
COCO_SYNONYMS: Mapping[str, Sequence[str]] = {name: words.split(", ") for name, words in _COCO_SYNONYMS.items()}
"""Additional words for categories of COCO, as captions use them. They name the category, not one of its things: "a man"
is every person."""

_STUFF_ENDINGS = re.compile(r"(-merged|-other|-stuff)+$")


def spoken_names(name: str, is_thing: bool) -> list[str]:
    """The names people say: "sky-other-merged" → "sky", "wall-brick" → "wall", "fire_hydrant" → "fire hydrant".

    Only the names of stuff have suffixes after a hyphen. The hyphen of a thing belongs to its name ("t-shirt").
    """
    names = [part.strip().lower().replace("_", " ") for part in re.split("[,;/]", name)]
    if not is_thing:
        names = [_STUFF_ENDINGS.sub("", part).split("-")[0] for part in names]
    return [part for part in names if part]


class CategoryNames:
    """Finds the categories that the words of a text name.

    Args:
        categories: (name, whether it is a thing and not stuff). Stuff with the same spoken name, such as "wall-brick"
            and "wall-tile", is found together.
        synonyms: additional words, by spoken name.
    """

    def __init__(self, categories: Iterable[tuple[str, bool]], synonyms: Mapping[str, Sequence[str]]):
        self._categories: dict[tuple[str, ...], dict[str, None]] = {}  # by tokens; ordered sets of categories
        for name, is_thing in categories:
            for spoken in spoken_names(name, is_thing):
                for synonym in (spoken, *synonyms.get(spoken, ())):
                    *first, last = re.split(r"[\s\-]+", synonym)
                    for form in {last, _singular(last)}:
                        self._categories.setdefault((*first, form), {})[name] = None
        self._longest = max((len(tokens) for tokens in self._categories), default=0)

    def match(self, text: str, words: Sequence[Word]) -> list[tuple[Sequence[Word], tuple[str, ...]]]:
        """Runs of words that name categories, in order, with the names of those categories.

        Args:
            text: the text.
            words: all its words, in order.
        """
        runs, start = [], 0
        while start < len(words):
            end, categories = self._longest_match(text, words, start)
            if categories:
                runs.append((words[start:end], categories))
            start = end if categories else start + 1
        return runs

    def _longest_match(self, text: str, words: Sequence[Word], start: int) -> tuple[int, tuple[str, ...]]:
        best, tokens = (start, ()), []
        for end in range(start + 1, len(words) + 1):
            word = words[end - 1]
            if end - start > 1 and not re.fullmatch(r"[\s\-]+", plain(text[words[end - 2].end : word.start]).text):
                break  # a comma stands between them
            parts = plain(word.text).text.lower().removesuffix("'s").split("-")
            tokens += parts
            if len(tokens) > self._longest:
                break
            if len(tokens) == 1 and word.part_of_speech != "noun":
                continue
            # As written, then the singular, then the lemma, because taggers err ("skis" → "sky").
            endings = dict.fromkeys([parts[-1], _singular(parts[-1]), word.lemma])
            firsts = [dict.fromkeys([token, _singular(token)]) for token in tokens[:-1]]
            names = next((self._categories[key] for key in product(*firsts, endings) if key in self._categories), None)
            if names:
                best = end, tuple(names)
        return best


def digest(synonyms: Mapping[str, Sequence[str]]) -> str:
    """A hash of a table of synonyms, as 16 hexadecimal digits."""
    content = json.dumps({key: list(value) for key, value in synonyms.items()}, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _singular(word: str) -> str:
    """Without the ending of a regular plural. The result is only compared, so it need not be a word."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if re.search("(ch|sh|ss|x|z)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word
