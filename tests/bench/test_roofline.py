"""The arithmetic of a plan, by numbers made by hand."""

import pytest

from okd_jax.bench import groups
from okd_jax.bench.roofline import (
  CHIPS,
  Sent,
  Topology,
  link_seconds,
  roofline,
  span_of,
  topology_of,
)
from okd_jax.errors import UserError

V5E = topology_of("v5e:4x4")
MESH = {"data": 2, "fsdp": 4, "tensor": 2}


def sent(kind, size, times, ways, span=1):
  return Sent(kind, "", "", size, times, False, ways, span)


def test_topologies():
  assert topology_of("v5e:2x4").count == 8 and V5E.count == 16
  assert topology_of("v5p:2x2x4").count == 16 and topology_of("v4:2x2x4").count == 16
  assert topology_of("v7x:2x2x1").count == 8  # two devices a chip
  gpus = topology_of("gpu:h100x8")
  assert gpus.count == 8 and gpus.of_gpus and not V5E.of_gpus


@pytest.mark.parametrize(
  "name",
  ["", "v5e", "v5e:", "v9:2x2", "gpu:h100", "gpu:v5ex8", "h100:8", "v5e:0x4", "gpu:8"],
)
def test_an_unknown_topology_is_a_sentence_with_examples(name):
  with pytest.raises(
    UserError, match="is not known; name one such as v5e:2x4"
  ) as found:
    topology_of(name)
  assert "\n" not in str(found.value)


def test_rates_of_rings_and_lines():
  assert V5E.rate(4, 4) == 50e9  # a side of four closes in none
  assert V5E.rate(16, 16) == 100e9  # over both sides
  assert topology_of("v5e:16x16").rate(16, 16) == 100e9  # a ring has two directions
  cube = topology_of("v5p:4x4x4")
  assert cube.rate(4, 4) == 200e9 and cube.rate(64, 64) == 600e9
  two = topology_of("gpu:h100x16")
  assert two.rate(8, 8) == 450e9 and two.rate(16, 16) == 50e9
  assert two.rate(2, 16) == 50e9  # of two, one in each node


def test_seconds_of_links():
  """100 MB gathered from four devices pass 75 MB; a sum passes twice that."""
  assert link_seconds([sent("all-gather", 10**8, 1, 4)], V5E) == pytest.approx(1.5e-3)
  assert link_seconds([sent("all-reduce", 10**8, 2, 4)], V5E) == pytest.approx(6e-3)
  moved = [sent("collective-permute", 10**8, 1, 4)]
  assert link_seconds(moved, V5E) == pytest.approx(2e-3)
  assert link_seconds([sent("all-gather", 10**8, 1, 1)], V5E) == 0


def test_a_roofline_by_hand():
  """One second of compute, half a one of memory, a quarter of links, on one device."""
  one = Topology("", "v5e", (1,))
  flops, rate = CHIPS["v5e"].flops, CHIPS["v5e"].hbm_rate
  found = roofline(one, flops, 0.75 * flops, rate / 2, 0.25, 1000)
  parts = {name: found[f"{name}_s"] for name in ("compute", "hbm", "link")}
  assert parts == pytest.approx({"compute": 1, "hbm": 0.5, "link": 0.25})
  assert found["step_overlapped_s"] == 1 and found["step_in_turn_s"] == 1.75
  assert found["mfu_overlapped"] == 0.75
  assert found["mfu_in_turn"] == pytest.approx(0.75 / 1.75)
  assert found["tokens_per_s_overlapped"] == 1000
  assert "step_scheduled_s" not in found  # no program, no schedule
  waits = roofline(one, flops, 0.75 * flops, rate / 2, 1.5, 1000, waited=0.25)
  assert waits["step_scheduled_s"] == 1.5  # 1.25 of links beside 1 of compute


def test_groups_of_devices():
  first = groups.first_group
  assert first("replica_groups={{0,2},{4,6}}, to_apply=x") == (0, 2)
  assert first("replica_groups=[4,2]<=[8], dimensions={0}") == (0, 1)
  named = "replica_groups=mesh['a'=4,'b'=1,'c'=2] {'c'}, to_apply=x"
  assert first(named) == (0, 1)
  ordered = "mesh['a'=1,'b'=2,'c'=4], device_ids=([2,4]T(1,0)) {'b'}"
  assert first(f"replica_groups={ordered}") == (0, 1 * 2)
  assert first("replica_groups=mesh['a'=8] {'a':(2)2}") == (0, 2)
  assert first("replica_groups={}") == ()
  text = "  ROOT %x.1 = f32[2] all-reduce(%y), replica_groups={{0,1}}, to_apply=%s"
  assert groups.groups_of(text) == {"x.1": (0, 1)}


def test_axes_and_spans():
  assert groups.axes_along((0, 8), MESH) == ("data",)
  assert groups.axes_along((0, 1, 2, 3), MESH) == ("fsdp", "tensor")
  assert groups.axes_along((), MESH) == ("data", "fsdp", "tensor")
  assert span_of(("tensor",), MESH) == 2 and span_of(("fsdp",), MESH) == 8
  assert span_of(("data",), MESH) == 16 and span_of((), MESH) == 1
