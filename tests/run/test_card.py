"""What an exported student says of itself, and its way to the hub."""

import json

import huggingface_hub
import pytest
from small import config

from okd_jax.config import schema
from okd_jax.errors import UserError
from okd_jax.models import Card, ModelConfig
from okd_jax.models.formats.card import licence, model_card
from okd_jax.run import card

SHAPE = ModelConfig()


def header(text, folder):
  path = folder / "README.md"
  path.write_text(text, encoding="utf8")
  return huggingface_hub.metadata_load(path)


def settings(**changes):
  return schema.settings(config(**changes))


def measured(workdir, step, **figures):
  line = json.dumps({"kind": "eval", "step": step, **figures})
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(line + "\n")


def test_the_hub_reads_base_models_data_and_licence(tmp_path):
  found = card.of_student(
    settings(
      **{
        "teacher.model.hidden_size": 0,
        "student.model.hidden_size": 0,
        "teacher.path": "org/large",
        "student.path": "gpt2",
        "data.train": "org/data@main:train,embedded,mine.jsonl",
        "export.license": "apache-2.0",
      }
    ),
    tmp_path,
    3,
  )
  raw = header(model_card(SHAPE, 1000, found), tmp_path)
  assert raw["base_model"] == ["gpt2", "org/large"]
  assert raw["datasets"] == ["org/data"] and raw["license"] == "apache-2.0"
  assert raw["library_name"] == "transformers"
  assert "okd_jax" in raw["tags"]


def test_figures_are_those_of_the_step(tmp_path):
  """No figure that was not finite, none of another step."""
  measured(tmp_path, 0, loss=9.0, forward_kl=8.0)
  measured(tmp_path, 4, loss=2.5, forward_kl=0.125, rougeL=None, eval_s=3.0)
  found = card.of_student(settings(), tmp_path, 4)
  assert found.figures == {"loss": "2.5", "KL(teacher ‖ student)": "0.125"}
  text = model_card(SHAPE, 1000, found)
  assert "| KL(teacher ‖ student) | 0.125 |" in text and "| Steps | 4 |" in text
  assert card.of_student(settings(), tmp_path, 3).figures == {}


def test_a_licence_comes_with_the_weights(tmp_path):
  """Of the model that the student starts from, in a folder of ours or another's."""
  theirs = {"license": "other", "license_name": "own", "license_link": "https://x.y"}
  folder = tmp_path / "model"
  folder.mkdir()
  text = model_card(SHAPE, 1000, Card(licence=theirs))
  (folder / "README.md").write_text(text, encoding="utf8")
  (folder / "config.json").write_text('{"model_type": "llama"}')
  start = {"student.model.hidden_size": 0, "student.path": str(folder)}
  assert card.of_student(settings(**start), tmp_path, 1).licence == theirs
  taken = {"student.model.hidden_size": 0, "student.layers": 1}
  taken |= {"teacher.model.hidden_size": 0, "teacher.path": str(folder)}
  assert card.of_student(settings(**taken), tmp_path, 1).licence == theirs
  assert card.of_student(settings(), tmp_path, 1).licence == {}


def test_headers_of_others(tmp_path):
  readme = tmp_path / "README.md"
  assert licence(readme) == {}
  readme.write_text("no header")
  assert licence(readme) == {}
  readme.write_text("---\nlicense: mit\ntags: [a]\n---\ntext")
  assert licence(readme) == {"license": "mit"}
  readme.write_text("---\nlicense: [mit, x]\n---\ntext")
  assert licence(readme) == {}


def test_a_header_that_nobody_can_read_stops_no_export(tmp_path, caplog):
  readme = tmp_path / "README.md"
  readme.write_text("---\nlicense: mit: x\n---\ntext")
  assert licence(readme) == {}
  [told] = caplog.messages
  assert told.startswith(f"{readme}: its header is no YAML (") and "\n" not in told


def test_no_path_is_published(tmp_path):
  """Each of several, wherever it stands."""
  (tmp_path / "secret").mkdir()
  rows = {"Data": f"org/set, {tmp_path}/secret/rows.jsonl,embedded", "Teacher": "–"}
  text = model_card(SHAPE, 1000, Card(rows | {"Student's start": f"{tmp_path}/secret"}))
  assert str(tmp_path) not in text
  assert "| Data | org/set, rows.jsonl, embedded |" in text
  assert "| Student's start | secret |" in text


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"student.frozen": "embed"}, "all but 'embed'"),
    (
      {"student.adapter.kind": "lora", "student.dtype": "int8"},
      "LoRA of rank 32 on query value, merged in, beside int8",
    ),
  ],
)
def test_what_was_trained_in_part(changes, said, tmp_path):
  assert card.of_student(settings(**changes), tmp_path, 1).rows["Trained"] == said


@pytest.mark.parametrize(
  ("name", "public", "words"),
  [("a b/c", False, "is no OWNER/NAME"), ("", True, "--public says who sees")],
)
def test_names_are_checked_first(name, public, words):
  with pytest.raises(UserError, match=words):
    card.check_name(name, public)
  card.check_name("me/student-1.0", public)
  card.check_name("", False)


class Hub:
  """Takes the place of the hub's client: notes what it is asked for."""

  calls = []

  def create_repo(self, name, **options):
    if name.endswith("/taken"):
      raise OSError("403 Forbidden\nmore")
    self.calls.append(("create", name, options))
    return f"https://hub/{name}"

  def upload_folder(self, **what):
    self.calls.append(("folder", what))

  def upload_file(self, **what):
    self.calls.append(("file", what))


@pytest.mark.parametrize("public", [False, True])
def test_pushed_private_unless_it_is_to_be_public(public, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
  monkeypatch.setattr(Hub, "calls", [])
  assert card.push(tmp_path, "me/student", public) == "https://hub/me/student"
  (tmp_path / "s.gguf").touch()
  card.push(tmp_path / "s.gguf", "me/student", public)
  create = ("create", "me/student", {"private": not public, "exist_ok": True})
  folder = {"folder_path": tmp_path, "repo_id": "me/student"}
  file = {"path_or_fileobj": tmp_path / "s.gguf", "path_in_repo": "s.gguf"}
  file |= {"repo_id": "me/student"}
  assert Hub.calls == [create, ("folder", folder), create, ("file", file)]
  with pytest.raises(UserError, match=r"not on the hub as me/taken: 403 Forbidden$"):
    card.push(tmp_path, "me/taken", public)


def test_what_a_card_says_is_text_and_no_markup():
  """A file's name cannot be a heading, a picture, a script or a row of its own."""
  name = "a|b\n# c\n<script>x</script> ![d](e) *f* under_score.jsonl"
  text = model_card(SHAPE, 1000, Card({"Data": name}, datasets=["a: b\n---\nc: d"]))
  [row] = [line for line in text.splitlines() if line.startswith("| Data")]
  assert row == (
    r"| Data | a\|b # c \<script\>x\</script\> !\[d\](e) \*f\* under_score.jsonl |"
  )
  assert text.count("\n---\n") == 1 and "<script>" not in text
