"""An analysis measures what the recorder measures; asked for twice it is done once; and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import emformer as emf
from emformer.model import Emformer
from emformer.observables import state
from emformer.observables.breathing import Breathing
from emformer.observables.clustering import Clustering, Density
from emformer.observables.energy import Energy
from emformer.observables.flow import Flow
from emformer.observables.sinks import Sinks
from emformer.parts import UserError
from emformer.recordings import Recordings
from emformer.records import Run
from emformer.studies import analyze
from emformer.text import Windows as Validation
from emformer.training.recording import BreathingCallback, ClusteringCallback, FlowCallback
from emformer.trajectory import captures

analysis = sys.modules["emformer.studies.analysis"]  # the function of the package bears the name of the deed
QUICK = [Flow(), Sinks()]
WORDS = ["the", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"]


def rows(folder: Path) -> pd.DataFrame:
    return emf.read_records(folder).drop(columns="run")


def text(folder: Path, words: int = 1500) -> Path:
    path = folder / "novel.txt"
    random = np.random.default_rng(0)
    path.write_text(" ".join(random.choice(WORDS, words)))
    return path


# ------------------------------------------------------------------------------------------------------------------ numbers


def test_on_a_runs_own_text_it_finds_what_the_run_recorded(run: Run, tmp_path: Path):
    """The same observables on the same prompts of the same checkpoint: the very rows, bit for bit."""
    settings = run.settings()
    recorded = [look for one in settings.callbacks for look in one.looks(4, 4)]
    assert {type(one) for one in settings.callbacks} == {FlowCallback, ClusteringCallback, BreathingCallback}
    out = analyze(run.path, out=tmp_path / "out", observables=recorded, batch=64, report=False)
    ours, theirs = rows(out), rows(run.path).query("step == 4")
    places = ["step", "layer", "point", "head", "key", "cloud", "param"]
    ours, theirs = (one.sort_values(places).reset_index(drop=True) for one in (ours, theirs))
    assert len(ours) > 200
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert set(ours["param"].dropna()) >= {"shuffled", "noise", "label=class", "skip=1"}


def test_on_a_text_it_reads_every_whole_window_once(run: Run, tmp_path: Path):
    """Held against one pass in the order of the text: equal means, for they do not depend on the order; and the count."""
    path = text(tmp_path)
    out = analyze(run.path, text=path, out=tmp_path / "out", observables=[Flow(), Energy()], length=16, report=False)
    loaded = emf.load(run.path)
    ids = loaded.tokenizer.encode(path.read_text(), add_special_tokens=False).ids
    count = len(ids) // 16
    assert count > 100
    whole = torch.tensor(ids[: 16 * count]).view(count, 16)
    expected = emf.observe(captures(loaded.model, whole), [Flow(), Energy()])
    found = rows(out)
    drawn = found["param"].isin(["random", "permuted"]).to_numpy()  # draws of a random number
    assert set(found["n_valid"] + found["n_dropped"]) == {count} and len(found) == len(expected)
    both = found[~drawn].merge(expected.drop(columns="step"), on=["layer", "point", "head", "key", "cloud", "param"])
    assert len(both) == (~drawn).sum() > 50
    for name in ("mean", "sd", "null"):
        np.testing.assert_allclose(both[f"{name}_x"], both[f"{name}_y"], rtol=1e-4, atol=1e-5)


def test_costly_observables_see_the_first_prompts_of_a_random_order(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from emformer.studies import looks

    monkeypatch.setattr(looks, "WHO_SEES", {"Flow": None, "Transport": 30, "Bures": 7})
    out = analyze(run.path, text=text(tmp_path), out=tmp_path / "out", observables="flow", length=16, batch=20, report=False)
    seen = rows(out).query("param.isna()").groupby("key")[["n_valid", "n_dropped"]].max().sum(axis=1)
    assert seen["flow.w2"] == 30 and seen["flow.bures"] == 7 and seen["flow.speed"] > 100
    ask = {"text": tmp_path / "novel.txt", "observables": "flow", "length": 16, "report": False}
    half = analyze(run.path, out=tmp_path / "half", tokens=160, **ask)
    assert rows(half).query("key == 'flow.speed'")["n_valid"].max() == 10
    one, two = (rows(folder).query("key == 'flow.bures' and layer == 0") for folder in (out, half))
    assert len(one) == 2 and (one["mean"].to_numpy() == two["mean"].to_numpy()).all(), "the first 7 of the same order"


def test_all_is_every_family_and_each_observable_once(run: Run):
    """But what other tests have defined; also one that has no defaults is left out, and does no harm."""
    from emformer.observables.frame import catalogue
    from emformer.studies.looks import WHO_SEES, looks

    @dataclass(frozen=True)
    class NeedsMore(Flow):
        more: int = field(kw_only=True)
        family = "needsmore"

    model = emf.load(run.path).model
    found = [look for look in looks(model, "all") if type(look.observables[0]).__module__.startswith("emformer.")]
    own = {key.family for key in catalogue().values()}
    assert {look.observables[0].family for look in found} >= {"breathing", "clustering", "energy", "flow", "foliation", "lens"}
    assert {look.observables[0].family for look in found} <= own and len(set(found)) == len(found)
    assert {type(look.observables[0]).__name__ for look in found} == set(WHO_SEES), "the table knows them all"
    with pytest.raises(UserError, match="NeedsMore"):
        looks(model, "needsmore")
    assert [look for look in found if look.order == "shuffled"], "breathing beside shuffled prompts"
    assert looks(model, "clustering, flow,clustering") == looks(model, ["clustering", "flow"])
    for wrong, near in (("flwo", "flow"), ("", "no observable")):
        with pytest.raises(UserError, match=near):
            looks(model, wrong)


def test_batches_fit_the_budget(run: Run):
    """512 MB of clouds and patterns: GPT-2's shape gets few prompts at once, long prompts one."""
    from emformer.studies.request import fitting

    settings = run.settings().model
    with torch.device("meta"):
        shapes = replace(settings, dim=16, depth=1, heads=2), replace(settings, dim=768, depth=12, heads=12)
        small, large = (Emformer(300, **vars(shape)) for shape in shapes)
    assert fitting(small, 16) == 256
    count, a_prompt = fitting(large, 128), 4 * 128 * (5 * 24 * 768 + 12 * 12 * 128)
    assert count * a_prompt <= 1 << 29 < (count + 1) * a_prompt
    assert fitting(large, 8192) == 1


# ------------------------------------------------------------------------------------------------------------------- folders


def test_the_folder_is_read_like_a_run(run: Run, tmp_path: Path):
    out = analyze(run.path, corpus="Grammar", out=tmp_path / "out", tokens=800, length=16, observables=[*QUICK, Density()])
    assert sorted(path.name for path in out.iterdir()) == [
        "analysis.json", "environment.json", "figures", "records.jsonl", "records.parquet", "report.html", "scene.safetensors",
        "tokenizer.json",
    ]  # fmt: skip
    frame = rows(out)
    pd.testing.assert_frame_equal(frame, pd.read_parquet(out / "records.parquet"))
    assert set(frame["step"]) == {4}
    from emformer.figures.scene import Scene

    scene = Scene.load(out / "scene.safetensors")
    assert scene.ids.shape == (8, 16) and scene.class_name == "class" and (scene.classes >= 0).any()
    told = json.loads((out / "analysis.json").read_text())
    assert told["finished"] and told["done"] == [4] and told["request"]["tokens"] == 800 and told["request"]["length"] == 16
    assert "Flow(seed=0) on all prompts" in told["request"]["observables"]


def test_the_whole_run_is_followed_and_no_checkpoint_measured_twice(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []
    real = analysis._Measurement.run
    stop_at: list[int] = [2]

    def watched(self):
        if self._step in stop_at:
            raise KeyboardInterrupt
        measured.append(self._step)
        real(self)

    monkeypatch.setattr(analysis._Measurement, "run", watched)
    ask = {"out": tmp_path / "out", "checkpoints": "all", "observables": QUICK, "report": False}
    with pytest.raises(KeyboardInterrupt):
        analyze(run.path, **ask)
    assert measured == [0, 1] and set(rows(ask["out"])["step"]) == {0, 1}
    stop_at.clear()
    analyze(run.path, **ask)
    assert measured == [0, 1, 2, 4]
    frame = rows(ask["out"])
    assert frame.groupby("step").size().nunique() == 1 and sorted(set(frame["step"])) == [0, 1, 2, 4]
    before = {path: path.stat().st_mtime_ns for path in ask["out"].rglob("*")}
    analyze(run.path, **ask)
    assert measured == [0, 1, 2, 4] and before == {path: path.stat().st_mtime_ns for path in ask["out"].rglob("*")}
    for step in (1, 4):
        alone = analyze(run.path, out=tmp_path / str(step), checkpoints=step, observables=QUICK, report=False)
        pd.testing.assert_frame_equal(rows(alone), frame.query(f"step == {step}").reset_index(drop=True), check_exact=True)


def test_checkpoints_are_named_in_many_ways(run: Run):
    from emformer.studies.request import checkpoints

    def steps(named) -> list[int]:
        return [one.step for one in checkpoints(run.path, named)]

    assert steps("all") == steps(["all", "best", 2]) == [0, 1, 2, 4]
    assert steps("last") == steps("4,last") == steps("best") == [4] and steps("2, 0,last") == [0, 2, 4] and steps(1) == [1]
    assert [one.load().step for one in checkpoints(run.path, "0,2")] == [0, 2]
    for wrong, words in (("3", "0, 1, 2, 4"), ("newest", "newest"), (" , ", "no checkpoint is named")):
        with pytest.raises(UserError, match=words):
            steps(wrong)
    assert [one.step for one in checkpoints(run.last, "last")] == [4]
    with pytest.raises(UserError, match="one model"):
        checkpoints(run.last, "all")


# ------------------------------------------------------------------------------------------------------------- to and fro


@pytest.fixture(scope="session")
def straight(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, bytes]:
    """What is asked for below, and the records of an analysis that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    ask = {
        "text": text(folder, 700),
        "observables": [Flow(), Clustering(points=50), Breathing(points=20)],
        "length": 16,
        "batch": 5,
        "report": False,
    }
    return ask, Run(analyze(run.path, out=folder / "out", **ask)).records.read_bytes()


@pytest.fixture
def halfway(run: Run, straight: tuple[dict, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was asked for, and where it stopped with a saved state after 50 prompts."""
    monkeypatch.setattr(analysis, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(analysis, "SAVE_SHARE", 1e9)
    real = analysis._Measurement._look

    def stopped(self, start: int, stop: int) -> None:
        if start >= 50:
            raise KeyboardInterrupt
        real(self, start, stop)

    monkeypatch.setattr(analysis._Measurement, "_look", stopped)
    ask = straight[0] | {"out": tmp_path / "out", "text": tmp_path / "novel.txt"}
    shutil.copyfile(straight[0]["text"], ask["text"])
    with pytest.raises(KeyboardInterrupt):
        analyze(run.path, **ask)
    saved = ask["out"] / "unfinished" / "state.safetensors"
    assert state.read(saved).about["at"] == 50
    monkeypatch.setattr(analysis._Measurement, "_look", real)
    monkeypatch.setattr(analysis, "SAVE_EVERY", 30.0)
    return ask, saved


@pytest.mark.parametrize("damage", ["none", "cut", "other settings", "other model"])
def test_a_saved_state_is_gone_on_from_or_refused(run: Run, straight, halfway, damage: str, monkeypatch, capsys):
    ask, saved = halfway
    whole = saved.read_bytes()
    if damage == "cut":
        saved.write_bytes(whole[:-7])
    elif damage != "none":
        name = {"other settings": "request", "other model": "model"}[damage]
        old = state.read(saved)
        state.save(saved, 0, old.about | {name: "another"})
    looked = []
    real = analysis._Measurement._look
    monkeypatch.setattr(analysis._Measurement, "_look", lambda self, start, stop: looked.append(start) or real(self, start, stop))
    capsys.readouterr()
    analyze(run.path, **ask)
    told = capsys.readouterr().err
    assert looked[0] == (50 if damage == "none" else 0)
    assert ("measured anew" in told) == (damage == "cut") and told.count("\n") <= 1, told
    assert Run(ask["out"]).records.read_bytes() == straight[1]


@pytest.mark.parametrize("written", [0, 7, None], ids=["none", "some", "all"])
def test_stopped_while_it_writes_its_rows(
    run: Run, straight, tmp_path: Path, written: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Before the step counts as done: it is measured again, and no row is there twice."""
    real = Recordings.append

    def some(self, step, rows):
        real(self, step, rows[:written])
        raise KeyboardInterrupt

    monkeypatch.setattr(Recordings, "append", some)
    with pytest.raises(KeyboardInterrupt):
        analyze(run.path, out=tmp_path / "out", **straight[0])
    monkeypatch.setattr(Recordings, "append", real)
    out = Run(analyze(run.path, out=tmp_path / "out", **straight[0]))
    assert out.records.read_bytes() == straight[1]


def test_a_folder_keeps_what_it_was_begun_with(run: Run, halfway, tmp_path: Path):
    ask, saved = halfway
    before = {path: path.read_bytes() for path in ask["out"].rglob("*") if path.is_file()}
    other = tmp_path / "other.txt"
    other.write_text(ask["text"].read_text() + " more")
    for change, words in (
        ({"length": 8}, "length 16, not 8"),
        ({"batch": 6}, "batch 5, not 6"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"observables": QUICK}, "other observables"),
        ({"checkpoints": "0"}, "steps"),
        ({"text": other}, "text"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            analyze(run.path, **ask | change)
        assert "--overwrite" in str(refused.value)
    ask["text"].write_text(other.read_text())  # the same name
    with pytest.raises(UserError, match="another content"):
        analyze(run.path, **ask)
    assert before == {path: path.read_bytes() for path in ask["out"].rglob("*") if path.is_file()}
    (ask["out"] / "notes.md").write_text("mine")
    analyze(run.path, **ask | {"overwrite": True, "seed": 1})
    assert (ask["out"] / "notes.md").read_text() == "mine" and not saved.exists()


def test_a_checkpoint_that_has_changed_is_not_mixed_with_what_it_was(run: Run, halfway, tmp_path: Path):
    ask, _ = halfway
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    content = torch.load(copy / "checkpoints" / "last.ckpt", weights_only=True)
    content["state_dict"]["model.embedding.weight"] += 0.1
    torch.save(content, copy / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="has changed"):
        analyze(copy, **ask)


def test_folders_that_are_something_else_are_left_alone(run: Run, tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "analysis.json").write_text('{"format": 1, "request": 3}')
    foreign = "is no analysis"
    for folder, words in ((mine, foreign), (run.path, foreign), (mine / "thesis.tex", foreign), (damaged, "damaged")):
        with pytest.raises(UserError, match=words):
            analyze(run.path, out=folder, observables=QUICK, overwrite=True)
    assert (mine / "thesis.tex").read_text() == "years" and (damaged / "analysis.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "nowhere.txt"}, "no file nowhere.txt"),
        ({"text": "a", "corpus": "Grammar"}, "exclude each other"),
        ({"corpus": "Gramar"}, "did you mean 'Grammar'"),
        ({"corpus": "File"}, "--text FILE"),
        ({"length": 1}, "at least 2"),
        ({"tokens": 15, "length": 16}, "no prompt of 16"),
        ({"device": "abacus"}, "abacus"),
        ({"observables": "flwo"}, "flow"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(run: Run, tmp_path: Path, change: dict, words: str):
    with pytest.raises(UserError, match=words):
        analyze(run.path, **{"out": tmp_path / "out", "observables": QUICK} | change)
    assert not (tmp_path / "out").exists()


def test_a_text_too_short_for_a_prompt_leaves_nothing(run: Run, tmp_path: Path):
    (tmp_path / "short.txt").write_text("the fox")
    with pytest.raises(UserError, match="smaller --length"):
        analyze(run.path, text=tmp_path / "short.txt", out=tmp_path / "out", observables=QUICK)
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_text_asks_for_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from emformer.text import Absent

    loaded = emf.load(run.path)
    loaded.config = replace(loaded.config, data=replace(loaded.config.data, corpus=Absent("gpt2")))
    monkeypatch.setattr("emformer.studies.request.load", lambda *_: loaded)
    with pytest.raises(UserError, match="--text FILE"):
        analyze(run.path, out=tmp_path / "out", observables=QUICK)


def test_validation_windows_and_ours_agree_on_tokens(run: Run, tmp_path: Path):
    """Without a seed's permutation, the windows are those of the text: a set equal to stride-`length` cuts."""
    from emformer.studies.sample import Windows

    tokens = np.arange(1003, dtype=np.uint16)
    ours, theirs = Windows(tokens, 10, 3), Validation(tokens, 10)
    assert ours.count == 100
    lots = np.concatenate([ours.take(start, min(start + 7, 100)).tokens for start in range(0, 100, 7)])
    assert sorted(map(tuple, lots)) == sorted(map(tuple, theirs.fixed(0, 100)[:, :-1]))
    assert not np.array_equal(lots, theirs.fixed(0, 100)[:, :-1])
    again, some = Windows(tokens, 10, 3), Windows(tokens, 10, 3, most=59)
    assert np.array_equal(lots, again.take(0, 100).tokens)
    assert np.array_equal(some.take(0, 5).tokens, lots[:5]) and some.count == 5
    assert not np.array_equal(Windows(tokens, 10, 4).take(0, 100).tokens, lots)
    assert len(set(ours.take(0, 100).groups.tolist())) == 100
    with pytest.raises(UserError, match="smaller --length"):
        Windows(tokens, 1004, 0)


def test_classes_follow_their_tokens(run: Run, tmp_path: Path):
    """On the disk as in the probe, which has them from the same walk through the whole text."""
    from emformer.studies.sample import Windows, classes, tokenised
    from emformer.text import Pretrained, prepare, probe

    blocks = tokenised(tiny.CORPUS, run.tokenizer, tmp_path)
    marks = classes(blocks)
    assert marks is not None and len(marks) == len(blocks.tokens)
    known = prepare(tiny.CORPUS, Pretrained(str(run.tokenizer)), 0.5, cache=tmp_path / "other")
    prompts = probe(known, tiny.CORPUS, 30, 16, 0)
    assert np.array_equal(known.tokens, blocks.tokens) and prompts.labels is not None
    for start, expected in zip(prompts.starts + known.meta["train"], prompts.labels[0], strict=True):
        assert np.array_equal(marks[start : start + 16], expected)
    lot = Windows(blocks.tokens, 16, 0, classes=marks).take(0, 9)
    assert lot.labels is not None and (lot.labels >= 0).any() and lot.labels.shape == lot.tokens.shape
    place = slice(int(lot.groups[4]) * 16, int(lot.groups[4]) * 16 + 16)
    assert np.array_equal(lot.labels[4], marks[place]) and np.array_equal(lot.tokens[4], blocks.tokens[place])
