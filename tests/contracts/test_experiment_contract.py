"""What every experiment promises; a new one is found here by itself, and run as its `examples()` say: small."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from builders import variants

from emformer import parts, recipes
from emformer.figures.charts import draw
from emformer.studies.simulation import called
from emformer.theory.outcome import Curves, Heat, Outcome, Paths

EXPERIMENTS: list[Any] = variants(parts.Experiment)
each = pytest.mark.parametrize("cls", EXPERIMENTS, ids=lambda cls: cls.name)
COLUMNS = {
    Curves: ["panel", "line", "x", "y"],
    Heat: ["panel", "x", "y", "value"],
    Paths: ["panel", "path", "time", "x", "y", "z"],
}
OWN = {"out", "overwrite", "observables", "observe", "no_observe", "import", "config", "experiment", "help", "print_config"}
SECONDS = 10.0  # of processor time, far above what a small one takes


def small(cls: Any) -> Any:
    return cls.examples()[0]


class Found(NamedTuple):
    """What came of the small one, run twice: the clouds of its trajectories, all that was told on the way, and processor time."""

    outcomes: list[Outcome]
    clouds: list[dict[str, list[torch.Tensor]]]
    told: list[tuple[float, str]]
    seconds: float
    quiet: bool  # whether the generators of the world stayed where they were


def run_twice(example: Any) -> Found:
    outcomes, clouds, told = [], [], []
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    begun = time.process_time()
    for _ in range(2):
        told.clear()
        outcome = example.run(lambda share, word: told.append((share, word)))
        clouds.append({name: trajectory.clouds for name, trajectory in outcome.trajectories.items()})
        outcomes.append(dataclasses.replace(outcome, trajectories={}))
    seconds = (time.process_time() - begun) / 2
    quiet = torch.equal(torch.get_rng_state(), before[0]) and bool((np.random.get_state()[1] == before[1]).all())  # type: ignore[index]
    return Found(outcomes, clouds, told, seconds, quiet)


def refusal(example: Any, name: str, bad: Any) -> str | None:
    """What is said of a bad value, at once or where the simulation meets it."""
    try:
        dataclasses.replace(example, **{name: bad}).run(lambda share, word: None)
    except (ValueError, ArithmeticError) as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """Another process, without the checks of shapes and types that cost ten times what small steps do (other tests have them)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


KNOWN: dict[Any, Found] = {}


@pytest.fixture
def found(cls: Any, apart: ProcessPoolExecutor) -> Found:
    if cls not in KNOWN:
        KNOWN[cls] = apart.submit(run_twice, small(cls)).result()
    return KNOWN[cls]


def test_there_are_experiments():
    names = [cls.name for cls in EXPERIMENTS]
    assert {"sphere"} <= set(names) and len(names) == len(set(names)), names
    assert recipes.EXPERIMENTS.titles() == {cls.name: cls.title for cls in sorted(EXPERIMENTS, key=lambda cls: cls.name)}


@each
def test_what_it_says_of_itself(cls):
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.name) and cls.__module__.rpartition(".")[2] == cls.name.replace("-", "_")
    assert 20 < len(cls.title) < 100 and cls.title == cls.title.strip() and not cls.title.endswith(".")
    fields = dataclasses.fields(cls)
    assert cls.__dataclass_params__.frozen
    about = cls.__doc__ or ""
    for field in fields:
        assert field.name not in OWN
        assert field.default is not dataclasses.MISSING, f"{field.name} has no default"
        told = re.search(rf"^ +[\w, ]*\b{field.name}\b[\w, ]*: \S", about.partition("Args:")[2], re.MULTILINE)
        assert told, f"{cls.__name__} does not say what {field.name} is"


@each
def test_it_is_plain_data_and_comes_back(cls, tmp_path):
    for one in (cls(), *cls.examples()):
        assert hash(one) == hash(dataclasses.replace(one))
        content = yaml.safe_load(recipes.EXPERIMENTS.written(one))
        assert content == recipes.EXPERIMENTS.plain(one) and list(content) == [
            "experiment",
            *(field.name for field in dataclasses.fields(cls)),
        ]
        (tmp_path / "recipe.yaml").write_text(recipes.EXPERIMENTS.written(one))
        assert recipes.EXPERIMENTS.read(tmp_path / "recipe.yaml") == one


@each
def test_small_it_is_quick_and_tells_how_far_it_is(cls, found):
    assert found.seconds < SECONDS, f"{found.seconds:.1f} s: give {cls.__name__} an examples() that is smaller"
    shares = [share for share, _ in found.told]
    assert shares and all(0 <= share <= 1 + 1e-9 for share in shares) and shares == sorted(shares)
    assert all(word and word == word.strip() for _, word in found.told)


@each
def test_its_statements_can_be_judged(cls, found):
    statements = found.outcomes[0].statements
    claims = [one.claim for one in statements]
    assert claims and len(claims) == len(set(claims)), "each claim once"
    for one in statements:
        assert 10 < len(one.claim) < 200 and "\n" not in one.claim
        assert len(one.source) > 5, one
        assert one.n >= 1 and one.tolerance >= 0 and (math.isnan(one.error) or one.error >= 0), one
        assert not math.isinf(one.measured) and (one.how == "measured" or math.isfinite(one.predicted)), one


@each
def test_its_charts_are_what_charts_are(cls, found):
    """Columns, numbers that are finite or undefined, each value once; and they can be drawn."""
    charts = found.outcomes[0].charts
    assert charts
    for name, chart in charts.items():
        assert re.fullmatch(r"[a-z0-9]+([-_][a-z0-9]+)*", name), name
        assert chart.caption.endswith(".") and len(chart.frame)
        columns = COLUMNS[type(chart)]
        assert set(columns) <= set(chart.frame.columns), (name, chart.frame.columns)
        numbers = [one for one in chart.frame.columns if one not in ("panel", "line", "path")]
        values = chart.frame[numbers].to_numpy(dtype=float)
        assert not np.isinf(values).any() and np.isfinite(values).any(), name
        assert not chart.frame[columns[0]].isna().any()
        if isinstance(chart, Heat):
            assert not chart.frame.duplicated(["panel", "x", "y"]).any(), name
        if isinstance(chart, Paths):
            for _, path in chart.frame.groupby(["panel", "path"]):
                assert path["time"].is_monotonic_increasing, name
        draw(chart)


@each
def test_its_trajectories_can_be_kept(cls, found):
    folders = [called(name) for name in found.clouds[0]]
    assert len(set(folders)) == len(folders) and all(re.fullmatch(r"[\w=+-][\w=.+-]*", name) for name in folders), folders
    assert all(bool(cloud.isfinite().all()) for clouds in found.clouds[0].values() for cloud in clouds)


@each
def test_again_it_gives_the_same_bits_and_leaves_the_world_alone(cls, found):
    first, second = found.outcomes
    assert found.quiet, "generators of their own, never the global one"
    assert repr(second.statements) == repr(first.statements) and second.note == first.note
    assert second.charts.keys() == first.charts.keys()
    for name, chart in first.charts.items():
        pd.testing.assert_frame_equal(second.charts[name].frame, chart.frame, check_exact=True)
    assert found.clouds[0].keys() == found.clouds[1].keys()
    for name, clouds in found.clouds[0].items():
        assert all(map(torch.equal, clouds, found.clouds[1][name]))


@each
def test_settings_without_sense_are_refused(cls, apart):
    """Numbers that are none, and counts below nothing: in one sentence, at once, or where the simulation meets them."""
    example = small(cls)
    for field in dataclasses.fields(cls):
        value = getattr(example, field.name)
        if isinstance(value, bool) or not isinstance(value, float | int) or field.name == "seed":
            continue
        said = apart.submit(refusal, example, field.name, math.nan if isinstance(value, float) else -1).result()
        assert said and len(said.splitlines()) == 1, (field.name, said)
