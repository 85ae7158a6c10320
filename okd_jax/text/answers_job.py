"""A model's answer to every prompt, a line each, in a file that can be gone on with.

Killed and run again, a job goes on after the last whole line, and the file is the same
to the byte. Several processes share the rows, and the first one joins their files;
where the model or the batch is spread over several of them, all answer every row
together and the first one writes.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int, PyTree
from tqdm import tqdm

from okd_jax.errors import UserError
from okd_jax.runtime import files, workdir
from okd_jax.text.rollout import Completion

BATCHES = 4  # batches that are generated, and then written, at once
_SILENCE = 10.0  # seconds from one line about progress to the next


@dataclasses.dataclass(frozen=True)
class Job:
  """What is asked, and where the answers go.

  ask: `(prompts=…, rows=…) -> completions`, rows being the prompts' numbers.
  line: what stands in the file for the completion of a row, its line end included.
  about: what the file is made from; it is not made anew where that is the same.
  piece: rows that are generated at once. Where pieces begin depends neither on where
    a run was cut nor on who works on them, so a row always has the same company and
    with it the same arithmetic, to the last bit.
  together: whether it takes all processes to answer a row.
  label: what the progress says is going on.
  order: in which the rows are answered, and stand in a file that is not whole yet; ()
    is their own.
  """

  path: Path
  prompts: Sequence[Int[np.ndarray, " _"]]
  ask: Callable[..., list[Completion]]
  line: Callable[[int, Completion], bytes]
  about: Mapping[str, Any]
  piece: int
  together: bool
  label: str
  order: Sequence[int] = ()

  def share(self, index: int, count: int) -> range:
    """Where in the order the rows of one of `count` processes lie: whole pieces."""
    pieces = -(-len(self.prompts) // self.piece)
    first, last = (pieces * i // count for i in (index, index + 1))
    return range(first * self.piece, min(last * self.piece, len(self.prompts)))

  def lines(self, places: range) -> list[bytes]:
    """The lines of the rows at these places of the order."""
    rows = [self.order[place] for place in places] if self.order else places
    completions = self.ask(prompts=[self.prompts[i] for i in rows], rows=rows)
    return [self.line(i, each) for i, each in zip(rows, completions, strict=True)]


def answer(job: Job) -> bool:
  """Writes the file, or what is missing of it; every process calls it.

  Returns:
    False if there was nothing to do, the file being whole.

  Raises:
    UserError: if what is there was made from something else, or by another number of
      processes.
  """
  if job.path.is_dir():
    raise UserError(f"{job.path} is a folder; name a file")
  workdir.claim(job.path, job.about, "output")
  if job.path.exists():
    return False
  index, count = jax.process_index(), jax.process_count()
  if job.together:
    count = 1
  _refuse_strays(job.path, count)
  writes = workdir.writes() or not job.together
  write_part(job, 0 if job.together else index, count, writes=writes, shown=index == 0)
  workdir.barrier("parts answered")
  if workdir.writes():
    join(job, count)
  workdir.barrier("answers joined")
  return True


def _refuse_strays(path: Path, count: int) -> None:
  own = {workdir.part(path, index, count) for index in range(count)}
  if strays := [x for x in workdir.parts(path) if x not in own]:
    raise UserError(
      f"{strays[0]} was left by another number of processes, now {count} share the "
      "rows; start as many again, or delete it"
    )


def write_part(
  job: Job, index: int, count: int, *, writes: bool = True, shown: bool = True
) -> None:
  """Answers the rows of one share that its file does not hold yet.

  writes: False only computes, beside a process that also writes.
  """
  rows, part = job.share(index, count), workdir.part(job.path, index, count)
  done = workdir.whole_lines(part) if writes else 0
  if count < jax.process_count():  # All compute together, from where the file ends.
    done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
  if done > len(rows):
    raise UserError(f"{part} holds {done} lines, but {len(rows)} are asked; delete it")
  with (
    (part if writes else Path(os.devnull)).open("ab") as file,
    _Progress(job.label, len(rows), done, shown) as progress,
  ):
    for first in range(0, len(rows), job.piece):
      piece = rows[first : first + job.piece]
      old = min(max(done - first, 0), len(piece))
      if old < len(piece):  # One that was cut is generated as a whole again.
        file.write(b"".join(job.lines(piece)[old:]))
        file.flush()
        progress.add(len(piece) - old)


def join(job: Job, count: int) -> None:
  """Makes one file of the parts, which gets its name once it is whole."""
  whole = workdir.part(job.path)
  parts = [workdir.part(job.path, index, count) for index in range(count)]
  if missing := [part for part in parts if not part.exists()]:
    raise UserError(f"{missing[0]} is missing; all processes must share the folder")
  if job.order:
    files.write_text(job.path, _in_row_order(parts, job.order))
  else:
    if count > 1:
      with whole.open("wb") as file:
        for part in parts:
          with part.open("rb") as lines:
            shutil.copyfileobj(lines, file)
    os.replace(whole, job.path)
  for part in parts:
    part.unlink(missing_ok=True)


def _in_row_order(parts: Sequence[Path], order: Sequence[int]) -> str:
  """The lines, which lie in `order`, in the order of their rows."""
  lines = [line for part in parts for line in part.read_bytes().splitlines(True)]
  rows = dict(zip(order, lines, strict=True))
  return b"".join(rows[i] for i in range(len(order))).decode()


def digest(prompts: Sequence[Int[np.ndarray, " _"]]) -> str:
  """Sixteen digits of a hash of the prompts' tokens, for a job's `about`."""
  found = hashlib.sha256()
  for prompt in prompts:
    found.update(json.dumps(prompt.tolist()).encode() + b"\n")
  return found.hexdigest()[:16]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
  whole = (jax.lax.bitcast_convert_type(x, bits[x.dtype.itemsize]) for x in leaves)
  return [x.astype(jnp.uint32).sum(dtype=jnp.uint32) for x in whole]


def checksum(tree: PyTree) -> str:
  """Eight digits that change with any parameter, but not with where they lie.

  Bits are added as integers, so that the order of the addition does not matter.
  """
  leaves, structure = jax.tree.flatten(tree)
  sums = [int(number) for number in jax.device_get(_sums(leaves))]
  return f"{zlib.crc32(repr((structure, sums)).encode()):08x}"


class _Progress(tqdm):
  """Counts rows: a bar on a terminal, plain lines elsewhere, nothing if not `shown`."""

  def __init__(self, label: str, total: int, done: int, shown: bool):
    self._plain = shown and not sys.stderr.isatty()
    off = not shown or self._plain
    super().__init__(total=total, initial=done, unit="row", desc=label, disable=off)
    self._label, self._done, self._new = label, done, 0
    self._begin = self._last = time.monotonic()

  def add(self, rows: int) -> None:
    """So many more rows are written."""
    self.update(rows)
    self._done, self._new = self._done + rows, self._new + rows
    now, left = time.monotonic(), self.total - self._done
    if self._plain and (now - self._last >= _SILENCE or not left):
      self._last, speed = now, self._new / max(now - self._begin, 1e-9)
      line = f"{self._label} {self._done}/{self.total} rows  {speed:.1f} rows/s"
      eta = self.format_interval(left / speed)
      print(f"{line}  ETA {eta}", file=sys.stderr, flush=True)
