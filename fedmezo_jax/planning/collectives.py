"""The communication between devices in a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
_INSTRUCTION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One communication between devices.

    Attributes:
        kind: ``all-reduce``, ``all-gather``, ….
        bytes: bytes of its result on one device, for one execution.
        groups: the groups of devices that communicate, as positions in the mesh's flat order; empty if all do.
        times: number of executions per run of the program: the product of the trip counts of the loops around it.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int


def collectives(text: str) -> list[Collective]:
    """Returns all communications of a compiled program (``compiled.as_text()``).

    For a conditional, the branch that sends most is used. A loop with an unknown trip count is counted once.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head["name"]
            bodies[name] = []
            entry = name if head["entry"] else entry
        elif name:
            bodies[name].append(line)

    counted: dict[str, list[Collective]] = {}

    def of_computation(computation: str) -> list[Collective]:
        if computation not in counted:
            counted[computation] = [collective for line in bodies.get(computation, []) for collective in of_line(line)]
        return counted[computation]

    def of_line(line: str) -> list[Collective]:
        if match := _INSTRUCTION.search(line):
            results = _results(match["kind"], match["shape"]) if match["start"] else match["shape"]
            size = sum(_bytes(*array) for array in _ARRAY.findall(results))
            return [Collective(match["kind"], size, _groups(line), 1)]
        if branches := _BRANCHES.search(line):
            options = [of_computation(branch.strip(" %")) for branch in branches[1].split(",")]
            return max(options, key=lambda option: sum(collective.bytes * collective.times for collective in option))
        trips = int(count[1]) if (count := _TRIPS.search(line)) else 1
        return [
            collective._replace(times=collective.times * trips)
            for callee in _CALLED.findall(line)
            for collective in of_computation(callee)
        ]

    return of_computation(entry)


def _results(kind: str, shape: str) -> str:
    """The part of an asynchronous start's shape that describes the results.

    An ``all-reduce-start`` has the shape of its results. Every other kind has ``(operands, results)`` or
    ``(operands, results, context, …)``. If several are combined into one, the results are a tuple.
    """
    if kind == "all-reduce":
        return shape
    depth, parts = 0, [""]
    for character in shape.removeprefix("("):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        parts[-1] += character
    return parts[1]


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * max(1, bits // 8)


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """The groups of devices in any of XLA's notations.

    These are ``{{0,1},{2,3}}``; ``[2,2]<=[4]`` with an optional ``T(1,0)``, which is an iota reshaped, transposed and
    split; and ``mesh['a'=2,'b'=2] {'b'}``, a grid of devices that communicate along the named axes, with an optional
    ``, device_ids=([2,2]T(1,0))`` for the order of the devices in the grid.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1]))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source, permutation = match.groups()
        grid = np.transpose(_grid(_numbers(source)), _numbers(permutation) if permutation else None)
        return tuple(map(tuple, grid.reshape(_numbers(shape)).tolist()))
    order = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    if match := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", line):
        axes, source, permutation, axis_names = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        grid = _grid(list(sizes.values()))
        if source:
            grid = np.transpose(_grid(_numbers(source)), _numbers(permutation)).reshape(grid.shape)
        group_axes = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", axis_names)]
        members = math.prod(grid.shape[axis] for axis in group_axes)
        grouped = np.moveaxis(grid, group_axes, range(-len(group_axes), 0))
        return tuple(map(tuple, grouped.reshape(-1, members).tolist()))
    return ()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _grid(sizes: list[int]) -> np.ndarray:
    return np.arange(math.prod(sizes)).reshape(sizes)
