"""`emformer convert`: what it writes, what it says of it, and that a mistake leaves the disk as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
WORDS = torch.arange(24).view(2, 12)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of the library, with its tokenizer; no test may change it."""
    from emformer.text import Bytes, save

    transformers.utils.logging.disable_progress_bar()
    config = transformers.GPT2Config(
        vocab_size=260, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    net = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            parameter.copy_(gain + 0.3 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    net.save_pretrained(folder)
    save(Bytes().build(iter(())), folder / "tokenizer.json")
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(WORDS).logits


@torch.no_grad()
def test_a_checkpoint_of_another_library_and_back(emformer, gpt2: Path, tmp_path: Path):
    from emformer.records import load

    ours, back = tmp_path / "our own", tmp_path / "back"
    found = emformer("convert", gpt2, ours)
    assert found.code == 0 and not found.err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gpt2).num_parameters()
    for line in (
        "family      gpt2",
        # key biases vanish, and value biases are in the drift: 2 layers of 16 numbers each
        f"model       2 layers of 2 heads, d = 16, context 16, vocabulary 260, {theirs - 64:,} parameters",
        "M           LowRank(rank=8)",
        "F           LowRank(rank=8)",
        "query biases into a functional u of the key; key biases",
        "value and output biases into one drift g a layer",
        f"wrote       {ours}",
        f"emformer info '{ours}'",
    ):
        assert line in found.out, line
    run = load(ours)
    assert (run.model(WORDS) - logits(gpt2)).abs().max() < 1e-4
    assert emformer("info", ours).code == 0
    found = emformer("convert", ours, back, "--to", "gpt2")
    assert found.code == 0 and not found.err and "family      emformer" in found.out
    assert "b of the functional u into the query bias" in found.out and "cut to rank" not in found.out
    assert float(re.search(r"relative error ([\d.e+-]+) on random tokens", found.out)[1]) < 1e-5
    assert (logits(back) - logits(gpt2)).abs().max() < 1e-4
    assert sorted(path.name for path in back.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_every_command_reads_a_folder(emformer, gpt2: Path, text: Path):
    found = emformer("validate", gpt2, "--text", text)
    assert found.code == 0 and "nats per token" in found.out and "bits per byte" in found.out
    found = emformer("generate", gpt2, "--prompt", "the fox ", "--tokens", "5", "--seed", "1")
    assert found.code == 0 and found.out.startswith("the fox ")
    found = emformer("info", gpt2)
    assert found.code == 0 and "family gpt2, vocabulary 260" in found.out and "a(M)" in found.out
    emformer("validate", gpt2).refused("learned from is not part of it", "--text FILE")


def test_a_run_is_shared(emformer, run: Path, tmp_path: Path):
    from emformer.records import load

    before = contents(run)
    out = tmp_path / "out"
    found = emformer("convert", run, out, "--which", "1", "--dtype", "bfloat16")
    assert found.code == 0 and f"read        {run}" in found.out
    assert contents(run) == before
    config = json.loads((out / "config.json").read_text())
    assert (config["step"], config["dtype"]) == (1, "bfloat16") and "folded" not in found.out
    shared, trained = load(out), load(run, 1)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(shared.model.state_dict()[name], value.bfloat16()), name
    assert shared.tokenizer.to_str() == trained.tokenizer.to_str()
    assert emformer("generate", out, "--tokens", "3").code == 0


def test_wide_operators_are_cut_and_it_is_said(emformer, small: list[str], tmp_path: Path):
    options = {
        "form": "Dense",
        "content.rank": "8",
        "norm": "LayerNorm",
        "ffn": "GELU",
        "heads": "2",
        "positions": "[]",
        "embedding.positions": "{}",
    }
    words = [word for name, value in options.items() for word in (f"--model.{name}", value)]
    made = emformer("fit", "-c", SMOKE, *small, *words, "--run", tmp_path / "run")
    assert made.code == 0, made.err
    found = emformer("convert", tmp_path / "run", tmp_path / "out", "--to", "gpt2", "--dtype", "float64")
    assert found.code == 0, found.err
    cut = re.search(r"cut to rank layer 0: \|M - M_r\|/\|M\| (\S+), \|F - F_r\|/\|F\| (\S+) \(the worst head\)", found.out)
    assert float(cut[1]) > 0.05 and float(cut[2]) < 1e-6
    assert float(re.search(r"relative error (\S+) on random", found.out)[1]) > 1e-6
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert next(found.parameters()).dtype == torch.float64


def test_a_folder_that_is_taken(emformer, gpt2: Path, run: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert emformer("convert", gpt2, out).code == 0
    before = contents(tmp_path)
    emformer("convert", run, out).refused("not empty", "--overwrite")
    assert contents(tmp_path) == before
    assert emformer("convert", run, out, "--overwrite").code == 0
    assert contents(tmp_path) != before
    (out / "thesis.tex").write_text("years")
    before = contents(tmp_path)
    emformer("convert", gpt2, out, "--overwrite").refused("thesis.tex", "no part of a model")
    assert contents(tmp_path) == before


def test_source_and_target_are_not_the_same(emformer, gpt2: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    link = tmp_path / "link"
    link.symlink_to(gpt2)
    before = contents(gpt2) | contents(run)
    for source, out in ((gpt2, gpt2), (gpt2, link), (link, gpt2), (run / "checkpoints" / "last.ckpt", run), (run, run)):
        emformer("convert", source, out, "--overwrite").refused("is, or holds, what is to be converted")
    monkeypatch.chdir(gpt2)
    emformer("convert", gpt2, ".", "--overwrite").refused("is, or holds")
    assert contents(gpt2) | contents(run) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "mamba"], ["invalid choice", "mamba"]),
        (["--dtype", "int8"], ["invalid choice", "int8"]),
        (["--private"], ["--push NAME"]),
        (["--too", "gpt2"], ["did you mean --to?"]),
        (["--to", "llama"], ["has the norm LayerNorm", "Llama has RMSNorm"]),
        (["--import", "nowhere_at_all"], ["nowhere_at_all"]),
    ],
    ids=" ".join,
)
def test_mistakes(emformer, gpt2: Path, tmp_path: Path, words: list[str], told: list[str]):
    emformer("convert", gpt2, tmp_path / "out", *words).refused(*told)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_none(emformer, tmp_path: Path):
    emformer("convert", tmp_path / "nowhere", tmp_path / "out").refused("nowhere", "does not exist")
    (tmp_path / "hollow").mkdir()
    emformer("convert", tmp_path / "hollow", tmp_path / "out").refused("hollow", "no checkpoint")
    (tmp_path / "hollow" / "config.json").write_text('{"model_type": "mamba"}')
    emformer("convert", tmp_path / "hollow", tmp_path / "out").refused("mamba", "not supported")
    emformer("convert", tmp_path / "hollow").refused("required", "OUT")
    assert not (tmp_path / "out").exists()


def test_a_push_without_a_network_leaves_the_folder(emformer, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = emformer("convert", gpt2, tmp_path / "out", "--push", "me/mine")
    assert found.code == 2 and len(found.err.splitlines()) == 1
    assert "the hub cannot be reached; what was written on this machine is whole" in found.err
    assert emformer("info", tmp_path / "out").code == 0


def test_a_push_goes_to_the_hub(emformer, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from emformer.interop import hub

    asked = []
    monkeypatch.setattr(hub, "push", lambda *given, **how: asked.append((given, how)) or "https://hub.invalid/me/mine")
    found = emformer("convert", gpt2, tmp_path / "out", "--push", "me/mine", "--private")
    assert found.code == 0 and "pushed      https://hub.invalid/me/mine" in found.out
    assert asked == [((tmp_path / "out", "me/mine"), {"private": True})]
