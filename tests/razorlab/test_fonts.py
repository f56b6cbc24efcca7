"""Class names of any script in a figure: a font that has them, or one line that says so; never a warning."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, compose_plain
from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure

from razorlab.tables import fonts
from razorlab.tables.fonts import Lettering
from razorlab.training.network import assemble
from razorlab.training.pictures import sample_figure

ABSENT = "\u6c34\u725b"  # in none of the fonts that matplotlib brings


def drawn(lettering: Lettering, text: str) -> None:
    """Draw ``text``; a warning is an error in the tests."""
    figure = Figure()
    figure.text(0, 0, lettering.drawable(text), fontfamily=lettering.families)
    figure.savefig(io.BytesIO())


@pytest.fixture
def own_fonts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fonts that matplotlib brings, whatever this machine has."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


@pytest.mark.usefixtures("own_fonts_alone")
def test_a_character_that_the_default_font_lacks_comes_from_another(caplog: pytest.LogCaptureFixture) -> None:
    with rc_context({"font.family": ["cmtt10"]}):
        lettering = Lettering(["caf\u00e9", "\u0436\u0443\u043a"])
        assert lettering.families[0] == "cmtt10" and len(lettering.families) > 1
        assert lettering.drawable("\u0436\u0443\u043a") == "\u0436\u0443\u043a" and not caplog.records
        drawn(lettering, "\u0436\u0443\u043a")


@pytest.mark.usefixtures("own_fonts_alone")
def test_what_no_font_has_is_said_once_and_drawn_as_a_placeholder(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "razorlab"):
        lettering = Lettering([ABSENT, "plain", ABSENT])
    assert len(caplog.records) == 1 and "2 characters of the class names" in caplog.text
    assert lettering.drawable(f"a {ABSENT}") == "a ??"
    drawn(lettering, ABSENT)


def test_names_of_the_default_font_look_at_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    characters = fonts._characters
    monkeypatch.setattr(fonts, "_characters", lambda path: looked_at.append(path) or characters(path))
    assert Lettering(["dog", "caf\u00e9"]).families == list(font_manager.FontProperties().get_family())
    assert len(looked_at) == 1


def test_a_control_character_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    lettering = Lettering(["a\x07b"])
    assert lettering.drawable("a\x07b") == "a?b"
    drawn(lettering, "a\x07b")


@pytest.mark.usefixtures("own_fonts_alone")
def test_the_figure_of_test_images_takes_any_name() -> None:
    network = assemble(compose_plain(*TINY), 2)
    test = [(torch.zeros(3, 32, 32, dtype=torch.uint8), label) for label in (0, 1)]
    figure = sample_figure(network, SimpleNamespace(class_names=(ABSENT, "$x_1^$"), test=test))
    figure.savefig(io.BytesIO())
