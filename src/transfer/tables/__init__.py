"""Tables and figures from run records alone. No torch, no hydra."""

from transfer.tables.collect import load_runs
from transfer.tables.figures import accuracy_against_peak
from transfer.tables.render import to_terminal, write_tables
from transfer.tables.summary import summarise

__all__ = ["accuracy_against_peak", "load_runs", "summarise", "to_terminal", "write_tables"]
