"""By what the tokens of a scene are told apart: cluster, class, the token itself, or its position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from emformer.figures.legible import legible
from emformer.figures.staged import Scene
from emformer.figures.style import KINDS

By = Literal["cluster", "class", "token", "position"]
REST = "others"


class Kind(NamedTuple):
    """Tokens that look alike: `members` (S, P, N) says which at each state. The place in `KINDS` is None for the rest."""

    name: str
    look: int | None
    members: np.ndarray


def kinds(scene: Scene, by: By) -> list[Kind]:
    """The largest kinds of tokens, in the order of their colours, and the rest; none where the scene does not know them."""
    if by == "cluster":
        names = cluster_names(scene)
        return [Kind(names[k], k, scene.clusters == k) for k in sorted(names)]
    values = scene.classes if by == "class" else scene.ids if by == "token" else None
    if values is None:
        return []
    sizes = Counter(values[values >= 0].tolist())
    largest = sorted(sizes, key=lambda value: (-sizes[value], value))[: len(KINDS)]
    names = dict(zip(scene.ids.ravel().tolist(), (word for words in scene.words for word in words), strict=True))
    every = np.broadcast_to(values, scene.clusters.shape)
    found = [
        Kind(f"{scene.class_name} {one}" if by == "class" else f"“{legible(names[one], 14)}”", look, every == one)
        for look, one in enumerate(largest)
    ]
    rest = ~np.isin(every, largest)
    return [Kind(REST, None, rest), *found] if rest.any() else found


def cluster_names(scene: Scene) -> dict[int, str]:
    """The clusters of any state, each with the words that are most frequent in it at the last state that has it."""
    found = {}
    for k in range(int(scene.clusters.max()) + 1):
        having = [state for state in range(len(scene.states)) if (scene.clusters[state] == k).any()]
        if not having:
            continue
        where = scene.clusters[having[-1]] == k
        counts = Counter(legible(scene.words[p][t].strip(" ") or scene.words[p][t], 9) for p, t in np.argwhere(where))
        found[k] = f"{k}: {' '.join(word for word, _ in counts.most_common(3))}"
    return found


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spaced, the first and the last among them."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, most))})


def state_name(state: tuple[int, str]) -> str:
    """ "X⁰, embedded", "layer 3 after the FFN"."""
    layer, point = state
    after = {"embed": "X⁰, embedded", "attn": f"layer {layer} after attention", "ffn": f"layer {layer} after the FFN"}
    return after.get(point, f"layer {layer} after its block")


def facts(scene: Scene, *more: str) -> str:
    """Where a figure of a scene is from: its title, and what else is to be known."""
    return ", ".join(text for text in (scene.title, *more) if text)


def sample(scene: Scene) -> str:
    """ "n = 8 prompts of 64 tokens"."""
    prompts, length = scene.ids.shape
    return f"n = {prompts} prompt{'s' * (prompts > 1)} of {length} tokens"


def chosen(scene: Scene, states: Sequence[int] | None, most: int) -> list[int]:
    """The places of the states to show: those asked for, else `most` evenly spaced.

    Raises ValueError for one that is not there.
    """
    places = spread(len(scene.states), most) if states is None else list(states)
    if not all(0 <= place < len(scene.states) for place in places) or not places:
        raise ValueError(f"states are places 0 … {len(scene.states) - 1} of the scene, not {places}")
    return places


def lost(coords: np.ndarray) -> Iterator[str]:
    """A remark on tokens without a direction, where there are any."""
    count = int(np.isnan(coords).any(-1).sum())
    if count:
        yield f"{count} points without a direction"
