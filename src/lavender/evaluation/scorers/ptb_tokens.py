"""Words of captions as COCO's caption evaluation counts them: Penn Treebank tokens, lower case, without punctuation."""

from __future__ import annotations

import re

# What Stanford's PTBTokenizer writes for a character; the dashes, quotes and stops among them are then left out.
_WRITTEN_AS = str.maketrans(
    {
        **dict.fromkeys("‘’‛′", "'"),  # noqa: RUF001
        **dict.fromkeys("“”„«»", '"'),
        **dict.fromkeys("–—―", " -- "),
        "…": " ... ",
        "€": "$",
        "£": "#",
        "¢": " cents ",
        "½": "1/2",
        "¼": "1/4",
        "¾": "3/4",
        "\u00a0": " ",
        "\u00ad": "",
        "\ufe0f": "",
    }
)
_BEYOND_16_BITS = re.compile("[\U00010000-\U0010ffff]")  # PTBTokenizer leaves out emoji
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_LEFT_OUT = frozenset(["'", "`", '"', ".", "?", "!", ",", ":", "...", ";"])  # and runs of dashes
_ABBREVIATIONS = (
    "adj|adm|adv|al|ala|apr|ariz|asst|assn|assoc|attys?|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|cie|cmdr|"
    "co|col|colo|comdr|conn|corp|cpl|ct|dec|dept|det|dr|esq|est|etc|feb|fla|fri|ft|ga|gen|govs?|hon|inc|ind|"
    "intl|invt|jan|jr|jul|jun|kan|ky|lt|ltd|maj|mar|md|messrs|mich|minn|mlle|mme|mo|mon|mr|mrs|ms|mt|"
    "natl|nev|nov|oct|okla|ph|plc|pres|prof|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|sgt|sq|"
    "sr|st|ste|supt|tel|tenn|thu|thurs|tue|tues|univ|va|vs|vt|wed|wis|wisc|wyo|"
    "(?-i:Ark|ARK|Del|DEL|Mass|MASS|Miss|MISS|[Mm]fg|[Mm]tg|[Pp]te|[Pp]ty)"
)
_NUMBERED = "art|ca|figs?|no|nos|op|pp|prop"  # these keep their stop only before a number
_WORD = r"[^\W_]+(?:(?:[-\u2011_.]|'(?=clock))(?!(?<=\.)\d)[^\W_]+)*"
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)[^\s<>|(){{}}"]*[^\s<>|(){{}}".,;:!?']
    | </?[a-z!?][^>]*>                                                                # <unk>
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)*                                                    # photo@home
    | [@\#](?!\d)\w+
    | (?:{_ABBREVIATIONS})\.(?!\w)
    | (?:{_NUMBERED})\.(?=\s*\d)
    | [^\W\d_]+\.(?=[,;:])
    | (?:[a-z]\.)+[a-z](?![\w.])                                                      # a.m
    | (?:(?:ph|[a-z])\.)+(?!\w)                                                       # a.m.
    | (?:\+|(?<!\w)-?)\d*(?:[.,:]\d+)+(?:[/-]\d+)*                                    # 3.5 1,000 7:30
    | (?<!\w)\d+[a-z]+(?:/[a-z\d]+){{1,2}}                                            # 50km/h
    | (?:\+|(?<!\w)-?)\d+(?:[/-]\d+)*(?:[^\W\d_]+\d*)*(?:/\d+[^\W\d_]*)*(?:-[^\W_]+)* # 50 1/2 2nd 3x5 3-d
    | \.\d+
    | c\+\+ | c\#
    | (?-i:[A-Z]+(?:[+&][A-Z]+)+)                                                     # M&M, but not m&m
    | can(?=not(?!\w)) | (?:gon|wan)(?=na(?!\w)) | got(?=ta(?!\w)) | (?:gim|lem)(?=me(?!\w)) | 't(?=(?:is|was)(?!\w))
    | 'n' | '(?:n|em|til|cause|[2-9]0s|\d\d(?!\S))(?!['\w]) | ol'(?!\w) | y'(?=all(?!\w))
    | (?:'(?:s|m|d|re|ve|ll)|n't)(?!\w)
    | [^\W_]+?(?=n't(?!\w))
    | (?:[odl]'|ma'|c')?{_WORD}(?:/{_WORD}){{0,2}}                                    # a t-shirt and/or o'clock
    | \?[?!]+ | ![?!]+ | \.\.\. | --+ | [*~^=_]+
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def ptb_tokens(caption: str) -> list[str]:
    """Tokens of a caption by the Penn Treebank's rules: lower case, punctuation left out, "(" as "-lrb-".

    Those of Stanford's PTBTokenizer 3.4.1, which COCO's evaluation runs in Java, for captions in plain English. Other
    than there can be: emoticons, telephone numbers, file names, French elisions, addresses with a mark at their end
    ("photo@home,"), a letter after a sum ("3+4y"), and a full stop after an abbreviation without a space ("Jan.x").
    """
    text = _BEYOND_16_BITS.sub(" ", caption).translate(_WRITTEN_AS)
    tokens = (token.lower() for token in _TOKEN.findall(text))  # afterwards, for the rules of "&" and "Mass." need case
    return [_BRACKETS.get(token, token) for token in tokens if token not in _LEFT_OUT and token.strip("-")]
