"""What a compiled program sends between devices, read off its text."""

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
        bytes: of its result on one device, once.
        groups: the devices that take part together, as positions in the mesh's flat order; empty where all do.
        times: how often it runs in one execution of the program: the product of the trips of the loops around it.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int


def collectives(text: str) -> list[Collective]:
    """All communications of a compiled program (``compiled.as_text()``).

    Of a conditional's branches the one that sends most counts. A loop whose trips the compiler does not know counts
    once.
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

    known: dict[str, list[Collective]] = {}

    def of(computation: str) -> list[Collective]:
        if computation not in known:
            known[computation] = [one for line in bodies.get(computation, []) for one in of_line(line)]
        return known[computation]

    def of_line(line: str) -> list[Collective]:
        if match := _INSTRUCTION.search(line):
            results = _results(match["kind"], match["shape"]) if match["start"] else match["shape"]
            size = sum(_bytes(*array) for array in _ARRAY.findall(results))
            return [Collective(match["kind"], size, _groups(line), 1)]
        if branches := _BRANCHES.search(line):
            options = [of(branch.strip(" %")) for branch in branches[1].split(",")]
            return max(options, key=lambda option: sum(one.bytes * one.times for one in option))
        trips = int(count[1]) if (count := _TRIPS.search(line)) else 1
        return [one._replace(times=one.times * trips) for called in _CALLED.findall(line) for one in of(called)]

    return of(entry)


def _results(kind: str, shape: str) -> str:
    """The results' part of the shape of an asynchronous communication's start.

    An ``all-reduce-start`` has the shape of its results. Every other kind has ``(operands, results)``, or
    ``(operands, results, context, …)``. Several combined into one have a tuple of results.
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
    """The groups in any of the forms that XLA writes.

    ``{{0,1},{2,3}}``; ``[2,2]<=[4]`` with an optional ``T(1,0)``, an iota reshaped, transposed and split; or
    ``mesh['a'=2,'b'=2] {'b'}``, devices in a grid that meet along the axes named, where ``, device_ids=([2,2]T(1,0))``
    may say in which order they fill the grid.
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source, turned = found.groups()
        grid = np.transpose(_grid(_numbers(source)), _numbers(turned) if turned else None)
        return tuple(map(tuple, grid.reshape(_numbers(shape)).tolist()))
    order = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", line):
        axes, source, turned, named = found.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        grid = _grid(list(sizes.values()))
        if source:
            grid = np.transpose(_grid(_numbers(source)), _numbers(turned)).reshape(grid.shape)
        along = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", named)]
        members = math.prod(grid.shape[axis] for axis in along)
        moved = np.moveaxis(grid, along, range(-len(along), 0))
        return tuple(map(tuple, moved.reshape(-1, members).tolist()))
    return ()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _grid(sizes: list[int]) -> np.ndarray:
    return np.arange(math.prod(sizes)).reshape(sizes)
