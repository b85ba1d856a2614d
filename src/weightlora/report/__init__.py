"""Pictures and words from record files. Imports no torch, and matplotlib only when something is drawn."""

from weightlora.report.card import card_section
from weightlora.report.page import Report, report
from weightlora.report.paper import paper_table
from weightlora.report.selection_map import selection_map
from weightlora.report.summary import run_summary
from weightlora.report.sweeps import study_table, sweep_table
from weightlora.report.tables import Table, comparison_table

__all__ = [
    "Report",
    "Table",
    "card_section",
    "comparison_table",
    "paper_table",
    "report",
    "run_summary",
    "selection_map",
    "study_table",
    "sweep_table",
]
