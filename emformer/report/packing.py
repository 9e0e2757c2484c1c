"""Arrays small enough for a page: numbers as whole steps of a scale, in base64."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np


def packed(values: np.ndarray, bits: int = 16) -> dict[str, Any]:
    """The array as unsigned integers of 8 or 16 bits, little-endian, in base64, with its shape and scale.

    Code 0 is undefined (nan, infinite); 1 … 2^bits - 1 are even steps from `low` to `high`, so a value is off by at most
    (high - low) / (2 (2^bits - 2)). page.js unpacks it.
    """
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    low, high = (float(values[known].min()), float(values[known].max())) if known.any() else (0.0, 0.0)
    top = 2**bits - 2
    scale = top / (high - low) if high > low else 0.0
    codes = np.zeros(values.shape, dtype=f"<u{bits // 8}")
    codes[known] = 1 + np.rint((values[known] - low) * scale)
    return {
        "bits": bits,
        "shape": list(values.shape),
        "low": repr(low),  # as text: the page's numbers are rounded
        "high": repr(high),
        "codes": base64.b64encode(codes.tobytes()).decode(),
    }


def spread(count: int, most: int) -> list[int]:
    """0 … count - 1, or `most` (at least one) of them evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(k) for k in np.linspace(0, count - 1, max(1, most))})
