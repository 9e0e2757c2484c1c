"""Between text and what is known by a name, experiments and studies: command line and YAML to the part, and back.

A recipe is a YAML file that names an experiment (or a study) and says what differs from its defaults:

    experiment: sphere
    betas: [1.0, 4.0]
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from emformer import configuration, parts
from emformer.configuration import check_nulls, explain, load_parts, read_yaml
from emformer.parts import UserError

Kind = type[parts.Experiment] | type[parts.Study]


@dataclass(frozen=True)
class Menu:
    """The parts of one kind that are known by name.

    Args:
        kind: their base class.
        key: of a recipe's file, beside the fields: "experiment" or "study".
        home: the folder that results are written into.
        homes: packages of the parts, last, and of parts that their fields may name.
        example: one of the names.
    """

    kind: Kind
    key: str
    home: str
    homes: Sequence[str]
    example: str

    def titles(self) -> dict[str, str]:
        """{name: title} of all that emformer has, by name. Read off the sources, because importing them takes in torch."""
        found = {}
        for path in Path(__file__).parent.joinpath(*self.homes[-1].split(".")).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    told = dict(_constants(node))
                    if {"name", "title"} <= told.keys():
                        found[told["name"]] = told["title"]
        return dict(sorted(found.items()))

    def all(self) -> dict[str, Kind]:
        """Every one that is loaded, by name: those of emformer, and those of modules that the caller has imported."""
        load_parts(self.homes)
        found: dict[str, Kind] = {}
        open_: list[Any] = [self.kind]
        while open_:
            one = open_.pop()
            open_ += one.__subclasses__()
            if not inspect.isabstract(one):
                found[one.name] = one
        return dict(sorted(found.items()))

    def read(self, *files: str | Path) -> Any:
        """The part in a YAML file; further files lie on top of it. Raises `UserError` as `choose` does."""
        return self.choose([word for file in files for word in ("-c", str(file))])

    def choose(self, words: Sequence[str], prog: str | None = None, also: Collection[str] = ()) -> Any:
        """What a command line asks for: a name or a file first, then `-c FILE` and `--field value`, the last of which win.
        `--help` and `--print_config` print and end the process.

        Args:
            also: options that the command takes by itself, so that a misspelt one finds its neighbour.

        Raises:
            UserError: for whatever is wrong, with the nearest name that exists.
        """
        prog = prog or f"emformer {self.key}"
        words = list(words)
        name = None
        if words and not words[0].startswith("-"):
            if is_file(words[0]):
                words = ["-c", *words]
            else:
                name, *words = words
        known = self.all()
        for file in files(words):
            name = self._same(name, file, known)
        if name is None:
            raise UserError(f"no {self.key} is named; choose one of {', '.join(known)}, as {prog} {self.example}.")
        cls = self._find(name, known)
        parser = self._parser(cls, prog, also)
        try:
            given = dict(vars(parser.instantiate(parser.parse_args(words))))
            hints = get_type_hints(cls)
            for field in fields(cls):  # the parser lets them pass, and the part would stumble over them
                if given[field.name] is None and type(None) not in get_args(hints[field.name]):
                    raise UserError(f"{name}: {field.name} is null, which it cannot be; leave it out for its default.")
            found = cls(**{field.name: given[field.name] for field in fields(cls)})
            check_nulls(found, name)
            if given[self.key] != name:
                raise UserError(f"--{self.key} is '{given[self.key]}', and '{name}' was named; give one or the other.")
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            raise UserError(explain(error, parser)) from error
        return found

    def folder(self, words: Sequence[str], part: parts.Experiment | parts.Study) -> Path:
        """Where the results that these words ask for are written, if they do not say: by the last file, else by the part."""
        named = [Path(file).resolve() for file in files(words)]
        name = part.name if not named else named[-1].parent.name if named[-1].stem == "config" else named[-1].stem
        return Path(self.home) / name

    def plain(self, part: parts.Experiment | parts.Study) -> dict[str, Any]:
        """The recipe of a part as plain data, every field in it."""
        return {self.key: part.name} | {field.name: parts.plain(getattr(part, field.name)) for field in fields(part)}

    def written(self, part: parts.Experiment | parts.Study) -> str:
        """The same as the text of a file."""
        return yaml.safe_dump(self.plain(part), sort_keys=False, allow_unicode=True)

    def _parser(self, cls: Kind, prog: str, also: Collection[str]) -> ArgumentParser:
        parser = ArgumentParser(
            prog=f"{prog} {cls.name}",
            description=(inspect.getdoc(cls) or cls.title).partition("\nArgs:")[0],
            epilog=f"{', '.join(sorted(also))}: see {prog} --help" if also else None,
            exit_on_error=False,
        )
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of fields; may be given several times")
        parser.add_argument(f"--{self.key}", type=str, default=cls.name, help="which it is: the word above, or a file's key")
        parser.add_class_arguments(cls, nested_key=None, as_group=False)
        vars(parser)["also"] = {word.lstrip("-") for word in also}
        return parser

    def _same(self, name: str | None, file: str, known: dict[str, Kind]) -> str | None:
        """The name in the file, which must be the one that is named already."""
        told = read_yaml(file).get(self.key, name)
        if told is None:
            return None
        if not isinstance(told, str):
            raise UserError(f"{file}: '{self.key}' is {told!r}; it should be the name of one.")
        self._find(told, known, f"{file}: ")
        if name is not None and told != name:
            raise UserError(f"{file} is about the {self.key} '{told}', not '{name}'; give one or the other.")
        return told

    def _find(self, name: str, known: dict[str, Kind], where: str = "") -> Kind:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}."
            raise UserError(f"{where}'{name}' is no {self.key}; {hint}")
        return known[name]


_PARTS = ("operators", "kernels", "masks")
EXPERIMENTS = Menu(parts.Experiment, "experiment", "simulations", (*_PARTS, "theory.experiments"), "sphere")
STUDIES = Menu(parts.Study, "study", "studies", (*_PARTS, "studies.claims"), "sinks")


def is_file(word: str) -> bool:
    """Whether the word means a file and not a name."""
    return not word.startswith("-") and (word.endswith((".yaml", ".yml")) or "/" in word)


def files(words: Sequence[str]) -> list[str]:
    """The files that a command line names: its first word, where that is one, and what follows -c or --config."""
    return [*(word for word in words[:1] if is_file(word)), *configuration.files(words)]


def _constants(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(line.value, ast.Constant):
            yield line.target.id, str(line.value.value)
