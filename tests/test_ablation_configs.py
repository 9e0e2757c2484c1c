"""The ready ablation studies: each can be read and built, says what it asks, and measures what exists."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import variants
from configurations import FOLDER, PLANS

from emformer import parts, plans
from emformer.configuration import load_parts
from emformer.kernels import Hardmax
from emformer.model import Emformer
from emformer.observables.frame import catalogue
from emformer.parts import UserError
from emformer.plans import Claim, Measure, Plan
from emformer.settings import Settings

READY = {
    "position": {"position": {"none", "learned", "RoPE"}},
    "norm": {"norm": {"none", "RMSNorm before", "LayerNorm before", "RMSNorm after", "LayerNorm after", "sphere"}},
    "mask": {"mask": {"causal", "full"}},
    "form": {"form": {"dense", "rank 16", "rank 4", "symmetric", "PSD", "skew", "split"}},
    "content": {"content": {"free", "tied", "metric"}},
    "kernel": {
        "kernel": {"softmax", "learned sink", "zero sink", "L2", "Sinkhorn", "sigmoid", "unnormalised", "linear", "top 8"}
    },
    "sink": {"sink": {"none", "learned", "zero"}},
    "ffn": {"ffn": {"absent", "GELU", "ReLU2", "SwiGLU"}},
    "depth": {"weights": {"own", "shared"}, "size": {"whole", "L-th"}},
    "optimizer": {"optimizer": {"AdamW", "Muon"}, "written": {"whole", "factors", "low rank"}},
    "obstructions": {
        "Z": {"unnormalised", "softmax"},
        "W": {"shared", "own"},
        "S": {"psd", "symmetric", "general"},
        "C": {"tied", "metric", "free"},
        "K": {"full", "causal"},
        "H": {"fine", "whole"},
        "FFN": {"without", "with"},
    },
}
VOCAB = 300  # what the grammar's words make of it; sizes of embeddings are nothing that is looked at here
named = pytest.mark.parametrize("file", PLANS, ids=lambda path: path.stem)
SOME = {"obstructions": 5}  # of whose 20 combinations every fifth is enough, both corners among them


@functools.cache
def plan_of(name: str, scale: str | None = None) -> Plan:
    return plans.read_plan(FOLDER / "ablations" / f"{name}.yaml", scale=scale)


@functools.cache
def resolved(name: str, scale: str | None, levels: tuple[str, ...]) -> Settings:
    plan = plan_of(name, scale)
    return plans.resolve(plan, dict(zip(plan.factors, levels, strict=True)))


def settings(name: str, scale: str | None = None) -> list[Settings]:
    """Of the combinations of a plan, the baseline first."""
    found = [tuple(one.values()) for one in plan_of(name, scale).combinations()]
    return [resolved(name, scale, one) for one in found[:: SOME.get(name, 1)]]


@functools.cache
def models(name: str, scale: str | None = None) -> list[Emformer]:
    """Built."""
    return [Emformer(VOCAB, **vars(one.model)) for one in settings(name, scale)]


def block_of(model: Emformer) -> int:
    return sum(some.numel() for some in model.layer(0).parameters())


def test_the_ready_studies_have_the_levels_that_they_promise():
    for name, factors in READY.items():
        assert {factor: set(levels) for factor, levels in plan_of(name).factors.items()} == factors, name


def test_every_kernel_that_can_be_trained_is_compared():
    load_parts()
    seen = {type(one.model.kernel) for one in settings("kernel")}
    assert seen == {one for one in variants(parts.Kernel) if one.__module__.startswith("emformer.")} - {Hardmax}


@named
def test_it_says_what_it_asks_and_how_long_it_takes(file: Path):
    lines = file.read_text().splitlines()
    assert all(len(line) <= 140 and "\t" not in line and line == line.rstrip() for line in lines)
    above = [line for line in lines if line.startswith("#")]
    assert above == lines[: len(above)] and len(above[0]) > 30
    told = " ".join(line.lstrip("# ") for line in above)
    assert f"emformer ablate configs/ablations/{file.stem}.yaml" in told and re.search(
        r"\d+ (minutes?|hours?) on 2 cores", told, re.I
    )
    if file.stem in READY:
        assert re.search(r"\b(S[0-3]|math)\b", told, re.I) and "?" in above[0]
        plan = yaml.safe_load(file.read_text())
        assert plan["title"] and plan["claims"] and plan["scales"]
        assert any("#" in line for line in lines[len(above) :]), "what a setting is for"


@named
def test_every_cell_is_built(file: Path):
    scale = "small" if "small" in plan_of(file.stem).scales else None
    found = models(file.stem, scale)
    assert len(found) >= 2 and all(any(some.requires_grad for some in model.parameters()) for model in found)
    for other in plan_of(file.stem).scales.values():
        shared = [
            one for one in (other.settings if isinstance(other.settings, list) else [other.settings]) if isinstance(one, str)
        ]
        assert all((file.parent / one).is_file() for one in shared)


def test_the_large_scale_has_levels_of_its_size():
    model: Any = resolved("optimizer", "large", ("AdamW", "factors")).model
    assert (model.dim, model.depth, model.form.rank, model.content.rank) == (128, 6, 128, 128)


@named
def test_what_it_measures_exists(file: Path):
    load_parts()
    plan, known = plan_of(file.stem), catalogue()
    one = settings(file.stem, "small" if "small" in plan.scales else None)[0]
    last = one.training.max_steps
    recorded = {
        step: {key for call in one.callbacks for look in call.looks(step, last) for each in look.observables for key in each.keys}
        for step in (0, last)
    }
    for name, measure in plan.outcomes.items():
        if measure.record is None:
            assert measure.metric == "val_loss", name
        else:
            assert measure.record in known and measure.record in recorded[0 if measure.at == "first" else last], name


@named
def test_it_has_seeds_enough_for_its_claims(file: Path):
    plan = plan_of(file.stem)
    assert plan.seeds >= 6 and "loss" in plan.outcomes
    for name, claim in plan.claims.items():
        assert claim.least is not None or claim.most is not None, name
        assert re.fullmatch(r"S[0-3]( [\d.]+)?|math [A-L](\.\d+)?|ours", claim.source), name
        if claim.source == "ours" and 0 not in (claim.least, claim.most):
            assert "ours" in "".join(line for line in file.read_text().splitlines() if line.startswith("#")), "margins are told"


def test_numbers_of_parameters_are_as_told():
    """What the comments say of a block's size."""
    blocks = dict(zip(plan_of("ffn").factors["ffn"], map(block_of, models("ffn")), strict=True))
    assert blocks["ReLU2"] - blocks["absent"] == 32_768 + 64 == blocks["GELU"] - blocks["absent"]
    assert (blocks["SwiGLU"] - blocks["absent"]) / 32_768 == pytest.approx(1.03, abs=0.01)
    forms = dict(zip(plan_of("form").factors["form"], map(block_of, models("form")), strict=True))
    rest = forms["rank 16"] - 8192
    assert {name: size - rest for name, size in forms.items()} == {
        "dense": 16_384,
        "rank 16": 8192,
        "rank 4": 2048,
        "symmetric": 16_384,
        "PSD": 4096,
        "skew": 16_384,
        "split": 16_384 + 4,
    }


def test_the_corners_of_the_obstructions():
    plan = plan_of("obstructions")
    ideal, real = plan.whole({}), {name: list(levels)[-1] for name, levels in plan.factors.items()}
    found = plan.combinations()
    assert found[0] == ideal and real in found and len(found) == 20
    assert all(min(sum(one[name] != corner[name] for name in one) for corner in (ideal, real)) <= 1 for one in found)
    assert plan.claims["T0 is more of a gradient than its shuffled weights"].levels == real
    corners: list[Any] = [resolved("obstructions", None, tuple(levels.values())).model for levels in (ideal, real)]
    g0, t0 = corners
    assert g0.depth * g0.epsilon == pytest.approx(1, abs=1e-5) and g0.shared and g0.ffn is None and not g0.content.learned
    assert (t0.depth, t0.epsilon, t0.shared) == (6, 1.0, False)
    small: list[Any] = list(settings("obstructions", "small"))
    for one in small:
        assert not one.model.positions and one.model.functional is one.model.drift is None  # what has a field, and no biases
        assert not one.training.objective.covers_text
        assert one.training.max_steps * one.training.batch * one.model.context == 250 * 16 * 32, "equal tokens"
    assert (small[0].model.dim, small[0].model.depth, small[0].model.form.rank) == (32, 12, 8)


def test_a_scale_may_change_levels(tmp_path: Path):
    whole: dict[str, Any] = {
        "title": "two sizes",
        "base": str(FOLDER / "grammar.yaml"),
        "factors": {"depth": {"two": {"model": {"depth": 2}}, "four": {"model": {"depth": 4}}}},
        "outcomes": {"loss": {"metric": "val_loss"}},
        "scales": {"large": {"factors": {"depth": {"four": {"model": {"depth": 8, "heads": 2}}}}, "seeds": 7}},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(whole))
    at = [plans.resolve(plans.read_plan(path, scale=scale), {"depth": "four"}).model for scale in (None, "large")]
    assert [(one.depth, one.heads) for one in at] == [(4, 4), (8, 2)]
    large = plans.read_plan(path, scale="large")
    assert plans.resolve(large, {"depth": "two"}).model.depth == 2 and large.seeds == 7
    whole["scales"]["large"]["factors"]["depth"]["three"] = {}
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(UserError, match=r"scale 'large' .* depth=three, which this study has not"):
        plans.read_plan(path, scale="large")


def test_a_claim_may_take_one_outcome_off_another():
    given: dict[str, Any] = {
        "title": "t",
        "base": "b",
        "outcomes": {"loss": Measure(metric="val_loss"), "other": Measure(metric="train_loss")},
        "factors": {"f": {"a": {}, "b": {}}},
    }
    assert (
        Plan(**given, claims={"one": Claim(source="S0", outcome="loss", minus="other", difference=False, least=0.0)})
        .claims["one"]
        .minus
        == "other"
    )
    with pytest.raises(UserError, match="the claim 'one' is of 'third', which is none of loss, other"):
        Plan(**given, claims={"one": Claim(source="S0", outcome="loss", minus="third", difference=False, least=0.0)})


def test_a_name_that_no_folder_takes_is_refused():
    given: dict[str, Any] = {"title": "t", "base": "b", "outcomes": {"loss": Measure(metric="val_loss")}}
    Plan(**given, factors={"f": {"a": {}, "é" * 100: {}}})
    with pytest.raises(UserError, match="the longest has 250 bytes, 25 more than a folder takes"):
        Plan(**given, factors={"f": {"a": {}, "é" * 120: {}}}, seeds=11)


def test_an_option_of_the_engine_is_of_processes_here():
    file = FOLDER / "ablations" / "mask.yaml"
    assert plans.read_plan(file).engine is None
    engine: Any = plans.read_plan(file, "--engine.processes", "3").engine
    assert type(engine).__name__ == "Local" and engine.processes == 3
    other: Any = plans.read_plan(file, "--engine", "Slurm", "--engine.cpus", "3").engine
    assert type(other).__name__ == "Slurm" and other.cpus == 3
