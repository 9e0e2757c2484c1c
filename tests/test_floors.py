"""The floors of the house: a lower module never imports a higher one, at module level or inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import emformer

TOP = "emformer"
FLOORS: Mapping[str, int] = {
    "types": 0,
    "parts": 0,
    "settings": 0,
    "configuration": 0,
    "recipes": 0,
    "plans": 0,
    "memory": 0,
    "files": 0,
    "intervals": 0,
    "text": 0,
    "geometry": 0,
    "operators": 1,
    "kernels": 1,
    "positions": 1,
    "masks": 1,
    "norms": 1,
    "placements": 1,
    "ffn": 1,
    "attention": 2,
    "block": 2,
    "model": 3,
    "trajectory": 3,
    "observables": 4,
    "surgery": 4,
    "diagnostics": 4,
    "circuits": 4,
    "inspection": 4,
    "theory": 4,
    "verdicts": 4,
    "interop": 4,
    "figures": 4,
    "training": 5,
    "records": 5,
    "recordings": 5,
    "listing": 5,
    "comparison": 5,
    "effects": 5,
    "studies": 6,
    "evaluation": 6,
    "report": 6,
    "cli": 7,
    "__main__": 7,
}
ROOF = 8  # emformer/__init__.py only re-exports
IMPORTS_INSIDE_FUNCTIONS = {f"{TOP}.cli"}  # torch alone takes over a second, and `--help` must not wait for it
WITHOUT_TORCH = {f"{TOP}.parts", f"{TOP}.settings"}


class Import(NamedTuple):
    target: str
    line: int
    inside: bool  # a function or method
    typing_only: bool


def floor(module: str) -> int | None:
    """The floor of a module, or None if the table does not know it."""
    return ROOF if module == TOP else FLOORS.get(module.split(".")[1])


def imports(name: str, source: str, is_package: bool) -> Iterator[Import]:
    """Everything that a module imports, by absolute dotted name; `from a import b` gives a.b."""

    def walk(node: ast.AST, inside: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            here = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from walk(ast.Module([statement], []), here, True)
                for statement in child.orelse:
                    yield from walk(ast.Module([statement], []), here, typing_only)
                continue
            for target in targets(child):
                yield Import(target, child.lineno, here, typing_only)  # type: ignore[attr-defined]
            yield from walk(child, here, typing_only)

    def targets(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            return [f"{base}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                return [node.args[0].value]
        return []

    yield from walk(ast.parse(source), False, False)


def problems(sources: Mapping[str, str]) -> list[str]:
    """What breaks the rules in a package {dotted module: source}, one sentence each."""
    packages = {name for name in sources if any(other.startswith(f"{name}.") for other in sources)} | {TOP}
    found: list[str] = []
    beside: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        own = floor(name)
        if own is None:
            found.append(f"{name} stands on no floor: put it into the table of tests/test_floors.py.")
            continue
        for item in imports(name, source, name in packages):
            place = f"{name}, line {item.line}"
            if name in WITHOUT_TORCH and item.target.split(".")[0] == "torch" and not (item.typing_only or item.inside):
                found.append(f"{place}: imports torch, which this module must not.")
            if item.target.split(".")[0] != TOP:
                continue
            target = _module(item.target, sources)
            other = floor(target)
            if item.inside and name not in IMPORTS_INSIDE_FUNCTIONS:
                found.append(f"{place}: imports {target} inside a function; move it to the top of the file.")
            if other is None:
                found.append(f"{place}: imports {target}, which stands on no floor.")
            elif other > own:
                found.append(f"{place}: floor {own} imports {target} of floor {other}.")
            elif other == own and target != name:
                beside[name].add(target)
    return found + [f"Modules of one floor import each other in a circle: {' -> '.join(c)}." for c in _circles(beside)]


def _module(target: str, sources: Mapping[str, str]) -> str:
    """`a.b.c` as a module: itself where it is one, else what defines the name c."""
    while target not in sources and target.count(".") > 1:
        target = target.rpartition(".")[0]
    if target not in sources and target.count(".") == 1 and target.split(".")[1] not in FLOORS:
        return TOP  # a name re-exported by the roof
    return target


def _circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """One circle for every edge that closes one in a depth-first walk."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
            return
        if node not in done:
            for other in sorted(graph.get(node, ())):
                visit(other, [*path, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


def package() -> dict[str, str]:
    """The sources of emformer itself."""
    root = Path(emformer.__file__).parent
    sources = {}
    for path in sorted(root.rglob("*.py")):
        names = [TOP, *path.relative_to(root).with_suffix("").parts]
        if names[-1] == "__init__":
            names.pop()
        sources[".".join(names)] = path.read_text(encoding="utf-8")
    return sources


def test_the_package_keeps_its_floors():
    sources = package()
    assert {"emformer", "emformer.parts", "emformer.operators.dense", "emformer.model"} <= set(sources)
    found = problems(sources)
    assert not found, "\n" + "\n".join(found)


GOOD = {
    "emformer": "from emformer.model import Emformer",
    "emformer.parts": "import typing",
    "emformer.operators": "from emformer.operators.dense import Dense",
    "emformer.operators.base": "from emformer import parts",
    "emformer.operators.dense": "from emformer.operators.base import Operator\nfrom .base import Operator",
    "emformer.model": "from emformer.operators import Dense\nimport torch",
    "emformer.cli": "def main():\n    from emformer.model import Emformer",
}


def test_good_sources_pass():
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"emformer.operators.base": "from emformer.model import Emformer"},
            "floor 1 imports emformer.model of floor 3",
        ),
        ({"emformer.operators.base": "import emformer.model"}, "floor 1 imports emformer.model of floor 3"),
        ({"emformer.operators.base": "from emformer import model"}, "floor 1 imports emformer.model of floor 3"),
        ({"emformer.operators.base": "from .. import model"}, "floor 1 imports emformer.model of floor 3"),
        ({"emformer.operators": "from ..model import Emformer"}, "floor 1 imports emformer.model of floor 3"),
        ({"emformer.operators.base": "from emformer import Emformer"}, "floor 1 imports emformer of floor 8"),
        ({"emformer.operators.base": "import emformer"}, "floor 1 imports emformer of floor 8"),
        ({"emformer.parts": "if TYPE_CHECKING:\n    from emformer.model import E"}, "floor 0 imports emformer.model"),
        (
            {"emformer.parts": "try:\n    import emformer.model\nexcept ImportError: ..."},
            "floor 0 imports emformer.model",
        ),
        ({"emformer.parts": "def f():\n    from emformer.model import E"}, "floor 0 imports emformer.model of floor 3"),
        ({"emformer.model": "def f():\n    from emformer.parts import P"}, "imports emformer.parts inside a function"),
        (
            {"emformer.model": "class A:\n    def f(self):\n        if self:\n            from emformer import parts"},
            "line 4: imports emformer.parts inside a function",
        ),
        ({"emformer.model": "async def f():\n    import emformer.parts"}, "imports emformer.parts inside a function"),
        (
            {"emformer.parts": "import importlib\nimportlib.import_module('emformer.model')"},
            "floor 0 imports emformer.model of floor 3",
        ),
        ({"emformer.cli": "def main():\n    import emformer"}, "floor 7 imports emformer of floor 8"),
        ({"emformer.operators.base": "from emformer.operators import Dense"}, "in a circle: emformer.operators -> "),
        ({"emformer.operators.base": "from emformer.operators.dense import Dense"}, "emformer.operators.base"),
        ({"emformer.utils": ""}, "emformer.utils stands on no floor"),
        ({"emformer.utils.deep": ""}, "emformer.utils.deep stands on no floor"),
        ({"emformer.parts": "import torch"}, "imports torch"),
        ({"emformer.parts": "from torch import nn"}, "imports torch"),
    ],
)
def test_bad_sources_are_seen(change, sentence):
    found = problems(GOOD | change)
    assert any(sentence in problem for problem in found), found


def test_torch_for_types_alone_is_allowed():
    assert problems(GOOD | {"emformer.parts": "if TYPE_CHECKING:\n    import torch"}) == []
