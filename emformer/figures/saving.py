"""Figures as files, and as parts of a page."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from emformer.figures.style import STYLE
from emformer.files import replaced

# what the writers would add of their own: times and versions, which make equal figures differ
METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ margin: 0; background: white }} svg {{ display: block; max-width: 100%; height: auto; margin: 0 auto }}</style>
</head>
<body>
{svg}
</body>
</html>
"""


@rc_context(STYLE)
def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG, SVG, PDF or HTML, as the suffix says, and return its path.

    HTML is one page that needs nothing else: the figure as SVG. Atomic: a reader sees the old file or the new one, whole. Equal
    figures give equal bytes. The folder must exist.

    Raises:
        ValueError: for another suffix.
        OSError: if it cannot be written; an older file then stays as it was.
    """
    path = Path(path)
    if path.suffix not in METADATA and path.suffix != ".html":
        raise ValueError(f"cannot save a figure as '{path.name}': the name must end in {', '.join(METADATA)}, .html")
    with replaced(path) as partial:
        if path.suffix == ".html":
            page = PAGE.format(title=html.escape(_title(figure)), svg=svg(figure))
            partial.write_text(page, encoding="utf-8", newline="\n")
        else:
            figure.savefig(partial, format=path.suffix[1:], dpi=figure.dpi, metadata=METADATA[path.suffix])
    return path


@rc_context(STYLE)
def svg(figure: Figure, name: str = "") -> str:
    """The figure as an <svg> element for an HTML page; its text is drawn as shapes and told to screen readers by its title.

    Args:
        name: put before every id in it, so that several figures can stand on one page; letters, digits and -.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=figure.dpi, metadata=METADATA[".svg"])
    text = file.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).rstrip()
    if name:
        text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    label = html.escape(_title(figure))
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _title(figure: Figure) -> str:
    """The first line of what the figure says of itself."""
    return next(iter(figure.get_suptitle().splitlines()), "figure")
