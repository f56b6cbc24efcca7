"""Reads a kernel's intermediate code (TTIR) for products of 32-bit numbers that an address is made from.

Such a product wraps where a tensor has 2^31 elements or more. A product of constants and of a lane's number is as large
as the block, whatever the tensor, and may stay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_RESULTS = re.compile(r"^(%[^=]*?) = (.*)$")
# The numbers that these give are no products: memory's content, answers of yes and no, counts of a block's elements.
_ENDS = ("tt.load", "arith.cmpi", "arith.cmpf", "tt.histogram", "tt.get_program_id")
_PRODUCTS = ("arith.muli", "arith.shli")


@dataclass(eq=False)
class Value:
    """What an operation gives: its name, the line it stands in, and what it is computed from."""

    operation: str
    line: str
    inputs: list[Value] = field(default_factory=list)

    @property
    def is_32_bit(self) -> bool:
        return re.search(r"(?:^|[ x<])i32>?$", self.line) is not None


@dataclass
class _Region:
    """Names that are known in it; of a loop or a branch the values that ``yield`` gives."""

    names: dict[str, Value]
    yields: list[list[Value]] = field(default_factory=list)


def _bound(value: Value) -> bool:
    """Whether it is made from constants, numbers of lanes, and answers of yes and no alone."""
    if value.operation in ("tt.make_range", "arith.constant") or "i1> to " in value.line:
        return True
    return bool(value.inputs) and value.operation != "scf" and all(map(_bound, value.inputs))


def _offsets(code: str) -> list[Value]:
    """The second operand of every ``tt.addptr``."""
    regions, found = [_Region({})], []

    def named(name: str) -> Value:
        for region in reversed(regions):
            if name in region.names:
                return region.names[name]
        return Value("argument", name)

    for raw in code.splitlines():
        line = re.sub(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", raw).strip()
        if line.startswith("}"):
            closed = regions.pop()
        match = _RESULTS.match(line)
        results, rest = (match[1], match[2]) if match else ("", line)
        operation = rest.split(" ", 1)[0].strip('"').split('"')[0]
        count = re.search(r":(\d+)$", results)
        names = [f"{results[: count.start()]}#{i}" for i in range(int(count[1]))] if count else _VALUE.findall(results)
        opened = _Region({})
        if operation == "scf.for":
            head, _, carried = rest.partition("iter_args(")
            index, *bounds = _VALUE.findall(head)
            opened.names[index] = Value("scf", line, [named(bound) for bound in bounds])
            for place, (inner, first) in enumerate(re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", carried)):
                value = Value("scf", line, [named(first)])
                opened.names[inner] = value
                opened.yields.append(value.inputs)
                regions[-1].names[names[place]] = value
        elif operation == "scf.if":
            for name in names:
                value = Value("scf", line)
                regions[-1].names[name] = value
                opened.yields.append(value.inputs)
        elif operation == "scf.yield":
            for inputs, name in zip(regions[-1].yields, _VALUE.findall(rest.split(" : ")[0]), strict=True):
                inputs.append(named(name))
        elif names:
            inputs = [named(name) for name in _VALUE.findall(rest)]
            for name in names:
                regions[-1].names[name] = Value(operation, line, inputs)
            if operation == "tt.addptr":
                found.append(inputs[1])
        if line.endswith("{"):
            regions.append(_Region({}, closed.yields) if line.startswith("} else") else opened)
    return found


def narrow_products(code: str) -> list[str]:
    """The lines of 32-bit products, of more than constants and lanes, that an address of this code is made from."""
    seen, wanted, found = set(), _offsets(code), []
    assert wanted, "no addresses: is this TTIR?"
    while wanted:
        value = wanted.pop()
        if id(value) in seen or value.operation in _ENDS:
            continue
        seen.add(id(value))
        if value.operation in _PRODUCTS and value.is_32_bit and not _bound(value):
            found.append(value.line)
        wanted += value.inputs
    return found
