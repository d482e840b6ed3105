"""Export: a run as a file that gives the same answers elsewhere. Names are looked up when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitreous.export.graph import build_graph
    from vitreous.export.record import ExportRecord, read_record
    from vitreous.export.runtimes import Runtime, load_runtime
    from vitreous.export.write import Export, export_model

__all__ = ["Export", "ExportRecord", "Runtime", "build_graph", "export_model", "load_runtime", "read_record"]

_HOMES = {
    "build_graph": "graph",
    "ExportRecord": "record",
    "read_record": "record",
    "Runtime": "runtimes",
    "load_runtime": "runtimes",
    "Export": "write",
    "export_model": "write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
