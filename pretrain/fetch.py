"""List, download and verify pretrained weights.

    python pretrain/fetch.py --list
    python pretrain/fetch.py vit_b16 proxylessnas     download, going on where an earlier call stopped
    python pretrain/fetch.py all
    python pretrain/fetch.py --verify                 every file that is here

Files lie beside this script; one placed there by hand is accepted and verified the same way. checksums.json holds what
is known of each. Where no checksum was published, that of the first file that reads as weights is recorded there and
trusted from then on. Nothing in a file is executed: .pth is read with weights_only, .npz without pickle.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from tabulate import tabulate

from razorlab.download import Checksum, digest, download
from razorlab.errors import UserError, one_line
from razorlab.files import atomic_write_text
from razorlab.npz import npz_names

HOME = Path(__file__).parent
COMMAND = "python pretrain/fetch.py"
WRONG_INPUT, INTERRUPTED = 2, 130  # exit codes
_DAMAGED = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, MemoryError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Weights:
    """One row of checksums.json.

    Args:
        file: its name in this folder.
        url: where it is published.
        sha256: hex, whole or its first digits; None until a first file was seen.
        source: where ``sha256`` comes from.
        tensor: a tensor that the file must hold; None for any.
        timm: timm's pretrained tag, where ``url`` is timm's.
    """

    file: str
    url: str
    sha256: str | None
    source: str
    tensor: str | None = None
    timm: str | None = None

    @property
    def checksum(self) -> Checksum | None:
        """What the file has to match, if known."""
        return Checksum("sha256", self.sha256) if self.sha256 else None


def read_catalogue(home: Path) -> dict[str, Weights]:
    """Return the rows of ``home``/checksums.json by name."""
    path = home / "checksums.json"
    try:
        return {name: Weights(**row) for name, row in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from the repository") from error


def require_weights(path: Path, weights: Weights) -> None:
    """Raise ``UserError`` where the file at ``path`` does not read as ``weights``' kind of file."""
    try:
        names = npz_names(path) if weights.file.endswith(".npz") else _pth_names(path)
        if weights.tensor is not None and weights.tensor not in names:
            raise ValueError(f"it holds no tensor {weights.tensor}")
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]  # torch adds a page of advice
        raise UserError(
            f"{path} does not read as weights ({reason}): delete it and fetch it again, or place the published file "
            "there by hand"
        ) from error


def _pth_names(path: Path) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks on old pickle protocols; what it refuses, it raises
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("it holds no named tensors")
    return set(state)


def fetch(name: str, home: Path) -> str:
    """Have the file of ``name`` in ``home``, verified; return one line that says what was done."""
    weights = read_catalogue(home)[name]
    path = home / weights.file
    if path.exists():
        return f"{name}: {verify(name, home)}, nothing to do"
    print(f"{name}: downloading {weights.url}")
    download(weights.url, path, weights.checksum, accept=lambda part: require_weights(part, weights))
    return f"{name}: {_settle(name, home, 'download')}"


def verify(name: str, home: Path) -> str:
    """Verify the file of ``name``, wherever it came from; return what was found.

    Raises:
        UserError: the file is missing, has another checksum or does not read as weights.
    """
    weights = read_catalogue(home)[name]
    path = home / weights.file
    if not path.is_file():
        known = f" ({weights.checksum})" if weights.checksum else ""
        raise UserError(f"{path}{known} is missing: run `{COMMAND} {name}`, or place {weights.url} there by hand")
    if weights.checksum is not None:
        weights.checksum.require(path, f"delete it and run `{COMMAND} {name}`, or place {weights.url} there by hand")
    require_weights(path, weights)
    return _settle(name, home, "sight")


def _settle(name: str, home: Path, occasion: str) -> str:
    """Describe a file that has passed; record its checksum where none was known."""
    catalogue = read_catalogue(home)
    weights = catalogue[name]
    if weights.checksum is not None:
        return f"{home / weights.file} verified ({weights.checksum}, {weights.source})"
    found = digest(home / weights.file, "sha256")
    today = datetime.now(UTC).date().isoformat()
    catalogue[name] = replace(weights, sha256=found, source=f"none published; recorded at first {occasion}, {today}")
    _write_catalogue(catalogue, home)
    return (
        f"{home / weights.file} reads as weights; no checksum is published, so SHA256 {found} was recorded in "
        f"{home / 'checksums.json'} and is expected from now on"
    )


def _write_catalogue(catalogue: dict[str, Weights], home: Path) -> None:
    text = json.dumps({name: asdict(row) for name, row in catalogue.items()}, indent=2) + "\n"
    atomic_write_text(home / "checksums.json", text)


def show(home: Path) -> str:
    """Return the table of all weights."""
    rows = []
    for name, weights in read_catalogue(home).items():
        path, part = home / weights.file, home / f"{weights.file}.part"
        state = (
            "here" if path.is_file() else f"{part.stat().st_size / 1e6:.1f} MB of it" if part.exists() else "missing"
        )
        rows.append((name, weights.file, state, (weights.sha256 or "")[:8], weights.source))
    return tabulate(rows, headers=("name", "file", "state", "sha256", "checksum from"))


def main(argv: Sequence[str] | None = None, home: Path = HOME) -> int:
    """Run the command and return its exit code: 0, 2 for wrong input, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to bring or verify; all for everything")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="print the table and stop")
    action.add_argument("--verify", action="store_true", help="only verify; without a NAME whatever is here")
    options = parser.parse_args(argv)
    try:
        names = _chosen(options.names, read_catalogue(home))
        if options.list or not (options.names or options.verify):
            print(show(home))
            return 0
        if options.verify and not options.names:
            names = [name for name in names if (home / read_catalogue(home)[name].file).is_file()]
            print(f"{len(names)} weights files in {home}")
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return WRONG_INPUT
    return _each(names, home, options.verify)


def _chosen(given: Iterable[str], catalogue: dict[str, Weights]) -> list[str]:
    unknown = sorted(set(given) - catalogue.keys() - {"all"})
    if unknown:
        raise UserError.value("NAME", unknown[0], "|".join((*catalogue, "all")))
    return list(catalogue) if not given or "all" in given else list(given)


def _each(names: Iterable[str], home: Path, only_verify: bool) -> int:
    failed = False
    for name in names:
        try:
            print(f"{name}: {verify(name, home)}" if only_verify else fetch(name, home))
        except (UserError, OSError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(one_line(error), file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            print(f"\ninterrupted; run `{COMMAND} {name}` to go on", file=sys.stderr)
            return INTERRUPTED
    return WRONG_INPUT if failed else 0


if __name__ == "__main__":
    sys.exit(main())
