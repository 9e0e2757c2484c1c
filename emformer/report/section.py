"""What a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Section(NamedTuple):
    """One heading of a report and what is below it.

    Attributes:
        name: of the element.
        title: the heading, plain text.
        caption: HTML: what is drawn, from how many, how to read it.
        data: for page.js: dictionaries, lists, arrays, strings, numbers; None where nothing is drawn.
        before: HTML above the figure, made of text that is escaped.
        plots: ids of the drawing areas, as "name-plot".
        keys: whose definitions tell what is drawn; linked below the caption.
        kind: the function in page.js that draws `data`; that of `name`, where it is empty.
    """

    name: str
    title: str
    caption: str = ""
    data: Any = None
    before: str = ""
    plots: Sequence[str] = ("plot",)
    keys: Sequence[str] = ()
    kind: str = ""
