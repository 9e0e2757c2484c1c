"""config.json, read as data: one fact asked for at a time, and every mistake in it told in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from emformer.parts import UserError

LARGEST = 2**31 - 1  # no size of a model is larger
BYTES = 1 << 24  # a larger config.json is none

# Keys that give a model something it would compute with and Emformer has no part for: {key: what it is}. Any value that is
# there and not one of OFF asks for it.
FOREIGN = {
    "quantization_config": "quantised weights",
    "sliding_window": "attention in a sliding window",
    "attention_window": "attention in a sliding window",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "moe_intermediate_size": "a mixture of experts",
    "alibi": "ALiBi positions",
    "add_cross_attention": "cross attention",
    "is_encoder_decoder": "cross attention to an encoder",
    "pruned_heads": "pruned heads",
}
OFF = (None, False, 0, {}, [])


class Facts:
    """What a config.json says. `where` names it in the sentences of the `UserError`s that every method raises."""

    def __init__(self, content: Mapping[str, Any], where: str):
        self.content, self.where = content, where

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` up to 2^31 - 1. Without a default it must be there."""
        value = self.content.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self.where} does not say '{name}', which the model cannot be built without.")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
            raise UserError(f"{self.where}: {name} is {_shown(value)}; it should be a whole number from {least} to {LARGEST}.")
        return value

    def number(self, name: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above 0, or from 0 on. Without a default it must be there."""
        value = self.content.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self.where} does not say '{name}', which the model cannot be built without.")
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not abs(number) <= 1e300 or number < 0 or (number == 0 and not zero):
            raise UserError(f"{self.where}: {name} is {_shown(value)}; it should be a {'' if zero else 'positive '}number.")
        return float(number)

    def flag(self, name: str, default: bool) -> bool:
        value = self.content.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} is {_shown(value)}; it should be true or false.")
        return value

    def word(self, name: str, default: str, choices: Collection[str]) -> str:
        """One of the choices: what else the library knows is not built here."""
        value = self.content.get(name)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in choices:
            raise UserError(f"{self.where}: {name} {_shown(value)} is not supported; {', '.join(sorted(choices))} are.")
        return value

    def part(self, name: str) -> Facts | None:
        """A dictionary inside, or None."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.where}: {name} is {_shown(value)}; it should be a dictionary.")
        return Facts(value, f"{self.where}, {name}") if value else None

    def refuse(self, *names: str) -> None:
        """Raise for what no family here has: see `FOREIGN`, layers that are not full attention, and further `names`."""
        for name, what in self._foreign():
            raise UserError(f"{self.where}: {name} asks for {what}, which Emformer does not read.")
        for name in names:
            if self.content.get(name) not in OFF:
                raise UserError(f"{self.where}: {name} {_shown(self.content[name])} is not supported.")

    def _foreign(self) -> Iterator[tuple[str, str]]:
        for name, what in FOREIGN.items():
            if self.content.get(name) not in OFF and not (
                name == "sliding_window" and self.content.get("use_sliding_window") is False
            ):
                yield name, what
        kinds = self.content.get("layer_types") or []
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if kind != "full_attention":
                yield "layer_types", f"layers of {_shown(kind)}"


def read_config(folder: Path) -> dict[str, Any]:
    """The dictionary in `folder`/config.json. Raises `UserError` where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; name a folder that a model was saved to.")
    try:
        with open(path, "rb") as file:
            text = file.read(BYTES + 1)
        content = json.loads(text) if len(text) <= BYTES else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "no text, or nested too deep"
        raise UserError(f"{path} is not valid JSON ({why}); restore it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: it should map names such as 'model_type' to values.")
    return content


def _shown(value: Any) -> str:
    """A value of an untrusted file, short and on one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 60 else text[:59] + "…"
