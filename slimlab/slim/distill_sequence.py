"""Sequence-level distillation: the student reads what the teacher writes, and nothing else.

Chapter 13 uses it. The divergence between probabilities of whole texts is out of reach, but its
largest part is one text: the one that the teacher would write. So the teacher continues prompts,
and the student is trained on that with the ordinary objective. No logits are needed, so teacher and
student may have different vocabularies: decode with one tokenizer, encode with the other.

Kim and Rush 2016 (arXiv:1606.07947), section 3.2.

The paper takes the best text that beam search finds; here it is the greedy one, or several drawn at
a temperature. Production filters such texts before it trains on them.
"""

import torch
from torch import Tensor, nn

from slimlab.config import require
from slimlab.model.generation import generate
from slimlab.train.objectives import IGNORE


def sequence_batch(
    teacher: nn.Module,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    sampling_temperature: float = 0.0,
    seed: int | None = None,
    stop_id: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Let a teacher continue prompts, and make of that what causal_objective takes.

    teacher               a Decoder; its mode is as before afterwards
    prompts               (B, P) token ids, P at least 1
    max_new_tokens        that it writes at most
    sampling_temperature  0: the likeliest token each time; 1: drawn as the teacher says
    seed                  of the draws
    stop_id               token that ends a text; what stands behind it does not count
    returns               inputs and targets (B, P + new - 1); targets inside the prompts and behind
                          a text's end are IGNORE

    Raises InputError as slimlab.model.generation.generate does.
    Kim and Rush 2016, section 3.2.
    """
    require(
        isinstance(prompts, Tensor) and prompts.dim() == 2 and prompts.shape[1] >= 1,
        "prompts (sequences, positions), at least one token each",
        f"{tuple(prompts.shape) if isinstance(prompts, Tensor) else type(prompts).__name__}",
        "give torch.tensor([tokenizer.encode(text)])",
    )
    texts = generate(
        teacher,
        prompts,
        max_new_tokens,
        temperature=sampling_temperature,
        seed=seed,
        stop_id=stop_id,
    )
    first_new = prompts.shape[1]
    targets = texts[:, 1:].clone()
    targets[:, : first_new - 1] = IGNORE
    if stop_id is not None:
        stops = (texts[:, first_new:] == stop_id).int()
        ended = torch.cumsum(stops, dim=1) - stops > 0  # a stop stands before this place
        targets[:, first_new - 1 :].masked_fill_(ended, IGNORE)
    return texts[:, :-1], targets
