"""Runs from beginning to end: the folder, resuming, refusing, stopping; and that watching changes nothing."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from small import contents, rows, same, settings, text, weights

import emformer
from emformer import parts
from emformer.configuration import revive
from emformer.operators import Dense, LowRank
from emformer.parts import UserError
from emformer.records import Run, load
from emformer.text import BPE, Bytes, Characters, File
from emformer.training import AdamW, MaskedToken, Muon, TensorBoard, Wandb, fit
from emformer.training.data import read_text


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps; no test may change it."""
    folder = tmp_path_factory.mktemp("done")
    fit(settings(folder), folder / "run")
    return folder / "run"


def train(plan, run: Path, **options) -> dict[str, torch.Tensor]:
    fit(plan, run, **options)
    return weights(run)


# ---------------------------------------------------------------------------------------------------------- the folder


def test_what_a_run_folder_holds(done: Path):
    assert {path.name for path in done.iterdir()} == {
        *("config.yaml", "environment.json", "tokenizer.json", "metrics.jsonl", "checkpoints"),
    }
    kept = {path.name for path in (done / "checkpoints").iterdir()}
    steps = (0, 1, 2, 4, 8, 16, 20)
    assert kept == {"last.ckpt", "best.ckpt"} | {f"step-{step:07d}.ckpt" for step in steps}
    assert Run(done).steps == list(steps) and Run(done).used
    facts = json.loads((done / "environment.json").read_text())
    assert facts["seed"] == 0 and re.fullmatch("[0-9a-f]{64}", facts["corpus"])
    assert re.fullmatch("[0-9a-f]{64}", facts["tokenizer"])
    assert facts["packages"]["torch"] == torch.__version__ or facts["packages"]["torch"] in torch.__version__
    assert facts["parameters"] == sum(value.numel() for value in weights(done).values())


def test_the_metrics_of_a_run(done: Path):
    found = rows(done)
    assert [row["step"] for row in found if "train_loss" in row] == list(range(1, 21))
    assert [row["step"] for row in found if "val_loss" in row] == [10, 20]
    assert [row["step"] for row in found] == sorted(row["step"] for row in found)
    plan = settings(done.parent)
    blocks = read_text(plan.data)
    for row in found:
        if "train_loss" in row:
            # the largest rate of any group: Muon's own
            expected = 0.02 * plan.training.schedule.factor(row["step"] - 1, 20)
            assert row["lr"] == pytest.approx(expected) and row["grad_norm"] > 0
        else:
            bits = row["val_loss"] / 0.6931471805599453 / blocks.bytes_per_token("validation")
            assert row["val_bits_per_byte"] == pytest.approx(bits)


def test_the_settings_revive(done: Path):
    assert parts.plain(Run(done).settings()) == parts.plain(settings(done.parent))
    plain = yaml.safe_load((done / "config.yaml").read_text())
    assert plain == parts.plain(settings(done.parent))
    assert parts.plain(revive(copy.deepcopy(plain))) == plain


def test_reviving_leaves_the_data_as_it_was(done: Path):
    plain = yaml.safe_load((done / "config.yaml").read_text())
    before = copy.deepcopy(plain)
    revive(plain)
    assert plain == before


def test_checkpoints_are_plain_data(done: Path):
    for path in sorted((done / "checkpoints").iterdir()):
        content = torch.load(path, weights_only=True)
        assert content["emformer"].keys() == {"format", "settings", "vocab", "tokenizer"}
        assert ("optimizer_states" in content) is (path.name == "last.ckpt"), path.name
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in (done / "checkpoints").iterdir()}
    assert steps.pop("last.ckpt") == 20 and steps.pop("best.ckpt") in (10, 20)
    assert steps == {f"step-{step:07d}.ckpt": step for step in (0, 1, 2, 4, 8, 16, 20)}


def test_load_takes_a_folder_a_step_or_a_file(done: Path):
    last = load(done)
    assert emformer.load is load and last.step == 20 and last.path == done / "checkpoints" / "last.ckpt"
    assert not last.model.training and last.tokenizer.decode(last.tokenizer.encode("alpha ü").ids) == "alpha ü"
    assert parts.plain(last.config) == parts.plain(settings(done.parent))
    tokens = torch.randint(0, 200, (2, 16))
    for source, which in [(done, "last"), (str(done), 20), (done, "20"), (done / "checkpoints" / "step-0000020.ckpt", "last")]:
        again = load(source, which)
        assert again.step == 20 and torch.equal(again.model(tokens), last.model(tokens))
    assert load(done, "best").step in (10, 20)
    first = load(done, 0)
    assert first.step == 0 and not torch.equal(first.model(tokens), last.model(tokens))


def test_load_gives_the_model_that_was_trained(tmp_path: Path):
    class Keep(pl.Callback):
        def on_train_end(self, trainer, learner):
            self.model = learner.model.eval()

    keep = Keep()
    fit(settings(tmp_path), tmp_path / "run", callbacks=[keep])
    tokens = torch.randint(0, 200, (3, 16))
    assert torch.equal(load(tmp_path / "run").model(tokens), keep.model(tokens))


def test_load_leaves_the_global_generator_alone(done: Path):
    before = torch.get_rng_state()
    load(done)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("which", ["3", 3, "first", "", "../last", -1])
def test_a_missing_step_is_named_with_those_there_are(done: Path, which):
    with pytest.raises(UserError, match=r"last, best|last, best or a step"):
        load(done, which)


def test_the_last_step_is_always_kept(tmp_path: Path):
    plan = settings(tmp_path, max_steps=11, save_every=4, validate_every=100)
    found = fit(plan, tmp_path / "run")
    assert found.step == 11 and load(tmp_path / "run").step == 11
    assert torch.load(Run(tmp_path / "run").last, weights_only=True)["global_step"] == 11
    assert [row["step"] for row in rows(tmp_path / "run") if "val_loss" in row] == [11]
    assert Run(tmp_path / "run").steps == [0, 1, 2, 4, 8, 11]


def test_the_result_tells_last_and_best(done: Path):
    found = fit(settings(done.parent), done, resume=True)
    values = [(row["val_loss"], row["step"]) for row in rows(done) if "val_loss" in row]
    assert (found.last["val_loss"], found.last["step"]) == values[-1]
    assert (found.best["val_loss"], found.best["step"]) == min(values)
    assert found.path == done and found.step == 20


# ------------------------------------------------------------------------------------------------- refusing and resuming


def test_a_used_folder_is_refused(done: Path):
    before = contents(done)
    with pytest.raises(UserError, match=r"holds a run already.*--resume.*--overwrite"):
        fit(settings(done.parent), done)
    with pytest.raises(UserError, match="exclude each other"):
        fit(settings(done.parent), done, resume=True, overwrite=True)
    assert contents(done) == before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=repr)
def test_a_foreign_folder_is_left_alone(tmp_path: Path, options: dict):
    foreign = tmp_path / "thesis"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "chapter.tex").write_text("years of work")
    (foreign / "checkpoints" / "last.ckpt").write_text("not ours")
    before = contents(foreign)
    with pytest.raises(UserError, match="exists and is not a run"):
        fit(settings(tmp_path), foreign, **options)
    with pytest.raises(UserError, match="exists and is not a run"):
        fit(settings(tmp_path), foreign / "chapter.tex", **options)
    assert contents(foreign) == before


def test_overwrite_begins_again(tmp_path: Path):
    run = tmp_path / "run"
    fit(settings(tmp_path, seed=1, max_steps=9), run)
    (run / "checkpoints" / "step-0000003.ckpt").write_bytes(b"left over")
    fresh = train(settings(tmp_path), run, overwrite=True)
    assert same(fresh, train(settings(tmp_path), tmp_path / "other"))
    assert rows(run) == rows(tmp_path / "other") and Run(run).steps == Run(tmp_path / "other").steps


@pytest.mark.parametrize(
    "mistake",
    [
        {"data": {"path": "missing.txt"}},
        {"model": {"context": 10_000}},
        {"model": {"form": LowRank(rank=3), "content": LowRank(rank=3)}},
        {"model": {"form": LowRank(rank=4, groups=3)}},
    ],
    ids=str,
)
def test_overwrite_with_a_mistake_leaves_the_old_run(tmp_path: Path, mistake: dict):
    run = tmp_path / "run"
    fit(settings(tmp_path, max_steps=2), run)
    before = contents(run)
    with pytest.raises(UserError):
        fit(settings(tmp_path, **mistake), run, overwrite=True)
    assert contents(run) == before


@pytest.mark.parametrize("mistake", [{"data": {"path": "missing.txt"}}, {"model": {"context": 10_000}}], ids=str)
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path, mistake: dict):
    with pytest.raises(UserError):
        fit(settings(tmp_path, **mistake), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_does_nothing(done: Path):
    before = contents(done)
    fit(settings(done.parent), done, resume=True)
    assert contents(done) == before


def test_resume_begins_where_there_is_nothing(tmp_path: Path):
    assert same(train(settings(tmp_path), tmp_path / "a", resume=True), train(settings(tmp_path), tmp_path / "b"))


class Stop(pl.Callback):
    """Sends this process a signal after a step, as a cluster does before it takes the node away."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, learner, outputs, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [3, 10])  # 10: a validation is due
def test_a_signal_stops_cleanly_and_resume_completes(tmp_path: Path, done: Path, number: int, code: int, step: int):
    plan, run = settings(tmp_path), tmp_path / "run"
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        fit(plan, run, callbacks=[Stop(step, number)])
    assert caught.value.code == code and signal.getsignal(number) is before
    assert load(run).step == step and max(row["step"] for row in rows(run)) == step
    assert same(train(plan, run, resume=True), weights(done))
    assert rows(run) == rows(done) and Run(run).steps == Run(done).steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_from_outside_stops_a_process(tmp_path: Path, number: signal.Signals):
    settings(tmp_path)
    code = """
        import sys
        from pathlib import Path
        from small import settings
        from emformer.training import fit
        folder = Path(sys.argv[1])
        fit(settings(folder, max_steps=100_000, validate_every=50_000, save_every=50_000), folder / "run")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "run" / "checkpoints" / "step-0000008.ckpt").exists():
                break
            time.sleep(0.02)
        process.send_signal(number)
        errors = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert f"by {number.name}; continue with --resume" in errors and "Traceback" not in errors
    assert 8 <= load(tmp_path / "run").step < 100_000


def test_resume_may_extend(tmp_path: Path, done: Path):
    """The rate depends on max_steps, so a longer run is not the shorter one continued; it is the longer one's plan from here.

    Where the two plans agree (the warm-up), so do the weights.
    """
    run = tmp_path / "run"
    fit(settings(tmp_path, max_steps=7), run)
    fit(settings(tmp_path, max_steps=20), run, resume=True)
    assert load(run).step == 20 and Run(run).settings().training.max_steps == 20
    rates = {row["step"]: row["lr"] for row in rows(run) if "lr" in row}
    schedule = settings(tmp_path).training.schedule
    assert all(rates[k] == pytest.approx(0.02 * schedule.factor(k - 1, 20)) for k in range(8, 21))
    assert not same(weights(run), weights(done))  # steps 5 to 7 cooled down already

    from emformer.settings import Schedule

    flat = {"schedule": Schedule(warmup=5, cooldown=0.0)}
    fit(settings(tmp_path, max_steps=7, **flat), tmp_path / "flat")
    extended = train(settings(tmp_path, max_steps=20, **flat), tmp_path / "flat", resume=True)
    assert same(extended, train(settings(tmp_path, **flat), tmp_path / "straight"))


def test_a_shorter_max_steps_ends_a_resumed_run(tmp_path: Path, done: Path):
    """max_steps below the step that was reached: nothing is left to do, and nothing is lost."""
    before = contents(done)
    assert fit(settings(done.parent, max_steps=12), done, resume=True).step == 20
    assert contents(done) == before


CHANGES = {
    "training.seed": {"seed": 1},
    "training.batch": {"batch": 4},
    "training.accumulate": {"accumulate": 2},
    "training.clip": {"clip": 0.5},
    "training.sample": {"sample": 5},
    "training.precision": {"precision": "64"},
    "training.validate_every": {"validate_every": 5},
    "training.optimizer.init_args.rate": {"optimizer": Muon(rate=0.01)},
    "training.optimizer.class_path": {"optimizer": AdamW()},
    "training.objective.class_path": {"objective": MaskedToken()},
    "model.dim": {"model": {"dim": 32}},
    "model.epsilon": {"model": {"epsilon": 0.5}},
    "model.layers.0.epsilon": {"model": {"layers": {0: {"epsilon": 0.5}}}},
    "model.form.init_args.rank": {"model": {"form": LowRank(rank=8)}},
    "data.validation": {"data": {"validation": 0.2}},
    "data.max_tokens": {"data": {"max_tokens": 3000}},
    "data.tokenizer.class_path": {"data": {"tokenizer": Characters()}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_other_change_is_refused_with_its_name(done: Path, name: str):
    before = contents(done)
    with pytest.raises(UserError) as caught:
        fit(settings(done.parent, **CHANGES[name]), done, resume=True)
    assert re.search(rf"was begun with {re.escape(name.rpartition('.init_args')[0] or name)}", str(caught.value)), caught.value
    assert contents(done) == before


def test_loggers_may_change(tmp_path: Path):
    fit(settings(tmp_path, max_steps=3), tmp_path / "run")
    plan = replace(settings(tmp_path, max_steps=5), loggers=[TensorBoard()])
    fit(plan, tmp_path / "run", resume=True)
    assert load(tmp_path / "run").step == 5 and (tmp_path / "run" / "tensorboard").is_dir()


@pytest.mark.parametrize("tokenizer", [Bytes(), Characters(), BPE(270)], ids=repr)
def test_a_changed_text_is_refused(tmp_path: Path, tokenizer: parts.Tokenizer):
    data = {"tokenizer": tokenizer}
    run = tmp_path / "run"
    fit(settings(tmp_path, data=data, max_steps=5), run)
    before = contents(run)
    text(tmp_path / "text.txt", "omega psi chi xi", seed=1)
    with pytest.raises(UserError, match=r"the text (is not|gives another tokenizer than) the one"):
        fit(settings(tmp_path, data=data, max_steps=9), run, resume=True)
    assert contents(run) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "weights"])
def test_a_damaged_last_checkpoint_is_not_resumed_from(tmp_path: Path, damage: str):
    run = tmp_path / "run"
    fit(settings(tmp_path, max_steps=4), run)
    last = Run(run).last
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[:-2000])
    elif damage == "empty":
        last.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, last)
    else:
        last.write_bytes(Run(run).step(4).read_bytes())
    before = contents(run)
    with pytest.raises(UserError, match=r"last\.ckpt"):
        fit(settings(tmp_path, max_steps=9), run, resume=True)
    assert contents(run) == before


# ------------------------------------------------------------------------------------------------------------ exactness


def test_the_seed_decides(tmp_path: Path, done: Path):
    a = train(settings(tmp_path), tmp_path / "a")
    assert same(a, weights(done)) and rows(tmp_path / "a") == rows(done)
    torch.manual_seed(12345)  # what the caller did with the global generator does not matter
    torch.randn(7)
    assert same(a, train(settings(tmp_path), tmp_path / "b"))
    c = train(settings(tmp_path, seed=1), tmp_path / "c")
    assert a.keys() == c.keys() and not same(a, c)
    start = [weights(tmp_path / name, "step-0000000") for name in "ac"]
    assert not same(*start)


class Noisy(pl.Callback):
    """What an observer may do: read everything, run the model, and log. It uses its own generator, as observers must."""

    def on_train_batch_end(self, trainer, learner, outputs, batch, batch_idx):
        generator = torch.Generator().manual_seed(batch_idx)
        with torch.no_grad():
            learner.model(torch.randint(0, 200, (2, 8), generator=generator))
        for logger in trainer.loggers:
            logger.log_metrics({"noise": 1.0}, step=trainer.global_step)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_watching_changes_nothing(tmp_path: Path, dropout: float):
    plan = settings(tmp_path, model={"dropout": dropout}, max_steps=12, validate_every=5)
    plain = train(plan, tmp_path / "plain")
    watched = replace(plan, loggers=[TensorBoard()], training=replace(plan.training, sample=7))
    assert same(plain, train(watched, tmp_path / "watched", callbacks=[Noisy()]))
    assert same(plain, train(settings(tmp_path, model={"dropout": dropout}, max_steps=12, validate_every=3), tmp_path / "v"))


def test_wandb_changes_nothing_and_mirrors_the_metrics(tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    run = tmp_path / "run"
    try:
        found = train(replace(settings(tmp_path), loggers=[Wandb()]), run)
    finally:
        wandb.finish()
    assert same(found, weights(done)) and rows(run) == rows(done)
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    data = next(folders[0].glob("run-*.wandb")).read_bytes()
    for name in {key for row in rows(run) for key in row} - {"step"}:
        assert name.encode() in data, name
    for row in rows(run):
        for key in ("val_loss", "train_loss"):
            if key in row:
                assert repr(row[key]).encode() in data, row  # numbers are stored as JSON
    assert not list(folders[0].rglob("wandb-metadata.json")), "names of machine and user are not sent"
    assert sys.executable.encode() not in data


def test_tensorboard_mirrors_the_metrics(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    fit(replace(settings(tmp_path), loggers=[TensorBoard()]), run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    from emformer.records import read_journal

    journal = {(key, row["step"]): row[key] for row in read_journal(Run(run).metrics) for key in row if key != "step"}
    mirrored = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag) if tag != "epoch"}
    assert mirrored.keys() == journal.keys() and len(journal) > 80
    assert all(mirrored[key] == pytest.approx(journal[key], rel=1e-6) for key in journal)


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path):
    runs = [train(settings(tmp_path, accumulate=k, precision="64"), tmp_path / str(k)) for k in (1, 4)]
    assert max(float((runs[0][key] - runs[1][key]).abs().max()) for key in runs[0]) < 1e-9
    a, b = rows(tmp_path / "1"), rows(tmp_path / "4")
    assert [row["step"] for row in a] == [row["step"] for row in b]
    assert all(row.get(k, 0) == pytest.approx(other.get(k, 0), rel=1e-9) for row, other in zip(a, b, strict=True) for k in row)


def test_double_precision_is_double(tmp_path: Path):
    found = train(settings(tmp_path, precision="64", max_steps=2), tmp_path / "run")
    assert {value.dtype for value in found.values()} == {torch.float64}
    assert next(load(tmp_path / "run").model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("shown", [0, 30])
def test_a_sample_is_shown_and_is_the_same_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: int):
    told = []
    for name in "ab":
        fit(settings(tmp_path, sample=shown), tmp_path / name)
        told.append(capsys.readouterr().err)
    assert told[0] == told[1] and told[0].count("validation ") == 2
    assert (told[0].count("…") == 2) is bool(shown)


# -------------------------------------------------------------------------------------------------------------- training


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    run = tmp_path / "run"
    plan = settings(tmp_path, optimizer=AdamW(rate=1e30), save_every=1)
    with pytest.raises(UserError, match=r"not finite (at|after) step \d+.*smaller learning rate") as caught:
        fit(plan, run)
    assert "\n" not in str(caught.value)
    good = load(run)
    step = int(re.search(r"step (\d+)", str(caught.value))[1])
    assert good.step < step
    assert all(torch.isfinite(p).all() for p in good.model.parameters())
    for path in Run(run).checkpoints.iterdir():
        assert all(torch.isfinite(value).all() for value in torch.load(path, weights_only=True)["state_dict"].values())


def learnable(folder: Path) -> None:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)


@pytest.mark.parametrize(
    ("optimizer", "operator"),
    [(Muon(), LowRank(rank=4)), (Muon(), Dense()), (AdamW(rate=0.01), LowRank(rank=4)), (AdamW(rate=0.01), Dense())],
    ids=repr,
)
def test_the_loss_falls_on_a_text_that_can_be_learnt(tmp_path: Path, optimizer: parts.Optimizer, operator: parts.Operator):
    learnable(tmp_path)
    model = {"form": operator, "content": operator}
    found = fit(settings(tmp_path, model=model, optimizer=optimizer, max_steps=150, validate_every=150), tmp_path / "run")
    first = rows(tmp_path / "run")[0]["train_loss"]
    assert first == pytest.approx(5.55, abs=0.15)  # log 257
    assert found.last["val_loss"] < 0.5, found.last  # a periodic text has no entropy; letters alone would be 2.9


def test_masked_tokens_are_learnt_under_a_full_mask(tmp_path: Path):
    from emformer.masks import Full

    learnable(tmp_path)
    plan = settings(tmp_path, model={"mask": Full()}, objective=MaskedToken(), max_steps=200, validate_every=200)
    found = fit(plan, tmp_path / "run")
    assert found.last["val_loss"] < 2.5, found.last  # letters alone would be 2.9
    assert "val_bits_per_byte" not in found.last
    loaded = load(tmp_path / "run")
    assert loaded.model.vocab == loaded.tokenizer.get_vocab_size() + 1


def test_a_text_shorter_than_a_window_is_told(tmp_path: Path):
    (tmp_path / "text.txt").write_text("short text")
    with pytest.raises(UserError, match=r"one window of context 16 needs 17"):
        fit(settings(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_glob_is_several_documents(tmp_path: Path):
    for name in ("a", "b"):
        text(tmp_path / f"part-{name}.txt", seed=ord(name))
    plan = settings(tmp_path, max_steps=2, data={"path": str(tmp_path / "part-*.txt")})
    fit(plan, tmp_path / "run")
    assert read_text(plan.data).meta["documents"] == 2
    assert parts.plain(Run(tmp_path / "run").settings().data)["corpus"] == parts.plain(File(str(tmp_path / "text.txt")))


def test_two_runs_without_a_folder_get_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a notebook: the second call must not meet the folder of the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMFORMER_RUN", "restored afterwards")
    monkeypatch.delenv("EMFORMER_RUN")
    plan = settings(tmp_path, max_steps=1)
    one = fit(plan).path
    time.sleep(1.1)  # they are named by the second
    assert fit(plan).path != one
