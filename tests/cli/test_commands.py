"""What the commands do when all is well: help at once, settings that come back, the options there are, and text."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from configurations import CONFIGS, files, name

from emformer import parts
from emformer.cli import COMMANDS
from emformer.configuration import revive, settings_parser

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_there_at_once(words: list[str]):
    """Under half a second of processor time, whatever else this machine does, because torch stays out of it."""
    code = f"""
import sys
from emformer.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "numpy", "pytorch_lightning", "tokenizers", "datasets", "pandas", "wandb"}} & sys.modules.keys()
assert not heavy, heavy
"""
    least = float("inf")
    for _ in range(2):  # the first call may have to compile what is imported
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower() and not done.stderr
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert least < 0.5, least


def test_without_a_word_it_shows_the_overview(emformer):
    for words, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        found = emformer(*words)
        assert found.code == code
        for command in COMMANDS:
            assert re.search(rf"^  {command} ", found.out, re.MULTILINE), command


def test_help_of_a_part(emformer):
    found = emformer("fit", "--model.form.help", "LowRank")
    assert found.code == 0 and "rank" in found.out and "groups" in found.out


# The frozen face: whoever adds or removes a setting changes this list, and the README with it.
OPTIONS = """
callbacks config data data.cache data.corpus data.max_tokens data.path data.tokenizer data.validation data.workers figures
help loggers model model.arrangement model.content model.context model.depth model.dim model.drift model.dropout
model.embedding model.embedding.bias model.embedding.norm model.embedding.positions model.embedding.std model.embedding.tied
model.embedding.transform model.embedding.unembed_std model.epsilon
model.ffn model.form model.functional model.heads model.kernel model.layers model.mask model.norm model.placement
model.positions model.shared overwrite print_config probe probe.length probe.prompts probe.seed resume run training
training.accelerator training.accumulate training.batch training.clip training.devices training.max_steps training.nodes
training.objective training.optimizer training.penalties training.precision training.sample training.save_every
training.schedule training.schedule.cooldown training.schedule.final training.schedule.warmup training.seed training.strategy
training.validate_every training.validation_windows
"""


def test_the_options_of_fit_are_what_they_are(monkeypatch: pytest.MonkeyPatch):
    from emformer import cli

    seen = []
    monkeypatch.setattr(cli, "_settings", lambda parser, arguments: seen.append(parser) or sys.exit(0))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    found = {action.dest for action in seen[0]._actions}
    found = {name for name in found if not name.endswith(".help")}  # help of a part's classes
    assert found == set(OPTIONS.split()), found ^ set(OPTIONS.split())
    commands = "fit validate generate info records convert analyze compare report simulate ablate study"
    assert list(COMMANDS) == commands.split()


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_printed_settings_come_back(emformer, config: Path):
    printed = emformer("fit", *files(config), "--model.depth", "3", "--print_config")
    assert printed.code == 0
    settings = yaml.safe_load(printed.out)
    assert settings["model"]["depth"] == 3 and settings.keys() >= {"model", "data", "training", "loggers"}
    revived = revive({name: settings[name] for name in ("model", "data", "training", "loggers")})
    assert revived.model.depth == 3
    again = revive(parts.plain(revived))
    assert parts.plain(again) == parts.plain(revived)


def test_printed_settings_are_a_configuration(emformer, tmp_path: Path):
    first = emformer("fit", "-c", SMOKE, "--print_config").out
    path = tmp_path / "printed.yaml"
    path.write_text(first)
    assert emformer("fit", "-c", path, "--print_config").out == first


def test_later_files_and_options_win(emformer, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {depth: 7, heads: 4}\n")
    words = ["fit", "-c", SMOKE, "-c", path, "--model.heads", "8", "--model.ffn", "SwiGLU", "--print_config"]
    found = yaml.safe_load(emformer(*words).out)["model"]
    assert (found["dim"], found["depth"], found["heads"]) == (32, 7, 8)
    assert found["ffn"]["class_path"].endswith("SwiGLU")


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_info_counts_what_would_be_built(emformer, config: Path):
    import torch

    from emformer.model import Emformer

    found = emformer("info", *files(config), "--vocab", "777")
    assert found.code == 0 and not found.err
    told = int(re.search(r"^parameters\s+([\d,]+)", found.out, re.MULTILINE)[1].replace(",", ""))
    parser = settings_parser("test", "")
    settings = parser.instantiate(parser.parse_args(files(config)))
    vocab = 777 + settings.training.objective.extra_tokens
    assert f"vocabulary {vocab:,}" in found.out
    with torch.device("meta"):
        model = Emformer(vocab, **vars(settings.model))
    assert told == sum(p.numel() for p in model.parameters())
    for word in ("decode cache", "FLOPs a token", "projections", "attention", "unembedding"):
        assert word in found.out


def test_info_of_a_run(emformer, run: Path):
    found = emformer("info", run, "--which", "1")
    assert found.code == 0 and "step 1," in found.out and "vocabulary 257" in found.out


def test_info_of_a_run_tells_what_became_of_its_operators(emformer, run: Path):
    """A line a head under the nulls; a configuration has nothing trained to tell of."""
    from emformer.diagnostics import diagnose
    from emformer.records import load

    found = emformer("info", run)
    assert found.code == 0 and found.out.index("FLOPs a token") < found.out.index("null (random operators)")
    told = re.findall(r"^(\d+) +(\d+) +([\d.]+)", found.out, re.MULTILINE)
    rows = diagnose(load(run).model)
    assert rows and [(int(layer), int(head)) for layer, head, _ in told] == [(row.layer, row.head) for row in rows]
    assert [float(asym) for *_, asym in told] == pytest.approx([row.asym_form for row in rows], abs=6e-4)
    assert "null (random" not in emformer("info", "-c", SMOKE, "--vocab", "50").out


def test_fit_says_what_to_do_next(emformer, small: list[str], tmp_path: Path):
    """The lines that it prints are commands that run."""
    run = tmp_path / "a run"
    found = emformer("fit", "-c", SMOKE, *small, "--run", run)
    assert found.code == 0 and "(2 steps)" in found.out and "bits per byte" in found.out
    next_ = [line.strip() for line in found.out.splitlines() if line.startswith("  emformer ")]
    assert len(next_) == 3
    import shlex

    for line in next_:
        done = emformer(*shlex.split(line)[1:])
        assert done.code == 0, (line, done.err)


def test_validate_measures_what_training_measured(emformer, run: Path, text: Path, small: list[str], tmp_path: Path):
    from emformer.records import read_journal

    other = tmp_path / "run"
    words = ["fit", "-c", SMOKE, *small, "--run", other, "--training.validation_windows", "null"]
    assert emformer(*words).code == 0
    found = emformer("validate", other)
    assert found.code == 0
    loss, bits = (float(re.search(pattern, found.out)[1]) for pattern in (r"loss ([\d.]+)", r"([\d.]+) bits per byte"))
    told = [row for row in read_journal(other / "metrics.jsonl") if "val_loss" in row][-1]
    assert loss == pytest.approx(told["val_loss"], abs=1e-4) and bits == pytest.approx(told["val_bits_per_byte"], abs=1e-4)
    whole = emformer("validate", run, "--text", text, "--batch", "7")
    assert whole.code == 0 and f"{(len(text.read_bytes()) - 1) // 16:,} windows" in whole.out


def test_the_batch_of_validate_changes_neither_loss_nor_error(emformer, run: Path, text: Path):
    """The standard error is over windows, so how many go through the model at once must not matter."""
    told = [emformer("validate", run, "--text", text, "--batch", str(size)).out for size in (1, 8, 1000)]
    figures = [[float(x) for x in re.search(r"loss ([\d.]+) ± ([\d.]+|nan)", out).groups()] for out in told]
    assert figures[1] == pytest.approx(figures[0], abs=2e-4) and figures[2] == pytest.approx(figures[0], abs=2e-4)


def test_generate_continues_the_prompt(emformer, run: Path):
    words = ["generate", run, "--prompt", "the fox ", "--tokens", "40"]
    one, two, other = (emformer(*words, "--seed", seed) for seed in "112")
    assert one.code == 0 and one.out == two.out and one.out.startswith("the fox ") and one.out != other.out
    sure = [emformer(*words, "--temperature", "0", "--seed", seed).out for seed in "12"]
    assert sure[0] == sure[1]
    assert emformer("generate", run, "--tokens", "3").code == 0


def test_records_are_told_by_key_and_by_layer(emformer, recorded: Path):
    """Every number of the tables is one that was recorded, rounded; what is undefined is a dash."""
    found = emformer("records", recorded)
    assert found.code == 0 and not found.err and f"{recorded}: 48 rows at 10 steps, 0 to 512" in found.out
    lines = [re.split(r"  +", line.strip()) for line in found.out.splitlines()[2:]]
    place = "layer 0 attn head 3 centred k=4"
    assert lines == [
        ["key", "steps", "layers", "last", "null", "n", "at", "what it is"],
        ["flow.test", "10", "0–1", "1,537", "± 0.12", "0.25 ± 0.01", "60/64", "layer 1 ffn"],
        ["clu.test", "10", "2, 4", "–", "0/64", "layer 4"],
        ["sinks.test.undefined", "2", "0", "0.000123", "0", place, "share of tokens for which sinks.test is undefined"],
    ]
    for words in (["--key", "flow.test"], ["--family", "flow"]):
        found = emformer("records", recorded, *words)
        assert found.code == 0 and "clu.test" not in found.out
        lines = [re.split(r"  +", line.strip()) for line in found.out.splitlines()]
        assert lines[:2] == [["flow.test"], [f"{recorded}, by step, 8 of 10 steps"]]
        assert lines[3:] == [
            ["0", "1", "4", "8", "32", "64", "256", "512", "null", "n"],
            ["layer 0 ffn", "0.123", "1.12", "4.12", "8.12", "32.1", "64.1", "256", "512", "± 0.12", "0.25 ± 0.01", "60/64"],
            ["layer 1 ffn", "1.12", "4.12", "13.1", "25.1", "97.1", "193", "769", "1,537", "± 0.12", "0.25 ± 0.01", "60/64"],
        ]
    both = emformer("records", recorded, recorded.parent / "other", "--key", "flow.test", "--key", "clu.test").out
    assert [both.count(f"{run}, by step") for run in (recorded, recorded.parent / "other")] == [2, 1]


def test_records_go_to_other_formats(emformer, recorded: Path, tmp_path: Path):
    import pandas as pd

    from emformer import read_records

    found = emformer("records", recorded, "--parquet", "--key", "flow.test", "--csv", tmp_path / "out.csv")
    assert found.code == 0 and f"wrote {recorded / 'records.parquet'}, {tmp_path / 'out.csv'}" in found.out
    rows = read_records(recorded)
    pd.testing.assert_frame_equal(pd.read_parquet(recorded / "records.parquet"), rows.drop(columns="run"))
    csv, flow = pd.read_csv(tmp_path / "out.csv"), rows[rows["key"] == "flow.test"]
    assert csv.columns.tolist() == rows.columns.tolist() and csv["mean"].tolist() == flow["mean"].tolist()
    with open(recorded / "records.jsonl", "ab") as file:
        file.write(b'damaged\n{"step": 513, "key": "flow.test"}\n{"torn')
    found = emformer("records", recorded)
    assert found.code == 0 and "49 rows" in found.out
    assert re.fullmatch(r"emformer: \S+records\.jsonl: line 49 is damaged and left out\n", found.err)


def test_a_reader_that_leaves_is_no_error(run: Path):
    command = f"{sys.executable} -m emformer generate {run} --tokens 4000 | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr, done.stderr.decode()
