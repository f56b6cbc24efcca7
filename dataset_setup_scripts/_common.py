"""What the set-up scripts share: their options and what they print. The work is in ``razorlab.data.published``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from razorlab.data.published import PUBLISHED, PublishedSpec
from razorlab.data.published.install import install
from razorlab.data.published.listing import command, find_problems
from razorlab.errors import UserError, one_line

WRONG_INPUT, INTERRUPTED = 2, 130  # exit codes


def main(
    names: Sequence[str], argv: Sequence[str] | None = None, specs: Mapping[str, PublishedSpec] = PUBLISHED
) -> int:
    """Set up or verify the data sets ``names`` and return the exit code: 0, 2 for wrong input, 130 when interrupted."""
    options = _parse(names, specs, argv)
    failed = False
    for name in names:
        root = (options.folder or options.root / name).expanduser()
        try:
            if options.verify:
                failed |= not _verify(specs[name], root)
            else:
                _install(specs[name], root, options.repair)
        except (UserError, OSError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            prefix = "" if isinstance(error, UserError) else f"{name}: "  # an OSError: read-only, full, no permission
            print(prefix + one_line(error), file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted; run {command(specs[name], root)} to go on", file=sys.stderr)
            return INTERRUPTED
    return WRONG_INPUT if failed else 0


def _parse(names: Sequence[str], specs: Mapping[str, PublishedSpec], argv: Sequence[str] | None) -> argparse.Namespace:
    archives = "\n".join(
        f"  {name}: {archive.name}  {archive.checksum}" + ("" if archive.url else "  (by hand only)")
        for name in names
        for archive in specs[name].archives
    )
    parser = argparse.ArgumentParser(
        description="Download, verify and unpack published image data sets. Downloads go on where they were "
        "interrupted; what is complete is left alone.",
        epilog=f"published files, used where you placed them in the data set's folder:\n{archives}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, default=Path("data"), help="each data set goes to ROOT/<name> (%(default)s)"
    )
    if len(names) == 1:
        parser.add_argument("--folder", type=Path, help=f"the data set's own folder, in place of ROOT/{names[0]}")
    else:
        parser.set_defaults(folder=None)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="only count images and classes and say what is wrong")
    action.add_argument("--repair", action="store_true", help="unpack the published files anew over what is there")
    return parser.parse_args(argv)


def _install(spec: PublishedSpec, root: Path, repair: bool) -> None:
    done = install(spec, root, repair=repair)
    print(f"{spec.name}: {_counts(spec)} in {root}" + ("" if done else ", nothing to do"))


def _verify(spec: PublishedSpec, root: Path) -> bool:
    problems = find_problems(spec, root)
    for problem in problems:
        print(f"{spec.name}: {one_line(ValueError(problem))}", file=sys.stderr)
    if problems:
        print(f"{spec.name}: run {command(spec, root)}, with --repair to replace what is there", file=sys.stderr)
    else:
        print(f"{spec.name}: {_counts(spec)} in {root}, verified")
    return not problems


def _counts(spec: PublishedSpec) -> str:
    return f"{spec.train} training and {spec.test} test images in {spec.classes} classes"
