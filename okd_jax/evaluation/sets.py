"""Several sets of held-out rows, each under a name."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from okd_jax.data import Record
from okd_jax.errors import UserError
from okd_jax.evaluation.held_out import Options, evaluate
from okd_jax.models import Model
from okd_jax.runtime.files import local
from okd_jax.runtime.metrics import finite_or_null


def read_sets(written: Sequence[str]) -> dict[str, str]:
  """Sources by name, each written NAME=SOURCE.

  Raises:
    UserError: for another form, a name that no folder may have, or one given twice.
  """
  named = {}
  for each in written:
    name, _, source = each.partition("=")
    if not (name and source) or {*"/\\"} & {*name} or name.startswith("."):
      raise UserError(
        f"--sets: {each!r} must be NAME=F.jsonl, with a name that a folder may have"
      )
    if name in named:
      raise UserError(f"--sets: {name!r} is named twice")
    named[name] = source
  return named


def evaluate_sets(
  model: Model,
  sets: Mapping[str, Sequence[Record]],
  options: Options,
  teacher: Model | None = None,
  name: str = "the model",
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Each set's name and results, as JSON; `options.answers` gets a folder a set.

  Raises:
    UserError: as `evaluate`.
  """
  for key, records in sets.items():
    into = str(local(options.answers) / key) if options.answers else ""
    own = dataclasses.replace(options, answers=into)
    yield key, finite_or_null(evaluate(model, records, own, teacher, name))


def beside_greedy(
  found: Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
  """Rows of a table: each set's, and its greedy answers' where others were drawn."""
  rows = {}
  for name, results in found.items():
    rows[name] = results
    if "rougeL_greedy" in results:
      rows[f"{name}, greedy"] = results["draws"]["greedy"]
  return rows
