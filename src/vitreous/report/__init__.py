"""Pages to read: self-contained HTML, which loads nothing from elsewhere."""

from vitreous.report.inspection import render_inspection
from vitreous.report.look import render_look

__all__ = ["render_inspection", "render_look"]
