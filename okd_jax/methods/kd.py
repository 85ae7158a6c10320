"""Distillation from a frozen teacher on gold text: forward and reverse KD.

Distilling the Knowledge in a Neural Network, Hinton et al. 2015, arXiv 1503.02531;
the reverse direction as in MiniLLM, Gu et al. 2023, arXiv 2306.08543.
"""

from collections.abc import Callable

from okd_jax.losses import cross_entropy, forward_kl, reverse_kl
from okd_jax.methods.method import (
  Method,
  check_share,
  check_temperature,
  diagnostics,
  stop_gradient,
  token_sums,
)


def build(distance: Callable, *, kd_ratio: float, temperature: float) -> Method:
  """loss = (1 - r) CE(y; q) + r D(p, q), D = distance, r = kd_ratio; the token mean."""
  check_share("method.kd_ratio", kd_ratio)
  check_temperature(temperature)

  def token_loss(logits, labels):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    d = distance(teacher, student, temperature=temperature)
    ce = cross_entropy(student, labels)
    metrics = {"divergence": d} | diagnostics(logits, labels, ce)
    # At the ends the other term is left out, so that it costs nothing and 0 * inf
    # cannot arise.
    if kd_ratio in (0, 1):
      return (d if kd_ratio else ce), metrics
    return kd_ratio * d + (1 - kd_ratio) * ce, metrics

  def loss(models, params, frozen, batch, key):
    outputs = {
      "student": models.student(params["student"], batch, key),
      "teacher": models.teacher(frozen, None, batch),
    }
    return token_sums(models, token_loss, outputs, batch)

  return Method(loss=loss, teacher="frozen")


def build_kd(*, kd_ratio: float, temperature: float) -> Method:
  """Forward KD: D = KL(p || q)."""
  return build(forward_kl, kd_ratio=kd_ratio, temperature=temperature)


def build_rkd(*, kd_ratio: float, temperature: float) -> Method:
  """Reverse KD: D = KL(q || p)."""
  return build(reverse_kl, kd_ratio=kd_ratio, temperature=temperature)
