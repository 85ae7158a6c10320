"""A run in one static page: what it reached, what falls short, how to use it."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from okd_jax.analysis import facts, page, plots
from okd_jax.analysis.plots import Figures, History, read_history
from okd_jax.evaluation.figures import columns
from okd_jax.runtime.files import read_json
from okd_jax.runtime.workdir import Workdir

# An adapted teacher that learns from data moves about 0.1 nats; one that follows the
# student instead moves on and on, in the end to a near-uniform distribution.
_DRIFT_WARNING = 0.3


def summary_rows(workdir: Path) -> dict[str, Figures]:
  """The closing table: who was measured -> the figures there are."""
  return _summary(read_history(workdir))


def write(workdir: Workdir) -> None:
  """Writes report.html from what the run has left; same inputs, same bytes.

  Raises:
    UserError: if a file of the run is damaged.
  """
  config, history = read_json(workdir.config), read_history(workdir.path)
  about, cost, answers = (
    read_json(path) if path.exists() else {}
    for path in (workdir.about, workdir.cost, workdir.sample_answers)
  )
  rows = _summary(history)
  present = set().union(*rows.values())
  text = page.render(
    title=_title(config),
    sizes=facts.sizes(about),
    columns={name: c for name, c in columns().items() if name in present},
    rows=rows,
    answers=facts.sample_answers(answers, history),
    findings=list(_findings(history, config)),
    charts=plots.charts(history),
    facts=facts.facts(history, config, about, cost),
    stages=_stages(workdir.path),
    exported=history.exported is not None,
    folders=[name for name in ("adapter", "teacher") if workdir.module(name).is_dir()],
    config=config,
  )
  workdir.write_text(workdir.report, text + "\n")


def _stages(folder: Path) -> dict[str, str]:
  """Reports that this one's links lead to: of its stages, and of whose stage it is."""
  found = {
    path.parent.name: path.relative_to(folder).as_posix()
    for path in sorted(folder.glob("stages/*/report.html"))
  }
  if folder.absolute().parent.name == "stages":
    found["the run that this is a stage of"] = "../../report.html"
  return found


def _summary(history: History) -> dict[str, Figures]:
  rows = {f"teacher {name}".strip(): v for name, v in history.teachers.items() if v}
  final = history.evals.get(history.final, {})
  if "adapted_loss" in final:
    rows["adapted teacher"] = _adapted(final)
  if 0 in history.evals:
    rows["student, start"] = history.evals[0]
  if history.final:
    rows[f"student, step {history.final}"] = final
  return {
    name: {metric: row[metric] for metric in columns() if metric in row}
    for name, row in rows.items()
  }


def _adapted(figures: Figures) -> Figures:
  loss = figures["adapted_loss"]
  row = {"loss": loss}
  if loss < 700:  # beyond, exp overflows
    row["perplexity"] = math.exp(loss)
  if "adapted_drift" in figures:
    row["forward_kl"] = figures["adapted_drift"]
  return row


def _title(config: Mapping) -> str:
  """Method: teacher → student, each by the last part of its path or by its size."""
  teacher = " + ".join(sorted(config["teachers"])) or _name(config["teacher"])
  student = _name(config["student"])
  if not student:
    student = f"{config['student']['layers']} of its layers"
  return f"{config['method']['name']}: {teacher}{' → ' * bool(teacher)}{student}"


def _name(section: Mapping) -> str:
  path, model = section["path"], section["model"]
  if path or not model["hidden_size"]:
    return PurePath(path).name
  return f"{model['family']} {model['num_layers']} × {model['hidden_size']}"


def _findings(history: History, config: Mapping) -> Iterator[str]:
  """What the figures say, above all where they fall short."""
  if history.exported is None:
    yield "⚠ The run has not finished; the same command goes on with it."
  if history.final is None:
    yield "⚠ Nothing was evaluated."
    return
  start, end = history.evals.get(0, {}), history.evals[history.final]
  if history.final:
    yield from _changes(start, end)
  yield from _beside_teacher(history.teacher, end)
  yield from _module(end)
  yield from _trend(history)
  yield from _caveats(history, end, config)


def _changes(start: Figures, end: Figures) -> Iterator[str]:
  titles = {
    "loss": "held-out loss",
    "forward_kl": "KL to the teacher",
    "adapted_forward_kl": "KL to the adapted teacher, to which it was pulled,",
  }
  for name, title in titles.items():
    if name not in start or name not in end:
      continue
    a, b = start[name], end[name]
    change = f"from {a:.3f} to {b:.3f} nats per token"
    if b < a:
      yield f"The student's {title} fell {change}."
    else:
      yield f"⚠ The student's {title} {'rose' if b > a else 'stayed,'} {change}."


def _beside_teacher(teacher: Figures, end: Figures) -> Iterator[str]:
  if {"loss", "teacher_loss"} <= end.keys():
    gap = end["loss"] - end["teacher_loss"]
    text = f"On held-out text the student is {abs(gap):.3f} nats per token"
    if gap > 0:
      yield (
        f"{text} worse than the teacher: it gives the right token {math.exp(-gap):.0%} "
        "of the probability that the teacher gives it (geometric mean)."
      )
    else:
      yield f"{text} better than the teacher; on other data this need not hold."
  if "top1_agreement" in end:
    agree = end["top1_agreement"]
    yield (
      f"Its first choice is the teacher's at {agree:.1f}% of the tokens; at the other "
      f"{100 - agree:.1f}% greedy decoding would go another way."
    )
  if "rougeL" in teacher and "rougeL" in end:
    yield (
      f"Its answers score ROUGE-L {end['rougeL']:.1f}, the teacher's "
      f"{teacher['rougeL']:.1f}. ROUGE-L counts words in common, not whether an answer "
      "is right."
    )


def _module(end: Figures) -> Iterator[str]:
  if not {"adapted_drift", "adapted_loss", "teacher_loss"} <= end.keys():
    return
  drift, worse = end["adapted_drift"], end["adapted_loss"] - end["teacher_loss"]
  text = (
    f"The online module moved the teacher by {drift:.3f} nats per token; its held-out "
    f"loss is {abs(worse):.3f} {'higher' if worse > 0 else 'lower'} than without."
  )
  if drift > _DRIFT_WARNING or worse > 0.01:
    text = f"⚠ {text} A module that drifts far, or predicts the data worse, follows "
    text += "the student instead of leading it: lower method.teacher_kl_weight or "
    text += "raise method.anchor_weight."
  yield text


def _trend(history: History) -> Iterator[str]:
  losses = {step: row["loss"] for step, row in history.evals.items() if "loss" in row}
  if len(losses) < 3:
    return
  best, (before, last) = min(losses, key=losses.get), list(losses)[-2:]
  if losses[last] > 1.005 * losses[best]:
    yield (
      f"⚠ The held-out loss was least at step {best:,}, {losses[best]:.3f}, and rose "
      f"to {losses[last]:.3f} by step {last:,}: a sign of overfitting. "
      "eval.best=loss exports the best step."
    )
  elif losses[before] > 1.005 * losses[last]:
    yield (
      f"The held-out loss was still falling at the end, from {losses[before]:.3f} at "
      f"step {before:,} to {losses[last]:.3f}: more steps may help."
    )


def _caveats(history: History, end: Figures, config: Mapping) -> Iterator[str]:
  if not any(history.teachers.values()):
    yield "There was no teacher to compare the student with."
  if "own_token_loss" in history.teacher:
    yield "The teacher reads other tokens: only ROUGE-L compares it with the student."
  if "rougeL" not in end:
    yield "No answers were generated: nothing here judges the student's own text."
  if history.skipped:
    steps = ", ".join(map(str, history.skipped[:8])) + ", …" * (
      len(history.skipped) > 8
    )
    yield (
      f"⚠ {len(history.skipped)} updates were skipped, since something in them was not "
      f"finite (train.on_nonfinite): steps {steps}."
    )
  if history.lost:
    names = ", ".join(f"{name} ({count}×)" for name, count in history.lost.items())
    yield f"⚠ Figures that were not finite are left out: {names}."
  source = "" if config["data"]["eval"] else " that were held out of the training data"
  yield (
    f"This is one run with one seed (train.seed={config['train']['seed']}), judged on "
    f"rows{source}: small differences may be chance. python -m okd_jax.study compares "
    "methods over several seeds."
  )
