"""What a run is made of and what its models say, for its report.

about.json has the models' sizes, the data and where the run ran; sample_answers.json
what they say to a few held-out prompts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from okd_jax.data import Example, rows
from okd_jax.data.format import template_text
from okd_jax.data.tokens import words
from okd_jax.errors import UserError
from okd_jax.evaluation.answers import answerable, judged
from okd_jax.models import ModelConfig, parameter_shapes
from okd_jax.run import identity
from okd_jax.run.build import Run
from okd_jax.runtime import machine
from okd_jax.runtime.files import read_json
from okd_jax.runtime.workdir import Workdir

_SAMPLES = 5  # prompts whose answers are kept


def write(run: Run, workdir: Workdir, step: int) -> None:
  """Writes sizes, data, and what this part of the run, from `step` on, is of.

  That is its machine, versions, commit and command. A part like the one before it is
  none of its own.
  """
  part = {
    "machine": machine.machine(),
    "versions": machine.versions(),
    "commit": machine.commit(),
    "command": machine.command(),
  }
  kept = read_json(workdir.about)["parts"] if workdir.about.exists() else []
  parts = [old for old in kept if old["step"] < step]
  if not parts or {**parts[-1], "step": 0} != {**part, "step": 0}:
    parts.append({"step": step} | part)
  found = {"models": _models(run), "data": data_of(run), "parts": parts}
  workdir.write_json(workdir.about, found)


def _models(run: Run) -> dict[str, Any]:
  """The student, the teachers and, of those that carry one, the module."""
  params, student = run.plan.abstract.params, run.cast.student
  found = {"student": _size(student.config, parameter_shapes(student.config))}
  if student.adapter:
    found["student"]["trained"] = count(params["student"])
  found["teachers"] = {
    name: _size(decoder.config, _weights(run, name))
    | ({"module": count(params["adapter"][name])} if name in run.cast.adapted else {})
    for name, decoder in run.cast.teachers.items()
  }
  return found


def _weights(run: Run, name: str) -> PyTree:
  """A teacher's weights, or their shapes if it is the student itself."""
  config = run.cast.teachers[name].config
  return run.cast.frozen[name] if name in run.cast.frozen else parameter_shapes(config)


def _size(config: ModelConfig, params: PyTree) -> dict[str, Any]:
  shape = {"layers": config.num_layers, "width": config.hidden_size}
  return {"family": config.family, "parameters": count(params)} | shape


def count(params: PyTree) -> int:
  """How many numbers a tree has."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def check_rows(run: Run, workdir: Workdir) -> None:
  """Refuses rows that are not those which the run in the workdir began with.

  Raises:
    UserError: that names what is another: tokenizer, template, or the rows alone.
  """
  saved = identity.kept(workdir)["data"]
  changed = [
    f"data.{part}"
    for part, now in data_of(run).items()
    if saved.get(part, now)["digest"] != now["digest"]
  ]
  if changed:
    raise UserError(
      f"{', '.join(changed)}: not as when the run in {workdir.path} began; put back "
      "what has changed, or name another workdir"
    )


def data_of(run: Run) -> dict[str, Any]:
  """The rows, the tokenizer and the template, each with its digest."""
  data, settings = run.data, run.settings
  count = sum(map(judged, data.eval)) if settings.eval.generate else 0
  count = min(count, settings.eval.generate_limit or count)
  if data.stream:
    train = {"shards": data.stream.shards, "digest": data.stream.digest}
  else:
    train = {"rows": len(data.train), "digest": rows.digest(data.train)[:16]}
  return {
    "train": train,
    "eval": {
      "rows": len(data.eval),
      "digest": _short(rows.digest(data.eval) + _references(data.eval)),
      "prompts": count,
    },
    "tokenizer": {"digest": _short(words(data.tokenizer))},
    "template": {
      "digest": _short(template_text(settings.data.template, data.tokenizer))
    },
  }


def _short(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _references(examples: Sequence[Example]) -> str:
  """What answers are scored by, which no token says."""
  return json.dumps([example.references for example in examples])


class Samples:
  """What the models say to the first held-out prompts, kept in a file.

  Raises:
    UserError: if what a run of before has kept is damaged.
  """

  def __init__(self, run: Run, workdir: Workdir):
    self._path, self._workdir = workdir.sample_answers, workdir
    limit = run.settings.eval.generate_limit or _SAMPLES
    examples = answerable(run.data.eval)[: min(limit, _SAMPLES)]
    self._where = [example.where for example in examples]
    asked = [
      {"prompt": example.asked, "references": list(example.references)}
      for example in examples
    ]
    kept = read_json(self._path) if self._path.exists() else {}
    if kept.get("rows") != asked:
      kept = {"rows": asked, "teachers": {}, "student": {}}
    self._kept = kept

  def teacher(self, name: str, answers: Mapping[str, str]) -> None:
    """Keeps a teacher's answers, by the place that their row came from."""
    self._write(self._kept["teachers"], name, answers)

  def student(self, step: int, answers: Mapping[str, str]) -> None:
    """Keeps the student's answers after so many steps."""
    self._write(self._kept["student"], str(step), answers)

  def _write(
    self, into: dict[str, list[str | None]], key: str, answers: Mapping[str, str]
  ) -> None:
    if answers:
      into[key] = [answers.get(where) for where in self._where]
      self._workdir.write_json(self._path, self._kept)
