"""Whether the CPU kernels can run in this process: asked before the first of them is compiled, because LLVM answers
what it cannot do by ending the process. Numba and LLVM are imported where nobody has compiled here before."""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path

LEAST_LLVM = 20  # the first with llvm.experimental.vector.compress that Numba brought, in 0.62
# Conversions of float16, which every kernel has in one of its branches. Where the processor has no instruction for them
# LLVM calls a function of the compiler's own library, which no process that Numba compiles for has.
_PROBE = """
define void @probe(ptr %from, ptr %to) {
  %half = load <16 x half>, ptr %from, align 1
  %float = fpext <16 x half> %half to <16 x float>
  %sum = fadd <16 x float> %float, %float
  %back = fptrunc <16 x float> %sum to <16 x half>
  store <16 x half> %back, ptr %to, align 1
  ret void
}
"""
# Whose presence makes Numba compile for another processor than this one: environment variables, and a file.
_TOLD = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")
_SETTINGS = Path(".numba_config.yaml")
# What /proc/cpuinfo says of a processor that code may depend on: on x86, on ARM.
_INSTRUCTIONS = ("flags", "Features")
_DESCRIBED = (*_INSTRUCTIONS, "vendor_id", "cpu family", "model", "CPU implementer", "CPU variant", "CPU part")
_HELPERS = re.compile(r"\b__(?:extend|trunc)\w*hf\w*|\b__gnu_(?:h2f|f2h)\w*")


@cache
def _described() -> dict[str, str] | None:
    """What Linux says of the first processor; None where it says nothing of its instructions, or where Numba is told to
    compile for another."""
    if any(name in os.environ for name in _TOLD) or _SETTINGS.exists():
        return None
    lines = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                if not name.strip():
                    break  # the next processor
                lines[name.strip()] = value.strip()
    except (OSError, UnicodeDecodeError):
        return None
    lines = {name: value for name, value in lines.items() if name in _DESCRIBED}
    return lines if any(name in lines for name in _INSTRUCTIONS) else None


def processor() -> str:
    """Names what machine code is made for. Where Linux describes the processor LLVM is not asked."""
    described = _described()
    return repr(target()) if described is None else repr((os.uname().machine, sorted(described.items())))


@cache
def has_avx512() -> bool:
    """Whether code is made for a processor whose registers hold all lanes, and of which one instruction permutes them
    by indices."""
    described = _described()
    if described is None:
        return "+avx512f" in target()[2].split(",")
    return "avx512f" in described.get("flags", "").split()


@cache
def has_avx512_fp16() -> bool:
    """Whether the processor computes with float16 in full registers, as Intel's do since 2023: a mark of those whose
    dense products outrun sums that a mask selects."""
    described = _described()
    if described is None:
        return "+avx512fp16" in target()[2].split(",")
    return "avx512_fp16" in described.get("flags", "").split()


def missing_helpers(machine) -> list[str]:
    """The functions that an LLVM target machine would call to convert float16; none where it has instructions."""
    from llvmlite import binding

    module = binding.parse_assembly(_PROBE)
    module.triple = machine.triple
    return sorted(set(_HELPERS.findall(machine.emit_assembly(module))))


def target() -> tuple[str, str, str]:
    """Triple, processor and features that machine code is made for: this processor's, or what Numba is told."""
    from llvmlite import binding
    from numba.core import codegen, config

    name = config.CPU_NAME or binding.get_host_cpu_name()
    features = config.CPU_FEATURES
    return binding.get_default_triple(), name, codegen.get_host_cpu_features() if features is None else features


def target_machine():
    """A new LLVM target machine for code that runs in this process, as Numba makes it: on x86 without relocation."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    triple, name, features = target()
    relocation = "static" if triple.startswith(("x86", "i386", "i686")) else "default"
    return binding.Target.from_triple(triple).create_target_machine(
        cpu=name, features=features, opt=3, reloc=relocation, codemodel="jitdefault", jit=True
    )


@cache
def shortcoming() -> str | None:
    """What keeps the CPU kernels from running here, in words, or None. Where a process like this one has kept a kernel
    the answer is known."""
    from .kept import has_any

    try:
        if has_any():
            return None
        import numba
        from llvmlite import binding
    except ImportError as error:
        return f"Numba does not start ({error})"
    if binding.llvm_version_info[0] < LEAST_LLVM:
        return f"Numba {numba.__version__} brings LLVM {binding.llvm_version_info[0]}: install numba>=0.62"
    if sys.byteorder != "little":
        return "the processor is big-endian"
    if missing := missing_helpers(target_machine()):
        return f"the processor has no instructions for float16 ({', '.join(missing)}; on x86 they are called F16C)"
    return None
