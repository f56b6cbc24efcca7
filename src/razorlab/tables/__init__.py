"""Tables and figures from run records alone. No torch, no hydra."""

from razorlab.tables.collect import load_runs
from razorlab.tables.figures import (
    accuracy_against_peak,
    memory_by_layer,
    memory_by_part,
    memory_by_role,
    memory_curves,
)
from razorlab.tables.grid import cells, pivot, title, to_latex, write_grid
from razorlab.tables.render import caption, to_terminal, wrap, write_tables
from razorlab.tables.summary import summarise

__all__ = [
    "accuracy_against_peak",
    "caption",
    "cells",
    "load_runs",
    "memory_by_layer",
    "memory_by_part",
    "memory_by_role",
    "memory_curves",
    "pivot",
    "summarise",
    "title",
    "to_latex",
    "to_terminal",
    "wrap",
    "write_grid",
    "write_tables",
]
