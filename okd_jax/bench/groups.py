"""Which devices take part in a collective, and along which axes of a mesh they lie."""

import re
from collections.abc import Mapping

import numpy as np

_LINE = re.compile(
  r"^\s+(?:ROOT )?%?([\w.-]+) = .*?\b((?:replica_groups|source_target_pairs)=.*)$"
)
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
  r"replica_groups=mesh\[([^\]]*)\]"
  r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_PAIR = re.compile(r"\{(\d+),(\d+)\}")


def groups_of(text: str) -> dict[str, tuple[int, ...]]:
  """{instruction: partitions of its first group} of a program's collectives.

  Of a permutation it is the first pair that differs. () where none is told: all.
  """
  found = map(_LINE.match, text.splitlines())
  return {line[1]: first_group(line[2]) for line in found if line}


def first_group(text: str) -> tuple[int, ...]:
  """The partitions that XLA's 'replica_groups=…' or 'source_target_pairs=…' name first.

  >>> first_group("replica_groups=[2,4]<=[2,2,2]T(1,0,2), use_global_device_ids=true")
  (0, 1, 4, 5)
  >>> first_group("source_target_pairs={{0,0},{1,2},{2,1}}")
  (1, 2)
  """
  if text.startswith("source_target_pairs"):
    pairs = [(int(a), int(b)) for a, b in _PAIR.findall(text) if a != b]
    return pairs[0] if pairs else ()
  if listed := _LISTED.match(text):
    return _numbers(listed[1])
  if counted := _COUNTED.match(text):
    ids = _ids(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))
    return tuple(map(int, ids[0]))
  if named := _NAMED.match(text):
    return _along(*named.groups())
  return ()


def axes_along(group: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The axes of a mesh along which the members of a group differ; () is all of them.

  >>> axes_along((0, 2), {"data": 2, "fsdp": 2, "tensor": 2})
  ('fsdp',)
  """
  if not group:
    return tuple(axis for axis, size in mesh.items() if size > 1)
  places = np.unravel_index(group, tuple(mesh.values()))
  pairs = zip(mesh, places, strict=True)
  return tuple(axis for axis, where in pairs if len(set(where.tolist())) > 1)


def _along(axes: str, dims: str | None, order: str | None, named: str) -> tuple:
  """The first group along named axes, or parts of them, of XLA's own mesh."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  shape, parts = [], []
  wanted = {n: (p, s) for n, p, s in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)}
  for name, size in sizes.items():
    before, part = wanted.get(name, ("", ""))
    if name in wanted and part:  # an axis in three: what comes before, itself, the rest
      shape += [int(before), int(part), size // int(before) // int(part)]
      parts += [False, True, False]
    else:
      shape.append(size)
      parts.append(name in wanted)
  total = str(int(np.prod(shape)))
  ids = _ids(dims or total, order).reshape(shape)
  first = ids[tuple(slice(None) if part else 0 for part in parts)]
  return tuple(map(int, first.reshape(-1)))


def _ids(dims: str, order: str | None) -> np.ndarray:
  ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(",")))
