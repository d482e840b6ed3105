"""Pages to read: self-contained HTML, without scripts, from nowhere else."""

from vitreous.report.inspection import render_inspection

__all__ = ["render_inspection"]
