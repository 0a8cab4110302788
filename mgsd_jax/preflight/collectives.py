"""What a pass of a compiled decode loop waits for: collectives, read off the compiler's own text.

The chips of a pass have nothing to do while they sum activations: XLA leaves these collectives
synchronous, and the next product needs their result. Each costs what it carries over the links of
its group, and a latency for every chip that it crosses on the way.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from mgsd_jax.parallel.chips import HOP_SECONDS, Chip

Groups = list[list[int]]  # places in the mesh's devices
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_LOOP = re.compile(r"condition=%([\w.\-]+), body=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r"%(\S+) = s32\[\]\S* constant\((\d+)\)")
_BOUND = re.compile(r"ROOT .* compare\(%\S+, %([\w.\-]+)\), direction=LT")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=(\{\{[\d,{}]*\}\}|\{\})")


@dataclasses.dataclass(frozen=True)
class Waits:
    """Collectives one after another, on the slowest path of any chip."""

    collectives: float = 0.0
    hops: float = 0.0  # chips that their data cross, one after another
    link_bytes: float = 0.0  # what each link carries

    def seconds(self, chip: Chip) -> float:
        """At the peak of the links."""
        return self.link_bytes / chip.link_bytes_per_s + self.hops * HOP_SECONDS

    def __add__(self, other: "Waits") -> "Waits":
        return Waits(
            self.collectives + other.collectives,
            self.hops + other.hops,
            self.link_bytes + other.link_bytes,
        )

    def __mul__(self, times: int) -> "Waits":
        return Waits(self.collectives * times, self.hops * times, self.link_bytes * times)


def a_pass(text: str, mesh: Mesh, chip: Chip) -> Waits:
    """The waits of one turn of the innermost loop that ends by what it computes: one pass.

    `text` is that of a compiled program. Loops over a fixed number of layers count as often as
    they turn. What has no such loop waits for nothing. Raises ValueError for a form of groups that
    is not known.
    """
    bodies = _computations(text)
    coordinates = _coordinates(mesh)

    @functools.cache
    def count(name: str) -> tuple[Waits, Waits | None]:
        """(the waits of a computation, those of the pass in it)."""
        waits, found = Waits(), None
        for line in bodies[name]:
            if _COLLECTIVE.search(line):
                waits += _cost(line, coordinates, chip)
            loop = _LOOP.search(line)
            if loop is not None:
                inner, deeper = count(loop[2])
                turns = _turns(bodies[loop[1]])
                if turns is None:
                    deeper = deeper or inner + count(loop[1])[0]
                else:
                    waits += inner * turns
                found = _more(found, deeper)
            for called in _called(line):
                inner, deeper = count(called)
                waits, found = waits + inner, _more(found, deeper)
        return waits, found

    return count(next(name for name in bodies if name.startswith("ENTRY ")))[1] or Waits()


def sides(mesh: Mesh) -> list[int]:
    """How many chips of a slice lie along each direction."""
    return _sides(_coordinates(mesh))


def _coordinates(mesh: Mesh) -> np.ndarray:
    if mesh.devices.flat[0].platform != "tpu":
        return np.zeros((mesh.size, 3), int)
    return np.array([device.coords for device in mesh.devices.flat])


def _sides(coordinates: np.ndarray) -> list[int]:
    return (np.ptp(coordinates, axis=0) + 1).tolist()


def _more(first: Waits | None, second: Waits | None) -> Waits | None:
    return max(filter(None, (first, second)), key=lambda waits: waits.hops, default=None)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; the program's own begins with 'ENTRY '."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            lines = found["ENTRY " * line.startswith("ENTRY") + head[1]] = []
        else:
            lines.append(line)
    return found


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from re.findall(r"%([\w.\-]+)", branches)


def _turns(condition: Sequence[str]) -> int | None:
    """How often a loop turns that counts from 0 to a constant; None for any other."""
    constants = {m[1]: int(m[2]) for line in condition if (m := _CONSTANT.search(line))}
    bounds = [m[1] for line in condition if (m := _BOUND.search(line))]
    return constants.get(bounds[0]) if bounds else None


def _cost(line: str, coordinates: np.ndarray, chip: Chip) -> Waits:
    """The waits of one collective: reductions cross their group twice, all others once."""
    found = _COLLECTIVE.search(line)
    assert found is not None
    kind, size, groups = found[2], _bytes(found[1], "-start(" in line), _groups(line, coordinates)
    members = max(map(len, groups))
    if members < 2:
        return Waits()
    share = (members - 1) / members
    phases, received = {
        "all-reduce": (2, 2 * share * size),
        "all-gather": (1, share * size),
        "reduce-scatter": (1, (members - 1) * size),
        "all-to-all": (1, share * size),
        "collective-permute": (1, size),
    }[kind]
    worst = Waits()
    for group in groups:
        lengths = _sides(coordinates[group])
        hops = sum(map(chip.hops, lengths))
        if hops:
            waits = Waits(1, phases * hops, received / chip.links(lengths))
            worst = max(worst, waits, key=lambda waits: waits.hops)
    return worst


def _bytes(shape: str, is_started: bool) -> float:
    """Bytes of a result. What has been started holds its operand too, and perhaps semaphores."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * (int(bits) / 8 if bits else 1)
        for _, bits, dims in _ARRAY.findall(shape)
    ]
    return max(sizes) if is_started else sum(sizes)


def _groups(line: str, coordinates: np.ndarray) -> Groups:
    """Who takes part together: places in the mesh, from any form in which XLA prints them."""
    if named := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = re.findall(r"'(\w+)'", named[2])
        if re.fullmatch(r"('\w+'(, ?)?)+", named[2]) and set(inside) <= set(sizes):
            places = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
            axes = [list(sizes).index(name) for name in inside]
            last = list(range(-len(axes), 0))
            count = math.prod(sizes[name] for name in inside)
            return np.moveaxis(places, axes, last).reshape(-1, count).tolist()
    if iota := _IOTA.search(line):
        shape, dims = (list(map(int, iota[i].split(","))) for i in (1, 2))
        places = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            places = places.transpose(list(map(int, iota[3].split(","))))
        return places.reshape(shape[0], -1).tolist()
    if listed := _LISTED.search(line):
        found = re.findall(r"\{([\d,]+)\}", listed[1])
        groups = [list(map(int, group.split(","))) for group in found]
        return groups or [list(range(len(coordinates)))]
    raise ValueError(f"collective: got groups of an unknown form in {line.strip()[:300]!r}")
