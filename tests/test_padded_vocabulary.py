"""One tokenizer, models padded to different sizes: Qwen's 151936 and 152064."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trial import only_read

from configs import default
from okd_jax import methods, models
from okd_jax.data import eval_batches, load_records, make_tokenizer, train_loader
from okd_jax.data.batch import Batch
from okd_jax.evaluation.tokens import (
  ADAPTED,
  STUDENT,
  TEACHER,
  compile_token_step,
  evaluate_tokens,
)
from okd_jax.methods.base.knobs import knobs_at
from okd_jax.run.batches import Batches
from okd_jax.run.beforehand import answers_of
from okd_jax.run.build import build
from okd_jax.run.evaluator import Evaluator
from okd_jax.runtime.workdir import Workdir

SIZES = {"wide student": (258, 320), "wide teacher": (320, 258)}


@pytest.fixture(scope="module", params=SIZES)
def run(request, tmp_path_factory):
  """A run whose wider model would say nothing but padding, were it let."""
  folder = tmp_path_factory.mktemp("padded")
  tokenizer = make_tokenizer("bytes", load_records("embedded:eval"))
  for seed, (name, size) in enumerate(
    zip(("teacher", "student"), SIZES[request.param], strict=True)
  ):
    config = models.preset(
      "llama", vocab_size=size, hidden_size=16, num_layers=1, num_heads=2
    )
    params = models.init(config, jax.random.key(seed))
    rows = params["embed"]["embedding"]
    params["embed"]["embedding"] = rows.at[len(tokenizer) :].multiply(100.0)
    models.save(folder / name, params, config, tokenizer)
  config = default.get_config()
  config.teacher.path, config.student.path = (
    str(folder / name) for name in ("teacher", "student")
  )
  config.data.train = "embedded:eval"
  config.data.holdout = 8
  config.data.max_length = 96
  config.data.max_prompt_length = 80
  config.eval.generate = False
  config.train.steps = 4
  return build(config, Workdir(folder / "run"))


def with_method(run, method):
  return dataclasses.replace(run, job=dataclasses.replace(run.job, method=method))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skd", "minillm", "gkd", "imitkd"])
def test_sampled_text_is_what_both_can_read(run, name):
  """Else the one with fewer ids reads NaN; by the plain and by the adapted teacher."""
  method = methods.build(name, only_read(name, sampled_share=1.0))
  params, frozen = run.init().params, run.cast.frozen
  gold = next(train_loader(run.data.train, batch_size=8, length=96, pad_id=0, seed=0))
  for trees in (params, {"student": params["student"]}):
    batches = Batches(with_method(run, method), {})
    with jax.set_mesh(run.mesh):
      batch, figures = batches.batch(0, trees, gold)
      rows = batch.replace(weights=method.weights(batch.mask))
      key, now = jax.random.key(0), knobs_at(method.knobs, 0.0)
      loss, _ = method.loss(run.plan.models, params, frozen, rows, key, now)
    assert figures["sampled"] == 1 and figures["sampled_length"] > 1
    assert int(batch.labels.max()) < 258 and jnp.isfinite(loss)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_answers_beforehand_are_what_both_can_read(run, name, tmp_path):
  data = dataclasses.replace(run.data, train=run.data.train[:4])
  short = with_method(run, methods.build("distillm2", {}))
  short = dataclasses.replace(short, data=data)
  with jax.set_mesh(run.mesh):
    answers = answers_of(short, name, Workdir(tmp_path))
  assert len(answers) == 4
  assert all(example.tokens.max() < 258 for example in answers)


def test_evaluation_cuts_to_the_common_vocabulary(run):
  """Of student, teacher and adapted teacher alike: as if nobody were padded."""
  params = run.init().params
  with jax.set_mesh(run.mesh):
    got = Evaluator(run)(params)

  def cut(tree):
    tree = jax.tree.map(lambda x: x, tree)
    tree["embed"]["embedding"] = tree["embed"]["embedding"][:258]
    return tree

  student, teacher, adapted = (STUDENT, ""), (TEACHER, "teacher"), (ADAPTED, "teacher")
  decoders = {
    student: run.cast.student,
    teacher: run.cast.teachers["teacher"],
    adapted: run.cast.adapted["teacher"],
  }
  decoders = {
    who: decoder.clone(config=dataclasses.replace(decoder.config, vocab_size=258))
    for who, decoder in decoders.items()
  }
  frozen = {"params": cut(run.cast.frozen["teacher"])}
  variables = {student: {"params": cut(params["student"])}, teacher: frozen}
  variables[adapted] = frozen | {"adapter": params["adapter"]["teacher"]}
  batches = eval_batches(run.data.eval, batch_size=8, length=96, pad_id=0)
  step = compile_token_step(decoders, 64)
  want = evaluate_tokens(step, variables, map(Batch.of, batches))
  assert set(got) == set(want) and "adapted_forward_kl" in want
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5)
