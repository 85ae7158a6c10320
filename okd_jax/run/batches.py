"""Batches of sampled text: whatever a method's `Sequences` ask for.

Sampled rows go through the very path that the data's rows take (`data.pad_row`), so a
sampled answer and the same answer as data are the same batch. All choices follow from
the seed and the step alone, and every process makes all of them, so that the rows do
not depend on how many there are.
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from okd_jax.data import Example, pad_row, stop_ids
from okd_jax.errors import UserError
from okd_jax.methods.base.knobs import Linear
from okd_jax.methods.base.sequences import Sequences
from okd_jax.run.replay import Buffer, Share
from okd_jax.runtime import sharding
from okd_jax.runtime.files import read_json, write_text
from okd_jax.teachers.store import digest
from okd_jax.text.pairs import (
  Interleaved,
  Mixed,
  cut_source,
  draw_interleaved,
  draw_mixed,
  pair_source,
)
from okd_jax.text.rollout import draw, generate
from okd_jax.text.source import decoder_source

_log = logging.getLogger(__name__)

ROW = ("tokens", "labels", "mask", "segment_ids")
_PIECE = 4  # batches that are answered, and then written, at once
# Branches of the seed's key, apart from each other and from those that the first
# state is drawn with, which count from 0.
_BEFOREHAND = {"teacher": 2**31, "student": 2**31 + 1}
_EACH_STEP = 2**31 + 2


class Sampler:
  """Turns batches of the data into batches to train on, one a step.

  answers: by model, 'teacher' or 'student', its answers to `run.train`'s prompts, where
    the method wants them beforehand.
  """

  def __init__(
    self, run, answers: Mapping[str, Sequence[Example]], pad_id: int, trunk=None
  ):
    self._run, self._answers, self._pad_id = run, answers, pad_id
    self._trunk = trunk
    self.plan: Sequences = run.method.sequences
    self._length = run.config.data.max_length
    self._seed = run.config.train.seed
    replay = self.plan.replay
    self._buffer = Buffer(replay.capacity, self._length) if replay else None
    self._share = Share(replay) if replay and replay.adaptive else None
    self._prepare = None
    if self.plan.prepare:
      where = sharding.batch_sharding(run.mesh)
      self._prepare = jax.jit(self._prepared, out_shardings=where)
    self._held = None  # a sampled batch that several steps train on

  def batch(
    self, step: int, params, gold: Mapping[str, np.ndarray]
  ) -> tuple[dict[str, Any], dict[str, float]]:
    """(batch on the devices, figures) of the step after `step`.

    gold: this process's rows of the data, with their indices in `run.packs` as 'row'.
    """
    run, plan = self._run, self.plan
    rows, gold = gold["row"], {name: gold[name] for name in ROW}
    texts = [run.packs[row] for row in rows]
    start = time.monotonic()
    figures, beside = {}, {}
    if plan.source == "teacher":
      main = sharding.put_batch(self._beforehand("teacher", rows), run.mesh)
    elif not plan.sampled:
      main = sharding.put_batch(gold, run.mesh)
      if self._prepare:
        main = self._prepare(params, run.frozen, main, self._key(step))
    elif self._held is not None and step % plan.updates:
      main = self._held
    else:
      main, figures = self._sampled(step, params, gold, rows)
      main = sharding.put_batch(main, run.mesh)
      if self._prepare:
        main = self._prepare(params, run.frozen, main, self._key(step))
      self._held = main if plan.updates > 1 else None
      waited = figures.pop("waited_s", 0.0)
      figures["sampling_s"] = time.monotonic() - start - waited
    if plan.gold:
      beside["gold"] = gold
    if self._trunk:
      hidden = self._trunk.read(texts, gold["segment_ids"] > 0)["hidden"]
      (beside["gold"] if plan.gold else beside)["trunk"] = hidden
    if run.stored:
      beside["stored"] = run.stored["train"].read(texts, gold["mask"])
    if run.reading:
      beside["teacher"] = self._rows([run.reading.train[row] for row in rows])
    if plan.source != "teacher":
      beside |= {name: self._beforehand(name, rows) for name in plan.beforehand}
    return main | sharding.put_batch(beside, run.mesh), figures

  def _prepared(self, params, frozen, batch, key):
    return self.plan.prepare(self._run.models, params, frozen, batch, key)

  def _key(self, step: int):
    """Of the step's own draws; those of tokens are folded once more."""
    branch = jax.random.fold_in(jax.random.key(self._seed), _EACH_STEP)
    return jax.random.fold_in(branch, step)

  def _sampled(self, step, params, gold, rows):
    """Rows of this process: fresh, from the store, or the data's own."""
    run, plan = self._run, self.plan
    chance = np.random.default_rng((self._seed, step))
    u = chance.random()
    progress = min(step / max(run.steps - 1, 1), 1.0)
    share = plan.share(progress) if isinstance(plan.share, Linear) else plan.share
    fresh = u < share
    if self._share:
      wanted = self._share.phi * share
      fresh = u < self._share.fresh(progress) * share or (
        u < wanted and not self._buffer.full
      )
      if not fresh and u < wanted:
        return self._replayed(step, len(rows), chance)
    if not fresh:
      return gold, {"sampled": 0.0}
    # The step before may still be running: that time is its own, not sampling.
    begun = time.monotonic()
    jax.block_until_ready(params)
    waited = time.monotonic() - begun
    answers, ended = self._write(step, params, rows)
    new = self._rows(answers)
    lengths = [len(a.tokens) - a.prompt_length for a in answers]
    figures = {
      "sampled": 1.0,
      "sampled_length": float(np.mean(lengths)),
      "sampled_ended": float(np.mean(ended)),
      "waited_s": waited,
    }
    if self._buffer is not None:
      self._buffer.push(new, step)
      if not self._share:
        replayed, more = self._replayed(step, len(rows), chance)
        return replayed, figures | more
    return self._mine(new, len(rows)), figures

  def _replayed(self, step: int, count: int, chance):
    total = count * jax.process_count()
    rows, written = self._buffer.draw(total, chance)
    figures = {"sampled": 1.0, "replay_age": float(np.mean(step - written))}
    return self._mine(rows, count), figures

  def _write(self, step: int, params, rows):
    """(answers as examples, whether each ended) to the prompts of all processes."""
    run = self._run
    if jax.process_count() > 1:
      rows = multihost_utils.process_allgather(rows).reshape(-1)
    examples = [run.train[row] for row in rows]
    source, variables, choose, sampling = self._author(params)
    completions = generate(
      source,
      variables,
      [_prompt(example) for example in examples],
      self._key(step),
      max_new_tokens=room(run),
      sampling=sampling,
      eos_ids=_ends(run),
      batch_size=len(examples),
      choose=choose,
      sharding=sharding.batch_sharding(run.mesh),
    )
    answers = [
      _answered(example, completion.tokens)
      for example, completion in zip(examples, completions, strict=True)
    ]
    return answers, [completion.ended for completion in completions]

  def _author(self, params):
    """(source, variables, choose, sampling) of whoever writes."""
    run, plan = self._run, self.plan
    student = _source(run, "student")
    own = {"params": params["student"]}
    if plan.source == "student":
      return student, own, draw, plan.student
    role, variables = "teacher", {"params": run.frozen}
    if "adapter" in params:
      role, variables = "adapted", variables | {"adapter": params["adapter"]}
    source = pair_source(student, _source(run, role))
    if plan.source == "mixture":
      settings = Mixed(plan.student, np.float32(plan.weight))
      return source, (own, variables), draw_mixed, settings
    settings = Interleaved(plan.student, plan.teacher, np.int32(plan.top))
    return source, (own, variables), draw_interleaved, settings

  def _beforehand(self, name: str, rows) -> dict[str, np.ndarray]:
    return self._rows([self._answers[name][row] for row in rows])

  def _rows(self, examples) -> dict[str, np.ndarray]:
    padded = [pad_row(e, self._length, self._pad_id) for e in examples]
    return {name: np.stack([row[name] for row in padded]) for name in ROW}

  def _mine(self, rows, count: int):
    """This process's share of rows that all processes have."""
    first = jax.process_index() * count
    return {name: values[first : first + count] for name, values in rows.items()}

  def observe(self, loss: float) -> None:
    """Tells the held-out loss, on which DistiLLM's share of sampled text depends."""
    if self._share:
      self._share.observe(loss)

  def state(self) -> dict[str, Any]:
    """Everything a resumed run needs, as arrays of fixed shapes; may be empty."""
    state = {}
    if self._buffer is not None:
      state["buffer"] = self._buffer.state()
    if self._share:
      state["share"] = self._share.state()
    if self.plan.updates > 1:
      state["held"] = self._held if self._held is not None else self._nothing()
    return state

  def _nothing(self):
    """What stands for a held batch before there is one."""
    run = self._run
    rows = run.config.train.batch_size
    shape = (rows, self._length)
    kinds = dict(tokens=np.int32, labels=np.int32, mask=bool, segment_ids=np.int32)
    batch = {k: jax.ShapeDtypeStruct(shape, kind) for k, kind in kinds.items()}
    if self._prepare:
      params, frozen = run.abstract.params, run.frozen
      key = jax.eval_shape(self._key, 0)
      batch = jax.eval_shape(self._prepared, params, frozen, batch, key)
    where = sharding.batch_sharding(run.mesh)
    return jax.tree.map(
      lambda x: jax.device_put(np.zeros(x.shape, x.dtype), where), batch
    )

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from what `state` returned."""
    if self._buffer is not None:
      self._buffer.restore(state["buffer"])
    if self._share:
      self._share.restore(state["share"])
    if self.plan.updates > 1:
      self._held = state["held"]


def answers_beforehand(run, name: str, path: Path) -> list[Example]:
  """One answer to each prompt of `run.train`, by 'teacher' or the untrained 'student'.

  Sampled into `path`, a line of token ids each, and read from there where it is done
  already; interrupted, it goes on after the last whole line. What was asked lies beside
  it, as NAME.json.

  Raises:
    UserError: if the file holds answers to other prompts, or is damaged.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  _check_asked(run, name, path)
  answers = _read_answers(path, len(run.train))
  total, piece = len(run.train), _PIECE * run.config.eval.batch_size
  params = run.frozen if name == "teacher" else None
  bar = tqdm(
    total=total,
    initial=len(answers),
    unit="row",
    desc=f"{name} answers",
    disable=not sys.stderr.isatty(),
  )
  with bar:
    while len(answers) < total:
      if params is None:
        params = run.init().params["student"]
      rows = range(len(answers), min(len(answers) + piece, total))
      new = _answer(run, name, params, rows)
      if jax.process_index() == 0:
        with path.open("a", encoding="utf8") as file:
          file.writelines(json.dumps(tokens) + "\n" for tokens in new)
      answers += new
      bar.update(len(new))
      if not sys.stderr.isatty():
        _log.info("%s answered %d of %d prompts", name, len(answers), total)
  return [
    _answered(example, np.array(tokens, np.int32))
    for example, tokens in zip(run.train, answers, strict=True)
  ]


def _answer(run, name: str, params, rows) -> list[list[int]]:
  plan = run.method.sequences
  completions = generate(
    _source(run, name),
    {"params": params},
    [_prompt(run.train[row]) for row in rows],
    jax.random.fold_in(jax.random.key(run.config.train.seed), _BEFOREHAND[name]),
    max_new_tokens=room(run),
    sampling=plan.student,
    eos_ids=_ends(run),
    batch_size=run.config.eval.batch_size,
    rows=rows,
    sharding=sharding.batch_sharding(run.mesh),
  )
  return [completion.tokens.tolist() for completion in completions]


def _source(run, role: str):
  """What samples a model, in the tokens that all models of the run have."""
  source, sizes = decoder_source(run.decoders[role]), _vocabulary_sizes(run)
  return cut_source(source, min(sizes)) if len(sizes) > 1 else source


def _vocabulary_sizes(run) -> set[int]:
  return {decoder.config.vocab_size for decoder in run.decoders.values()}


def _check_asked(run, name: str, path: Path) -> None:
  """Writes down what is asked, or refuses answers to anything else."""
  plan, config = run.method.sequences, run.config
  asked = {
    "prompts": digest(_prompt(example).tobytes() for example in run.train),
    "model": config.teacher.path if name == "teacher" else config.student.path,
    "max_new_tokens": room(run),
    "sampling": [float(value) for value in plan.student],
    "ends": _ends(run),
    "seed": config.train.seed,
  }
  about = path.with_suffix(".json")
  if not path.exists():
    if jax.process_index() == 0:
      write_text(about, json.dumps(asked, indent=2) + "\n")
    return
  found = read_json(about)
  if different := [key for key, value in asked.items() if found.get(key) != value]:
    raise UserError(
      f"{path} holds answers to other questions ({', '.join(different)} differ); "
      "delete it to have them sampled anew, or name another workdir"
    )


def _read_answers(path: Path, most: int) -> list[list[int]]:
  """The whole lines of a file that may have been cut off; it is left with just them."""
  if not path.exists():
    return []
  text = path.read_text(encoding="utf8")
  whole = text[: text.rfind("\n") + 1]
  if whole != text:
    write_text(path, whole)
  try:
    answers = [json.loads(line) for line in whole.splitlines()]
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}); delete it") from error
  if len(answers) > most:
    raise UserError(f"{path}: {len(answers)} answers to {most} prompts; delete it")
  return answers


def room(run) -> int:
  """New tokens an answer may have, beside the longest prompt."""
  data = run.config.data
  return run.method.sequences.max_new_tokens or (
    data.max_length - data.max_prompt_length
  )


def _prompt(example: Example) -> np.ndarray:
  return example.tokens[: example.prompt_length]


def _answered(example: Example, tokens: np.ndarray) -> Example:
  """The example with another answer: the path every row takes to the model."""
  return dataclasses.replace(example, tokens=np.concatenate([_prompt(example), tokens]))


def _ends(run) -> list[int]:
  ids = stop_ids(run.tokenizer, run.config.data.template)
  return sorted({*run.decoders["student"].config.eos_ids, *ids})
