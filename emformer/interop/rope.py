"""Rotary positions as config.json tells of them: `rope_parameters` of now, `rope_theta` and `rope_scaling` of before."""

from __future__ import annotations

from emformer import parts
from emformer.interop.config import Facts
from emformer.parts import UserError
from emformer.positions import InterpolatedRoPE, Llama3RoPE, RoPE

KINDS = ("default", "linear", "llama3")
OF_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def position(facts: Facts, rank: int, context: int, *, share: float | None = None) -> parts.Position:
    """The rotation of heads `rank` wide.

    Args:
        facts: of config.json; what its `rope_scaling` or `rope_parameters` say comes before what stands beside them.
        rank: width r of a head.
        context: of the model, for what is scaled from an original context that is not named.
        share: of the coordinates that turn, where config.json does not say; null for a family whose heads turn wholly.

    Raises:
        UserError: for a kind of scaling that is not built (yarn, dynamic, longrope …), and for numbers out of range.
    """
    inner = facts.part("rope_scaling") or facts.part("rope_parameters") or Facts({}, facts.where)
    nested = next((name for name, value in inner.content.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise UserError(f"{inner.where}: rotary positions of their own for {nested!r} layers are not supported.")
    kind = inner.word("rope_type" if "rope_type" in inner.content else "type", "default", KINDS)

    def number(name: str, default: float) -> float:
        beside = facts.number(OF_NEOX[name], facts.number(name, default))
        return inner.number(name, beside)

    base, wanted = number("rope_theta", 10000.0), number("partial_rotary_factor", share or 1.0)
    if share is None and wanted != 1.0:
        raise UserError(f"{inner.where}: heads of which only a part turns are not known of this model_type.")
    width = int(rank * wanted)
    if not 0 < width <= rank or width % 2:
        raise UserError(
            f"{inner.where}: {width} of {rank} coordinates of a head would turn; it should be an even number of them."
        )
    share = width / rank
    if kind == "default":
        return RoPE(base, share)
    factor = inner.number("factor")
    if kind == "linear":
        return InterpolatedRoPE(base, share, factor=factor)
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if not low < high:
        raise UserError(f"{inner.where}: high_freq_factor is {high} and low_freq_factor {low}; high should be above low.")
    original = inner.count("original_max_position_embeddings", facts.count("original_max_position_embeddings", context))
    return Llama3RoPE(base, share, factor=factor, low=low, high=high, original=original)
