"""CLDA-style co-adaptation: the teacher's own least used blocks learn from the student.

After the abstract of "Collaborative Learning for Enhanced Unsupervised Domain
Adaptation", 2024, arXiv 2409.02699, on semantic segmentation: under a domain shift many
teacher parameters are not salient; the student updates the layers that hold them, and
the better teacher distils back. We know of no published formula, for no loss, saliency
or schedule. So this is our language-model analogue of the idea, and a result of it
must never be reported as the paper's. What we chose:

    loss      OKD's, both sides (`okd`): no term of the paper's
    saliency  S_b = mean over the parameters theta of block b of |theta dCE/dtheta|
    trained   the `adapter.share` of the blocks with the smallest S_b

- A block is a whole layer: attention, MLP and norms. Embeddings, final norm, head and
  all other blocks stay bit-identical.
- CE is the plain teacher's on the run's held-out rows, all of them in one gradient, so
  that S_b depends on no batch size (`saliency`).
- The blocks are chosen once, before step 0: a later choice would need float32 copies
  and moments of every block that was ever chosen, and this way they are as few as the
  share says. `blocks.json` in the workdir keeps the choice.
- A share of 0 is refused rather than made forward KD, which is `kd`; 1 trains every
  block.
- Weight decay pulls the trained matrices to 0, as in any fine-tuning by AdamW, not to
  where they began.

With another `adapter.kind` this is okd, and with `adapter.kind=blocks` any method has
such a teacher.
"""

import dataclasses

from okd_jax.methods import okd
from okd_jax.methods.base import Method


def build(knobs: okd.Knobs) -> Method:
  """OKD whose adapters are blocks of the teacher unless adapter.kind says other."""
  return dataclasses.replace(okd.build(knobs), adapter="blocks")
