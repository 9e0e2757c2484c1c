"""What an ablation study varies and what it measures: the YAML file of `emformer ablate`, and the cells that follow from it.

title: what positions are for
base: ../grammar.yaml                 # settings that all cells share, as of `emformer fit`; relative to this file
settings: {training: {max_steps: 200}}    # on top of them
factors:
  position:                           # a factor; its first level is the baseline
    rope: {}                          # a level: settings that lie on top, or files of them
    none: {model: {positions: []}}
seeds: 6
outcomes:
  loss: {metric: val_loss}
"""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from emformer import parts
from emformer.configuration import check_nulls, explain, load_parts, parse, read_yaml, settings_parser
from emformer.parts import UserError
from emformer.settings import Settings

PLACES = ("layer", "point", "head", "cloud", "param")  # of a record
NAME = re.compile(r"[\w.+-]+( [\w.+-]+)*")  # of factors and levels, which name folders
TAKEN = ("cell", "seed", "status", "outcome", "value", "se", "n", "step")  # columns of a study's table
ENGINES = "studies.engines"
LONGEST = 225  # bytes of a cell's name: 255 of a file's, less what a partial file adds
NUMBER = "-1.7976931348623157e+308"  # the longest


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number that every cell ends with: of its metrics, or of what it recorded.

    Args:
        metric: a key of metrics.jsonl, as val_loss.
        record: instead of it a key of the records, as wgf.omega.
        at: the "last" value; of a metric also the "best", which is the least; of a record also the "first".
        where: of a record the rows that count, as {point: attn, layer: 2}; a place that is not named is one that has none (head,
            param) or is averaged over (layer, point, cloud). "any": averaged over too. {layer: last}: the last that has rows.
    """

    metric: str | None = None
    record: str | None = None
    at: Literal["last", "best", "first"] = "last"
    where: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.metric is None) == (self.record is None):
            raise UserError("an outcome is a metric or a record: name one of them, as {metric: val_loss}.")
        if self.at == ("first" if self.record is None else "best"):
            raise UserError(f"an outcome 'at: {self.at}' is no choice of a {'metric' if self.record is None else 'record'}.")
        strange = [name for name in self.where if self.record is None or name not in PLACES]
        if strange:
            raise UserError(f"an outcome's 'where' names '{strange[0]}'; a record has {', '.join(PLACES)}, and a metric none.")


@dataclass(frozen=True, kw_only=True)
class Control:
    """What must be so before any result is shown: in the cells of these levels the mean outcome lies in [least, most].

    Args:
        outcome: a name of `outcomes`.
        levels: {factor: level} of the cells; every factor that is not named is at its baseline.
        least: the smallest mean over seeds that is right, or null.
        most: the largest, or null.
    """

    outcome: str
    levels: dict[str, str] = field(default_factory=dict)
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What somebody says of a factor: the paired difference of these levels to their baseline lies in [least, most].

    Args:
        source: who says so, as "S2 9.4"; "ours" where nobody does.
        outcome: a name of `outcomes`.
        levels: {factor: level} of the cells; every factor that is not named is at its baseline.
        minus: another outcome, taken off in each cell: the claim is then of `outcome - minus`.
        difference: false: of the outcome itself, not of its difference to the baseline.
        least: the smallest that is claimed, or null.
        most: the largest, or null.
    """

    source: str
    outcome: str
    levels: dict[str, str] = field(default_factory=dict)
    minus: str | None = None
    difference: bool = True
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Range:
    """A setting that a search varies between two numbers.

    Args:
        low: the least.
        high: the most.
        log: evenly in its logarithm.
        whole: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high) or (self.log and self.low <= 0):
            raise UserError(f"a range from {self.low} to {self.high} is none; choose low < high, and low > 0 where it is log.")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Another size of the same study.

    Args:
        settings: on top of the plan's own settings, or files of them.
        factors: {factor: {level: settings}} on top of those levels, where they hold sizes.
        seeds: how many; null for the plan's own.
    """

    settings: Any = field(default_factory=dict)
    factors: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An ablation study: cells that differ by the levels of factors and by the seed, and what is measured of each.

    Args:
        title: what it asks, in one line.
        base: settings files that all cells share, later ones on top; relative to the plan's own file.
        factors: {factor: {level: settings on top, or files of them}}; the first level of each is its baseline. Of several
            factors the later lie on top of the earlier.
        outcomes: what is measured: the primary outcomes, for all of which differences are corrected together.
        settings: on top of the base in every cell; a mapping, or files.
        design: "full" for every combination of levels; "single" for the baseline and every change of one factor; "corners" for
            that, and the same from the opposite corner, where every factor is at its last level.
        seeds: cells of each combination, seeded 0, 1, 2 …; fewer than 6 support no claim at 95 %.
        scales: other sizes by name, for --scale.
        controls: what must be so before any result is shown.
        claims: what somebody says of the factors, for a verdict each.
        search: settings that are varied continuously, by their dotted name, for a search with optuna in place of factors.
        trials: combinations that the search tries.
        engine: what runs the cells; null for processes on this machine, one thread each and as many as there are cores.
    """

    title: str
    base: list[str] | str
    outcomes: dict[str, Measure]
    factors: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: Any = field(default_factory=dict)
    design: Literal["full", "single", "corners"] = "full"
    seeds: int = 6
    scales: dict[str, Scale] = field(default_factory=dict)
    controls: dict[str, Control] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)
    search: dict[str, Range] = field(default_factory=dict)
    trials: int = 20
    engine: parts.Engine | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.trials < 1:
            raise UserError(f"a study has at least one seed and one trial, not {self.seeds} and {self.trials}.")
        if not self.outcomes or not self.base:
            raise UserError(f"a study needs {'outcomes' if self.base else 'a base'}: name at least one.")
        if bool(self.factors) == bool(self.search):
            raise UserError("a study has factors or a search: name one of them.")
        for name, levels in self.factors.items():
            for word in (name, *levels):
                if not NAME.fullmatch(word):
                    raise UserError(f"'{word}' names a folder of cells: use letters, digits, spaces between, and . + - _ only.")
            if name in TAKEN:
                raise UserError(f"the factor '{name}' has the name of a column of the results; choose another name.")
            if len(levels) < 2:
                raise UserError(f"the factor '{name}' has {len(levels)} level, and nothing to compare; give it at least two.")
        longest = {name: max(levels, key=_size) for name, levels in self.factors.items()} or dict.fromkeys(self.search, NUMBER)
        if (size := _size(_cell_name(longest, self.seeds - 1))) > LONGEST:
            raise UserError(
                f"names of cells are made of factors and levels, and the longest has {size} bytes, {size - LONGEST} more than a "
                "folder takes: use shorter names."
            )
        for kind, named in (("control", self.controls), ("claim", self.claims)):
            if named and self.search:
                raise UserError(f"a search has no levels that a {kind} could be of; leave out '{next(iter(named))}'.")
            for name, one in named.items():
                if one.least is None and one.most is None:
                    raise UserError(f"the {kind} '{name}' says nothing: give least, most, or both.")
                for outcome in (one.outcome, getattr(one, "minus", None)):
                    if outcome is not None and outcome not in self.outcomes:
                        raise UserError(f"the {kind} '{name}' is of '{outcome}', which is none of {', '.join(self.outcomes)}.")
                for factor, level in one.levels.items():
                    if level not in self.factors.get(factor, {}):
                        raise UserError(f"the {kind} '{name}' names {factor}={level}, which this study has not.")
                if self.whole(one.levels) not in self.combinations():
                    raise UserError(f"the {kind} '{name}' is of cells that the design '{self.design}' leaves out.")
        for name, claim in self.claims.items():
            if claim.difference and not self.baselines(self.whole(claim.levels)):
                raise UserError(f"the claim '{name}' is of the baseline and nothing else; name levels, or difference: false.")

    def whole(self, levels: Mapping[str, str]) -> dict[str, str]:
        """The level of every factor: those named, and of the others the baseline."""
        return {name: levels.get(name, next(iter(known))) for name, known in self.factors.items()}

    def combinations(self) -> list[dict[str, str]]:
        """The levels of every combination in the design, {factor: level}, each once, the baseline first."""
        names = list(self.factors)
        if self.design == "full":
            return [dict(zip(names, one, strict=True)) for one in itertools.product(*self.factors.values())]
        corners = [{name: next(iter(levels)) for name, levels in self.factors.items()}]
        if self.design == "corners":
            corners.append({name: list(levels)[-1] for name, levels in self.factors.items()})
        found: list[dict[str, str]] = []
        for corner in corners:
            for one in (corner, *(corner | {name: level} for name, levels in self.factors.items() for level in levels)):
                if one not in found:
                    found.append(one)
        return found

    def baselines(self, levels: Mapping[str, str]) -> list[dict[str, str]]:
        """The combinations that this one is held against: the corners that it differs from in one factor only; where it differs
        from the baseline in several, the baseline itself. None for the baseline; in a corner's own row the baseline."""
        corners = [self.whole({})]
        if self.design == "corners":
            corners.append({name: list(known)[-1] for name, known in self.factors.items()})
        if dict(levels) == corners[0]:
            return []
        near = [one for one in corners if sum(one[name] != levels[name] for name in levels) == 1]
        return near or corners[:1]


class Cell(NamedTuple):
    """One run of a study: the level of every factor (of a search, the value of every setting), a seed, and its settings."""

    levels: Mapping[str, str]
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        """Of its folder, as "position=none,seed=0"."""
        return _cell_name(self.levels, self.seed)


def read_plan(file: str | Path, *words: str, scale: str | None = None, prog: str = "emformer ablate") -> Plan:
    """The plan in a YAML file, with `--field value` on top, at one of its scales. Files that it names are then named from here.

    Raises:
        UserError: for whatever is wrong with it, with the nearest name that exists.
    """
    load_parts((ENGINES,))
    path, parser = Path(file), plan_parser(prog)
    content = read_yaml(path)
    if "engine" not in content and next((word for word in words if word.startswith("--engine")), "").startswith("--engine."):
        content = {**content, "engine": {"class_path": "Local"}}  # whose options are given alone
    with tempfile.TemporaryDirectory(prefix="emformer-") as folder:
        whole = _written(Path(folder) / path.name, content)
        try:
            given = dict(vars(parser.instantiate(parser.parse_args(["-c", str(whole), *words]))))
            plan = Plan(**{one.name: given[one.name] for one in fields(Plan)})
            check_nulls(plan, str(path))
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{path}: {explain(error, parser).replace(str(whole), str(path))}") from error
    found = _scaled(plan, scale, path)
    home = path.parent
    return replace(
        found,
        base=[str(home / one) for one in _listed(found.base)],
        settings=_placed(found.settings, home),
        factors={name: {level: _placed(one, home) for level, one in levels.items()} for name, levels in found.factors.items()},
    )


def plan_parser(prog: str) -> ArgumentParser:
    """A parser of a plan's fields as options; the file comes with -c."""
    parser = ArgumentParser(prog=prog, description=(Plan.__doc__ or "").partition("\n")[0], exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="the plan")
    parser.add_class_arguments(Plan, nested_key=None, as_group=False)
    vars(parser)["also"] = set()
    return parser


def cells(plan: Plan) -> list[Cell]:
    """Every cell of the plan, seed by seed, so that the first n give a whole comparison with fewer seeds.

    Raises:
        UserError: for settings that are none, with the levels that they are of.
    """
    resolved = [(levels, resolve(plan, levels)) for levels in plan.combinations()]
    return [
        Cell(levels, seed, replace(settings, training=replace(settings.training, seed=seed)))
        for seed in range(plan.seeds)
        for levels, settings in resolved
    ]


def resolve(plan: Plan, levels: Mapping[str, str], *more: Mapping[str, Any]) -> Settings:
    """The settings of a combination: base, the plan's settings, the levels of its factors in their order, then `more`."""
    load_parts()
    changes = [plan.settings, *(plan.factors[name][level] for name, level in levels.items()), *more]
    with tempfile.TemporaryDirectory(prefix="emformer-") as folder:
        files = [Path(one) for one in _listed(plan.base)]
        for k, change in enumerate(one for several in changes for one in _listed(several)):
            files.append(Path(change) if isinstance(change, str) else _written(Path(folder) / f"change{k}.yaml", change))
        words = [word for one in files for word in ("-c", str(one))]
        try:
            given = vars(parse(settings_parser("emformer ablate", ""), words))
        except UserError as error:
            where = ", ".join(f"{name}={level}" for name, level in levels.items()) or "the base"
            raise UserError(f"{where}: {str(error).replace(folder, 'the plan')}") from error
    return Settings(**{name: given[name] for name in Settings.__dataclass_fields__})


def written(plan: Plan) -> str:
    """The plan as the text of a file, every field in it."""
    return yaml.safe_dump(parts.plain(plan), sort_keys=False, allow_unicode=True)


def _cell_name(levels: Mapping[str, str], seed: int) -> str:
    return ",".join(f"{key}={value}" for key, value in (*levels.items(), ("seed", seed)))


def _size(text: str) -> int:
    return len(text.encode())


def _scaled(plan: Plan, scale: str | None, path: Path) -> Plan:
    if scale is None:
        return plan
    if scale not in plan.scales:
        raise UserError(f"{path} has no scale '{scale}'; it has {', '.join(plan.scales) or 'none'}.")
    one = plan.scales[scale]
    settings = [*_listed(plan.settings), *_listed(one.settings)]
    factors = {name: dict(levels) for name, levels in plan.factors.items()}
    for name, levels in one.factors.items():
        for level, change in levels.items():
            if level not in factors.get(name, {}):
                raise UserError(f"the scale '{scale}' of {path} names {name}={level}, which this study has not.")
            factors[name][level] = [*_listed(factors[name][level]), *_listed(change)]
    return replace(plan, settings=settings, factors=factors, seeds=plan.seeds if one.seeds is None else one.seeds)


def _listed(change: Any) -> list[Any]:
    return list(change) if isinstance(change, list) else [change]


def _placed(change: Any, home: Path) -> Any:
    """A change whose files are named from the plan's folder; several are a list of mappings and files."""
    if isinstance(change, list):
        return [_placed(one, home) for one in change]
    if isinstance(change, str):
        return str(home / change)
    if isinstance(change, Mapping) or change is None:
        return dict(change or {})
    raise UserError(f"a change is a mapping of settings, or a file of them, not {change!r}.")


def _written(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
