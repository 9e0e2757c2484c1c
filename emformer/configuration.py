"""Between text and settings: command line and YAML to `Settings`, and plain data from a checkpoint back to `Settings`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from emformer import parts
from emformer.parts import UserError
from emformer.settings import Settings

_HOMES = ("operators", "kernels", "positions", "masks", "norms", "ffn", "block", "text", "training")


def settings_parser(prog: str, description: str) -> ArgumentParser:
    """A parser of `-c FILE` (several; later ones win) and dotted overrides such as `--model.depth 6`."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of settings; may be given several times")
    parser.add_class_arguments(Settings, nested_key=None, as_group=False)
    return parser


def load_parts() -> None:
    """Import every module of emformer that holds parts, so that they can be named by class alone.

    They are found, not listed: a variant in a new file of `operators/` needs no second edit.
    """
    for home in _HOMES:
        module = importlib.import_module(f"emformer.{home}")
        for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{module.__name__}."):
            importlib.import_module(found.name)


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """The parsed and instantiated namespace. Raises `UserError` in one sentence for whatever is wrong."""
    try:
        return parser.instantiate(parser.parse_args(list(arguments)))
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise UserError(explain(error, parser)) from error


def revive(plain: dict[str, Any]) -> Settings:
    """`Settings` from the plain data of a run's config.yaml or of a checkpoint. Inverse of `parts.plain`.

    The data is not trusted: a class path names a part of emformer, or of a module that the caller has imported already.
    No other module is imported on the data's behalf.

    Raises:
        UserError: for unknown classes, keys or types.
    """
    load_parts()
    for path in _class_paths(plain):
        module = path.rpartition(".")[0]
        if module and module not in sys.modules:
            raise UserError(
                f"the settings name the part '{path}', which is not loaded; import its module '{module}' first if you trust it."
            )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Settings, nested_key=None, as_group=False)
    try:
        return Settings(**vars(parser.instantiate(parser.parse_object(plain))))
    except (ArgumentError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(explain(error, parser)) from error


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "class_path" in value:
            yield str(value["class_path"])
        for item in value.values():
            yield from _class_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _class_paths(item)


def explain(error: Exception, parser: ArgumentParser) -> str:
    """One line of what, where, and the nearest name that exists."""
    cause: BaseException | None = error
    while cause is not None:  # our own sentences come through unchanged
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    wrong = re.search(
        r"unrecognized arguments: (?:--)?([\w.]+)|[Kk]ey '([\w.]+)' is not expected|'([\w.]+)' is not expected"
        r"|Unexpected keys: \{'([\w.]+)'|import path string: ([\w.]+)|No module named '([\w.]+)'",
        text,
    )
    if wrong:
        name = next(group for group in wrong.groups() if group)
        near = nearest(name, parser)
        return f"'{name}' is not a setting or part that exists{near}."
    missing = re.findall(r"(?:Key|Option|Argument) \"([\w.]+)\" is required", text)
    if missing:
        return f"no value for {', '.join(missing)}: start from a complete file, as in -c configs/default.yaml."
    return re.sub(r"\s+", " ", text).strip()[:600]


def nearest(name: str, parser: ArgumentParser) -> str:
    """'; did you mean …?' for a misspelt key or class, or nothing."""
    known = {action.dest for action in parser._actions} | set(_names(parts.Part))
    last = {key.rpartition(".")[2]: key for key in known}
    match = difflib.get_close_matches(name, known, 1, 0.7) or [
        last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], last, 1, 0.6)
    ]
    return f"; did you mean '{match[0]}'?" if match else "; --help lists them all"


def _names(base: type) -> Iterator[str]:
    """Names and fields of every part that is loaded."""
    for part in base.__subclasses__():
        yield part.__name__
        if is_dataclass(part):
            yield from (field.name for field in fields(part))
        yield from _names(part)
