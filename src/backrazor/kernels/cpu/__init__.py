"""What the CPU kernels of all families share. Importing this folder imports no Numba.

Numba's auto-vectoriser cannot express "compress the lanes that passed a comparison", which is what packing is. LLVM
can: ``llvm.experimental.vector.compress`` becomes one instruction on AVX-512 and a short generic sequence elsewhere, so
the same source is fast where the hardware allows it and correct everywhere. Vector functions work on blocks of 16
elements at raw addresses; a *kind* names how the elements are stored: "f32", "f16" or "bf16". The order of magnitudes
is that of the bit pattern without its sign: for finite numbers the order of |x|, with infinity above every number and
NaN above infinity.

arguments  what a kernel is told: structs with named fields
entries    a worker's machine code: found on disk, or compiled and kept
kept       where on disk, and under which name
compiling  from a worker to machine code
objects    machine code on disk, and its way into a process
elf        that way without LLVM
target     whether the kernels can run in this process, and what their code is made for
launch     running a kernel on PyTorch's threads
counters   how threads share a kernel's work
vectors    what intrinsics are written with
scalars    single numbers at raw addresses
lanes      blocks of 16: comparing, selecting, compressing, casting; a family's own are in its ``_cpu_lanes.py``
layout     what code that must not import Numba knows of the blocks

Numba is imported by compiling, counters, vectors, scalars and lanes, and by a family's ``_cpu_*.py`` but for those that
``cpu.py`` imports: where machine code is found on disk, none of them is.
"""
