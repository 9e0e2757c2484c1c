"""Rows become a frame of one schema, and trajectories a frame of what observables find on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from builders import model, words

import emformer
from emformer import parts
from emformer.observables import COLUMNS, Moments, Observation, Row
from emformer.observables.frame import DTYPES, catalogue, conform, frame, observe
from emformer.parts import UserError
from emformer.trajectory import Trajectory, capture, captures


class Norms(Observation):
    """Mean of |x|^power over a prompt's tokens, state by state."""

    def __init__(self, key: str, power: float):
        self.key, self.power, self.moments = key, power, Moments()

    def update(self, trajectory: Trajectory) -> None:
        for state in trajectory.states:
            self.moments.add(state.x.norm(dim=-1) ** self.power, state.layer, state.point, self.key)

    def rows(self) -> list[Row]:
        return self.moments.rows()


@dataclass(frozen=True)
class FrameNorm(parts.Observable):
    """The length of tokens."""

    family = "frametest"
    keys: ClassVar = {"frametest.norm": "|x|, length, >= 0"}
    power: float = 1.0

    def begin(self) -> Norms:
        return Norms("frametest.norm", self.power)


@dataclass(frozen=True)
class AnotherFrameNorm(parts.Observable):
    """The length of tokens once more, of the same family."""

    family = "frametest"
    keys: ClassVar = {"frametest.other": "|x|^2, >= 0", "frametest.norm": "not the first to say so"}

    def begin(self) -> Norms:
        return Norms("frametest.other", 2.0)


@dataclass(frozen=True)
class BoundFrameNorm(parts.Observable):
    """One that cannot be made without an argument."""

    family = "frametest"
    keys: ClassVar = {"frametest.bound": "|x|^power"}
    power: float

    def begin(self) -> Norms:
        return Norms("frametest.bound", self.power)


@dataclass(frozen=True)
class LabelledFrameNorm(parts.Observable):
    """One that asks for labels."""

    family = "framelabels"
    keys: ClassVar = {"framelabels.norm": "|x|"}
    needs = frozenset({"labels"})

    def begin(self) -> Norms:
        return Norms("framelabels.norm", 1.0)


@dataclass(frozen=True)
class BareFrameNorm(parts.Observable):
    """A family whose only member has no defaults."""

    family = "framebare"
    keys: ClassVar = {"framebare.norm": "|x|"}
    size: int

    def begin(self) -> Norms:
        return Norms("framebare.norm", 1.0)


def clouds(prompts: int = 3, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, prompts, 5, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_schema_is_the_same_with_and_without_rows():
    rows = [
        (7, Row(0, "embed", "a.b", 1.5, 0.5, 0.25, 4, 1, 1.0, 0.1, 2, "read", "k=4")),
        (None, Row(None, None, "a.c", None)),
        (8, Row(3, "attn", "a.d", math.inf, math.nan, -math.inf, 2)),
    ]
    found, empty = frame(rows), frame([])
    for one in (found, empty, conform({}), conform({"key": ["a.b"]}), conform(found.iloc[::-1])):
        assert tuple(one.columns) == COLUMNS and {name: str(dtype) for name, dtype in one.dtypes.items()} == dict(DTYPES)
    assert len(empty) == len(conform({})) == 0
    assert found.iloc[0].tolist() == [7, 0, "embed", 2, "a.b", "read", "k=4", 1.5, 0.5, 0.25, 4, 1, 1.0, 0.1]
    undefined = found.iloc[1].isna()
    assert undefined[undefined].index.tolist() == [
        name for name in COLUMNS if name not in ("key", "cloud", "n_valid", "n_dropped")
    ]
    assert found.loc[2, ["mean", "sd", "se"]].isna().all() and found["n_valid"].tolist() == [4, 0, 2]


def test_observing_gives_what_is_there():
    x = clouds()
    found = observe(Trajectory.from_clouds(x, points=[(0, "attn"), (0, "ffn")]), [FrameNorm()])
    assert found["point"].tolist() == ["embed", "attn", "ffn"] and found["layer"].tolist() == [0, 0, 0]
    assert found["step"].isna().all() and (found["n_valid"] == 3).all() and (found["key"] == "frametest.norm").all()
    prompts = x.norm(dim=-1).mean(-1).numpy()  # (states, prompts)
    np.testing.assert_allclose(found["mean"], prompts.mean(1), rtol=1e-14)
    np.testing.assert_allclose(found["se"], prompts.std(1, ddof=1) / math.sqrt(3), rtol=1e-12)


def test_many_trajectories_are_one():
    net, tokens = model(), words(9, 6)
    whole = observe(capture(net, tokens), ["frametest"])
    assert whole["key"].unique().tolist() == ["frametest.other", "frametest.norm"]  # by name of class

    def one_at_a_time() -> Iterator[Trajectory]:
        yield from captures(net, tokens, chunk=4)

    for source in (one_at_a_time(), list(captures(net, tokens, chunk=2))):
        pd.testing.assert_frame_equal(observe(source, ["frametest"]), whole, rtol=1e-12)


def test_names_and_settings_may_be_mixed_and_nothing_is_measured_twice():
    trajectory = Trajectory.from_clouds(clouds())
    cube = FrameNorm(power=3.0)
    found = observe(trajectory, ["frametest", "frametest", cube, FrameNorm(power=1.0), cube])
    assert len(found) == 3 * 3
    pd.testing.assert_frame_equal(found.iloc[6:].reset_index(drop=True), observe(trajectory, cube))
    pd.testing.assert_frame_equal(observe(trajectory, "frametest"), observe(trajectory, [AnotherFrameNorm(), FrameNorm()]))
    assert observe(trajectory, [])["key"].tolist() == []


def test_what_cannot_be_observed_is_said():
    trajectory = Trajectory.from_clouds(clouds())
    with pytest.raises(UserError, match="'frametets' is no family of observables; did you mean 'frametest'"):
        observe(trajectory, ["frametets"])
    with pytest.raises(UserError, match=r"'zzzz' is no family of observables; there are .*frametest"):
        observe(trajectory, ["zzzz"])
    with pytest.raises(UserError, match=r"'framebare' has no defaults; give its settings, as BareFrameNorm\(…\)"):
        observe(trajectory, ["framebare"])
    with pytest.raises(ValueError, match="at least one trajectory"):
        observe([], ["frametest"])
    with pytest.warns(UserWarning, match="framelabels: skipped, for the trajectory has no labels") as told:
        found = observe(trajectory, ["framelabels", "frametest"])
    assert len(told) == 1
    assert set(found["key"]) == {"frametest.other", "frametest.norm"} and found.attrs["skipped"] == [str(told[0].message)]
    labelled = Trajectory.from_clouds(clouds(), labels=torch.zeros(3, 5, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = observe(labelled, ["framelabels"])
    assert len(found) == 3 and found.attrs["skipped"] == []


def test_the_catalogue_has_every_loaded_key():
    found = catalogue()
    assert found["frametest.bound"] == ("frametest", "|x|^power")
    assert found["frametest.norm"] == ("frametest", "not the first to say so")  # AnotherFrameNorm comes first
    assert all(key and one.family and one.definition and "\n" not in one.definition for key, one in found.items())


def test_a_class_that_is_defined_anew_replaces_the_old():
    def define(power: float) -> type[parts.Observable]:
        def begin(self: parts.Observable) -> Norms:
            return Norms("frameanew.norm", power)

        content = {"family": "frameanew", "keys": {"frameanew.norm": f"|x|^{power}"}, "begin": begin, "__module__": __name__}
        return dataclass(frozen=True)(type("FrameAnew", (parts.Observable,), content))

    classes = [define(1.0), define(2.0)]  # both alive, as in a notebook
    found = observe(Trajectory.from_clouds(clouds()), "frameanew")
    assert len(found) == 3 and catalogue()["frameanew.norm"].definition == "|x|^2.0" and len(classes) == 2
    pd.testing.assert_series_equal(found["mean"], observe(Trajectory.from_clouds(clouds()), FrameNorm(2.0))["mean"])


def test_the_face_has_it():
    assert emformer.observe is observe and emformer.capture is capture and emformer.Trajectory is Trajectory
