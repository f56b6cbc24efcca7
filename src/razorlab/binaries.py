"""Triton kernels in the configurations of ``ahead``, compiled without a GPU, and what their binaries say."""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context

from .ahead import Configuration

# of one multiprocessor: registers, threads, blocks, bytes of shared memory (CUDA C programming guide, compute
# capabilities 8.0, 9.0 and 10.0); a block takes another 1,024 bytes of shared memory for the system
_REGISTERS, _THREADS, _BLOCKS = 65_536, 2048, 32
_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}


@dataclass(frozen=True)
class Binary:
    """What a configuration became: registers per thread, bytes of local memory per thread (spills and stack), bytes of
    shared memory per block."""

    configuration: Configuration
    capability: int
    registers: int
    local_bytes: int
    shared_bytes: int

    @property
    def name(self) -> str:
        return self.configuration.name

    @property
    def occupancy(self) -> float:
        """Estimate of the share of a multiprocessor's threads that can be resident, 0 to 1."""
        threads = 32 * self.configuration.warps
        by_registers = _REGISTERS // (-(-self.registers // 8) * 8 * threads)  # handed out eight at a time
        by_shared = _SHARED[self.capability] // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, _THREADS // threads, _BLOCKS) * threads / _THREADS


def compile_all(wanted: list[Configuration], capability: int, workers: int = 1) -> list[Binary]:
    """Compile for compute capability ``capability`` (80 is sm_80), in ``workers`` processes.

    Raises:
        RuntimeError: Triton or its assembler refuses a kernel; the message carries the reason.
    """
    tasks = [(configuration, capability) for configuration in wanted]
    if workers == 1:
        return [compile_one(*task) for task in tasks]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, *zip(*tasks, strict=True), chunksize=4))


def _source(configuration: Configuration):
    """(the kernel as it is launched, its options): what Triton compiles."""
    from triton.compiler import ASTSource

    kernel = getattr(import_module(configuration.module), configuration.kernel)
    attributes = {(number,): [["tt.divisibility", 16]] for number in configuration.divisible}
    source = ASTSource(kernel, dict(configuration.signature), dict(configuration.constants), attributes)
    return source, {
        "num_warps": configuration.warps,
        "maxnreg": configuration.registers,
        "enable_fp_fusion": False,
    }


def intermediate(configuration: Configuration, capability: int = 90) -> str:
    """The kernel in Triton's own intermediate language (TTIR), functions inlined, before anything depends on the
    device."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    source, given = _source(configuration)
    target = GPUTarget("cuda", capability, 32)
    backend, context = make_backend(target), ir.context()
    options = backend.parse_options(given | source.parse_options())
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, *helpers, context)
    return str(backend.make_ttir(module, {}, options, capability))


def compiled_of(configuration: Configuration, capability: int):
    """What Triton makes of it; kept in Triton's cache, so that a list which was cut off goes on where it was."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _source(configuration)
    try:
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        raise RuntimeError(f"{configuration.name} does not compile for sm_{capability}: {error}") from error


def _dumped(compiled, what: str) -> str:
    """What ``cuobjdump --dump-<what>`` says of the binary."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, f"--dump-{what}", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def issued(configuration: Configuration, capability: int = 90) -> tuple[int, int]:
    """Instructions that a warp issues: outside of all loops, and for each pass through the outermost loops. Counted in
    the assembler's output (SASS) as if every branch were taken, so from above; inner loops count once per pass."""
    return count_instructions(_dumped(compiled_of(configuration, capability), "sass"))


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)")


def count_instructions(sass: str) -> tuple[int, int]:
    """As ``issued``, of a kernel's SASS."""
    lines = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    lines = [(address, text) for address, text in lines if not text.startswith("NOP")]
    loops = []
    for address, text in lines:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < address:  # at its own address it is the trap at the end
            loops.append(range(int(branch[1], 16), address + 1))
    inside = sum(any(address in loop for loop in loops) for address, _ in lines)
    return len(lines) - inside, inside


def compile_one(configuration: Configuration, capability: int) -> Binary:
    """Compile one configuration and read its binary with the toolchain that Triton brings."""
    compiled = compiled_of(configuration, capability)
    usage = _dumped(compiled, "resource-usage")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Binary(configuration, capability, registers, stack + local, compiled.metadata.shared)
