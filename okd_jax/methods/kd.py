"""Distillation from a frozen teacher on gold text, by any divergence.

Distilling the Knowledge in a Neural Network, Hinton et al. 2015, arXiv 1503.02531.
`kd` takes the divergence as a knob; the others are names that papers use.
"""

import jax

from okd_jax.errors import UserError
from okd_jax.losses import cross_entropy
from okd_jax.methods.base.knobs import (
  Knob,
  among_top_k,
  check_positive,
  check_share,
  check_weight,
  find_divergence,
  own_shape,
)
from okd_jax.methods.base.method import (
  Method,
  combine,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.stored import token_distance


def build(
  *,
  divergence: str,
  kd_ratio: Knob,
  temperature: Knob,
  gold_weight: Knob,
  top_k: int,
  **shape: Knob,
) -> Method:
  """loss = r D(p, q) + (1 - r + g) CE(y; q), the token mean.

  Args:
    divergence: D, a key of `knobs.DIVERGENCES`; its own knobs are in `shape`. '' is
      the forward KL.
    kd_ratio: r, the share of the divergence.
    temperature: T of the divergence, which is multiplied by T^2.
    gold_weight: g, cross-entropy on gold on top of that share.
    top_k: use the teacher's so many likeliest tokens and one bucket for the rest, as
      a stored teacher would give them; 0 is the whole vocabulary.
  """
  check_share("method.kd_ratio", kd_ratio)
  check_positive("method.temperature", temperature)
  check_weight("method.gold_weight", gold_weight)
  if top_k < 0:
    raise UserError(f"method.top_k={top_k} must be at least 0")
  divergence = divergence or "forward_kl"
  distance = find_divergence("method.divergence", divergence, shape)
  if top_k:
    distance = among_top_k(distance, top_k)

  def token_loss(logits, labels, *, kd_ratio, gold_weight, **knobs):
    student = logits["student"]
    if "teacher" in logits:
      d = distance(stop_gradient(logits["teacher"]), student, **knobs)
      figures = diagnostics(logits, labels)
    else:
      labels, stored = labels
      d, figures = token_distance(distance, student, stored, **knobs)
    ce = cross_entropy(student, labels)
    loss = combine((kd_ratio, d), (1 - kd_ratio + gold_weight, ce))
    return loss, figures | {"divergence": d, "student_nll": stop_gradient(ce)}

  def loss(models, params, frozen, batch, key, knobs):
    outputs = {"student": models.student(params["student"], batch, key)}
    if "stored" in batch:
      labels = batch["labels"], batch["stored"]
      return token_sums(models, token_loss, outputs, batch, knobs, labels)
    outputs["teacher"] = models.teacher(frozen, None, batch)
    if "gold" not in batch:
      return token_sums(models, token_loss, outputs, batch, knobs)
    # Sampled rows, and beside them what their prompts' answers should have been: no
    # cross-entropy on the former.
    no_gold = knobs | {"gold_weight": knobs["kd_ratio"] - 1}
    value, metrics = token_sums(models, token_loss, outputs, batch, no_gold)
    weight = 1 - knobs["kd_ratio"] + knobs["gold_weight"]
    if is_zero(weight):
      return value, metrics
    nll = gold_nll(models, params, batch, jax.random.fold_in(key, 1))
    return value + weight * nll, metrics | {"gold_nll": nll}

  knobs = {"kd_ratio": kd_ratio, "temperature": temperature, "gold_weight": gold_weight}
  knobs |= own_shape(shape, divergence)
  # Whoever asks for K of the tokens must find a whole distribution.
  return Method(loss=loss, teacher="frozen", knobs=knobs, takes_stored=not top_k)


# KD by one divergence, under the name it has in the literature.
NAMED = {
  "rkd": "reverse_kl",  # MiniLLM's direction, Gu et al. 2023, arXiv 2306.08543
  "jsd": "jensen_shannon",  # GKD's, Agarwal et al. 2024, arXiv 2306.13649
  "tvd": "total_variation",  # f-distill's, Wen et al. 2023, arXiv 2307.15190
  "akl": "adaptive_kl",  # Wu et al. 2024, arXiv 2404.02657
  "skl": "skew_forward_kl",  # DistiLLM's, Ko et al. 2024, arXiv 2402.03898
  "srkl": "skew_reverse_kl",  # likewise
}
