"""Which absent things a yes/no question asks for: the three samplings of POPE (Li et al. 2023, arXiv:2305.10355, §5).

They are defined on sets of names, so that they fit any annotated pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Literal, get_args

import numpy as np

from lavender.errors import DataError

Sampling = Literal["random", "popular", "adversarial"]
"""random: any absent names. popular: the absent names that the most pictures show. adversarial: the absent names that
occur most often together with those of the picture."""
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)


def absent_names(
    present: Sequence[Sequence[str]], names: Sequence[str], sampling: Sampling, count: int, seed: int
) -> list[list[str]]:
    """For each picture the names to ask for that it does not show.

    Args:
        present: the names that each picture shows. The frequencies are counted over all of them, as POPE does.
        names: all names. Of names that are equally frequent, the first ones are taken.
        sampling: see `Sampling`.
        count: how many names per picture.
        seed: of the random sampling.

    Raises:
        DataError: a picture leaves fewer than `count` names to ask for.

    Examples:
        >>> shown = [("dog", "cat"), ("dog", "bus"), ("cat", "bus"), ("cat", "bus"), ("tree",)]
        >>> names = ("tree", "dog", "cat", "bus")
        >>> absent_names(shown, names, "popular", 1, seed=0)
        [['bus'], ['cat'], ['dog'], ['dog'], ['cat']]
        >>> absent_names(shown, names, "adversarial", 1, seed=0)[1]
        ['cat']
    """
    for index, shown in enumerate(present):
        if len(set(names) - set(shown)) < count:
            raise DataError(
                f"picture {index}, which shows {len(set(shown))} of {len(names)} names",
                f"at least {count} names that it does not show",
                "ask fewer questions per picture",
            )
    pictures_with = Counter(name for shown in present for name in set(shown))
    together = Counter(pair for shown in present for pair in permutations(set(shown), 2))

    def chosen(index: int, shown: Sequence[str]) -> list[str]:
        absent = [name for name in names if name not in shown]
        if sampling == "random":
            return [str(name) for name in np.random.default_rng([seed, index]).permutation(absent)[:count]]
        frequency: dict[Sampling, Callable[[str], int]] = {
            "popular": lambda name: pictures_with[name],
            "adversarial": lambda name: sum(together[name, other] for other in set(shown)),
        }
        return sorted(absent, key=lambda name: -frequency[sampling](name))[:count]

    return [chosen(index, shown) for index, shown in enumerate(present)]
