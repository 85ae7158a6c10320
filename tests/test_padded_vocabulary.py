"""One tokenizer, models padded to different sizes: Qwen's 151936 and 152064."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from okd_jax import methods, models
from okd_jax.data import eval_batches, load_records, make_tokenizer
from okd_jax.evaluation.tokens import compile_token_step, evaluate_tokens
from okd_jax.run import build as setup
from okd_jax.run.batches import Sampler, answers_beforehand
from okd_jax.run.loop import Evaluator, train_loader

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
  return setup.build(config, folder / "run")


@pytest.mark.parametrize("name", ["gkd", "skd", "minillm", "imitkd"])
def test_sampled_text_is_what_both_can_read(run, name):
  """Else the one with fewer ids reads NaN; by the plain and by the adapted teacher."""
  given = run.config.method.to_dict() | {"sampled_share": 1.0, "divergence": ""}
  method = methods.build(name, given)
  params = run.init().params
  gold = next(train_loader(run.train, batch_size=8, length=96, pad_id=0, seed=0))
  for trees in (params, {"student": params["student"]}):
    sampler = Sampler(dataclasses.replace(run, method=method), {}, 0)
    with jax.set_mesh(run.mesh):
      batch, figures = sampler.batch(0, trees, gold)
      rows = batch | {"weights": method.weights(batch["mask"])}
      knobs = method.knobs_at(0.0)
      loss, _ = method.loss(
        run.models, params, run.frozen, rows, jax.random.key(0), knobs
      )
    assert figures["sampled"] == 1 and figures["sampled_length"] > 1
    assert int(batch["labels"].max()) < 258 and jnp.isfinite(loss)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_answers_beforehand_are_what_both_can_read(run, name, tmp_path):
  given = run.config.method.to_dict() | {"divergence": ""}
  short = dataclasses.replace(
    run, train=run.train[:4], method=methods.build("distillm2", given)
  )
  with jax.set_mesh(run.mesh):
    answers = answers_beforehand(short, name, tmp_path / "answers.jsonl")
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

  decoders = {
    role: decoder.clone(config=dataclasses.replace(decoder.config, vocab_size=258))
    for role, decoder in run.decoders.items()
  }
  frozen = {"params": cut(run.frozen)}
  variables = {"student": {"params": cut(params["student"])}, "teacher": frozen}
  variables["adapted"] = frozen | {"adapter": params["adapter"]}
  batches = eval_batches(run.eval, batch_size=8, length=96, pad_id=0)
  arrays = ({k: v for k, v in batch.items() if k != "row"} for batch in batches)
  want = evaluate_tokens(compile_token_step(decoders, 64), variables, arrays)
  assert set(got) == set(want) and "adapted_forward_kl" in want
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5)
