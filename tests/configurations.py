"""The configurations of the repository, and the options that name each."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted((FOLDER / "theory").glob("*.yaml"))  # of `emformer simulate`
PLANS = sorted((FOLDER / "ablations").glob("*.yaml"))  # of `emformer ablate`; folders below hold what they share
OTHERS = {*EXPERIMENTS, *(FOLDER / "ablations").rglob("*.yaml")}
CONFIGS = sorted(set(FOLDER.rglob("*.yaml")) - OTHERS)  # of `emformer fit`


def name(config: Path) -> str:
    """As "variants/psd"."""
    return str(config.relative_to(FOLDER).with_suffix(""))


def files(config: Path) -> list[str]:
    """`-c FILE`, or `-c BASE -c FILE`: a variant lies on top of the file that its own third line names."""
    if config.parent.name != "variants":
        return ["-c", str(config)]
    run = rf"-c configs/variants/{config.stem}.yaml --run runs/variants/{config.stem}"
    found = re.fullmatch(rf"#   emformer fit -c configs/(\w+).yaml {run}", config.read_text().splitlines()[2])
    assert found, f"{config}: its third line should be the command that runs it"
    return ["-c", str(FOLDER / f"{found[1]}.yaml"), "-c", str(config)]
