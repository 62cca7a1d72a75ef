"""Values of every kind that a settings file can hold: most are wrong for any one setting."""

from __future__ import annotations

WRONG_VALUES = (
    None,
    True,
    5,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "x",
    "1",
    "-1",
    "no",
    "a" * 5000,
    "\0",
    b"x",
    [],
    [1],
    ["x"],
    [[1]],
    [{}],
    {},
    {"a": 1},
    {1: 2},
    {"a": [[]]},
    (),
    ({},),
    object(),
)
