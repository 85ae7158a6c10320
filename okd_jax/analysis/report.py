"""A run in one static page: what it reached, what falls short, how to use it."""

import datetime
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

import jinja2

from okd_jax.analysis import plots
from okd_jax.analysis.plots import Figures, History, read_history
from okd_jax.runtime.files import write_text

# Of each column of the summary: its title, its meaning, and how many decimals it has.
COLUMNS = {
  "loss": ("loss", "cross-entropy of the held-out tokens in nats; less is better", 3),
  "perplexity": ("perplexity", "exp(loss): torn between so many equal choices", 2),
  "forward_kl": (
    "KL(teacher‖·)",
    "nats per token from the frozen teacher to this model: what it misses of what the "
    "teacher would say; a copy has 0",
    3,
  ),
  "reverse_kl": ("KL(·‖teacher)", "the other way: what the teacher would not say", 3),
  "top1_agreement": ("top-1 %", "tokens at which its first choice is the teacher's", 1),
  "rougeL": ("ROUGE-L", "words in common with the reference answers, F1 × 100", 1),
  "exact_match": ("exact match", "answers that equal a reference, in %", 1),
}

# An adapted teacher that learns from data moves about 0.1 nats; one that follows the
# student instead moves on and on, in the end to a near-uniform distribution.
_DRIFT_WARNING = 0.3


def summary_rows(workdir: Path) -> dict[str, Figures]:
  """The closing table: who was measured -> the figures there are, keys of COLUMNS."""
  return _summary(read_history(workdir))


def write(workdir: Path) -> None:
  """Writes report.html from config.json and metrics.jsonl; same inputs, same bytes."""
  config = json.loads((workdir / "config.json").read_text(encoding="utf8"))
  history = read_history(workdir)
  rows = _summary(history)
  present = set().union(*rows.values())
  page = _TEMPLATE.render(
    title=_title(config),
    style=plots.css() + _STYLE,
    columns={name: c for name, c in COLUMNS.items() if name in present},
    rows=rows,
    findings=list(_findings(history, config)),
    charts=plots.charts(history),
    facts=_facts(history, config),
    exported=history.exported is not None,
    folders=[name for name in ("adapter", "teacher") if (workdir / name).is_dir()],
    config=config,
  )
  write_text(workdir / "report.html", page + "\n")


def _summary(history: History) -> dict[str, Figures]:
  rows = {k.replace(":", " "): v for k, v in history.teachers.items() if v}
  final = history.evals.get(history.final, {})
  if "adapted_loss" in final:
    rows["adapted teacher"] = _adapted(final)
  if 0 in history.evals:
    rows["student, start"] = history.evals[0]
  if history.final:
    rows[f"student, step {history.final}"] = final
  return {
    name: {metric: row[metric] for metric in COLUMNS if metric in row}
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


def _facts(history: History, config: Mapping) -> dict[str, str]:
  """What ran, in words."""
  steps, train = max(history.train, default=0), config["train"]
  goal = f" of {train['steps']:,}" if train["steps"] else ""
  facts = {"steps": f"{steps:,}{goal}, {train['batch_size']:,} rows a step"}
  if history.exported is not None:
    facts["student"] = f"exported as of step {history.exported:,}"
  tokens = [row["tokens"] for row in history.train.values() if "tokens" in row]
  if not tokens:
    return facts
  each = statistics.fmean(tokens)
  total = float(f"{steps * each:.3g}")
  facts["tokens trained on"] = f"≈ {total:,.0f}, on average {each:,.0f} a step"
  rates = [row.get("tokens_per_s", 0) for row in history.train.values()]
  # The first row's time is mostly compilation.
  rates = [rate for rate in rates[1:] or rates if rate > 0]
  if rates:
    # Over equal numbers of tokens, the harmonic mean is all tokens over all time.
    rate = statistics.harmonic_mean(rates)
    facts["speed"] = f"{rate:,.0f} tokens/s on average"
    time = datetime.timedelta(seconds=round(total / rate))
    facts["time"] = f"≈ {time} (h:m:s), compiling and evaluating left out"
  return facts


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
  if not history.teacher:
    yield "There was no teacher to compare the student with."
  if "own_token_loss" in history.teacher:
    yield "The teacher reads other tokens: only ROUGE-L compares it with the student."
  if "rougeL" not in end:
    yield "No answers were generated: nothing here judges the student's own text."
  if history.lost:
    names = ", ".join(f"{name} ({count}×)" for name, count in history.lost.items())
    yield f"⚠ Figures that were not finite are left out: {names}."
  source = "" if config["data"]["eval"] else " that were held out of the training data"
  yield (
    f"This is one run with one seed (train.seed={config['train']['seed']}), judged on "
    f"rows{source}: small differences may be chance. python -m okd_jax.study repeats "
    "runs over seeds and methods."
  )


def _number(value: float | None, digits: int) -> str:
  if value is None:
    return "–"
  return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


_STYLE = """
body {
  margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.5rem 4rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1, h2, b, dt, th, summary { color: var(--strong); font-weight: 600; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; break-after: avoid; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.summary :is(th, td) {
  padding: .42rem .8rem; border-bottom: 1px solid var(--grid);
  text-align: right; white-space: nowrap;
}
.summary :first-child { text-align: left; padding-left: 0; }
.summary thead th { font-size: .9rem; }
.summary tbody :last-child > * { border-bottom: 0; font-weight: 600; }
.summary tbody th { font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dl, figcaption, pre { font-size: .88rem; }
dd { margin: 0; }
ul { padding-left: 1.2rem; max-width: 54rem; } li { margin: .35rem 0; }
.charts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 1.8rem; }
figure {
  margin: 0; grid-column: span 3; break-inside: avoid;
  display: flex; flex-direction: column; justify-content: space-between;
}
figure.small { grid-column: span 2; }
figcaption { line-height: 1.45; margin-bottom: .4rem; }
.key { display: inline-block; margin-right: .9rem; }
.key i {
  display: inline-block; width: 1.3rem; margin-right: .35rem;
  border-top: 2px solid var(--line); vertical-align: .25em;
}
.key .faint { border-top-width: 1px; } .key .dashed { border-top-style: dashed; }
figure svg { display: block; width: 100%; }
pre { background: var(--soft); padding: .9rem 1.1rem; overflow-x: auto; }
details details, details table { margin: .2rem 0 .2rem 1.1rem; }
details table { font: .84rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
details td { padding: 0 .9rem 0 0; vertical-align: top; }
@media screen and (max-width: 46rem) { .charts > * { grid-column: span 6 !important; } }
@media print { html { font-size: 11px; } body { padding: 0; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>

<h2>Summary</h2>
<div class="scroll"><table class="summary">
<thead><tr><td></td>
{% for title, _, _ in columns.values() %}
<th scope="col">{{ title }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for name, row in rows.items() %}
<tr><th scope="row">{{ name }}</th>
{% for metric, (_, _, digits) in columns.items() %}
<td>{{ row.get(metric) | number(digits) }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
<dl>
{% for title, meaning, _ in columns.values() %}
<dt>{{ title }}</dt><dd>{{ meaning }}</dd>
{% endfor %}
</dl>

<h2>How to read this, and what falls short</h2>
<ul>
{% for text in findings %}
<li>{{ text }}</li>
{% endfor %}
</ul>

<h2>Curves</h2>
<div class="charts">
{% for chart in charts %}
<figure{% if chart.small %} class="small"{% endif %}>
<figcaption><b>{{ chart.title }}</b> {{ chart.unit }}<br>
{% for line in chart.lines %}
<span class="key" style="--line: var(--{{ line.colour }})">
<i class="{{ line.look }}"></i>{{ line.label }}</span>
{% endfor %}
</figcaption>
{{ chart.svg() | safe }}
</figure>
{% endfor %}
</div>

<h2>What ran</h2>
<dl>
{% for name, fact in facts.items() %}
<dt>{{ name }}</dt><dd>{{ fact }}</dd>
{% endfor %}
</dl>

<h2>Using the student</h2>
{% if exported %}
<p>In the folder of this report, with the Hugging Face library transformers:</p>
<pre>from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("student")
tokenizer = AutoTokenizer.from_pretrained("student")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))</pre>
<p>It answers best when prompted as in training, where data.template was
{{ config.data.template | json }}.</p>
{% if "adapter" in folders %}
<p>The folder adapter holds the teacher's online module in the format of peft.</p>
{% elif "teacher" in folders %}
<p>The folder teacher holds the adapted teacher; blocks.json says what learned.</p>
{% endif %}
{% else %}
<p>Nothing has been exported yet. In the folder of this report, the newest checkpoint
becomes a Hugging Face folder by</p>
<pre>python -m okd_jax.export --workdir=. --output=student</pre>
{% endif %}

<h2>Configuration</h2>
{% macro section(values) %}
<table>
{% for key, value in values.items() if value is not mapping %}
<tr><td>{{ key }}</td><td>{{ value | json }}</td></tr>
{% endfor %}
</table>
{% for key, value in values.items() if value is mapping and value %}
<details open><summary>{{ key }}</summary>{{ section(value) }}</details>
{% endfor %}
{% endmacro %}
<details><summary>All keys, as in config.json</summary>
{{ section(config) }}
</details>
</body>
</html>"""


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
  )
  environment.filters["number"] = _number
  environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
  return environment.from_string(_PAGE)


_TEMPLATE = _template()
