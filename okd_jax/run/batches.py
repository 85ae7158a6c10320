"""The batches of a run: the data's rows, sampled ones, and what lies beside them.

Sampled rows go through the very path that the data's rows take (`data.pad_row`), so a
sampled answer and the same answer as data are the same batch. All choices follow from
the seed and the step alone, and every process makes all of them, so that the rows do
not depend on how many there are; each takes those that its own devices hold.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from okd_jax.data import PAD_ID, Example, pad_row, stop_ids
from okd_jax.data.batch import OWN_PROMPT, ROW, Batch
from okd_jax.methods.base import Linear, Sequences
from okd_jax.methods.base.knobs import knobs_at, progress
from okd_jax.models import Decoder
from okd_jax.run.build import Run
from okd_jax.run.replay import Buffer, Share
from okd_jax.runtime import sharding
from okd_jax.teachers.trunk import Kept
from okd_jax.text.pairs import (
  Interleaved,
  Mixed,
  cut_source,
  draw_interleaved,
  draw_mixed,
  pair_source,
)
from okd_jax.text.rollout import draw, generate
from okd_jax.text.source import Source, decoder_source

# A branch of the seed's key, apart from those that the first state is drawn with, which
# count from 0, and from those of answers before training (`beforehand`).
_EACH_STEP = 2**31 + 2

Rows = Mapping[str, np.ndarray]
Answers = Mapping[str, Sequence[Example]]


class Batches:
  """Turns rows of the data into batches to train on, one a step.

  answers: by model, 'teacher' or 'student', its answers to the training prompts, where
    the method wants them beforehand.
  trunk: what enters the teacher's adapted layers, where that is kept.
  """

  def __init__(self, run: Run, answers: Answers, trunk: Kept | None = None):
    self._run, self._answers, self._trunk = run, answers, trunk
    self.plan: Sequences = run.method.sequences
    self._length = run.settings.data.max_length
    self._seed = run.settings.train.seed
    replay = self.plan.replay
    self._buffer = Buffer(replay.capacity, self._kinds()) if replay else None
    self._share = Share(replay) if replay and replay.adaptive else None
    self._prepare = None
    if self.plan.prepare:
      where = sharding.batch_sharding(run.mesh)
      self._prepare = jax.jit(self._prepared, out_shardings=where)
    self._held: Batch | None = None  # a sampled batch that several steps train on

  def batch(
    self, step: int, params: Mapping[str, PyTree], gold: Rows
  ) -> tuple[Batch, dict[str, float]]:
    """(batch on the devices, figures) of the step after `step`.

    gold: this process's rows of the data, with their indices in the packs as 'row' and
      those of all processes as 'all_rows'.
    """
    rows, start = gold["row"], time.monotonic()
    if self.plan.source == "teacher":
      main, figures = self._put(self._beforehand("teacher", rows)), {}
    elif not self.plan.sampled:
      main, figures = self._facts(step, params, self._put(Batch.of(gold))), {}
    elif self._held is not None and step % self.plan.updates:
      main, figures = self._held, {}
    else:
      main, figures = self._sampled(step, params, gold)
      main = self._facts(step, params, self._put(main))
      self._held = main if self.plan.updates > 1 else None
      waited = figures.pop("waited_s", 0.0)
      figures["sampling_s"] = time.monotonic() - start - waited
    return main.replace(**self._put(self._beside(gold))), figures

  def _put(self, tree: PyTree) -> PyTree:
    return sharding.put_batch(tree, self._run.mesh)

  def _beside(self, gold: Rows) -> dict[str, Any]:
    """What lies beside the rows, by the names of a batch's fields."""
    run, plan, rows = self._run, self.plan, gold["row"]
    texts = [run.data.packs[row] for row in rows]
    beside: dict[str, Any] = {}
    trunk = None
    if self._trunk:
      trunk = self._trunk.train.read(texts, gold["segment_ids"] > 0)["hidden"]
    if plan.gold:
      beside["gold"] = Batch.of(gold).replace(trunk=trunk)
    elif trunk is not None:
      beside["trunk"] = trunk
    if run.cast.stored:
      beside["stored"] = run.cast.stored["train"].read(texts, gold["mask"])
    if run.data.other:
      beside["other_tokens"] = self._rows([run.data.other.train[row] for row in rows])
    if plan.beforehand and plan.source != "teacher":
      beside["answers"] = {n: self._beforehand(n, rows) for n in plan.beforehand}
    return beside

  def _facts(self, step: int, params: Mapping[str, PyTree], batch: Batch) -> Batch:
    if not self._prepare:
      return batch
    return self._prepare(params, self._run.cast.frozen, batch, np.int32(step))

  def _prepared(
    self, params: PyTree, frozen: PyTree, batch: Batch, step: Int[Array, ""]
  ) -> Batch:
    run, key = self._run, self._key(step)
    now = knobs_at(run.method.knobs, progress(step, run.plan.steps))
    models = run.plan.models
    seen = models.seen(params, frozen)
    return self.plan.prepare(models, *seen, batch, key, now)

  def _key(self, step: int | Int[Array, ""]) -> Key[Array, ""]:
    """Of the step's own draws; those of tokens are folded once more."""
    branch = jax.random.fold_in(jax.random.key(self._seed), _EACH_STEP)
    return jax.random.fold_in(branch, step)

  def _sampled(
    self, step: int, params: Mapping[str, PyTree], gold: Rows
  ) -> tuple[Batch, dict[str, float]]:
    """Rows of this process: fresh, from the store, or the data's own."""
    chance = np.random.default_rng((self._seed, step))
    u = chance.random()
    passed = min(step / max(self._run.plan.steps - 1, 1), 1.0)
    share = self.plan.share
    share = share(passed) if isinstance(share, Linear) else share
    fresh = u < share
    if self._share:
      wanted = self._share.phi * share
      fresh = u < self._share.fresh(passed) * share or (
        u < wanted and not self._buffer.full
      )
      if not fresh and u < wanted:
        return self._replayed(step, chance)
    if not fresh:
      return Batch.of(gold), {"sampled": 0.0}
    new, figures = self._fresh(step, params, gold["all_rows"])
    if self._buffer is None:
      return self._mine(new), figures
    self._buffer.push(new.rows, step)
    if self._share:
      return self._mine(new), figures
    replayed, more = self._replayed(step, chance)
    return replayed, figures | more

  def _fresh(
    self, step: int, params: Mapping[str, PyTree], rows: np.ndarray
  ) -> tuple[Batch, dict[str, float]]:
    """(rows of all processes, figures), written now."""
    # The step before may still be running: that time is its own, not sampling.
    begun = time.monotonic()
    jax.block_until_ready(params)
    waited = time.monotonic() - begun
    answers, ended = self._write(step, params, rows)
    lengths = [len(a.tokens) - a.prompt_length for a in answers]
    return self._rows(answers), {
      "sampled": 1.0,
      "sampled_length": float(np.mean(lengths)),
      "sampled_ended": float(np.mean(ended)),
      "waited_s": waited,
    }

  def _replayed(
    self, step: int, chance: np.random.Generator
  ) -> tuple[Batch, dict[str, float]]:
    rows, written = self._buffer.draw(self._run.settings.train.batch_size, chance)
    figures = {"sampled": 1.0, "replay_age": float(np.mean(step - written))}
    return self._mine(Batch.of(rows)), figures

  def _write(
    self, step: int, params: Mapping[str, PyTree], rows: np.ndarray
  ) -> tuple[list[Example], list[bool]]:
    """(answers as examples, whether each ended) to the prompts of all processes."""
    run = self._run
    examples = [run.data.train[row] for row in rows]
    source, variables, choose, sampling = self._author(params)
    completions = generate(
      source,
      variables,
      [example.prompt for example in examples],
      self._key(step),
      max_new_tokens=room(run),
      sampling=sampling,
      eos_ids=end_ids(run),
      batch_size=len(examples),
      choose=choose,
      sharding=sharding.batch_sharding(run.mesh),
    )
    answers = [
      example.answered(completion.tokens)
      for example, completion in zip(examples, completions, strict=True)
    ]
    return answers, [completion.ended for completion in completions]

  def _author(
    self, params: Mapping[str, PyTree]
  ) -> tuple[Source, PyTree, Callable, Any]:
    """(source, variables, choose, sampling) of whoever writes."""
    run, plan = self._run, self.plan
    student = text_source(run, run.cast.student)
    own = run.cast.student_variables(params)
    if plan.source == "student":
      return student, own, draw, plan.student
    [(name, decoder)] = run.cast.teachers.items()
    variables = {"params": run.cast.teacher_params(name, params)}
    if name in params.get("adapter", {}):
      decoder = run.cast.adapted[name]
      variables["adapter"] = params["adapter"][name]
    source = pair_source(student, text_source(run, decoder))
    if plan.source == "mixture":
      settings = Mixed(plan.student, np.float32(plan.weight))
      return source, (own, variables), draw_mixed, settings
    settings = Interleaved(plan.student, plan.teacher, np.int32(plan.top))
    return source, (own, variables), draw_interleaved, settings

  def _beforehand(self, name: str, rows: np.ndarray) -> Batch:
    return self._rows([self._answers[name][row] for row in rows])

  def _rows(self, examples: Sequence[Example]) -> Batch:
    own = self._run.data.teacher_length
    padded = [pad_row(e, self._length, PAD_ID, own) for e in examples]
    return Batch.of({n: np.stack([row[n] for row in padded]) for n in padded[0]})

  def _kinds(self) -> dict[str, tuple[int, type]]:
    """(length, type) of each array of a row, by name."""
    kinds = {name: (self._length, np.int32) for name in ROW}
    kinds["mask"] = (self._length, np.bool_)
    if own := self._run.data.teacher_length:
      kinds |= {name: (own, np.int32) for name in OWN_PROMPT}
      kinds["align"] = (self._length, np.int32)
    return kinds

  def _mine(self, rows: Batch) -> Batch:
    """This process's share of rows that all processes have."""
    own = sharding.own_rows(len(rows.tokens), self._run.mesh)
    return jax.tree.map(lambda values: values[own], rows)

  def observe(self, loss: float) -> None:
    """Tells the held-out loss, on which DistiLLM's share of sampled text depends."""
    if self._share:
      self._share.observe(loss)

  def state(self) -> dict[str, Any]:
    """Everything a resumed run needs, as arrays of fixed shapes; may be empty."""
    state: dict[str, Any] = {}
    if self._buffer is not None:
      state["buffer"] = self._buffer.state()
    if self._share:
      state["share"] = self._share.state()
    if self.plan.updates > 1:
      held = self._nothing() if self._held is None else self._held
      state["held"] = {"rows": held.rows, "facts": dict(held.facts)}
    return state

  def _nothing(self) -> Batch:
    """What stands for a held batch before there is one."""
    run = self._run
    size = run.settings.train.batch_size
    rows = {
      name: jax.ShapeDtypeStruct((size, length), kind)
      for name, (length, kind) in self._kinds().items()
    }
    batch = Batch.of(rows)
    if self._prepare:
      params = run.plan.abstract.params
      step = jax.ShapeDtypeStruct((), np.int32)
      batch = jax.eval_shape(self._prepared, params, run.cast.frozen, batch, step)
    where = sharding.batch_sharding(run.mesh)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    return sharding.spread(nothing, where)

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on from what `state` returned."""
    if self._buffer is not None:
      self._buffer.restore(state["buffer"])
    if self._share:
      self._share.restore(state["share"])
    if self.plan.updates > 1:
      held = state["held"]
      self._held = Batch.of(held["rows"]).replace(facts=held["facts"])


def text_source(run: Run, decoder: Decoder) -> Source:
  """What samples a model, in the tokens that all models of the run have."""
  source, sizes = decoder_source(decoder), run.cast.vocab_sizes
  return cut_source(source, min(sizes)) if len(sizes) > 1 else source


def room(run: Run) -> int:
  """New tokens an answer may have, beside the longest prompt."""
  data = run.settings.data
  fits = data.max_length - data.max_prompt_length
  return run.method.sequences.max_new_tokens or fits


def end_ids(run: Run) -> list[int]:
  """Ids that end an answer: the student's own and the template's."""
  ids = stop_ids(run.data.tokenizer, run.settings.data.template)
  return sorted({*run.cast.student.config.eos_ids, *ids})
