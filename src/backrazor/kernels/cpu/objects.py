"""Machine code on disk, and its way into a process, without the compiler that made it.

A process that finds its kernels here imports neither Numba nor LLVM, which take 55 MB, and 60 more once Numba compiles.
A file is a hash of the rest, the name of its function, and an object file of that function; a damaged one is passed
over.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path

from . import elf
from .target import target_machine


@cache
def _engine():
    """LLVM's loader, which holds the code for as long as the process lives."""
    from llvmlite import binding

    return binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine())


def object_of(code: str) -> bytes:
    """The object file of optimised LLVM ``code``, which calls nothing outside itself."""
    from llvmlite import binding

    return target_machine().emit_object(binding.parse_assembly(code))


def load(name: str, code: bytes) -> int:
    """The address of function ``name`` of an object file."""
    return elf.load(name, code) or load_by_llvm(name, code)


def load_by_llvm(name: str, code: bytes) -> int:
    """The same on any system, and of any object file that LLVM makes."""
    from llvmlite import binding

    engine = _engine()
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(name)
    assert address, name
    return address


def write(file: Path, name: str, code: bytes) -> None:
    """Keep an object file; other processes find it whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rest = name.encode() + b"\n" + code
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
        try:
            part.write(hashlib.sha256(rest).digest() + rest)
            part.close()
            os.replace(part.name, file)
        except OSError:
            Path(part.name).unlink(missing_ok=True)
            raise


def read(file: Path) -> tuple[str, bytes] | None:
    """The name and the object file that ``write`` has kept; None where there is none, or it is damaged."""
    try:
        whole = file.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    if hashlib.sha256(whole[size:]).digest() != whole[:size]:
        return None
    name, _, code = whole[size:].partition(b"\n")
    return name.decode(), code
