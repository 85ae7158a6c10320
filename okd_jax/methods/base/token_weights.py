"""Which tokens a loss learns from, and how much: weights within every row.

A row keeps the weight that its tokens have together, however it is divided among them.
So what a token weighs depends on its own row alone, and not on how a batch is cut into
micro-batches, devices or chunks.

It takes logits that are computed a second time, without a gradient, but no forward
pass; and tokens of weight 0 in all losses have no logits there.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from okd_jax.errors import UserError
from okd_jax.losses import Output, entropy, forward_kl, per_token

KINDS = ("entropy", "divergence", "top:SHARE")


@dataclasses.dataclass(frozen=True)
class TokenWeight:
  """How a row's weight is divided among its tokens.

  kind: 'entropy', in proportion to the teacher's; 'divergence', in proportion to
    KL(p || q) from teacher to student; 'top', equally among the tokens of the largest
    KL(p || q).
  share: of 'top': of the row's tokens so many, rounded up.
  """

  kind: str
  share: float = 1.0

  @classmethod
  def read(cls, key: str, text: str) -> "TokenWeight | None":
    """What a configuration's key says; None of '', where all tokens weigh the same.

    Raises:
      UserError: for anything else than one of KINDS.

    >>> TokenWeight.read("adapter.tokens", "top:0.25")
    TokenWeight(kind='top', share=0.25)
    """
    kind, _, share = text.partition(":")
    try:
      number = float(share or 1)
    except ValueError:
      number = 0.0
    plain = kind in ("entropy", "divergence") and not share
    if text and not plain and not (kind == "top" and share and 0 < number <= 1):
      raise UserError(
        f"{key}={text!r} must be one of {', '.join(KINDS)} (such as top:0.2), or empty"
      )
    return cls(kind, number) if text else None


def divide(
  how: TokenWeight,
  teacher: Output,
  student: Output,
  weights: Float[Array, "B L"],
  chunk: int,
) -> Float[Array, "B L"]:
  """The weights [B, L], each row's divided anew among its tokens; constants.

  Args:
    teacher, student: their outputs over one vocabulary.
    weights: of each position so far, 0 where it does not count.
    chunk: positions of a row whose logits are in memory at once (`per_token`).

  Where a row's tokens all score 0 it keeps its weights.

  Source: ours. Token weights by entropy: arXiv 2603.07079; by divergence and of the
  top share: TIP, arXiv 2604.14084, and the like.
  """

  def score(logits: Mapping[str, Array], _: Int[Array, "B C"]) -> Float[Array, "B C"]:
    if how.kind == "entropy":
      return entropy(logits["teacher"])
    return forward_kl(logits["teacher"], logits["student"])

  outputs = {"teacher": teacher}
  if how.kind != "entropy":
    outputs["student"] = student
  counts = weights > 0
  found = per_token(score, outputs, counts.astype(jnp.int32), chunk)
  if how.kind == "top":
    found = _highest(found, counts, how.share)
  shares = jnp.where(counts, weights * found, 0.0)
  total = shares.sum(1, keepdims=True)
  row = weights.sum(1, keepdims=True)
  divided = shares * (row / jnp.where(total > 0, total, 1.0))
  return jnp.where(total > 0, divided, weights)


def _highest(
  scores: Float[Array, "B L"], counts: Array, share: float
) -> Float[Array, "B L"]:
  """1 at the tokens of a row that are among its highest, so many of those that count.

  Of equal ones the first come first. The count is rounded up, but not by an error of
  the product: a fifth of 15 tokens is 3.
  """
  order = jnp.argsort(-jnp.where(counts, scores, -jnp.inf), axis=1, stable=True)
  rank = jnp.argsort(order, axis=1)
  wanted = jnp.ceil(share * counts.sum(1, keepdims=True) - 1e-4)
  return ((rank < wanted) & counts).astype(jnp.float32)
