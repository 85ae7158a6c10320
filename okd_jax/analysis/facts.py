"""What a run's report says of its models, its data, its cost, and what they answer."""

import datetime
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from okd_jax.analysis.plots import History

_LONGEST = 1500  # characters of an answer that are shown
_UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # no page may hold these


def sizes(about: Mapping[str, Any]) -> list[str]:
  """Sentences: how large the student is, each teacher, and what of it learns."""
  if not about:
    return []
  student, teachers = about["models"]["student"], about["models"]["teachers"]
  text = f"The student has {_model(student)}{_in_part(student)}."
  if not teachers:
    return [text]
  found = [text]
  for name, teacher in teachers.items():
    who = f"Teacher {name}" if len(teachers) > 1 else "Its teacher"
    times = teacher["parameters"] / student["parameters"]
    text = f"{who} has {_model(teacher)}, {times:.3g} times as many"
    if learns := teacher.get("module"):
      share = 100 * learns / teacher["parameters"]
      text += f"; beside it learns a module of {_short(learns)}, {share:.2g} % of that"
    found.append(f"{text}.")
  return found


def _in_part(size: Mapping[str, Any]) -> str:
  """How much of it is trained, if that is not all."""
  if "trained" not in size:
    return ""
  share = 100 * size["trained"] / size["parameters"]
  return f"; {_short(size['trained'])} are trained, {share:.2g} % of that"


def _model(size: Mapping[str, Any]) -> str:
  shape = f"{size['family']}, {size['layers']} layers × {size['width']:,}"
  return f"{_short(size['parameters'])} parameters ({shape})"


def _short(count: int) -> str:
  """Three digits and a unit.

  >>> _short(3072), _short(41184), _short(163_037_184), _short(6_738_415_616)
  ('3,072', '41.2 thousand', '163 million', '6.74 billion')
  """
  for unit, name in ((1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
    if count >= 0.9995 * unit:
      return f"{count / min(unit, unit if unit > 1e4 else 1e3):.3g} {name}"
  return f"{count:,}"


class Answers(NamedTuple):
  """What was said to one prompt.

  said: [(who, text)], the reference and the models in the order of the table.
  """

  prompt: str
  said: Sequence[tuple[str, str]]


def sample_answers(kept: Mapping[str, Any], history: History) -> list[Answers]:
  """Those of the teachers, of the student at its start and of the one exported."""
  if not kept:
    return []
  last = history.final if history.exported is None else history.exported
  columns = [(f"teacher {k}".strip(), v) for k, v in kept["teachers"].items()]
  if len(columns) == 1:
    columns = [("teacher", columns[0][1])]
  for step, who in ((0, "student, start"), (last, f"student, step {last}")):
    if answers := kept["student"].get(str(step)):
      columns.append((who, answers))
  found = []
  for i, row in enumerate(kept["rows"]):
    said = [("reference", shown(" / ".join(row["references"])))]
    said += [(who, shown(x[i])) for who, x in columns if x[i] is not None]
    found.append(Answers(shown(row["prompt"]), said))
  return found if columns else []


def shown(text: str) -> str:
  """As much of a text as a page shows, without what it may not hold."""
  text = _UNSHOWN.sub("\ufffd", text.replace("\r\n", "\n").strip())
  more = len(text) - _LONGEST
  return f"{text[:_LONGEST]} … ({more:,} more characters)" if more > 0 else text


def facts(
  history: History,
  config: Mapping[str, Any],
  about: Mapping[str, Any],
  cost: Mapping[str, Any],
) -> dict[str, str]:
  """What ran, where and at what cost, in words."""
  found = _steps(history, config)
  if about:
    found |= _rows(about["data"])
  found |= _speed(history)
  if cost:
    time = datetime.timedelta(seconds=round(cost["seconds"]))
    found["wall clock"] = f"{time} (h:m:s) in all"
    size = f"{cost['peak_bytes'] / 1e9:.3g} GB"
    found["peak memory"] = f"{size} of the {cost['of']}"
  if about:
    found |= _machines(about["parts"])
  return found


def _steps(history: History, config: Mapping[str, Any]) -> dict[str, str]:
  steps, train = max(history.train, default=0), config["train"]
  goal = f" of {train['steps']:,}" if train["steps"] else ""
  found = {"steps": f"{steps:,}{goal}, {train['batch_size']:,} rows a step"}
  if history.exported is not None:
    found["student"] = f"exported as of step {history.exported:,}"
  return found


def _rows(data: Mapping[str, Any]) -> dict[str, str]:
  train, held_out = data["train"], data["eval"]
  judged = f"{held_out['rows']:,} rows, digest {held_out['digest']}"
  if held_out["prompts"]:
    judged += f"; {held_out['prompts']:,} of their prompts were answered"
  if "shards" in train:
    trained = f"a stream of {train['shards']:,} shards"
  else:
    trained = f"{train['rows']:,}"
  return {
    "training rows": f"{trained}, digest {train['digest']}",
    "held-out rows": judged,
  }


def _speed(history: History) -> dict[str, str]:
  tokens = [row["tokens"] for row in history.train.values() if "tokens" in row]
  if not tokens:
    return {}
  each = statistics.fmean(tokens)
  total = float(f"{max(history.train) * each:.3g}")
  found = {"tokens trained on": f"≈ {total:,.0f}, on average {each:,.0f} a step"}
  rates = [row.get("tokens_per_s", 0) for row in history.train.values()]
  # The first row's time is mostly compilation.
  rates = [rate for rate in rates[1:] or rates if rate > 0]
  if rates:
    # Over equal numbers of tokens, the harmonic mean is all tokens over all time.
    rate = statistics.harmonic_mean(rates)
    time = datetime.timedelta(seconds=round(total / rate))
    found["speed"] = f"{rate:,.0f} tokens/s on average"
    found["training time"] = f"≈ {time} (h:m:s), compiling and evaluating left out"
  return found


def _machines(parts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  machines, versions, commands = [], [], []
  for part in parts:
    since = f"from step {part['step']:,} on " if part["step"] else ""
    machines.append(since + _machine(part["machine"]))
    packages = ", ".join(f"{k} {v}" for k, v in part["versions"].items())
    commit = part.get("commit", "")  # which runs of before it was kept lack
    versions.append(since + packages + (f", commit {commit}" if commit else ""))
    if command := part.get("command", ""):
      commands.append(since + command)
  found = {"machine": machines, "versions": versions, "command": commands}
  return {name: "; ".join(dict.fromkeys(x)) for name, x in found.items() if x}


def _machine(found: Mapping[str, Any]) -> str:
  text = f"{found['devices']} × {found['device']}, {found['cpus']} CPU cores"
  if found["processes"] > 1:
    text += f" a process, {found['processes']} processes"
  return text.replace(" 1 CPU cores", " 1 CPU core")
