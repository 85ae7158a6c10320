"""Collectives are read from a program's text as they stand in it."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from okd_jax.bench.collectives import collectives

# Two forms that a TPU's compiler writes and a CPU's does not.
TPU = """HloModule jit_f

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %input = bf16[64,8]{1,0} parameter(0)
  %all-reduce.7 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.7), dynamic_slice_sizes={16,8}
}

%body (p: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %fusion.1 = bf16[16,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/dot"}
}

%cond (p: (s32[], bf16[64,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %ag = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), replica_groups=mesh['a'=2,'b'=8], device_ids=([2,8]T(1,0)) {'b':(1)4}, dimensions={0}
  %ag-done = f32[8,8]{1,0} all-gather-done(%ag)
  %w = (s32[], bf16[64,8]) while(%t), condition=%cond, body=%body
}
"""  # noqa: E501


def test_what_a_tpu_writes():
  gather, scatter = sorted(collectives(TPU))
  assert gather == ("all-gather", 256, False, "ag", 4, 1, "", True)
  found = ("reduce-scatter", 1024, True, "all-reduce.7", 4, 6, "jit(f)/dot", False)
  assert scatter == found


# A gather begun before a loop, which goes on beside the products in it.
BESIDE = """HloModule jit_f

%begin (x: f32[2,8]) -> f32[8,8] {
  %ag.1 = f32[8,8]{1,0} all-gather(%x), channel_id=5, replica_groups={{0,1,2,3}}
}

%async_collective_fusion.3 (x: f32[2,8]) -> f32[8,8] {
  %dot = f32[8,8]{1,0} convolution(%x, %x)
  %ag.2 = f32[8,8]{1,0} all-gather(%x), channel_id=5, replica_groups={{0,1,2,3}}
}

%end (x: f32[2,8]) -> f32[8,8] {
  %ag.3 = f32[8,8]{1,0} all-gather(%x), channel_id=5, replica_groups={{0,1,2,3}}
}

%body (p: (f32[2,8], u32[])) -> (f32[2,8], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %x = f32[2,8]{1,0} get-tuple-element(%p), index=0
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %cp = (f32[2,8]{1,0}, f32[2,8]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %moved = f32[2,8]{1,0} collective-permute-done(%cp)
  %fusion.3 = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.3
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %carry = (f32[2,8]{1,0}, u32[]{:T(128)}) tuple(%moved, /*index=1*/%next)
}

%cond (p: (f32[2,8], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(7)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %async-collective-start.1 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %w = (f32[2,8], u32[]) while(%t), condition=%cond, body=%body
  %async-collective-done.1 = f32[8,8]{1,0} fusion(%w), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_one_that_goes_on_beside_products_counts_once():
  """And a loop that counts in twos runs half as often."""
  gather, permute = sorted(collectives(BESIDE))
  assert gather == ("all-gather", 256, False, "ag.1", 4, 1, "", True)
  assert permute == ("collective-permute", 64, True, "cp", 0, 4, "", True)


def test_a_program_for_eight_devices():
  """A gather in a loop of a known count, a sum after a loop of an unknown one."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  rows, layers, whole = (
    NamedSharding(mesh, spec) for spec in (P("x"), P(None, "x"), P())
  )

  def f(weights, x, count):
    def layer(x, weight):
      return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole)), None

    x, _ = jax.lax.scan(layer, x, weights)
    x = jax.lax.fori_loop(0, count, lambda i, x: x * 2, x)
    return x.sum()

  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    for shape, where in (((6, 16, 16), layers), ((32, 16), rows))
  ]
  lowered = jax.jit(f).lower(*shapes, jax.ShapeDtypeStruct((), jnp.int32))
  gather, total = sorted(collectives(lowered.compile().as_text()))
  assert gather[:3] == ("all-gather", 4 * 16 * 16, True) and gather.times == 6
  assert total[:3] == ("all-reduce", 4, False) and total.times == 1
  assert gather.ways in (0, 8) and "while/body" in gather.source
