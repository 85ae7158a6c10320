"""Time per training step of every method, all measured in one run, in turn.

    python -m configs.stories                    # once: the data
    python benchmarks/methods.py --config=configs/stories.py
    python benchmarks/methods.py --config=configs/debug.py --names=kd,okd,gkd
    python benchmarks/methods.py --names=kd,okd@adapter.layers=2@teacher.trunk=memory
    python benchmarks/methods.py --names=okd,okd@data.pack=True

Every method trains the same student on the same texts. A round is a few steps of each
method, so that whatever else the machine does hits all of them alike; the ratio of a
step's time to the first method's is taken round by round. Packed rows hold more text:
there tokens/s says what they gain. Each step is waited for, sampling included. Prints
a section of BENCHMARKS.md; keys of the configuration are set as for okd_jax.main.
"""

import dataclasses
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from command import vary
from ml_collections import ConfigDict

from okd_jax import METHODS
from okd_jax.bench import measure
from okd_jax.config import read
from okd_jax.data import PAD_ID, train_loader
from okd_jax.errors import UserError
from okd_jax.run import beforehand
from okd_jax.run.batches import Batches
from okd_jax.run.build import Run, build
from okd_jax.run.data import make_packs
from okd_jax.run.step import compile_step
from okd_jax.runtime import cli
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import trunk


@dataclasses.dataclass
class Step:
  """Seconds of one step, of which so many went into its batch, and what that was.

  sampled: whether text was written for this very step.
  """

  total: float
  batch: float
  tokens: float
  sampled: bool


class Racer:
  """One method, ready to make steps."""

  def __init__(self, run: Run, rows: Sequence, folder: Path):
    self._rows, self._step = rows, 0
    start = time.perf_counter()
    answers = beforehand.answers(run, Workdir(folder))
    self.beforehand = time.perf_counter() - start
    kept = None
    if run.settings.teacher.trunk:
      kept = trunk.opened(run.method, run.cast, run.data, run.settings)
      kept = trunk.complete(run.cast, run.data, run.settings, run.mesh, kept)
    self._batches = Batches(run, answers, kept)
    self._state = run.init()
    if kept and kept.replaces:
      run = run.only_top()
    self.run = run
    self._train_step = compile_step(
      run.method,
      run.plan.models,
      run.plan.optimizers,
      run.settings.train.microbatches,
      run.plan.steps,
      run.plan.abstract,
      run.mesh,
    )

  def step(self) -> Step:
    """One step of the training loop, each of its two parts waited for."""
    gold = self._rows[self._step % len(self._rows)]
    start = time.perf_counter()
    batch, figures = self._batches.batch(self._step, self._state.params, gold)
    jax.block_until_ready(batch)
    middle = time.perf_counter()
    self._state, values = self._train_step(self._state, self.run.cast.frozen, batch)
    jax.block_until_ready((self._state.params, values))
    end = time.perf_counter()
    self._step += 1
    if not values["finite"]:
      raise UserError(f"{self.run.settings.method.name}: a step was not finite")
    tokens, sampled = float(values["tokens"]), "sampled_length" in figures
    return Step(end - start, middle - start, tokens, sampled)


def main(arguments: list[str]) -> None:
  """Prints the comparison that the arguments ask for."""
  args, rest = _parser().parse_known_args(arguments)
  logging.getLogger("okd_jax").setLevel(logging.WARNING)
  cli.use_compilation_cache()
  if not any(argument.startswith("--config=") for argument in rest):
    rest = ["--config=configs/stories.py", *rest]
  config = read.read(rest)
  unknown = sorted({name.partition("@")[0] for name in args.names} - set(METHODS))
  if unknown:
    raise UserError(
      f"--names={unknown[0]} is unknown; use {', '.join(sorted(METHODS))}"
    )
  with tempfile.TemporaryDirectory() as folder:
    runs = {name: _build(args, config, name, Path(folder)) for name in args.names}
    first = runs[args.names[0]]
    with jax.set_mesh(first.mesh):
      racers = {
        name: Racer(run, _rows(args, run), Path(folder) / name)
        for name, run in runs.items()
      }
      rounds = _race(args, racers)
  print(_section(args, first, racers, rounds), flush=True)


def _build(args, config: ConfigDict, name: str, folder: Path) -> Run:
  run = build(vary(config, name), Workdir(folder))
  # Few enough that what is answered beforehand does not take longer than the rest.
  train = run.data.train[: args.rows]
  packs = make_packs(run.settings.data, train)
  data = dataclasses.replace(run.data, train=train, packs=packs)
  return dataclasses.replace(run, data=data)


def _rows(args, run: Run) -> list[dict[str, Any]]:
  """The rows of a round's steps; every round has the same, and so has every method
  that does not pack them."""
  loader = train_loader(
    run.data.train,
    batch_size=run.settings.train.batch_size,
    length=run.settings.data.max_length,
    pad_id=PAD_ID,
    packs=run.data.packs,
    seed=run.settings.train.seed,
  )
  return [next(loader) for _ in range(args.steps)]


def _race(args, racers: dict[str, Racer]) -> dict[str, list[list[Step]]]:
  """The measured rounds of each method: its steps."""
  rounds = {name: [] for name in racers}
  for i in range(args.warmup + args.rounds):
    begin = time.perf_counter()
    for name, racer in racers.items():
      steps = [racer.step() for _ in range(args.steps)]
      if i >= args.warmup:
        rounds[name].append(steps)
    elapsed = time.perf_counter() - begin
    print(f"round {i + 1 - args.warmup}: {elapsed:.1f} s", file=sys.stderr)
  return rounds


def _section(args, run: Run, racers, rounds) -> str:
  settings, base = run.settings, args.names[0]
  lines = [
    f"### Methods: {Path(settings.teacher.path).name or 'a random teacher'}, "
    f"student of {run.cast.student.config.num_layers} layers, "
    f"{settings.train.batch_size} rows of {settings.data.max_length} tokens",
    "",
    measure.describe(measure.environment()),
    "",
    f"{args.rounds} rounds of {args.steps} steps of each method, after "
    f"{args.warmup} more for compilation. Times are medians of the rounds' means.",
    "",
    f"| method | ms a step | least | greatest | to {base} | tokens/s "
    "| time in sampling | steps that sample | before training |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, steps in rounds.items():
    cells = [name, *_cells(steps, rounds[base]), _before(racers[name])]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _cells(rounds: list[list[Step]], base: list[list[Step]]) -> list[str]:
  times = [_seconds(steps) for steps in rounds]
  ms = measure.spread([1e3 * t / len(rounds[0]) for t in times])
  pairs = zip(times, map(_seconds, base), strict=True)
  every = [step for steps in rounds for step in steps]
  speeds = [sum(s.tokens for s in steps) / _seconds(steps) for steps in rounds]
  share = sum(step.batch for step in every) / _seconds(every)
  sampled = statistics.fmean(step.sampled for step in every)
  return [
    *(f"{ms[key]:.0f}" for key in ("median", "min", "max")),
    f"{statistics.median(t / b for t, b in pairs):.2f}",
    f"{statistics.median(speeds):.0f}",
    f"{100 * share:.0f} %" if sampled else "–",
    f"{100 * sampled:.0f} %" if sampled else "–",
  ]


def _seconds(steps: list[Step]) -> float:
  return sum(step.total for step in steps)


def _before(racer: Racer) -> str:
  """Who answered the prompts before training, and how long that took."""
  who = racer.run.method.sequences.beforehand
  return f"{' and '.join(who)}, {racer.beforehand:.1f} s" if who else "–"


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python benchmarks/methods.py",
    description="Compares the time of a training step between methods. Also takes "
    "--config=FILE (by default configs/stories.py) and --config.key=value.",
  )
  add, whole = parser.add_argument, measure.at_least(1)
  names = ["kd", *sorted(set(METHODS) - {"kd"})]
  add(
    "--names",
    type=lambda text: text.split(","),
    default=",".join(names),
    help="methods by commas, or NAME@KEY=VALUE@...; ratios are to the first",
  )
  add("--rounds", type=whole, default=5, help="measured rounds")
  add("--steps", type=whole, default=4, help="steps of a method in a round")
  add("--warmup", type=whole, default=1, help="rounds before these")
  add("--rows", type=whole, default=128, help="first rows of the data, to train on")
  return parser


if __name__ == "__main__":
  cli.run(main)
