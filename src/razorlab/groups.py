"""The configuration files of the laboratory, by group. No torch, no hydra."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parent / "configs"  # in a checkout a link to configs/ at the top
GROUPS = ("task", "model", "data", "razor", "method", "optim", "recipe", "experiment")


@cache
def file_names(group: str) -> tuple[str, ...]:
    """Return what the files of ``group`` are called, sub-folders included: ``compact``, ``demo/dense``."""
    folder = CONFIGS / group
    return tuple(sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")))


def read_file(name: str) -> dict[str, Any]:
    """Return the content of ``configs/<name>.yaml``."""
    return _numbers(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")))


def first_comment(name: str) -> str:
    """Return the file's first line of comment that is no command, without its mark."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    texts = (line[2:] for line in lines if line.startswith("# "))
    return next((text for text in texts if not text.startswith(("@package", "python "))), "")


def _numbers(content: Any) -> Any:
    """YAML 1.1 takes ``3e-4`` for a text; Hydra does not."""
    if isinstance(content, dict):
        return {key: _numbers(value) for key, value in content.items()}
    if isinstance(content, str):
        try:
            return float(content)
        except ValueError:
            return content
    return content
