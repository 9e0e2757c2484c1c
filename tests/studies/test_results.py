"""What is said of a finished ablation study: effects that are known beforehand are found, and what does nothing is not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from torch import nn

from emformer import parts
from emformer.effects import DIFFERS, NO_DIFFERENCE, TOO_FEW, effects
from emformer.ffn import ReLU2
from emformer.parts import UserError
from emformer.plans import Cell, Claim, Control, Measure, Plan, Range
from emformer.records import Run
from emformer.settings import Settings
from emformer.studies import cell
from emformer.studies.ablation import ablate
from emformer.studies.cells import Study
from emformer.studies.examination import read_verdicts
from emformer.studies.jobs import Event, Job
from emformer.studies.results import RESULTS, measured, read, summary, table, write_results

TABLES = ("table.csv", "effects.csv", "verdicts.csv", "observables.csv")


@dataclass(frozen=True)
class Here(parts.Engine):
    """Cells in this process: starting another one costs more than such a cell."""

    def run(self, jobs: Sequence[Job], tell: Callable[[Event], None]) -> None:
        for job in jobs:
            tell(Event("started", job.name))
            cell.run(Path(job.command[3]), job.command[4])
            tell(Event("finished", job.name))

    def script(self, jobs: Sequence[Job]) -> str:
        return ""


@dataclass(frozen=True)
class Redrawn(parts.FFN):
    """ReLU2 with other random numbers: the law of the model is the same, and no weight is."""

    def build(self, dim: int) -> nn.Module:
        torch.rand(())
        return ReLU2().build(dim)


TINY = {
    "model": {
        "dim": 8,
        "depth": 1,
        "heads": 1,
        "context": 16,
        "form": {"class_path": "LowRank", "init_args": {"rank": 4}},
        "content": {"class_path": "LowRank", "init_args": {"rank": 4}},
        "kernel": {"class_path": "Softmax"},
        "mask": {"class_path": "Causal"},
        "placement": {"class_path": "PreNorm"},
        "norm": {"class_path": "RMSNorm"},
        "positions": [],
        "ffn": {"class_path": "ReLU2"},
    },
    "data": {
        "tokenizer": {"class_path": "BPE", "init_args": {"vocab": 257}},
    },
    "training": {
        "objective": {"class_path": "NextToken"},
        "optimizer": {"class_path": "AdamW", "init_args": {"rate": 1e-12, "weight_decay": 0.0}},
        "max_steps": 1,
        "batch": 2,
        "validate_every": 1,
        "validation_windows": 2,
        "sample": 0,
        "accelerator": "cpu",
    },
    "callbacks": [],
}


def test_a_planted_effect_is_found_and_no_other(tmp_path: Path):
    """A model that does not learn, and whose logits are small, has the loss log V up to noise: a larger vocabulary costs
    log(V'/V). Other random numbers change every weight and nothing else: over
    400 seeds they moved such a loss by .0004 with a standard error of .0007."""
    text = "\n\n".join(f"{one} {k} times {k} is {k * k}, no more." for k in range(150) for one in ("Say", "Hear"))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = {"class_path": "File", "init_args": {"path": str(tmp_path / "text.txt")}}
    settings = TINY | {"data": {**TINY["data"], "corpus": corpus, "cache": str(tmp_path / "cache")}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    plan = Plan(
        title="what is planted",
        base=str(tmp_path / "base.yaml"),
        factors={
            "vocabulary": {"small": {}, "large": {"data": {"tokenizer": {"class_path": "BPE", "init_args": {"vocab": 300}}}}},
            "drawn": {"once": {}, "again": {"model": {"ffn": {"class_path": f"{__name__}.Redrawn"}}}},
        },
        outcomes={"loss": Measure(metric="val_loss")},
        controls={"untrained": Control(outcome="loss", least=math.log(257) - 0.1, most=math.log(257) + 0.1)},
        claims={
            "costs": Claim(source="", outcome="loss", levels={"vocabulary": "large"}, least=0.0),
            "gains": Claim(source="", outcome="loss", levels={"vocabulary": "large"}, most=0.0),
            "draws": Claim(source="", outcome="loss", levels={"drawn": "again"}, least=-0.1, most=0.1),
        },
        design="single",
        engine=Here(),
    )
    folder = ablate(plan, out=tmp_path / "out", report=False)
    sizes = [
        Tokenizer.from_file(str(folder / "cells" / f"vocabulary={one},drawn=once,seed=0" / "tokenizer.json"))
        for one in ("small", "large")
    ]
    small, large = (one.get_vocab_size() for one in sizes)
    truth = math.log(large / small)
    found = read(folder / "effects.csv").set_index("factor")
    assert found["word"].to_dict() == {"vocabulary": DIFFERS, "drawn": NO_DIFFERENCE}
    assert truth > 0.1 and found.loc["vocabulary", "low"] <= truth <= found.loc["vocabulary", "high"]
    assert found.loc["drawn", "low"] < 0 < found.loc["drawn", "high"] and (found["n"] == 6).all()
    assert {one.claim: one.word for one in read_verdicts(folder)} == {
        "costs": "supported",
        "gains": "refuted",
        "draws": "supported",
    }
    told = summary(folder)
    assert "vocabulary=large against small" in told and "no difference found" in told and "refuted" in told


# ----------------------------------------------------------------------------------------------------------------------


def written(folder: Path, plan: Plan, seeds: int, value: Callable[[dict[str, str], int], float], recorded: bool = False) -> Study:
    """The folder of a study all of whose cells have ended, with loss `value` and, where asked for, a record of two layers at two
    steps."""
    study, cells = Study(folder, plan), []
    for part in ("cells", "finished"):
        (folder / part).mkdir(parents=True)
    for seed in range(seeds):
        for levels in plan.combinations():
            name = Cell(levels, seed, cast(Settings, None)).name
            cells.append({"name": name, "levels": levels, "seed": seed})
            run = study.run_of(name)
            run.path.mkdir()
            loss = value(levels, seed)
            run.metrics.write_text(json.dumps({"step": 3, "val_loss": loss if math.isfinite(loss) else None}) + "\n")
            rows = [
                {
                    "step": step,
                    "layer": layer,
                    "point": "attn",
                    "key": "k",
                    "mean": step * loss + layer,
                    "cloud": "raw",
                    "n_valid": 4,
                }
                for step in (0, 3)
                for layer in (0, 1)
            ]
            if recorded:
                run.records.write_text("".join(json.dumps(row) + "\n" for row in rows))
            study.done(name).write_text(json.dumps({"step": 3, "seconds": 0.1}))
    (folder / "cells.json").write_text(json.dumps(cells))
    return study


def plan(levels: str = "x y", **more: Any) -> Plan:
    outcomes = {"loss": Measure(metric="val_loss")}
    return Plan(title="", base="none", outcomes=outcomes, factors={"f": {one: {} for one in levels.split()}}, **more)


def noisy(levels: Mapping[str, str], seed: int) -> float:
    return float(np.random.default_rng([seed, *map(ord, levels["f"])]).normal()) + 9 * (levels["f"] == "y")


def test_equal_studies_give_equal_bytes_wherever_they_are(tmp_path: Path):
    claims = {"more": Claim(source="S", outcome="loss", levels={"f": "y"}, least=0.0)}
    first = written(tmp_path / "one", plan(claims=claims), 6, noisy, recorded=True)
    write_results(first)
    shutil.copytree(first.path, tmp_path / "far" / "another")
    second = Study(tmp_path / "far" / "another", plan(claims=claims))
    for name in TABLES:
        (second.path / name).unlink()
    write_results(second)
    again = {name: (first.path / name).read_bytes() for name in TABLES}
    assert again == {name: (second.path / name).read_bytes() for name in TABLES}
    write_results(first)
    assert again == {name: (first.path / name).read_bytes() for name in TABLES}
    assert str(tmp_path).encode() not in b"".join(again.values())


def test_what_was_recorded_last_is_compared(tmp_path: Path):
    study = written(tmp_path / "out", plan("x y z"), 6, noisy, recorded=True)
    write_results(study)
    found, losses = read(study.path / "observables.csv"), read(study.path / "effects.csv").set_index("level")
    assert found["layer"].tolist() == [0, 0, 1, 1] and found["level"].tolist() == ["y", "z"] * 2 and (found["tests"] == 4).all()
    np.testing.assert_allclose(found["difference"], 3 * losses.loc[found["level"], "difference"].to_numpy(), rtol=1e-12)
    assert found["word"].tolist() == [DIFFERS, NO_DIFFERENCE] * 2
    assert "of 4 differences in what was recorded 2 are found" in summary(study.path)
    (study.path / "cells" / "f=y,seed=5" / "records.jsonl").unlink()
    write_results(study)
    found = read(study.path / "observables.csv")
    assert found["word"].tolist() == [TOO_FEW, NO_DIFFERENCE] * 2 and found["n"].tolist() == [5, 6] * 2
    shutil.rmtree(study.path / "cells" / "f=y,seed=4")  # ended, and lost since
    write_results(study)
    assert read(study.path / "effects.csv")["n"].tolist() == [5, 6]


def test_cells_without_an_outcome_are_named(tmp_path: Path):
    study = written(
        tmp_path / "out",
        plan("x y z"),
        8,
        lambda levels, seed: math.inf if (levels["f"], seed) == ("z", 3) else noisy(levels, seed),
    )
    study.done("f=y,seed=2").unlink()
    study.done("f=y,seed=4").unlink()
    study.done("f=x,seed=6").unlink()
    study.failed["f=y,seed=4"] = "killed"
    write_results(study)
    told = summary(study.path)
    assert "1 of 24 cells failed: f=y,seed=4" in told and "2 of 24 cells missing: f=y,seed=2, f=x,seed=6" in told
    assert "1 of 24 cells finished without a number for loss: f=z,seed=3" in told
    assert "5 of 8" in told and TOO_FEW in told and "1 of 2 comparisons have too few seeds" in told and "takes 6" in told
    found = read(study.path / "effects.csv")
    assert found["n"].tolist() == [5, 6] and found["planned"].tolist() == [8, 8]


def test_no_result_is_shown_where_a_control_fails(tmp_path: Path):
    claims = {"more": Claim(source="S", outcome="loss", levels={"f": "y"}, least=0.0)}
    good = plan(claims=claims, controls={"y is large": Control(outcome="loss", levels={"f": "y"}, least=5.0)})
    study = written(tmp_path / "out", good, 6, noisy, recorded=True)
    write_results(study)
    assert all((study.path / name).exists() for name in TABLES)
    (study.path / "figures").mkdir()
    for name in ("report.html", "figures/effects.png", "figures/mine.svg"):
        (study.path / name).write_text("old")
    study.plan = replace(good, controls={"y is large": Control(outcome="loss", levels={"f": "y"}, least=5.0, most=8.0)})
    with pytest.raises(UserError, match=r"'y is large': loss is [89]\.\d+ over 6 cells, not in \[5, 8\]"):
        write_results(study)
    assert (study.path / "table.csv").exists() and not any(list(study.path.glob(name)) for name in RESULTS)
    assert (study.path / "figures" / "mine.svg").exists()
    assert "f=x,seed=0" in summary(study.path) and "against" not in summary(study.path)
    study.plan = good
    study.done("f=y,seed=1").unlink()
    with pytest.raises(UserError, match="of 'y is large' 1 of 6 cells have no loss: f=y,seed=1"):
        write_results(study)
    for one in study.cells:
        study.done(one["name"]).unlink(missing_ok=True)
    study.plan = plan()
    with pytest.raises(UserError, match=r"no cell of .* what they said is in"):
        write_results(study)


def test_an_outcome_that_no_cell_has_is_named(tmp_path: Path):
    study = written(tmp_path / "out", plan(), 1, noisy)
    study.plan = replace(study.plan, outcomes={"loss": Measure(metric="val_los")})
    with pytest.raises(UserError, match="those that finished have no val_los; did you mean val_loss"):
        write_results(study)


def test_the_step_is_chosen_before_what_is_undefined_at_it(tmp_path: Path):
    """What is undefined at the last step is not what it was before, and the least loss is one that is there."""
    run = Run(tmp_path)
    losses = {10: math.nan, 20: 3.0, 30: 4.0, 40: math.nan}
    run.metrics.write_text("".join(json.dumps({"step": k, "val_loss": loss}) + "\n" for k, loss in losses.items()))
    rows = [(10, 0, None), (10, 1, None), (20, 0, 0.3), (20, 1, 0.5), (30, 0, None), (30, 1, 0.7)]
    told = [{"step": k, "layer": at, "point": "attn", "key": "k", "mean": mean, "n_valid": 4} for k, at, mean in rows]
    run.records.write_text("".join(json.dumps(row) + "\n" for row in told))

    def value(**more: Any) -> tuple[float, int]:
        found = measured(run, Measure(**more))
        return found["value"], found["step"]

    assert value(metric="val_loss", at="best") == (3.0, 20)
    assert math.isnan(value(metric="val_loss")[0]) and value(metric="val_loss")[1] == 40
    assert value(record="k") == value(record="k", where={"layer": "last"}) == value(record="k", where={"layer": 1}) == (0.7, 30)
    assert [str(one) for one in value(record="k", at="first")] == ["nan", "10"]
    assert [str(one) for one in value(record="k", where={"layer": 0})] == ["nan", "30"]
    run.metrics.write_text(json.dumps({"step": 1, "val_loss": math.nan}) + "\n")
    assert math.isnan(value(metric="val_loss", at="best")[0])


def test_a_cell_that_lacks_a_layer_is_no_average_of_the_others(tmp_path: Path):
    """Two layers with values 3 loss + layer: without one of them the mean is of another thing."""
    study = written(tmp_path / "out", plan(), 6, noisy, recorded=True)
    study.plan = replace(study.plan, outcomes={"k": Measure(record="k"), "end": Measure(record="k", where={"layer": "last"})})
    whole = table(study).set_index(["cell", "outcome"])["value"]
    assert whole.notna().all() and np.allclose(whole[:, "end"] - whole[:, "k"], 0.5)
    records = study.run_of("f=y,seed=2").records
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    lacking = [row | {"mean": None} if (row["step"], row["layer"]) == (3, 0) else row for row in rows]
    records.write_text("".join(json.dumps(row) + "\n" for row in lacking))
    found = table(study).set_index(["cell", "outcome"])["value"]
    assert list(found.index[found.isna()]) == [("f=y,seed=2", "k")] and found.dropna().equals(whole[found.notna()])
    for seed in range(6):  # where no seed has the place, it is none of these cells
        study.run_of(f"f=y,seed={seed}").records.write_text(records.read_text())
    assert table(study)["value"].notna().all()


def test_levels_that_look_like_something_else(tmp_path: Path):
    """YAML and CSV have their own mind of what is a number, or nothing."""
    study = written(tmp_path / "out", plan("1.0 null NA 007 nan"), 6, lambda levels, seed: len(levels["f"]) + seed / 7)
    write_results(study)
    told = read(study.path / "table.csv")
    assert told["f"].tolist()[:5] == ["1.0", "null", "NA", "007", "nan"] and told["value"].dtype == float
    again = effects(told, study.plan)
    pd.testing.assert_frame_equal(again, read(study.path / "effects.csv").astype(again.dtypes))
    assert again["level"].tolist() == ["null", "NA", "007", "nan"]


def test_a_search_is_told_best_first(tmp_path: Path):
    search = {"model.dim": Range(low=1.0, high=2.0)}
    study = Study(tmp_path / "out", Plan(title="", base="none", outcomes={"loss": Measure(metric="val_loss")}, search=search))
    one = written(tmp_path / "other", plan("a b c"), 1, lambda levels, seed: {"a": 3.0, "b": 1.0, "c": 2.0}[levels["f"]])
    shutil.move(one.path, study.path)
    cells = json.loads((study.path / "cells.json").read_text())
    (study.path / "cells.json").write_text(json.dumps([cell | {"levels": {"model.dim": 1.5}} for cell in cells]))
    write_results(study)
    lines = summary(study.path).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["f=b,seed=0", "f=c,seed=0", "f=a,seed=0"]
    assert not any(list(study.path.glob(name)) for name in RESULTS)
