"""What a student can match besides probabilities: the teacher's hidden states and its attention.

Chapter 13 tries both. They say more per position than one distribution, and bind the student to the
teacher's form: equal d_model for hidden states, equally many heads for attention.

Sanh et al. 2019 (arXiv:1910.01108) for the cosine of hidden states; Wang et al. 2020
(arXiv:2002.10957, MiniLM) for the attention of the last layer alone.

Production learns a projection where widths differ, and takes the weights out of the layer instead
of computing them twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.config import require
from slimlab.train.objectives import IGNORE


class Outputs(NamedTuple):
    """What a model says of a batch; what was not asked for is None.

    logits     (..., V)
    hidden     (B, T, D) of the last block
    attention  (B, H, T, S) weights of the last block
    """

    logits: Tensor
    hidden: Tensor | None = None
    attention: Tensor | None = None


def run_model(
    model: nn.Module, inputs: Tensor, given: dict, *, hidden: bool = False, attention: bool = False
) -> Outputs:
    """Run a model and keep what is to be matched.

    model      inputs -> logits; a Decoder, whole on this rank, for hidden or attention
    inputs     of the batch
    given      more for its forward pass
    hidden     return what the last block says
    attention  return the weights of the last block's attention, which is then computed twice
    returns    Outputs

    Raises InputError for a model that cannot show what is asked.
    """
    if not (hidden or attention):
        return Outputs(model(inputs, **given))
    cut = hasattr(model, "tensor_parallel")
    require(
        hasattr(model, "hidden") and not cut,
        "Decoders, each whole on its rank, whose hidden states can be compared",
        f"a {type(model).__name__}{', cut over ranks' if cut else ''}",
        "leave hidden_weight and attention_weight at 0",
    )
    if not attention:
        states = model.hidden(inputs, **given)
        return Outputs(model.logits(states), states)
    require(
        model.recompute == "none" or not model.training,
        'a student that keeps its activations, recompute="none", to match attention',
        f"recompute = {model.recompute!r}",
        'give recompute="none", or leave attention_weight at 0',
    )
    layer, calls = model.blocks[-1].attention, []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        states = model.hidden(inputs, **given)
    finally:
        hook.remove()
    args, kwargs = calls[-1]
    _, weights = layer(*args, **kwargs | {"return_weights": True})
    return Outputs(model.logits(states), states, weights)


def hidden_loss(student_hidden: Tensor, teacher_hidden: Tensor, targets: Tensor) -> Tensor:
    """Add up 1 minus the cosine between hidden states, at all positions that count.

    student_hidden  (..., D)
    teacher_hidden  (..., D)
    targets         (...) IGNORE where a position does not count
    returns         () from 0, all point the same way, to 2 per position

    Raises InputError if the shapes differ.
    Sanh et al. 2019, section 2.
    """
    shapes = [tuple(one.shape) for one in (student_hidden, teacher_hidden)]
    require(
        shapes[0] == shapes[1] and shapes[0][:-1] == tuple(targets.shape),
        "hidden states of equal shape (..., D), and targets (...)",
        f"student {shapes[0]}, teacher {shapes[1]}, targets {tuple(targets.shape)}",
        "give student and teacher the same d_model, or leave hidden_weight at 0",
    )
    counts = targets != IGNORE
    cosines = F.cosine_similarity(student_hidden[counts], teacher_hidden[counts].detach(), dim=-1)
    return (1 - cosines).sum()


def attention_loss(student_weights: Tensor, teacher_weights: Tensor, targets: Tensor) -> Tensor:
    """Add up KL(teacher || student) of attention, averaged over heads, at positions that count.

    student_weights  (B, H, T, S), rows that sum to 1
    teacher_weights  (B, H, T, S)
    targets          (B, T) IGNORE where a position does not count
    returns          () the sum in nats

    Raises InputError if the shapes differ.
    Wang et al. 2020, section 3.1.
    """
    shapes = [tuple(one.shape) for one in (student_weights, teacher_weights)]
    require(
        shapes[0] == shapes[1] and (*shapes[0][:1], shapes[0][2]) == tuple(targets.shape),
        "attention (B, H, T, S) of equally many heads, and targets (B, T)",
        f"student {shapes[0]}, teacher {shapes[1]}, targets {tuple(targets.shape)}",
        "give student and teacher the same num_heads, or leave attention_weight at 0",
    )
    counts, teacher = targets != IGNORE, teacher_weights.detach()
    # Hidden keys have a weight of 0 on both sides: 0 log 0 is 0, and so is its gradient.
    tiny = torch.finfo(student_weights.dtype).tiny
    terms = torch.xlogy(teacher, teacher) - teacher * student_weights.clamp_min(tiny).log()
    return terms.sum(dim=-1).mean(dim=1)[counts].sum()
