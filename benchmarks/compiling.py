"""CPU seconds that XLA needs to compile a step for TPUs, by part.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/compiling.py \\
        [--config=gpt2:large] [--topology=v5e:2x4] [--layers=4] [--config.key=value …]

Compiles the whole step, the layers alone (hidden states of all models and their
gradients), and the update alone, ahead of time; --layers cuts all models to so many
layers, 0 leaves them whole. Needs the extra `tpu`, and no TPU.
"""

import argparse
import dataclasses
import functools
import resource

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from okd_jax.bench.layouts import asked, laid_out
from okd_jax.bench.planning import tpu_devices
from okd_jax.bench.roofline import topology_of
from okd_jax.config import read
from okd_jax.config.unstaged import without_stages
from okd_jax.run import ahead
from okd_jax.run.job import check
from okd_jax.runtime import cli, sharding

VOCAB = 50257


def main(arguments: list[str]) -> None:
  """Prints a line for each part."""
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument("--topology", default="v5e:2x4")
  parser.add_argument("--layers", type=int, default=0)
  args, rest = parser.parse_known_args(arguments)
  topology = topology_of(args.topology)
  job = check(without_stages(read.read(rest)))
  shape = ahead.outline(job.settings, VOCAB)
  if args.layers:
    cut = [dataclasses.replace(shape.student, num_layers=args.layers)]
    cut += [
      dataclasses.replace(t, num_layers=args.layers) for t in shape.teachers.values()
    ]
    names = dict(zip(shape.teachers, cut[1:], strict=True))
    shape = dataclasses.replace(shape, student=cut[0], teachers=names)
  layout = asked(job.settings, topology.count)
  run = ahead.ahead(laid_out(job, layout, "splash", VOCAB), shape)
  mesh = jax.make_mesh(
    layout[:3],
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=tpu_devices(topology),
  )
  layers = [shape.student.num_layers, *(t.num_layers for t in shape.teachers.values())]
  print(f"{args.topology}, {layout}, layers of student and teachers: {layers}")
  told("step", functools.partial(run.compiled, mesh, layout.teacher))
  with jax.set_mesh(mesh):
    told("layers", functools.partial(of_layers, run, mesh))
    told("update", functools.partial(of_update, run, mesh))


def told(name: str, compiled: functools.partial) -> None:
  """Compiles and says what it cost this process, all its threads together."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
  compiled()
  seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
  print(f"{name:8} {seconds:7.1f} s", flush=True)


def of_layers(run: ahead.Ahead, mesh: jax.sharding.Mesh) -> None:
  """Hidden states of student and teachers, and gradients of their sum."""
  apply, params = run.plan.models, _placed(run.plan.abstract.params, mesh)

  def loss(params: PyTree, frozen: PyTree, batch: PyTree):
    outputs = [apply.student(params["student"], batch, jax.random.key(0))]
    for name, teacher in apply.teachers.items():
      adapter = params.get("adapter", {}).get(name)
      if adapter is None:
        outputs.append(teacher.apply(frozen[name], None, batch))
      else:
        outputs += teacher.both(frozen[name], adapter, batch)
    return sum(jnp.sum(x.hidden.astype(jnp.float32)) for x in outputs)

  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)
    ),
    run.batch,
  )
  jax.jit(jax.grad(loss)).lower(params, _placed(run.frozen, mesh), batch).compile()


def of_update(run: ahead.Ahead, mesh: jax.sharding.Mesh) -> None:
  """The optimisers' update of all trained trees."""
  state, optimizers = run.plan.abstract, run.plan.optimizers

  def update(params: PyTree, moments: PyTree, grads: PyTree) -> PyTree:
    found = {}
    for name in params:
      new, own = optimizers[name].update(grads[name], moments[name], params[name])
      found[name] = optax.apply_updates(params[name], new), own
    return found

  params = _placed(state.params, mesh)
  moments = _placed(state.opt_state, mesh)
  step = jax.jit(update, donate_argnums=(0, 1))
  step.lower(params, moments, params).compile()


def _placed(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    sharding.shardings(tree, mesh),
  )


if __name__ == "__main__":
  cli.run(main)
