"""What each key means: where every number of a report leads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from emformer.listing import definition
from emformer.observables.frame import Key
from emformer.report.section import Section
from emformer.report.text import escaped, isolated


def anchors(keys: Iterable[str]) -> dict[str, str]:
    """The id of each key's entry; keys may hold anything, ids do not."""
    return {key: f"key-{number}" for number, key in enumerate(dict.fromkeys(keys))}


def glossary(known: Mapping[str, Key], ids: Mapping[str, str]) -> Section:
    """An entry a key that the page names, in the order of their names."""
    entries = []
    for key in sorted(ids):
        own = known.get(key)
        family = f" <small>{escaped(own.family)}</small>" if own else ""
        meaning = escaped(definition(key, known) or "recorded by an observable that is not loaded here")
        entries.append(f'<dt id="{ids[key]}">{isolated(key)}{family}</dt><dd>{meaning}</dd>')
    before = (
        "<p>x is the raw stream, y what a sublayer reads of it, D the update of a step; a null is what chance alone would give. "
        "Of means over prompts n counts prompts, of pooled clouds points; se is the standard error of the mean.</p>"
        f"<dl>{''.join(entries)}</dl>"
    )
    return Section("glossary", "What each key means", before=before, plots=())
