"""Names between backticks, as a page shows them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

_CODE = re.compile(r"`([^`\n]+)`")


def with_code(text: str) -> Markup:
    """The text as HTML, in which what stands between backticks is code; the jinja filter `code` of every page.

    Examples:
        >>> from lavender.evaluation.inline_code import with_code
        >>> str(with_code("`lavender eval` of a < b"))
        '<code>lavender eval</code> of a &lt; b'
    """
    from markupsafe import Markup, escape

    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))
