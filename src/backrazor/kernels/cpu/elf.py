"""An object file's way into a process without LLVM, which alone would take 40 MB.

Read are relocatable files of ELF64 for x86-64, in which LLVM's large code model leaves one kind of relocation: a whole
address of 64 bits. Anything else, and any other system, is somebody else's to load: the answer is None then.

Source: System V gABI, chapter 4 (https://www.sco.com/developers/gabi/latest/ch4.intro.html): header, sections, symbols,
relocations; System V psABI for AMD64 (https://gitlab.com/x86-psABIs/x86-64-ABI), section 4.4.1: types of relocation.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from typing import NamedTuple

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr: gABI 4, "ELF Header"
_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr: gABI 4, "Sections"
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym: gABI 4, "Symbol Table"
_RELOCATION = struct.Struct("<QQq")  # Elf64_Rela: gABI 4, "Relocation"
_IDENTITY = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
_RELOCATABLE, _X86_64 = 1, 62  # ET_REL, EM_X86_64
_PROGBITS, _SYMTAB, _RELA, _REL = 1, 2, 4, 9  # SHT_*
_WRITE, _ALLOC, _TLS = 1, 2, 1024  # SHF_*
_WHOLE_ADDRESS = 1  # R_X86_64_64: symbol + addend, 64 bits
_loaded: list[mmap.mmap] = []  # code stays for as long as the process lives


class _Unknown(Exception):
    """What this loader has no rule for."""


class _Section(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


def load(name: str, code: bytes) -> int | None:
    """The address of function ``name`` of an object file, whose memory can be run and read, and no longer written; None
    where the system is another, or the file holds what is not known here."""
    if sys.platform != "linux" or os.uname().machine != "x86_64" or sys.maxsize < 1 << 32:
        return None
    try:
        return _load(name.encode(), code)
    except (_Unknown, OSError, struct.error, IndexError, ValueError):
        return None


def _load(name: bytes, code: bytes) -> int:
    sections = _sections(code)
    places, size = _places(sections)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for index, place in places.items():
        offset, length = sections[index].offset, sections[index].size
        memory[place : place + length] = code[offset : offset + length]

    def symbol(table: int, index: int) -> tuple[int, int]:
        """(offset of its name, address)."""
        if not index * _SYMBOL.size < sections[table].size:
            raise _Unknown("a symbol outside its table")
        title, _, _, section, value, _ = _SYMBOL.unpack_from(code, sections[table].offset + index * _SYMBOL.size)
        if section not in places:
            raise _Unknown("a symbol of another file, or of no place")
        return title, start + places[section] + value

    for section in sections:
        if section.type in (_RELA, _REL) and section.info in places:
            if section.type == _REL:
                raise _Unknown("addends inside the code")
            for at in range(section.offset, section.offset + section.size, _RELOCATION.size):
                offset, info, addend = _RELOCATION.unpack_from(code, at)
                if info & 0xFFFFFFFF != _WHOLE_ADDRESS or offset + 8 > sections[section.info].size:
                    raise _Unknown(f"relocation {info & 0xFFFFFFFF}")
                _, address = symbol(section.link, info >> 32)
                struct.pack_into("<Q", memory, places[section.info] + offset, address + addend)
    found = _address(name, code, sections, symbol)
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError("the system lets no memory be run that was written")
    _loaded.append(memory)
    return found


def _sections(code: bytes) -> list[_Section]:
    identity, kind, machine, _, _, _, at, _, _, _, _, size, count, _ = _HEADER.unpack_from(code)
    if identity[:7] != _IDENTITY or (kind, machine, size) != (_RELOCATABLE, _X86_64, _SECTION.size):
        raise _Unknown("no relocatable file for x86-64")
    return [_Section(*_SECTION.unpack_from(code, at + i * size)) for i in range(count)]


def _places(sections: list[_Section]) -> tuple[dict[int, int], int]:
    """Where each section that a process needs begins, and the bytes of all."""
    places, end = {}, 0
    for index, section in enumerate(sections):
        if section.flags & _ALLOC:
            if section.type != _PROGBITS or section.flags & (_WRITE | _TLS) or section.align > mmap.PAGESIZE:
                raise _Unknown("a section of another kind than code and constants")
            places[index] = -(-end // max(section.align, 1)) * max(section.align, 1)
            end = places[index] + section.size
    return places, end


def _address(name: bytes, code: bytes, sections: list[_Section], symbol) -> int:
    """Of the symbol with this name."""
    for table, section in enumerate(sections):
        if section.type == _SYMTAB:
            names = sections[section.link].offset
            for index in range(section.size // _SYMBOL.size):
                (title,) = struct.unpack_from("<I", code, section.offset + index * _SYMBOL.size)
                if code[names + title : names + title + len(name) + 1] == name + b"\0":
                    return symbol(table, index)[1]
    raise _Unknown("no such function")
