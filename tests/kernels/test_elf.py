"""Object files without LLVM: the same results as by its own loader, and what is not known is left to it."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from llvmlite import binding

from backrazor import warmup
from backrazor.kernels.cpu import elf, entries, launch, objects
from backrazor.kernels.cpu.kept import file_of
from backrazor.kernels.cpu.layout import F32
from tests.backrazor.compare import assert_same_bits
from tests.kernels.test_arguments import FAMILIES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="this loader is for Linux on x86-64"
)
TRIPLE = """
@three = private constant i64 3
define i64 @triple(i64 %x) nounwind {
  %factor = load volatile i64, ptr @three
  %product = mul i64 %x, %factor
  ret i64 %product
}
"""
CALLS = """
declare i64 @labs(i64) nounwind
define i64 @size(i64 %x) nounwind {
  %size = call i64 @labs(i64 %x)
  ret i64 %size
}
"""
WRITES = """
@count = internal global i64 0
define i64 @counted(i64 %x) nounwind {
  %old = load i64, ptr @count
  %new = add i64 %old, %x
  store i64 %new, ptr @count
  ret i64 %new
}
"""
NUMBER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)


def call(address: int, x: int) -> int:
    return NUMBER(address)(x)


def test_code_and_its_constants_are_placed_and_can_no_longer_be_written() -> None:
    address = elf.load("triple", objects.object_of(TRIPLE))
    assert call(address, 14) == 42
    rights = [
        re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+)", line)[1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
    ]
    assert rights == ["r-xp"]


@pytest.mark.parametrize(("code", "name", "result"), [(CALLS, "size", 7), (WRITES, "counted", -7)])
def test_what_is_not_known_is_loaded_by_llvm(code: str, name: str, result: int) -> None:
    made = objects.object_of(code)
    assert elf.load(name, made) is None
    assert call(objects.load(name, made), -7) == result


def _changed(code: bytes, at: int, part: bytes) -> bytes:
    return code[:at] + part + code[at + len(part) :]


def _relocation(code: bytes) -> int:
    """Where the first relocation of the code stands."""
    return next(section.offset for section in elf._sections(code) if section.type == elf._RELA)


FOREIGN: dict[str, Callable[[bytes], bytes]] = {
    "another relocation": lambda code: _changed(code, _relocation(code) + 8, struct.pack("<I", 2)),
    "a relocation behind the section": lambda code: _changed(code, _relocation(code), struct.pack("<Q", 1 << 40)),
    "a symbol behind the table": lambda code: _changed(code, _relocation(code) + 12, struct.pack("<I", 1 << 30)),
    "another processor": lambda code: _changed(code, 18, struct.pack("<H", 183)),
    "an executable": lambda code: _changed(code, 16, struct.pack("<H", 2)),
    "32 bits": lambda code: _changed(code, 4, b"\1"),
    "half a file": lambda code: code[: len(code) // 2],
    "no file": lambda code: b"",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_object_is_refused(kind: str) -> None:
    made = objects.object_of(TRIPLE)
    assert elf.load("triple", FOREIGN[kind](made)) is None
    assert elf.load("tripl", made) is None, "the whole name counts"


@pytest.mark.parametrize(("system", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")])
def test_other_systems_take_llvm(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = objects.object_of(TRIPLE)
    monkeypatch.setattr(elf.sys, "platform", system)
    monkeypatch.setattr(elf.os, "uname", lambda: os.uname_result(("", "", "", "", machine)))
    assert elf.load("triple", made) is None


def test_memory_that_may_not_be_run_is_llvms_business(monkeypatch: pytest.MonkeyPatch) -> None:
    made = objects.object_of(TRIPLE)
    monkeypatch.setattr(elf.mmap, "PROT_EXEC", 1 << 20)  # no right that the system knows
    assert elf.load("triple", made) is None


@pytest.mark.parametrize("family", FAMILIES, ids=lambda module: module.__name__.split(".")[-2])
def test_every_family_gives_the_same_bits_by_either_loader(family, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[int] = []

    def loaded_by(load: Callable[[str, bytes], int]) -> list:
        def entry(worker: entries.Worker, block: type, settings: tuple[int, ...]) -> int:
            entries.entry_point(worker, block, settings)  # is kept from here on
            addresses.append(load(*objects.read(file_of(entries.name_of(worker, settings)))))
            return addresses[-1]

        monkeypatch.setattr(launch, "entry_point", entry)
        return FAMILIES[family]()

    own, llvm = loaded_by(elf.load), loaded_by(objects.load_by_llvm)
    for (name, ours, _), (_, theirs, _) in zip(own, llvm, strict=True):
        assert_same_bits(name, ours, theirs)
    half = len(addresses) // 2
    assert None not in addresses and not set(addresses[:half]) & set(addresses[half:])


def test_every_kept_kernel_is_loaded_without_llvm() -> None:
    """Of float32; what a processor's code needs beyond that is LLVM's to load, and works."""
    found = []
    for worker, block, settings in warmup.entry_points():
        if not settings or settings[0] == F32:
            entries.entry_point(worker, block, settings)
            found.append(elf.load(*objects.read(file_of(entries.name_of(worker, settings)))))
    assert len(found) > 20 and None not in found and len(set(found)) == len(found)


def test_llvm_still_loads_two_files_one_after_the_other() -> None:
    other = TRIPLE.replace("i64 3", "i64 5").replace("@triple", "@fivefold")
    assert call(objects.load_by_llvm("triple", objects.object_of(TRIPLE)), 2) == 6
    assert call(objects.load_by_llvm("fivefold", objects.object_of(other)), 2) == 10
    assert binding.llvm_version_info[0] >= 20
