"""Compressors compared by what they are for: the loss after so many steps, over several seeds.

Chapter 08 uses it. One run says little, since the seed alone moves the loss; so every compressor is
run with the same seeds, which decide the weights at the start and the data. The text is drawn from
a Markov chain, whose best possible loss is known.

Production compares on the task itself, and tunes the learning rate for every compressor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.launch import run_ranks
from slimlab.config import ModelConfig, check_size, require
from slimlab.model.build import build_model
from slimlab.parallel.compression import Compressor
from slimlab.parallel.data import DataParallel
from slimlab.plan.compression import ring_bytes
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import make_optimizer

SMALL = ModelConfig(vocab_size=16, seq_len=16, d_model=16, num_layers=1, num_heads=2)
TEST_SEQUENCES = 256
TEST_SEED = 2**31  # no seed of the training data


@dataclass(frozen=True)
class Convergence:
    """How one compressor did.

    losses         of each seed: nats per token on data that was not trained on, at the end; not a
                   number if the run went astray
    curves         of each seed: the training loss of every step
    payload_bytes  of a step, per rank, without the report that ends it
    ring_bytes     what each rank receives in a step on a ring, as slimlab.plan.compression has it
    """

    losses: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]
    payload_bytes: int
    ring_bytes: float

    @property
    def mean_loss(self) -> float:
        """The mean over the seeds."""
        return mean(self.losses)

    @property
    def spread(self) -> float:
        """The difference of the largest and the smallest loss."""
        return max(self.losses) - min(self.losses)


def compare_convergence(
    compressors: Mapping[str, Compressor | None],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    num_steps: int = 100,
    world_size: int = 2,
    batch_size: int = 8,
    optimizer: str = "adamw",
    lr: float = 0.01,
    config: ModelConfig = SMALL,
) -> dict[str, Convergence]:
    """Train a small model with each compressor and each seed; ranks are threads.

    compressors  by name; None: plain sums
    seeds        of weights and data, at least three
    num_steps    of each run
    world_size   number of ranks
    batch_size   sequences of each rank in each step
    optimizer    its name in slimlab.train.optimizer
    lr           its learning rate, constant
    config       of the model, a decoder
    returns      by the names of compressors

    Communicates: what the runs do, on threads of its own.
    Raises InputError for fewer than three seeds, or settings that do not fit.
    """
    require(
        len(set(seeds)) >= 3,
        "at least three different seeds",
        f"seeds = {list(seeds)}",
        "one run says nothing about a difference smaller than its seed makes; give (0, 1, 2)",
    )
    for name, size in (("num_steps", num_steps), ("batch_size", batch_size)):
        check_size(name, size)
    settings = (num_steps, batch_size, optimizer, lr, config)
    found = {}
    for name, compressor in compressors.items():
        runs = [
            run_ranks(_train, world_size, args=(compressor, seed, *settings))[0] for seed in seeds
        ]
        curves, losses, calls = zip(*runs)
        payload = sum(n_bytes for _, n_bytes in calls[0])
        found[name] = Convergence(losses, curves, payload, ring_bytes(calls[0], world_size))
    return found


def markov_chain(vocab_size: int, seed: int) -> Tensor:
    """Draw how likely each token follows each.

    vocab_size  V, number of tokens
    seed        of the draw
    returns     (V, V) float64, rows that add up to 1
    """
    check_size("vocab_size", vocab_size)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)
    return (2 * scores).softmax(dim=1)


def markov_batch(chain: Tensor, batch_size: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw sequences from a chain.

    chain       (V, V) of markov_chain
    batch_size  B, number of sequences
    seq_len     T, their length
    seed        of the draw
    returns     inputs (B, T) and targets (B, T), int64
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(chain), (batch_size, 1), generator=generator)
    for _ in range(seq_len):
        following = torch.multinomial(chain[ids[:, -1]], 1, generator=generator)
        ids = torch.cat((ids, following), dim=1)
    return ids[:, :-1], ids[:, 1:]


def best_loss(chain: Tensor) -> float:
    """Compute the loss of a model that knows the chain.

    chain    (V, V) of markov_chain
    returns  nats per token, in the long run
    """
    shares = torch.full((len(chain),), 1 / len(chain), dtype=chain.dtype)
    for _ in range(1000):
        shares = shares @ chain
    return float(shares @ torch.special.entr(chain).sum(dim=1))


def _train(comm: Communicator, compressor, seed, num_steps, batch_size, name, lr, config):
    torch.manual_seed(seed)
    model = build_model(config)
    replica = DataParallel(
        model, comm, bucket_bytes=None, check_finite=False, compressor=compressor
    )
    optimizer = make_optimizer(name, model, lr=lr)
    chain, curve = markov_chain(config.vocab_size, seed), []
    for step in range(num_steps):
        before = len(comm.ledger.entries)
        draw = (seed * num_steps + step) * comm.world_size + comm.rank
        batch = markov_batch(chain, batch_size, config.seq_len, draw)
        loss, _ = replica.gradients(batch, causal_objective)
        optimizer.step()
        curve.append(float(loss))
    calls = [(entry.call, entry.n_bytes) for entry in comm.ledger.entries[before:-1]]
    with torch.no_grad():
        test = markov_batch(chain, TEST_SEQUENCES, config.seq_len, TEST_SEED + seed)
        loss_sum, num_tokens = causal_objective(model, test)
    return tuple(curve), float(loss_sum) / num_tokens, calls
