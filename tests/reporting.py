"""A run's folder as the training loop leaves it, for tests of its report."""

import html.parser
import json

from configs.default import get_config
from okd_jax.analysis import report
from okd_jax.runtime.workdir import Workdir

TEACHER = {"loss": 2.0, "perplexity": 7.389, "rougeL": 24.0, "exact_match": 3.0}
START = {
  "loss": 4.0,
  "perplexity": 54.598,
  "forward_kl": 2.0,
  "reverse_kl": 3.0,
  "top1_agreement": 20.0,
  "acceptance": 40.0,
  "teacher_loss": 2.0,
  "adapted_forward_kl": 2.0,
  "adapted_loss": 2.0,
  "adapted_drift": 0.0,
  "rougeL": 5.0,
  "exact_match": 0.0,
}
END = START | {
  "loss": 2.5,
  "perplexity": 12.182,
  "forward_kl": 0.5,
  "reverse_kl": 0.75,
  "top1_agreement": 61.25,
  "acceptance": 70.5,
  "adapted_forward_kl": 0.4,
  "adapted_loss": 1.9,
  "adapted_drift": 0.1,
  "rougeL": 18.0,
  "exact_match": 1.5,
}


def train_row(step, **changes):
  values = {
    "loss": 4.0 / step,
    "student_nll": 3.0 / step,
    "divergence": 1.0 / step,
    "module_loss": 2.0,
    "student_grad_norm": 1.0,
    "tokens": 100,
    "tokens_per_s": 50.0,
    "lr": 1e-3 / step,
  }
  return {"step": step, "kind": "train"} | values | changes


def whole_run():
  return [
    {"step": 0, "kind": "teacher"} | TEACHER,
    {"step": 0, "kind": "eval"} | START,
    *(train_row(step) for step in range(1, 21)),
    {"step": 20, "kind": "eval"} | END,
    {"step": 20, "kind": "export", "exported_step": 20},
  ]


def run(folder, rows, **changes):
  """A run's folder as the training loop leaves it, with keys of its config changed."""
  folder.mkdir(exist_ok=True)
  config = get_config()
  config.teacher.path = "models/large"
  config.student.path = "someone/small"
  config.train.steps = 20
  config.update_from_flattened_dict(changes)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  lines = [json.dumps(row) + "\n" for row in rows]
  (folder / "metrics.jsonl").write_text("".join(lines))
  return folder


def page(folder) -> str:
  report.write(Workdir(folder))
  return (folder / "report.html").read_text(encoding="utf8")


class Page(html.parser.HTMLParser):
  """What a browser would see: the elements, and the text of some of them."""

  VOID = ("meta", "br", "link", "img")

  def __init__(self, text: str):
    super().__init__()
    self.elements, self.open, self.cells, self.items = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in self.VOID:
      self.open.append(tag)
    if tag == "tr":
      self.cells.append([])
    if tag == "li":
      self.items.append("")

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag  # every element is closed where it should be

  def handle_data(self, data):
    if self.open and self.open[-1] in ("td", "th"):
      self.cells[-1].append(data)
    if self.open and self.open[-1] == "li":
      self.items[-1] += data


HERE = {"device": "cpu", "devices": 1, "processes": 1, "cpus": 2}
VERSIONS = {"python": "3.12.1", "jax": "0.12.0"}
ABOUT = {
  "models": {
    "student": {"family": "gpt2", "parameters": 40_000_000, "layers": 4, "width": 256},
    "teachers": {
      "teacher": {
        "family": "gpt2",
        "parameters": 160_000_000,
        "layers": 12,
        "width": 768,
        "module": 1_600_000,
      }
    },
  },
  "data": {
    "train": {"rows": 11_435, "digest": "0123456789abcdef"},
    "eval": {"rows": 500, "digest": "fedcba9876543210", "prompts": 64},
  },
  "parts": [{"step": 0, "machine": HERE, "versions": VERSIONS}],
}
COST = {"seconds": 3725.4, "peak_bytes": 2_345_678_901, "of": "process"}
ANSWERS = {
  "rows": [
    {"prompt": "What is <b>?", "references": ["bold", "a tag"]},
    {"prompt": "Long", "references": ["x"]},
  ],
  "teachers": {"teacher": ["bold\n text", "y" * 2000]},
  "student": {"0": ["\x00\x1b", ""], "10": ["half", "half"], "20": ["<b>", "end"]},
}


def keep(folder, about=ABOUT, cost=COST, answers=ANSWERS):
  for name, value in (
    ("about.json", about),
    ("cost.json", cost),
    ("sample_answers.json", answers),
  ):
    (folder / name).write_text(json.dumps(value), encoding="utf8")
  return folder
