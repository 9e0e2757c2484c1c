"""What every study promises; a new one is found here by itself, and run as its `examples()` say, on models made for it."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
import random
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from builders import variants
from studied import small, subject

from emformer import parts, recipes
from emformer.ffn import GELU
from emformer.figures.charts import draw
from emformer.masks import Full
from emformer.norms import LayerNorm
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Drift
from emformer.studies.subjects import Subject
from emformer.theory.outcome import Curves, Heat
from emformer.training import MaskedToken
from emformer.verdicts import Findings, Verdict

STUDIES: list[Any] = variants(parts.Study)
each = pytest.mark.parametrize("cls", STUDIES, ids=lambda cls: cls.name)
COLUMNS: Mapping[type, Sequence[str]] = {Curves: ["panel", "line", "x", "y"], Heat: ["panel", "x", "y", "value"]}
OWN = {"out", "overwrite", "prompts", "length", "which", "text", "corpus", "seed", "device", "config", "study", "help"}
SECONDS = 12.0  # of processor time for all models, some of them twice; far above what small ones take


@functools.cache
def models(kind: str) -> tuple[Subject, ...]:
    """What a study is run on: a causal model; two with a full mask, trained for masked tokens; the least that is a model."""
    if kind == "causal":
        net = small(depth=2, positions=[RoPE()], norm=LayerNorm(bias=True), ffn=GELU(), drift=Drift())
        return (subject(net, prompts=6, length=12),)
    if kind == "masked":
        nets = [small(seed, mask=Full(), ffn=GELU(), context=16) for seed in range(2)]
        shown: dict[str, Any] = {"prompts": 6, "length": 12, "objective": MaskedToken()}
        return tuple(subject(net, begun=k, name=f"masked {k}", **shown) for k, net in enumerate(nets))
    net = small(depth=1, heads=1, norm=None, form=Dense(), content=Dense(), context=8)
    return (subject(net, prompts=3, length=8, labelled=False),)


KINDS = ("causal", "masked", "least")


class Found(NamedTuple):
    """What came of one example on one kind of model: findings or what it said instead, of each run, and what it did beside."""

    results: list[Findings | str]
    told: list[tuple[float, str]]
    seconds: float
    quiet: bool  # the generators of the world stayed where they were
    kept: bool  # the models and their prompts stayed what they were


def world() -> list[Any]:
    return [torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()]


def looks(subjects: Sequence[Subject]) -> list[Any]:
    """All that a study must leave alone."""
    found: list[Any] = []
    for one in subjects:
        found += [value.clone() for value in one.model.state_dict().values()]
        found += [one.tokens.clone(), torch.tensor([module.training for module in one.model.modules()])]
        found += [one.model.surgery, repr(one.model.settings), all(p.grad is None for p in one.model.parameters())]
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def run(example: Any, kind: str, times: int) -> Found:
    subjects, results, told = models(kind), [], []
    states, before = world(), looks(subjects)
    begun = time.process_time()
    for _ in range(times):
        told.clear()
        try:
            results.append(example.run(subjects, lambda share, word: told.append((share, word))))
        except UserError as error:
            results.append(str(error))
    seconds = time.process_time() - begun
    return Found(results, told, seconds, same(world(), states), same(looks(subjects), before))


@contextmanager
def unchecked() -> Generator[None]:
    """Without the checks of shapes and types, which cost ten times what small steps do; other tests have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


KNOWN: dict[Any, list[Found]] = {}


@pytest.fixture
def found(cls: Any) -> list[Found]:
    """Every example on the causal model, the first of them twice; the first one on every other kind."""
    if cls not in KNOWN:
        first, *others = cls.examples()
        jobs = [(first, kind, 2 if kind == "causal" else 1) for kind in KINDS] + [(one, "causal", 1) for one in others]
        with unchecked():
            KNOWN[cls] = [run(*job) for job in jobs]
    return KNOWN[cls]


def findings(found: Sequence[Found]) -> list[Findings]:
    return [one for each in found for one in each.results if isinstance(one, Findings)]


# ----------------------------------------------------------------------------------------------------------------------


def test_there_are_studies():
    names = [cls.name for cls in STUDIES]
    assert {"unrolled"} <= set(names) and len(names) == len(set(names)), names
    assert recipes.STUDIES.titles() == {cls.name: cls.title for cls in STUDIES}


@each
def test_what_it_says_of_itself(cls):
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.name)
    assert 20 < len(cls.title) < 100 and cls.title == cls.title.strip() and not cls.title.endswith(".")
    assert cls.prompts >= 2 and cls.length >= 2
    assert cls.__dataclass_params__.frozen
    about = cls.__doc__ or ""
    for field in dataclasses.fields(cls):
        assert field.name not in OWN
        assert field.default is not dataclasses.MISSING, f"{field.name} has no default"
        told = re.search(rf"^ +[\w, ]*\b{field.name}\b[\w, ]*: \S", about.partition("Args:")[2], re.MULTILINE)
        assert told, f"{cls.__name__} does not say what {field.name} is"


@each
def test_it_is_plain_data_and_comes_back(cls, tmp_path):
    for one in (cls(), *cls.examples()):
        assert hash(one) == hash(dataclasses.replace(one))
        content = yaml.safe_load(recipes.STUDIES.written(one))
        assert content == recipes.STUDIES.plain(one)
        assert list(content) == ["study", *(field.name for field in dataclasses.fields(cls))]
        (tmp_path / "recipe.yaml").write_text(recipes.STUDIES.written(one))
        assert recipes.STUDIES.read(tmp_path / "recipe.yaml") == one


@each
def test_settings_without_sense_are_refused(cls):
    """Numbers that are none, and counts below nothing."""
    for field in dataclasses.fields(cls):
        value = getattr(cls.examples()[0], field.name)
        if isinstance(value, bool) or not isinstance(value, float | int):
            continue
        with pytest.raises(UserError) as error:
            dataclasses.replace(cls.examples()[0], **{field.name: math.nan if isinstance(value, float) else -1})
        assert field.name in str(error.value)


@each
def test_small_it_is_quick_and_tells_how_far_it_is(cls, found):
    seconds = sum(one.seconds for one in found)
    assert seconds < SECONDS, f"{seconds:.1f} s: give {cls.__name__} an examples() that is smaller"
    for one in found:
        shares = [share for share, _ in one.told]
        assert all(0 <= share <= 1 + 1e-9 for share in shares) and shares == sorted(shares)
        assert shares or isinstance(one.results[-1], str)
        assert all(word and word == word.strip() for _, word in one.told)


@each
def test_it_finds_something_or_says_in_one_sentence_why_not(cls, found):
    assert findings(found), "a study that can be done on none of these models is tested nowhere"
    for one in found:
        for said in one.results:
            if isinstance(said, str):
                assert len(said) > 20 and said.endswith(".") and len(said.splitlines()) == 1, said
                assert one.results == [said] * len(one.results), "each time"


@each
def test_its_verdicts_can_be_judged(cls, found):
    for one in findings(found):
        claims = [verdict.claim for verdict in one.verdicts]
        assert 1 <= len(claims) <= 12 and len(claims) == len(set(claims)), "each claim once"
        for verdict in one.verdicts:
            judged(verdict)
        assert all(line and line == line.strip() and line.endswith(".") for line in one.note.splitlines())


def judged(verdict: Verdict) -> None:
    assert isinstance(verdict, Verdict)
    claim, measured = verdict.claim, verdict.measured
    assert 10 < len(claim) < 200 and "\n" not in claim and " " in claim and not claim.endswith("."), claim
    assert re.match(r"(S[0-3]|math)\b", verdict.source), verdict.source
    assert len(verdict.quantity) > 5 and "\n" not in verdict.quantity + verdict.against + verdict.why
    assert re.fullmatch(r"[a-z]+s", measured.of) and measured.n >= 0
    for number in (*measured[:3], verdict.null):
        assert isinstance(number, float) and not math.isinf(number), verdict
    assert math.isnan(measured.low) == math.isnan(measured.high) and not measured.low > measured.high
    assert math.isfinite(measured.value) or math.isnan(measured.low), "no interval around nothing"
    assert verdict.least <= verdict.most and (math.isfinite(verdict.least) or math.isfinite(verdict.most)), "a range"
    assert verdict.word in (("holds", "broken", "undecided") if verdict.check else ("supported", "refuted", "undecided"))
    assert verdict.reason or measured.enough, "what is undecided for want of units says so"


@each
def test_its_charts_are_what_charts_are(cls, found):
    """Columns, numbers that are finite or undefined; and they can be drawn."""
    drawn = False
    for one in findings(found):
        assert one.charts
        for name, chart in one.charts.items():
            assert re.fullmatch(r"[a-z0-9]+([-_][a-z0-9]+)*", name), name
            assert chart.caption.endswith(".") and len(chart.frame)
            columns = COLUMNS[type(chart)]
            assert set(columns) <= set(chart.frame.columns), (name, chart.frame.columns)
            numbers = [column for column in chart.frame.columns if column not in ("panel", "line")]
            values = chart.frame[numbers].to_numpy(dtype=float)
            assert not np.isinf(values).any(), name
            assert np.isfinite(chart.frame["x"].to_numpy(dtype=float)).all(), name
            assert not chart.frame[list(columns)[:-1]].duplicated().any(), f"{name}: each value once"
            if not drawn:
                draw(chart)
        drawn = True


@each
def test_again_it_gives_the_same_bits_and_leaves_the_world_alone(cls, found):
    assert all(one.quiet for one in found), "generators of their own, never the global one"
    assert all(one.kept for one in found), "models, prompts and modes as they were"
    first, second = found[0].results
    if isinstance(first, str):
        return
    assert isinstance(second, Findings)
    assert repr(second.verdicts) == repr(first.verdicts) and second.note == first.note
    assert second.charts.keys() == first.charts.keys()
    for name, chart in first.charts.items():
        pd.testing.assert_frame_equal(second.charts[name].frame, chart.frame, check_exact=True)
