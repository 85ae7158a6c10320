"""Plants known bugs one at a time and shows that the tests catch each of them.

    python tests/mutate.py            # all of them, about 20 minutes on 2 cores
    python tests/mutate.py anchor     # those with 'anchor' in their description

Works on a copy of the repository in a temporary folder. For each bug the tests named
beside it run, a part of the quick suite; they must pass without any bug, and fail with
it. Prints the table that BUILD_NOTES.md quotes; exit status 1 if a bug survived.
"""

import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOSSES, METHODS = "okd_jax/losses", "okd_jax/methods"


@dataclasses.dataclass(frozen=True)
class Bug:
  """One replacement in one file, who shipped it, and the tests that must see it."""

  what: str
  seen_in: str
  file: str
  old: str
  new: str
  tests: str  # arguments of pytest


BUGS = (
  Bug(
    "forward and reverse KL swapped",
    "EasyDeL",
    f"{LOSSES}/divergences.py",
    "return temperature**2 * _kl(log_p, log_q)",
    "return temperature**2 * _kl(log_q, log_p)",
    "tests/losses/test_divergences.py -k golden",
  ),
  Bug(
    "no T^2",
    "KDFlow",
    f"{LOSSES}/divergences.py",
    "return temperature**2 * _kl(log_p, log_q)",
    "return _kl(log_p, log_q)",
    "tests/losses/test_divergences.py",
  ),
  Bug(
    "a cross-entropy in place of the KL",
    "torchtune, LMOps, DLM",
    f"{LOSSES}/divergences.py",
    "jnp.exp(log_p) * (log_p - log_q)",
    "jnp.exp(log_p) * -log_q",
    "tests/losses/test_divergences.py",
  ),
  Bug(
    "JSD weighs the wrong side",
    "TRL",
    f"{LOSSES}/divergences.py",
    "log_m = _log_mix(log_p, log_q, beta)",
    "log_m = _log_mix(log_q, log_p, beta)",
    "tests/losses/test_divergences.py -k golden",
  ),
  Bug(
    "mixtures of log-probabilities",
    "TRL",
    f"{LOSSES}/divergences.py",
    "return jnp.logaddexp(log_p + numbers.log(share), log_q + numbers.log1p(-share))",
    "return share * log_p + (1 - share) * log_q",
    "tests/losses/test_divergences.py -k golden",
  ),
  Bug(
    "softmax in the dtype of the input",
    "EasyDeL, Liger",
    f"{LOSSES}/logits.py",
    "logits.astype(jnp.float32) / temperature",
    "logits / temperature",
    "tests/losses/test_divergences.py",
  ),
  Bug(
    "log 0 is -inf",
    "DLM",
    f"{LOSSES}/logits.py",
    "return jnp.maximum(log_q, _LOG_ZERO)",
    "return log_q",
    "tests/losses/test_divergences.py",
  ),
  Bug(
    "negative values reported",
    "Liger",
    f"{LOSSES}/logits.py",
    "jax.lax.stop_gradient(jnp.maximum(value, 0) - value)",
    "jax.lax.stop_gradient(0 * value)",
    "tests/losses/test_divergences.py",
  ),
  Bug(
    "AKL divides 0 by 0 at identity",
    "KDFlow, DSKD",
    f"{LOSSES}/divergences.py",
    "in_head / jnp.where(total > 0, total, 1), 0.5)",
    "in_head / total, in_head / total)",
    "tests/losses/test_divergences.py",
  ),
  Bug(
    "AKL's weights carry gradient",
    "ours, as DistiLLM-2's alpha",
    f"{LOSSES}/divergences.py",
    "p, q = jax.lax.stop_gradient((jnp.exp(log_p), jnp.exp(log_q)))",
    "p, q = jnp.exp(log_p), jnp.exp(log_q)",
    "tests/losses/test_divergences.py",
  ),
  Bug(
    "top-k renormalised, no tail",
    "tunix, maxtext, swift, NeMo",
    f"{LOSSES}/sparse.py",
    "rest = _log_rest(log_q, top.ids)",
    "kept, rest = jax.nn.log_softmax(kept), jnp.full(kept.shape[:-1], -1e30)",
    "tests/losses/test_sparse.py",
  ),
  Bug(
    "ids in both top k rank twice",
    "RLKD",
    f"{LOSSES}/ranking.py",
    "[jnp.ones_like(repeated), ~repeated]",
    "[jnp.ones_like(repeated), jnp.ones_like(repeated)]",
    "tests/losses/test_ranking.py",
  ),
  Bug(
    "labels not shifted",
    "EasyDeL",
    "okd_jax/data/pack.py",
    'row["labels"][start:stop] = example.tokens[1:]',
    'row["labels"][start:stop] = example.tokens[:-1]',
    "tests/data/test_pack.py",
  ),
  Bug(
    "the first response token is not trained",
    "DLM, RLKD, SKD",
    "okd_jax/data/pack.py",
    "start + max(first - 1, 0) : start + last - 1",
    "start + first : start + last - 1",
    "tests/data/test_pack.py",
  ),
  Bug(
    "EOS is not trained where it is the pad",
    "maxtext, TRL",
    "okd_jax/data/pack.py",
    'row["segment_ids"][start:stop] = segment',
    'row["segment_ids"][start:stop] = segment\n'
    '    row["mask"] &= row["labels"] != pad_id',
    "tests/data/test_pack.py",
  ),
  Bug(
    "pads counted in the mean",
    "Liger, TRL",
    f"{LOSSES}/mean.py",
    "count = jnp.sum(mask, dtype=jnp.float32)",
    "count = jnp.float32(mask.size)",
    "tests/methods/test_methods.py -k formula",
  ),
  Bug(
    "a mean of the micro-batches' means",
    "TRL, verl, swift, NeMo",
    "okd_jax/run/step.py",
    "return loss(params | moving, part, jax.random.fold_in(key, index))",
    "weights = jnp.where(part.mask, 1 / jnp.maximum(part.mask.sum(), 1), 0.0)\n"
    "    part = part.replace(weights=weights / microbatches)\n"
    "    return loss(params | moving, part, jax.random.fold_in(key, index))",
    "tests/run/test_step.py -k 'microbatches and 2'",
  ),
  Bug(
    "masked positions multiplied by 0",
    "axolotl, DLM",
    f"{LOSSES}/chunked.py",
    "jnp.sum(jnp.where(weights != 0, x, 0) * weights)",
    "jnp.sum(x * weights)",
    "tests/losses/test_chunked.py",
  ),
  Bug(
    "head gradients added up in bfloat16",
    "Liger",
    f"{LOSSES}/chunked.py",
    "jnp.zeros(shape, jnp.float32)",
    "jnp.zeros(shape, head.kernel.dtype)",
    "tests/losses/test_chunked.py",
  ),
  Bug(
    "the last positions of a row lost to the chunks",
    "Liger",
    f"{LOSSES}/layout.py",
    "count = -(-length // size)",
    "count = max(length // size, 1)",
    "tests/losses/test_chunked.py",
  ),
  Bug(
    "a padded vocabulary keeps its mass",
    "Liger, swift",
    f"{METHODS}/base/method.py",
    "return {name: out.first_ids(size) for",
    "return {name: out.replace(head=jnp.pad(out.head, ((0, 16), (0, 0)))"
    "[: max(o.head.shape[0] for o in outputs.values())]) for",
    "tests/methods/test_methods.py -k padded_teacher",
  ),
  Bug(
    "stop_gradient on the wrong side",
    "ours",
    f"{METHODS}/okd.py",
    'target = logits["student"], stop_gradient(logits["teacher"])',
    'target = stop_gradient(logits["student"]), logits["teacher"]',
    "tests/methods/test_okd.py -k closed_form",
  ),
  Bug(
    "the module also follows the student's loss",
    "ours",
    f"{METHODS}/okd.py",
    'target = logits["student"], stop_gradient(logits["teacher"])',
    'target = logits["student"], logits["teacher"]',
    "tests/methods/test_okd.py -k closed_form",
  ),
  Bug(
    "the anchor pulls the other way",
    "ours",
    f"{METHODS}/online_module.py",
    'forward_kl(stop_gradient(logits["base"]), teacher)',
    'forward_kl(teacher, stop_gradient(logits["base"]))',
    "tests/methods/test_methods.py -k formula",
  ),
  Bug(
    "the temperature is ignored",
    "KDFlow, verl",
    f"{METHODS}/base/divergences.py",
    "return function(p_logits, q_logits, temperature, **own)",
    "return function(p_logits, q_logits, 1.0, **own)",
    "tests/methods/test_methods.py -k 'changes_something and temperature'",
  ),
  Bug(
    "what is logged is not what is trained",
    "TRL",
    f"{METHODS}/kd.py",
    '{"divergence": d, "student_nll"',
    '{"divergence": d / 2, "student_nll"',
    "tests/methods/test_methods.py -k logged_parts",
  ),
  Bug(
    "the module's learning rate is the student's",
    "ours",
    "okd_jax/run/optim.py",
    "lambda count: learning_rate(count) * lr_scale",
    "lambda count: learning_rate(count)",
    "tests/methods/test_okd.py -k held_module",
  ),
  Bug(
    "attention across packed documents",
    "maxtext",
    "okd_jax/models/attention.py",
    "(causal & same & real)",
    "(causal & real)",
    "tests/models/test_transformer.py -k packed",
  ),
  Bug(
    "splash attention sees other texts of its row",
    "maxtext",
    "okd_jax/models/kernels.py",
    "SegmentIds(segment_ids, segment_ids)",
    "SegmentIds(segment_ids * 0, segment_ids * 0)",
    "tests/models/test_kernels.py",
  ),
  Bug(
    "splash attention without the scale of its scores",
    "own",
    "okd_jax/models/kernels.py",
    "(query_BLHD * scale, ",
    "(query_BLHD, ",
    "tests/models/test_kernels.py",
  ),
  Bug(
    "a window of one token more",
    "own",
    "okd_jax/models/attention.py",
    "index[None, :, None] - window",
    "index[None, :, None] - window - 1",
    "tests/models/test_transformer.py -k transformers",
  ),
  Bug(
    "layers with a rotary base of their own get the model's",
    "own",
    "okd_jax/models/rope.py",
    "(kind.rope_theta or config.rope_theta)",
    "config.rope_theta",
    "tests/models/test_transformer.py -k transformers",
  ),
  Bug(
    "a shallower model keeps the lowest layers' kinds",
    "own",
    "okd_jax/models/config.py",
    "tuple(self.layer_kinds[i] for i in layers)",
    "self.layer_kinds[: len(layers)]",
    "tests/models/test_transformer.py -k TestTakeLayers",
  ),
  Bug(
    "losses see logits without their cap",
    "transformers, whose losses are of capped ones",
    "okd_jax/losses/chunked.py",
    "of_capped(part.token_loss, part.outputs)",
    "part.token_loss",
    "tests/losses/test_chunked.py -k cap",
  ),
  Bug(
    "the gradient of an int8 product without its scales",
    "own",
    "okd_jax/models/int8.py",
    "(dy * _beside(scale, dy)).astype(dy.dtype)",
    "dy",
    "tests/models/test_int8.py -k gradient",
  ),
  Bug(
    "tokens come back from their experts in another order",
    "own",
    "okd_jax/models/experts.py",
    "back = jnp.argsort(order)",
    "back = order",
    "tests/models/test_families.py -k outputs_and_gradients",
  ),
  Bug(
    "a weight map leads out of its folder",
    "own",
    "okd_jax/models/formats/tensors.py",
    "not own or Path(name).name != name",
    "not own",
    "tests/models/formats/test_tensors.py -k weight_map",
  ),
  Bug(
    "the last chunk of counting positions is left out",
    "own",
    "okd_jax/losses/layout.py",
    "-(-counts.sum(1).max() // size)",
    "counts.sum(1).max() // size",
    "tests/losses/test_chunked.py",
  ),
  Bug(
    "packed rows are one text",
    "maxtext",
    "okd_jax/data/pack.py",
    'row["segment_ids"][start:stop] = segment',
    'row["segment_ids"][start:stop] = 1',
    "tests/data/test_pack.py -k in_one_row",
  ),
  Bug(
    "positions do not restart in packed rows",
    "torchtune",
    "okd_jax/models/attention.py",
    "return index - jax.lax.cummax(starts, axis=1)",
    "return index + 0 * starts",
    "tests/models/test_transformer.py -k packed",
  ),
  Bug(
    "mixed-up rows: the teacher sees them unmixed",
    "ours",
    f"{METHODS}/mixkd.py",
    '"teacher": models.teacher(frozen, None, mixed, mix)',
    '"teacher": models.teacher(frozen, None, mixed)',
    "tests/methods/test_mixkd.py -k swapping",
  ),
  Bug(
    "a step that is not finite is taken",
    "TRL, Liger, LMOps",
    "okd_jax/run/step.py",
    "jnp.where(finite & jnp.isfinite(new), new, old)",
    "new",
    "tests/run/test_step.py -k not_finite",
  ),
  Bug(
    "an update that is partly infinite moves the finite numbers",
    "ours",
    "okd_jax/run/step.py",
    "moves = jnp.isfinite(sum(logged.values()) + sum(sound))",
    "moves = jnp.isfinite(sum(logged.values()))",
    "tests/run/test_step.py -k never_stored",
  ),
  Bug(
    "skipped updates are not counted",
    "planted",
    "okd_jax/run/step.py",
    "state.skipped + ~moves",
    "state.skipped",
    "tests/run/test_step.py -k is_counted",
  ),
  Bug(
    "several teachers averaged as logits",
    "ensembles written as one line",
    f"{LOSSES}/mixture.py",
    "log_probs(z, temperature) + jnp.log(share[..., i, None])",
    "len(logits) * share[..., i, None] * log_probs(z, temperature)",
    "tests/methods/test_ensemble.py -k probabilities",
  ),
  Bug(
    "the gate sees no data loss and picks whoever is easiest to imitate",
    "planted",
    f"{METHODS}/ensemble/gate.py",
    "pulled + own, 0.0",
    "pulled, 0.0",
    "tests/methods/test_ensemble.py -k 'its_loss or prefer'",
  ),
  Bug(
    "the policy's reward upside down",
    "planted",
    f"{METHODS}/ensemble/policy.py",
    'gain = stop_gradient((batch.facts["before"] - after) @ weights)',
    'gain = stop_gradient((after - batch.facts["before"]) @ weights)',
    "tests/methods/test_ensemble.py -k rewards",
  ),
  Bug(
    "the most salient blocks chosen",
    "planted",
    "okd_jax/teachers/saliency.py",
    "key=saliency.__getitem__)",
    "key=saliency.__getitem__, reverse=True)",
    "tests/teachers/test_saliency.py",
  ),
  Bug(
    "the stored top k renormalised",
    "stores that keep no tail",
    f"{LOSSES}/sparse.py",
    "return TopK(ids, values, _log_rest(log_p, ids))",
    "return TopK(ids, jax.nn.log_softmax(values), jnp.full(ids.shape[:-1], -1e30))",
    "tests/losses/test_sparse.py",
  ),
  Bug(
    "a store taken whatever it was made of",
    "stores known by their folder's name",
    "okd_jax/runtime/workdir.py",
    "    if found.get(key) != value\n",
    "    if False\n",
    "tests/teachers/test_store.py",
  ),
  Bug(
    "the kept trunk entered a layer too late",
    "planted",
    f"{METHODS}/base/models.py",
    '{"hidden": batch.trunk, "start": start}',
    '{"hidden": batch.trunk, "start": start + 1}',
    "tests/teachers/test_trunk.py -k changes_no_loss",
  ),
  Bug(
    "embeddings fed to the top of a teacher without its trunk",
    "planted",
    "okd_jax/models/transformer.py",
    "if self.only_top and hidden is None:",
    "if False:",
    "tests/teachers/test_trunk.py -k dropped",
  ),
  Bug(
    "the trunk of other rows beside the held-out ones",
    "planted",
    "okd_jax/run/loop.py",
    "self._evaluator = run, Evaluator(run, kept.eval)",
    "self._evaluator = run, Evaluator(run, kept.train)",
    "tests/teachers/test_trunk.py -m slow -k drops",
  ),
  Bug(
    "ULD without the tokens that only one vocabulary has",
    "planted",
    f"{LOSSES}/cross_tokenizer.py",
    "size = max(p.shape[-1], q.shape[-1])",
    "size = min(p.shape[-1], q.shape[-1])\n  p, q = p[..., -size:], q[..., -size:]",
    "tests/methods/test_uld.py -k 'papers or golden'",
  ),
  Bug(
    "an adapter drawn with the random teacher's key",
    "ours",
    "okd_jax/run/state.py",
    "own = jax.random.fold_in(adapter_key, i)",
    "own = adapter_key",
    "tests/run/test_state.py",
  ),
  Bug(
    "virtual tokens decay",
    "ours",
    "okd_jax/run/optim.py",
    "return name in _DECAYED and not (parents and parents[-1] == _VECTORS)",
    "return name in _DECAYED",
    "tests/run/test_optim.py -k decay",
  ),
  Bug(
    "a mixed row's weight is its own alone",
    "ours",
    f"{METHODS}/mixkd.py",
    "weights = own_weight + (1 - share) * other.weights",
    "weights = own_weight",
    "tests/methods/test_mixkd.py",
  ),
  Bug(
    "partly trained: frozen rows of a stack are read from the first on",
    "ours",
    "okd_jax/models/adapters/part.py",
    "row = int(np.sum(rows[:first] == trained))",
    "row = 0 if not trained else int(np.sum(rows[:first] == trained))",
    "tests/models/test_part.py",
  ),
  Bug(
    "partly trained: a LoRA is merged into rounded weights",
    "ours",
    "okd_jax/run/student.py",
    "return adapter.merge(frozen, trained)",
    "return adapter.merge(cast.frozen[STUDENT], trained)",
    "tests/run/test_student.py",
  ),
  Bug(
    "partly trained: the rest is drawn anew when a run goes on",
    "ours",
    "okd_jax/run/student.py",
    "key, tokens = keys(settings.train.seed)[0]",
    "key, tokens = keys(settings.train.seed)[2]",
    "tests/run/test_student.py",
  ),
  Bug(
    "narrower: the least active channels stay",
    "ours",
    "okd_jax/models/narrow.py",
    'np.argsort(-x, axis=-1, kind="stable")',
    'np.argsort(x, axis=-1, kind="stable")',
    "tests/models/test_narrow.py",
  ),
  Bug(
    "held out: twins of held-out rows are trained on",
    "ours",
    "okd_jax/data/hold_out.py",
    "train = rest if same.all() else rest[~same]",
    "train = rest",
    "tests/data/test_hold_out.py",
  ),
  Bug(
    "chat: a student learns to stop where it should call a tool",
    "ours",
    "okd_jax/data/chat.py",
    'answer = {"role": "assistant", **record.final, "content": text}',
    'answer = {"role": "assistant", "content": text}',
    "tests/data/test_conversations.py",
  ),
  Bug(
    "the module's loss of some rows weighed as one of all rows",
    "ours",
    f"{METHODS}/okd.py",
    "first, first.module_weights",
    "first, first.weights",
    "tests/methods/test_rows.py",
  ),
  Bug(
    "micro-batches cut across the groups of which one row teaches",
    "ours",
    "okd_jax/run/step.py",
    "group = max(one_row_in, 1)",
    "group = 1",
    "tests/methods/test_rows.py",
  ),
  Bug(
    "the weights of the rows that teach are those of their neighbours",
    "ours",
    "okd_jax/run/step.py",
    "% one_row_in == 0",
    "% one_row_in == 1",
    "tests/methods/test_rows.py",
  ),
  Bug(
    "a held module moves with the student",
    "ours",
    "okd_jax/run/step.py",
    'if name != "adapter") for names in updates',
    "if name) for names in updates",
    "tests/methods/test_rows.py",
  ),
  Bug(
    "a row's weight grows with the share of its tokens that is left",
    "ours",
    f"{METHODS}/base/token_weights.py",
    "divided = shares * (row / jnp.where(total > 0, total, 1.0))",
    "divided = shares",
    "tests/methods/test_targets.py",
  ),
  Bug(
    "the module's gate weighs the student's tokens, too",
    "ours",
    f"{METHODS}/okd.py",
    "return Part(both, heads, (rows.labels, *shares), larger)",
    "return Part(both, heads, rows.labels, module_weights)",
    "tests/methods/test_targets.py",
  ),
  Bug(
    "a mixed target is a mixture the wrong way round",
    "ours",
    f"{METHODS}/base/targets.py",
    "jnp.stack([share, 1 - share], axis=-1)",
    "jnp.stack([1 - share, share], axis=-1)",
    "tests/methods/test_targets.py",
  ),
  Bug(
    "an anchor that grows where the drift is below its target",
    "ours",
    f"{METHODS}/online_module.py",
    "jnp.exp(_ANCHOR_RATE * error)",
    "jnp.exp(-_ANCHOR_RATE * error)",
    "tests/methods/test_targets.py",
  ),
  Bug(
    "a drafted token is kept although the model would not say it",
    "ours",
    "okd_jax/text/speculative.py",
    "uniform * q[i, drafted] < p[i, drafted]",
    "uniform * p[i, drafted] < q[i, drafted]",
    "tests/text/test_speculative.py",
  ),
  Bug(
    "after a rejected draft a token is drawn from the model's whole distribution",
    "ours",
    "okd_jax/text/speculative.py",
    "rest = jnp.where(rest.sum() > 0, rest, own)",
    "rest = own",
    "tests/text/test_speculative.py",
  ),
  Bug(
    "of a conversation only the last turn is trained",
    "most loaders",
    "okd_jax/data/fit.py",
    "return spans + own, lost",
    "return own, lost",
    "tests/data/test_turns.py",
  ),
  Bug(
    "a message of weight 0 is trained on",
    "TRL, LLaMA-Factory",
    "okd_jax/data/turns.py",
    "return weight is not None and not weight",
    "return False",
    "tests/data/test_turns.py",
  ),
  Bug(
    "a long conversation loses its last turns",
    "TRL",
    "okd_jax/data/turns.py",
    "messages=messages[:start] + messages[stop:]",
    "messages=messages[:stop]",
    "tests/data/test_turns.py",
  ),
  Bug(
    "a hinted teacher is read at the student's places",
    "none yet",
    "okd_jax/data/pack.py",
    'np.flatnonzero(other["mask"])',
    'np.flatnonzero(row["mask"])',
    "tests/methods/test_privileged.py -k 'same_answer or alone'",
  ),
  Bug(
    "gradients go through a teacher that is the student",
    "none yet",
    f"{METHODS}/base/models.py",
    "jax.lax.stop_gradient(own)",
    "own",
    "tests/methods/test_itself.py -k gradient",
  ),
  Bug(
    "kept rows are found by the name of their file",
    "datasets with a fixed cache",
    "okd_jax/data/kept.py",
    "[s.name, s.digest()]",
    "[s.name]",
    "tests/data/test_kept.py -k bytes",
  ),
)


def main(wanted: str) -> int:
  """Tries each bug whose description holds `wanted`; the exit status."""
  bugs = [bug for bug in BUGS if wanted in bug.what]
  caught = []
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "okd_jax"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs"))
    # Reads of ../shared keep working; all else is the copy's own.
    if (ROOT.parent / "shared").exists():
      (Path(folder) / "shared").symlink_to((ROOT.parent / "shared").resolve())
    for tests in dict.fromkeys(bug.tests for bug in bugs):
      if failed := _run(copy, tests):
        print(f"without any bug, {tests} fails already: {failed}", file=sys.stderr)
        return 1
    print("| planted bug | seen in | caught by | s |\n| --- | --- | --- | ---: |")
    for bug in bugs:
      start = time.monotonic()
      failed = _try(copy, bug)
      caught.append(failed)
      print(
        f"| {bug.what} | {bug.seen_in} | {failed or '**nothing**'} "
        f"| {time.monotonic() - start:.0f} |",
        flush=True,
      )
  print(f"\n{sum(map(bool, caught))} of {len(bugs)} caught")
  return int(not all(caught))


def _try(copy: Path, bug: Bug) -> str:
  path = copy / bug.file
  text = path.read_text(encoding="utf8")
  path.write_text(plant(text, bug), encoding="utf8")
  try:
    return _run(copy, bug.tests)
  finally:
    path.write_text(text, encoding="utf8")


def plant(text: str, bug: Bug) -> str:
  """`text` with the bug; an error unless its place is found exactly once."""
  if text.count(bug.old) != 1:
    raise ValueError(f"{bug.what}: {bug.old!r} is {text.count(bug.old)} times there")
  return text.replace(bug.old, bug.new)


def _run(copy: Path, tests: str) -> str:
  """The first test that fails, or ''."""
  command = f"{sys.executable} -m pytest -x -q -n0 -p no:cacheprovider {tests}"
  done = subprocess.run(
    command, shell=True, cwd=copy, capture_output=True, text=True, check=False
  )
  if done.returncode == 0:
    return ""
  if failed := re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.M):
    return f"`{failed[1]}`"
  raise RuntimeError(f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
  sys.exit(main(" ".join(sys.argv[1:])))
