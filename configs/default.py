"""Every configuration key, with its default; recipes change some of them.

A key is set on the command line as --config.section.key=value. Keys that are not
listed here do not exist, and naming one is an error.
"""

import importlib
import inspect

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
  config = ConfigDict()

  # Runs that come first, by name: each maps to the keys in which it differs from this
  # file and this run's data, train, optim, mesh, checkpoint and eval (but not best and
  # patience). 'stage:NAME' as a path below means what stage NAME exported.
  config.stages = ConfigDict(sort_keys=False)

  config.teacher = ConfigDict()
  # HF folder, hub id, .gguf file or a finished run's workdir; or 'student': the student
  # itself, with a module (okd) or a prompt of its own (teacher_prompt).
  config.teacher.path = ""
  config.teacher.adapter = ""  # LoRA to add to it: a PEFT folder or a finished run
  # What `python -m okd_jax.cache_teacher` stored: read in place of the teacher.
  config.teacher.cache = ""
  # With adapter.layers=k: keep what enters the top k layers, 'memory' or a folder, so
  # that the layers below run once for every row and then leave the devices.
  config.teacher.trunk = ""
  # dtype of its frozen weights; '' is train.dtype. int8: of its layers' kernels, with a
  # scale for each output channel: half of bfloat16's memory, and what it costs is told.
  config.teacher.dtype = ""
  config.teacher.model = _random_model()  # at random; its keys: see student.model

  # Several teachers for method ensemble, each a name and a path; all others leave it
  # empty. On the command line: --config.teachers.NAME=PATH.
  config.teachers = ConfigDict()

  config.student = ConfigDict()
  config.student.path = ""  # start from this model, or …
  config.student.layers = 0  # … from so many layers of the teacher, or …
  config.student.which_layers = "even"  # these: 'even', 'top', 'bottom' or '0,3,7'
  # Of each of these, or of all the teacher's layers, this share of the heads and MLP
  # channels: those that are most active in a few training rows.
  config.student.width = 1.0
  config.student.model = _random_model()  # … at random with these dimensions
  # Trained in part: what this regular expression is found in, stays as it is. Names are
  # such as 'embed/embedding' and 'layers/3/mlp/up/kernel'; 'embed|layers/[0-5]/'.
  config.student.frozen = ""
  config.student.dtype = ""  # of weights that stay; '' is float32, int8 is for lora's
  config.student.adapter = ConfigDict()
  # lora: train this alone, and none of the student's own weights. The run exports the
  # student with it merged in, and the module for PEFT as student_adapter/.
  config.student.adapter.kind = ""
  config.student.adapter.rank = 32
  config.student.adapter.scale = 1.0  # factor on the module's output
  config.student.adapter.targets = ("query", "value")  # also key, out, gate, up, down
  config.student.adapter.layers = 0  # 0: all layers, k: the top k

  config.method = ConfigDict()
  config.method.name = "okd"  # a key of okd_jax.METHODS
  # A Python file that registers methods or divergences of your own; their knobs are
  # keys here, too (docs/your_own_method.md).
  config.method.file = ""
  config.method.temperature = 1.0  # divides logits; losses are multiplied by its square
  config.method.gold_weight = 0.0  # all: adds so much CE on gold to the student's loss
  config.method.kd_ratio = 1.0  # kd, rkd, …: weight of the divergence, the rest is CE
  config.method.top_k = 0  # kd, rkd, …: the teacher's top k and a bucket; 0 is all
  # okd, kd, gkd, …: what a token weighs in the student's loss, beside others of its
  # row: 'entropy' (the teacher's), 'divergence' (KL from teacher to student) or
  # 'top:0.2', a fifth of each row's tokens, those of the largest KL; '' is equally.
  config.method.token_weight = ""
  # okd, kd, gkd, …: the student's own share in the logits it learns from; with
  # end.student_mix=0 a target that moves from it to the teacher (TAID).
  config.method.student_mix = 0.0
  config.method.student_mix_adapts = False  # faster while the divergence falls
  # The student's divergence, from its teacher: forward_kl, reverse_kl, jensen_shannon,
  # skew_forward_kl, skew_reverse_kl, total_variation, adaptive_kl, weighted_kl or
  # alpha_beta. '' is the method's own: jensen_shannon for gkd, skew_reverse_kl for
  # distillm, total_variation for fdistill, else forward_kl.
  config.method.divergence = ""
  config.method.cross_tokenizer = ""  # kd: 'uld' lets the teacher have other tokens
  config.method.beta = 0.5  # jensen_shannon: weight of the teacher's side (GKD's beta)
  config.method.normalize = False  # jensen_shannon: divide it by beta (1 - beta)
  config.method.skew = 0.1  # skew KLs: the share of the first argument in the mixture
  config.method.head_mass = 0.5  # adaptive_kl: the teacher's mass that counts as head
  config.method.forward_share = 0.5  # weighted_kl: of KL(p||q), the rest is KL(q||p)
  config.method.ab_alpha = 0.2  # alpha_beta; (1, 0) is forward_kl, (0, 1) reverse_kl
  config.method.ab_beta = 0.7  # likewise
  config.method.teacher_divergence = "forward_kl"  # okd: student to adapted teacher
  config.method.teacher_kl_weight = 0.25  # okd: alpha, the module's pull to the student
  config.method.student_kl_weight = 1.0  # okd: the rest is CE on gold for the student
  config.method.anchor_weight = 0.0  # okd: the module's pull to the frozen teacher
  # okd: moves that pull so that the adapted teacher stays so many nats from the frozen
  # one (KL); 0 leaves it as it is.
  config.method.drift_target = 0.0
  # okd: the adapted teacher's share in what the student learns from; the rest is the
  # frozen one's, read in every row.
  config.method.target_mix = 1.0
  config.method.target_kind = "arithmetic"  # okd: of that mixture, or 'geometric'
  config.method.update_order = "simultaneous"  # okd: or 'sequential', the module first
  config.method.rank_k = 5  # rlkd: ranks each model's so many likeliest tokens
  config.method.rank_temperature = 1.0  # rlkd: of soft ranks; towards 0 the true ones
  config.method.rank_divisor = 2.0  # rlkd: the divergence is divided by it
  config.method.mix_alpha = 0.4  # mixkd: lambda is drawn from Beta(alpha, alpha)
  config.method.mix_kd_weight = 1.0  # mixkd: of the divergence on mixed rows
  config.method.mix_gold_weight = 1.0  # mixkd: of CE on mixed rows
  # Text that is sampled for training. What is not set is the method's own. "Student's"
  # below is the teacher's, too, where answers are written before training.
  config.method.sampled_share = config_dict.placeholder(float)  # of the steps; gkd 0.5
  config.method.max_new_tokens = 0  # of an answer; 0: what fits beside the prompt
  config.method.sample_temperature = config_dict.placeholder(float)  # student's; 1
  config.method.sample_top_p = config_dict.placeholder(float)  # student's; 1
  config.method.sample_top_k = 0  # student's; 0 is all
  config.method.teacher_temperature = 0.2  # skd: of the teacher's tokens
  config.method.teacher_top_p = 0.5  # skd
  config.method.accept_top = 25  # skd: the teacher's tokens the student's must be among
  config.method.replay = False  # gkd: train on rows drawn from those sampled so far
  config.method.replay_capacity = 1000  # rows kept, the newest
  config.method.replay_ratio = "decreasing"  # distillm: or 'constant', 'increasing'
  config.method.loss_eps = 0.1  # distillm: rise of the held-out loss that asks for more
  config.method.variant = "code"  # minillm: as the authors' code, or the 'paper'
  config.method.teacher_mix = 0.2  # minillm: the teacher's share of each distribution
  config.method.ppo_clip = 0.2  # minillm: how far a ratio may leave 1
  config.method.length_norm = True  # minillm: returns over the steps they sum
  config.method.single_step = True  # minillm: the exact single-step term
  config.method.updates_per_sample = 4  # minillm: steps on one sampled batch
  config.method.exact_mixture = False  # fdistill: jensen_shannon's true mixture
  config.method.contrast = 1.0  # distillm2: b of the student's text, 2 - b the other
  config.method.pull_weight = 1.0  # promptkd: towards the frozen teacher; falls to 0
  config.method.weighting = "mean"  # ensemble: or 'gated', 'reinforced'
  config.method.teacher_weights = ()  # ensemble, mean: by the names' order; (): equal
  config.method.gate_per = "token"  # ensemble, gated: or 'example'
  config.method.gate_lr = 1e-3  # ensemble: learning rate of gate or policy
  config.method.reward = "gold"  # ensemble, reinforced: or 'gold_and_teachers'
  config.method.seqkd_ratio = 0.0  # seqkd: weight of the divergence, the rest is CE
  fixed = {"ab_alpha", "ab_beta", "teacher_mix", "loss_eps", "drift_target"}
  fixed |= {"teacher_temperature", "teacher_top_p", "gate_lr"}
  numbers = [k for k, v in config.method.items() if isinstance(v, float)]
  # Knobs that move: the value each reaches, linearly, at the last step. Those of the
  # above that weigh or shape a loss: --config.method.end.temperature=1 and so on.
  config.method.end = ConfigDict()
  for knob in ["sampled_share", *numbers]:
    if knob not in fixed:
      config.method.end[knob] = config_dict.placeholder(float)

  config.adapter = ConfigDict()
  # The online module of methods that adapt the teacher: lora, prefix (keys and values
  # in each layer), prompt (input vectors before the text, P-tuning) or blocks (the
  # teacher's own least salient layers; exported as a whole model in teacher/, not as
  # adapter/). '' is lora for okd, prompt for promptkd, blocks for clda and none for the
  # others, whose teacher is frozen; naming one lets their teacher learn as okd's does.
  config.adapter.kind = ""
  config.adapter.rank = 32  # lora
  config.adapter.scale = 1.0  # lora: factor on the module's output
  config.adapter.targets = ("query", "value")  # lora: also key, out, gate, up, down
  config.adapter.length = 16  # prefix, prompt: virtual tokens
  # prompt: start from this text's embeddings, trained as they are; '' starts at random
  # and trains P-tuning's MLP. PromptKD's is "Suppose you are a student.", length 7.
  config.adapter.text = ""
  config.adapter.share = 0.25  # blocks: the share of the teacher's layers, above 0
  config.adapter.layers = 0  # 0: all layers, k: the top k
  config.adapter.teachers = ()  # of several teachers, those that carry it; (): all
  config.adapter.lr_scale = 1.0  # the module's learning rate over the student's
  # Cheaper: the share of the rows that teach the module, 1, 0.5, 0.25, 0.125 and so on;
  # it teaches the student in every row and step all the same.
  config.adapter.rows = 1.0
  config.adapter.every = 1  # k: it learns in every k-th step
  config.adapter.until = 1.0  # it learns until this share of the steps is done
  # Of these rows, the tokens that teach it: 'top:0.2', a fifth of each row's tokens,
  # those with the largest KL from teacher to student; '' is all of them.
  config.adapter.tokens = ""

  config.data = ConfigDict()
  # A file, folder, pattern or dataset id, several by commas, or in Python as a list.
  config.data.train = "embedded"
  config.data.eval = ""  # likewise; '' holds out rows of data.train
  # What rows of both call our keys: --config.data.columns.prompt=question. A dot goes
  # into objects: answers.text. '' takes back a name that a recipe has given.
  config.data.columns = ConfigDict()
  config.data.holdout = 64  # so many of them, of each source its share
  config.data.holdout_seed = 0  # of their draw; its own, so that seeds share the rows
  config.data.tokenizer = ""  # '' the teacher's, a model, 'bytes' or 'bpe:N' (trained)
  config.data.template = "default"  # alpaca, chat, a file, or text with {instruction}
  config.data.max_length = 512  # tokens of prompt and response together
  config.data.max_prompt_length = 256
  config.data.overlong_prompt = "drop"  # or 'truncate': keep its last tokens
  config.data.overlong_row = "truncate"  # or 'drop'
  # Put as many texts into a row of max_length as fit; they do not see one another. An
  # epoch is then fewer and fuller steps. Not for methods that answer prompts or look
  # at rows as wholes: mixkd, an ensemble weighted by rows, cross_tokenizer.
  config.data.pack = False
  config.data.turns = "all"  # of a conversation, train on all answers, or the 'last'
  config.data.chat_template = ""  # a jinja file, in place of the tokenizer's own
  # The teacher's own template, '' for the same; {output} in it is the row's answer.
  # Rows may also hold what it is to read: teacher_prompt, teacher_messages.
  config.data.teacher_template = ""
  config.data.max_teacher_length = 0  # of a row that the teacher reads; 0: max_length
  config.data.num_proc = 0  # processes that tokenise many rows; 0: as many as CPUs
  # What `python -m okd_jax.prepare` wrote, gs:// and the like, too: read in place of
  # data.train, and of data.eval where that was prepared.
  config.data.prepared = ""
  # Texts of data.train are read while they are trained on, and never all in memory or
  # on disk; short ones share rows. Needs train.steps and data.eval.
  config.data.stream = False

  config.train = ConfigDict()
  config.train.steps = 0  # 0: use train.epochs
  config.train.epochs = 1.0
  config.train.batch_size = 8  # rows a step, over all devices
  config.train.microbatches = 1  # parts of a batch whose gradients are added up
  config.train.seed = 0
  config.train.dtype = "float32"  # of activations and matmuls, or 'bfloat16'
  config.train.remat = False  # recompute activations in the backward pass
  # xla, cudnn (NVIDIA, bfloat16 or float16) or splash (TPU); '' is the platform's own
  # where it can compute what is asked, xla elsewhere. With a cache it is always xla.
  config.train.attention = ""
  config.train.dropout = 0.0  # on the student's embeddings and residual branches
  # Positions a row whose logits are in memory at once; 0: as many as fit some MB.
  config.train.loss_chunk = 0
  config.train.log_every = 10  # steps between rows of metrics.jsonl
  # Where a loss, a gradient or an update is not finite: 'stop', or 'skip:N', leave that
  # update out, of every tree, and stop after N of them in the whole run.
  config.train.on_nonfinite = "stop"
  config.train.tensorboard = False  # also write TensorBoard files
  config.train.wandb = ""  # also log to this Weights & Biases project

  config.optim = ConfigDict()
  config.optim.lr = 5e-4  # peak learning rate
  config.optim.end_lr = 1e-7  # what cosine and linear end at
  config.optim.schedule = "cosine"  # or 'linear', 'constant'
  config.optim.warmup_steps = 0
  config.optim.weight_decay = 1e-2  # on matrices only
  config.optim.clip = 1.0  # global gradient norm of each trained tree; 0 is off
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  # Of Adam's first moment: '' is float32, as the weights are; 'bfloat16' leaves 10 of
  # the 12 bytes that a trained weight and its two moments take.
  config.optim.dtype = ""

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 500  # steps; one is always written at the end
  config.checkpoint.keep = 2  # the newest so many, and the best
  # Go on from checkpoints that other versions of the packages have written: the run
  # then does not end as it would have.
  config.checkpoint.any_version = False

  config.eval = ConfigDict()
  config.eval.every = 500  # steps; always at the start and at the end; 0: only these
  config.eval.limit = 0  # first so many rows; 0 is all
  config.eval.batch_size = 8
  config.eval.generate = True  # also answer the prompts and score ROUGE-L
  config.eval.generate_limit = 0  # prompts answered; 0 is as many as eval.limit
  config.eval.max_new_tokens = 128
  config.eval.temperature = 0.0  # 0 is greedy
  # Export the best step by this metric, '' the last. A distillation loss, forward_kl or
  # reverse_kl, needs no labels (Zhu et al. 2020, arXiv 2011.04106).
  config.eval.best = ""
  config.eval.patience = 0  # stop when so many evaluations brought no better; 0: never

  config.export = ConfigDict()
  config.export.dtype = "float32"  # of the student's weights on disk
  config.export.license = ""  # in its README.md; '' is that of the model it starts from

  config.mesh = ConfigDict()
  config.mesh.data = -1  # copies of the model; -1: all devices the others leave
  config.mesh.fsdp = 1  # ways that weights and optimiser state are split
  config.mesh.tensor = 1  # ways that each matmul is split
  # Frozen teachers under fsdp: 'replicate' keeps a copy on every device, 'fsdp' splits
  # them and gathers each layer when it runs; 'auto' copies what takes at most 40 % of a
  # device's memory.
  config.mesh.teacher = "auto"
  for key in ("train", "eval"):  # whose type would not let a list in
    text = config.data[key]
    del config.data[key]
    config.data[key] = config_dict.FieldReference(text, field_type=object)
  config.lock()
  config.stages.unlock()  # recipes add theirs
  config.teachers.unlock()
  config.data.columns.unlock()
  return config


def _random_model() -> ConfigDict:
  model = ConfigDict()
  model.family = "llama"  # a model_type of docs/models.md: 'gpt2', 'qwen3', …
  model.hidden_size = 0  # 0: no random model is wanted
  model.num_layers = 2
  model.num_heads = 4
  model.num_kv_heads = 0  # 0: as many as num_heads
  model.mlp_size = 0  # 0: four times hidden_size
  model.max_length = 1024  # tokens
  model.tie_embeddings = True
  return model


def for_chats(config: ConfigDict) -> None:
  """What recipes of instruction-tuned models of some billion parameters share."""
  config.data.train = "databricks/databricks-dolly-15k"
  config.data.template = "chat"
  config.data.holdout = 500
  config.data.max_length = 1024
  config.data.max_prompt_length = 768
  config.adapter.rows = 0.25
  config.train.epochs = 3.0
  config.train.batch_size = 32
  config.train.dtype = "bfloat16"
  config.train.remat = True
  config.optim.lr = 1e-5
  config.optim.warmup_steps = 40
  config.optim.weight_decay = 0.0
  config.checkpoint.every = 200
  config.eval.every = 400
  config.eval.generate_limit = 64
  config.eval.max_new_tokens = 256
  config.mesh.data = 1
  config.mesh.fsdp = -1


def recipe(name: str) -> ConfigDict:
  """The configuration of another file here: 'quickstart', or 'gpt2.medium'."""
  file, _, variant = name.partition(".")
  try:
    get_config = importlib.import_module(f"configs.{file}").get_config
  except (AttributeError, ImportError) as error:
    raise ValueError(f"{name}: there is no recipe configs/{file}.py") from error
  if variant and not inspect.signature(get_config).parameters:
    raise ValueError(f"{name}: configs/{file}.py has no variants")
  return get_config(variant) if variant else get_config()


def use(config: ConfigDict, name: str, **knobs) -> None:
  """Gives a recipe this method; what it had set for another one goes with that."""
  if config.method.name != name:
    config.method.update(get_config().method.to_dict())
  config.method.update({"name": name, **knobs})
