"""What a run would train on, in figures: rows, what was lost, lengths, padding, tokens.

Nothing here reads a weight; the rows are those that the run itself will find.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from okd_jax import models
from okd_jax.analysis import lengths
from okd_jax.config.schema import Settings
from okd_jax.data import Example, day, pack, rows, stop_ids
from okd_jax.data.sources import called, iter_records
from okd_jax.errors import UserError
from okd_jax.models import ModelConfig
from okd_jax.run import ends
from okd_jax.run.data import Data, read_data
from okd_jax.run.identity import kept_day
from okd_jax.run.job import Job
from okd_jax.run.outline import Outline, outline, teacher_paths
from okd_jax.run.plan import count_steps
from okd_jax.runtime.workdir import Workdir

_COUNTED = 20_000  # rows whose trained parts are looked at; of more, evenly spaced ones

Tokens = tuple[PreTrainedTokenizerBase, ModelConfig]


@dataclasses.dataclass(frozen=True)
class Look:
  """A run before it runs: settings, shapes and rows."""

  settings: Settings
  outline: Outline
  data: Data


def look(job: Job, workdir: Workdir) -> Look:
  """Reads the data of a run as it will itself, in the words of its workdir's day.

  Raises:
    UserError: for a model or data that cannot be read.
  """
  settings, source = job.settings, job.settings.data
  if source.stream:
    raise UserError(
      "data.stream: a preview would have to read the whole corpus; name a part of it "
      "as data.train, with data.stream=False and data.pack=True"
    )
  shape = outline(
    job,
    workdir,
    lambda: iter_records(source.sources, prompts=True, columns=source.renames),
  )
  with day.written_on(kept_day(settings, workdir)):
    data = read_data(source, settings.eval, shape, job.method.sequences.answers_all)
  return Look(settings, shape, data)


def figures(seen: Look) -> dict[str, Any]:
  """All figures, as preview.json has them."""
  train = seen.data.train
  return {
    "sources": _sources(train, seen.data.facts.train["sources"]),
    "records": seen.data.facts.train["counts"],
    "duplicates": len(train) - len(set(rows.column(train, "key").tolist())),
    "held_out": _held_out(seen),
    "lengths": _lengths(seen),
    "rows": _packing(seen),
    "run": _run(seen),
    "tokens": _tokens(train),
    "special_tokens": special_tokens(seen),
    "warnings": ends.problems(seen.outline, seen.settings.data),
  }


def save_picture(seen: Look, path: Path) -> None:
  """The rows' lengths, as a picture."""
  lengths.save_picture(lengths_of(seen.data.train), longest_of(seen), path)


def lengths_of(train: Sequence[Example]) -> dict[str, Int[np.ndarray, " N"]]:
  """Tokens of whole rows and of their prompts, and of what the teacher reads."""
  found = {
    "whole rows": rows.column(train, "length"),
    "prompts": rows.column(train, "prompt_length"),
  }
  if rows.privileged(train):
    of_teacher = rows.column(train, "teacher_length")
    found["for the teacher"] = np.where(of_teacher, of_teacher, found["whole rows"])
  return found


def special_tokens(seen: Look) -> dict[str, dict[str, list[str]]]:
  """By what they are for and by model: special tokens, each with its id."""
  template, found = seen.settings.data.template, {}
  for name, (tokenizer, config) in _models(seen).items():
    bos_eos_pad = {
      kind: [getattr(tokenizer, f"{kind}_token_id")] for kind in ("bos", "eos", "pad")
    }
    ids = {f"tokenizer's {kind}": own for kind, own in bos_eos_pad.items()}
    ids["generation stops at"] = config.eos_ids
    try:
      ids["rows may end with"] = stop_ids(tokenizer, template)
    except UserError:  # the teacher's has no chat template of its own, say
      ids["rows may end with"] = ()
    for kind, own in ids.items():
      words = [ends.named(i, tokenizer) for i in own if i is not None]
      found.setdefault(kind, {})[name] = words
  return found


def _models(seen: Look) -> dict[str, Tokens]:
  """Tokenizer and configuration of every model; one that brings none has the run's."""
  shape, path = seen.outline, seen.settings.student.path
  own = models.load(path, params=False).tokenizer if path else None
  found = {"student": (own or shape.tokenizer, shape.student)}
  paths = teacher_paths(seen.settings)
  for name, config in shape.teachers.items():
    own = models.load(paths[name], params=False).tokenizer if name in paths else None
    called_so = "teacher" if len(shape.teachers) == 1 else f"teacher {name}"
    found[called_so] = (own or shape.tokenizer, config)
  return found


def _sources(train: Sequence[Example], names: Sequence[str]) -> list[dict[str, Any]]:
  """Of each file: records that have rows, these, and their tokens."""
  source, number, length = (
    rows.column(train, name) for name in ("source", "number", "length")
  )
  return [
    {
      "name": name,
      "records": len(np.unique(number[source == i])),
      "rows": int((source == i).sum()),
      "tokens": int(length[source == i].sum()),
    }
    for i, name in enumerate(names)
  ]


def _held_out(seen: Look) -> dict[str, Any]:
  facts, data = seen.data.facts, seen.settings.data
  if facts.eval is None:
    origin = f"drawn from data.train by data.holdout_seed={data.holdout_seed}"
  else:
    origin = called(data.eval_sources)
  return {
    "rows": facts.held_out,
    "used": len(seen.data.eval),
    "from": origin,
    "records": None if facts.eval is None else facts.eval["counts"],
    "twins_left_out": facts.twins,
  }


def _lengths(seen: Look) -> dict[str, Any]:
  found = lengths_of(seen.data.train)
  longest = longest_of(seen)
  bounds = lengths.edges(longest)
  return {
    "bins": bounds,
    "counts": {name: lengths.counts(own, bounds) for name, own in found.items()},
    "percentiles": {name: lengths.percentiles(own) for name, own in found.items()},
  }


def longest_of(seen: Look) -> int:
  """The most tokens that a row may have, the teacher's among them."""
  form = seen.settings.data.form
  teacher = form.teacher_length if rows.privileged(seen.data.train) else 0
  return max(form.max_length, teacher)


def _packing(seen: Look) -> dict[str, Any]:
  """Rows, steps and padding of an epoch, each text alone and packed."""
  train, data = seen.data.train, seen.settings.data
  own = rows.column(train, "length") - 1
  both = np.maximum(own, rows.column(train, "teacher_length") - 1)
  counts = {"plain": len(train)}
  if data.pack:
    counts["packed"] = len(seen.data.packs)
  elif both.max() <= data.max_length:  # a longer one of the teacher's fits in no row
    counts["packed"] = len(pack(both, data.max_length))
  found = {"used": "packed" if data.pack else "plain"}
  for name, count in counts.items():
    found[name] = {
      "rows": count,
      "steps_an_epoch": math.ceil(count / seen.settings.train.batch_size),
      "padding": 1 - int(own.sum()) / (count * data.max_length),
    }
  return found


def _run(seen: Look) -> dict[str, float]:
  """How long it is."""
  train, count = seen.settings.train, len(seen.data.packs)
  steps = count_steps(train, count)
  return {"steps": steps, "epochs": steps * train.batch_size / count}


def _tokens(train: Sequence[Example]) -> dict[str, Any]:
  """Of an epoch: all tokens, and those that are trained on."""
  length = rows.column(train, "length")
  chosen = np.unique(np.linspace(0, len(train) - 1, _COUNTED).astype(int))
  trained = sum(train[int(i)].predicted for i in chosen)
  share = trained / int(length[chosen].sum())
  total, whole = int(length.sum()), len(chosen) == len(train)
  return {
    "all": total,
    "trained": trained if whole else round(share * total),
    "share": share,
    "estimated_from_rows": None if whole else len(chosen),
  }


def differing(special: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
  """The kinds of special tokens in which models differ."""
  return [kind for kind, own in special.items() if len(set(map(str, own.values()))) > 1]
