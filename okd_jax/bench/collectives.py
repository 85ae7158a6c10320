"""What a compiled program sends between devices, read from its text.

XLA decides on the collectives, not the code; so whoever promises that none stands in
a loop, or adds up the bytes of a step, must ask the program.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)


class Collective(NamedTuple):
  """One collective of a program.

  kind: one of KINDS.
  bytes: of a device, of one call: the operand or the result, whichever is larger.
  in_loop: whether it is called from within some while loop.
  name: of the instruction.
  ways: devices that take part in it together; 0 is all.
  times: calls by a run of the program; 0 where a loop does not tell its count.
  source: the JAX operation it came from, '' where XLA says none.
  apart: whether it is begun and awaited apart, with other work between.
  """

  kind: str
  bytes: int
  in_loop: bool
  name: str
  ways: int
  times: int
  source: str
  apart: bool


class _Place(NamedTuple):
  """How a computation is reached from the entry; source, caller: of who calls it."""

  in_loop: bool
  times: int
  source: str
  caller: str


_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_OP = re.compile(
  rf"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(.*$"
)
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_CALLS = re.compile(
  r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
# How a TPU's compiler writes one that goes on beside products: where it begins, in each
# of these, and where it is awaited.
_BEGUN, _AGAIN = (
  "async-collective-start",
  re.compile(r"async-collective-done|async_collective_fusion"),
)
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)')


def collectives(text: str) -> list[Collective]:
  """All collectives of a compiled program, in no particular order.

  One that is begun and awaited apart counts once, by its start.

  Args:
    text: of the optimised program, `jax.stages.Compiled.as_text()`; what its entry does
      not reach is left out.

  Source: XLA's HLO text format, https://openxla.org/xla/operation_semantics.
  """
  bodies, entry = _computations(text)
  places = _places(bodies, entry)
  return [
    _read(line[0], *line.groups()[:4], computation, place)
    for computation, place in places.items()
    if not (_AGAIN.match(computation) or _AGAIN.match(place.caller))
    for line in map(_OP.match, bodies[computation])
    if line
  ]


def _read(
  line: str,
  name: str,
  result: str,
  kind: str,
  start: str | None,
  computation: str,
  place: _Place,
) -> Collective:
  ways, size = _ways(line), _bytes(result)
  if start and kind == "all-gather" and ways:
    size = size * ways // (ways + 1)  # the pair of operand and result
  elif start and kind != "all-reduce":
    size //= 2
  if kind == "reduce-scatter":
    size *= max(ways, 1)
  # How a TPU's compiler writes a reduce-scatter: a fusion of a sum and a slice.
  if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  source = _source(line) or place.source
  apart = bool(start) or place.caller.startswith(_BEGUN)
  return Collective(kind, size, place.in_loop, name, ways, place.times, source, apart)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """({computation: its lines}, the entry's name)."""
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    if head := _HEAD.match(line):
      name = head[2]
      bodies[name] = []
      entry = name if head[1] else entry
    elif name:
      bodies[name].append(line)
  return bodies, entry


def _places(bodies: dict[str, list[str]], entry: str) -> dict[str, _Place]:
  """How each computation is reached; of several ways, one through a loop."""
  places: dict[str, _Place] = {}
  todo = [(entry, _Place(False, 1, "", ""))]
  while todo:
    name, place = todo.pop()
    known = places.get(name)
    if name not in bodies or known and known.in_loop >= place.in_loop:
      continue
    places[name] = place
    for line in bodies[name]:
      todo += _called(line, place, bodies)
  return places


def _called(
  line: str, place: _Place, bodies: dict[str, list[str]]
) -> Iterator[tuple[str, _Place]]:
  """(computation, how it is reached) of all that a line calls."""
  calls = dict(_CALLS.findall(line))
  name = _NAME.match(line)
  caller = name[1] if name else ""
  place = place._replace(source=_source(line) or place.source, caller=caller)
  if "body" in calls:
    condition, body = (bodies.get(calls[part], []) for part in ("condition", "body"))
    trips = _trips(line, condition, body)
    place = place._replace(in_loop=True, times=place.times * trips)
  for name in calls.values():
    yield name, place
  for names in _LISTED.findall(line):
    for name in names.split(","):
      yield name.strip().removeprefix("%"), place


def _trips(line: str, condition: list[str], body: list[str]) -> int:
  """How often a loop runs that begins at 0; 0 where nothing tells."""
  if known := _TRIPS.search(line):
    return int(known[1])
  bounds = re.findall(r" [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition))
  return -(-int(bounds[0]) // _stride(condition, body)) if len(bounds) == 1 else 0


def _stride(condition: list[str], body: list[str]) -> int:
  """What a loop adds to its counter each time; 1 where that cannot be seen."""
  defined = {found[1]: line for line in body if (found := _NAME.match(line))}
  counter = re.search(r"get-tuple-element\(.*index=(\d+)", "\n".join(condition))
  if not counter or not body:
    return 1
  root = next(line for line in body if line.startswith("  ROOT "))
  carried = re.findall(r"%([\w.-]+)", root.partition(" tuple(")[2].partition(")")[0])
  added = re.search(
    r" add\(%\S+, %([\w.-]+)\)", defined.get(carried[int(counter[1])], "")
  )
  constant = added and re.search(r" constant\((\d+)\)", defined.get(added[1], ""))
  return int(constant[1]) if constant else 1


def _source(line: str) -> str:
  found = re.search(r'op_name="([^"]*)"', line)
  return found[1] if found else ""


def _ways(line: str) -> int:
  """How many devices are in a group; 0 where the line lists none."""
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(listed[1].split(","))
  if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
    return int(counted[2])
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return 0


def _bytes(result: str) -> int:
  """Of all arrays of a type, which may be a tuple."""
  total = 0
  for kind, bits, sizes in _SHAPE.findall(result):
    count = math.prod(int(size) for size in sizes.split(",") if size)
    total += count * (int(bits) if bits else 8 * (kind == "pred")) // 8
  return total
