"""What hardware can do at best, and how long a step takes by that alone.

Peaks of dense bfloat16 products, capacity and bandwidth of memory, and of links, a
device. Sources: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x; NVIDIA's
data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200. Links of a TPU: the
documented bandwidth a chip in both directions, over its ports and directions. Whether a
torus closes: "How to Scale Your Model", Austin et al. 2025, chapter 2.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from okd_jax.errors import UserError

GIB = 2**30
_PASSES = {"all-reduce": 2}
_WHOLE = {"collective-permute": 1.0}
_NODE = 8  # GPUs that NVLink joins
_NAME = re.compile(r"gpu:([a-z]+\d+)x(\d+)|(\w+):(\d+(?:x\d+){0,2})")
EXAMPLES = "v5e:2x4, v5e:4x4, v6e:2x4, v4:2x2x4, v5p:4x4x4, gpu:h100x8"


class Chip(NamedTuple):
  """A device, of which a chip may hold two.

  flops: of bfloat16 products a second.
  hbm: bytes.
  hbm_rate: bytes a second.
  link: bytes a second over one link, in one direction.
  closes: a torus's side closes to a ring if it is a multiple of this; 0 for GPUs, which
    a switch joins.
  network: bytes a second of a device beyond its node, for GPUs.
  devices: that a chip holds. v4, v5p: both cores work as one device; TPU7x: as two.
  """

  flops: float
  hbm: float
  hbm_rate: float
  link: float
  closes: int = 0
  network: float = 0.0
  devices: int = 1


CHIPS = {
  "v4": Chip(275e12, 32 * GIB, 1228e9, 50e9, 4),
  "v5e": Chip(197e12, 16 * GIB, 819e9, 50e9, 16),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 100e9, 4),
  "v6e": Chip(918e12, 32 * GIB, 1638e9, 100e9, 16),
  "tpu7x": Chip(1153.5e12, 96 * GIB, 3690e9, 50e9, 4, devices=2),
  "a100": Chip(312e12, 80e9, 2039e9, 300e9, network=25e9),
  "h100": Chip(989e12, 80e9, 3350e9, 450e9, network=50e9),
  "h200": Chip(989e12, 141e9, 4800e9, 450e9, network=50e9),
  "b200": Chip(2250e12, 180e9, 7700e9, 900e9, network=50e9),
}


class Topology(NamedTuple):
  """Devices that are joined.

  name: as it was asked for, 'v5e:4x4'.
  kind: a key of CHIPS.
  sides: of the torus in chips; of GPUs how many.
  """

  name: str
  kind: str
  sides: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def of_gpus(self) -> bool:
    return self.chip.closes == 0

  @property
  def count(self) -> int:
    """How many devices."""
    return math.prod(self.sides) * self.chip.devices

  def rate(self, ways: int, span: int) -> float:
    """Bytes a second that a device sends and gets where `ways` of them are in a ring.

    A ring has two directions; a line's ends have one. A group larger than a side of the
    torus takes several sides, and all their links.

    span: devices from the first to the last of a group, as the mesh counts them.
    """
    if self.of_gpus:
      return self.chip.link if max(ways, span) <= _NODE else self.chip.network
    taken, rest = [], sorted(self.sides, reverse=True)
    while rest and (not taken or math.prod(taken) * self.chip.devices < ways):
      taken.append(rest.pop(0))
    closed = all(side % self.chip.closes == 0 for side in taken)
    return self.chip.link * len(taken) * (2 if closed else 1)


class Sent(NamedTuple):
  """Collectives that are alike.

  kind: 'all-gather', 'all-reduce', …
  what: whose, in a word or two.
  axes: of the mesh, '' where they are not known.
  bytes: of one call: the operand or the result, whichever is larger.
  times: calls by a step.
  in_loop: whether it is called in a loop.
  ways: devices that take part in one.
  span: see `Topology.rate`.
  apart: whether other work goes on meanwhile; None where no compiler has said it.
  """

  kind: str
  what: str
  axes: str
  bytes: int
  times: int
  in_loop: bool
  ways: int
  span: int
  apart: bool | None = None


def link_seconds(sent: Sequence[Sent], topology: Topology) -> float:
  """How long all of it takes, one after the other.

  A gather or a scatter of n parts passes (n - 1) / n of its bytes through each device,
  a sum twice as much, a permutation all of them.
  """
  total = 0.0
  for each in sent:
    if each.ways > 1:
      share = _PASSES.get(each.kind, 1) * (each.ways - 1) / each.ways
      share = _WHOLE.get(each.kind, share)
      passed = each.bytes * each.times * share
      total += passed / topology.rate(each.ways, each.span)
  return total


def roofline(
  topology: Topology,
  operations: float,
  useful: float,
  traffic: float,
  links: float,
  tokens: int,
  waited: float | None = None,
) -> dict[str, float]:
  """Seconds of a step by its parts, if they overlap and if not; MFU and tokens/s.

  MFU: useful operations of all devices by what they could do at their peak. As
  scheduled, all overlaps but what is waited for.

  Args:
    operations: of a device, those that are done twice counted twice.
    useful: of the whole step, each once.
    traffic: bytes that a device reads and writes.
    links: seconds (`link_seconds`).
    tokens: of the whole step.
    waited: what of `links` the program waits for; None where no compiler has said it.
  """
  chip = topology.chip
  parts = {
    "compute_s": operations / chip.flops,
    "hbm_s": traffic / chip.hbm_rate,
    "link_s": links,
  }
  steps = {"overlapped": max(parts.values()), "in_turn": sum(parts.values())}
  found = dict(parts)
  if waited is not None:
    found["link_waited_s"] = waited
    steps["scheduled"] = max(*list(parts.values())[:2], links - waited) + waited
  for name, step in steps.items():
    found |= {
      f"step_{name}_s": step,
      f"mfu_{name}": useful / (step * chip.flops * topology.count),
      f"tokens_per_s_{name}": tokens / step,
    }
  return found


def topology_of(name: str) -> Topology:
  """The topology that a name means, 'v5e:4x4' or 'gpu:h100x8'.

  Raises:
    UserError: with examples, for one that is not known.
  """
  found = _NAME.fullmatch(name.replace("v7x:", "tpu7x:"))
  gpu, gpus, tpu, sides = found.groups() if found else ("",) * 4
  kind, counts = (gpu, [gpus]) if gpu else (tpu, sides.split("x"))
  known = kind in CHIPS and (CHIPS[kind].closes == 0) == bool(gpu)
  if not known or not all(int(count) for count in counts):
    raise UserError(
      f"--topology={name} is not known; name one such as {EXAMPLES} (chips: "
      f"{', '.join(CHIPS)})"
    )
  return Topology(name, kind, tuple(map(int, counts)))


def span_of(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
  """Devices from the first to the last of a group along these axes."""
  names = list(mesh)
  if not axes:
    return 1
  return math.prod(mesh[name] for name in names[names.index(axes[0]) :])
