"""What a compiled program sends between devices, read off its text."""

import math
import re

_COLLECTIVES = r"(?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?"
_SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def collectives_in_loops(hlo: str) -> list[int]:
    """The elements of the largest array of each collective inside the body of a while loop."""
    computations = _computations(hlo)
    inside: set[str] = set()
    queue = re.findall(r"\bbody=%?([\w.-]+)", hlo)
    while queue:
        name = queue.pop()
        if name not in inside and name in computations:
            inside.add(name)
            queue += re.findall(r"%([\w.-]+)", computations[name])
    found = []
    for name in inside:
        for line in computations[name].splitlines():
            match = re.search(rf"= (.*?) {_COLLECTIVES}\(", line)
            if match:
                shapes = _SHAPE.findall(match[1])
                found.append(max(math.prod(int(n) for n in s.split(",") if n) for s in shapes))
    return found


def _computations(hlo: str) -> dict[str, str]:
    """{name: text} of every computation: a line that ends in '{' opens one, '}' closes it."""
    found: dict[str, str] = {}
    name, lines = "", []
    for line in hlo.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line)
        if opened and not line.startswith(" "):
            name, lines = opened[1], []
        elif line.startswith("}"):
            found[name] = "\n".join(lines)
        else:
            lines.append(line)
    return found
