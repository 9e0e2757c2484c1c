"""Text of a corpus as it may be drawn: everything visible, nothing obeyed."""

from __future__ import annotations

import functools
import unicodedata

from matplotlib.font_manager import FontProperties, findfont, get_font

FONT = "DejaVu Sans"  # comes with matplotlib, so figures look the same everywhere
MARKS = {"\n": "↵", "\r": "\\r", "\t": "⇥"}
BLANK = "□"


def legible(text: str, most: int | None = None) -> str:
    """The text with control characters, marks of direction and unusual spaces as escapes, line ends as ↵, what is only spaces as
    ␣, and □ for what the font cannot draw; of more than `most` characters the first and an ellipsis.

    Formulas are not parsed in figures (`STYLE`), so $ stays.
    """
    if text and not text.strip(" "):
        text = "␣" * len(text)
    # a long text is not worth looking at to its end
    shown = "".join(map(_shown, text[: None if most is None else most + 1]))
    return shown if most is None or len(shown) <= most else f"{shown[: most - 1]}…"


def _shown(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    kind = unicodedata.category(character)
    if kind[0] == "C" or (kind[0] == "Z" and character != " "):
        return character.encode("unicode_escape").decode()
    return character if ord(character) in _glyphs() else BLANK


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=FONT))).get_charmap())
