"""What a run measures on its held-out rows, of the student and of its teachers."""

import functools

import jax
import numpy as np

from okd_jax.data import PAD_ID, eval_batches
from okd_jax.evaluation.answers import answer, answerable
from okd_jax.evaluation.rouge import score
from okd_jax.evaluation.tokens import (
  compile_token_step,
  evaluate_tokens,
  perplexity,
  stored_metrics,
  token_metrics,
)
from okd_jax.run.build import Run
from okd_jax.runtime import sharding


class Evaluator:
  """Everything measured during training, on the held-out rows; compiled once."""

  def __init__(self, parts: Run):
    self._parts = parts
    config = parts.config
    self._beside = parts.decoders  # the student and who can be compared with it
    if parts.reading:  # no vocabulary to compare in
      self._beside = {"student": parts.decoders["student"]}
    self._stored = (parts.stored or {}).get("eval")
    weights = tuple(config.method.teacher_weights)
    options = {"metrics": functools.partial(token_metrics, teacher_weights=weights)}
    if self._stored:
      temperature = config.method.temperature
      options["metrics"] = functools.partial(stored_metrics, temperature=temperature)
      options["vocab_size"] = self._stored.about["vocab_size"]
    self._step = compile_token_step(self._beside, config.train.loss_chunk, **options)

  def __call__(self, params) -> dict[str, float]:
    """The student's figures; beside a teacher, also the distances between them."""
    variables = {role: self._variables(role, params) for role in self._beside}
    scores = self._tokens(self._step, variables, self._parts, self._stored)
    return scores | self._text("student", variables["student"], self._parts)

  def teachers(self) -> dict[str, dict[str, float]]:
    """The frozen teachers' own figures, by role; they never change.

    On tokens of its own a teacher's loss is another measure than the student's, and is
    called so: `own_token_loss`.
    """
    decoders, found = self._parts.decoders, {}
    if self._stored:
      gold = [self._stored.row(i)["gold_log_prob"] for i in range(self._stored.count)]
      loss = -float(np.concatenate(gold).mean())
      found["teacher"] = {"loss": loss, "perplexity": perplexity(loss)}
    reading = self._parts.reading or self._parts
    for role in decoders:
      if role.partition(":")[0] == "teacher":
        variables = self._variables(role, {})
        chunk = self._parts.config.train.loss_chunk
        step = compile_token_step({"student": decoders[role]}, chunk)
        tokens = self._tokens(step, {"student": variables}, reading)
        if self._parts.reading:
          tokens = {"own_token_loss": tokens["loss"]}
        found[role] = tokens | self._text(role, variables, reading)
    return found

  def _variables(self, role: str, params):
    """What the decoder of this role, 'student', 'teacher' or 'adapted:NAME', reads."""
    kind, _, name = role.partition(":")
    if kind == "student":
      return {"params": params["student"]}
    frozen = self._parts.frozen
    variables = {"params": frozen[name] if name else frozen}
    if kind == "adapted":
      adapter = params["adapter"]
      variables["adapter"] = adapter[name] if name else adapter
    return variables

  def _tokens(self, step, variables, reading, stored=None):
    parts, config = self._parts, self._parts.config
    batches = eval_batches(
      reading.eval,
      batch_size=_eval_batch_size(parts),
      length=config.data.max_length,
      pad_id=PAD_ID,
    )

    def arrays(batch):
      rows = batch.pop("row")
      if stored:
        batch["stored"] = stored.read(rows[rows >= 0][:, None], batch["mask"])
      return batch

    where = sharding.batch_sharding(parts.mesh)
    return evaluate_tokens(
      step,
      variables,
      map(arrays, batches),
      put=lambda rows: jax.device_put(rows, where),
    )

  def _text(self, role, variables, reading) -> dict[str, float]:
    parts, config = self._parts, self._parts.config
    prompts = answerable(reading.eval)[: config.eval.generate_limit or None]
    if not config.eval.generate or not prompts:
      return {}
    texts = answer(
      parts.decoders[role],
      variables,
      prompts,
      reading.tokenizer,
      template=config.data.template,
      max_new_tokens=config.eval.max_new_tokens,
      temperature=config.eval.temperature,
      seed=config.train.seed,
      batch_size=_eval_batch_size(parts),
      sharding=sharding.batch_sharding(parts.mesh),
    )
    scores = score(texts, [list(p.references) for p in prompts])
    return {name: scores[name] for name in ("rougeL", "exact_match")}


def _eval_batch_size(parts: Run) -> int:
  return sharding.whole_rows(parts.config.eval.batch_size, parts.mesh)
