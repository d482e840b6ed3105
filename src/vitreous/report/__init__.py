"""Pages to read: self-contained HTML, which loads nothing from elsewhere.

Names are looked up when first used, so that the page of an inspection is written without Keras.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitreous.report.inspection import render_inspection
    from vitreous.report.look import render_look
    from vitreous.report.run import RunFacts, RunReport, collect_facts, write_report
    from vitreous.report.run_page import render_run

__all__ = [
    "RunFacts",
    "RunReport",
    "collect_facts",
    "render_inspection",
    "render_look",
    "render_run",
    "write_report",
]

_HOMES = {"render_inspection": "inspection", "render_look": "look", "render_run": "run_page"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'run')}"), name)
