"""Distillation on text that the models write while the student trains, or before.

The loss is `kd`'s, on other sequences; cross-entropy, where there is any, stays with
the gold answers of the same prompts. Sampled tokens are constants: nothing is
differentiated through them, and how they were drawn never enters the loss.

`**on_policy` stands for the knobs of `kd.build` but the divergence, and for those of
`sequences.make_sequences`.
"""

import dataclasses

import jax

from okd_jax.errors import UserError
from okd_jax.methods import kd, sft
from okd_jax.methods.base.knobs import Knob, check_share
from okd_jax.methods.base.method import Method, gold_nll
from okd_jax.methods.base.sequences import SAMPLING, Replay, make_sequences, never
from okd_jax.text.rollout import Sampling


def build_gkd(
  *, divergence: str, replay: bool, replay_capacity: int, **on_policy
) -> Method:
  """GKD: with probability lambda the student's own answers, else gold.

  On-Policy Distillation of Language Models, Agarwal et al. 2024, arXiv 2306.13649.
  lambda is `sampled_share`, 0.5 where it is left open.

  Args:
    divergence: '' is the Jensen-Shannon divergence.
    replay: store every sampled row and train on rows drawn from the store, as the GKD
      baseline in DistiLLM's code does; the paper does not.
  """
  return _build(
    "student",
    divergence or "jensen_shannon",
    (0.5, 1.0, 1.0),
    on_policy,
    replay=Replay(replay_capacity) if replay else None,
  )


def build_imitkd(*, divergence: str, **on_policy) -> Method:
  """ImitKD: the student's answers, corrected by the teacher's distribution.

  Autoregressive Knowledge Distillation through Imitation Learning, Lin et al. 2020,
  arXiv 2009.07253. Its mixture moves from gold to the student's text:
  `sampled_share` 0 with `end.sampled_share` 1; left open it is 1 throughout, as in
  DistiLLM's code.
  """
  return _build("student", divergence or "forward_kl", (1.0, 1.0, 1.0), on_policy)


def build_skd(
  *,
  divergence: str,
  accept_top: int,
  teacher_temperature: float,
  teacher_top_p: float,
  **on_policy,
) -> Method:
  """SKD: the student's tokens, those the teacher ranks too low replaced by its own.

  Speculative Knowledge Distillation, Xu et al. 2024, arXiv 2410.11325. Left open, the
  student draws at temperature 0.5 with top_p 0.5.

  Args:
    accept_top: K, among how many of the teacher's tokens the student's must be.
    teacher_temperature, teacher_top_p: how the teacher draws.
  """
  if accept_top < 1:
    raise UserError(f"method.accept_top={accept_top} must be at least 1")
  if not teacher_temperature >= 0:
    raise UserError(f"method.teacher_temperature={teacher_temperature} is below 0")
  if not 0 < teacher_top_p <= 1:
    raise UserError(f"method.teacher_top_p={teacher_top_p} must be in (0, 1]")
  return _build(
    "interleaved",
    divergence or "forward_kl",
    (1.0, 0.5, 0.5),
    on_policy,
    top=accept_top,
    teacher=Sampling(teacher_temperature, 0, teacher_top_p),
  )


def build_distillm(
  *,
  divergence: str,
  replay_capacity: int,
  replay_ratio: str,
  loss_eps: float,
  **on_policy,
) -> Method:
  """DistiLLM: a skew KL, and the student's text only as far as it is needed.

  Ko et al. 2024, arXiv 2402.03898: a share phi of the steps trains on the student's
  text, fresh or from a store (`sequences.Replay`), times `sampled_share`. phi moves
  when the held-out loss is measured, every eval.every steps.

  Args:
    divergence: '' is the skew reverse KL.
  """
  return _build(
    "student",
    divergence or "skew_reverse_kl",
    (1.0, 1.0, 1.0),
    on_policy,
    replay=Replay(replay_capacity, True, replay_ratio, loss_eps),
  )


def build_seqkd(*, divergence: str, seqkd_ratio: Knob, **on_policy) -> Method:
  """SeqKD: training on the teacher's answers, sampled once before training.

  Sequence-Level Knowledge Distillation, Kim and Rush 2016, arXiv 1606.07947:
  r D(p, q) + (1 - r) CE on the teacher's text, plus g CE on the data's own.

  Args:
    seqkd_ratio: r, 0 in the paper: the teacher is then not even evaluated while the
      student trains.
  """
  check_share("method.seqkd_ratio", seqkd_ratio)
  knobs = on_policy | {"kd_ratio": seqkd_ratio, "gold_weight": 0.0}
  method = _build(
    "teacher",
    divergence or "forward_kl",
    (1.0, 1.0, 1.0),
    knobs,
    beforehand=("teacher",),
  )
  gold_weight = on_policy["gold_weight"]
  inner = sft.build().loss if never(seqkd_ratio) else method.loss

  def loss(models, params, frozen, batch, key, knobs):
    batch, knobs = dict(batch), dict(knobs)
    beside, weight = batch.pop("gold", None), knobs.pop("gold_weight")
    ratio = knobs.pop("seqkd_ratio")
    knobs = knobs | {"kd_ratio": ratio, "gold_weight": 0.0}
    knobs = {} if never(seqkd_ratio) else knobs
    value, metrics = inner(models, params, frozen, batch, key, knobs)
    if beside is None:
      return value, metrics
    nll = gold_nll(models, params, {"gold": beside}, jax.random.fold_in(key, 1))
    return value + weight * nll, metrics | {"gold_nll": nll}

  sequences = dataclasses.replace(method.sequences, gold=not never(gold_weight))
  own = {k: v for k, v in method.knobs.items() if k != "kd_ratio"}
  own |= {"seqkd_ratio": seqkd_ratio, "gold_weight": gold_weight}
  return dataclasses.replace(method, loss=loss, sequences=sequences, knobs=own)


def _build(source: str, divergence: str, defaults, knobs, **more) -> Method:
  """`kd` by this divergence on text from `source`."""
  sampling = {name: knobs[name] for name in SAMPLING}
  method = kd.build(
    divergence=divergence, **{k: v for k, v in knobs.items() if k not in SAMPLING}
  )
  no_gold = knobs["kd_ratio"] == 1 and never(knobs["gold_weight"])
  sequences = make_sequences(
    source, **sampling, defaults=defaults, gold=not no_gold, **more
  )
  return dataclasses.replace(method, sequences=sequences)
