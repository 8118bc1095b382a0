"""Random numbers on ranks that share every layer: dropout that draws alike, or apart.

Chapter 09 explains it. What is replicated must stay so: dropout behind an all_reduce has to set the
same features to zero on every rank, or the ranks go on with different models. What is cut must be
drawn apart: with one seed for all, the slices of a sequence would repeat one pattern.

Each rank has a generator of its own here, seeded alike or with its rank. Torch's global generator
would not do: a rank may draw from it for other purposes, and the others would not notice. Without
sequence parallelism the masks are those of one process, bit for bit, whose global generator began
with the same seed (on a CPU; on a GPU nn.Dropout draws by another algorithm). With it they are
other masks of the same distribution.

Production: Megatron-LM's tensor_parallel/random.py switches torch's generator between two states.
"""

import hashlib

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator


class RankDropout(nn.Dropout):
    """Dropout that draws from a generator of its own.

    p          part of the features that is set to zero in training; the others are divided by 1 - p
    generator  on the device of the activations

    forward: x of any shape to the same shape.
    """

    def __init__(self, p: float, generator: torch.Generator):
        super().__init__(p)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Drop features of x; in evaluation return it as it is."""
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x, requires_grad=False).bernoulli_(
            1 - self.p, generator=self.generator
        )
        return x * keep.div_(1 - self.p)


def rank_generator(
    group: Communicator, seed: int, device: torch.device, *, same: bool
) -> torch.Generator:
    """Make the generator that a rank's dropout draws from.

    group   the ranks that share every layer
    seed    whole number; another for each replica of the axis data
    device  of the activations
    same    the ranks draw the same numbers; False: each its own
    returns a generator with this seed, or one derived from the seed and the rank
    """
    if not same:
        digest = hashlib.sha256(f"{seed} {group.rank}".encode()).digest()
        seed = int.from_bytes(digest[:4])
    return torch.Generator(device).manual_seed(seed)


def replace_dropout(model: nn.Module, generator: torch.Generator) -> None:
    """Let every nn.Dropout of a model draw from a generator, in place.

    model      changed in place
    generator  of this rank
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, RankDropout(child.p, generator).train(child.training))
