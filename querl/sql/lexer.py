"""The little of SQLite's lexical grammar that is needed before a statement is parsed or run."""

from __future__ import annotations

import re
from collections.abc import Iterator

# possessive quantifiers: a 100 kB string literal must not cost 100,000 backtracking points
_SPACE = r"[\s;\ufeff]++"
_COMMENT = r"--[^\n]*+ | /\*(?:[^*]|\*(?!/))*+(?:\*/)?"
_STRING = r"'(?:[^']|'')*+'?"
_QUOTED = r""""(?:[^"]|"")*+"? | `(?:[^`]|``)*+`? | \[[^\]]*+\]?"""
_WORD = r"[^\W\d][\w$]*+"
_TOKEN = re.compile(
    rf"(?P<space>{_SPACE}) | (?P<comment>{_COMMENT}) | (?P<string>{_STRING}) "
    rf"| (?P<quoted>{_QUOTED}) | (?P<word>{_WORD}) | (?P<other>.)",
    re.VERBOSE | re.DOTALL,
)
# up to the first and the last token that says something: eight times faster than a loop over all
_SKIPPED = rf"(?:{_SPACE} | {_COMMENT})*+"
_SAYING = rf"(?:{_STRING} | {_QUOTED} | {_WORD} | .)"
_TO_THE_FIRST = re.compile(rf"{_SKIPPED} ({_SAYING})", re.VERBOSE | re.DOTALL)
_TO_THE_LAST = re.compile(rf"(?:{_SKIPPED} {_SAYING})*+", re.VERBOSE | re.DOTALL)

_BARE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# words that SQLite does not take, or not everywhere, as a bare name
_RESERVED_WORDS = """
ADD ALL ALTER AND AS AUTOINCREMENT BETWEEN CASE CAST CHECK COLLATE COMMIT CONSTRAINT CREATE
CROSS CURRENT_DATE CURRENT_TIME CURRENT_TIMESTAMP DEFAULT DEFERRABLE DELETE DISTINCT DROP
ELSE ESCAPE EXCEPT EXISTS FOREIGN FROM FULL GROUP HAVING IN INDEX INDEXED INNER INSERT
INTERSECT INTO IS ISNULL JOIN LEFT LIMIT NATURAL NOT NOTHING NOTNULL NULL ON OR ORDER OUTER
PRIMARY RAISE REFERENCES RETURNING RIGHT SELECT SET TABLE THEN TO TRANSACTION UNION UNIQUE
UPDATE USING VALUES WHEN WHERE
"""
RESERVED = frozenset(re.findall(r"\w+", _RESERVED_WORDS))


def tokens(sql: str) -> Iterator[tuple[str, str]]:
    """Pairs of (kind, text) whose texts join to ``sql``.

    Kinds: space (with ``;``), comment, string, quoted (an identifier), word, other (one character).
    """
    for match in _TOKEN.finditer(sql):
        yield match.lastgroup or "other", match.group()


def first_word(sql: str) -> str:
    """The first token that is neither space nor comment, in upper case; empty for a blank text."""
    first = _TO_THE_FIRST.match(sql)
    return first[1].upper() if first else ""


def is_blank(sql: str | None) -> bool:
    """Whether there is no statement: None, white space, semicolons, comments."""
    return sql is None or not first_word(sql)


def without_end(sql: str) -> str:
    """The SQL without the blanks, semicolons and comments behind its last other token."""
    statement = _TO_THE_LAST.match(sql)
    assert statement is not None  # the pattern matches the empty text too
    return statement[0]


def one_spelling(sql: str) -> str:
    """The SQL as its other spellings have it too: blanks, comments and the case of words go."""
    return " ".join(
        text.lower() if kind == "word" else text
        for kind, text in tokens(sql)
        if kind not in ("space", "comment")
    )


def without_distinct(sql: str) -> str:
    """The SQL without its DISTINCT keywords, in strings and quoted names left alone."""
    # a string or a quoted name has its quotes, and so is never the word
    return "".join(text for _, text in tokens(sql) if text.lower() != "distinct")


def has_top_level_order_by(sql: str) -> bool:
    """Whether ORDER BY stands outside all parentheses: exact where a SELECT itself has none."""
    depth, previous = 0, ""
    for kind, text in tokens(sql):
        if kind in ("space", "comment"):
            continue
        depth += (text == "(") - (text == ")")
        word = text.upper() if kind == "word" else ""
        if depth == 0 and previous == "ORDER" and word == "BY":
            return True
        previous = word
    return False


def quote_name(name: str) -> str:
    """A table or column name as SQL needs it: bare where SQLite takes it so, else quoted."""
    is_bare = _BARE_NAME.fullmatch(name) and name.upper() not in RESERVED
    return name if is_bare else '"' + name.replace('"', '""') + '"'
