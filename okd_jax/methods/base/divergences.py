"""Every divergence by name, and the knobs that shape some of them."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float

from okd_jax import losses
from okd_jax.errors import UserError
from okd_jax.methods.base.knobs import (
  Knob,
  Linear,
  check_positive,
  check_share,
  check_weight,
  ends,
  show,
)

_log = logging.getLogger(__name__)

# (p_logits, q_logits, *, temperature, **knobs) -> [B, C]
Distance = Callable[..., Float[Array, "B C"]]


@dataclasses.dataclass(frozen=True)
class Shape:
  """A knob of a divergence: its key below `method`, its default, and its check.

  check: (key, knob) -> None, raises a UserError for values out of range.
  """

  key: str
  default: float
  check: Callable[[str, Knob], None] = check_weight


@dataclasses.dataclass(frozen=True)
class Divergence:
  """A function of two distributions, and which knob is which of its arguments.

  function: (p_logits [B, C, V], q_logits [B, C, V], temperature, **arguments)
    -> [B, C], D(p, q) * T^2 in float32, as those of `okd_jax.losses`.
  """

  function: Callable[..., Float[Array, "B C"]]
  arguments: Mapping[str, Shape] = dataclasses.field(default_factory=dict)


def _check_beta(key: str, knob: Knob) -> None:
  check_share(key, knob)
  if isinstance(knob, Linear) and not all(0 < value < 1 for value in ends(knob)):
    raise UserError(
      f"{show(key, knob)}: the Jensen-Shannon divergence jumps at 0 and 1 (they mean "
      "the plain KLs), so a schedule must stay between them"
    )


def _check_skew(key: str, knob: Knob) -> None:
  if not all(0 <= value < 1 for value in ends(knob)):
    raise UserError(f"{show(key, knob)} must be at least 0 and below 1")


def _check_constant(key: str, knob: Knob) -> None:
  if isinstance(knob, Linear):
    raise UserError(f"{show(key, knob)}: this knob cannot move")
  check_weight(key, knob)


_SKEW = {"alpha": Shape("skew", 0.1, _check_skew)}

DIVERGENCES: dict[str, Divergence] = {
  "forward_kl": Divergence(losses.forward_kl),
  "reverse_kl": Divergence(losses.reverse_kl),
  "jensen_shannon": Divergence(
    losses.jensen_shannon,
    {
      "beta": Shape("beta", 0.5, _check_beta),
      "normalize": Shape("normalize", False, lambda key, knob: None),
    },
  ),
  "skew_forward_kl": Divergence(losses.skew_forward_kl, _SKEW),
  "skew_reverse_kl": Divergence(losses.skew_reverse_kl, _SKEW),
  "total_variation": Divergence(losses.total_variation),
  "adaptive_kl": Divergence(
    losses.adaptive_kl, {"head_mass": Shape("head_mass", 0.5, check_share)}
  ),
  "weighted_kl": Divergence(
    losses.weighted_kl, {"weight": Shape("forward_share", 0.5, check_share)}
  ),
  "alpha_beta": Divergence(
    losses.alpha_beta,
    {
      "alpha": Shape("ab_alpha", 0.2, _check_constant),
      "beta": Shape("ab_beta", 0.7, _check_constant),
    },
  ),
}


def register_divergence(
  name: str, function: Callable[..., Float[Array, "B C"]], **arguments: Shape
) -> None:
  """Makes somebody else's divergence known as method.divergence=NAME.

  Args:
    name: its name.
    function: see `Divergence`.
    arguments: the knob of each further argument of `function`.

  Raises:
    UserError: if the name, or the key of a knob, is another one's already.
  """
  known, shapes = DIVERGENCES.get(name), shape_knobs()
  if known and known.function.__qualname__ != function.__qualname__:
    raise UserError(f"there is a divergence {name!r} already; choose another name")
  for shape in arguments.values():
    if not known and shape.key in shapes:
      raise UserError(
        f"divergence {name!r}: the knob method.{shape.key} is another divergence's; "
        "choose another key"
      )
  DIVERGENCES[name] = Divergence(function, arguments)


def shape_knobs() -> dict[str, Shape]:
  """Every knob of a divergence, by its key."""
  return {
    shape.key: shape
    for divergence in DIVERGENCES.values()
    for shape in divergence.arguments.values()
  }


def own_shape(shape: Mapping[str, Knob], *names: str) -> dict[str, Knob]:
  """The knobs that one of these divergences reads: of `shape`, else their defaults."""
  known = (DIVERGENCES[name] for name in names if name in DIVERGENCES)
  own = {
    s.key: s.default for divergence in known for s in divergence.arguments.values()
  }
  return {key: shape.get(key, default) for key, default in own.items()}


def check_divergence(key: str, name: str, shape: Mapping[str, Knob]) -> None:
  """Raises a UserError for an unknown name, or a knob of `name` out of range."""
  if name not in DIVERGENCES:
    raise UserError(
      f"{key}={name!r} is no divergence; use one of {', '.join(DIVERGENCES)}"
    )
  for knob in DIVERGENCES[name].arguments.values():
    knob.check(f"method.{knob.key}", shape[knob.key])
  _check_together(name, shape)


def bind(name: str) -> Distance:
  """The divergence of this name, to be called with knobs by their keys.

  It picks what it needs from the knobs:

    distance(p_logits, q_logits, temperature=…, **knobs) -> [B, C]
  """
  function, arguments = DIVERGENCES[name].function, DIVERGENCES[name].arguments

  def distance(
    p_logits: Float[Array, "*B V"],
    q_logits: Float[Array, "*B V"],
    *,
    temperature: float | Float[Array, ""],
    **knobs: Any,
  ) -> Float[Array, "*B"]:
    own = {argument: knobs[knob.key] for argument, knob in arguments.items()}
    return function(p_logits, q_logits, temperature, **own)

  return distance


def _check_together(name: str, shape: Mapping[str, Knob]) -> None:
  if name == "alpha_beta" and not shape["ab_alpha"] + shape["ab_beta"]:
    raise UserError("method.ab_alpha=0.0 and method.ab_beta=0.0: one must be above 0")
  if name == "jensen_shannon" and not shape["normalize"]:
    if any(0 < beta < 0.05 or 0.95 < beta < 1 for beta in ends(shape["beta"])):
      _log.warning(
        "%s: so near the end the Jensen-Shannon divergence is almost 0 and trains "
        "almost nothing; set method.normalize=True",
        show("method.beta", shape["beta"]),
      )


def among_top_k(distance: Distance, k: int) -> Distance:
  """`distance` between the teacher's k likeliest tokens and one bucket for the rest.

  Keeps what holds for an f-divergence: never above the distance between the whole
  distributions, and equal to it once k reaches the vocabulary.
  """

  def sparse(
    p_logits: Float[Array, "*B V"],
    q_logits: Float[Array, "*B V"],
    *,
    temperature: float | Float[Array, ""],
    **knobs: Any,
  ) -> Float[Array, "*B"]:
    top = losses.top_k(p_logits, k, temperature)
    p, q = losses.buckets(top, q_logits, temperature)
    return temperature**2 * distance(p, q, temperature=1.0, **knobs)

  return sparse


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapedKnobs:
  """What whoever measures by divergences reads.

  temperature: T of both distributions; a divergence is multiplied by T^2.
  shape: the knobs of the divergences; of those that nobody reads none is kept.
  """

  temperature: Knob = 1.0
  shape: Mapping[str, Knob] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    check_positive("method.temperature", self.temperature)
    named = self.named_divergences()
    object.__setattr__(self, "shape", own_shape(self.shape, *named.values()))
    for key, name in named.items():
      check_divergence(key, name, self.shape)

  def named_divergences(self) -> dict[str, str]:
    """The divergences in use, by the configuration key that names each."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceKnobs(ShapedKnobs):
  """What a method reads that takes any divergence from the teacher to the student.

  divergence: a key of DIVERGENCES; '' is `default_divergence`, the method's own.
  """

  divergence: str = ""

  default_divergence = "forward_kl"  # no annotation: of the class, not a knob

  def named_divergences(self) -> dict[str, str]:
    own = {"method.divergence": self.divergence or self.default_divergence}
    return super().named_divergences() | own

  def distance(self) -> Distance:
    """The divergence, see `bind`."""
    return bind(self.divergence or self.default_divergence)
