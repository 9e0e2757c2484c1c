"""emformer: a transformer of two operators per head, and the geometry of its token cloud while it learns.

    import emformer as emf
    from emformer.operators import Dense, LowRank

The names below are imported when they are first used, so that `emformer --help` need not wait for torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Emformer": "model",
    "Step": "block",
    "Settings": "settings",
    "fit": "training",
    "capture": "trajectory",
    "Trajectory": "trajectory",
    "observe": "observables.frame",
    "read_records": "recordings",
    "compare": "comparison",
    "analyze": "studies",
    "perform": "studies.simulation",
    "ablate": "studies.ablation",
    "read_plan": "plans",
    "examine": "studies.examination",
    "load": "records",
    "export": "interop.export",
    "push": "interop.hub",
    "pull": "interop.hub",
    "read_settings": "records",
    "Run": "records",
    "UserError": "parts",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'emformer' has no attribute '{name}'")
    return getattr(import_module(f"emformer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
