"""Fonts that have the characters of a text: class names may be of any script, matplotlib's own font has some only."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

LOGGER = logging.getLogger("razorlab")
PLACEHOLDER = "?"
BOXES = "Last Resort"  # a font of matplotlib's that has a box for every character
SHOWN = 10  # characters that the log names


class Lettering:
    """What draws ``texts``: the default font, and installed ones for the characters that it lacks.

    Says in one log line which characters no installed font has; ``drawable`` replaces them.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        default = font_manager.FontProperties()
        self.families: list[str] = list(default.get_family())
        lacking = {c for text in texts for c in text if c.isprintable() and not c.isspace()}
        lacking -= _characters(font_manager.findfont(default))
        fonts = font_manager.fontManager.ttflist if lacking else []
        for font in sorted(fonts, key=lambda font: (font.style != "normal", abs(_weight(font) - 400), font.name)):
            found = lacking & _characters(font.fname)
            if found and not font.name.startswith(BOXES):
                self.families.append(font.name)
                lacking -= found
        self.lacking = lacking
        if lacking:
            shown = " ".join(sorted(lacking)[:SHOWN]) + (" ..." if len(lacking) > SHOWN else "")
            LOGGER.warning(
                "no installed font has %d characters of the class names (%s): figures show %s for them; install one, "
                "such as Noto Sans CJK",
                *(len(lacking), shown, PLACEHOLDER),
            )

    def drawable(self, text: str) -> str:
        """Return ``text`` with a placeholder for what cannot be drawn; control characters count as such."""
        return "".join(PLACEHOLDER if c in self.lacking or not c.isprintable() else c for c in text)


def _weight(font: font_manager.FontEntry) -> int:
    return font.weight if isinstance(font.weight, int) else font_manager.weight_dict.get(font.weight, 400)


def _characters(path: str) -> set[str]:
    """The characters that the font file has; none where matplotlib cannot draw it, as with bitmaps of emoji."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError, ValueError):
        return set()
    return {chr(code) for code in font.get_charmap()} if font.scalable else set()
