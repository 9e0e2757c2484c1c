"""What a model is and what became of its checkpoint's biases and gains, in a few lines."""

from __future__ import annotations

from dataclasses import fields

from emformer import parts
from emformer.model import Emformer


def summary(model: Emformer, family: str) -> str:
    """Family, sizes, M and F, and of a model of another library what was folded (math A.2)."""
    settings = model.settings
    sizes = f"{settings.depth} layers of {settings.heads} heads, d = {settings.dim}, context {settings.context}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{'family':<11} {family}",
        f"{'model':<11} {sizes}, vocabulary {model.vocab:,}, {parameters:,} parameters",
    ]
    for name, field in (("M", "form"), ("F", "content")):
        own = [k for k, layer in settings.layers.items() if field in layer]
        but = f"; others in {len(own)} of {settings.depth} layers" if own else ""
        lines.append(f"{name:<11} {_short(getattr(settings, field))}{but}")
    told = [] if family == "emformer" else _folded(model)
    lines += [f"{'folded' if k == 0 else '':<11} {line}" for k, line in enumerate(told)]
    return "\n".join(lines)


def _short(part: parts.Part) -> str:
    """Its class, and those of its arguments that are not what they are by default."""
    given = ((one.name, getattr(part, one.name)) for one in fields(part) if getattr(part, one.name) != one.default)
    return f"{type(part).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


def _folded(model: Emformer) -> list[str]:
    """What the reader of a checkpoint made of scales, biases and gains."""
    attention = model.layer(0).attention
    found = ["the scale of the scores into the left factor of M"]
    if attention.biases is not None and attention.biases.right is None:
        found.append("query biases into a functional u of the key; key biases add a constant to a row, which softmax drops")
    elif attention.biases is not None:
        found.append("query and key biases stay: positions turn them")
    if attention.drift is not None:
        found.append("value and output biases into one drift g a layer, as weights sum to 1")
    found.append("gains and offsets stay in the norms; info and diagnostics fold them into M and F")
    return found
