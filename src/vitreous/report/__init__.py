"""Pages to read: self-contained HTML, without scripts, from nowhere else.

page.py         templates that escape, images and figures inside the page
inspection.py   an inspection as a page
run.py          a run measured, explained, and written as a page
run_page.py     what that page shows, in words, tables and figures
frame.html.j2   what pages have in common; parts.html.j2, pieces that several use
"""

from vitreous.report.inspection import render_inspection
from vitreous.report.run import RunFacts, RunReport, collect_facts, write_report
from vitreous.report.run_page import render_run

__all__ = ["RunFacts", "RunReport", "collect_facts", "render_inspection", "render_run", "write_report"]
