"""Programs for TPUs, compiled ahead of time where there is none.

    pip install -e '.[test,tpu]'
    JAX_PLATFORMS=cpu python -m pytest -m slow -n 0 -s tests/run/test_tpu.py

also prints what each step would need of a device's memory.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from okd_jax import methods, models
from okd_jax.bench import measure
from okd_jax.bench.collectives import collectives
from okd_jax.config.schema import OptimSettings
from okd_jax.data.batch import Batch
from okd_jax.models import Decoder, kernels
from okd_jax.models.adapters import Lora
from okd_jax.run import optim
from okd_jax.run.state import init_state
from okd_jax.run.step import compile_step
from okd_jax.runtime import sharding

pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[tpu]'")
pytestmark = pytest.mark.slow

TOPOLOGY = "v5e:2x2"
ROWS, LENGTH, VOCAB = 8, 1024, 50257


@pytest.fixture(scope="module")
def devices():
  # Nobody is asked what machine this is: it is none of Google's.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  return topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices


def make_mesh(devices, *sizes: int) -> Mesh:
  return Mesh(
    np.array(devices).reshape(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * 3
  )


def decoders(kernel: str, dtype, remat: bool, vocab: int) -> dict[str, Decoder]:
  """GPT-2's widths, four layers to two, so that attention is what fills the memory."""
  shape = functools.partial(
    models.preset,
    "gpt2",
    vocab_size=vocab,
    hidden_size=768,
    num_heads=12,
    max_length=LENGTH,
  )
  make = functools.partial(Decoder, dtype=dtype, remat=remat, attention=kernel)
  student, teacher = shape(num_layers=2), shape(num_layers=4)
  return {
    "student": make(student),
    "teacher": make(teacher),
    "adapted": make(teacher, Lora(rank=8)),
  }


def compiled(mesh: Mesh, kernel: str, dtype=jnp.bfloat16, remat=False, vocab=VOCAB):
  """A whole step of okd; nothing of it is ever in memory."""
  cast = decoders(kernel, dtype, remat, vocab)
  method = methods.build("okd", {})
  settings = OptimSettings(lr=1e-4, schedule="constant", weight_decay=1e-2, clip=1.0)
  rate = optim.schedule(settings, 100)
  optimizers = {name: optim.build(settings, rate) for name in ("student", "adapter")}

  def start():
    key, tokens = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    tree = {name: decoder.init(key, tokens) for name, decoder in cast.items()}
    params = {
      "student": tree["student"]["params"],
      "adapter": {"teacher": tree["adapted"]["adapter"]},
    }
    frozen = jax.tree.map(lambda x: x.astype(dtype), tree["teacher"]["params"])
    return init_state(params, optimizers, key), {"teacher": frozen}

  state, frozen = jax.eval_shape(start)
  frozen = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    frozen,
    sharding.shardings(frozen, mesh),
  )
  types = dict(tokens=jnp.int32, labels=jnp.int32, mask=bool, segment_ids=jnp.int32)
  rows = {k: jax.ShapeDtypeStruct((ROWS, LENGTH), v) for k, v in types.items()}
  batch = Batch.of(rows)
  teachers, adapted = ({"teacher": cast[name]} for name in ("teacher", "adapted"))
  apply = methods.apply_functions(cast["student"], teachers, adapted, 128)
  step = compile_step(method, apply, optimizers, 1, 100, state, mesh)
  with jax.set_mesh(mesh):
    return step.lower(state, frozen, batch).compile()


def squares(program) -> set[str]:
  """Shapes of arrays that are as long as a row twice."""
  shapes = set(re.findall(r"\[([\d,]+)\]", program.as_text()))
  return {s for s in shapes if s.split(",").count(str(LENGTH)) > 1}


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 2)], ids=["data", "fsdp_tensor"])
def test_a_step_with_splash_attention_holds_no_scores(devices, sizes):
  programs = {
    kernel: compiled(make_mesh(devices, *sizes), kernel) for kernel in ("xla", "splash")
  }
  for kernel, program in programs.items():
    memory = measure.mebibytes(measure.memory(program))
    print(f"\n{TOPOLOGY} {sizes} {kernel}: {memory}", end="")
  # The measure works: XLA's scores are seen.
  assert any(shape.endswith(f"{LENGTH},{LENGTH}") for shape in squares(programs["xla"]))
  assert not squares(programs["splash"])
  assert "tpu_custom_call" in programs["splash"].as_text()


def test_a_step_in_float32_and_with_remat_compiles(devices):
  program = compiled(make_mesh(devices, 2, 2, 1), "splash", jnp.float32, remat=True)
  assert not squares(program)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_splash_attention_takes_heads_of_any_size(devices, head_dim, dtype):
  """Grouped heads that the tensor axis divides, and rows of both block sizes."""
  mesh = make_mesh(devices, 2, 1, 2)
  where = NamedSharding(mesh, PartitionSpec("data"))
  make = functools.partial(jax.ShapeDtypeStruct, sharding=where)

  def loss(query, key, value, segment_ids):
    out = kernels.splash(query, key, value, segment_ids)
    return jnp.sum(out.astype(jnp.float32))

  for length in (384, LENGTH):
    qkv = [make((4, length, count, head_dim), dtype) for count in (4, 2, 2)]
    segment_ids = make((4, length), jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    with jax.set_mesh(mesh):
      program = gradient.lower(*qkv, segment_ids).compile()
    assert program.as_text().count("tpu_custom_call") >= 3  # out, dq, dk and dv


def test_under_fsdp_hardly_a_layer_waits_for_weights(devices):
  """Those of a product come during the one before, student's and teacher's alike.

  And no gradient is added up whole: each device gets its part, of tables, too.
  """
  mesh = make_mesh(devices, 1, 4, 1)
  program = compiled(mesh, "splash", remat=True, vocab=50304)
  found = [each for each in collectives(program.as_text()) if each.bytes > 10**5]
  kernel = 2 * 768**2  # bytes of a query's
  layers = [x for x in found if x.in_loop and "Decoder._layers" in x.source]
  gathers = [x for x in layers if x.kind in ("all-gather", "collective-permute")]
  assert sum(x.bytes * x.times for x in gathers) > 2 * 6 * 12 * kernel * 3 / 4
  waited = [x.bytes for x in gathers if not x.apart]
  assert waited == [kernel] * len(waited) and len(waited) <= 3  # of 5 loops
  assert "all-reduce" not in {x.kind for x in found}
  scattered = [x.bytes for x in found if x.kind == "reduce-scatter"]
  assert sum(size >= 2 * 50304 * 768 for size in scattered) == 2  # lookup and head
