"""Every claim of the sources with its verdict, in one table: reads the folders that studies, ablations and simulations wrote.

    python train/results.py studies/* ablations/* simulations/* --out train/RESULTS.md

Copies their tables into results/ beside the file, and writes what stands in it below the line `<!-- tables -->`.
"""

import argparse
import json
import shlex
from pathlib import Path

import pandas as pd

MARK = "<!-- tables -->"
TABLES = {"verdicts.csv": "verdicts", "effects.csv": "effects", "statements.csv": "statements"}
WORDS = {"True": "supported", "False": "refuted"}


def command(folder: Path) -> str:
    """The command that made a folder, as its environment.json tells."""
    words = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["command"]
    return shlex.join(words)


def claims(folder: Path) -> pd.DataFrame:
    """The claims of a folder: verdict, claim, source, measured, interval, claimed, null, n."""
    if (folder / "verdicts.csv").exists():
        found = pd.read_csv(folder / "verdicts.csv", keep_default_na=True)
        found["n"] = found["n"].astype(str) + " " + found["of"].astype(str)
        return found
    found = pd.read_csv(folder / "statements.csv")
    found = found[found["how"] != "measured"].rename(columns={"measured": "value", "predicted": "least"})
    found["verdict"] = found["held"].astype(str).map(WORDS).fillna("undecided")
    low, high = found["value"] - 1.96 * found["error"], found["value"] + 1.96 * found["error"]
    return found.assign(low=low, high=high, null=float("nan"), most=float("nan"), n=found["n"].astype(str))


def line(one: pd.Series) -> str:
    """A row of the table."""
    number = [f"{one[name]:.3g}" if pd.notna(one[name]) else "" for name in ("value", "low", "high", "least", "most", "null")]
    interval = f"[{number[1]}, {number[2]}]" if number[1] else "–"
    span = f"{number[3] or '−∞'} … {number[4] or '∞'}" if "how" not in one else f"{one['how']} {number[3]}"
    cells = (
        one["verdict"],
        one["claim"].replace("|", "\\|"),
        one["source"],
        number[0] or "–",
        interval,
        span,
        number[5],
        one["n"],
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("train/RESULTS.md"))
    options = parser.parse_args()
    tables, parts = options.out.parent / "results", []
    tables.mkdir(parents=True, exist_ok=True)
    for folder in [one for one in options.folders if any((one / name).exists() for name in TABLES)]:
        for name, kind in TABLES.items():
            if (folder / name).exists():
                (tables / f"{folder.name}.{kind}.csv").write_bytes((folder / name).read_bytes())
        if (folder / "verdicts.csv").exists() or (folder / "statements.csv").exists():
            rows = "\n".join(line(one) for _, one in claims(folder).iterrows())
            head = "| verdict | claim | source | measured | 95 % interval | claimed | null | n |\n" + "|---" * 8 + "|"
            parts.append(f"### {folder.name}\n\n`{command(folder)}`\n\n{head}\n{rows}\n")
    above = options.out.read_text(encoding="utf-8").partition(MARK)[0] if options.out.exists() else "# Results\n\n"
    options.out.write_text(f"{above}{MARK}\n\n" + "\n".join(parts), encoding="utf-8")
    print(f"wrote {options.out} and {len(list(tables.iterdir()))} tables in {tables}")


if __name__ == "__main__":
    main()
