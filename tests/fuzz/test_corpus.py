"""What once broke something is refused in a sentence, and what is sound is read."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from fuzz import run
from fuzz.corpus import CORPUS
from fuzz.kinds import KINDS, REFUSED, _read_prepared
from fuzz.materials import ROWS, lines, materials
from okd_jax.data import rows, sandbox
from okd_jax.errors import UserError

CASES = [(kind, *case) for kind, cases in CORPUS.items() for case in cases]


@pytest.mark.parametrize(
  ("kind", "what", "make"), CASES, ids=[f"{kind}: {what}" for kind, what, _ in CASES]
)
def test_it_is_refused_in_a_sentence(kind, what, make, tmp_path, monkeypatch):
  monkeypatch.setattr(sandbox, "STEPS", 20_000)  # slow where all calls are checked
  with pytest.raises(REFUSED) as caught:
    KINDS[kind].read(make(), tmp_path)
  text = str(caught.value)
  assert isinstance(caught.value, UserError) and text and len(text) < 2000


SOUND = {
  "jsonl": lambda: lines(ROWS),
  "parquet, arrow": lambda: (False, materials().parquet),
  "overrides": lambda: [("train.steps", "3")],
  "safetensors, index": lambda: ("", materials().model["model.safetensors"]),
  "config.json": lambda: materials().model["config.json"].decode(),
  "tokenizer": lambda: ("tokenizer.json", materials().model["tokenizer.json"]),
  "GGUF": lambda: materials().gguf,
  "adapters": lambda: tuple(materials().adapter.values()),
  "prepared rows": lambda: ("about.json", materials().prepared["about.json"]),
  "teacher caches": lambda: ("made_from.json", materials().cache["made_from.json"]),
}


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_sound_is_read(kind, tmp_path):
  KINDS[kind].read(SOUND[kind](), tmp_path)


def test_a_flipped_bit_in_prepared_rows_is_found_where_it_matters(tmp_path):
  """None is trained on in silence: tokens, or where the prompt ends."""
  name = "rows.arrow"
  whole = materials().prepared[name]
  (tmp_path / "sound").mkdir()
  for file, content in materials().prepared.items():
    (tmp_path / "sound" / file).write_bytes(content)
  sound = [e.tokens.tolist() for e in rows.open_rows(str(tmp_path / "sound"))]
  refused = 0
  for at in range(0, len(whole), 61):
    (folder := tmp_path / str(at)).mkdir()
    flipped = whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]
    if _refusal((name, flipped), folder):
      refused += 1
      continue
    found = [e.tokens.tolist() for e in rows.open_rows(str(folder))]
    assert found == sound
  assert refused > 5
  at = whole.rindex(np.array(sound[0][:4], "i4").tobytes())
  flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
  (tmp_path / "tokens").mkdir()
  said = _refusal((name, flipped), tmp_path / "tokens")
  assert "holds damaged rows (row 5 is not as it was written)" in said


def _refusal(value, folder):
  """What is said of prepared rows, '' if they are read.

  Whoever checks the package's calls in tests looks at rows, too, and so refuses them
  first.
  """
  try:
    _read_prepared(value, folder)
  except (UserError, TypeCheckError) as error:
    while not isinstance(error, UserError):
      error = error.__cause__ or error.__context__
    return str(error)
  return ""


def test_every_kind_is_tried():
  assert set(run.NAMES) == set(KINDS)


@pytest.mark.slow
def test_a_hundred_and_thirty_inputs(monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["fuzz.run", "--inputs=130", "--seed=7"])
  assert run.main() == 0, capsys.readouterr().out
