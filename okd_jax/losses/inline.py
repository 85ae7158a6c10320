"""A function with all that is jitted inside it written out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, of which nobody wants a derivative, without calls of other functions.

  Much of `jax.numpy` is jitted by itself. To XLA that is a call if it occurs twice,
  and across its edge an array is divided evenly or not at all: of 50257 logits on two
  devices, `log_softmax` had each device gather all.

  Source: the interpreter of JAX's documentation, "Writing custom Jaxpr interpreters".

  >>> jax.make_jaxpr(inlined(jax.nn.relu))(1.0)
  { lambda ; a:f32[]. let b:f32[] = max a 0.0:f32[] in (b,) }
  """

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    values = _evaluated(closed, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), values)

  return call


def _evaluated(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
  jaxpr = closed.jaxpr
  names = (*jaxpr.constvars, *jaxpr.invars)
  known = dict(zip(names, (*closed.consts, *args), strict=True))

  def read(atoms: Sequence[Any]) -> list[Any]:
    return [x.val if isinstance(x, Literal) else known[x] for x in atoms]

  for equation in jaxpr.eqns:
    values = _applied(equation, read(equation.invars))
    known.update(zip(equation.outvars, values, strict=True))
  return read(jaxpr.outvars)


def _applied(equation: JaxprEqn, values: list[Any]) -> Sequence[Any]:
  primitive, params = equation.primitive, equation.params
  if primitive.name in _CALLS:
    return _evaluated(params.get("jaxpr") or params["call_jaxpr"], values)
  out = primitive.bind(*values, **params)
  return out if primitive.multiple_results else [out]
