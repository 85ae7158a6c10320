"""How good is a student? Loss, distance to its teacher, and answers scored by ROUGE-L.

    python -m okd_jax.evaluate --model=M --data=F.jsonl [--teacher=T]

The functions here also serve evaluation during training, so both report the same.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from okd_jax import cli
from okd_jax.data import (
  PAD_ID,
  Example,
  compare_tokenizers,
  eval_batches,
  load_records,
  prepare,
  stop_ids,
)
from okd_jax.errors import UserError
from okd_jax.files import write_text
from okd_jax.losses import (
  Mean,
  TokenLoss,
  cross_entropy,
  forward_kl,
  mixture,
  reverse_kl,
  top1_agreement,
  unembed,
  weighted_sums,
)
from okd_jax.methods import stored
from okd_jax.metrics import table
from okd_jax.models import Decoder, Model, ModelConfig, load, output
from okd_jax.models.transformer import head_kernel, init_cache
from okd_jax.rollout import Sampling, decoder_source, generate
from okd_jax.score import score

COLUMNS = {
  "loss": "loss",
  "perplexity": "perplexity",
  "forward_kl": "KL(teacher‖·)",
  "reverse_kl": "KL(·‖teacher)",
  "top1_agreement": "top-1 %",
  "rougeL": "ROUGE-L",
  "exact_match": "exact match",
}


def token_metrics(
  logits: Mapping[str, jax.Array], labels, *, teacher_weights: Sequence[float] = ()
) -> tuple:
  """Per-token figures of 'student' beside 'teacher' and 'adapted', where given.

  Of several teachers, 'teacher:NAME', each has its own, and 'the teacher' is their
  mean in probability space by `teacher_weights`, in the order of the names; () is
  equal, as it is under a gate or a policy, which move. A `TokenLoss`: its loss is the
  student's cross-entropy.
  """
  student = logits["student"]
  metrics = {"loss": cross_entropy(student, labels)}
  several = {role: z for role, z in sorted(logits.items()) if ":" in role}
  for role, z in several.items():  # 'teacher:NAME' and 'adapted:NAME'
    kind, _, name = role.partition(":")
    prefix = name if kind == "teacher" else f"{name}_{kind}"
    metrics[f"{prefix}_loss"] = cross_entropy(z, labels)
    metrics[f"{prefix}_forward_kl"] = forward_kl(z, student)
  if teachers := [z for role, z in several.items() if role.startswith("teacher:")]:
    weights = jnp.array(teacher_weights or [1.0] * len(teachers))
    weights = jnp.broadcast_to(weights, (*labels.shape, len(teachers)))
    logits = dict(logits) | {"teacher": mixture(teachers, weights)}
  if "teacher" in logits:
    teacher = logits["teacher"]
    metrics |= {
      "forward_kl": forward_kl(teacher, student),
      "reverse_kl": reverse_kl(teacher, student),
      "top1_agreement": 100 * top1_agreement(teacher, student),
      "teacher_loss": cross_entropy(teacher, labels),
    }
  if "adapted" in logits:
    adapted = logits["adapted"]
    metrics |= {
      "adapted_forward_kl": forward_kl(adapted, student),
      "adapted_loss": cross_entropy(adapted, labels),
      "adapted_drift": forward_kl(logits["teacher"], adapted),
    }
  return metrics["loss"], metrics


def stored_metrics(logits, labels, *, temperature: float) -> tuple:
  """As `token_metrics`, beside a teacher of whom there is what it said (`stored`).

  labels: (the gold tokens, what was stored at temperature T). The KLs are those of the
    K + 1 buckets, so they are bounds from below; at T other than 1 there are none.
  """
  gold, said = labels
  student = logits["student"]
  found = stored.figures(student, said, temperature)
  metrics = {"loss": cross_entropy(student, gold), "teacher_loss": found["teacher_nll"]}
  metrics["top1_agreement"] = 100 * found["top1_agreement"]
  metrics |= {k: found[k] for k in ("forward_kl", "reverse_kl") if k in found}
  return metrics["loss"], metrics


def compile_token_step(
  decoders: Mapping[str, Decoder],
  chunk: int,
  metrics: TokenLoss = token_metrics,
  vocab_size: int | None = None,
) -> Callable:
  """A jitted (variables by role, batch) -> (sums of `metrics`, tokens).

  vocab_size: ids that count, where a stored teacher knows fewer than the student.
  """

  def step(variables, batch):
    outputs = {
      role: output(decoder, variables[role], batch)
      for role, decoder in decoders.items()
    }
    size = vocab_size or min(o.head.shape[0] for o in outputs.values())
    outputs = {role: o._replace(head=o.head[:size]) for role, o in outputs.items()}
    weights, labels = batch["mask"].astype(jnp.float32), batch["labels"]
    if "stored" in batch:
      labels = labels, batch["stored"]
    _, sums = weighted_sums(metrics, outputs, labels, weights, chunk)
    return sums, weights.sum()

  return jax.jit(step)


def evaluate_tokens(
  step: Callable, variables: Mapping, batches: Iterable, put: Callable = jnp.asarray
) -> dict[str, float]:
  """Global token means over the batches, and the perplexity, exp(loss)."""
  means: dict[str, Mean] = {}
  for batch in batches:
    arrays = {name: put(rows) for name, rows in batch.items()}
    sums, count = jax.device_get(step(variables, arrays))
    for name, total in sums.items():
      mean = Mean(float(total), float(count))
      means[name] = means[name] + mean if name in means else mean
  metrics = {name: mean.compute() for name, mean in means.items()}
  return metrics | {"perplexity": perplexity(metrics["loss"])}


def perplexity(loss: float) -> float:
  """exp(loss); beyond e^700, where a float overflows, as good as infinite."""
  return math.exp(loss) if loss < 700 else math.inf


def source_of(decoder: Decoder):
  """What `rollout.generate` samples a decoder through."""
  return decoder_source(decoder, init_cache, head_kernel, unembed)


def answer(
  decoder: Decoder,
  variables,
  examples: Sequence[Example],
  tokenizer,
  *,
  template: str,
  max_new_tokens: int,
  temperature: float = 0.0,
  seed: int = 0,
  batch_size: int = 8,
  sharding=None,
) -> list[str]:
  """The model's answer to each example's prompt, cut at EOS, special tokens removed."""
  completions = generate(
    source_of(decoder),
    variables,
    [example.tokens[: example.prompt_length] for example in examples],
    jax.random.key(seed),
    max_new_tokens=max_new_tokens,
    sampling=Sampling(temperature=temperature),
    eos_ids=sorted({*decoder.config.eos_ids, *stop_ids(tokenizer, template)}),
    batch_size=batch_size,
    sharding=sharding,
  )
  return [
    tokenizer.decode(completion.tokens, skip_special_tokens=True)
    for completion in completions
  ]


def check_vocabulary(configs: Mapping[str, ModelConfig], examples) -> None:
  """Raises a UserError if a row holds a token that one of the models does not have."""
  largest = max(int(example.tokens.max()) for example in examples)
  for name, config in configs.items():
    if largest >= config.vocab_size:
      raise UserError(
        f"the data holds token id {largest}, but {name} has only {config.vocab_size} "
        "ids; its tokenizer is not the one it was trained with"
      )


def answerable(examples: Sequence[Example]) -> list[Example]:
  """Those with a prompt and at least one reference answer."""
  return [e for e in examples if e.prompt_length and e.references]


def mean_and_std(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Means over seeds; with several seeds, NAME_std beside each."""
  merged = {}
  for name in ("rougeL", "exact_match"):
    values = [s[name] for s in scores]
    merged[name] = statistics.fmean(values)
    if len(values) > 1:
      merged[f"{name}_std"] = statistics.stdev(values)
  return merged


def main(arguments: list[str]) -> None:
  """Evaluates as the arguments say; a UserError for whatever is wrong with them."""
  args = _parser().parse_args(arguments)
  cli.use_compilation_cache()
  model = load(args.model, dtype=args.dtype)
  teacher = load(args.teacher, dtype=args.dtype) if args.teacher else None
  _check(args, model, teacher)
  _fit(args, model, teacher)
  records = load_records(args.data.split(","))[: args.limit or None]
  examples, _ = prepare(
    records,
    model.tokenizer,
    template=args.template,
    max_length=args.max_length,
    max_prompt_length=args.max_prompt_length,
    overlong_prompt="truncate",  # never dropped: predictions stay beside their rows
    overlong_row="truncate",
  )
  examples = examples[: args.limit or None]
  check_vocabulary({args.model: model.config} | _config_of(args, teacher), examples)
  results = {"n": len(examples)}
  results |= _token_results(args, model, teacher, examples)
  prompts = answerable(examples)
  if prompts and args.max_new_tokens:
    results |= _text_results(args, model, prompts)
  print(table({Path(args.model).name or args.model: results}, COLUMNS))
  if args.output:
    write_text(args.output, json.dumps(_jsonable(results), indent=2) + "\n")


def _config_of(args, teacher: Model | None):
  return {args.teacher: teacher.config} if teacher else {}


def _token_results(args, model: Model, teacher: Model | None, examples):
  models = {"student": model} | ({"teacher": teacher} if teacher else {})
  dtype = jnp.dtype(args.dtype)
  step = compile_token_step(
    {role: Decoder(m.config, dtype=dtype) for role, m in models.items()}, chunk=0
  )
  batches = eval_batches(
    examples,
    batch_size=args.batch_size,
    length=_width(examples),
    pad_id=PAD_ID,
  )
  variables = {role: {"params": m.params} for role, m in models.items()}
  return evaluate_tokens(step, variables, batches)


def _width(examples) -> int:
  """The longest row, rounded up so that few shapes are compiled."""
  longest = max(len(example.tokens) for example in examples)
  return -(-longest // 64) * 64


def _text_results(args, model: Model, prompts):
  seeds = args.seeds if args.temperature else args.seeds[:1]
  decoder = Decoder(model.config, dtype=jnp.dtype(args.dtype))
  scores, first = [], None
  for seed in seeds:
    texts = answer(
      decoder,
      {"params": model.params},
      prompts,
      model.tokenizer,
      template=args.template,
      max_new_tokens=args.max_new_tokens,
      temperature=args.temperature,
      seed=seed,
      batch_size=args.batch_size,
    )
    scores.append(score(texts, [list(p.references) for p in prompts]))
    first = first or texts
    print(f"seed {seed}: ROUGE-L {scores[-1]['rougeL']:.2f}", file=sys.stderr)
  if args.predictions:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in first)
    write_text(args.predictions, "".join(line + "\n" for line in lines))
  return mean_and_std(scores) | {"seeds": list(seeds)}


def _fit(args, model: Model, teacher: Model | None) -> None:
  """Fills in what was not asked for, so that all of it fits the models' context."""
  own = model.config.max_length
  context = min(own, teacher.config.max_length) if teacher else own
  if args.max_new_tokens is None:
    args.max_new_tokens = min(256, own // 2)
  if args.max_length is None:
    args.max_length = min(1024, context)
  room = min(own - args.max_new_tokens, args.max_length - 1)
  if args.max_prompt_length is None:
    args.max_prompt_length = max(1, min(512, room))
  if args.max_length > context:
    raise UserError(f"--max_length={args.max_length}, but a model takes only {context}")
  if args.max_prompt_length > room:
    raise UserError(
      f"--max_prompt_length={args.max_prompt_length} leaves no room: {args.model} "
      f"takes {own} tokens, --max_length is {args.max_length} and --max_new_tokens "
      f"{args.max_new_tokens}"
    )
  if args.template is None:
    args.template = template_of(args.model)


def template_of(path: str) -> str:
  """The template that a run's student was trained with, else 'default'."""
  config = Path(path) / "config.json"
  if (Path(path) / "student").is_dir() and config.is_file():
    return json.loads(config.read_text(encoding="utf8"))["data"]["template"]
  return "default"


def _jsonable(results: Mapping) -> dict:
  """Figures that are not finite become null: JSON has no NaN."""
  bad = {k for k, v in results.items() if isinstance(v, float) and not math.isfinite(v)}
  return {k: None if k in bad else v for k, v in results.items()}


def _check(args, model: Model, teacher: Model | None) -> None:
  if model.tokenizer is None:
    raise UserError(f"{args.model} has no tokenizer; evaluation needs one")
  if teacher is not None and teacher.tokenizer is not None:
    remedy = "the two cannot be compared token by token: leave out --teacher"
    compare_tokenizers(teacher.tokenizer, model.tokenizer, remedy)
  for name, least in (
    ("temperature", 0),
    ("max_new_tokens", 0),
    ("limit", 0),
    ("batch_size", 1),
    ("max_length", 2),
    ("max_prompt_length", 1),
  ):
    value = getattr(args, name)
    if value is not None and not value >= least:
      raise UserError(f"--{name}={value} must be at least {least}")


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.evaluate",
    description="Scores a model on held-out data: loss, perplexity and ROUGE-L; "
    "beside a teacher also the KL divergences and how often their first choices agree.",
  )
  add = parser.add_argument
  add("--model", required=True, help="HF folder, hub id, .gguf file or run's workdir")
  add("--data", required=True, help="jsonl(.gz) or .txt file, or a dataset id")
  add("--teacher", default="", help="a model to compare with token by token")
  add("--temperature", type=float, default=0.0, help="of the answers; 0 is greedy")
  add(
    "--seeds",
    type=lambda text: [int(seed) for seed in text.split(",")],
    default="10,20,30,40,50",
    help="sample the answers once a seed; greedy answers need one only",
  )
  add(
    "--max_new_tokens", type=int, help="of an answer, 0: none; by default 256 or fewer"
  )
  add("--limit", type=int, default=0, help="first so many rows; 0 is all")
  add("--predictions", default="", help="write the first seed's answers to this jsonl")
  add("--output", default="", help="write the results to this JSON file")
  add("--template", help="as data.template; by default the run's own, or 'default'")
  add("--max_length", type=int, help="tokens of a row; by default 1024 or what fits")
  add(
    "--max_prompt_length",
    type=int,
    help="longer prompts lose their start; by default 512 or what fits",
  )
  add("--batch_size", type=int, default=8, help="rows at once")
  add(
    "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the matmuls"
  )
  return parser


if __name__ == "__main__":
  cli.run(main)
