"""Kills runs at random moments; each must end as the undisturbed one, byte for byte.

    python tests/faults/kills.py                        # all kinds, about an hour
    python tests/faults/kills.py --trials=8 okd seqkd   # these kinds

A trial trains one of golden_losses.py's variants, made shorter, and sends it SIGKILL,
SIGTERM or SIGINT at one or two random moments: while it starts, chooses blocks, fills a
teacher cache or a trunk, writes answers beforehand, steps, evaluates, saves or exports.
Then it is started again until it has ended. Losses, held-out figures, student and
adapter must be those of a run that nobody disturbed; SIGTERM and SIGINT must leave
their status and no traceback.

A run is a process forked from this one, which has imported the package and started
nothing: that saves the ten seconds that the imports take. The table has a line for each
kind: how many runs were tried, and how many ended identical.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
if __name__ == "__main__":
  sys.path[:0] = [str(TESTS), str(TESTS.parent)]
  os.environ.pop("XLA_FLAGS", None)  # one device a process
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(TESTS.parent / ".faults/xla"))

from commands import EXPORTED, free_port, losses, rows, same_folder  # noqa: E402
from golden_losses import QUICK, VARIANTS  # noqa: E402

from okd_jax import METHODS, cache_teacher, main  # noqa: E402
from okd_jax.run import build, distill  # noqa: E402, F401  (imported once, for all)
from okd_jax.runtime import cli  # noqa: E402

SHORT = QUICK | {"train.steps": 12, "checkpoint.every": 3, "eval.every": 6}
SHORT |= {"data.train": "embedded:eval", "data.holdout": 8}  # few rows to answer
LORA = {"student.adapter.kind": "lora", "student.adapter.rank": 4}
TRUNK = VARIANTS["okd-trunk"] | {"teacher.trunk": "@trunk"}
# Changes by kind; '@x' is a folder of this campaign.
KINDS = {name: {"method.name": name} for name in sorted(METHODS)} | {
  name: VARIANTS[name]
  for name in (
    "okd-prefix okd-prompt okd-blocks okd-sequential okd-packed okd-bfloat16 gkd-lora "
    "gkd-replay minillm-prefix kd-stored kd-packed ensemble-two ensemble-gated "
    "ensemble-reinforced ensemble-lora"
  ).split()
}
KINDS |= {"okd-trunk": TRUNK, "okd-student-lora": VARIANTS["okd-blocks"] | LORA}
PAIRS = {
  f"{name}, two processes": name for name in ("okd", "seqkd", "gkd", "okd-trunk")
}
SAMPLES = {"distillm", "gkd", "imitkd", "minillm", "promptkd", "skd", "fdistill"}
STATUS = {
  signal.SIGKILL: {-signal.SIGKILL},
  # While it imports and connects a process has nothing to save.
  signal.SIGTERM: {143, -signal.SIGTERM},
  signal.SIGINT: {130},
}
PATIENCE = 600  # seconds after which a run counts as hanging


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of run in a folder of its own.

  name: as in the table; processes: how many make the run.
  """

  name: str
  place: Path
  shared: Path

  @property
  def changes(self) -> dict:
    own = KINDS[PAIRS.get(self.name, self.name)]
    if own["method.name"] in SAMPLES:
      own = {"method.max_new_tokens": 6} | own
    return SHORT | own

  @property
  def processes(self) -> int:
    return 2 if self.name in PAIRS else 1

  @property
  def run(self) -> Path:
    return self.place / "run"

  def flags(self, **more: str) -> list[str]:
    found = ["--config=configs/debug.py"]
    for key, value in (self.changes | more).items():
      if str(value).startswith("@"):
        own = value in ("@cache", "@trunk")
        value = (self.place if own else self.shared) / value
      found.append(f"--config.{key}={value}")
    return found

  def commands(self) -> list[tuple[Callable, list[str]]]:
    """What makes the run, in order."""
    train = (main.main, [*self.flags(), f"--workdir={self.run}"])
    if "teacher.cache" not in self.changes:
      return [train]
    flags = [*self.flags(**{"teacher.cache": ""}), f"--output={self.place / '@cache'}"]
    return [(cache_teacher.main, [*flags, "--k=16"]), train]


class Failed(Exception):
  """A run that did not end as it should."""


# Processes


def start(command: Callable, arguments: list[str], log: Path) -> int:
  """The id of a process that calls the command as its console script does."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that JAX has threads: it has not begun with any
    child = os.fork()
  if child:
    return child
  status = 1
  try:
    with log.open("ab") as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    sys.argv = ["okd_jax", *arguments]
    cli.run(command)
    status = 0
  except SystemExit as left:
    status = left.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    with contextlib.suppress(BaseException):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(status)


def begin(kind: Kind, command: Callable, arguments: list[str]) -> list[int]:
  log = kind.place / "log.txt"
  if kind.processes == 1:
    return [start(command, arguments, log)]
  flags = [f"--coordinator=localhost:{free_port()}", f"--processes={kind.processes}"]
  return [
    start(command, [*arguments, *flags, f"--process={i}"], log)
    for i in range(kind.processes)
  ]


def ended(children: list[int], kill: bool = False) -> list[int]:
  """Their exit statuses, negative for a signal, once all have ended."""
  limit, found = time.monotonic() + PATIENCE, {}
  while len(found) < len(children):
    for child in children:
      if child not in found:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
          found[child] = os.waitstatus_to_exitcode(status)
    if time.monotonic() > limit:
      for child in set(children) - set(found):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
      raise Failed(f"a run hangs: {PATIENCE} s")
    time.sleep(0.005)
  return [found[child] for child in children]


def gone(children: list[int]) -> bool:
  """Whether one of them has ended; it can still be waited for."""
  options = os.WEXITED | os.WNOHANG | os.WNOWAIT
  return any(os.waitid(os.P_PID, child, options) for child in children)


# Moments


def rows_of(kind: Kind, name: str) -> list[dict]:
  try:
    return rows(kind.run, name)
  except (FileNotFoundError, json.JSONDecodeError):  # a line that is just written
    return []


def at_step(step: int) -> Callable[[Kind], bool]:
  return lambda kind: any(row["step"] >= step for row in rows_of(kind, "train"))


def after_evaluation(step: int) -> Callable[[Kind], bool]:
  return lambda kind: any(row["step"] == step for row in rows_of(kind, "eval"))


def there(pattern: str) -> Callable[[Kind], bool]:
  return lambda kind: any(True for _ in kind.place.glob(pattern))


def moments(chance: random.Random) -> dict[str, tuple[Callable[[Kind], bool], float]]:
  """What is waited for, by what then goes on; and seconds within which it strikes."""
  steps = SHORT["train.steps"]
  every = SHORT["eval.every"]
  return {
    "start": (lambda kind: True, 4.0),
    "cache": (there("@cache/*/*.safetensors"), 0.5),
    "trunk": (there("@trunk/*.safetensors"), 0.5),
    "answers": (there("run/samples/*.partial"), 0.5),
    "first evaluation": (lambda kind: bool(rows_of(kind, "teacher")), 1.0),
    "steps": (at_step(chance.randint(1, steps - 1)), 0.2),
    "evaluation": (at_step(every), 0.5),
    "save": (there("run/checkpoints/*tmp*"), 0.05),
    "last save": (after_evaluation(steps), 0.1),
    "export": (there("run/.*.partial"), 0.05),
  }


def strike(
  kind: Kind, children: list[int], reached: Callable, within: float, what: int, chance
) -> bool:
  """Signals them once the moment has come; False if they have ended before."""
  while not reached(kind):
    if gone(children):
      return False
    time.sleep(0.003)
  time.sleep(chance.uniform(0, within))
  if gone(children):
    return False
  # A machine takes all its processes along; who asks to stop may ask any of them.
  victims = children if what == signal.SIGKILL else [chance.choice(children)]
  for child in victims:
    os.kill(child, what)
  return True


# Trials


def undisturbed(kind: Kind) -> None:
  kind.place.mkdir(parents=True)
  for command, arguments in kind.commands():
    if any(ended(begin(kind, command, arguments))):
      raise Failed(f"undisturbed it fails: {tail(kind)}")


def tail(kind: Kind) -> str:
  lines = (kind.place / "log.txt").read_text(errors="replace").splitlines()
  return " | ".join(lines[-3:])


@dataclasses.dataclass
class Trial:
  """One run that is disturbed; struck: (moment, signal) of each time."""

  kind: Kind
  strikes: int
  chance: random.Random
  struck: list[tuple[str, str]] = dataclasses.field(default_factory=list)

  def __call__(self) -> None:
    """Raises Failed, unless it ends well."""
    self.kind.place.mkdir(parents=True)
    commands = self.kind.commands()
    while commands:
      if self._disturbed(*commands[0], last=len(commands) == 1):
        continue
      commands.pop(0)
    if not self.struck:
      raise Failed("it has not been struck")
    if "Traceback" in (self.kind.place / "log.txt").read_text(errors="replace"):
      raise Failed(f"a traceback: {tail(self.kind)}")

  def _disturbed(self, command: Callable, arguments: list[str], last: bool) -> bool:
    """Runs it once; whether it was struck before its end."""
    children = begin(self.kind, command, arguments)
    left = self.strikes - len(self.struck)
    if left <= 0 or (not last and self.chance.random() < 0.2):
      if any(statuses := ended(children)):
        raise Failed(f"status {statuses}: {tail(self.kind)}")
      return False
    name, reached, within = self._moment(last)
    what = self.chance.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
    struck = strike(self.kind, children, reached, within, what, self.chance)
    statuses = ended(children)
    if not struck:
      if any(statuses):
        raise Failed(f"status {statuses}: {tail(self.kind)}")
      if last and not self.struck:  # too late for that moment: anew, and earlier
        shutil.rmtree(self.kind.run)
        return True
      return False
    self.struck.append((name, signal.Signals(what).name))
    if not any(statuses):  # the signal came when all was done
      return False
    if wrong := [s for s in statuses if s not in STATUS[what]]:
      raise Failed(f"{self.struck}: status {wrong}: {tail(self.kind)}")
    return True

  def _moment(self, last: bool) -> tuple[str, Callable, float]:
    found = moments(self.chance)
    names = ["start", "cache"] if not last else self._names(found)
    name = self.chance.choice(names)
    return name, *found[name]

  def _names(self, found: dict) -> list[str]:
    """Those that this kind of run has."""
    own = self.kind.changes
    names = [n for n in found if n not in ("cache", "trunk", "answers")]
    names += ["trunk"] * 6 * ("teacher.trunk" in own)
    reference = self.kind.shared / self.kind.name / "run/samples"
    return names + ["answers"] * 6 * reference.exists()


def differences(one: Path, other: Path) -> list[str]:
  """What is not the same in two finished runs."""
  found = [] if losses(one) == losses(other) else ["losses"]
  if rows(one, "eval") != rows(other, "eval"):
    found.append("held-out figures")
  names = {name for name in EXPORTED if (one / name).exists()}
  if names != {name for name in EXPORTED if (other / name).exists()}:
    return [*found, "exported folders"]
  return found + [n for n in sorted(names) if not same_folder(one / n, other / n)]


def models(shared: Path) -> None:
  """Two small models that several kinds have as teachers."""
  for name, shape in {"@big": (48, 2), "@old": (32, 2)}.items():
    size, layers = (
      f"--config.student.model.{k}={v}"
      for k, v in zip(("hidden_size", "num_layers"), shape, strict=True)
    )
    flags = [*Kind("sft", shared / "x", shared).flags(), size, layers]
    flags += ["--config.train.steps=2", f"--workdir={shared / name}"]
    if any(ended([start(main.main, flags, shared / "log.txt")])):
      raise Failed((shared / "log.txt").read_text()[-2000:])


def campaign(names: list[str], count: int, seed: int, folder: Path) -> Iterator[dict]:
  """What became of each trial."""
  chance = random.Random(seed)
  order = [
    n for i in range(-(-count // len(names))) for n in chance.sample(names, len(names))
  ]
  models(folder)
  for i, name in enumerate(order[:count]):
    begun, trial = time.monotonic(), None
    reference = Kind(name, folder / name, folder)
    kind = Kind(name, folder / f"trial-{i}", folder)
    try:
      if not reference.place.exists():
        undisturbed(reference)
      trial = Trial(kind, 1 + (chance.random() < 0.4), random.Random(f"{seed} {i}"))
      trial()
      wrong = ", ".join(differences(reference.run, kind.run))
      problem = wrong and f"differs: {wrong}"
    except Failed as failure:
      problem = str(failure)
    struck = trial.struck if trial else []
    if not problem:
      shutil.rmtree(kind.place)
    seconds = round(time.monotonic() - begun, 1)
    yield {"kind": name, "struck": struck, "problem": problem, "s": seconds, "trial": i}


def table(found: list[dict]) -> str:
  """Kind, tried, identical; then the same by moment and by signal."""
  lines = []
  for title, keys in (
    ("kind", lambda one: [one["kind"]]),
    ("moment", lambda one: {moment for moment, _ in one["struck"]}),
    ("signal", lambda one: {what for _, what in one["struck"]}),
    ("signals in a run", lambda one: [str(len(one["struck"]))]),
  ):
    tried, same = collections.Counter(), collections.Counter()
    for one in found:
      tried.update(keys(one))
      same.update(keys(one) if not one["problem"] else [])
    lines += ["", f"| {title} | tried | identical |", "|---|---|---|"]
    lines += [f"| {key} | {tried[key]} | {same[key]} |" for key in sorted(tried)]
  whole = sum(not one["problem"] for one in found)
  return "\n".join([*lines, "", f"{len(found)} trials, {whole} identical"])


def command(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  everything = [*KINDS, *PAIRS]
  parser.add_argument("kinds", nargs="*", help=f"of: {'; '.join(everything)}")
  parser.add_argument("--trials", type=int, default=66)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--output", help="a jsonl file of all trials")
  args = parser.parse_args(arguments)
  if unknown := set(args.kinds) - set(everything):
    parser.error(f"no such kinds: {', '.join(sorted(unknown))}")
  os.chdir(TESTS.parent)
  folder = Path(tempfile.mkdtemp(prefix="okd_jax_kills_"))
  os.environ["OKD_JAX_ROWS"] = str(folder / "rows")
  found = []
  for one in campaign(args.kinds or everything, args.trials, args.seed, folder):
    found.append(one)
    print(json.dumps(one), flush=True)
    if args.output:
      with Path(args.output).open("a") as file:
        file.write(json.dumps(one) + "\n")
  print(table(found))
  if any(one["problem"] for one in found):
    print(f"what is left of the trials that failed: {folder}")
    return 1
  shutil.rmtree(folder)
  return 0


if __name__ == "__main__":
  sys.exit(command(sys.argv[1:]))
