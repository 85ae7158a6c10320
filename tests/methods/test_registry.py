"""Methods by name: what each reads, what it refuses, and how another one joins them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from trial import KNOBS, LogitTrial, make_batch, make_logits

from configs import default
from okd_jax import losses, methods
from okd_jax.config import read
from okd_jax.errors import UserError
from okd_jax.methods import Shape, kd, online_module, registry, uld
from okd_jax.methods.base import Knob, Linear, check_weight, divergences
from okd_jax.methods.base.divergences import DIVERGENCES, shape_knobs

NOT_KNOBS = {"name", "file", "end", "cross_tokenizer"}
SECTION = default.get_config().method.to_dict()
# How a knob comes into its own, where its method's defaults leave it aside.
# A seqkd without a ratio has no divergence for a knob to be of.
RATIO = {"seqkd": {"seqkd_ratio": 0.5}}
ROUTES = [(name, RATIO.get(name, {}), "") for name in methods.METHODS]
ROUTES += [("kd", {"divergence": name}, "") for name in DIVERGENCES]
ROUTES += [("kd", {}, "lora"), ("kd", {"cross_tokenizer": "uld"}, "")]
# Floats that are fixed for a run: of the text that is sampled, of a learning rate.
STILL = {"loss_eps", "teacher_mix", "teacher_temperature", "teacher_top_p", "gate_lr"}
STILL |= {"ab_alpha", "ab_beta", "drift_target"}


@pytest.fixture
def own_names(monkeypatch):
  """What a test registers is forgotten after it."""
  monkeypatch.setattr(registry, "METHODS", methods.METHODS.copy())
  monkeypatch.setattr(methods, "METHODS", registry.METHODS)
  known = dict(DIVERGENCES)
  yield registry.METHODS
  DIVERGENCES.clear()
  DIVERGENCES.update(known)


def refusal(name, knobs, adapter=""):
  """The message of the error that `build` raises."""
  with pytest.raises(UserError) as error:
    methods.build(name, KNOBS | knobs, adapter)
  return str(error.value)


# What is read


@pytest.mark.parametrize(
  "name, knobs, adapter, message",
  [
    ("kd", {"rank_k": 3}, "", "rank_k=3: kd here does not read it; it is read by rlkd"),
    (
      "kd",
      {"beta": 0.3},
      "",
      "beta=0.3: kd here does not read it; it shapes the divergence jensen_shannon "
      "(method.divergence)",
    ),
    (
      "kd",
      {"skew": 0.3, "divergence": "reverse_kl"},
      "",
      "skew=0.3: kd here does not read it; it shapes the divergence skew_forward_kl or "
      "skew_reverse_kl (method.divergence)",
    ),
    (
      "rkd",
      {"divergence": "forward_kl"},
      "",
      "divergence=forward_kl: rkd here does not read it; it is read by clda, distillm, "
      "ensemble, fdistill, gkd, imitkd, kd, mixkd, okd, rlkd, seqkd, skd",
    ),
    (
      "rkd",
      {"divergence": "reverse_kl"},
      "",
      "divergence=reverse_kl: rkd here does not read it",
    ),
    ("sft", {"kd_ratio": 0.5}, "", "kd_ratio=0.5: sft here does not read it"),
    ("sft", {"gold_weight": 0.5}, "", "gold_weight=0.5: sft here does not read it"),
    (
      "seqkd",
      {"kd_ratio": 0.5},
      "",
      "kd_ratio=0.5: seqkd here does not read it; it is read by akl, ",
    ),
    (
      "kd",
      {"seqkd_ratio": 0.5},
      "",
      "seqkd_ratio=0.5: kd here does not read it; it is read by seqkd",
    ),
    (
      "kd",
      {"anchor_weight": 0.3},
      "",
      "anchor_weight=0.3: kd here does not read it; it is read by clda, okd, and by "
      "any method with adapter.kind",
    ),
    (
      "kd",
      {"student_kl_weight": 0.3},
      "lora",  # which has no part in it
      "student_kl_weight=0.3: kd here does not read it; it is read by clda, okd",
    ),
    (
      "kd",
      {"update_order": "sequential"},
      "lora",
      "update_order=sequential: kd here does not read it; it is read by clda, okd",
    ),
    (
      "gkd",
      {"teacher_weights": (1.0,)},
      "",
      "teacher_weights=(1.0,): gkd here does not read it; it is read by ensemble",
    ),
    (
      "kd",
      {"cross_tokenizer": "uld", "head_mass": 0.2},
      "",
      "head_mass=0.2: kd here does not read it; it shapes the divergence adaptive_kl",
    ),
  ],
)
def test_a_knob_that_is_not_read_is_refused(name, knobs, adapter, message):
  assert refusal(name, knobs, adapter).startswith(f"method.{message}")
  assert methods.unread(name, KNOBS | knobs, adapter) == [message.partition("=")[0]]


@pytest.mark.parametrize(
  "name, knobs, needed",
  [
    ("gkd", {"replay_capacity": 10}, "method.replay=True"),
    ("fdistill", {"exact_mixture": True}, "method.divergence=jensen_shannon"),
    ("ensemble", {"gate_per": "example"}, "method.weighting=gated"),
    ("ensemble", {"gate_lr": 1.0}, "method.weighting=gated or reinforced"),
    (
      "ensemble",
      {"weighting": "gated", "reward": "gold_and_teachers"},
      "method.weighting=reinforced",
    ),
    ("seqkd", {"temperature": 2.0}, "method.seqkd_ratio above 0"),
    ("seqkd", {"divergence": "reverse_kl"}, "method.seqkd_ratio above 0"),
    ("seqkd", {"top_k": 5}, "method.seqkd_ratio above 0"),
    ("kd", {"kd_ratio": 0.0, "top_k": 5}, "method.kd_ratio above 0"),
    ("kd", {"kd_ratio": 0.0, "student_mix": 0.5}, "method.kd_ratio above 0"),
    (
      "okd",
      {"student_kl_weight": 0.0, "target_mix": 0.5},
      "method.student_kl_weight above 0",
    ),
  ],
)
def test_a_knob_without_an_effect_is_refused(name, knobs, needed):
  assert refusal(name, knobs, "").endswith(f"has no effect here: it needs {needed}")


def test_no_module_learns_where_nobody_reads_the_teacher():
  """With a ratio of 0 the teacher writes text before training, and that is all."""
  message = "adapter.kind=lora: seqkd here has no teacher in its loss"
  assert refusal("seqkd", {}, "lora") == message
  assert methods.build("seqkd", {"seqkd_ratio": 0.5}, "lora").adapts


def test_with_an_adapter_its_knobs_are_read():
  """A knob of okd on kd."""
  given = {"anchor_weight": 0.3, "teacher_kl_weight": 0.5}
  given |= {"teacher_divergence": "reverse_kl"}
  method = methods.build("kd", KNOBS | given, "lora")
  assert method.adapts and method.knobs["anchor_weight"] == 0.3
  assert methods.unread("kd", KNOBS | given, "lora") == []
  assert {*methods.unread("kd", KNOBS | given)} == {*given}


def test_a_shape_is_read_by_whichever_divergence_it_shapes():
  """Also where it shapes the adapter's alone."""
  knobs = {"teacher_divergence": "jensen_shannon", "beta": 0.3}
  assert methods.build("okd", KNOBS | knobs).knobs["beta"] == 0.3
  assert methods.build("kd", KNOBS | knobs, "lora").knobs["beta"] == 0.3
  assert "beta" not in methods.build("okd", KNOBS).knobs


def test_what_does_not_differ_is_not_refused():
  """Whole sections are handed on; a tuple may come back as a list."""
  for name in methods.METHODS:
    methods.build(name, KNOBS | {"teacher_weights": []})
    methods.build(name, {})
    methods.build(name, SECTION)


def test_unknown_knobs_are_suggested():
  assert "method.kd_ration is no knob of any method; did you mean method.kd_ratio?" in (
    refusal("kd", {"kd_ration": 0.5})
  )
  assert methods.unread("kd", {"kd_ration": 0.5}) == ["kd_ration"]
  assert refusal("kd", {"zzz": 1}).endswith("method.zzz is no knob of any method")


def test_a_method_that_cannot_be_made_has_nothing_unread():
  for name, knobs in (("gdk", {}), ("kd", {"kd_ratio": 2.0}), ("sft", {})):
    assert methods.unread(name, KNOBS | knobs, "lora") == []


@pytest.mark.parametrize(
  "name, end, message",
  [
    ("kd", "beta", "method.end.beta: here kd reads no such number; it reads kd_ratio"),
    (
      "sft",
      "kd_ratio",
      "method.end.kd_ratio: here sft reads no such number; it reads ",
    ),
    ("seqkd", "kd_ratio", "method.end.kd_ratio: here seqkd reads no such number"),
    ("kd", "sampled_share", "method.end.sampled_share: here kd reads no such number"),
  ],
)
def test_only_numbers_of_the_loss_move(name, end, message):
  assert message in refusal(name, {"end": {end: 0.4}})
  assert methods.unread(name, KNOBS | {"end": {end: 0.4}}) == [f"end.{end}"]
  methods.build(name, KNOBS | {"end": {end: None}})


@pytest.mark.parametrize(
  "name, key", [("minillm", "teacher_mix"), ("rlkd", "rank_k"), ("ensemble", "gate_lr")]
)
def test_what_is_fixed_for_a_run_does_not_move(name, key):
  assert f"method.{key} keeps its value" in refusal(name, {"end": {key: 0.4}})


def test_a_share_of_the_methods_own_moves_from_there():
  for name, start in (("gkd", 0.5), ("imitkd", 1.0)):
    for knobs in ({}, {"sampled_share": None}):
      plan = methods.build(name, knobs | {"end": {"sampled_share": 0.2}}).sequences
      assert plan.share == Linear(start, 0.2)


def test_seqkd_has_a_ratio_of_its_own():
  """kd_ratio, 1 by default, once had to be set to 0 to have the paper's method."""
  assert "kd_ratio" not in methods.used_knobs("seqkd")
  assert "kd_ratio" not in methods.build("seqkd", {}).knobs
  logits, batch = make_logits(), make_batch()
  for ratio in (0.0, 0.3, 1.0):
    got = LogitTrial("seqkd", seqkd_ratio=ratio)(*logits, batch)[0]
    want = LogitTrial("kd", kd_ratio=ratio)(*logits, batch)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)


# The configuration


def test_the_configurations_defaults_are_the_methods():
  """Every knob is a key with the same default, of the same type, and vice versa."""
  keys = {key: value for key, value in SECTION.items() if key not in NOT_KNOBS}
  found = methods.defaults()
  assert {*found} == {*keys}
  assert found == keys
  types = [{key: type(value) for key, value in d.items()} for d in (found, keys)]
  assert types[0] == types[1]


def test_every_key_has_a_reader():
  read = {key for name in methods.METHODS for key in methods.used_knobs(name)}
  assert read == {*SECTION} - NOT_KNOBS
  for key in read:
    assert registry.who_reads(key)


def test_shared_knobs_have_one_default():
  """Else none of them could be told from what was set."""
  classes = [b.knobs for b in methods.METHODS.values()]
  classes += [online_module.Knobs, uld.Knobs]
  for cls in classes:
    own = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name != "shape"}
    for key, field in own.items():
      assert field.default == KNOBS[key], (cls, key)
  for divergence in DIVERGENCES.values():
    for shape in divergence.arguments.values():
      assert shape.default == KNOBS[shape.key]


def test_the_keys_that_move_are_the_numbers_that_may():
  floats = {key for key, value in KNOBS.items() if type(value) is float}
  floats.add("sampled_share")  # a float, but left open
  assert {*SECTION["end"]} == floats - STILL
  assert not any(SECTION["end"].values())


@pytest.mark.parametrize("key", sorted(SECTION["end"]))
def test_each_moves_in_some_method(key):
  moved = []
  for name, knobs, adapter in ROUTES:
    end = {"end": {key: 0.4}}
    if methods.unread(name, KNOBS | knobs | end, adapter):
      continue
    method = methods.build(name, KNOBS | knobs | end, adapter)
    moved.append(method.knobs.get(key, method.sequences.share))
  assert moved and all(isinstance(knob, Linear) for knob in moved)


def test_used_knobs():
  """Named ones read the knobs of their own divergence, and cannot choose another."""
  assert methods.used_knobs("sft") == []
  common = {"kd_ratio", "temperature", "gold_weight", "top_k"}
  common |= {"token_weight", "student_mix", "student_mix_adapts"}
  assert {*methods.used_knobs("rkd")} == common
  assert {*methods.used_knobs("jsd")} == common | {"beta", "normalize"}
  assert {*methods.used_knobs("kd")} == common | {"divergence", *shape_knobs()}


# Somebody else's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(methods.DivergenceKnobs):
  """A method's own."""

  pace: Knob = 0.5
  rounds: int = 3

  def __post_init__(self):
    super().__post_init__()
    check_weight("method.pace", self.pace)


def build_own(knobs):
  """`pace` times the divergence."""
  plain = kd.build(kd.Knobs(divergence=knobs.divergence, shape=knobs.shape))

  def loss(models, params, frozen, batch, key, now):
    rest = {name: value for name, value in now.items() if name != "pace"}
    value, metrics = plain.loss(models, params, frozen, batch, key, rest)
    return now["pace"] * value, metrics

  return dataclasses.replace(
    plain, loss=loss, knobs=dict(plain.knobs) | {"pace": knobs.pace}
  )


def test_a_method_of_ones_own(own_names):
  """It is built, shaped, moved, suggested and refused as ours are."""
  assert methods.register("paced", Knobs)(build_own) is build_own
  logits, batch = make_logits(), make_batch()
  want = LogitTrial("kd", divergence="reverse_kl")(*logits, batch)[0]
  got = LogitTrial("paced", divergence="reverse_kl", pace=0.3)(*logits, batch)[0]
  np.testing.assert_allclose(got, 0.3 * want, rtol=1e-6)
  moving = LogitTrial("paced", divergence="reverse_kl", end={"pace": 1.0})
  got = moving(*logits, batch, progress=jnp.float32(0.5))[0]
  np.testing.assert_allclose(got, 0.75 * want, rtol=1e-6)
  own = {"pace": 0.5, "rounds": 3}
  assert own.items() <= methods.defaults().items()
  read = {*own, "temperature", "divergence", *shape_knobs()}
  assert {*methods.used_knobs("paced")} == read
  assert methods.build("paced", SECTION | own | {"rounds": 4})
  assert "method.pace=0.4: kd here does not read it; it is read by paced" in refusal(
    "kd", {"pace": 0.4}
  )
  assert "method.beta=0.2: paced here does not read it" in refusal(
    "paced", {"beta": 0.2}
  )
  assert "method.end.rounds: method.rounds keeps its value" in refusal(
    "paced", {"end": {"rounds": 4.0}}
  )
  assert "method.pace=-1.0 must be at least 0" in refusal("paced", {"pace": -1.0})
  assert "did you mean paced?" in refusal("pace", {})
  wrapped = methods.build("paced", {"anchor_weight": 0.2}, "lora")
  assert wrapped.adapts and {"pace", "anchor_weight"} <= {*wrapped.knobs}
  methods.register("paced", Knobs)(build_own)  # its own file, run again


def test_what_cannot_be_registered(own_names):
  with pytest.raises(UserError, match="there is a method 'kd' already; choose another"):
    methods.register("kd", Knobs)

  @dataclasses.dataclass(frozen=True)
  class Bare:
    pace: float

  with pytest.raises(UserError, match="method 'mine': its knob pace needs a default"):
    methods.register("mine", Bare)
  assert "mine" not in own_names


def sharper(p_logits, q_logits, temperature, power=1.0):
  return power * losses.forward_kl(p_logits, q_logits, temperature)


def test_a_divergence_of_ones_own(own_names):
  """Any method takes it, and any adapter; its knob moves and is refused elsewhere."""
  power = Shape("power", 1.0)
  methods.register_divergence("sharper", sharper, power=power)
  logits, batch = make_logits(), make_batch()
  want = LogitTrial("kd")(*logits, batch)[0]
  mine = {"divergence": "sharper"}
  for name in ("kd", "gkd", "imitkd"):
    got = LogitTrial(name, **mine, power=3.0)(*logits, batch)[0]
    np.testing.assert_allclose(got, 3 * want, rtol=1e-6)
  moving = LogitTrial("kd", **mine, end={"power": 2.0})
  got = moving(*logits, batch, progress=jnp.float32(0.5))[0]
  np.testing.assert_allclose(got, 1.5 * want, rtol=1e-6)
  for knobs, adapter in ((mine, ""), ({"teacher_divergence": "sharper"}, "lora")):
    assert methods.build("kd", knobs | {"power": 2.0}, adapter).knobs["power"] == 2.0
  message = "method.power=2.0: kd here does not read it; it shapes the divergence"
  assert f"{message} sharper (method.divergence)" in refusal("kd", {"power": 2.0})
  assert "method.power=-1.0 must be at least 0" in refusal("kd", mine | {"power": -1.0})
  assert methods.defaults()["power"] == 1.0
  methods.register_divergence("sharper", sharper, power=power)  # its file, run again


def test_what_divergence_cannot_be_registered(own_names):
  with pytest.raises(UserError, match="there is a divergence 'forward_kl' already"):
    methods.register_divergence("forward_kl", sharper)
  with pytest.raises(UserError, match="the knob method.beta is another divergence's"):
    methods.register_divergence("sharper", sharper, power=Shape("beta", 1.0))
  assert "sharper" not in divergences.DIVERGENCES
  with pytest.raises(UserError, match="method.divergence='sharper' is no divergence"):
    methods.build("kd", {"divergence": "sharper"})


# Files


def test_a_file_is_run_once(own_names, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "import dataclasses\n"
    "from okd_jax import methods\n"
    "from okd_jax.methods import sft\n"
    "@dataclasses.dataclass(frozen=True)\n"
    "class Knobs:\n"
    "  slack: float = 0.1\n"
    "@methods.register('from_file', Knobs)\n"
    "def build(knobs):\n"
    "  return sft.build(sft.Knobs())\n"
  )
  methods.load_file(str(file))
  assert not methods.build("from_file", {"slack": 0.2}).taught
  made = own_names["from_file"]
  methods.load_file(str(file))
  assert own_names["from_file"] is made
  # Its knobs become keys; what ours cannot move stays where it is.
  config = default.get_config()
  read.add_method_file(config, str(file))
  section = config.method.to_dict()
  assert {*section} - {*SECTION} == {*section["end"]} - {*SECTION["end"]} == {"slack"}
  assert section["slack"] == 0.1 and section["end"]["slack"] is None


@pytest.mark.parametrize(
  "text, message",
  [
    ("1 / 0", r"mine.py fails with ZeroDivisionError: division by zero"),
    ("def build(:", r"mine.py fails with SyntaxError: "),
    ("import nothing_of_this_name", r"mine.py fails with ModuleNotFoundError: "),
    (
      "from okd_jax.methods import register, sft\nregister('kd', sft.Knobs)",
      r"mine.py: there is a method 'kd' already",
    ),
  ],
)
def test_what_is_wrong_with_a_file(own_names, tmp_path, text, message):
  file = tmp_path / "mine.py"
  file.write_text(text)
  for _ in range(2):  # what failed is not taken for done
    with pytest.raises(UserError, match=f"^method.file=.*{message}"):
      methods.load_file(str(file))


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match="method.file=.*gone.py: there is no such file"):
    methods.load_file(str(tmp_path / "gone.py"))
  with pytest.raises(UserError, match="there is no such file"):
    methods.load_file(str(tmp_path))  # a folder
