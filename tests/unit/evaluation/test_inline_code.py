"""Names between backticks on a page, and that nothing else becomes HTML."""

from __future__ import annotations

import pytest

from lavender.evaluation.inline_code import with_code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`match` is exact", "<code>match</code> is exact"),
        ("a < b & `c < d`", "a &lt; b &amp; <code>c &lt; d</code>"),
        ("`<script>`", "<code>&lt;script&gt;</code>"),
        ("one ` alone", "one ` alone"),
        ("`over\nlines`", "`over\nlines`"),
    ],
)
def test_names_between_backticks_are_code(text, expected):
    assert str(with_code(text)) == expected
