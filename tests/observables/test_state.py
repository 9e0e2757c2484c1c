"""States come back as they were, and nothing but data comes out of a file."""

from __future__ import annotations

import json
import math
import os
import random
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from emformer.observables import Moments, Place, Reservoir, Row, state
from emformer.observables.flow import Flow
from emformer.parts import UserError


class Pair(NamedTuple):
    first: Any
    second: Any


class Holder:
    """What an observation may look like: slots below, a setting, a method of its own, one value in two places."""

    __slots__ = ("__dict__", "early")

    def __init__(self) -> None:
        self.early = 3
        self.setting, self.told = Flow(seed=4), self.method
        self.table: dict[Any, Any] = {}
        self.shared = self.again = Moments()

    def method(self) -> int:
        return len(self.table)


def through(value: Any, fresh: Any, tmp_path) -> Any:
    """By a file; and the dump is JSON as it stands."""
    state.save(tmp_path / "state", value, {"n": 1})
    found = state.read(tmp_path / "state")
    assert found.about == {"n": 1} and json.loads(json.dumps(found.dump.tree)) == found.dump.tree
    state.restore(fresh, found.dump)
    return fresh


def test_every_kind_of_value_comes_back(tmp_path):
    one, values = Holder(), torch.randn(3, 4, dtype=torch.float64)
    one.early = -(2**70)
    one.shared.add(values, 0, "attn", "a.b")
    one.table |= {
        Pair(0, "x"): [values, values[1], values.T, values[:, ::2]],
        Place(1, "ffn", "key"): (1, (2.5, None), True),
        "floats": [math.inf, -math.inf, 1e-308, -0.0, 0.1],
        7: np.arange(6, dtype=np.uint16).reshape(2, 3),
        "row": Row(0, None, "key", math.nan, param="k=4"),
        "scalar": np.float32(0.1),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.empty(0, 5),
        "deep": {"again": one.shared, "itself": one.table},
    }
    new = through(one, Holder(), tmp_path)
    assert new.early == one.early and new.setting is not one.setting and new.setting == Flow(seed=4)
    assert new.told() == len(one.table), "the method is its own"
    assert new.shared is new.again is new.table["deep"]["again"] and new.table["deep"]["itself"] is new.table
    assert new.shared.rows() == one.shared.rows()
    pair = new.table[Pair(0, "x")]
    for old, back in zip(one.table[Pair(0, "x")], pair, strict=True):
        assert torch.equal(old, back) and old.dtype == back.dtype
    assert pair[2].stride() == values.T.stride()
    assert new.table[Place(1, "ffn", "key")] == (1, (2.5, None), True)
    assert str(new.table["floats"]) == str(one.table["floats"])
    assert new.table[7].dtype == np.uint16 and np.array_equal(new.table[7], one.table[7])
    assert str(new.table["row"]) == str(one.table["row"]) and type(new.table["row"]) is Row
    assert type(new.table["scalar"]) is np.float32 and new.table["scalar"] == np.float32(0.1)
    assert new.table["half"].dtype == torch.bfloat16 and new.table["none"].shape == (0, 5)
    assert list(map(str, new.table)) == list(map(str, one.table)), "in the same order"


def test_a_reservoir_goes_on_with_the_same_draws(tmp_path):
    whole, new = Reservoir(5, 3), Reservoir(5, 3)
    lots = [torch.arange(k, k + 9) for k in range(0, 90, 9)]
    for lot in lots[:4]:
        whole.offer(x=lot)
    through(whole, new, tmp_path)
    for lot in lots[4:]:
        whole.offer(x=lot)
        new.offer(x=lot)
    assert torch.equal(whole["x"], new["x"]) and whole.offered == new.offered == 90
    assert max(whole["x"]) >= 36, "later ones were drawn"


def test_a_view_of_much_is_written_alone(tmp_path):
    state.save(tmp_path / "state", [torch.zeros(1000, 1000)[3]], {})
    assert (tmp_path / "state").stat().st_size < 10_000


HIDDEN = [deque([1]), np.random.default_rng(0), random.Random(0)]  # what they know is in no attribute
FOREIGN = [{1, 2}, b"bytes", int, open, object(), iter([1]), *HIDDEN]


class Sly:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("value", FOREIGN, ids=lambda value: type(value).__name__)
def test_what_cannot_be_written_is_refused_at_once(value):
    if value is open:  # a function is of the setting, and a fresh one has none here
        with pytest.raises(ValueError, match="does not have"):
            state.restore([], state.dump([value]))
        return
    with pytest.raises(TypeError, match="cannot be saved"):
        state.dump([value])


LAYOUT = ["emformer.observables.base", "Place", []]


@pytest.mark.parametrize(
    "tree",
    [
        [[["os", "system", []]], ["list"]],
        [[["builtins", "eval", []]], ["list"]],
        [[["emformer.model", "Emformer", []]], ["list"]],
        [[["emformer.observables.base", "parts.UserError", []]], ["list"]],
        [[["emformer.observables.base", "torch", []]], ["list"]],
        [[["emformer.observables.nowhere", "A", []]], ["list"]],
        [[], ["list", ["again", 9]]],
        [[], ["list", ["tensor", "0", [], True]]],
        [[], ["list", ["fixed"]]],
        [[], ["list", ["call", "os.system"]]],
        [[LAYOUT], ["list", ["named", 0, 1]]],
        [[LAYOUT], ["list", ["object", 0]]],
        [[["emformer.observables.base", "Moments", ["__class__"]]], ["list", ["object", 0, 3]]],
        [[["emformer.observables.base", "Moments", ["a", "b"]]], ["list", ["object", 0, 3]]],
        [[["emformer.observables.flow", "Flow", ["seed"]]], ["list", ["object", 0, 3]]],
        [[], ["dict", 1]],
        [[], 5],
        [[], None],
        "text",
        None,
    ],
    ids=str,
)
def test_a_tree_that_no_dump_has_written_is_refused(tree):
    with pytest.raises(ValueError):
        state.restore([], state.Dump(tree, {}))


def test_it_is_put_back_into_its_like_only():
    with pytest.raises(ValueError):
        state.restore(Reservoir(3), state.dump(Moments()))


def test_files_that_are_not_what_was_written_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "state"
    reservoir = Reservoir(40)
    reservoir.offer(x=torch.randn(30, 4))
    state.save(path, reservoir, {"at": 3})
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    places = {"length": 3, "header": 8 + header // 2, "tensor": 8 + header + 50, "end": len(whole) - 1}
    for name, place in places.items():
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match="cannot be read as a saved state"):
            state.read(path)
        assert name
    for part in (b"", whole[:5], whole[: 8 + header], whole[:-1], b"\x80\x04." + whole):
        path.write_bytes(part)
        with pytest.raises(UserError, match="cannot be read as a saved state"):
            state.read(path)
    save_file({"x": torch.ones(3)}, path)
    with pytest.raises(UserError, match="cannot be read"):
        state.read(path)
    with pytest.raises(UserError, match="does not exist"):
        state.read(tmp_path / "nowhere")
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["emformer"]) | {"format": 99}
    text = json.dumps(content)
    save_file(tensors, path, {"emformer": text, "digest": state._digest(text, tensors)})
    with pytest.raises(UserError, match="format 99"):
        state.read(path)
    deep = "[" * 100_000
    save_file(tensors, path, {"emformer": deep, "digest": state._digest(deep, tensors)})
    with pytest.raises(UserError, match="cannot be read"):
        state.read(path)
