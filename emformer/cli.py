"""The command line, one function a command.

This module alone imports inside its functions: torch takes more than a second, and help should not wait for it.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from emformer.configuration import foreign_modules, load_parts, parse, settings_parser
from emformer.parts import UserError

if TYPE_CHECKING:
    from emformer.settings import Settings

OVERVIEW = """\
usage: emformer COMMAND [options]        emformer COMMAND --help explains each

commands
  fit        train a model and write a run folder
  validate   loss of a trained model on its validation text, or on another text
  generate   continue a text with a trained model
  info       operators, parameters, decode cache and FLOPs of a configuration or a run
  records    what the callbacks recorded while runs trained
  convert    a run as a folder to share, somebody's GPT-2, Llama, NeoX or BERT as M and F, a model as GPT-2 or Llama
  analyze    measure a run, a checkpoint or somebody's model on a text, with everything that can be recorded
  compare    what was recorded of several runs side by side, with intervals of the differences
  report     one HTML file of a run, an analysis, or several
  simulate   an idealised model, held against what theory says of it
  ablate     many runs that differ by factors and seeds, and what the factors change
  study      a claim about trained models put to the test, with controls and a verdict

first steps
  emformer fit -c configs/default.yaml --run runs/default
  emformer validate runs/default
  emformer generate runs/default --prompt "The with statement"
  emformer info -c configs/default.yaml
  emformer records runs/default
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0, 2 for a mistake of the user (one sentence on stderr), 130 and 143 for signals; 1 for a study
    that has ended without some of its cells."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        sys.exit(0 if words else 2)
    command = COMMANDS.get(words[0])
    try:
        if command is None:
            import difflib

            near = difflib.get_close_matches(words[0], COMMANDS, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}."
            raise UserError(f"'{words[0]}' is no command; {hint}")
        command(words[1:])
    except UserError as error:
        print(f"emformer: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # the machine's side of things: no permission, no space, no such device
        where = f" ({error.filename})" if error.filename else ""
        print(f"emformer: {error.strerror or error}{where}; nothing saved before is damaged.", file=sys.stderr)
        sys.exit(2)


def _settings(parser: Any, arguments: Sequence[str]) -> tuple[Settings, dict[str, Any]]:
    """Settings and the command's own options. Help and `--print_config` end here."""
    if not {"-h", "--help"} & set(arguments):
        load_parts()
    found = dict(vars(parse(parser, arguments)))
    from emformer.settings import Settings

    return Settings(**{name: found.pop(name) for name in Settings.__dataclass_fields__}), found


def _fit(arguments: Sequence[str]) -> None:
    parser = settings_parser(
        "emformer fit",
        "Train a model and write everything into a run folder. Settings come from YAML files, later ones on top of earlier "
        "ones, and from dotted options: emformer fit -c configs/default.yaml --model.depth 6 --training.seed 1. "
        "--print_config shows what they amount to; a later model.layers or list replaces an earlier one whole. "
        "A part is named by its class: --model.ffn SwiGLU, --model.ffn.help SwiGLU; "
        "your own by its path: --model.form my_module.MyForm.",
        also=("run", "resume", "overwrite"),
    )
    if {"-h", "--help"} & set(arguments):
        _run_options(parser)  # shown with the others
    else:
        parser_of_call = _Parser("emformer fit", add_help=False, allow_abbrev=False)
        _run_options(parser_of_call)
        chosen, arguments = parser_of_call.parse_known_args(arguments)  # they are of the call, not of the settings
    settings, _ = _settings(parser, arguments)
    from emformer.training import fit

    done = fit(settings, chosen.run, resume=chosen.resume, overwrite=chosen.overwrite)
    unit = settings.training.objective.unit
    print(f"\nrun      {done.path}   ({done.step} steps)")
    for name, figures in (("last", done.last), ("best", done.best)):
        if figures:
            line = f"{name:<8} {figures['val_loss']:.4f} {unit}"
            if "val_bits_per_byte" in figures:
                line += f", {figures['val_bits_per_byte']:.4f} bits per byte"
            print(f"{line}  (step {figures['step']})")
    folder = shlex.quote(str(done.path))
    config = shlex.quote(str(done.path / "config.yaml"))
    folder += "".join(f" --import {module}" for module in foreign_modules(settings))
    print(
        "\nnext\n"
        + (
            f'  emformer generate {folder} --prompt "The "\n'
            if settings.training.objective.covers_text
            else f"  emformer info -c {config}\n"
        )
        + f"  emformer validate {folder} --which best\n"
        f"  emformer fit -c {config} --run {shlex.quote(str(done.path))} --resume --training.max_steps "
        f"{2 * settings.training.max_steps}"
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=str, default=None, help="the run folder (default: runs/<date-time>)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in this folder, exactly as if it had not been stopped; begin it if there is none. "
        "Only training.max_steps and loggers may change",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the run in this folder and begin again")


def _validate(arguments: Sequence[str]) -> None:
    parser = _parser("validate", "Loss of a trained model on the validation split of its own text, or on another text.")
    parser.add_argument("--text", help="a text file or glob to measure instead; all of it is read")
    parser.add_argument("--batch", type=_positive, default=32, help="windows at once (default: 32)")
    options = _options(parser, arguments)
    from emformer.evaluation import evaluate
    from emformer.records import load

    found = evaluate(load(options.run, options.which), options.text, options.batch)
    print(found)


def _generate(arguments: Sequence[str]) -> None:
    parser = _parser("generate", "Continue a text with a trained model, token by token, with a cache.")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--tokens", type=_positive, default=200, help="tokens to add (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token (default: 0.8)")
    parser.add_argument("--top-k", type=_positive, default=None, help="sample among the k most probable tokens")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample among the tokens that hold this mass (default: 0.95)")
    parser.add_argument("--seed", type=_seed, default=None, help="for a repeatable text")
    options = _options(parser, arguments)
    import torch

    from emformer.records import load
    from emformer.text.tokenizers import guarded

    loaded = load(options.run, options.which)
    if not loaded.config.training.objective.covers_text:
        raise UserError(f"{loaded.path} was trained to fill in masked tokens, not to continue a text.")
    with guarded("the tokenizer cannot read this prompt", "give another --prompt"):
        prompt = loaded.tokenizer.encode(options.prompt, add_special_tokens=False).ids
    if not prompt:
        raise UserError("the prompt is empty; give --prompt at least one character.")
    sampling = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, shown = list(prompt), len(loaded.tokenizer.decode(prompt))
    print(options.prompt, end="", flush=True)
    for token in loaded.model.to(device).stream(torch.tensor([prompt], device=device), options.tokens, **sampling):
        tokens.append(int(token))
        text = loaded.tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # a character may need more than one token
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(loaded.tokenizer.decode(tokens)[shown:])


def _info(arguments: Sequence[str]) -> None:
    loaded = None
    if arguments and not arguments[0].startswith("-"):
        parser = _parser(
            "info",
            "Operators, parameters, decode cache and FLOPs of a run (or of -c FILE), and what its operators have become: "
            "symmetry, attraction, compatibility and rank of M and F in every head.",
        )
        options = _options(parser, arguments)
        from emformer.records import load

        loaded = load(options.run, options.which)
        settings, vocab = loaded.config, loaded.model.vocab
        since = f"step {loaded.step}" if loaded.family == "emformer" else f"family {loaded.family}"
        print(f"{loaded.path}, {since}, vocabulary {vocab:,}\n")
    else:
        parser = settings_parser(
            "emformer info",
            "Operators, parameters, decode cache and FLOPs: emformer info RUN, or emformer info -c FILE with any overrides. "
            "Nothing is trained; the text is tokenised if its vocabulary is not known otherwise.",
        )
        parser.add_argument("--vocab", type=_positive, default=None, help="size of the vocabulary, instead of reading the text")
        settings, options = _settings(parser, arguments)
        from emformer.text import vocabulary
        from emformer.training.fit import read_text_visibly

        vocab = options["vocab"]
        if vocab is None:
            vocab = vocabulary(read_text_visibly(settings.data).tokenizer)
        vocab += settings.training.objective.extra_tokens
        print(f"vocabulary {vocab:,}\n")
    from emformer.inspection import costs, table

    print(table(costs(vocab, settings.model), settings.model))
    if loaded is not None:
        from emformer import diagnostics

        print("\nwhat training made of the operators, head by head\n")
        print(diagnostics.table(diagnostics.diagnose(loaded.model)))


def _records(arguments: Sequence[str]) -> None:
    parser = _Parser(
        "emformer records",
        description="What the callbacks of a run recorded about its token cloud: a line a key, with the steps and layers there "
        "are and the plainest row of the last step (over all heads and layers where there is one, else of the deepest layer): "
        "mean ± standard error, what chance alone would give (null), how many prompts or points it counts, and its place. "
        "--key and --family show keys by layer and step. A run that is still training is read up to its last whole row. "
        "In Python: emformer.read_records('runs/*').",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder, its records.jsonl, or a glob in quotes: 'runs/*'")
    parser.add_argument("--key", action="append", default=[], help="show this key by layer and step; may be given several times")
    parser.add_argument("--family", action="append", default=[], help="show every key of this family, as flow")
    parser.add_argument("--csv", metavar="FILE", help="write the rows (those of --key and --family, if given) as CSV")
    parser.add_argument("--parquet", action="store_true", help="write or refresh records.parquet in each run folder")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own observables")
    options = _options(parser, arguments)
    from emformer.listing import by_layer, overview, select
    from emformer.recordings import write_parquet

    found, known = _recorded(options)
    shown = select(found, options.key, options.family, known)
    if options.key or options.family:
        print(by_layer(shown, known))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(overview(shown, known, width))
    written = [str(write_parquet(run)) for run in found["run"].unique()] if options.parquet else []
    if options.csv:
        shown.to_csv(options.csv, index=False)
        written.append(options.csv)
    if written:
        print("\nwrote " + ", ".join(written))


def _convert(arguments: Sequence[str]) -> None:
    parser = _Parser(
        "emformer convert",
        description="Write a model as a folder of config.json, model.safetensors and tokenizer.json. The source is a run, a "
        "checkpoint, a folder that holds a model, or its name on the Hugging Face hub: ours, or GPT-2, Llama, NeoX or BERT, "
        "whose heads become M and F with the same logits. --to emformer keeps every model, and all commands read such a folder. "
        "--to gpt2 and --to llama write what transformers loads with equal logits, for a model that fits: GPT-2 has LayerNorm, "
        "GELU, learned positions or none, and heads d/H wide, to which wider operators are cut with the error printed; Llama has "
        "RMSNorm, RoPE, SwiGLU, and heads of any width. What does not fit is refused by name. "
        "In Python: emformer.load, emformer.export, emformer.push, emformer.pull.",
        epilog="examples:  emformer convert runs/default shared/default  |  emformer convert gpt2 models/gpt2  |  "
        "emformer convert runs/gpt2 exported --to gpt2 --dtype bfloat16",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a run, a checkpoint file, a folder of a model, or a name on the hub")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it appears whole or not at all")
    parser.add_argument("--to", choices=("emformer", "gpt2", "llama"), default="emformer", help="the format (default: emformer)")
    parser.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16"), help="of the weights (default: as they are; of others float32)"
    )
    parser.add_argument("--which", default="last", help="checkpoint of a run: last, best or a step (default: last)")
    parser.add_argument("--push", metavar="NAME", help="then put the folder on the hub, as owner/name")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that others do not see")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it holds a model and nothing else")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own parts, if you trust it")
    options = _options(parser, arguments)
    if options.private and not options.push:
        raise UserError("--private is about the repository that --push NAME makes; name one, or leave it out.")
    from pathlib import Path

    import torch

    from emformer.interop import hub, own
    from emformer.interop.export import export
    from emformer.interop.summary import summary
    from emformer.records import load

    out = Path(options.out)
    if Path(options.source).resolve().is_relative_to(out.resolve()) and Path(options.source).exists():
        raise UserError(f"{out} is, or holds, what is to be converted; name another folder to write to.")
    own.check_free(out, options.overwrite)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    # narrowing is the last thing that happens, so that errors are told of the whole way
    loaded = load(options.source, options.which, dtype if dtype == torch.float64 else None)
    tokenizer = loaded.tokenizer if loaded.has_tokenizer else None
    told = f"{'read':<11} {loaded.path}\n{summary(loaded.model, loaded.family)}\n{'wrote':<11} {out}"
    if options.to == "emformer":
        loaded.save(out, dtype=dtype, overwrite=options.overwrite)
        modules = "".join(f" --import {module}" for module in foreign_modules(loaded.config))
        next_ = f"emformer info {shlex.quote(str(out))}{modules}"
    else:
        report = export(loaded.model, tokenizer, out, options.to, dtype=dtype, overwrite=options.overwrite)
        told += f"\n{report}"
        next_ = f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    if tokenizer is None:
        told += f"\n{'note':<11} the source has no tokenizer that is known, so none was written"
    print(told)
    if options.push:
        print(f"{'pushed':<11} {hub.push(out, options.push, private=options.private or None)}")
    print(f"\nnext\n  {next_}")


def _analyze(arguments: Sequence[str]) -> None:
    parser = _Parser(
        "emformer analyze",
        description="Measure a model on a text with everything that callbacks can record, costly observables included, and write "
        "a folder of records, figures and a report. Without --text and --corpus a run is shown its own validation text. Cheap "
        "observables see the whole text, costly ones a fair sample of its first prompts; memory does not grow with the text. "
        "Killed at any moment, the same command continues it. In Python: emformer.analyze('runs/default', text='novel.txt').",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", metavar="RUN|CHECKPOINT|HF", help="a run folder, a checkpoint file, a Hugging Face folder or name"
    )
    parser.add_argument("--text", metavar="FILE", help="a text file or glob")
    parser.add_argument("--corpus", metavar="NAME", help="a corpus by name, as Grammar or PythonDocs")
    parser.add_argument("--out", metavar="DIR", help="the folder (default: analyses/SOURCE-TEXT)")
    parser.add_argument(
        "--observables", metavar="FAMILIES", default="all", help="all, or families as flow,clustering (default: all)"
    )
    parser.add_argument(
        "--checkpoints",
        metavar="WHICH",
        default="last",
        help="of a run: last, best, all that were kept, or steps, as 100,200 (default: last)",
    )
    parser.add_argument("--tokens", type=_positive, default=None, help="read so many at most (default: the whole text)")
    parser.add_argument(
        "--length", type=_positive, default=None, help="tokens of a prompt (default: 128, or the model's context)"
    )
    parser.add_argument("--batch", type=_positive, default=None, help="prompts at once (default: 4,096 tokens or 512 MB)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the order in which the text is read (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs (default: auto)")
    parser.add_argument("--overwrite", action="store_true", help="remove an analysis that is in the folder and begin anew")
    parser.add_argument("--no-report", dest="report", action="store_false", help="write no report.html")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own parts, if you trust it")
    options = vars(_options(parser, arguments))
    del options["modules"]
    from emformer.listing import overview
    from emformer.observables.frame import catalogue
    from emformer.recordings import read_records
    from emformer.records import Run
    from emformer.studies import analyze

    folder = Run(analyze(**options))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(overview(read_records(folder.path), catalogue(), width))
    written = [path for path in (folder.records, folder.parquet, folder.figures, folder.report) if path.exists()]
    print("\nwrote " + ", ".join(map(str, written)))


def _compare(arguments: Sequence[str]) -> None:
    parser = _Parser(
        "emformer compare",
        description="The same observables of several runs or analyses side by side, and the differences to the first with 95 % "
        "intervals (Welch): of each key the plainest row of the last step, or every row of --key and --family. A star marks what "
        "differs at a false discovery rate of 5 % (Benjamini and Hochberg) among all rows compared. What has no error has no "
        "interval; runs on the same prompts vary together, and their intervals are wider than they need be. "
        "In Python: emformer.compare(['runs/a', 'runs/b']).",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run or analysis folders, or a glob in quotes; first the baseline")
    parser.add_argument("--key", action="append", default=[], help="compare every row of this key; may be given several times")
    parser.add_argument("--family", action="append", default=[], help="compare every key of this family, as flow")
    parser.add_argument("--step", type=int, default=None, help="of training (default: of each key its last one)")
    parser.add_argument("--csv", metavar="FILE", help="write all rows that are compared as CSV")
    parser.add_argument("--report", metavar="FILE", help="write an HTML report of these runs, see emformer report")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own observables")
    options = _options(parser, arguments)
    from emformer.comparison import compare, remarks
    from emformer.listing import compared, select

    read, known = _recorded(options)
    found = compare(select(read, options.key, options.family, known), step=options.step)
    print(compared(found, known, whole=bool(options.key or options.family)))
    print("\n" + "\n".join(remarks(found)))
    if not (options.key or options.family):
        print("shown: the plainest row of each key; --key and --family show every row of theirs, --csv writes all")
    written = []
    if options.csv:
        found.to_csv(options.csv, index=False)
        written.append(options.csv)
    if options.report:
        from emformer.report import write

        written.append(str(write(list(read["run"].unique()), options.report)))
    if written:
        print("\nwrote " + ", ".join(written))


def _report(arguments: Sequence[str]) -> None:
    parser = _Parser(
        "emformer report",
        description="One HTML file that needs nothing else, not even a network: the token cloud moving through the layers, "
        "breathing and speed over training, clusters and their merges, attention and its leaves, spectra, the logit lens, every "
        "number recorded and what it means. Of several runs: their differences. In Python: emformer.report.write('runs/a').",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run or an analysis folder; of several the first is the baseline"
    )
    parser.add_argument("--out", metavar="FILE", help="the file (default: report.html in the folder; of several, in this one)")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own parts, if you trust it")
    options = _options(parser, arguments)
    from emformer.report import write

    print(f"wrote {write(options.runs, options.out)}")


def _simulate(arguments: Sequence[str]) -> None:
    parser = _Parser(
        "emformer simulate",
        usage="%(prog)s EXPERIMENT|FILE.yaml [-c FILE] [--FIELD VALUE] [options]",
        description="Simulate an idealised model, hold it against theory, and write a folder: the statements with "
        "what was predicted and measured, charts as numbers, pictures and one HTML page, and records of the trajectories, which "
        "emformer records and emformer compare read like those of runs. A FILE says its experiment, and the fields that are not "
        "as by default; later files and options go on top. emformer simulate EXPERIMENT --help explains the fields, "
        "--print_config shows what they amount to. In Python: emformer.perform.",
        epilog="examples:  emformer simulate sphere --tokens 64  |  emformer simulate configs/theory/sphere.yaml",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--out", metavar="DIR", help="the folder (default: simulations/EXPERIMENT or simulations/FILE)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder, if it holds a simulation and nothing else")
    parser.add_argument(
        "--observables",
        metavar="FAMILIES",
        default=None,
        help="all, or families as flow,wgf (default: what is quick of flow, clustering and energy)",
    )
    parser.add_argument("--no-observe", dest="observe", action="store_false", help="write no records of the trajectories")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own experiments")
    own = {option for action in parser._actions for option in action.option_strings}
    options, words = parser.parse_known_args(arguments)
    _import(options.modules)
    from emformer import recipes

    if not words or words[0] in ("-h", "--help"):
        _menu(parser, recipes.EXPERIMENTS, "experiments", options.modules, bool(words))
    experiment = recipes.EXPERIMENTS.choose(words, parser.prog, also=own)
    if options.observables and not options.observe:
        raise UserError("--observables and --no-observe exclude each other; choose one.")
    from emformer.listing import verdicts
    from emformer.studies.outputs import read_note
    from emformer.studies.simulation import OBSERVED, perform, read_statements

    observables = (options.observables or OBSERVED) if options.observe else None
    out = options.out or recipes.EXPERIMENTS.folder(words, experiment)
    folder = perform(experiment, out=out, observables=observables, overwrite=options.overwrite)
    note = textwrap.fill(read_note(folder), 120)
    print("\n\n".join(filter(None, (experiment.title, verdicts(read_statements(folder)), note, f"wrote {folder}"))))


def _ablate(arguments: Sequence[str]) -> None:
    parser = _Parser(
        "emformer ablate",
        usage="%(prog)s STUDY.yaml [--FIELD VALUE] [options]",
        description="Run an ablation study: a base configuration, factors with levels, seeds. Each cell is a run folder in a "
        "process of its own; cells of one seed see the same batches. Stopped or killed, the same command goes on. At the end a "
        "tidy table, differences paired by seed with intervals and corrected for their number, and a report. --FIELD overrides "
        "what the file says, as --seeds 3 or --engine.processes 4. In Python: emformer.ablate.",
        epilog="examples:  emformer ablate configs/ablations/position.yaml  |  emformer ablate configs/ablations/norm.yaml "
        "--engine Slurm --engine.partition gpu --dry-run",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--out", metavar="DIR", help="the folder (default: ablations/STUDY)")
    parser.add_argument("--scale", metavar="NAME", help="another size of the study, which the file names")
    parser.add_argument("--dry-run", action="store_true", help="show the cells and what would be run, and run nothing")
    parser.add_argument("--no-report", dest="report", action="store_false", help="write no report.html")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own parts")
    options, words = parser.parse_known_args(arguments)
    _import(options.modules)
    from emformer import plans

    if not words or words[0] in ("-h", "--help"):
        print(parser.format_help())
        if words:
            plans.plan_parser(parser.prog).print_help()
        sys.exit(0 if words else 2)
    if words[0].startswith("-"):
        raise UserError(f"the study comes first: {parser.prog} STUDY.yaml {words[0]} …")
    from pathlib import Path

    from emformer.studies import ablation, cells, results, search

    file = Path(words[0])
    plan = plans.read_plan(file, *words[1:], scale=options.scale)
    folder = Path(options.out) if options.out else ablation.default(file, options.scale)
    if options.dry_run:
        print(ablation.preview(ablation.Study(folder, plan), options.modules))
        return
    ablation.ablate(plan, out=folder, report=options.report, modules=options.modules)
    print(f"{plan.title}\n\n{results.summary(folder)}\n\nwrote {folder}")
    if plan.search and (best := search.best(folder)):
        print(best)
    if lost := cells.failed(folder):
        told = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        print(f"emformer: {len(lost)} cells failed ({told}); the same command tries them again.", file=sys.stderr)
        sys.exit(1)


def _study(arguments: Sequence[str]) -> None:
    parser = _Parser(
        "emformer study",
        usage="%(prog)s NAME|FILE.yaml MODEL [MODEL ...] [-c FILE] [--FIELD VALUE] [options]",
        description="Put claims about trained models to the test, and write a folder: verdicts with their intervals and nulls, "
        "charts as numbers, pictures and one HTML page. A MODEL is a run, a checkpoint, a folder of somebody's model, a name on "
        "the hub, or a glob in quotes. One model gives verdicts about that model; six or more that differ by their seed give "
        "verdicts about models trained like them. emformer study NAME --help explains the fields of a study, --print_config "
        "shows what they amount to. In Python: emformer.examine.",
        epilog="examples:  emformer study sinks runs/default  |  emformer study fragility 'ablations/claims/cells/kind=docs,*'",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--text", metavar="FILE", help="a text file or glob (default: each model's own validation text)")
    parser.add_argument("--corpus", metavar="NAME", help="a corpus by name, as Grammar or PythonDocs")
    parser.add_argument("--out", metavar="DIR", help="the folder (default: studies/NAME-MODEL)")
    parser.add_argument("--prompts", type=_positive, default=None, help="prompts shown to each model (default: the study's)")
    parser.add_argument("--length", type=_positive, default=None, help="tokens of a prompt (default: the study's)")
    parser.add_argument("--which", default="last", help="checkpoint of a run: last, best or a step (default: last)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the prompts and of what is drawn (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where models run (default: auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder, if it holds a study and nothing else")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own parts and studies")
    own = {option for action in parser._actions for option in action.option_strings}
    options, words = parser.parse_known_args(arguments)
    _import(options.modules)
    from emformer import recipes

    if not words or words[0] in ("-h", "--help"):
        _menu(parser, recipes.STUDIES, "studies", options.modules, bool(words))
    count = next((k for k, word in enumerate(words[1:], 1) if word.startswith("-")), len(words))
    study = recipes.STUDIES.choose([words[0], *words[count:]], parser.prog, also=own)
    if count < 2:
        raise UserError(f"no model is named; as {parser.prog} {words[0]} runs/default.")
    from emformer.listing import claims
    from emformer.studies.examination import examine, read_scale, read_verdicts
    from emformer.studies.outputs import read_note

    given = {name: value for name, value in vars(options).items() if name != "modules"}
    folder = examine(study, words[1:count], **given)
    note = "\n".join(textwrap.fill(line, 120) for line in read_note(folder).splitlines())
    told = f"of {read_scale(folder)}"
    print("\n\n".join(filter(None, (study.title, claims(read_verdicts(folder)), told, note, f"wrote {folder}"))))


def _menu(parser: argparse.ArgumentParser, menu: Any, what: str, modules: Sequence[str], asked: bool) -> NoReturn:
    """The help of a command that takes a name, with all the names there are."""
    known = menu.titles()
    if modules:
        known |= {name: one.title for name, one in menu.all().items()}
    width = max(map(len, known))
    listed = "\n".join(f"  {name:<{width}}  {title}" for name, title in known.items())
    print(f"{parser.format_help()}\n{what}\n{listed}")
    sys.exit(0 if asked else 2)


def _recorded(options: argparse.Namespace) -> tuple[Any, Any]:
    """The records of the runs and the catalogue of keys, with warnings told on stderr; a CSV may not look like records."""
    if options.csv and options.csv.endswith((".jsonl", ".parquet")):
        raise UserError(f"--csv {options.csv} would overwrite records or look like them; name it .csv.")
    from emformer.observables.frame import catalogue
    from emformer.recordings import read_records

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        found, known = read_records(options.runs), catalogue()
    for note in notes:
        print(f"emformer: {note.message}", file=sys.stderr)
    return found, known


class _Parser(argparse.ArgumentParser):
    """Mistakes become one sentence; options are not abbreviated."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help explains.")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command on a run."""
    parser = _Parser(f"emformer {command}", description=description, allow_abbrev=False)
    parser.add_argument("run", help="a run folder, a checkpoint file, a folder that holds a model, or a name on the hub")
    parser.add_argument("--which", default="last", help="checkpoint of a run: last, best or a step (default: last)")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own parts, if you trust it")
    return parser


def _options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    options, unknown = parser.parse_known_args(arguments)
    _import(getattr(options, "modules", ()))
    if unknown:
        import difflib

        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], known, 1, 0.7)
        hint = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists the options."
        raise UserError(f"'{unknown[0]}' is no option of {parser.prog}; {hint}")
    return options


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"--import {module}: {error}.") from error


def _seed(text: str | int) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is no seed: choose 0 up to 2**63 - 1")
    return value


def _positive(text: str | int) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "fit": _fit,
    "validate": _validate,
    "generate": _generate,
    "info": _info,
    "records": _records,
    "convert": _convert,
    "analyze": _analyze,
    "compare": _compare,
    "report": _report,
    "simulate": _simulate,
    "ablate": _ablate,
    "study": _study,
}

if __name__ == "__main__":
    main()
