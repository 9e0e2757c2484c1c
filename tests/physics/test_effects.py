"""Planted effects are found, and nothing else, at the rates that are stated: over a thousand simulated tables of results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from emformer.comparison import PLACE
from emformer.effects import (
    DIFFERS,
    IDENTICAL,
    TOO_FEW,
    claims,
    contrasts,
    effects,
    failures,
    holm,
    observables,
    paired,
)
from emformer.intervals import FEWEST, LEVEL, bootstrap, bootstrap_each
from emformer.plans import Claim, Control, Measure, Plan

LOSS = {"loss": Measure(metric="val_loss")}
TABLES = 1000
BOUNDS = ("least", "most")


def plan(factors: Mapping[str, str], outcomes: str = "loss", **more: Any) -> Plan:
    """A plan of factors {name: "levels with spaces between"}."""
    named = {name: {level: {} for level in levels.split()} for name, levels in factors.items()}
    return Plan(title="", base="none", outcomes={one: LOSS["loss"] for one in outcomes.split()}, factors=named, **more)


def filled(plan: Plan, seeds: int, value: Callable[[dict[str, str], int, str], float]) -> pd.DataFrame:
    """A tidy table with a value of each cell and outcome."""
    rows = []
    for seed, levels, outcome in itertools.product(range(seeds), plan.combinations(), plan.outcomes):
        name = ",".join([*(f"{factor}={level}" for factor, level in levels.items()), f"seed={seed}"])
        told = {"cell": name, **levels, "seed": seed, "status": "finished", "outcome": outcome}
        rows.append(told | {"value": float(value(levels, seed, outcome)), "se": np.nan, "n": 0, "step": 1})
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------------------------


def test_which_comparisons_there_are():
    def names(plan: Plan) -> list[str]:
        return [one.name for one in contrasts(plan)]

    factors = {"f": "x y z", "g": "u v"}
    single = ["f=y against x", "f=z against x", "g=v against u"]
    assert names(plan(factors, design="single")) == single
    assert names(plan(factors)) == [
        "g=v against u",
        "f=y against x",
        "f=y, g=v against x, u",
        "f=z against x",
        "f=z, g=v against x, u",
        "f=y against x (mean over g)",
        "f=z against x (mean over g)",
        "g=v against u (mean over f)",
    ]
    assert names(plan({"f": "x y z"})) == single[:2]  # the mean over nothing is no comparison of its own
    corners = plan({"f": "x y", "g": "u v", "h": "a b"}, design="corners")
    assert names(corners) == [
        "f=y against x",
        "g=v against u",
        "h=b against a",
        "f=y, g=v, h=b against x, u, a",
        "f=x against y (g=v, h=b)",
        "g=u against v (f=y, h=b)",
        "h=a against b (f=y, g=v)",
    ]


def test_a_comparison_is_student_s_paired_test():
    random = np.random.default_rng(0)
    cells, base = random.normal(1, 2, size=(2, 9, 50)) + random.normal(size=(9, 50))
    found, other = paired(cells, base), stats.ttest_rel(cells, base)
    np.testing.assert_allclose(found["p"], other.pvalue, rtol=1e-10)
    np.testing.assert_allclose(found["difference"], (cells - base).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["sd"], (cells - base).std(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(found["mean"], cells.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["of_baseline"], base.mean(0), rtol=1e-12)
    spoilt = cells.copy()
    spoilt[0, :9] = spoilt[4, 3:30] = np.nan
    spoilt[5, :9] = np.inf
    found, other = paired(spoilt, base), stats.ttest_rel(np.where(np.isinf(spoilt), np.nan, spoilt), base, nan_policy="omit")
    np.testing.assert_allclose(found["p"], other.pvalue, rtol=1e-10)
    assert found["n"].tolist() == [7] * 3 + [6] * 6 + [8] * 21 + [9] * 20


@pytest.mark.parametrize("n", [3, 6, 12])
def test_the_effect_size_has_no_bias(n: int):
    """E[g] = mu/sigma, which without the factor J would be 77 % too large for n = 3; for a null of 0 it is 0."""
    differences = np.random.default_rng(1).normal(0.8, 1.0, size=(n, 60_000))
    for shift, truth in ((0.0, 0.8), (0.8, 0.0)):
        g = paired(differences - shift, np.zeros_like(differences))["g"]
        assert g.mean() == pytest.approx(truth, abs=4 * g.std() / math.sqrt(len(g)))
    j = special.gamma((n - 1) / 2) / (math.sqrt((n - 1) / 2) * special.gamma((n - 2) / 2))
    one = differences[:, 0]
    assert paired(one[:, None], np.zeros((n, 1)))["g"] == pytest.approx(j * one.mean() / one.std(ddof=1), rel=1e-10)


def test_what_is_undefined():
    d = np.array([[np.nan, 1, 1, 0, 0.1, 0], [np.nan, np.nan, 2, 0, 0.1, 0], [np.nan] * 3 + [0, 0.1, 1]])
    found = {name: values.tolist() for name, values in paired(d + 0.7, np.full_like(d, 0.7)).items()}
    assert found["n"] == [0, 1, 2, 3, 3, 3]
    defined = {name: [math.isfinite(value) for value in values] for name, values in found.items()}
    assert defined["difference"] == [False, True, True, True, True, True]
    assert defined["sd"] == [False, False, True, True, True, True]
    assert defined["g"] == [False, False, False, False, False, True]
    assert defined["p"] == [False, False, True, False, True, True]
    found = paired(np.full((7, 1), 0.1), np.zeros((7, 1)))  # no spread, and no rounding that passes for one
    assert found["sd"] == 0 and found["difference"] == 0.1 and found["p"] == 0 and math.isnan(found["g"][0])


def test_holm_is_the_closed_test():
    """A p is corrected to the largest that Bonferroni gives in any family of tests that it belongs to."""
    random = np.random.default_rng(2)
    for _ in range(20):
        p = np.round(random.random(6) ** 3, 2)  # with ties
        families = [list(some) for k in range(1, 7) for some in itertools.combinations(range(6), k)]
        truth = [max(min(1.0, len(some) * p[some].min()) for some in families if k in some) for k in range(6)]
        np.testing.assert_allclose(holm(p), truth, rtol=1e-12)
    np.testing.assert_allclose(holm(np.array([np.nan, 0.01, np.nan, 0.03])), [np.nan, 0.02, np.nan, 0.03])
    assert holm(np.array([])).shape == (0,) and np.isnan(holm(np.array([np.nan]))).all()


# ----------------------------------------------------------------------------------------------------------------------


def test_means_over_the_other_factors_and_baselines():
    """A table without noise, 10 f + 100 g + f g: of a full design every difference is known."""
    number = {"x": 0, "y": 1, "z": 2, "u": 0, "v": 1}
    both = plan({"f": "x y z", "g": "u v"})
    at = lambda levels, seed, _: 7 * seed + 10 * number[levels["f"]] + (100 + number[levels["f"]]) * number[levels["g"]]  # noqa: E731
    found = effects(filled(both, 6, at), both)
    assert found["difference"].tolist() == [100, 10, 111, 20, 122, 10.5, 21, 101]
    assert found["of_baseline"].tolist() == [17.5] * 5 + [67.5, 67.5, 27.5]
    assert (found["mean"] - found["of_baseline"]).tolist() == found["difference"].tolist()
    assert (found["low"] == found["difference"]).all() and (found["high"] == found["difference"]).all()
    assert (found["word"] == DIFFERS).all() and (found["corrected"] == 0).all() and found["g"].isna().all()


def test_few_seeds_lost_cells_and_identical_ones_are_said():
    four = plan({"f": "base same few lost odd"}, claims={"few": Claim(source="", outcome="loss", levels={"f": "few"}, least=0.0)})
    noise = np.random.default_rng(3).normal(size=(5, 7))
    table = filled(four, 7, lambda levels, seed, _: noise[0, seed] + 100 * (levels["f"] not in ("base", "same")))

    def lose(level: str, seeds: list[int], value: float) -> None:
        table.loc[(table["f"] == level) & table["seed"].isin(seeds), "value"] = value

    table["value"] += np.where(table["f"] == "few", noise[1, table["seed"]], 0)
    lose("few", [0, 2], np.nan)
    lose("lost", list(range(7)), np.nan)
    lose("odd", [3], np.inf)
    table.loc[(table["f"] == "odd") & (table["seed"] == 5), "value"] += 1
    table = table[~((table["f"] == "odd") & (table["seed"] == 6))]  # never planned, as of a plan that grew
    found = effects(table, four).set_index("level")
    assert found["word"].to_dict() == {"same": IDENTICAL, "few": TOO_FEW, "lost": TOO_FEW, "odd": TOO_FEW}
    assert found["n"].to_dict() == {"same": 7, "few": 5, "lost": 0, "odd": 5}
    assert found["planned"].to_dict() == {"same": 7, "few": 7, "lost": 7, "odd": 6}
    assert (
        found.loc["same", "difference"] == 0 and math.isnan(found.loc["same", "p"]) and math.isnan(found.loc["same", "corrected"])
    )
    assert found.loc["few", "p"] < 1e-4 and not found.loc["few", "enough"] and found.loc["same", "enough"]
    assert found.loc["lost", ["mean", "difference", "low", "g", "p"]].isna().all()
    kept = noise[1, [1, 3, 4, 5, 6]] + 100
    assert found.loc["few", "difference"] == pytest.approx(kept.mean()) and found.loc["few", "of_baseline"] == pytest.approx(
        noise[0, [1, 3, 4, 5, 6]].mean()
    )
    (verdict,) = claims(table, four)
    assert verdict.word == "undecided" and "too few seeds: 5" in verdict.reason and "2 seeds lack a value" in verdict.reason


def test_rows_of_other_plans_change_nothing():
    """Cells of levels that the plan no longer has stay in the folder, and are left alone."""
    wide, narrow = plan({"f": "x y z"}), plan({"f": "x y"})
    table = filled(wide, 6, lambda levels, seed, _: np.random.default_rng(ord(levels["f"]) + seed).normal())
    pd.testing.assert_frame_equal(effects(table, narrow), effects(table[table["f"] != "z"], narrow))
    shuffled = table.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(effects(shuffled, wide), effects(table, wide))


# ----------------------------------------------------------------------------------------------------------------------


def test_a_thousand_studies_with_one_effect():
    """Level y of f raises `a` by delta, and nothing else does anything; a seed adds to all of its cells the same, five times the
    noise of a cell. Six seeds, eight comparisons of two outcomes.

    Errors in what does nothing: at most 5 % of studies have any. The planted one: Student's t is that of the non-central law, so
    its p falls below any level at a known rate, and it is found at least as often as Bonferroni's level would find it.
    """
    n, noise, delta, together = 6, 0.5, 2.0, 50
    factors, random, found = {"f": "x y z", "g": "u v"}, np.random.default_rng(4), []
    many = plan(factors, " ".join(f"{out}{k:02}" for k in range(together) for out in "ab"))  # studies side by side: a00 b00 a01 …
    table = filled(many, n, lambda levels, _, outcome: delta * (levels["f"] == "y") * (outcome[0] == "a"))
    seeds = table["seed"] + n * table["outcome"].map(list(many.outcomes).index)
    for _ in range(TABLES // together):
        shared = 5 * noise * random.normal(size=2 * n * together)
        drawn = table.assign(value=table["value"] + shared[seeds] + noise * random.normal(size=len(table)))
        found.append(effects(drawn, many))
    p, difference, low, high = (
        np.concatenate([some[name].to_numpy().reshape(-1, 16) for some in found]) for name in ("p", "difference", "low", "high")
    )
    said = np.array([holm(one) <= LEVEL for one in p])
    for k in range(5):  # one of them by itself is corrected for itself
        names = {f"a{k:02}": "a", f"b{k:02}": "b"}
        own = drawn[drawn["outcome"].isin(list(names))]
        single = effects(own.assign(outcome=own["outcome"].map(names)), plan(factors, "a b"))
        at = TABLES - together + k
        np.testing.assert_allclose(single["p"], p[at], rtol=1e-9)
        assert ((single["word"] == DIFFERS) == said[at]).all()
    nothing = ~((single["outcome"] == "a") & single["level"].str.contains("y")).to_numpy()
    assert single.loc[1, ["outcome", "contrast"]].tolist() == ["a", "f=y against x"] and len(single) == 16
    p, difference, low, high = p[:, 1], difference[:, 1], low[:, 1], high[:, 1]

    def error(share: float) -> float:
        return 3 * math.sqrt(share * (1 - share) / TABLES)

    assert 0.01 < said[:, nothing].any(1).mean() <= LEVEL + error(LEVEL)
    assert difference.mean() == pytest.approx(delta, abs=4 * noise * math.sqrt(2 / n / TABLES))  # no bias
    assert difference.std() == pytest.approx(noise * math.sqrt(2 / n), rel=0.1)  # what a seed adds is taken away
    strict = power(delta / noise / math.sqrt(2), n, LEVEL / 16)
    assert (p <= LEVEL).mean() == pytest.approx(power(delta / noise / math.sqrt(2), n, LEVEL), abs=error(0.01))
    assert (p <= LEVEL / 16).mean() == pytest.approx(strict, abs=error(strict))
    assert strict - error(strict) <= said[:, 1].mean() <= strict + 0.05
    assert ((low <= delta) & (delta <= high)).mean() == pytest.approx(0.934, abs=error(0.934))


def power(size: float, n: int, level: float) -> float:
    """How often Student's two-sided test of n normal differences, whose mean is `size` standard deviations, has p <= level: t^2
    has the non-central F distribution."""
    return float(stats.ncf.sf(stats.t.isf(level / 2, n - 1) ** 2, 1, n - 1, n * size**2))


@pytest.mark.parametrize("n", [6, 8, 12])
@pytest.mark.parametrize("law", ["normal", "skewed"])
def test_rates_of_errors_and_of_finds(n: int, law: str):
    """Five comparisons with one baseline in each of 4,000 studies, the last with an effect. No more than 5 % of studies have an
    error; of skewed cells too, since the difference of two alike is symmetric."""
    random, studies = np.random.default_rng(6), 4000
    draw = random.normal if law == "normal" else lambda size: random.exponential(size=size) - 1
    base = draw(size=(n, studies, 1))
    cells = draw(size=(n, studies, 5)) + np.array([0, 0, 0, 0, 3.0])
    p = paired((cells + 9).reshape(n, -1), np.repeat(base + 9, 5, axis=2).reshape(n, -1))["p"].reshape(studies, 5)
    wrong = np.mean([(holm(one)[:4] <= LEVEL).any() for one in p])
    assert 0.01 < wrong <= LEVEL + 3 * math.sqrt(LEVEL / studies)
    for level in (LEVEL, LEVEL / 5) if law == "normal" else ():
        share = power(3 / math.sqrt(2), n, level)
        assert (p[:, 4] <= level).mean() == pytest.approx(share, abs=3.5 * math.sqrt(share * (1 - share) / studies) + 1e-3)
    few = bootstrap_each((cells - base)[:, :1000, 4])
    held = np.mean([one.low <= 3 <= one.high for one in few])
    assert held >= {6: 0.934, 8: 0.942, 12: 0.948}[n] - 0.01 - 3.5 * math.sqrt(0.05 / 1000)


def test_signs_flipped_could_find_nothing():
    """Why Student's test: all differences of six seeds on one side has p = 2/2^6, which two tests correct to more than 5 %."""
    p = stats.permutation_test((np.arange(1.0, 7),), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert p == 2 / 2**FEWEST and holm(np.array([p, 0.9]))[0] > LEVEL


# ----------------------------------------------------------------------------------------------------------------------


def claim(**more: Any) -> Claim:
    return Claim(**({"source": "S", "outcome": "a", "levels": {"f": "y"}, "least": 0.0} | more))


def test_claims_are_of_paired_differences():
    """With noise of a seed that is far larger than what is claimed."""
    random = np.random.default_rng(7)
    noise, shared = random.normal(size=(3, 6)), 100 * random.normal(size=6)
    asked = {
        "more": claim(),
        "far more": claim(least=50.0),
        "much more": claim(least=10.0),
        "a little more": claim(least=9.0, most=12.0),
        "not much": claim(most=9.9, least=None),
        "more of a than of b": claim(minus="b", least=8.0, most=9.9),
        "a itself": claim(difference=False, least=None, most=1000.0),
        "a over b": claim(minus="b", difference=False, levels={}, least=-1.5, most=1.5),
    }
    study = plan({"f": "x y", "g": "u v"}, "a b", claims=asked)
    step = {"a": 10.0, "b": 1.0}

    def value(levels: dict[str, str], seed: int, outcome: str) -> float:
        return shared[seed] + (levels["f"] == "y") * step[outcome] + 0.3 * noise[(levels["f"] == "y") + (outcome == "b"), seed]

    found = claims(filled(study, 6, value), study)
    words = [one.word for one in found]
    d = 10 + 0.3 * (noise[1] - noise[0])
    assert found[0].measured[:4] == pytest.approx(bootstrap(d)[:4]) and found[0].measured.of == "seeds"
    assert words[:2] == ["supported", "refuted"] and words[3] == "supported"
    assert words[2] == ("undecided" if found[2].measured.low < 10 < found[2].measured.high else "supported")
    assert words[6] == "supported" and words[7] == "supported" and np.ptp(found[6].measured[1:3]) > 100
    both = 9 + 0.3 * (noise[1] - noise[0] - noise[2] + noise[1])
    assert found[5].measured.value == pytest.approx(both.mean()) and found[5].measured.of == "seeds"
    assert [one.claim for one in found] == list(asked) and {one.source for one in found} == {"S"}
    assert [one.null for one in found[:6]] == [0.0] * 6 and math.isnan(found[6].null) and found[7].null == 0
    assert [one.against for one in found] == ["f=x"] * 6 + ["", "b"]
    assert [one.quantity for one in found[5:]] == ["a - b: f=y against x", "a at f=y", "a - b at the baseline"]


def test_no_claim_is_made_of_what_changes_nothing():
    """A difference that is 0 on every seed supports neither of two opposite claims, whatever is rounded on the way."""
    asked = {
        f"{minus} {bound}": claim(minus=minus, **({"least": None} | {bound: 0.0})) for minus in (None, "b") for bound in BOUNDS
    }
    asked |= {"itself": claim(difference=False, least=0.0), "near": claim(least=-0.1, most=0.1), "far": claim(least=0.1)}
    study = plan({"f": "x y"}, "a b", claims=asked)
    random = np.random.default_rng(11)
    same = random.normal(size=(2, 6)) / 3
    found = {
        one.claim: one.word for one in claims(filled(study, 6, lambda _, seed, out: abs(same["ab".index(out), seed])), study)
    }
    assert [found.pop(name) for name in list(asked)[:4]] == ["undecided"] * 4
    assert found == {"itself": "supported", "near": "supported", "far": "refuted"}


def test_a_claim_from_the_opposite_corner():
    corners = plan({"f": "x y", "g": "u v", "h": "a b"}, "a", design="corners", claims={"": claim(levels={"g": "v", "h": "b"})})
    table = filled(corners, 6, lambda levels, seed, _: seed + {"y": 5.0}.get(levels["f"], 0) * (levels["g"] == "v"))
    (found,) = claims(table, corners)
    assert found.measured.value == -5 and found.word == "refuted" and found.quantity == "a: f=x against y (g=v, h=b)"


def test_controls():
    asked = {
        "zero": Control(outcome="a", least=-0.5, most=0.5),
        "large": Control(outcome="a", levels={"f": "y"}, least=9.0),
        "b is small": Control(outcome="b", levels={"f": "y"}, most=1e-6),
    }
    study = plan({"f": "x y"}, "a b", controls=asked)
    table = filled(study, 4, lambda levels, seed, outcome: (10.0 * (levels["f"] == "y") + (seed - 1.5)) * (outcome == "a"))
    assert failures(table, study) == []  # the mean is in range, and no seed is alone

    def changed(f: str, outcome: str, seeds: list[int], value: float) -> list[str]:
        which = (table["f"] == f) & (table["outcome"] == outcome) & table["seed"].isin(seeds)
        return failures(table.assign(value=table["value"].mask(which, value)), study)

    assert changed("x", "a", [0, 1, 2, 3], 0.6) == ["'zero': a is 0.6 over 4 cells, not in [-0.5, 0.5]"]
    assert changed("x", "a", [0, 1, 2, 3], 0.5) == []
    assert changed("y", "a", [3], -5.0) == ["'large': a is 5.875 over 4 cells, not in [9, inf]"]
    assert changed("y", "b", [0], 1e-5) == ["'b is small': b is 2.5e-06 over 4 cells, not in [-inf, 1e-06]"]
    assert changed("y", "b", [1], np.nan) == ["of 'b is small' 1 of 4 cells have no b: f=y,seed=1"]
    assert len(changed("x", "a", [0, 1, 2, 3], np.inf)) == 1 and len(changed("x", "b", [0, 1, 2, 3], np.nan)) == 0
    crashed = table.assign(
        status=table["status"].mask(table["seed"] == 0, "failed"), value=table["value"].mask(table["seed"] == 0)
    )
    assert len(failures(crashed, study)) == 3, "three seeds of four are too few"
    eight = filled(study, 8, lambda levels, seed, outcome: 10.0 * (levels["f"] == "y") * (outcome == "a"))
    gone = eight["seed"] < 2
    assert len(failures(eight.assign(value=eight["value"].mask(gone)), study)) == 3, "they ended without a number"
    eight = eight.assign(value=eight["value"].mask(gone), status=eight["status"].mask(gone, "failed"))
    assert failures(eight, study) == [], "six of eight are enough"
    eight["value"] += 1
    assert failures(eight, study)[0] == "'zero': a is 1 over 6 cells, not in [-0.5, 0.5]"
    both = failures(table.assign(value=np.nan), study)
    assert len(both) == 3 and all("4 of 4 cells" in one for one in both)
    assert failures(table[table["f"] == "y"], study) == ["of 'zero' 0 of 0 cells have no a"]


# ----------------------------------------------------------------------------------------------------------------------


def recorded(table: pd.DataFrame, places: int, value: Callable[[pd.Series], np.ndarray]) -> pd.DataFrame:
    """Records of every cell at so many places, half of them of no head."""
    where = pd.DataFrame({"key": [f"k{k % 3}" for k in range(places)], "layer": range(places), "point": "attn"})
    where["head"] = pd.array([k if k % 2 else None for k in range(places)], dtype="Int64")
    where["cloud"], where["param"] = pd.array([["raw", None][k % 2] for k in range(places)], dtype="string"), pd.NA
    rows = [where.assign(cell=row["cell"], mean=value(row)) for _, row in table.drop_duplicates("cell").iterrows()]
    return pd.concat(rows, ignore_index=True)


def test_everything_recorded_is_compared_place_by_place():
    """Against a test of each place alone, and scipy's correction of all."""
    random = np.random.default_rng(8)
    study = plan({"f": "x y z"})
    table = filled(study, 6, lambda *_: 0.0)
    records = recorded(
        table, 20, lambda row: random.normal(size=20) + row["seed"] + 4.0 * (row["f"] == "y") * (np.arange(20) < 5)
    )
    found = observables(records, table, study)
    assert (
        len(found) == 40 and (found["tests"] == 40).all() and found["contrast"].tolist()[:2] == ["f=y against x", "f=z against x"]
    )
    of = records.merge(table[["cell", "f", "seed"]], on="cell").pivot(index="layer", columns=["f", "seed"], values="mean")
    p = np.concatenate([np.stack([stats.ttest_rel(of[f].loc[k], of["x"].loc[k]).pvalue for f in "yz"]) for k in range(20)])
    np.testing.assert_allclose(found["p"], p, rtol=1e-9)
    np.testing.assert_allclose(found["q"], stats.false_discovery_control(p), rtol=1e-9)
    low, high = stats.ttest_rel(of["y"].loc[3], of["x"].loc[3]).confidence_interval()
    assert found.loc[6, ["low", "high"]].tolist() == pytest.approx([low, high]) and found.loc[6, "layer"] == 3
    assert (found["word"] == DIFFERS).tolist() == (found["q"] <= LEVEL).tolist()
    assert (found.loc[found["word"] == DIFFERS, "layer"] < 5).sum() >= 4
    assert found[list(PLACE)].drop_duplicates().shape[0] == 20
    few = observables(records[~records["cell"].str.endswith("5")], table, study)
    assert (few["word"] == TOO_FEW).all() and (few["n"] == 5).all() and (few["planned"] == 6).all()


def test_places_that_only_some_cells_have_and_too_many_of_them(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(9)
    study = plan({"f": "x y"})
    table = filled(study, 6, lambda *_: 0.0)
    records = recorded(table, 30, lambda row: random.normal(size=30) * (np.arange(30) > 2))
    lost = records["cell"].str.startswith("f=y") & (records["layer"] == 7)
    records = records[~lost]
    found = observables(records, table, study)
    assert len(found) == 29 and 7 not in found["layer"].tolist() and (found["tests"] == 26).all()
    assert (found["word"][:3] == IDENTICAL).all() and found["p"][:3].isna().all()
    monkeypatch.setattr("emformer.effects.MOST", 9)
    kept = observables(records, table, study)
    least = found.loc[sorted(found["p"].nsmallest(9).index)].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, least)
    assert observables(records.iloc[:0], table, study).empty
