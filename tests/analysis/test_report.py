"""The closing table and the report: what they say, and that they stay whole."""

import json
import math
import re

import pytest
from matplotlib import rc_context
from reporting import END, START, TEACHER, Page, page, run, whole_run

from okd_jax.analysis import plots, report
from okd_jax.evaluation import figures
from okd_jax.runtime.workdir import Workdir

TOKEN_FIGURES = ("loss", "perplexity")
STUDENT = [name for name in END if name in figures.columns()]


def test_another_process_writes_no_report(tmp_path, monkeypatch, no_charts):
  folder = run(tmp_path, whole_run())
  monkeypatch.setattr("jax.process_index", lambda: 1)
  report.write(Workdir(folder))
  assert not (folder / "report.html").exists()


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory):
  return page(run(tmp_path_factory.mktemp("whole") / "run", whole_run()))


@pytest.fixture
def no_charts(monkeypatch):
  """For tests of words alone, which need not wait for curves."""
  monkeypatch.setattr(plots, "charts", lambda history: [])


def test_summary_rows_of_a_whole_run(tmp_path):
  rows = report.summary_rows(run(tmp_path, whole_run()))
  assert list(rows) == [
    "teacher",
    "adapted teacher",
    "student, start",
    "student, step 20",
  ]
  assert rows["teacher"] == TEACHER
  assert rows["adapted teacher"] == {
    "loss": 1.9,
    "perplexity": math.exp(1.9),
    "forward_kl": 0.1,
  }
  assert rows["student, start"] == {name: START[name] for name in STUDENT}
  assert rows["student, step 20"] == {name: END[name] for name in STUDENT}


def test_summary_is_of_the_exported_step(tmp_path):
  rows = whole_run()
  rows[-1]["exported_step"] = 10
  rows.insert(12, {"step": 10, "kind": "eval"} | END | {"loss": 2.25})
  summary = report.summary_rows(run(tmp_path, rows))
  assert list(summary)[-1] == "student, step 10"
  assert summary["student, step 10"]["loss"] == 2.25


def test_several_teachers_have_a_row_each(tmp_path, no_charts):
  rows = whole_run()
  rows[:1] = [
    {"step": 0, "kind": "teacher", "name": name, "loss": loss}
    for name, loss in (("old", 2.0), ("big", 1.5))
  ]
  folder = run(tmp_path, rows)
  summary = report.summary_rows(folder)
  assert list(summary)[:3] == ["teacher old", "teacher big", "adapted teacher"]
  assert summary["teacher big"] == {"loss": 1.5}
  assert plots.read_history(folder).lost == {}
  assert "There was no teacher" not in page(folder)


def test_summary_without_a_teacher(tmp_path):
  rows = [
    {"step": step, "kind": "eval"} | {name: values[name] for name in TOKEN_FIGURES}
    for step, values in ((0, START), (20, END))
  ]
  assert report.summary_rows(run(tmp_path, rows)) == {
    "student, start": {"loss": 4.0, "perplexity": 54.598},
    "student, step 20": {"loss": 2.5, "perplexity": 12.182},
  }


def test_summary_of_interrupted_runs(tmp_path):
  assert report.summary_rows(tmp_path) == {}
  rows = whole_run()
  assert list(report.summary_rows(run(tmp_path, rows[:1]))) == ["teacher"]
  names = ["teacher", "adapted teacher", "student, start"]
  assert list(report.summary_rows(run(tmp_path, rows[:9]))) == names
  with open(tmp_path / "metrics.jsonl", "a", encoding="utf8") as file:
    file.write('{"step": 9, "kind": "tr')
  assert list(report.summary_rows(tmp_path)) == names
  only_the_end = report.summary_rows(run(tmp_path, [rows[-2]]))
  assert list(only_the_end) == ["adapted teacher", "student, step 20"]


def test_repeated_first_rows_count_once(tmp_path):
  rows = whole_run()
  again = rows[1] | {"loss": 3.5}
  summary = report.summary_rows(run(tmp_path, [*rows[:3], again, *rows[2:]]))
  assert summary["student, start"]["loss"] == 3.5


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_figures_that_are_not_finite_are_left_out(tmp_path, value):
  rows = whole_run()
  rows[1] = rows[1] | {"perplexity": value, "adapted_loss": value}
  rows[5] = rows[5] | {"loss": value, "tokens_per_s": value}
  rows[-2] = rows[-2] | {"adapted_loss": 800.0, "forward_kl": value}
  folder = run(tmp_path, rows)
  summary = report.summary_rows(folder)
  assert "perplexity" not in summary["student, start"]
  assert "forward_kl" not in summary["student, step 20"]
  assert summary["adapted teacher"] == {"loss": 800.0, "forward_kl": 0.1}
  text = page(folder)
  lost = "adapted_loss (1×), forward_kl (1×), loss (1×), perplexity (1×), tokens_per_s"
  assert f"not finite are left out: {lost} (1×)." in text
  assert not re.search(r"\b(nan|inf|None)\b", text)


def test_page_holds_the_table(tmp_path, no_charts):
  cells = Page(page(run(tmp_path, whole_run()))).cells
  titles = "loss perplexity KL(teacher‖·) KL(·‖teacher) top-1 % ROUGE-L".split(" ")
  assert cells[0][:4] == titles[:4]
  assert cells[1:5] == [
    ["teacher", "2.000", "7.39", "–", "–", "–", "–", "24.0", "3.0"],
    ["adapted teacher", "1.900", "6.69", "0.100", "–", "–", "–", "–", "–"],
    [
      "student, start",
      "4.000",
      "54.60",
      "2.000",
      "3.000",
      "20.0",
      "40.0",
      "5.0",
      "0.0",
    ],
    [
      "student, step 20",
      "2.500",
      "12.18",
      "0.500",
      "0.750",
      "61.2",
      "70.5",
      "18.0",
      "1.5",
    ],
  ]


def test_columns_are_those_of_the_closing_table(tmp_path, no_charts):
  folder = run(tmp_path, whole_run())
  titles = [figure.title for figure in figures.columns().values()]
  assert Page(page(folder)).cells[0] == titles
  closing = figures.table(report.summary_rows(folder))
  assert re.split("  +", closing.splitlines()[0].strip()) == titles
  assert closing.splitlines()[-1].split() == (
    "student, step 20 2.500 12.18 0.500 0.750 61.25 70.50 18.00 1.500".split()
  )


def test_whatever_the_user_wrote_is_escaped(tmp_path):
  evil = {
    "teacher.path": 'a<script>alert("t")</script>',
    "student.path": "b<script>alert(1)<\\/script>&amp;",
    "data.template": "<img src=x onerror=alert(2)>",
    "method.name": "<b>okd",
  }
  rows = whole_run()
  rows[3]["<script>name"] = None
  text = page(run(tmp_path, rows, **evil))
  parsed = Page(text)
  tags = {tag for tag, _ in parsed.elements}
  assert not tags & {"script", "img"}
  assert "&lt;script&gt;alert(1)" in text
  assert json.dumps(evil["data.template"]) in [
    row[1] for row in parsed.cells[5:] if row
  ]


def test_page_needs_nothing_from_outside(whole_page):
  for tag, attributes in Page(whole_page).elements:
    assert tag not in ("script", "link", "img", "iframe", "object")
    for name, value in attributes.items():
      if name in ("src", "href", "xlink:href", "srcset", "action"):
        assert value.startswith("#")
  assert not re.search(r"https?:|@import|url\((?!#)", whole_page)


def test_ids_are_unique_and_references_resolve(whole_page):
  ids = re.findall(r'\bid="([^"]+)"', whole_page)
  assert len(ids) == len(set(ids)) > 0
  references = re.findall(r'(?:url\(|href=")#([^")]+)', whole_page)
  assert set(references) <= set(ids) and references


def test_same_run_same_bytes(tmp_path, whole_page):
  # Neither the folder's name nor the user's taste in plots may show.
  with rc_context({"font.size": 30, "axes.linewidth": 9, "xtick.major.pad": 30}):
    assert page(run(tmp_path, whole_run())) == whole_page


def test_charts_are_those_with_data(tmp_path):
  def titles(rows):
    history = plots.read_history(run(tmp_path, rows))
    return [chart.title for chart in plots.charts(history)]

  assert titles([]) == []
  assert titles([{"step": 0, "kind": "eval", "loss": 1.0}]) == ["Loss"]
  assert titles([{"step": 0, "kind": "eval", "loss": None}]) == []
  assert titles(whole_run()) == [
    "Loss",
    "Distance to the teacher",
    "ROUGE-L",
    "Training objective",
    "Gradient norm",
    "Learning rate",
    "Speed",
  ]


def test_lines_hold_the_figures(tmp_path):
  rows = whole_run()
  rows[3]["student_nll"] = None
  history = plots.read_history(run(tmp_path, rows))
  lines = {line.label: line for line in plots.charts(history)[0].lines}
  assert list(lines) == ["student", "on training rows", "teacher", "adapted teacher"]
  assert (lines["student"].steps, lines["student"].values) == ([0, 20], [4.0, 2.5])
  assert lines["teacher"].values == [2.0, 2.0]
  assert lines["adapted teacher"].values == [2.0, 1.9]
  assert lines["on training rows"].steps == list(range(1, 21))
  assert lines["on training rows"].values[0] == 3.0
  assert math.isnan(lines["on training rows"].values[1])


@pytest.mark.parametrize("count, kept", [(2000, 2000), (2001, 1001), (6001, 1501)])
def test_long_runs_are_thinned(tmp_path, count, kept):
  rows = [{"step": step, "kind": "train", "lr": step} for step in range(1, count + 1)]
  (chart,) = plots.charts(plots.read_history(run(tmp_path, rows)))
  (line,) = chart.lines
  assert len(line.steps) == kept
  assert line.steps == line.values == sorted(line.steps)
  assert line.steps[-1] == count


def findings(folder) -> str:
  return "\n".join(Page(page(folder)).items)


def test_findings_of_a_good_run(tmp_path, no_charts):
  text = findings(run(tmp_path, whole_run()))
  assert "KL to the teacher fell from 2.000 to 0.500 nats" in text
  assert "0.500 nats per token worse than the teacher" in text
  assert "61% of the probability" in text  # exp(-0.5)
  assert "61.2% of the tokens; at the other 38.8%" in text
  assert "ROUGE-L 18.0, the teacher's 24.0." in text
  assert "moved the teacher by 0.100 nats per token" in text
  assert "loss is 0.100 lower than without" in text
  assert "⚠" not in text


@pytest.mark.parametrize(
  "changes, warning",
  [
    ({"forward_kl": 2.5}, "KL to the teacher rose from 2.000 to 2.500"),
    ({"loss": 4.0}, "held-out loss stayed, from 4.000 to 4.000"),
    ({"adapted_drift": 0.31}, "moved the teacher by 0.310 nats"),
    ({"adapted_loss": 2.2}, "loss is 0.200 higher than without"),
  ],
)
def test_findings_warn(tmp_path, no_charts, changes, warning):
  rows = whole_run()
  rows[-2] |= changes
  (line,) = [x for x in findings(run(tmp_path, rows)).split("\n") if "⚠" in x]
  assert warning in line


def test_findings_on_the_course_of_the_loss(tmp_path, no_charts):
  def with_middle(loss):
    middle = {"step": 10, "kind": "eval"} | END | {"loss": loss}
    rows = whole_run()
    return findings(run(tmp_path, [*rows[:12], middle, *rows[12:]]))

  assert "least at step 10, 2.400, and rose to 2.500 by step 20" in with_middle(2.4)
  assert "still falling at the end, from 2.600 at step 10 to 2.500" in with_middle(2.6)
  steady = with_middle(2.505)
  assert "least at step" not in steady and "still falling" not in steady


def test_student_better_than_its_teacher(tmp_path, no_charts):
  rows = whole_run()
  rows[-2] |= {"loss": 1.5}
  text = findings(run(tmp_path, rows))
  assert "0.500 nats per token better than the teacher" in text


def test_unfinished_run_says_so(tmp_path):
  text = page(run(tmp_path, whole_run()[:-2]))
  assert "The run has not finished" in text
  assert "Nothing has been exported yet" in text
  empty = page(run(tmp_path, []))
  assert "Nothing was evaluated" in empty
  assert "<svg" not in empty


def test_run_without_a_teacher(tmp_path, no_charts):
  plain = [r for r in whole_run() if r["kind"] in ("train", "export")]
  evals = [
    {"step": 0, "kind": "eval", "loss": 4.0, "perplexity": 54.6},
    {"step": 20, "kind": "eval", "loss": 3.0, "perplexity": 20.1},
  ]
  folder = run(tmp_path, evals + plain, **{"teacher.path": "", "method.name": "sft"})
  text = page(folder)
  assert "<title>sft: small</title>" in text
  assert "There was no teacher" in text and "No answers were generated" in text
  assert "KL(" not in text


@pytest.mark.parametrize(
  "changes, title",
  [
    ({}, "okd: large → small"),
    ({"student.path": "", "student.layers": 6}, "okd: large → 6 of its layers"),
    (
      {"student.path": "", "student.model.hidden_size": 64},
      "okd: large → llama 2 × 64",
    ),
    (
      {"teacher.path": "", "teacher.model.hidden_size": 96},
      "okd: llama 2 × 96 → small",
    ),
  ],
)
def test_title(tmp_path, no_charts, changes, title):
  assert f"<h1>{title}</h1>" in page(run(tmp_path, whole_run(), **changes))


def test_what_ran(tmp_path, no_charts):
  rows = whole_run()
  rows[2]["tokens_per_s"] = 0.1  # the first step compiles
  rows[3]["tokens_per_s"] = 25.0
  facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page(run(tmp_path, rows))))
  assert facts["steps"] == "20 of 20, 8 rows a step"
  assert facts["student"] == "exported as of step 20"
  assert facts["tokens trained on"] == "≈ 2,000, on average 100 a step"
  assert facts["speed"] == "48 tokens/s on average"  # 19 rows: 18 / 50 + 1 / 25
  assert facts["training time"].startswith("≈ 0:00:42")


def test_online_module_is_mentioned_where_it_was_exported(tmp_path, no_charts):
  folder = run(tmp_path, whole_run())
  assert "format of peft" not in page(folder)
  (folder / "adapter").mkdir()
  assert "format of peft" in page(folder)


def test_skipped_updates_are_told(tmp_path, no_charts):
  rows = whole_run()
  rows[2:2] = [{"step": n, "kind": "skipped", "skipped": n} for n in (3, 1)]
  text = page(run(tmp_path, rows))
  assert (
    "2 updates were skipped" in text and "(train.on_nonfinite): steps 1, 3." in text
  )
