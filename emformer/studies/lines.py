"""Lines of a study's charts: many values at each point, of which the mean is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


def points(panel: str, line: str, x: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    """Rows of all values (P, K) at x (K,), some of which may be equal: of heads in one layer, say."""
    return pd.DataFrame({"panel": panel, "line": line, "x": np.tile(x, len(values)).astype(float), "y": values.ravel()})


def averaged(rows: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One row for each point: the mean of its values over prompts, heads and models; undefined ones left out, nan for none."""
    return pd.concat(rows).groupby(["panel", "line", "x"], sort=False, as_index=False)["y"].mean()
