"""What a run measures on its held-out rows, of the student and of its teachers."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import PyTree

from okd_jax.data import PAD_ID, eval_batches
from okd_jax.data.batch import Batch
from okd_jax.evaluation.answers import answer, answerable
from okd_jax.evaluation.rouge import score
from okd_jax.evaluation.tokens import (
  ADAPTED,
  STUDENT,
  TEACHER,
  Who,
  compile_token_step,
  evaluate_tokens,
  perplexity,
  stored_metrics,
  token_metrics,
)
from okd_jax.models import Decoder
from okd_jax.run.build import Run
from okd_jax.run.data import Reading
from okd_jax.runtime import sharding
from okd_jax.teachers.rounding import rounding_kl
from okd_jax.teachers.store import Memory, Store

_log = logging.getLogger(__name__)


class Evaluator:
  """Everything measured during training, on the held-out rows; compiled once.

  The run's `stop` is asked between batches, and raises Stopped.

  trunk: what enters the teacher's top layers, where these are all that is left of it.
  said: everybody's newest answers, by the place that their row came from.
  """

  def __init__(self, run: Run, trunk: Store | Memory | None = None):
    self._run, self._cast, self._trunk = run, run.cast, trunk
    self.said: dict[Who, dict[str, str]] = {}
    self._beside = {(STUDENT, ""): run.cast.student}  # who can be compared with it
    if not run.data.other:  # else there is no vocabulary to compare in
      self._beside |= {(TEACHER, n): d for n, d in run.cast.teachers.items()}
      self._beside |= {(ADAPTED, n): d for n, d in run.cast.adapted.items()}
    self._stored = run.cast.stored.get("eval")
    weights = tuple(run.settings.method.knobs.get("teacher_weights", ()))
    options: dict[str, Any] = {
      "metrics": functools.partial(token_metrics, teacher_weights=weights)
    }
    if self._stored:
      temperature = run.settings.method.temperature
      options["metrics"] = functools.partial(stored_metrics, temperature=temperature)
      options["vocab_size"] = self._stored.about["vocab_size"]
    chunk = run.settings.train.loss_chunk
    self._step = compile_token_step(self._beside, chunk, **options)

  def __call__(self, params: Mapping[str, PyTree]) -> dict[str, float]:
    """The student's figures; beside a teacher, also the distances between them."""
    variables = {who: self._variables(*who, params) for who in self._beside}
    scores = self._tokens(self._step, variables, self._run.data, self._stored)
    own = variables[STUDENT, ""]
    return scores | self._text((STUDENT, ""), own, self._run.data)

  def teachers(
    self, params: Mapping[str, PyTree] | None = None
  ) -> dict[str, dict[str, float]]:
    """The frozen teachers' own figures, by name, which never change.

    params: of the first step, for a teacher that is the student itself; it is measured
      as it was there.

    On tokens of its own a teacher's loss is another measure than the student's, and is
    called so: `own_token_loss`.
    """
    found = {}
    if self._stored:
      gold = [self._stored.row(i)["gold_log_prob"] for i in range(self._stored.count)]
      loss = -float(np.concatenate(gold).mean())
      found["teacher"] = {"loss": loss, "perplexity": perplexity(loss)}
    other = self._run.data.other
    reading = other or self._as_teachers_read()
    for name, decoder in self._cast.teachers.items():
      variables = self._variables(TEACHER, name, params or {})
      who, chunk = (STUDENT, ""), self._run.settings.train.loss_chunk
      step = compile_token_step({who: decoder}, chunk)
      tokens = self._tokens(step, {who: variables}, reading)
      if other:
        tokens = {"own_token_loss": tokens["loss"]}
      if self._run.settings.quantizes:
        tokens |= self._rounding(name, decoder, reading)
      found[name] = tokens | self._text((TEACHER, name), variables, reading)
    return found

  def _as_teachers_read(self) -> Reading:
    """The held-out rows, with the teacher's own prompts where it has any."""
    data = self._run.data
    if not data.teacher_length:
      return data
    own = [example.for_teacher() for example in data.eval]
    return Reading(data.tokenizer, data.train, own)

  def _rounding(
    self, name: str, decoder: Decoder, reading: Reading
  ) -> dict[str, float]:
    settings, frozen, mesh = self._run.settings, self._cast.frozen[name], self._run.mesh
    kl = rounding_kl(settings, name, decoder, frozen, reading.eval, mesh)
    _log.info("%s in int8: KL(whole‖int8) %.2g nats a token", name, kl)
    return {"rounding_kl": kl}

  def _variables(
    self, kind: str, name: str, params: Mapping[str, PyTree]
  ) -> dict[str, PyTree]:
    """What the decoder of student, teacher or adapted teacher reads."""
    if kind == STUDENT:
      return self._cast.student_variables(params)
    variables = {"params": self._cast.teacher_params(name, params)}
    if kind == ADAPTED:
      variables["adapter"] = params["adapter"][name]
    return variables

  def _tokens(
    self,
    step: Any,
    variables: Mapping[Any, PyTree],
    reading: Reading,
    stored: Store | None = None,
  ) -> dict[str, float]:
    batches = eval_batches(
      reading.eval,
      batch_size=self._batch_size(),
      length=max(self._run.settings.data.max_length, self._run.data.teacher_length),
      pad_id=PAD_ID,
      teacher_length=self._run.data.teacher_length,
    )

    def batch(rows: Mapping[str, np.ndarray]) -> Batch:
      """The rows [B, L], with what is stored or kept of their tokens."""
      own, numbers = Batch.of(rows), rows["row"]
      texts = numbers[numbers >= 0][:, None]
      if stored:
        own = own.replace(stored=stored.read(texts, rows["mask"]))
      if self._trunk:
        kept = self._trunk.read(texts, rows["segment_ids"] > 0)
        own = own.replace(trunk=kept["hidden"])
      return own

    where = sharding.batch_sharding(self._run.mesh)
    return evaluate_tokens(
      step,
      variables,
      map(batch, self._run.stop.heard(batches)),
      put=lambda rows: sharding.spread(rows, where),
    )

  def _text(
    self, who: Who, variables: Mapping[str, PyTree], reading: Reading
  ) -> dict[str, float]:
    settings = self._run.settings
    limit = settings.eval.generate_limit or None
    prompts = answerable(reading.eval)[:limit]
    if not settings.eval.generate or not prompts:
      return {}
    kind, name = who
    student = kind == STUDENT
    texts = answer(
      self._cast.student if student else self._cast.teachers[name],
      variables,
      prompts if student else [example.for_teacher() for example in prompts],
      reading.tokenizer,
      template=settings.data.template,
      max_new_tokens=settings.eval.max_new_tokens,
      temperature=settings.eval.temperature,
      seed=settings.train.seed,
      batch_size=self._batch_size(),
      sharding=sharding.batch_sharding(self._run.mesh),
      heard=self._run.stop.heard,
    )
    self.said[who] = {p.where: x for p, x in zip(prompts, texts, strict=True)}
    scores = score(texts, [list(p.references) for p in prompts])
    return {name: scores[name] for name in ("rougeL", "exact_match")}

  def _batch_size(self) -> int:
    return sharding.whole_rows(self._run.settings.eval.batch_size, self._run.mesh)
