"""Figures as files."""

from __future__ import annotations

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


@rc_context(STYLE)
def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG, SVG or PDF, as the suffix says, and return its path.

    Atomic: a reader sees the old file or the new one, whole. Equal figures give equal bytes. The folder must exist.

    Raises:
        ValueError: for another suffix.
        OSError: if it cannot be written; an older file then stays as it was.
    """
    path = Path(path)
    if path.suffix not in METADATA:
        raise ValueError(f"cannot save a figure as '{path.name}': the name must end in {', '.join(METADATA)}")
    with replaced(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=figure.dpi, metadata=METADATA[path.suffix])
    return path
