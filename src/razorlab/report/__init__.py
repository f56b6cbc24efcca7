"""One HTML page from records: tables, figures, circumstances, commands. No other file is needed to read it."""

from razorlab.report.page import write_report

__all__ = ["write_report"]
