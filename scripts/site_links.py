"""A hook of mkdocs: files of the repository that a page links to outside of docs/ become files of the site.

``[steps.csv](../benchmarks/results/steps.csv)`` works on the forge that shows the repository, and there alone. On the
site the same link leads to a copy below ``files/``. A link to a file that does not exist stays as it is, for mkdocs to
complain of.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)((?:#[^)\s]*)?)\)")
COPIES = "files"


def outside(page: str, target: str) -> str | None:
    """The path, from the root of the repository, of what ``target`` means on ``page`` of docs/; None inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith(("docs/", "../")) else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what any page links to."""
    root = Path(config.config_file_path).parent
    wanted = set()
    for page in files.documentation_pages():
        for target, _ in LINK.findall(page.content_string):
            path = outside(page.src_uri, target)
            if path is not None and (root / path).is_file():
                wanted.add(path)
    for path in sorted(wanted):
        # as plain text where the browser would otherwise offer a download, or mkdocs would make a page of it
        name = f"{COPIES}/{path}" + (".txt" if path.endswith((".md", ".py", ".toml")) else "")
        files.append(File.generated(config, name, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn such links into links to the copies."""

    def copied(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[1])
        for ending in ("", ".txt"):
            if path is not None and files.get_file_from_path(f"{COPIES}/{path}{ending}") is not None:
                here = posixpath.dirname(page.file.src_uri) or os.curdir
                return f"]({posixpath.relpath(f'{COPIES}/{path}{ending}', here)})"
        return match[0]

    return LINK.sub(copied, markdown)
