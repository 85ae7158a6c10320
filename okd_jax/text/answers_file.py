"""A model's answers to every prompt of a dataset, in a file that can be gone on with.

A student that is fine-tuned on O.jsonl learns from what its teacher says instead of
from the written answers (Kim & Rush 2016, arXiv 1606.07947).

Notable features:
  the rows keep their order and their prompts, and `data.train` reads them; a response
    that met the length limit is marked `"ended": false`, so that no end is trained;
  row i draws from the seed and i alone; killed and run again, the command goes on
    after the last whole line, and the file is the same to the byte;
  several processes share the rows, and the first one joins their files;
  what is kept is text: encoding it may cut it otherwise than the model did.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import logging
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
from tqdm import tqdm

from okd_jax.data import Record, check_vocabulary, prepare, stop_ids
from okd_jax.data.format import answered_row, decode_response
from okd_jax.errors import UserError
from okd_jax.models import Decoder
from okd_jax.runtime.files import write_text
from okd_jax.text.rollout import Completion, Sampling, generate
from okd_jax.text.source import decoder_source

_BATCHES = 4  # batches that are generated, and then written, at once
_SILENCE = 10.0  # seconds from one line about progress to the next
_PROMPT_TOKENS = 512  # the longest prompt, unless another is asked for

_log = logging.getLogger("okd_jax")  # also when this is run as a command


def write_samples(
  decoder: Decoder,
  variables: Any,
  records: Sequence[Record],
  tokenizer: Any,
  path: str | os.PathLike,
  *,
  template: str = "default",
  max_new_tokens: int = 256,
  max_prompt_length: int | None = None,
  sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
  seed: int = 0,
  batch_size: int = 32,
  sharding: jax.sharding.Sharding | None = None,
) -> None:
  """Writes every record, with the model's response for its own, to a jsonl file.

  A whole file of the same settings is left alone, and a partial one, `PATH.partial`,
  is gone on with; `PATH.settings.json` tells. Every process calls it: each answers
  its share of the rows, unless the model or the batch is spread over several of
  them; those answer every row together, and the first one writes.

  variables: `{'params': …}`, and 'adapter' for the adapted model; sharded or not.
  max_prompt_length: longer prompts are answered by their last tokens, and stay whole
    in the file; by default 512, or what leaves room for the response.
  sharding: of a batch's leading axis, its mesh being set by `jax.set_mesh`.

  Raises:
    UserError: a record without a prompt, settings that cannot be used, or a file at
      `path` that was made under others.
  """
  path = Path(path)
  if path.suffix != ".jsonl":
    raise UserError(f"{path}: the output must end in .jsonl, so that it can be read")
  longest = _longest_prompt(decoder.config, max_new_tokens, max_prompt_length)
  ask = functools.partial(
    generate,
    decoder_source(decoder),
    variables,
    key=jax.random.key(seed),
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    eos_ids=sorted({*decoder.config.eos_ids, *stop_ids(tokenizer, template)}),
    batch_size=batch_size,
    sharding=sharding,
  )
  ask(prompts=[])  # Settings that are unusable are so before anything is written.
  prompts = _prompts(decoder, records, tokenizer, template, longest)
  job = _Job(path, records, prompts, tokenizer, ask, _BATCHES * batch_size)
  asked = {"template": template, "max_prompt_length": longest, "seed": seed}
  asked |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
  asked |= {name: float(value) for name, value in sampling._asdict().items()}
  asked |= {"model": _checksum(variables), "dtype": jnp.dtype(decoder.dtype).name}
  settings = asked | {"data": job.digest()}
  _run(job, settings, together=not _is_local(variables, sharding))


@dataclasses.dataclass(frozen=True)
class _Job:
  """What is asked, and where the answers go.

  ask: `(prompts=…, rows=…) -> completions`, rows being the prompts' numbers.
  piece: rows that are generated at once. Where pieces begin depends neither on where
    a run was cut nor on who works on them, so a row always has the same company and
    with it the same arithmetic, to the last bit.
  """

  path: Path
  records: Sequence[Record]
  prompts: Sequence[np.ndarray]
  tokenizer: Any
  ask: Callable[..., list[Completion]]
  piece: int

  def share(self, index: int, count: int) -> range:
    """The rows of one of `count` processes: whole pieces, in order."""
    pieces = -(-len(self.records) // self.piece)
    first, last = (pieces * i // count for i in (index, index + 1))
    return range(first * self.piece, min(last * self.piece, len(self.records)))

  def part(self, index: int, count: int) -> Path:
    """The file that one of `count` processes writes."""
    ending = f".{index}-of-{count}" if count > 1 else ""
    return self.path.with_name(f"{self.path.name}.partial{ending}")

  def lines(self, rows: range) -> list[bytes]:
    """The lines of the file that belong to these rows."""
    completions = self.ask(prompts=[self.prompts[i] for i in rows], rows=rows)
    lines = []
    for i, (tokens, _, ended) in zip(rows, completions, strict=True):
      said = tokens[:-1] if ended else tokens
      text = decode_response(self.tokenizer, self.prompts[i], said, ended)
      lines.append(_line(answered_row(self.records[i], text, ended)))
    return lines

  def digest(self) -> str:
    """A hash of all that is asked: the prompts as text and as tokens."""
    found = hashlib.sha256()
    for record, prompt in zip(self.records, self.prompts, strict=True):
      found.update(_line(answered_row(record, "")))
      found.update(prompt.astype("<i4").tobytes())
    return found.hexdigest()[:16]


def _line(row: Mapping) -> bytes:
  return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _run(job: _Job, settings: dict, together: bool) -> None:
  """This process's part of the work, and for the first one what frames it."""
  index, count = jax.process_index(), 1 if together else jax.process_count()
  settings = settings | {"processes": count}
  if _is_whole(job.path, settings):
    _log.info("%s is whole already", job.path)
    return
  if index == 0:
    write_text(_sidecar(job.path), json.dumps(settings, indent=2) + "\n")
  _barrier("settings")
  writes = index == 0 or not together
  _write_part(job, 0 if together else index, count, writes=writes, shown=index == 0)
  _barrier("parts")
  if index == 0:
    _join(job, count)
  _barrier("whole")


def _write_part(
  job: _Job, index: int, count: int, *, writes: bool = True, shown: bool = True
) -> None:
  """Answers the rows of one share that its file does not hold yet.

  writes: False only computes, beside a process that also writes.
  """
  rows, part = job.share(index, count), job.part(index, count)
  done = _whole_lines(part) if writes else 0
  if count < jax.process_count():  # All compute together, from where the file ends.
    done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
  if done > len(rows):
    raise UserError(f"{part} holds {done} lines, but {len(rows)} are asked; delete it")
  with (
    (part if writes else Path(os.devnull)).open("ab") as file,
    _Progress(len(rows), done, shown) as progress,
  ):
    for first in range(0, len(rows), job.piece):
      piece = rows[first : first + job.piece]
      old = min(max(done - first, 0), len(piece))
      if old < len(piece):  # One that was cut is generated as a whole again.
        file.write(b"".join(job.lines(piece)[old:]))
        file.flush()
        progress.add(len(piece) - old)


def _whole_lines(part: Path) -> int:
  """How many lines a file holds, none if it is missing; a torn last one is cut off."""
  if not part.exists():
    return 0
  count = end = 0
  with part.open("rb+") as file:
    for line in file:
      if line.endswith(b"\n"):
        count, end = count + 1, end + len(line)
    file.truncate(end)
  return count


def _join(job: _Job, count: int) -> None:
  """Makes one file of the parts, which gets its name once it is whole."""
  whole, parts = job.part(0, 1), [job.part(index, count) for index in range(count)]
  if missing := [part for part in parts if not part.exists()]:
    raise UserError(f"{missing[0]} is missing; all processes must share the folder")
  if count > 1:
    with whole.open("wb") as file:
      for part in parts:
        with part.open("rb") as lines:
          shutil.copyfileobj(lines, file)
  os.replace(whole, job.path)
  for part in parts:
    part.unlink(missing_ok=True)
  with job.path.open("rb") as file:
    cut = sum(line.endswith(b'"ended": false}\n') for line in file)
  _log.info("%s: %d rows, %d cut at the limit", job.path, len(job.records), cut)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"okd_jax.sample: {name}")


# Settings


def _sidecar(path: Path) -> Path:
  return path.with_name(f"{path.name}.settings.json")


def _is_whole(path: Path, settings: Mapping) -> bool:
  """Whether `path` is finished; an error if what is there is of other settings."""
  parts = path.parent.glob(f"{glob.escape(path.name)}.partial*")
  there = [x for x in (path, *sorted(parts)) if x.exists()]
  if not there:
    return False
  try:
    saved = json.loads(_sidecar(path).read_text(encoding="utf8"))
  except (OSError, ValueError) as error:
    why = f"exists, but nothing says how it was made ({error})"
    raise UserError(f"{there[0]} {why}; name another output") from error
  if path.exists():  # It is the same, however many have worked on it.
    saved, settings = ({**x, "processes": 0} for x in (saved, settings))
  different = [
    f"{key}={saved.get(key)!r} there, {settings.get(key)!r} here"
    for key in sorted(set(saved) | set(settings))
    if saved.get(key) != settings.get(key)
  ]
  if different:
    why = f"was made with other settings ({'; '.join(different)})"
    raise UserError(f"{there[0]} {why}; delete it, or name another output")
  return path.exists()


@jax.jit
def _sums(leaves):
  bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
  whole = (jax.lax.bitcast_convert_type(x, bits[x.dtype.itemsize]) for x in leaves)
  return [x.astype(jnp.uint32).sum(dtype=jnp.uint32) for x in whole]


def _checksum(tree) -> str:
  """Eight digits that change with any parameter, but not with where they lie.

  Bits are added as integers, so that the order of the addition does not matter.
  """
  leaves, structure = jax.tree.flatten(tree)
  sums = [int(number) for number in jax.device_get(_sums(leaves))]
  return f"{zlib.crc32(repr((structure, sums)).encode()):08x}"


def _is_local(variables, sharding) -> bool:
  """Whether this process can run the model by itself."""
  arrays = [x for x in jax.tree.leaves(variables) if isinstance(x, jax.Array)]
  placed = arrays if sharding is None else [*arrays, sharding]
  return all(x.is_fully_addressable for x in placed)


# Prompts


def _longest_prompt(config, max_new_tokens: int, wanted: int | None) -> int:
  """max_prompt_length or its default; an error if the context does not hold it all."""
  room = config.max_length - max_new_tokens
  longest = max(1, min(_PROMPT_TOKENS, room)) if wanted is None else wanted
  if longest > room:
    wanted = f"max_prompt_length={longest} and max_new_tokens={max_new_tokens}"
    raise UserError(f"{wanted} do not fit the model's {config.max_length} tokens")
  return longest


def _prompts(decoder, records, tokenizer, template: str, longest: int):
  """The tokens of every record's prompt, int32 [P]."""
  for record in records:
    if record.kind == "text":
      raise UserError(f"{record.where}: is plain text, which has no prompt to answer")
  examples, _ = prepare(
    records,
    tokenizer,
    template=template,
    max_length=1 << 30,  # of the prompt and an answer that is not used
    max_prompt_length=longest,
    overlong_prompt="truncate",
    name="prompts",
  )
  check_vocabulary({"the model": decoder.config.vocab_size}, examples)
  return [example.tokens[: example.prompt_length] for example in examples]


class _Progress(tqdm):
  """Counts rows: a bar on a terminal, plain lines elsewhere, nothing if not `shown`."""

  def __init__(self, total: int, done: int, shown: bool):
    self._plain = shown and not sys.stderr.isatty()
    off = not shown or self._plain
    super().__init__(total=total, initial=done, unit="row", disable=off)
    self._done, self._new, self._begin = done, 0, time.monotonic()
    self._last = self._begin

  def add(self, rows: int) -> None:
    """So many more rows are written."""
    self.update(rows)
    self._done, self._new = self._done + rows, self._new + rows
    now, left = time.monotonic(), self.total - self._done
    if self._plain and (now - self._last >= _SILENCE or not left):
      self._last, speed = now, self._new / max(now - self._begin, 1e-9)
      line = f"sample {self._done}/{self.total} rows  {speed:.1f} rows/s"
      eta = self.format_interval(left / speed)
      print(f"{line}  ETA {eta}", file=sys.stderr, flush=True)
