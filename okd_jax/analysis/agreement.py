"""How close a student is to its teacher, token by token, and where it is not.

OKD, arXiv 2409.12512, Eqs. 3 and 4, Figures 2 and 5: UNC = 1 - p(gold) under the
frozen teacher splits the held-out tokens at its median into easy and hard ones. The
paper names neither the model nor the threshold; these are ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from okd_jax import losses
from okd_jax.analysis.positions import Logits, Values

HEAD_MASS = 0.5  # the teacher's likeliest tokens with this mass are its head, as in AKL
TOP = 50  # of the paper's Figures 10 to 12
GROUPS = ("all", "hard", "easy")
_BINS = 10


def compare(
  teacher: Float[Array, "B C V"],
  student: Float[Array, "B C V"],
  labels: Int[Array, "B C"],
) -> Values:
  """A teacher and a student at each position; KLs in nats, shares from 0 to 1.

  acceptance: the share of the student's tokens that speculative decoding with the
    teacher would keep.
  teacher_std, student_std: of the logits over the vocabulary; with _top over the
    teacher's 50 likeliest tokens (Figure 5).
  head_gap, tail_gap: sum of |p - q| over the teacher's head and over the rest.
  head_mass: the student's mass on the teacher's head.
  unc: 1 - p(gold).
  """
  log_p, log_q = losses.log_probs(teacher), losses.log_probs(student)
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  head = _head(p)
  gap = jnp.abs(p - q)
  top = min(TOP, teacher.shape[-1])
  best, where = jax.lax.top_k(teacher, top)
  beside = jnp.take_along_axis(student, where, axis=-1)
  gold = jnp.take_along_axis(p, labels[..., None], axis=-1)[..., 0]
  return {
    "forward_kl": losses.forward_kl(teacher, student),
    "reverse_kl": losses.reverse_kl(teacher, student),
    "top1_agreement": losses.top1_agreement(teacher, student),
    "acceptance": losses.acceptance(teacher, student),
    "loss": losses.cross_entropy(student, labels),
    "teacher_loss": losses.cross_entropy(teacher, labels),
    "student_std": student.std(-1),
    "teacher_std": teacher.std(-1),
    "student_std_top": beside.std(-1),
    "teacher_std_top": best.std(-1),
    "head_gap": (gap * head).sum(-1),
    "tail_gap": (gap * ~head).sum(-1),
    "head_mass": (q * head).sum(-1),
    "unc": 1 - gold,
  }


def _head(p: Float[Array, "B C V"]) -> Bool[Array, "B C V"]:
  """The fewest likeliest tokens whose mass reaches HEAD_MASS."""
  order = jnp.argsort(-p, axis=-1)
  ranked = jnp.take_along_axis(p, order, axis=-1)
  before = jnp.cumsum(ranked, axis=-1) - ranked
  count = (before < HEAD_MASS).sum(-1, keepdims=True)
  return jnp.argsort(order, axis=-1) < count


def judged(logits: Float[Array, "B C V"], labels: Int[Array, "B C"]) -> Values:
  """The probability of a model's first choice, and whether that is the gold token."""
  log_p = losses.log_probs(logits)
  right = log_p.argmax(-1) == labels
  return {"confidence": jnp.exp(log_p.max(-1)), "correct": right.astype(jnp.float32)}


def figures(logits: Logits, labels: Int[Array, "B C"]) -> Values:
  """What `summary` reads, of 'teacher', 'student' and, if there is one, 'adapted'."""
  found = {}
  for name in sorted({"teacher", "adapted"} & logits.keys()):
    both = compare(logits[name], logits["student"], labels)
    found |= {f"{name}/{figure}": value for figure, value in both.items()}
  for name in sorted(logits):
    found |= {f"{name}/{k}": v for k, v in judged(logits[name], labels).items()}
  if "adapted" in logits:
    moved = losses.forward_kl(logits["teacher"], logits["adapted"])
    found["adapted/drift"] = moved
  return found


def difficulty(
  unc: Float[np.ndarray, "N L"], mask: Bool[np.ndarray, "N L"]
) -> dict[str, Bool[np.ndarray, "N L"]]:
  """Which tokens are in each of GROUPS; one whose UNC is the median is easy."""
  hard = mask & (unc > np.median(unc[mask]))
  return {"all": mask, "hard": hard, "easy": mask & ~hard}


def summary(
  values: Mapping[str, np.ndarray], mask: Bool[np.ndarray, "N L"]
) -> dict[str, Any]:
  """{teacher or adapted: {group: {figure: mean}}}, and each model's calibration."""
  groups = difficulty(values["teacher/unc"], mask)
  found: dict[str, Any] = {"tokens": {g: int(m.sum()) for g, m in groups.items()}}
  for name in ("teacher", "adapted"):
    own = {
      key.removeprefix(f"{name}/"): value
      for key, value in values.items()
      if key.startswith(f"{name}/") and not key.endswith(("confidence", "correct"))
    }
    if own:
      found[name] = {
        group: {figure: float(value[chosen].mean()) for figure, value in own.items()}
        for group, chosen in groups.items()
        if chosen.any()
      }
  names = sorted(key.partition("/")[0] for key in values if key.endswith("/correct"))
  found["calibration"] = {
    name: calibration(
      values[f"{name}/confidence"][mask], values[f"{name}/correct"][mask]
    )
    for name in names
  }
  return found


def calibration(
  confidence: Float[np.ndarray, " T"], correct: Float[np.ndarray, " T"]
) -> dict[str, Any]:
  """Expected calibration error in ten equal bins (Guo et al. 2017, arXiv 1706.04599).

  >>> found = calibration(np.array([0.95, 0.95, 0.15]), np.array([1.0, 0.0, 0.0]))
  >>> round(found["error"], 3), [b["tokens"] for b in found["bins"]]
  (0.35, [1, 2])
  """
  which = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
  bins = [
    {
      "confidence": float(confidence[which == i].mean()),
      "accuracy": float(correct[which == i].mean()),
      "tokens": int((which == i).sum()),
    }
    for i in range(_BINS)
    if (which == i).any()
  ]
  gaps = [b["tokens"] * abs(b["confidence"] - b["accuracy"]) for b in bins]
  return {"error": sum(gaps) / len(confidence), "bins": bins}


def chosen_positions(
  unc: Float[np.ndarray, "N L"], mask: Bool[np.ndarray, "N L"]
) -> list[tuple[int, int]]:
  """(row, position) of an easy, a middling and a hard token, for `top_tokens`."""
  places = np.argwhere(mask)
  order = places[np.argsort(unc[mask], kind="stable")]
  return [tuple(map(int, order[int(share * (len(order) - 1))])) for share in _SHOWN]


_SHOWN = (0.1, 0.5, 0.9)  # quantiles of UNC


def top_tokens(
  probabilities: Mapping[str, Float[np.ndarray, " V"]], names: Sequence[str]
) -> list[dict[str, Any]]:
  """The teacher's 50 likeliest tokens at a position, with every model's probability."""
  best = np.argsort(-probabilities["teacher"], kind="stable")[:TOP]
  return [
    {"token": names[i]} | {who: float(p[i]) for who, p in probabilities.items()}
    for i in best
  ]
