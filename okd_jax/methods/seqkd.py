"""SeqKD: training on the teacher's answers, sampled once before training.

Sequence-Level Knowledge Distillation, Kim and Rush 2016, arXiv 1606.07947:
r D(p, q) + (1 - r) CE on the teacher's text, plus g CE on the data's own.
"""

import dataclasses

import jax
from jaxtyping import Array, Key

from okd_jax.data.batch import Batch
from okd_jax.methods import kd, sft
from okd_jax.methods.base import (
  DivergenceKnobs,
  Knob,
  Loss,
  Method,
  Models,
  Now,
  Params,
  TextKnobs,
  check_idle,
  check_least,
  check_share,
  check_weight,
  gold_nll,
)
from okd_jax.methods.base.knobs import never


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(TextKnobs, DivergenceKnobs):
  """What `seqkd` reads.

  seqkd_ratio: r, 0 in the paper: the teacher is then not even evaluated while the
    student trains.
  gold_weight: g.
  divergence, temperature, top_k: of D, as in `kd`.
  """

  seqkd_ratio: Knob = 0.0
  gold_weight: Knob = 0.0
  top_k: int = 0

  def __post_init__(self):
    DivergenceKnobs.__post_init__(self)
    TextKnobs.__post_init__(self)
    check_share("method.seqkd_ratio", self.seqkd_ratio)
    check_weight("method.gold_weight", self.gold_weight)
    check_least("method.top_k", self.top_k, 0)
    if never(self.seqkd_ratio):
      above = "method.seqkd_ratio above 0"
      check_idle(self, above, "divergence", "temperature", "top_k")


def build(knobs: Knobs) -> Method:
  """`kd` on the teacher's answers, with r for its kd_ratio; `sft` where r is 0."""
  method, alone = _on_any_text(knobs), never(knobs.seqkd_ratio)
  inner = sft.build(sft.Knobs()).loss if alone else method.loss

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    now = dict(now)
    weight = now.pop("gold_weight")
    now = now | {"kd_ratio": now.pop("seqkd_ratio"), "gold_weight": 0.0}
    rows = batch.replace(gold=None)
    value, metrics = inner(models, params, frozen, rows, key, {} if alone else now)
    if batch.gold is None:
      return value, metrics
    nll = gold_nll(models, params, batch.gold, jax.random.fold_in(key, 1))
    return value + weight * nll, metrics | {"gold_nll": nll}

  numbers = {k: v for k, v in method.knobs.items() if k != "kd_ratio"}
  numbers |= {"seqkd_ratio": knobs.seqkd_ratio, "gold_weight": knobs.gold_weight}
  sequences = knobs.sequences(
    "teacher", beforehand=("teacher",), gold=not never(knobs.gold_weight)
  )
  return dataclasses.replace(
    method,
    loss=loss,
    sequences=sequences,
    knobs=numbers,
    takes_stored=False,
    reads_teacher=not alone,
  )


def _on_any_text(knobs: Knobs) -> Method:
  """`kd` with these knobs."""
  return kd.build(
    kd.Knobs(
      divergence=knobs.divergence,
      temperature=knobs.temperature,
      shape=knobs.shape,
      kd_ratio=knobs.seqkd_ratio,
      top_k=knobs.top_k,
    )
  )
