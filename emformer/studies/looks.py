"""What an analysis looks at, and how many of its prompts each observable sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from emformer import parts
from emformer.model import Emformer
from emformer.observables import Look
from emformer.observables.breathing import Breathing, Controls
from emformer.observables.flow import Transport
from emformer.observables.frame import defaults, family
from emformer.parts import UserError

SOME = 4096  # prompts seen by an observable that the table does not name

# Prompts that each observable sees; None: all of them. A standard error falls with the root of their number: 4,096 prompts bring
# it to 1.6 % of the spread between prompts, which is enough where a prompt is dear. Milliseconds a prompt of 64 tokens, default
# model, one core, beside 5 ms for capturing its trajectory:
WHO_SEES: Mapping[str, int | None] = {
    "Flow": None,  # 3
    "Clustering": None,  # 2.5; k-means, neighbours and labels of 512 tokens drawn from all prompts
    "Density": None,  # 0.1; 512 tokens drawn from all
    "Scan": None,  # 0.1; 512 tokens drawn from all
    "Breathing": None,  # 0.02; 4,096 last tokens drawn from all
    "Operators": None,  # 0; reads the weights, once
    "Directions": None,  # 0.5
    "Sinks": None,  # 2; 256 prompts drawn from all for what sinks give
    "Signal": None,  # 6
    "Controls": SOME,  # 0.2, and two random numbers a coordinate: as many as it keeps
    "Transport": SOME,  # 2.5, an exact assignment a step
    "Bures": SOME,  # 2, a singular value decomposition a step; 12 for 128 tokens
    "Energy": SOME,  # 8, H N^2 numbers some twenty times in float64
    "Foliation": SOME,  # 9, gradients at seven offsets
    "Lens": SOME,  # 12, and grows with the vocabulary
    "Gaussian": SOME,  # 10, the scores again and two mixtures of them
    "GradientControls": 4,  # seconds, as GradientFlow
    "Landscape": SOME,  # 4, energies of every step twice
    "Spectrum": 1024,  # 19, of 128 tokens 78: four N x N decompositions a head
    "GradientFlow": 8,  # seconds: Jacobians
}
POINTS = 4096  # of the last-token cloud, at most: neighbours cost their square
FEWEST = 1024  # points, whatever their memory: with fewer no dimension is of use
POOLED = 1 << 29  # bytes that these points may take


def looks(model: Emformer, observables: str | parts.Observable | Look | Iterable[str | parts.Observable | Look]) -> list[Look]:
    """Looks at one observable each, no two the same.

    Args:
        observables: "all" for every family; names of families, several by commas too; settings of observables; or looks, which
            say themselves how many prompts they see. With breathing by name, the same prompts shuffled are looked at too.

    Raises:
        UserError: for a family that does not exist, with the nearest that does; and if nothing is named.
    """
    given = [observables] if isinstance(observables, str | parts.Observable | Look) else list(observables)
    found: list[Look] = []
    for one in given:
        if isinstance(one, Look):
            found += [Look((part,), one.prompts, one.order) for part in one.observables]
        elif isinstance(one, parts.Observable):
            found.append(Look((one,), WHO_SEES.get(type(one).__name__, SOME)))
        else:
            for part in named(one):
                found += _looks(model, part)
    kept: list[Look] = []
    for look in found:
        if look not in kept:
            kept.append(look)
    if not kept:
        raise UserError("no observable is named; choose all, or families as flow,clustering.")
    return kept


def named(text: str) -> list[parts.Observable]:
    """Observables by words: "all", or families with commas between. Raises `UserError` for one that does not exist."""
    if text == "all":
        return defaults()
    return [part for name in text.split(",") if name.strip() for part in family(name.strip())]


def _looks(model: Emformer, part: parts.Observable) -> list[Look]:
    """What is looked at of an observable that was named by its family: beside some, what they are to be held against."""
    if isinstance(part, Breathing | Controls):
        part = replace(part, points=points(model))
    found = [Look((part,), WHO_SEES.get(type(part).__name__, SOME))]
    if isinstance(part, Breathing):  # the same words without their syntax
        found.append(Look((part,), part.points, "shuffled"))
    if isinstance(part, Transport):  # and without the first token, which may carry most of the distance
        found.append(Look((replace(part, skip=1),), SOME))
    return found


def points(model: Emformer) -> int:
    """Last tokens that breathing keeps: of each state, its read cloud and the update that led there."""
    states = 2 * model.settings.depth + 1
    bytes_each = 3 * states * model.settings.dim * next(model.parameters()).element_size()
    return max(FEWEST, min(POINTS, POOLED // bytes_each))
