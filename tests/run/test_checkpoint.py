"""Checkpoints come back bit for bit, and a damaged one is passed over, not trusted."""

import errno
import json
import math
import shutil

import chex
import jax
import numpy as np
import pytest
from trial import Setup, make_batch

from okd_jax.data import Example, train_loader
from okd_jax.errors import UserError
from okd_jax.evaluation import figures
from okd_jax.run import checkpoint
from okd_jax.runtime import checksums, sharding


def loader():
  examples = [Example(np.arange(n, n + 6), 2, ("a",), f"row {n}") for n in range(10)]
  return train_loader(examples, batch_size=4, length=8, pad_id=0, seed=1)


def saved(folder, keep=3, best=None, steps=3):
  """A setup, its state after each step, and the folder with all of them."""
  setup, data, states = Setup("okd"), loader(), {}
  with checkpoint.opened(folder, keep, best) as checkpoints:
    state = setup.state
    for step in range(1, steps + 1):
      next(data)
      state, _ = setup.step(state, setup.frozen, make_batch(step))
      states[step] = jax.tree.map(
        np.array, state.replace(key=jax.random.key_data(state.key))
      )
      # The middle step scores best.
      checkpoints.save(step, state, data, {"loss": abs(step - 2.0)})
  return setup, states, data


def restored(setup, folder, keep=3):
  data, mesh = loader(), sharding.make_mesh(8, 1, 1)
  abstract = jax.eval_shape(lambda: setup.state)
  with checkpoint.opened(folder, keep) as checkpoints:
    state, step, _ = checkpoints.restore(abstract, data, mesh)
  return state.replace(key=jax.random.key_data(state.key)), step, data


def test_everything_comes_back(tmp_path):
  """Guards H3: lost optimiser, data position or key (maxtext#3464, KDFlow)."""
  setup, states, data = saved(tmp_path)
  state, step, again = restored(setup, tmp_path)
  assert step == 3
  chex.assert_trees_all_equal(jax.tree.map(np.array, state), states[3])
  chex.assert_trees_all_equal(next(again), next(data))


def test_a_state_from_before_it_carried_anything(tmp_path):
  """Of a run that carries nothing no trace of `carried` is saved, as there was none."""
  setup, data, mesh = Setup("okd"), loader(), sharding.make_mesh(8, 1, 1)
  before = dict(vars(setup.state))
  del before["carried"], before["skipped"]
  assert setup.state.carried == {}
  with checkpoint.opened(tmp_path, 1) as checkpoints:
    checkpoints.save(1, before, data, None)
  state, *_ = restored(setup, tmp_path, 1)
  assert state.carried == {} and state.params.keys() == setup.params.keys()
  with checkpoint.opened(tmp_path / "now", 1) as checkpoints:
    held = setup.state.replace(carried={"anchor_weight": jax.numpy.float32(0.25)})
    checkpoints.save(1, held, data, None)
    checkpoints.wait()
    abstract = jax.eval_shape(lambda: held)
    state, *_ = checkpoints.restore(abstract, data, mesh)
  assert state.carried["anchor_weight"] == 0.25


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
  """Reliability 2: the one before it, with a clear message."""
  setup, states, _ = saved(tmp_path)
  for path in (tmp_path / "3").rglob("*"):
    if path.is_file() and path.stat().st_size > 200:
      path.write_bytes(path.read_bytes()[:100])
  state, step, data = restored(setup, tmp_path)
  assert step == 2
  assert "checkpoint of step 3 is damaged" in caplog.text
  chex.assert_trees_all_equal(jax.tree.map(np.array, state), states[2])
  fresh = loader()
  for _ in range(2):
    next(fresh)
  chex.assert_trees_all_equal(next(data), next(fresh))
  assert (tmp_path / "damaged-3").is_dir()


def test_saves_go_on_after_a_damaged_checkpoint(tmp_path):
  """Orbax refuses steps below its newest, so the damaged one must make way."""
  setup, _, _ = saved(tmp_path)
  for path in (tmp_path / "3" / "state").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  data, abstract = loader(), jax.eval_shape(lambda: setup.state)
  with checkpoint.opened(tmp_path, 3) as checkpoints:
    state, step, _ = checkpoints.restore(abstract, data, sharding.make_mesh(8, 1, 1))
    checkpoints.save(3, state, data, None)
    checkpoints.wait()
    assert step == 2 and checkpoints.steps() == [1, 2, 3]
  _, step, _ = restored(setup, tmp_path)
  assert step == 3


def test_damaged_metadata_is_set_aside(tmp_path, caplog):
  setup, states, _ = saved(tmp_path)
  (tmp_path / "3" / "_CHECKPOINT_METADATA").write_bytes(b"{")
  state, step, _ = restored(setup, tmp_path)
  assert step == 2 and (tmp_path / "damaged-3").is_dir()
  assert "checkpoint of step 3 is damaged" in caplog.text
  chex.assert_trees_all_equal(jax.tree.map(np.array, state), states[2])


def test_none_that_can_be_read(tmp_path):
  setup, _, _ = saved(tmp_path, steps=1)
  for path in (tmp_path / "1" / "state").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.raises(UserError, match="can be read"):
    restored(setup, tmp_path)


def test_newest_and_best_are_kept(tmp_path):
  saved(tmp_path, keep=1, best=lambda metrics: -metrics["loss"], steps=4)
  with checkpoint.opened(
    tmp_path, 1, best=lambda metrics: -metrics["loss"]
  ) as checkpoints:
    assert checkpoints.steps() == [2, 4]
    assert checkpoints.best_step() == 2


def test_what_was_not_finite_is_never_the_best(tmp_path):
  best, data = figures.score_by("loss"), loader()
  with checkpoint.opened(tmp_path, 3, best) as checkpoints:
    for step, loss in enumerate([math.nan, 2.0, 3.0], 1):
      checkpoints.save(step, {"weight": np.zeros(2, np.float32)}, data, {"loss": loss})
  with checkpoint.opened(tmp_path, 3, best) as checkpoints:
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.best_step() == 2


def test_another_number_of_devices(tmp_path):
  """Reliability 4: saved on one device, restored in eight shards."""
  setup, states, _ = saved(tmp_path)
  mesh = sharding.make_mesh(1, 8, 1)
  with checkpoint.opened(tmp_path, 3) as checkpoints:
    state = checkpoints.restore_step(3, jax.eval_shape(lambda: setup.state), mesh)
  kernel = state.params["student"]["layers"]["mlp"]["up"]["kernel"]
  assert len(kernel.addressable_shards) == 8
  assert kernel.addressable_shards[0].data.size < kernel.size
  chex.assert_trees_all_equal(jax.tree.map(np.array, state.params), states[3].params)


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(UserError, match="checkpoint.keep=0"):
    checkpoint.Checkpoints(tmp_path, 0)


def flip(path, place):
  """Flips one bit of a file."""
  content = bytearray(path.read_bytes())
  content[int(place * (len(content) - 1))] ^= 4
  path.write_bytes(bytes(content))


def test_one_bit_of_an_array_is_enough(tmp_path, caplog):
  """What the files' own format lets pass: a state that nobody has computed."""
  setup, states, _ = saved(tmp_path / "sound")
  for place in (0.1, 0.3, 0.5):
    copy = shutil.copytree(tmp_path / "sound", tmp_path / str(place))
    [file] = (copy / "3/state/ocdbt.process_0/d").iterdir()
    flip(file, place)
    caplog.clear()
    state, step, _ = restored(setup, copy)
    assert step == 2 and "checkpoint of step 3 is damaged" in caplog.text
    chex.assert_trees_all_equal(jax.tree.map(np.array, state), states[2])


def test_the_array_is_named(tmp_path, caplog):
  """Of a checkpoint whose files are sound, and whose array is another all the same."""
  weight, data = {"weight": np.ones(3, np.float32)}, loader()
  with checkpoint.opened(tmp_path, 3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, weight, data, None)
  good = json.loads((tmp_path / "2/seal/seal.json").read_text())
  body = json.loads(good["seal"])
  body["arrays"] = dict.fromkeys(body["arrays"], "float32[3] 00")
  text = json.dumps(body, sort_keys=True)
  digest = checksums.of_bytes(text.encode())
  (tmp_path / "2/seal/seal.json").write_text(
    json.dumps({"sha256": digest, "seal": text})
  )
  mesh = sharding.make_mesh(8, 1, 1)
  with checkpoint.opened(tmp_path, 3) as checkpoints:
    assert checkpoints.restore(weight, loader(), mesh)[1] == 1
  assert "array ['state']['weight'] is not as it was written" in caplog.text


@pytest.mark.parametrize(
  "name",
  ["metrics/metrics", "data/position.json", "seal/seal.json", "_CHECKPOINT_METADATA"],
)
@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"\xff\x00", None])
def test_a_damaged_small_file(name, content, tmp_path, caplog):
  """Also one that is valid JSON, and says something else."""
  assert name in _checkpoints_of_numbers(tmp_path)
  path = tmp_path / "2" / name
  path.unlink() if content is None else path.write_bytes(content)
  with checkpoint.opened(tmp_path, 3, figures.score_by("loss")) as checkpoints:
    state, step, _ = checkpoints.restore(
      {"n": np.zeros(2, np.float32)}, loader(), a_mesh()
    )
    assert step == 1 and state["n"].tolist() == [1, 1]
  assert "checkpoint of step 2 is damaged" in caplog.text
  assert (tmp_path / "damaged-2").is_dir()


def a_mesh():
  return sharding.make_mesh(8, 1, 1)


def _checkpoints_of_numbers(folder):
  """Steps 1 and 2, of losses 3 and 2; the names of the last one's files."""
  data = loader()
  with checkpoint.opened(folder, 3, figures.score_by("loss")) as checkpoints:
    for step in (1, 2):
      checkpoints.save(
        step, {"n": np.full(2, np.float32(step))}, data, {"loss": 4.0 - step}
      )
  files = [path for path in (folder / "2").rglob("*") if path.is_file()]
  return {path.relative_to(folder / "2").as_posix() for path in files}


def test_the_best_gives_way_and_it_is_told(tmp_path, caplog):
  """Reading alone, as an export does: nothing is renamed."""
  _checkpoints_of_numbers(tmp_path)
  best = figures.score_by("loss")
  for file in (tmp_path / "2/state").rglob("d/*"):
    file.write_bytes(b"")
  with checkpoint.opened(tmp_path, 3, best, read_only=True) as found:
    state, step = found.best({"n": np.zeros(2, np.float32)}, a_mesh())
    assert step == 1 and state["n"].tolist() == [1, 1]
    with pytest.raises(UserError, match="2 is damaged; other steps: 1"):
      found.restore_step(2, {"n": np.zeros(2, np.float32)}, a_mesh())
  assert "the checkpoint of step 1 is taken in its place" in caplog.text
  assert (tmp_path / "2").is_dir()


def test_if_none_is_whole_nothing_starts_anew_in_silence(tmp_path):
  _checkpoints_of_numbers(tmp_path)
  for step in (1, 2):
    (tmp_path / str(step) / "metrics/metrics").write_text("{")
  with pytest.raises(UserError, match="no checkpoint below .* can be read; move"):
    checkpoint.Checkpoints(tmp_path, 3)
  assert (tmp_path / "1").is_dir() and (tmp_path / "2").is_dir()


def test_a_checkpoint_of_before_there_were_seals(tmp_path, caplog):
  """It is taken, and said to be unchecked; one whose seal is lost is not."""
  _checkpoints_of_numbers(tmp_path)
  shutil.rmtree(tmp_path / "2/seal")
  about = json.loads((tmp_path / "2/_CHECKPOINT_METADATA").read_text())
  del about["item_handlers"]["seal"]
  (tmp_path / "2/_CHECKPOINT_METADATA").write_text(json.dumps(about))
  with checkpoint.opened(tmp_path, 3) as checkpoints:
    assert (
      checkpoints.restore({"n": np.zeros(2, np.float32)}, loader(), a_mesh())[1] == 2
    )
  assert "checkpoint of step 2 has no checksums" in caplog.text
  shutil.rmtree(tmp_path / "1/seal")
  with checkpoint.opened(tmp_path, 3) as checkpoints:
    assert checkpoints.steps() == [2]


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [28]"),
  ],
)
def test_a_full_disk_is_one_sentence(error, tmp_path, monkeypatch):
  _checkpoints_of_numbers(tmp_path)
  with checkpoint.opened(tmp_path, 3) as checkpoints:

    def full(*args, **kwargs):
      raise RuntimeError("save failed") from error

    with monkeypatch.context() as patch:
      patch.setattr(
        checkpoints._checkpointer, "save_checkpointables_async", full, raising=False
      )
      words = (
        r"could not be written \(No space left on device\); that of step 2 is whole"
      )
      with pytest.raises(UserError, match=words):
        checkpoints.save(3, {"n": np.zeros(2, np.float32)}, loader(), None)
