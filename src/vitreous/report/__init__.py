"""Pages to read: self-contained HTML, without scripts, from nowhere else.

Names are looked up when first used, so that the page of an inspection is written without Keras.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitreous.report.inspection import render_inspection
    from vitreous.report.run import RunFacts, RunReport, collect_facts, write_report
    from vitreous.report.run_page import render_run

__all__ = ["RunFacts", "RunReport", "collect_facts", "render_inspection", "render_run", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "render_inspection":
        from vitreous.report.inspection import render_inspection

        return render_inspection
    if name == "render_run":
        from vitreous.report.run_page import render_run

        return render_run
    if name in __all__:
        from vitreous.report import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
