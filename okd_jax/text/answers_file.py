"""A model's answers to every prompt of a dataset, in a file that is a dataset too.

A student that is fine-tuned on O.jsonl learns from what its teacher says instead of
from the written answers (Kim & Rush 2016, arXiv 1606.07947).

Notable features:
  the rows keep their order and their prompts, and `data.train` reads them; a response
    that met the length limit is marked `"ended": false`, so that no end is trained;
  row i draws from the seed and i alone; killed and run again, the command goes on
    after the last whole line, and the file is the same to the byte (`answers_job`);
  what is kept is text: encoding it may cut it otherwise than the model did.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from okd_jax.data import Record, check_vocabulary, prepare, stop_ids
from okd_jax.data.format import answered_row, decode_response
from okd_jax.errors import UserError
from okd_jax.models import Decoder, ModelConfig
from okd_jax.runtime.files import local
from okd_jax.runtime.workdir import writes
from okd_jax.text.answers_job import BATCHES, Job, answer, checksum
from okd_jax.text.rollout import Completion, Sampling, generate
from okd_jax.text.source import decoder_source

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

  A whole file of the same settings is left alone, a partial one is gone on with. Every
  process calls it.

  variables: `{'params': …}`, and 'adapter' for the adapted model; sharded or not.
  max_prompt_length: longer prompts are answered by their last tokens, and stay whole
    in the file; by default 512, or what leaves room for the response.
  sharding: of a batch's leading axis, its mesh being set by `jax.set_mesh`.

  Raises:
    UserError: a record without a prompt, settings that cannot be used, or a file at
      `path` that was made under others.
  """
  longest = _longest_prompt(decoder.config, max_new_tokens, max_prompt_length)
  asked = _Asked(template, longest, max_new_tokens, batch_size, seed, sampling)
  job = _job(asked, decoder, variables, records, tokenizer, _jsonl(path), sharding)
  if not answer(job):
    _log.info("%s is whole already", job.path)
  elif writes():
    with job.path.open("rb") as file:
      cut = sum(line.endswith(b'"ended": false}\n') for line in file)
    _log.info("%s: %d rows, %d cut at the limit", job.path, len(records), cut)


class _Asked(NamedTuple):
  """How prompts are written and answers drawn."""

  template: str
  max_prompt_length: int
  max_new_tokens: int
  batch_size: int
  seed: int
  sampling: Sampling

  def about(self) -> dict[str, Any]:
    numbers = {name: float(value) for name, value in self.sampling._asdict().items()}
    return {k: v for k, v in self._asdict().items() if k != "sampling"} | numbers


def _job(
  asked: _Asked,
  decoder: Decoder,
  variables: Any,
  records: Sequence[Record],
  tokenizer: Any,
  path: Path,
  sharding: jax.sharding.Sharding | None,
) -> Job:
  """The job of writing every record with an answer; refuses what cannot be asked."""
  ask = functools.partial(
    generate,
    decoder_source(decoder),
    variables,
    key=jax.random.key(asked.seed),
    max_new_tokens=asked.max_new_tokens,
    sampling=asked.sampling,
    eos_ids=sorted({*decoder.config.eos_ids, *stop_ids(tokenizer, asked.template)}),
    batch_size=asked.batch_size,
    sharding=sharding,
  )
  ask(prompts=[])  # Settings that are unusable are so before anything is written.
  prompts = _prompts(decoder, records, tokenizer, asked)

  def line(i: int, completion: Completion) -> bytes:
    return _line(_answered(tokenizer, records[i], prompts[i], completion))

  about = asked.about() | {"data": _digest(records, prompts)}
  about |= {"model": checksum(variables), "dtype": jnp.dtype(decoder.dtype).name}
  piece, together = BATCHES * asked.batch_size, not _is_local(variables, sharding)
  return Job(path, prompts, ask, line, about, piece, together, label="sample")


def _jsonl(path: str | os.PathLike) -> Path:
  path = local(path)
  if path.suffix != ".jsonl":
    raise UserError(f"{path}: the output must end in .jsonl, so that it can be read")
  return path


def _answered(
  tokenizer: Any,
  record: Record,
  prompt: Int[np.ndarray, " P"],
  completion: Completion,
) -> dict[str, Any]:
  """The record's row with the model's answer."""
  tokens, ended = completion.tokens, completion.ended
  said = tokens[:-1] if ended else tokens
  return answered_row(record, decode_response(tokenizer, prompt, said, ended), ended)


def _line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row, ensure_ascii=False).encode() + b"\n"


# What it is made from


def _digest(records: Sequence[Record], prompts: Sequence[Int[np.ndarray, " _"]]) -> str:
  """A hash of all that is asked: the prompts as text and as tokens."""
  found = hashlib.sha256()
  for record, prompt in zip(records, prompts, strict=True):
    found.update(_line(answered_row(record, "")))
    found.update(prompt.astype("<i4").tobytes())
  return found.hexdigest()[:16]


def _is_local(variables: Any, sharding: jax.sharding.Sharding | None) -> bool:
  """Whether this process can run the model by itself."""
  arrays = [x for x in jax.tree.leaves(variables) if isinstance(x, jax.Array)]
  placed = arrays if sharding is None else [*arrays, sharding]
  return all(x.is_fully_addressable for x in placed)


# Prompts


def _longest_prompt(
  config: ModelConfig, max_new_tokens: int, wanted: int | None
) -> int:
  """max_prompt_length or its default; an error if the context does not hold it all."""
  room = config.max_length - max_new_tokens
  longest = max(1, min(_PROMPT_TOKENS, room)) if wanted is None else wanted
  if longest > room:
    wanted = f"max_prompt_length={longest} and max_new_tokens={max_new_tokens}"
    raise UserError(f"{wanted} do not fit the model's {config.max_length} tokens")
  return longest


def _prompts(
  decoder: Decoder,
  records: Sequence[Record],
  tokenizer: Any,
  asked: _Asked,
) -> list[Int[np.ndarray, " _"]]:
  """The tokens of every record's prompt."""
  for record in records:
    if record.kind == "text":
      raise UserError(f"{record.where}: is plain text, which has no prompt to answer")
  examples, _ = prepare(
    records,
    tokenizer,
    template=asked.template,
    max_length=1 << 30,  # of the prompt and an answer that is not used
    max_prompt_length=asked.max_prompt_length,
    overlong_prompt="truncate",
    name="prompts",
  )
  check_vocabulary({"the model": decoder.config.vocab_size}, examples)
  return [example.prompt for example in examples]
