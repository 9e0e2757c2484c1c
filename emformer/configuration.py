"""Between text and settings: command line and YAML to `Settings`, and plain data from a checkpoint back to `Settings`."""

from __future__ import annotations

import copy
import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from emformer import parts
from emformer.parts import UserError
from emformer.settings import Settings

_HOMES = ("operators", "kernels", "positions", "masks", "norms", "ffn", "placements", "block", "text", "observables", "training")
LARGEST, DEEPEST = 100_000, 100  # of plain data that may be settings


def settings_parser(prog: str, description: str, also: Sequence[str] = ()) -> ArgumentParser:
    """A parser of `-c FILE` (several; later ones win) and dotted overrides such as `--model.depth 6`.

    `also` names options that the command takes by itself, so that a misspelt one finds its neighbour.
    """
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file of settings; may be given several times")
    parser.add_class_arguments(Settings, nested_key=None, as_group=False)
    vars(parser)["also"] = set(also)
    return parser


def load_parts(homes: Sequence[str] = _HOMES) -> None:
    """Import every module of emformer (or of some of its `homes`) that holds parts, so that they can be named by class alone.

    They are found, not listed: a variant in a new file of `operators/` needs no second edit.
    """
    for home in homes:
        module = importlib.import_module(f"emformer.{home}")
        for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{module.__name__}."):
            importlib.import_module(found.name)


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """The parsed and instantiated namespace. Raises `UserError` in one sentence for whatever is wrong."""
    for path in files(arguments):
        read_yaml(path)
    try:
        found = parser.instantiate(parser.parse_args(list(arguments)))
        for name in Settings.__dataclass_fields__:
            check_nulls(getattr(found, name, None), name)
        return found
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise UserError(explain(error, parser)) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `UserError` that names the file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the settings file {path} does not exist.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{where} is not valid YAML: {what}.") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a settings file.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a settings file: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: it should map names such as 'model' to values.")
    _check_size(content, str(path))
    return content


def _check_size(content: Any, where: str) -> None:
    """Raise unless the data is a tree of at most `LARGEST` values and `DEEPEST` levels: a file of a few lines may refer to
    itself so often, or so, that walking through it never ends."""
    open_, count = [(content, 0)], 0
    while open_:
        one, depth = open_.pop()
        if depth > DEEPEST:
            raise UserError(f"{where}: nested more than {DEEPEST} levels deep, which settings never are.")
        for item in one.values() if isinstance(one, dict) else one:
            count += 1
            if count > LARGEST:
                raise UserError(f"{where}: more than {LARGEST:,} values are no settings.")
            if isinstance(item, dict | list | tuple):
                open_.append((item, depth + 1))


def files(arguments: Sequence[str]) -> Iterator[str]:
    """What follows -c or --config on a command line."""
    for word, after in zip_longest(arguments, arguments[1:]):
        if word in ("-c", "--config") and after is not None:
            yield after
        elif word.startswith("--config="):
            yield word.removeprefix("--config=")


def revive(plain: dict[str, Any]) -> Settings:
    """`Settings` from the plain data of a run's config.yaml or of a checkpoint. Inverse of `parts.plain`.

    The data is not trusted: a class path names a part of emformer, or of a module that the caller has imported already.
    No other module is imported on the data's behalf.

    Raises:
        UserError: for unknown classes, keys or types.
    """
    load_parts()
    if isinstance(plain, dict):
        _check_size(plain, "settings")
    _check_trust(plain, Settings, "settings")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Settings, nested_key=None, as_group=False)
    try:
        found = Settings(**vars(parser.instantiate(parser.parse_object(copy.deepcopy(plain)))))
        check_nulls(found, "settings")
        return found
    except (ArgumentError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(explain(error, parser)) from error


def _check_trust(value: Any, hint: Any, where: str) -> None:
    """Raise unless every part in `value` is a dictionary that names a class of a module that is loaded.

    The parser would import whatever module a *text* names where a part is expected, and read a file where settings are.
    """
    if get_origin(hint) in (Union, UnionType):
        for one in get_args(hint):
            _check_trust(value, one, where)
        return
    composite = isinstance(hint, type) and (issubclass(hint, parts.Part) or is_dataclass(hint) or is_typeddict(hint))
    if isinstance(value, str) and (composite or get_origin(hint) in (list, dict, Sequence)):
        raise UserError(f"{where}: expected settings, found the text '{value}'.")
    if isinstance(value, list) and get_args(hint):
        for index, item in enumerate(value):
            _check_trust(item, get_args(hint)[0], f"{where}[{index}]")
    elif isinstance(value, dict) and get_origin(hint) is dict:
        for key, item in value.items():
            _check_trust(item, get_args(hint)[1], f"{where}[{key}]")
    elif isinstance(value, dict) and composite:
        if issubclass(hint, parts.Part):
            hint, value = _loaded_class(str(value.get("class_path")), where), value.get("init_args", {})
        hints = get_type_hints(hint)
        for key, item in value.items() if isinstance(value, dict) else ():
            _check_trust(item, hints.get(key), f"{where}.{key}")


def check_nulls(value: Any, where: str) -> None:
    """Raise for a null where the type has none: the parser lets it pass."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_nulls(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_nulls(item, f"{where}.{key}")
    elif is_dataclass(value):
        hints = get_type_hints(type(value))
        for one in fields(value):
            item = getattr(value, one.name)
            if item is None and type(None) not in get_args(hints[one.name]) and hints[one.name] is not Any:
                raise UserError(f"{where}.{one.name} is null, which it cannot be.")
            check_nulls(item, f"{where}.{one.name}")


def _loaded_class(path: str, where: str) -> type:
    """The part of this name, if its module is loaded; nothing is imported."""
    module, _, name = path.rpartition(".")
    if not module:  # by class alone, as in the YAML files that people write
        return next((part for part in _subclasses(parts.Part) if part.__name__ == name), parts.Part)
    if module not in sys.modules:
        raise UserError(
            f"{where}: the part '{path}' is in a module that is not loaded; if you trust it, import '{module}' first "
            f"(on the command line: --import {module})."
        )
    found = getattr(sys.modules[module], name, None)
    if not (isinstance(found, type) and issubclass(found, parts.Part)):
        raise UserError(f"{where}: '{path}' is no part.")
    return found


def foreign_modules(settings: Settings) -> list[str]:
    """Modules outside emformer that parts of these settings come from."""
    paths = set(re.findall(r"'class_path': '([\w.]+)'", str(parts.plain(settings))))
    return sorted({path.rpartition(".")[0] for path in paths if not path.startswith("emformer.")})


def explain(error: Exception, parser: ArgumentParser) -> str:
    """One line of what, where, and the nearest name that exists."""
    cause: BaseException | None = error
    while cause is not None:  # our own sentences come through unchanged
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    for pattern in _UNKNOWN:
        if wrong := re.search(pattern, text):
            return _unknown(wrong[1], parser)
    if "arguments are required" in text or "is required" in text:
        missing = ", ".join(sorted(set(re.findall(r"[\w]+(?:\.[\w]+)+", text))))
        return f"no value for {missing or 'some settings'}: start from a complete file, as in -c configs/default.yaml."
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", re.sub(r"\s+", " ", text)).strip()[:600]


# how the parser says that a name is not known
_UNKNOWN = (
    r"unrecognized arguments: (?:--)?([\w.]+)",
    r"[Oo]ption '([\w.]+)'",
    r"[Kk]ey '([\w.]+)' is not expected",
    r"Unexpected keys: \{'([\w.]+)'",
    r"import path string: ([\w.]+)",
    r"No module named '([\w.]+)'",
)


def _unknown(name: str, parser: ArgumentParser) -> str:
    known = {action.dest for action in parser._actions} | set(_names(parts.Part)) | vars(parser).get("also", set())
    if name in known:
        return f"'{name}' exists, but not as a part of the kind that stands there."
    name = name.removesuffix(".class_path").removesuffix(".init_args")
    is_class = name.rpartition(".")[2][:1].isupper()
    alike = {key for key in known if key.rpartition(".")[2][:1].isupper() == is_class}
    last = {key.rpartition(".")[2]: key for key in alike}
    near = difflib.get_close_matches(name, alike, 1, 0.7) or [
        last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], last, 1, 0.6)
    ]
    hint = f"did you mean '{near[0]}'?" if near else "--help lists them all."
    return f"'{name}' is not a setting or part that exists; {hint}"


def _subclasses(base: type) -> Iterator[type]:
    for part in base.__subclasses__():
        yield part
        yield from _subclasses(part)


def _names(base: type) -> Iterator[str]:
    """Names and fields of every part that is loaded, and that settings of a run may have."""
    for part in _subclasses(base):
        if issubclass(part, parts.Experiment | parts.Study | parts.Engine):
            continue
        yield part.__name__
        if is_dataclass(part):
            yield from (field.name for field in fields(part))
