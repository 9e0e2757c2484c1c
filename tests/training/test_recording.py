"""What is recorded while a model learns: the same weights with and without, the rows, the mirrors, the figures, the terminal."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from builders import model, words
from PIL import Image
from small import same, settings, text

from emformer import trajectory
from emformer.ffn import GELU
from emformer.observables import Row
from emformer.observables.flow import Flow
from emformer.parts import UserError
from emformer.recordings import read_records
from emformer.records import Run, read_journal
from emformer.settings import Probe, Settings
from emformer.text import Prompts
from emformer.training import (
    BreathingCallback,
    ClusteringCallback,
    Every,
    FlowCallback,
    LogSpaced,
    ObservableCallback,
    TensorBoard,
    Wandb,
    fit,
    record,
    recording,
)

ALL = [FlowCallback(Every(5), 6), ClusteringCallback(Every(10), 6), BreathingCallback(LogSpaced(3, first=4), 40)]


def plan(folder: Path, callbacks: list[Any] | None = None, **training: Any) -> Settings:
    """Twelve steps of two layers with dropout, recorded by everyone at another cadence."""
    shape = {"depth": 2, "dropout": 0.1}
    whole = settings(folder, shape, **({"max_steps": 12, "validate_every": 6, "save_every": 4} | training))
    return replace(whole, callbacks=ALL if callbacks is None else callbacks, probe=Probe(prompts=40, length=12))


def some(count: int) -> Prompts:
    return Prompts(words(8, batch=count).numpy(), np.arange(count))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that recorded everything; no test may change it."""
    folder = tmp_path_factory.mktemp("recorded")
    fit(plan(folder), folder / "run")
    return folder / "run"


def test_recording_changes_no_weight(done: Path, tmp_path: Path):
    text(tmp_path / "text.txt")
    fit(plan(tmp_path, callbacks=[]), tmp_path / "run")
    a, b = (torch.load(Run(run).last, weights_only=True) for run in (done, tmp_path / "run"))
    assert same(a["state_dict"], b["state_dict"]) and same(a["optimizer_states"], b["optimizer_states"])
    assert not Run(tmp_path / "run").records.exists(), "nobody asked for records"


def test_each_callback_keeps_its_own_cadence_and_the_last_step(done: Path):
    frame = read_records(done)
    recorded = {prefix: sorted(frame[frame["key"].str.startswith(prefix)]["step"].unique()) for prefix in ("flow", "clu", "geo")}
    assert recorded == {"flow": [0, 5, 10, 12], "clu": [0, 10, 12], "geo": [0, 4, 12]}
    assert list(frame["step"]) == sorted(frame["step"])
    last = set(frame[frame["step"] == 12]["key"])
    costly = {"flow.bures", "clu.density_count", "clu.best_k"}
    assert costly <= last and not costly & set(frame[frame["step"] < 12]["key"])
    params = frame[frame["key"] == "breath.b_attn"].groupby("step")["param"]
    assert set(params.get_group(12).dropna()) == {"shuffled", "noise", "uniform"} and params.get_group(0).isna().all()


def test_rows_are_whole_and_equal_those_of_the_checkpoint_recorded_again(done: Path):
    """The rows of step 12 are those of the weights of step 12 on the probe, nothing else."""
    import emformer

    frame = read_records(done)
    assert {"run", *frame.columns} == {"run", *emformer.observables.COLUMNS} and not frame["key"].isna().any()
    undefined = frame["mean"].isna()
    assert ((frame["n_valid"] == 0) | frame["mean"].notna() | frame["key"].str.startswith(("geo.", "breath.", "clu."))).all()
    assert not undefined.all() and (frame["n_valid"] + frame["n_dropped"] > 0).all()
    loaded = emformer.load(done)
    from emformer.training.data import read_text
    from emformer.training.fit import recorder

    whole = recorder(loaded.config, Run(done), read_text(loaded.config.data))
    rows, skipped = record(loaded.model, whole.prompts, [look for one in ALL for look in one.looks(12, 12)])
    assert skipped == []
    written = [row for row in read_journal(Run(done).records) if row["step"] == 12]
    assert [{"step": 12} | row._asdict() for row in rows] == written


def test_what_belongs_to_one_step_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    honest = trajectory.capture

    def counted(net: torch.nn.Module, tokens: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(tokens))
        return honest(net, tokens, *rest)

    monkeypatch.setattr(trajectory, "capture", counted)
    net, prompts = model(ffn=GELU()), some(30)
    looks = [
        look
        for one in (FlowCallback(prompts=6), ClusteringCallback(prompts=10), BreathingCallback(prompts=25))
        for look in one.looks(0, 1)
    ]
    record(net, prompts, looks, chunk=8)
    assert seen == [6, 4, 8, 7], "no prompt twice, and as many as the one who wants most"
    rows, _ = record(net, prompts, looks, chunk=3)
    counts = {row.key.partition(".")[0]: row.n_valid for row in rows if row.key in ("flow.speed", "clu.mean_cos", "geo.pr")}
    assert counts == {"flow": 6, "clu": 10, "geo": 25}


def test_shuffled_prompts_are_a_pass_of_their_own_and_say_so():
    net, prompts = model(ffn=GELU()), some(20)
    text, shuffled = (ObservableCallback([Flow()], prompts=None, order=order).looks(0, 1) for order in ("text", "shuffled"))
    rows, _ = record(net, prompts, [*text, *shuffled])
    half = len(rows) // 2
    for a, b in zip(rows[:half], rows[half:], strict=True):
        assert a.key == b.key and b.param == ("shuffled" if a.param is None else f"{a.param} shuffled")
    assert [a.mean for a in rows[:half]] != [b.mean for b in rows[half:]]


def test_a_run_that_was_killed_before_its_first_checkpoint_records_step_0_once(tmp_path: Path):
    whole, run = plan(tmp_path, [FlowCallback(Every(5), 6)]), Run(tmp_path / "run")
    fit(whole, run.path)
    rows = list(read_journal(run.records))
    part = run.records.read_bytes().splitlines(keepends=True)[: len(rows) // 5]
    assert rows[len(part)]["step"] == 0
    run.records.write_bytes(b"".join(part) + b'{"step": 0, "lay')
    shutil.rmtree(run.checkpoints)
    run.metrics.unlink()
    fit(whole, run.path, resume=True)
    assert list(read_journal(run.records)) == rows


def test_a_run_killed_after_its_last_checkpoint_gets_its_parquet_and_figures(done: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    shutil.copy(done.parent / "text.txt", tmp_path / "text.txt")
    run = Run(folder)
    run.parquet.unlink()
    shutil.rmtree(run.figures)
    was = Run(done).settings()
    fit(was, folder, resume=True)
    pd.testing.assert_frame_equal(pd.read_parquet(run.parquet), pd.read_parquet(Run(done).parquet))
    assert {path.name for path in run.figures.iterdir()} == {path.name for path in Run(done).figures.iterdir()}


def test_a_finished_run_has_figures(done: Path):
    drawn = {path.name for path in Run(done).figures.iterdir()}
    names = ("sawtooth", "flow", "cosines", "separation", "clusters", "breathing", "motion")
    assert drawn == {f"{name}.png" for name in names}
    for path in Run(done).figures.iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 500 and len(np.unique(pixels)) > 50


def test_loggers_show_scalars_and_figures(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Read back from TensorBoard's files and from wandb's, offline."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    shutil.copy(done.parent / "text.txt", tmp_path / "text.txt")
    run = tmp_path / "run"
    try:
        fit(replace(plan(tmp_path), loggers=[TensorBoard(), Wandb()], figures=LogSpaced(2)), run)
    finally:
        wandb.finish()
    drawn = {name: np.asarray(Image.open(run / "figures" / f"{name}.png")) for name in ("sawtooth", "flow", "cosines")}

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    frame = read_records(run).query("key == 'flow.speed' and layer == 1 and point == 'ffn'")
    shown = events.Scalars("flow/speed/layer 1 ffn")
    assert [event.step for event in shown] == list(frame["step"])
    assert [event.value for event in shown] == pytest.approx(list(frame["mean"]), rel=1e-6)
    assert not [tag for tag in events.Tags()["scalars"] if "head_share" in tag], "heads are in the records alone"
    for name, pixels in drawn.items():
        images = events.Images(f"figures/{name}")
        assert [image.step for image in images] == [0, 12]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string))), pixels)

    (folder,) = (run / "wandb").glob("offline-run-*")
    data = next(folder.glob("run-*.wandb")).read_bytes()
    assert b"flow/speed/layer 1 ffn" in data and b"breath/sawtooth" in data
    for name, pixels in drawn.items():
        pictures = list((folder / "files" / "media" / "images" / "figures").glob(f"{name}_*.png"))
        assert len(pictures) == 2 and any(np.array_equal(np.asarray(Image.open(path)), pixels) for path in pictures)


def test_a_record_is_one_line(done: Path):
    rows = [
        Row(3, "attn", "flow.speed_rel", 0.2),
        Row(3, "ffn", "flow.speed_rel", 0.21),
        Row(3, "ffn", "clu.components", 12.0, param="c=0.9"),
        Row(3, "ffn", "clu.components", 50.0, param="c=0.99"),
        Row(2, "ffn", "geo.id_twonn", 4.1),
        Row(2, "ffn", "geo.id_twonn", 9.0, cloud="read"),
        Row(3, "attn", "geo.id_twonn", 4.8),
        Row(3, "ffn", "geo.id_twonn", 4.4),
        Row(3, "ffn", "geo.id_twonn", 40.0, param="shuffled"),
        Row(3, "attn", "flow.speed_rel", 7.0, head=1),
    ]
    assert recording.summary(rows) == "layer 3: cloud moved 0.41, 12 clusters, dimension 4.1 ↑ 4.8 ↓ 4.4"
    assert recording.summary(rows[:2]) == "layer 3: cloud moved 0.41"
    assert recording.summary([Row(0, "attn", "lens.entropy", 1.0)]) == "1 rows recorded"


def test_names_for_loggers_are_readable():
    rows = [
        Row(3, "ffn", "flow.speed_rel", 0.2),
        Row(3, "attn", "flow.head_share", 0.2, head=2),
        Row(0, "embed", "geo.id_gride", 4.0, cloud="read", param="k=4"),
        Row(None, None, "breath.sawtooth", 0.5),
        Row(1, "ffn", "geo.id_twonn", None),
    ]
    assert recording.named(rows) == {
        "flow/speed_rel/layer 3 ffn": 0.2,
        "geo/id_gride read k=4/layer 0 embed": 4.0,
        "breath/sawtooth": 0.5,
    }


def test_the_terminal_is_told_of_every_record_and_once_of_what_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from emformer.observables.flow import Flow

    class Needy(Flow):
        family = "needy"  # classes outlive their test: "flow" shall mean what it means
        needs = frozenset({"labels"})

    needy = ObservableCallback([Needy()], Every(3))
    fit(plan(tmp_path, [FlowCallback(Every(6), 4), needy], validate_every=12), tmp_path / "run")
    told = capsys.readouterr().err
    assert told.count("cloud moved") == 3 and "step     12  layer 1: cloud moved" in told
    assert told.count("skipped, for the trajectory has no labels") == 1


def test_bad_input_is_one_sentence():
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: FlowCallback(prompts=0), "FlowCallback: prompts is 0"),
        (lambda: ObservableCallback([Flow()], prompts=-1), "ObservableCallback: prompts is -1"),
        (lambda: Probe(length=1), "probe.length is 1"),
    ]
    for make, said in bad:
        with pytest.raises(UserError, match=said):
            make()


def test_weights_that_are_not_finite_stop_the_run_in_one_sentence(tmp_path: Path):
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, learner: pl.LightningModule, *rest: Any) -> None:
            if trainer.global_step == 3:
                torch.nn.init.constant_(next(learner.parameters()), torch.nan)

    with pytest.raises(UserError, match=r"recording after step 3: layer 0 at 'attn'.*not finite"):
        fit(plan(tmp_path, [FlowCallback(Every(1), 4)]), tmp_path / "run", callbacks=[Poison()])
    assert {row["step"] for row in read_journal(Run(tmp_path / "run").records)} == {0, 1, 2}


def test_recording_touches_no_global_generator():
    net, prompts = model(ffn=GELU(), dropout=0.5).train(), some(20)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    record(net, prompts, [look for one in ALL for look in one.looks(12, 12)])
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert net.training
