"""A training step here beside one of TRL's GKDTrainer: same models, rows and machine.

    pip install '.[peers]'
    python benchmarks/peer_trl.py
    python benchmarks/peer_trl.py --names=trl,kd,okd@adapter.layers=2 --rounds=3

TRL distils by KL(teacher || student) from a frozen teacher on the data's rows alone
(lmbda=0, beta=0), eagerly, in float32, on torch's CPU kernels; 'kd' is the same loss
here and 'okd' has a teacher that learns. Weights and tokens are random, drawn once for
all of them, so that the first loss must be the same number everywhere. Every contender
is a process (`contender.py`) that loads its own library alone; they take turns, and
whoever has no turn sleeps. Prints a section of BENCHMARKS.md.

torch's threads wait for one another by spinning, which where the cores are not theirs
alone is many times slower; unless the environment says otherwise, OMP_WAIT_POLICY is
'passive' here.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from contender import RANK, TRL

from okd_jax import METHODS, models
from okd_jax.bench import measure
from okd_jax.errors import UserError
from okd_jax.runtime import cli

TEACHER = {"num_layers": 8, "hidden_size": 512, "num_heads": 8}
STUDENT = {"num_layers": 4, "hidden_size": 256, "num_heads": 4}
PACKAGES = ("trl", "accelerate", "torch")
SAME = 1e-3  # how far first losses may differ, as a share


def main(arguments: list[str]) -> None:
  """Prints the comparison that the arguments ask for."""
  args = _parser().parse_args(arguments)
  _check(args.names)
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    _draw(args, Path(folder))
    contenders = {
      name: stack.enter_context(_started(name, Path(folder) / f"{i}"))
      for i, name in enumerate(args.names)
    }
    rounds = _race(args, contenders)
  _check_losses(rounds)
  measured = {name: answers[args.warmup :] for name, answers in rounds.items()}
  print(_section(args, contenders, measured, rounds), flush=True)


class Contender:
  """A process that makes training steps when it is told to.

  loaded: its memory in MiB before the first step, 'now' and 'peak'.
  """

  def __init__(self, name: str, process: subprocess.Popen, log: Path):
    self.name, self._process, self._log = name, process, log
    self.loaded = self._answer()

  def steps(self, count: int) -> dict:
    """Makes so many: their 'times', 'losses', and the memory after them."""
    with contextlib.suppress(BrokenPipeError):  # then it has no answer, either
      self._process.stdin.write(f"{count}\n")
      self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      words = self._log.read_text(errors="replace").strip().splitlines()
      reason = words[-1].split("UserError: ")[-1] if words else "it was killed"
      raise UserError(f"{self.name} failed: {reason}")
    return json.loads(line)


@contextlib.contextmanager
def _started(name: str, log: Path) -> Iterator[Contender]:
  """The contender of this name, loaded; it ends with the block."""
  print(f"loading {name}", file=sys.stderr, flush=True)
  env = {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.getcwd()} | os.environ
  # A program read from the cache would hide the memory that compiling it takes.
  env |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
  script = Path(__file__).with_name("contender.py")
  command = [sys.executable, script, f"--name={name}", f"--folder={log.parent}"]
  pipe = subprocess.PIPE
  with log.open("w") as errors:
    process = subprocess.Popen(
      command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=env
    )
  try:
    yield Contender(name, process, log)
  finally:
    process.kill()
    process.communicate()


def _check(names: list[str]) -> None:
  unknown = sorted({name.partition("@")[0] for name in names} - {TRL, *METHODS})
  if unknown:
    known = ", ".join([TRL, *sorted(METHODS)])
    raise UserError(f"--names={unknown[0]} is unknown; use {known}")
  missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
  if TRL in names and missing:
    raise UserError(
      f"the comparison with TRL needs {' and '.join(missing)}: pip install '.[peers]' "
      "in a checkout of this package"
    )
  if not Path("/proc/self/status").exists():
    raise UserError("memory is read from /proc, which this system does not have")


def _draw(args, folder: Path) -> None:
  """Random teacher, student and rows of one token more than is read."""
  for seed, (name, dimensions) in enumerate(
    {"teacher": TEACHER, "student": STUDENT}.items()
  ):
    size = {"vocab_size": args.vocab_size, "max_length": max(1024, args.length + 1)}
    config = models.preset("gpt2", **size, **dimensions)
    params = jax.jit(lambda key, c=config: models.init(c, key))(jax.random.key(seed))
    models.save(folder / name, params, config, None)
  shape = (args.batch_size, args.length + 1)
  tokens = np.random.default_rng(0).integers(0, args.vocab_size, shape)
  np.save(folder / "tokens.npy", tokens)


def _race(args, contenders: Mapping[str, Contender]) -> dict[str, list[dict]]:
  """What each contender answered in each round, the rounds of warming up included."""
  rounds = {name: [] for name in contenders}
  for i in range(args.warmup + args.rounds):
    for name, contender in contenders.items():
      answer = contender.steps(args.steps)
      rounds[name].append(answer)
      took = 1e3 * statistics.fmean(answer["times"])
      where = f"round {i + 1 - args.warmup}: {name}"
      print(f"{where} {took:.0f} ms a step", file=sys.stderr, flush=True)
  return rounds


def _check_losses(rounds: Mapping[str, list[dict]]) -> None:
  """Raises a UserError unless all began with the same distance to the teacher."""
  first = {name: answers[0]["losses"][0] for name, answers in rounds.items()}
  if not np.allclose([*first.values()], [*first.values()][0], rtol=SAME, atol=0):
    raise UserError(f"the first losses differ, so the work does, too: {first}")


def _section(args, contenders, measured, rounds) -> str:
  base = args.names[0]
  lines = [
    f"### TRL: GPT-2 of {_words(TEACHER)} to {_words(STUDENT)}, {args.vocab_size} "
    f"tokens, {args.batch_size} rows of {args.length}",
    "",
    measure.describe(measure.environment()) + _versions(args.names),
    "",
    f"{args.rounds} rounds of {args.steps} step(s) of each in turn, after "
    f"{args.warmup} more; float32. TRL: GKDTrainer, lmbda=0, beta=0, which is "
    f"KL(teacher‖student); okd: LoRA of rank {RANK}, in all layers unless named. Times "
    "are the rounds' means. Memory is the process's largest resident set, loading and "
    "compilation included, and the resident set just before the first step.",
    "",
    f"| | ms a step, median | least | greatest | to {base} | tokens/s "
    "| peak MiB | before the first step |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name, answers in measured.items():
    cells = _cells(args, answers, measured[base])
    cells += [f"{answers[-1]['peak']:.0f}", f"{contenders[name].loaded['now']:.0f}"]
    lines.append(f"| {' | '.join([name, *cells])} |")
  return "\n".join([*lines, "", _remarks(rounds)])


def _cells(args, answers: list[dict], base: list[dict]) -> list[str]:
  times, theirs = (
    [statistics.fmean(answer["times"]) for answer in part] for part in (answers, base)
  )
  spread = measure.spread([1e3 * t for t in times])
  ratio = statistics.median(t / b for t, b in zip(times, theirs, strict=True))
  speed = args.batch_size * args.length / statistics.median(times)
  cells = [f"{spread[key]:.0f}" for key in ("median", "min", "max")]
  return [*cells, f"{ratio:.2f}", f"{speed:.0f}"]


def _remarks(rounds: Mapping[str, list[dict]]) -> str:
  """That they did the same, and that none worked out of its turn."""
  losses = [answers[0]["losses"][0] for answers in rounds.values()]
  first = " ".join(f"{loss:.6f}" for loss in losses)
  idle = sum(answer["idle_cpu"] for answers in rounds.values() for answer in answers)
  total = sum(sum(a["times"]) for answers in rounds.values() for a in answers)
  return (
    f"KL(teacher‖student) at the first step, in this order: {first}. Processes out of "
    f"their turn used {idle:.1f} s of CPU in {total:.0f} s of steps."
  )


def _words(dimensions: Mapping[str, int]) -> str:
  return f"{dimensions['num_layers']} × {dimensions['hidden_size']}"


def _versions(names: list[str]) -> str:
  if TRL not in names:
    return ""
  found = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
  policy = os.environ.get("OMP_WAIT_POLICY", "passive")
  return f"; {found} (eager, OMP_WAIT_POLICY={policy})"


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python benchmarks/peer_trl.py",
    description="Compares a training step's time and memory with TRL's GKDTrainer.",
  )
  add, whole = parser.add_argument, measure.at_least(1)
  add(
    "--names",
    type=lambda text: text.split(","),
    default="trl,kd,okd,okd@adapter.layers=2",
    help="trl and methods by commas, or NAME@KEY=VALUE@...; ratios are to the first",
  )
  add("--rounds", type=whole, default=5, help="measured rounds")
  add("--steps", type=whole, default=2, help="steps of a contender in a round")
  add("--warmup", type=whole, default=1, help="rounds before these, not measured")
  add("--batch_size", type=whole, default=8, help="rows a step")
  add("--length", type=whole, default=256, help="trained tokens of a row")
  add("--vocab_size", type=whole, default=50257, help="of both models")
  return parser


if __name__ == "__main__":
  cli.run(main)
