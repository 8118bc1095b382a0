"""How weights begin.

Chapter 03 follows a signal through untrained blocks. Three rules:
* Matrices and tables are drawn from a normal distribution of standard deviation 0.02 (GPT-2's
  choice): logits of an untrained model are then near zero and its loss near ln V.
* The matrices that write into the stream (out_proj, down_proj) are drawn smaller by
  1/sqrt(number of them) so that their sum stays of one size ("scaled"), or are zero, so that
  every block begins as the identity ("zero").
* Biases are zero, gains one.
With sinusoidal positions, whose values reach 1, the tables are drawn with 1/sqrt(D) instead, since
they are multiplied by sqrt(D) before the sum. A tied table then begins by expecting the present
token again, and the first loss lies above ln V.

A table of PyTorch's default scale, standard deviation 1, would drown what the layers add: see
chapter 05's evidence. Production large models also scale by width (muP, arXiv:2203.03466).
"""

import torch
from torch import nn

from slimlab.config import check_choice, require

RESIDUAL = ("scaled", "zero", "plain")
WRITERS = ("out_proj", "down_proj")


@torch.no_grad()
def initialise(
    model: nn.Module, std: float = 0.02, *, residual: str = "scaled", seed: int | None = None
) -> nn.Module:
    """Draw the weights of a model anew, in place.

    model     any of the models of the book
    std       standard deviation of matrices and tables
    residual  "scaled": matrices that write into the stream are drawn with std / sqrt(their number);
              "zero": they are zero; "plain": as the others
    seed      of torch's global generator; its present state is used if not given
    returns   the model

    Radford et al. 2019, section 2.3, for "scaled"; Zhang et al. 2019 (arXiv:1901.09321) for "zero".
    """
    check_choice("residual", residual, RESIDUAL)
    require(
        isinstance(std, int | float) and 0 < std < float("inf"),
        "std, a positive number",
        f"std = {std!r}",
        "give std=0.02",
    )
    if seed is not None:
        torch.manual_seed(seed)
    linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    writers = [name for name in linears if name.rsplit(".", 1)[-1] in WRITERS]
    sinusoidal = model.config.positions == "sinusoidal"
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, model.config.d_model**-0.5 if sinusoidal else std)
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    for name, linear in linears.items():
        if linear.bias is not None:
            linear.bias.zero_()
        if id(linear.weight) in tables:
            continue
        scale = std
        if name in writers and residual == "scaled":
            scale = std / len(writers) ** 0.5
        if name in writers and residual == "zero":
            linear.weight.zero_()
        else:
            linear.weight.normal_(0.0, scale)
    return model
