"""Whether a run on many devices is the run on one: losses, text and trained weights.

    python benchmarks/meshes.py --output=meshes.md
    python benchmarks/meshes.py --processes=2 --devices=2 --output=two.md
    python benchmarks/meshes.py --names=okd --meshes=fsdp=8xteacher=fsdp

Trains every method and every kind of adapter for some steps, in float32 and from random
weights, on one device and on meshes of simulated CPU devices, in one or more processes.
A mesh is its axes joined by 'x', 'data=2xtensor=4'; 'teacher=fsdp' among them is
mesh.teacher. A cell of the table holds the largest difference of a step's loss, and
the largest of a trained weight relative to the largest weight of its array; where
sampled text differs it names the first such step. Where one is above 1e-4, the last
column shows what rounding alone does: one device again, all weights moved by one part
in 2^23 before the first step, up or down at random; the largest of three draws.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command import vary
from ml_collections import ConfigDict

from configs import default
from okd_jax import METHODS, methods, models
from okd_jax.data import PAD_ID, train_loader
from okd_jax.errors import UserError
from okd_jax.models import adapters
from okd_jax.run import beforehand
from okd_jax.run.batches import Batches
from okd_jax.run.build import Run, build
from okd_jax.run.step import compile_step
from okd_jax.runtime import cli, distributed, sharding
from okd_jax.runtime.workdir import Workdir

ONE, NUDGED = "data=1", [f"data=1xnudged={draw}" for draw in (1, 2, 3)]
MESHES = ("data=8", "fsdp=8", "tensor=2", "tensor=4", "data=2xfsdp=2xtensor=2")
OF_SEVERAL = ("okd", "gkd", "minillm", "ensemble", "clda")
# What a method does besides, if asked: a gate, a policy, rows that are replayed.
VARIANTS = (
  "ensemble@method.weighting=gated",
  "ensemble@method.weighting=reinforced",
  "gkd@method.replay=True@method.sampled_share=1.0",
)
VOCABULARY = 261  # which no tensor axis divides
ROWS, LENGTH, PROMPT = 8, 32, 16
FAR = 1e-4  # above it, what rounding alone does is measured, too
WORDS = "the old red fox ran over a hill and saw its own long shadow there".split()

Arrays = Mapping[str, np.ndarray]


def main(arguments: list[str]) -> None:
  """Prints the comparison that the arguments ask for."""
  args = _parser().parse_args(arguments)
  if args.child:
    _train_all(args)
    return
  _complete(args)
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(args.keep or folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_inputs(folder)
    found = {m: _found(args, folder, m, args.names) for m in (ONE, *args.meshes)}
    far = _far(args, found)
    found |= {m: _found(args, folder, m, far) for m in NUDGED}
  text = "\n".join(_table(args, found)) + "\n"
  print(text, end="")
  if args.output:
    Path(args.output).write_text(text, encoding="utf8")


def _complete(args: argparse.Namespace) -> None:
  """Fills in what was not asked for; a UserError for a name or mesh that is wrong."""
  several, count = args.processes > 1, args.processes * args.devices
  kinds = [f"okd@adapter.kind={kind}" for kind in adapters.KINDS]
  args.names = args.names or (
    OF_SEVERAL if several else [*sorted(METHODS), *VARIANTS, *kinds]
  )
  for name in args.names:
    methods.find(name.partition("@")[0])
  whole = [f"{axis}={count}" for axis in sharding.AXES]
  args.meshes = args.meshes or (whole if several else MESHES)
  for mesh in args.meshes if several else ():
    if _size(mesh) != count:
      raise UserError(f"--meshes={mesh} is not of {args.processes} x {args.devices}")


# What every run reads


def _write_inputs(folder: Path) -> None:
  """Made rows and two random teachers."""
  draw = random.Random(0)
  with (folder / "rows.jsonl").open("w", encoding="utf8") as file:
    for _ in range(5 * ROWS):
      prompt, answer = (
        " ".join(draw.choices(WORDS, k=k)) for k in (2, draw.choice((2, 3, 4)))
      )
      print(json.dumps({"prompt": prompt, "completion": answer}), file=file)
  for seed, name in enumerate(("good", "other")):
    shape = dict(hidden_size=64, num_layers=4, num_heads=8, max_length=LENGTH)
    config = models.preset("llama", vocab_size=VOCABULARY, **shape)
    params = models.init(config, jax.random.key(seed))
    # Sharper than a model is born, or nobody would have anything to learn.
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
    models.save(folder / name, params, config)


def _config(folder: Path, name: str, mesh: str) -> ConfigDict:
  config = default.get_config()
  config.teacher.path = str(folder / "good")
  config.student.model.hidden_size = 32
  config.adapter.rank = 4
  config.adapter.length = 4
  config.data.train = str(folder / "rows.jsonl")
  config.data.holdout = ROWS
  config.data.tokenizer = f"bpe:{VOCABULARY}"
  config.data.max_length = LENGTH
  config.data.max_prompt_length = PROMPT
  config.data.overlong_prompt = "truncate"
  config.train.batch_size = ROWS
  config.optim.lr = 3e-3
  # With 1e-8 a first step is the sign of a gradient, and rounding decides many signs.
  config.optim.eps = 1e-3
  config.eval.generate = False
  config = vary(config, name)
  if methods.build(config.method.name, {}).several:
    config.teacher.path = ""
    config.teachers.update({n: str(folder / n) for n in ("good", "other")})
  config.mesh.data = 1
  for key, value in _parts(mesh).items():
    if key in config.mesh:
      config.mesh[key] = value
  return config


def _parts(mesh: str) -> dict[str, Any]:
  """{'data': 2, 'teacher': 'fsdp'} for 'data=2xteacher=fsdp'."""
  pairs = (part.split("=") for part in mesh.split("x") if "=" in part)
  return {key: int(value) if value.isdigit() else value for key, value in pairs}


def _size(mesh: str) -> int:
  return math.prod(_parts(mesh).get(axis, 1) for axis in sharding.AXES)


# One process of a run on one mesh


def _train_all(args: argparse.Namespace) -> None:
  """Trains the names on one mesh; process 0 leaves a file of arrays for each."""
  [mesh], folder = args.meshes, Path(args.keep)
  where = (args.coordinator, args.processes, args.process) if args.coordinator else ()
  with distributed.joined(*where):
    for name in args.names:
      config = _config(folder, name, mesh)
      config.train.steps = args.steps
      place = folder / "runs" / mesh / name
      own = build(config, Workdir(place))
      with jax.set_mesh(own.mesh):
        arrays = _trained(own, place, _parts(mesh).get("nudged", 0))
      if not args.process:
        _keep(_file(folder, mesh, name), arrays)


def _trained(run: Run, place: Path, nudged: int) -> Arrays:
  """The losses, text and last weights of a run, each whole."""
  batches = Batches(run, beforehand.answers(run, Workdir(place)))
  loader = train_loader(
    run.data.train,
    batch_size=ROWS,
    length=LENGTH,
    pad_id=PAD_ID,
    packs=run.data.packs,
    seed=run.settings.train.seed,
    own=sharding.own_rows(ROWS, run.mesh),
  )
  plan, state = run.plan, run.init()
  frozen = run.cast.frozen
  if nudged:
    state = state.replace(params=_nudged(state.params, nudged))
    frozen = _nudged(frozen, -nudged)
  parts = (plan.models, plan.optimizers, run.settings.train.microbatches, plan.steps)
  program = compile_step(run.method, *parts, plan.abstract, run.mesh)
  losses, text = [], []
  for step in range(plan.steps):
    batches.observe(float(step))  # a rising loss, which makes DistiLLM sample
    batch, _ = batches.batch(step, state.params, next(loader))
    state, values = program(state, frozen, batch)
    losses.append(float(values["loss"]))
    rows = [batch, *batch.answers.values()]
    text.append(np.concatenate([sharding.gathered(r.tokens) for r in rows]))
  leaves = jax.tree_util.tree_leaves_with_path(sharding.gathered(state.params))
  weights = {sharding.path_name(path): np.asarray(leaf) for path, leaf in leaves}
  return {"loss": np.array(losses), "text": np.stack(text)} | weights


def _nudged(params: Any, draw: int) -> Any:
  """Each weight a little larger or smaller, by a part in 2^23."""

  def moved(leaf: jax.Array) -> jax.Array:
    signs = jax.random.rademacher(jax.random.key(draw), leaf.shape, jnp.float32)
    return leaf * (1 + signs * 2.0**-23)

  return jax.jit(lambda tree: jax.tree.map(moved, tree))(params)


def _keep(file: Path, arrays: Arrays) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  np.savez(file.with_suffix(".part.npz"), **arrays)
  file.with_suffix(".part.npz").rename(file)


def _file(folder: Path, mesh: str, name: str) -> Path:
  return folder / "found" / mesh / f"{name}.npz"


# All runs on one mesh


def _found(
  args: argparse.Namespace, folder: Path, mesh: str, names: Sequence[str]
) -> dict[str, Arrays | str]:
  """What each name left; a sentence in its place where its processes failed."""
  files = {name: _file(folder, mesh, name) for name in names}
  failed: dict[str, str] = {}
  while left := [n for n in names if n not in failed and not files[n].exists()]:
    said = _start(args, folder, mesh, left)
    if late := [name for name in left if not files[name].exists()]:
      failed[late[0]] = said  # it was its turn
      print(f"{mesh}: {late[0]}: {said}", file=sys.stderr, flush=True)
  return {n: failed[n] if n in failed else dict(np.load(files[n])) for n in names}


def _start(args: argparse.Namespace, folder: Path, mesh: str, names: list[str]) -> str:
  """Trains these names, as far as they get; the last words of what failed."""
  several = args.processes > 1 and _size(mesh) > 1
  processes = args.processes if several else 1
  flags = f"--xla_force_host_platform_device_count={_size(mesh) // processes} "
  env = os.environ | {
    "XLA_FLAGS": flags + "--xla_backend_optimization_level=0 " + args.xla_flags,
    "JAX_PLATFORMS": "cpu",
    "OKD_JAX_ROWS": str(folder / "kept"),
  }
  command = [sys.executable, __file__, "--child", f"--keep={folder}"]
  command += [f"--meshes={mesh}", f"--names={','.join(names)}", f"--steps={args.steps}"]
  if several:
    port = f"--coordinator=localhost:{_free_port()}"
    command += [port, f"--processes={processes}"]
  logs = [folder / f"process{i}.txt" for i in range(processes)]
  started = [
    _process([*command, f"--process={i}"], env, logs[i]) for i in range(processes)
  ]
  failed = [log for process, log in zip(started, logs, strict=True) if process.wait()]
  lines = [
    line for log in failed for line in log.read_text().splitlines() if line.strip()
  ]
  return lines[-1] if lines else "it ended without a word"


def _process(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen:
  with log.open("w") as file:
    # Gloo tells stdout about its connections.
    return subprocess.Popen(command, env=env, stderr=file, stdout=subprocess.DEVNULL)


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


# The comparison


@dataclasses.dataclass(frozen=True)
class Difference:
  """Of two runs.

  loss: the largest of a step's; weights: the largest over the largest weight of the
  same array, which is `worst`; text: the first step on other text, or 0.
  """

  loss: float
  weights: float
  worst: str
  text: int

  def __str__(self) -> str:
    text = f", text from step {self.text}" if self.text else ""
    return f"{self.loss:.0e}, {self.weights:.0e}{text}"


def difference(one: Arrays, other: Arrays) -> Difference:
  """How far two runs of one name are apart.

  Raises:
    ValueError: if they did not train the same arrays.
  """
  if one.keys() != other.keys():
    raise ValueError(f"other arrays: {sorted(one.keys() ^ other.keys())}")
  weights = {}
  for name in one.keys() - {"loss", "text"}:
    scale = max(np.abs(one[name]).max(initial=0.0), np.finfo(np.float32).tiny)
    weights[name] = float(np.abs(one[name] - other[name]).max(initial=0.0) / scale)
  worst = max(weights, key=weights.get)
  steps = (one["text"] != other["text"]).reshape(len(one["text"]), -1).any(-1)
  return Difference(
    float(np.abs(one["loss"] - other["loss"]).max()),
    weights[worst],
    worst,
    int(steps.argmax()) + 1 if steps.any() else 0,
  )


def _table(args: argparse.Namespace, found: Mapping[str, Any]) -> Iterator[str]:
  by = f"{args.processes} processes of {args.devices} devices, " * (args.processes > 1)
  yield f"Losses and weights against one device; {by}{args.steps} steps of {ROWS} rows."
  yield ""
  titles = [mesh.replace("x", " x ") for mesh in args.meshes]
  yield f"| method | {' | '.join(titles)} | rounding alone |"
  yield "|---" * (2 + len(titles)) + "|"
  for name in args.names:
    one = found[ONE][name]
    cells = [_cell(one, found[mesh][name]) for mesh in args.meshes]
    nudged = [found[mesh][name] for mesh in NUDGED if name in found[mesh]]
    cells.append(_cell(one, *nudged) if nudged else "–")
    yield f"| {name} | {' | '.join(cells)} |"


def _cell(one: Arrays | str, *others: Arrays | str) -> str:
  """The largest difference of the others, or why there is none."""
  if failed := [found for found in (one, *others) if isinstance(found, str)]:
    return f"failed: {failed[0]}"
  found = [difference(one, other) for other in others]
  return str(max(found, key=lambda each: (each.text, each.weights)))


def _far(args: argparse.Namespace, found: Mapping[str, Any]) -> list[str]:
  """The names that differ by more than rounding usually does; all go to stderr."""
  far = set()
  for mesh, name in itertools.product(args.meshes, args.names):
    one, other = found[ONE][name], found[mesh][name]
    if isinstance(one, str) or isinstance(other, str):
      continue
    got = difference(one, other)
    print(f"{mesh}: {name}: {got} ({got.worst})", file=sys.stderr, flush=True)
    if got.text or max(got.loss, got.weights) > FAR:
      far.add(name)
  return [name for name in args.names if name in far]


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python benchmarks/meshes.py", description=__doc__.splitlines()[0]
  )
  add = parser.add_argument
  commas = lambda text: [part for part in text.split(",") if part]  # noqa: E731
  add("--names", type=commas, default=[], help="methods, or NAME@KEY=VALUE@...")
  add("--meshes", type=commas, default=[], help="such as data=2xtensor=4, by commas")
  add("--processes", type=int, default=1, help="that make one run, each a real one")
  add("--devices", type=int, default=8, help="of each process, where there are several")
  add("--steps", type=int, default=10)
  add("--output", default="", help="also write the table to this file")
  add(
    "--keep",
    default="",
    help="a folder for losses, text and weights; goes on with what it has",
  )
  add("--xla_flags", default="", help="more XLA_FLAGS of the runs")
  for hidden in ("--coordinator", "--child"):
    action = "store_true" if hidden == "--child" else "store"
    add(hidden, action=action, default="", help=argparse.SUPPRESS)
  add("--process", type=int, default=0, help=argparse.SUPPRESS)
  return parser


if __name__ == "__main__":
  cli.run(main)
