"""Damages every file of a workdir in every way, one at a time, and goes on with it.

    python -m tests.faults.damage                 # all of them, about half an hour
    python -m tests.faults.damage seal.json       # files with that in their path

Of a small run there are two workdirs: of one that was stopped half way, and of one that
is finished. In a copy of either one file is deleted, emptied, cut in half, has one bit
flipped, something appended or zeros in its place; then the same command goes on there,
and on the first an export is made as well. What may come of it:

  i  the end is that of the undisturbed run, to the last bit
  t  the same, and it was told that something was not as it should be
  r  refused, in a sentence

All else is a failure: another end, a traceback (!), a process that dies or hangs.
Prints the table that BUILD_NOTES.md quotes; exit status 1 if anything failed.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOW = 120  # seconds after which a process hangs
CHANGES = {
  "method.name": "okd",
  "train.steps": 8,
  "train.log_every": 1,
  "checkpoint.every": 2,
  "eval.every": 2,
  "eval.best": "loss",
  "eval.limit": 4,
  "eval.generate_limit": 1,
  "eval.max_new_tokens": 2,
  "data.max_length": 32,
  "data.max_prompt_length": 24,
  "data.overlong_prompt": "truncate",
  "optim.schedule": "constant",
}
TOLD = re.compile("damaged|put back|set aside|gone|made again|no checksums|as it is")
MARKS = {"identical": "i", "told": "t", "refused": "r"}


def _flips(times: int) -> Callable[[bytes], bytes]:
  """One flipped bit, another one for each number."""

  def damage(content: bytes) -> bytes:
    wrong, chance = bytearray(content), random.Random(times)
    if wrong:
      wrong[chance.randrange(len(wrong))] ^= 1 << chance.randrange(8)
    return bytes(wrong)

  return damage


# By kind, what becomes of a file's bytes; None: it is deleted.
KINDS = {
  "delete": None,
  "empty": lambda content: b"",
  "half": lambda content: content[: len(content) // 2],
  "bit 1": _flips(1),
  "bit 2": _flips(2),
  "bit 3": _flips(3),
  "append": lambda content: content + b"\x07garbage\n",
  "zeros": lambda content: bytes(len(content)),
}
FEW = ("delete", "half", "bit 1")


@dataclasses.dataclass(frozen=True)
class Trial:
  """One damage of one file of one workdir, and what is done with it then."""

  workdir: str  # 'half' or 'whole'
  file: str
  kind: str
  command: str  # 'main' or 'export'


def trials(base: Path, words: list[str]) -> Iterator[Trial]:
  """All of them; fewer of checkpoints that are not read as long as all is well."""
  for workdir in ("half", "whole"):
    for path in sorted((base / workdir).rglob("*")):
      name = path.relative_to(base / workdir).as_posix()
      wanted = not words or any(word in name for word in words)
      if not path.is_file() or not wanted:
        continue
      newest = name.startswith(f"checkpoints/{_steps(base / workdir)[-1]}/")
      spare = workdir == "whole" or not newest
      spare = spare and name.startswith("checkpoints")
      for kind in FEW if spare else KINDS:
        yield Trial(workdir, name, kind, "main")
        if workdir == "half" and (newest or name in ("config.json", "models.json")):
          yield Trial(workdir, name, kind, "export")


def damage(path: Path, kind: str) -> None:
  """Damages a file."""
  content = path.read_bytes()
  if KINDS[kind] is None:
    path.unlink()
  else:
    path.write_bytes(KINDS[kind](content))


# In the process that does it


class Told(logging.Handler):
  """Keeps what a run says."""

  def __init__(self):
    super().__init__()
    self.lines = []

  def emit(self, record: logging.LogRecord) -> None:
    self.lines.append(record.getMessage())


def prepared(base: Path) -> None:
  """The undisturbed run, the one that was stopped half way, and an export of that."""
  from okd_jax import export
  from okd_jax.run import distill
  from okd_jax.run.stop import Stop, Stopped

  class Half(Stop):
    def __bool__(self) -> bool:
      return (base / "half/checkpoints/4").exists()

  distill.run(_config(), base / "whole")
  with contextlib.suppress(Stopped):
    distill.run(_config(), base / "half", Half())
  assert not (base / "half/report.html").exists()
  for step in _steps(base / "half"):
    given = [f"--workdir={base / 'half'}", f"--step={step}"]
    export.main([*given, f"--output={base / 'exports' / str(step)}"])


def _config():
  import small

  return small.config(**CHANGES)


def _steps(workdir: Path) -> list[int]:
  found = (workdir / "checkpoints").iterdir()
  return sorted(int(path.name) for path in found if path.name.isdecimal())


def outcome(base: Path, trial: Trial) -> tuple[str, str]:
  """(what came of it, what was said); 'failed: …' is what must not come of it."""
  from okd_jax.errors import UserError

  own = base / "copies" / f"{os.getpid()}"
  shutil.rmtree(own, ignore_errors=True)
  shutil.copytree(base / trial.workdir, own / "run")
  damage(own / "run" / trial.file, trial.kind)
  told, logger = Told(), logging.getLogger("okd_jax")
  logger.addHandler(told)
  logger.setLevel(logging.INFO)
  try:
    done = {"main": _main, "export": _export}[trial.command](base, own)
  except (UserError, OSError) as error:
    said = str(error)
    found = "refused" if len(said) < 600 else f"failed: {len(said)} characters"
    return found, said
  except Exception:
    return "failed: traceback", traceback.format_exc()[-3000:]
  finally:
    logger.removeHandler(told)
  said = "; ".join(line for line in told.lines if TOLD.search(line))
  if not done:
    return "failed: another end", "; ".join(told.lines)[-2000:]
  return ("told" if said else "identical"), said


def _main(base: Path, own: Path) -> bool:
  from okd_jax.run import distill

  distill.run(_config(), own / "run")
  return same(base / "whole", own / "run")


def _export(base: Path, own: Path) -> bool:
  from okd_jax import export

  export.main([f"--workdir={own / 'run'}", f"--output={own / 'out'}"])
  return any(_same_files(each, own / "out") for each in (base / "exports").iterdir())


def same(one: Path, two: Path) -> bool:
  """Whether two finished runs have left the same, but for times."""
  folders = ("student", "adapter", "adapter_base")
  return (
    all(_same_files(one / name, two / name) for name in folders)
    and _rows(one) == _rows(two)
    and _json(one / "sample_answers.json") == _json(two / "sample_answers.json")
  )


def _same_files(one: Path, two: Path) -> bool:
  from commands import same_folder

  shown = [_without_card(folder) for folder in (one, two)]
  return shown[0] == shown[1] and same_folder(one, two, but=("README.md",))


def _without_card(folder: Path) -> list[str]:
  """The names of the files; a card names the workdir, which is another."""
  return sorted(path.name for path in folder.rglob("*"))


def _rows(workdir: Path) -> list[dict]:
  times = {"step_s", "tokens_per_s", "seconds"}
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(x).items() if k not in times} for x in lines]


def _json(path: Path) -> object:
  return json.loads(path.read_text())


def work() -> None:
  """Does what it is told, a line each, until there is no more."""
  import jax

  jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache/faults"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what is printed is no answer
  for number, line in enumerate(sys.stdin):
    base, *rest = json.loads(line)
    found = outcome(Path(base), Trial(*rest)) if rest else prepared(Path(base))
    print(json.dumps(found), file=answers, flush=True)
    if number % 50 == 49:
      jax.clear_caches()


# In the one that tells it


class Worker:
  """A process that imports JAX once and does trials; a new one where it has died."""

  def __init__(self):
    self._process = None

  def ask(self, *what: object, limit: float = SLOW) -> tuple[str, str]:
    if self._process is None:
      self._process = subprocess.Popen(
        [sys.executable, __file__, "--work"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=sys.stderr if "-v" in sys.argv else subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
      )
    self._process.stdin.write(json.dumps([str(what[0]), *what[1:]]) + "\n")
    self._process.stdin.flush()
    ready, *_ = select.select([self._process.stdout], [], [], limit)
    line = self._process.stdout.readline() if ready else ""
    if line:
      return json.loads(line)
    self.close()
    return ("failed: died", "") if ready else ("failed: hung", f"{limit} s")

  def close(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
    self._process = None


def campaign(base: Path, chosen: Callable[[list[Trial]], list[Trial]], words=()):
  """[(trial, what came of it, what was said)] of the trials that are chosen."""
  worker, found = Worker(), []
  try:
    assert worker.ask(base, limit=600) is None, "the undisturbed runs"
    for trial in chosen(list(trials(base, list(words)))):
      came, said = worker.ask(base, *dataclasses.astuple(trial))
      found.append((trial, came, said))
      if sys.stderr.isatty():
        print(f"\r{len(found)}", end="", file=sys.stderr, flush=True)
      if came not in MARKS:
        print(f"{came}: {trial}\n{said}", flush=True)
  except KeyboardInterrupt:
    print(f"stopped after {len(found)}", flush=True)
  finally:
    worker.close()
  return found


def table(found: list[tuple[Trial, str, str]]) -> str:
  """Markdown: a line a file, a column a kind."""
  cells = collections.defaultdict(dict)
  for trial, came, _ in found:
    file = re.sub(r"checkpoints/(\d+)", _which, trial.file)
    file = re.sub("/[0-9a-f]{32}", "/…", file)
    row = f"{trial.workdir}, {trial.command}: {file}"
    mark = cells[row].get(trial.kind, "")
    cells[row][trial.kind] = mark + MARKS.get(came, f"**{came}**")
  lines = ["| workdir, command: file | " + " | ".join(KINDS) + " |"]
  lines.append("|---" * (1 + len(KINDS)) + "|")
  for row, marks in cells.items():
    lines.append(f"| {row} | " + " | ".join(marks.get(k, "") for k in KINDS) + " |")
  return "\n".join(lines)


def _which(match: re.Match) -> str:
  return "checkpoints/NEW" if int(match[1]) > 4 else "checkpoints/OLD"


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("words", nargs="*", help="only files with these in their path")
  parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.work:
    work()
    return 0
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as base:
    found = campaign(Path(base), list, args.words)
  counts = collections.Counter(came for _, came, _ in found)
  print(table(found))
  print(f"\n{len(found)} damages: {dict(counts)}, {time.monotonic() - began:.0f} s")
  return int(any(came not in MARKS for came in counts))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
