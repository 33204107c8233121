"""Read a compiled TPU program: its collectives, kernels and cycles, with the trips of loops.

The compiler's own cost analysis counts the body of a loop once and does not count kernels. This
module walks the scheduled program from its entry, and counts each instruction as often as it runs.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UNKNOWN = 2**62  # cycles that the compiler writes if it has no estimate
# Our kernels that are no attention: name -> (rate in `Chip`, arrays of tokens read and written).
STREAMS = {
    "modulated_norm_fwd": ("norms", 2),
    "modulated_norm_bwd": ("norms", 4),
    "heads_fwd": ("heads", 2),
    "heads_bwd": ("heads", 3),
    "heads_part": ("heads", 2),
    "heads_join": ("heads", 2),
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


@dataclass
class Instruction:
    """One instruction of the program's text."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def sizes(self) -> list[int]:
        """Return the bytes of each array of the result, without the padding of its layout."""
        return _sizes(self.shape)

    def called(self, attribute: str) -> str | None:
        """Return the computation that an attribute such as `body` names, or None."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.rest)
        return found and found[1]


@dataclass
class Collective:
    """All collectives of one kind over one group of devices, summed over a step."""

    kind: str
    group: tuple[int, ...]  # devices of the first group
    overlaps: bool  # starts in one instruction and ends in a later one
    count: int = 0
    bytes: int = 0  # of all results
    largest: int = 0  # bytes of the largest array
    wire: float = 0.0  # bytes a device sends


@dataclass
class Kernel:
    """One call of an attention kernel, `count` times a step."""

    name: str
    shape: tuple[int, int, int, int]  # B, heads, queries, K
    num_keys: int  # more than queries if keys are gathered
    count: int


@dataclass
class Program:
    """The work of one step on one device."""

    collectives: list[Collective]
    kernels: list[Kernel]  # of attention
    matmul_cycles: int = 0
    other_cycles: int = 0
    # Bytes that other kernels read and write, by the name of their rate.
    streamed: dict[str, int] = field(default_factory=dict)


def read_program(text: str) -> Program:
    """Return the collectives, kernels and estimated cycles of a compiled program's text."""
    computations, entry = _parse(text)
    program, collectives = Program([], []), {}
    for instruction, times, beside in _walk(computations, entry, 1, False):
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            what = opcode, _group(instruction.rest), beside or opcode != instruction.opcode
            if len(what[1]) > 1:
                _add(collectives.setdefault(what, Collective(*what)), instruction, times)
        elif 'custom_call_target="tpu_custom_call"' not in instruction.rest:
            pass
        elif known := next((name for name in STREAMS if name in instruction.name), None):
            rate, arrays = STREAMS[known]
            moved = arrays * min(instruction.sizes[0], _sizes(_operands(instruction))[0])
            program.streamed[rate] = program.streamed.get(rate, 0) + times * moved
        else:
            program.kernels.append(Kernel(instruction.name, *_attention(instruction), times))
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
        if cycles and int(cycles[1]) < UNKNOWN:
            if _multiplies(computations, instruction):
                program.matmul_cycles += int(cycles[1]) * times
            else:
                program.other_cycles += int(cycles[1]) * times
    program.collectives = sorted(collectives.values(), key=lambda c: -c.wire)
    return program


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}":  # only a whole line: attributes of kernels have lines that begin with "}"
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(*found.groups()))
    return computations, entry


def _walk(
    computations: dict, name: str, times: int, beside: bool
) -> Iterator[tuple[Instruction, int, bool]]:
    """Yield (instruction, times it runs, whether it runs beside others) for all instructions.

    A sparse core runs beside others. All branches of a conditional are counted.
    """
    for instruction in computations[name]:
        yield instruction, times, beside
        if instruction.opcode == "while":
            inner, trips = [instruction.called("body")], _trips(computations, instruction)
        elif instruction.opcode == "conditional":
            inner, trips = _branches(instruction), 1
        elif instruction.opcode in ("call", "call-start", "async-start"):
            inner = [instruction.called("to_apply") or instruction.called("calls")]
            trips = 1
        else:
            continue
        for computation in inner:
            started = beside or instruction.opcode.endswith("-start")
            yield from _walk(computations, computation, times * trips, started)


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    return [instruction.called("true_computation"), instruction.called("false_computation")]


def _trips(computations: dict, loop: Instruction) -> int:
    """Return the number of trips of a loop: the largest constant in its condition."""
    limits = [
        int(re.match(r"\d+", i.rest)[0])
        for i in computations[loop.called("condition")]
        if i.opcode == "constant" and re.match(r"\d+\)", i.rest)
    ]
    return max(limits, default=1)


def _sizes(shapes: str) -> list[int]:
    """Return the bytes of all arrays in a text."""
    return [
        BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(shapes)
    ]


def _operands(kernel: Instruction) -> str:
    """Return the shapes of the operands of a kernel."""
    return re.search(r"operand_layout_constraints=\{(.*?\})\}", kernel.rest)[1]


def _attention(kernel: Instruction) -> tuple[tuple[int, int, int, int], int]:
    """Return ((B, heads, queries, K), number of keys) of an attention kernel.

    Its last bfloat16 result has shape (B, heads, _, K), without B if that is 1. Its first bfloat16
    operands are queries and keys, with tokens and K in either order.
    """
    *batch, heads, _, K = _bfloat16_arrays(kernel.shape)[-1]
    B = math.prod(batch)
    operands = _bfloat16_arrays(_operands(kernel))[:2]
    queries, keys = (math.prod(dims) // (B * heads * K) for dims in operands)
    return (B, heads, queries, K), keys


def _bfloat16_arrays(shapes: str) -> list[list[int]]:
    """Return the dimensions of all bfloat16 arrays in a text."""
    found = [dims for kind, dims in _ARRAY.findall(shapes) if kind == "bf16"]
    return [[int(n) for n in dims.split(",")] for dims in found]


def _multiplies(computations: dict, instruction: Instruction) -> bool:
    if instruction.opcode in ("convolution", "dot"):
        return True
    inner = computations.get(instruction.called("calls") or "", [])
    return any(i.opcode in ("convolution", "dot", "fusion") and _multiplies(computations, i)
               for i in inner)  # fmt: skip


def _group(rest: str) -> tuple[int, ...]:
    explicit = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if explicit:
        return tuple(int(n) for n in explicit[1].split(","))
    listed = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if listed:
        dims = [int(n) for n in listed[3].split(",")]
        order = [int(n) for n in listed[4].split(",")] if listed[4] else range(len(dims))
        return _iota_group(int(listed[2]), dims, list(order))
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    return (int(pairs[1]), int(pairs[2])) if pairs else ()


def _iota_group(size: int, dims: list[int], order: list[int]) -> tuple[int, ...]:
    """Return the first `size` device numbers of an iota of shape `dims`, transposed by `order`."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    group = []
    for place in range(size):
        number = 0
        for axis in reversed(order):
            place, digit = divmod(place, dims[axis])
            number += digit * strides[axis]
        group.append(number)
    return tuple(group)


def _add(total: Collective, instruction: Instruction, times: int) -> None:
    size, group = sum(instruction.sizes), len(total.group)
    if instruction.opcode.endswith("-start"):  # its shape lists operands and results
        size //= 2
    share = {
        "all-gather": (group - 1) / group,
        "all-to-all": (group - 1) / group,
        "reduce-scatter": group - 1,
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1,
    }[total.kind]
    total.count += times
    total.bytes += size * times
    total.largest = max(total.largest, *instruction.sizes)
    total.wire += size * share * times
