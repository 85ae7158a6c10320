"""The page of a run's report: its look, and where each part stands."""

import json
from typing import Any

import jinja2

from okd_jax.analysis import plots


def render(**parts: Any) -> str:
  """The HTML.

  parts: title; sizes, sentences about the models; columns, the figures of the table by
    name (`evaluation.figures`); rows, {who was measured: {name: value}}; answers, a few
    (`facts.Answers`); findings, sentences; charts (`plots.charts`); facts, {what:
    words}; stages, {name: link to its report}; exported, whether there is a student;
    folders, which of adapter and teacher there are; config, the run's.
  """
  return _TEMPLATE.render(style=plots.css() + STYLE, **parts)


def _number(value: float | None, digits: int) -> str:
  if value is None:
    return "–"
  return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


STYLE = """
body {
  margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.5rem 4rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1, h2, h3, b, dt, th, summary { color: var(--strong); font-weight: 600; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; break-after: avoid; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; break-after: avoid; }
h3 + p { margin-top: 0; }
a { color: var(--student); }
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
.lead { max-width: 54rem; }
.sample { margin: 0 0 1.6rem; break-inside: avoid; }
.sample > p { margin: 0 0 .6rem; padding: .5rem .8rem; background: var(--soft); }
.said {
  display: grid; gap: .8rem 1.8rem;
  grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr));
}
.said p { margin: .1rem 0 0; max-height: 14rem; overflow-y: auto; }
.said, .sample > p { font-size: .88rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.none { opacity: .65; font-style: italic; }
.wide tbody tr:last-child > * { font-weight: 400; }
.wide :is(th, td) { padding: .42rem .45rem; font-size: .84rem; }
.wide :is(thead th, td) { white-space: normal; }
.wide thead th { vertical-align: bottom; }
.wide tbody :is(th, td) { vertical-align: top; }
.about { white-space: pre-wrap; overflow-wrap: anywhere; }
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
@media screen and (max-width: 46rem) {
  .summary thead { display: none; }
  .summary, .summary :is(tbody, tr, th, td) { display: block; }
  .summary tbody th { border: 0; padding-bottom: 0; font-weight: 600; }
  .summary tbody td {
    display: flex; justify-content: space-between; gap: 1rem;
    padding: .1rem 0; border: 0; white-space: normal; font-weight: 400;
  }
  .summary tbody td::before { content: attr(data-title); text-align: left; }
  .summary .absent { display: none; }
  dl { grid-template-columns: 1fr; } dd { margin: 0 0 .4rem; }
}
@media print { .said p { max-height: none; } }
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
{% if sizes %}
<p class="lead">{{ sizes | join(" ") }}</p>
{% endif %}

<h2>Summary</h2>
<div class="scroll"><table class="summary">
<thead><tr><td></td>
{% for column in columns.values() %}
<th scope="col">{{ column.title }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for name, row in rows.items() %}
<tr><th scope="row">{{ name }}</th>
{% for metric, column in columns.items() %}
<td data-title="{{ column.title }}"
{% if metric not in row %}
class="absent"
{% endif %}
>{{ row.get(metric) | number(column.digits) }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
<dl>
{% for column in columns.values() %}
<dt>{{ column.title }}</dt><dd>{{ column.meaning }}</dd>
{% endfor %}
</dl>

{% if answers %}
<h2>Sample answers</h2>
<p>To the first held-out prompts, whatever they are.</p>
{% for sample in answers %}
<section class="sample">
<p class="text">{{ sample.prompt }}</p>
<div class="said">
{% for who, text in sample.said %}
<div><b>{{ who }}</b>
<p class="text">{% if text %}{{ text }}{% else %}<span class="none">empty</span>{%
endif %}</p></div>
{% endfor %}
</div></section>
{% endfor %}
{% endif %}

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
{% if stages %}
<dt>stages</dt>
<dd>{% for name, link in stages.items() %}{% if not loop.first %}, {% endif %}
<a href="{{ link }}">{{ name }}</a>{% endfor %}</dd>
{% endif %}
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


def template(page: str) -> jinja2.Template:
  """A page with this package's filters; an undefined name is an error."""
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
  )
  environment.filters["number"] = _number
  environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
  return environment.from_string(page)


_TEMPLATE = template(_PAGE)
