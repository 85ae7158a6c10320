"""Per-token losses: logits `[B, L, V]` to `[B, L]`, in float32 whatever comes in.

Every divergence reads (teacher_logits, student_logits): the target p first, the
fitted model q second. Gradients flow to both sides; whoever wants one side constant
stops the gradient at the call (`methods/`). Where a temperature T is given, both
logits are divided by T and the value is multiplied by T^2, which keeps gradients
level (Hinton et al. 2015, arXiv 1503.02531; OKD, arXiv 2409.12512, Eq. 2) for
everything that is quadratic near p = q; total variation is not.

All are 0 at p = q and never negative. A logit of -inf is a token of probability 0;
where only one side has it, a KL that would be infinite is about 1e30 instead, and its
gradient stays finite (at temperatures up to 1000). Knobs may be traced scalars; their
range is then the caller's affair.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{forward_kl(p, q):.4f} {forward_kl(q, p):.4f} {forward_kl(p, p):.4f}")
  0.1308 0.1438 0.0000
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from okd_jax.losses.logits import Knob, Logits, PerToken, at_least_zero, log_probs

_LogProbs = Float[Array, "*B V"]


def forward_kl(
  teacher_logits: Logits, student_logits: Logits, temperature: Knob = 1.0
) -> PerToken:
  """KL(p || q) * T^2; its gradient in the student's logits is (q - p) * T.

  Args:
    teacher_logits: of the target p.
    student_logits: of q, over the same vocabulary.
    temperature: T, by which both logits are divided.

  Returns:
    The divergence at each position [*B], in nats.

  Raises:
    ValueError: if the vocabularies differ.

  Source: Distilling the Knowledge in a Neural Network, Hinton et al. 2015, arXiv
  1503.02531, Section 2; OKD, arXiv 2409.12512, Eq. 2.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{forward_kl(p, q):.4f}")  # 3/4 log 3/2 + 1/4 log 1/2
  0.1308
  """
  log_p, log_q = _both(teacher_logits, student_logits, temperature)
  return temperature**2 * _kl(log_p, log_q)


def reverse_kl(
  teacher_logits: Logits, student_logits: Logits, temperature: Knob = 1.0
) -> PerToken:
  """KL(q || p) * T^2, differentiated through the outer q as well.

  Args, Returns, Raises: as `forward_kl`.

  Source: MiniLLM, Gu et al. 2023, arXiv 2306.08543.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{reverse_kl(p, q):.4f}")  # 1/2 log 2/3 + 1/2 log 2
  0.1438
  """
  return forward_kl(student_logits, teacher_logits, temperature)


def weighted_kl(
  teacher_logits: Logits,
  student_logits: Logits,
  temperature: Knob = 1.0,
  weight: Knob = 0.5,
) -> PerToken:
  """weight KL(p || q) + (1 - weight) KL(q || p), times T^2; symmetric at 1/2.

  Args:
    weight: in [0, 1]; the other arguments as in `forward_kl`.

  Returns:
    The divergence at each position [*B], in nats.

  Raises:
    ValueError: if weight lies outside [0, 1], or the vocabularies differ.

  Source: at 1/2 it is half of Jeffreys' divergence, Jeffreys 1946.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{weighted_kl(p, q):.4f}")
  0.1373
  """
  _check("weighted_kl: weight", weight, 0, 1)
  log_p, log_q = _both(teacher_logits, student_logits, temperature)
  both = weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)
  return temperature**2 * both


def jensen_shannon(
  teacher_logits: Logits,
  student_logits: Logits,
  temperature: Knob = 1.0,
  beta: Knob = 0.5,
  normalize: bool = False,
) -> PerToken:
  """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, times T^2.

  Others count differently: DistiLLM's lambda is our 1 - beta, DistiLLM-2's alpha our
  beta.

  Args:
    beta: in [0, 1]. The end points are defined as the plain divergences, 0 is
      `forward_kl` and 1 is `reverse_kl`, although the formula tends to 0 at both: the
      value jumps there. The other arguments as in `forward_kl`.
    normalize: divides by beta (1 - beta), which is continuous.

  Returns:
    The divergence at each position [*B], in nats.

  Raises:
    ValueError: if beta lies outside [0, 1], or the vocabularies differ.

  Source: On-Policy Distillation of Language Models (GKD), Agarwal et al. 2024, arXiv
  2306.13649, Eq. 1.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{jensen_shannon(p, q):.4f} {jensen_shannon(p, q, beta=0):.4f}")
  0.0338 0.1308
  """
  _check("jensen_shannon: beta", beta, 0, 1)
  if _is_number(beta) and beta in (0, 1):
    end = reverse_kl if beta else forward_kl
    return end(teacher_logits, student_logits, temperature)
  log_p, log_q = _both(teacher_logits, student_logits, temperature)
  log_m = _log_mix(log_p, log_q, beta)
  value = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
  return temperature**2 * (value / (beta * (1 - beta)) if normalize else value)


def skew_forward_kl(
  teacher_logits: Logits,
  student_logits: Logits,
  temperature: Knob = 1.0,
  alpha: Knob = 0.1,
) -> PerToken:
  """KL(p || alpha p + (1 - alpha) q) * T^2: at most -log(alpha) * T^2.

  Args:
    alpha: in [0, 1); 0 is `forward_kl`. The other arguments as there.

  Returns:
    The divergence at each position [*B], in nats.

  Raises:
    ValueError: if alpha lies outside [0, 1), or the vocabularies differ.

  Source: DistiLLM, Ko et al. 2024, arXiv 2402.03898.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{skew_forward_kl(p, q):.4f}")
  0.1070
  """
  _check_skew("skew_forward_kl", alpha)
  if _is_number(alpha) and alpha == 0:
    return forward_kl(teacher_logits, student_logits, temperature)
  log_p, log_q = _both(teacher_logits, student_logits, temperature)
  return temperature**2 * _kl(log_p, _log_mix(log_p, log_q, alpha))


def skew_reverse_kl(
  teacher_logits: Logits,
  student_logits: Logits,
  temperature: Knob = 1.0,
  alpha: Knob = 0.1,
) -> PerToken:
  """KL(q || (1 - alpha) p + alpha q) * T^2, the gradient also through q in the mix.

  Args, Returns, Raises: as `skew_forward_kl`; alpha 0 is `reverse_kl`.

  Source: DistiLLM, Ko et al. 2024, arXiv 2402.03898.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{skew_reverse_kl(p, q):.4f}")
  0.1131
  """
  _check_skew("skew_reverse_kl", alpha)
  return skew_forward_kl(student_logits, teacher_logits, temperature, alpha)


def total_variation(
  teacher_logits: Logits, student_logits: Logits, temperature: Knob = 1.0
) -> PerToken:
  """1/2 sum |p - q| * T^2, in [0, T^2].

  Not quadratic near p = q: unlike the others' its gradient grows about like T.

  Args, Returns, Raises: as `forward_kl`, but no nats.

  Source: f-Divergence Minimization for Sequence-Level Knowledge Distillation, Wen et
  al. 2023, arXiv 2307.15190.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{total_variation(p, q):.4f}")
  0.2500
  """
  log_p, log_q = _both(teacher_logits, student_logits, temperature)
  gap = jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))
  return temperature**2 * 0.5 * jnp.sum(gap, axis=-1)


def acceptance(teacher_logits: Logits, student_logits: Logits) -> PerToken:
  """sum min(p, q): how often the teacher would keep a token drawn from the student.

  Args, Raises: as `forward_kl`.

  Returns:
    A share at each position [*B]; 1 is p = q.

  Source: Fast Inference from Transformers via Speculative Decoding, Leviathan et al.
  2023, arXiv 2211.17192, Theorem 3.5.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{acceptance(p, q):.2f}")
  0.75
  """
  return 1 - total_variation(teacher_logits, student_logits)


def adaptive_kl(
  teacher_logits: Logits,
  student_logits: Logits,
  temperature: Knob = 1.0,
  head_mass: Knob = 0.5,
) -> PerToken:
  """w KL(p || q) + (1 - w) KL(q || p), times T^2, w = e_head / (e_head + e_tail).

  The head are the teacher's likeliest tokens as long as their mass is at most
  `head_mass`, the first one always; e sums |p - q| over head or tail. The weights are
  constants, 1/2 each where p = q (the authors' 0/0 there is NaN).

  Args:
    head_mass: in [0, 1]; the other arguments as in `forward_kl`.

  Returns:
    The divergence at each position [*B], in nats.

  Raises:
    ValueError: if head_mass lies outside [0, 1], or the vocabularies differ.

  Source: AKL: Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
  Large Language Models, Wu et al. 2024, arXiv 2404.02657.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{adaptive_kl(p, q):.4f}")  # the gap is as large in the head as outside
  0.1373
  """
  _check("adaptive_kl: head_mass", head_mass, 0, 1)
  log_p, log_q = _both(teacher_logits, student_logits, temperature)
  p, q = jax.lax.stop_gradient((jnp.exp(log_p), jnp.exp(log_q)))
  error = jnp.abs(p - q)
  total = jnp.sum(error, axis=-1)
  in_head = jnp.sum(jnp.where(_head(p, head_mass), error, 0), axis=-1)
  weight = jnp.where(total > 0, in_head / jnp.where(total > 0, total, 1), 0.5)
  both = weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)
  return temperature**2 * both


def alpha_beta(
  teacher_logits: Logits,
  student_logits: Logits,
  temperature: Knob = 1.0,
  alpha: float = 0.2,
  beta: float = 0.7,
) -> PerToken:
  """sum (p^s / beta + q^s / alpha) / s - p^alpha q^beta / (alpha beta), times T^2.

  With s = alpha + beta; the limit of it where one of them is 0.

  Args:
    alpha, beta: at least 0, one above it; numbers, never traced. (1, 0) is
      `forward_kl`, (0, 1) `reverse_kl`. The other arguments as there.

  Returns:
    The divergence at each position [*B].

  Raises:
    ValueError: if one is negative or both are 0 (it is infinite where a token has
      probability 0 on one side), or the vocabularies differ.

  Source: ABKD, Wang et al. 2025, arXiv 2505.04560.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(f"{alpha_beta(p, q):.4f} {alpha_beta(p, q, alpha=1, beta=0):.4f}")
  0.1520 0.1308
  """
  if alpha < 0 or beta < 0 or alpha + beta == 0:
    raise ValueError(
      f"alpha_beta: alpha={alpha} and beta={beta} must be at least 0, and one above 0"
    )
  log_p, log_q = _both(teacher_logits, student_logits, temperature)
  terms = _alpha_beta_terms(log_p, log_q, alpha, beta)
  return temperature**2 * at_least_zero(jnp.sum(terms, axis=-1))


def _both(
  teacher_logits: Logits, student_logits: Logits, temperature: Knob
) -> tuple[_LogProbs, _LogProbs]:
  """log p and log q; a ValueError if the vocabularies differ, lest they broadcast."""
  sizes = teacher_logits.shape[-1], student_logits.shape[-1]
  if sizes[0] != sizes[1]:
    raise ValueError(f"the vocabularies differ: {sizes[0]} and {sizes[1]} tokens")
  return log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)


def _is_number(value: Knob) -> bool:
  """Whether a knob is known now, and not traced."""
  return isinstance(value, int | float | np.generic)


def _kl(log_p: _LogProbs, log_q: _LogProbs) -> PerToken:
  return at_least_zero(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def _log_mix(log_p: _LogProbs, log_q: _LogProbs, share: Knob) -> _LogProbs:
  """log(share p + (1 - share) q)."""
  # In double precision where that is possible: 1 - share may be tiny.
  numbers = math if _is_number(share) else jnp
  return jnp.logaddexp(log_p + numbers.log(share), log_q + numbers.log1p(-share))


def _alpha_beta_terms(
  log_p: _LogProbs, log_q: _LogProbs, alpha: float, beta: float
) -> Float[Array, "*B V"]:
  if beta == 0:
    return _half_power(log_p, log_q, alpha)
  if alpha == 0:
    return _half_power(log_q, log_p, beta)
  total = alpha + beta
  return (
    jnp.exp(total * log_p) / (total * beta)
    + jnp.exp(total * log_q) / (total * alpha)
    - jnp.exp(alpha * log_p + beta * log_q) / (alpha * beta)
  )


def _half_power(log_a: _LogProbs, log_b: _LogProbs, power: float) -> _LogProbs:
  """(b^x - a^x + x a^x (log a - log b)) / x^2; x = 1 makes it KL(a || b)."""
  a = jnp.exp(power * log_a)
  gap = jnp.exp(power * log_b) - a
  return gap / power**2 + a * (log_a - log_b) / power


def _head(p: Float[Array, "*B V"], mass: Knob) -> Bool[Array, "*B V"]:
  """The likeliest tokens while their total is at most `mass`, the first one always.

  What a stable descending sort and a cumulative sum would give, at the price of 31
  passes: the probability at which the mass is exceeded is found bit by bit (positive
  floats are in the order of their bits), and of its equals the first are taken.
  """
  bits = jax.lax.bitcast_convert_type(p, jnp.int32)

  def above(cut: Int[Array, "*B 1"]) -> Float[Array, "*B 1"]:
    return jnp.sum(jnp.where(bits > cut, p, 0), axis=-1, keepdims=True)

  def try_bit(i: Int[Array, ""], cut: Int[Array, "*B 1"]) -> Int[Array, "*B 1"]:
    higher = cut | (jnp.int32(1 << 30) >> i)
    # Still more than `mass` strictly above: the cut lies higher.
    return jnp.where(above(higher - 1) > mass, higher, cut)

  # The highest cut such that the tokens at or above it weigh more than `mass`.
  cut = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros_like(bits[..., :1]))
  equal = bits == cut
  value = jnp.max(jnp.where(equal, p, 0), axis=-1, keepdims=True)
  room = jnp.floor((mass - above(cut)) / jnp.where(value > 0, value, 1))
  first = jax.nn.one_hot(jnp.argmax(p, axis=-1), p.shape[-1], dtype=bool)
  return (bits > cut) | (equal & (jnp.cumsum(equal, axis=-1) <= room)) | first


def _check(what: str, value: Knob, low: float, high: float) -> None:
  if _is_number(value) and not low <= value <= high:
    raise ValueError(f"{what}={value} must lie between {low} and {high}")


def _check_skew(name: str, alpha: Knob) -> None:
  if _is_number(alpha) and not 0 <= alpha < 1:
    raise ValueError(f"{name}: alpha={alpha} must be at least 0 and below 1")
