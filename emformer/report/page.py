"""Sections, plotly's script and our own as one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

from emformer.parts import UserError
from emformer.report.section import Section
from emformer.report.text import escaped, script_data

try:
    from plotly.offline import get_plotlyjs
except ImportError:
    get_plotlyjs = None

HERE = Path(__file__).parent


def require_plotly() -> Callable[[], str]:
    """What gives plotly's script. Raises `UserError` where plotly is not installed."""
    if get_plotlyjs is None:
        raise UserError("a report needs plotly, which is not installed; pip install 'emformer[report]'.")
    return get_plotlyjs


def page(title: str, facts: str, missing: Iterable[str], sections: Sequence[Section], ids: Mapping[str, str]) -> str:
    """The whole file. `title` is plain text, `facts` HTML, `missing` plain sentences, `ids` the places of the keys' definitions.

    A browser that keeps to the policy in its head runs the two scripts in it, which are named by their hashes, and nothing else;
    it loads nothing from anywhere.

    Raises `UserError` without plotly.
    """
    plotly, script = require_plotly()(), _own("page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_own("page.html")).substitute(
        policy=policy,
        title=escaped(title),
        heading=escaped(title),
        style=_own("page.css"),
        facts=facts,
        missing="".join(f"<p class=missing>{escaped(sentence)}</p>" for sentence in missing),
        links=" ".join(f'<a href="#{section.name}">{escaped(section.title)}</a>' for section in sections),
        sections="\n".join(_section(section, ids) for section in sections),
        version=_version(),
        data="\n".join(
            f'<script type="application/json" id="data-{section.name}">{script_data(section.data)}</script>'
            for section in sections
            if section.data is not None
        ),
        plotly=plotly,
        script=script,
    )


def _section(section: Section, ids: Mapping[str, str]) -> str:
    figure = ""
    if section.data is not None:
        plots = "".join(f'<div class="plot" id="{section.name}-{name}"></div>' for name in section.plots)
        links = [f'<a href="#{ids[key]}"><code>{escaped(key)}</code></a>' for key in section.keys if key in ids]
        means = f'<p class="keys">Defined below: {", ".join(links)}</p>' if links else ""
        figure = (
            f'<figure data-figure="{section.name}" data-kind="{section.kind or section.name}">'
            '<div class="controls"></div><div class="legend"></div>'
            f'<div class="plots">{plots}</div><figcaption>{section.caption}{means}</figcaption></figure>'
        )
    return f'<section id="{section.name}"><h2>{escaped(section.title)}</h2>{section.before}{figure}</section>'


def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _version() -> str:
    try:
        return version("emformer")
    except PackageNotFoundError:
        return ""
