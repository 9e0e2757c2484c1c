"""Text that nobody has vouched for, as text: what cannot be seen is written out, what is code is escaped."""

from __future__ import annotations

import html
import json
import math
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

MOST = 2_000  # characters of a fact
PICTURES = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format (marks of direction), surrogates, unassigned, separators


def visible(text: str) -> str:
    """The text with every character that is not seen, or that moves its neighbours, written out: ␀, ↵, ⟨U+202E⟩."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_seen(character) for character in text)


def escaped(text: object) -> str:
    """`visible`, with the characters that mean something to HTML replaced; quotes too."""
    return html.escape(visible(str(text)))


def isolated(text: object) -> str:
    """`escaped`, in an element that keeps its direction of writing to itself."""
    return f"<bdi>{escaped(text)}</bdi>"


def fact_list(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values as HTML; of a long value the beginning."""
    return f"<dl class=facts>{''.join(_fact(name, value) for name, value in facts)}</dl>"


def script_data(value: Any) -> str:
    """JSON that may stand inside a script element: no character of it can end the element or begin another, none is beyond
    ASCII. Every string is `visible`, every number finite; nan and infinity become null, floats are rounded to five digits."""
    told = json.dumps(_plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        told = told.replace(character, f"\\u{ord(character):04x}")
    return told


def _fact(name: str, value: str) -> str:
    value = value if len(value) <= MOST else f"{value[: MOST - 1]}…"
    wide = " class=long" if len(value) > 80 else ""
    return f"<div{wide}><dt>{escaped(name)}</dt><dd>{isolated(value)}</dd></div>"


def _seen(character: str) -> str:
    if character in PICTURES:
        return PICTURES[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in UNSEEN else character


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {visible(str(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(f"{float(value):.5g}")
        return None if not math.isfinite(number) else int(number) if number.is_integer() and abs(number) < 1e15 else number
    if value is None:
        return None
    raise TypeError(f"{type(value).__name__} is no data of a page")
