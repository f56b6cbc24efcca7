"""Paragraphs of generated pages."""

from __future__ import annotations

import re
import textwrap

WIDTH = 100  # characters of a line, as in every page


def wrap(text: str) -> str:
    """``text`` in lines of at most ``WIDTH`` characters, none of which breaks a span of code."""
    whole = re.sub(r"`[^`]*`", lambda span: span.group().replace(" ", "\0"), text)
    filled = textwrap.fill(whole, WIDTH, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0", " ")
