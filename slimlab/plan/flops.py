"""How much arithmetic, how long, how dear: closed forms; and, passed on, counts of parameters.

A FLOP is one addition or multiplication of floating-point numbers; `_flop` is a count of them and
`_flop_per_s` a rate. Chapter 00 predicts published training runs with these formulas, chapters 01
and 02 the cost of attention. They read sizes only, never the code that they predict.

Kaplan et al. 2020 (arXiv:2001.08361), section 2.1, for 6ND. What planners of real runs add:
attention's own share, recomputed activations, communication, and how far below its peak a
processor runs.
"""

from numbers import Real

from slimlab.config import check_size, require
from slimlab.plan.params import (
    attention_params,
    block_params,
    decoder_params,
    feed_forward_params,
)

__all__ = [
    "attention_flop",
    "attention_params",
    "block_params",
    "decoder_params",
    "dollars",
    "feed_forward_params",
    "gpu_seconds",
    "gpu_years",
    "petaflop_s_days",
    "rough_decoder_params",
    "training_days",
    "training_flop",
]

SECONDS_PER_HOUR = 3600.0
SECONDS_PER_DAY = 24 * SECONDS_PER_HOUR
SECONDS_PER_YEAR = 365 * SECONDS_PER_DAY


def rough_decoder_params(num_layers: int, d_model: int, vocab_size: int) -> int:
    """Estimate a decoder's parameters as 12 L D^2 + V D.

    Per layer 4 D^2 for attention and 8 D^2 for a feed-forward layer with F = 4 D (or a gated one
    with F = 8/3 D); norms, biases and positions are left out.

    num_layers  L
    d_model     D
    vocab_size  V
    returns     within 3 % of the exact count for the published models of 7 billion parameters and
                more; most is missing where the tables are two and F is rounded up
    """
    for name, value in {"num_layers": num_layers, "d_model": d_model}.items():
        check_size(name, value)
    check_size("vocab_size", vocab_size)
    return 12 * num_layers * d_model**2 + vocab_size * d_model


def training_flop(num_params: float, num_tokens: float) -> float:
    """Estimate the arithmetic of training as 6 N D.

    Each parameter multiplies and adds once per token forward (2) and twice backward (4).

    num_params  N, parameters in use for a token
    num_tokens  D, tokens that the training passes over, repeats included
    returns     FLOP; attention's products between positions are not in it (see attention_flop)
    """
    _check_positive(num_params=num_params, num_tokens=num_tokens)
    return 6.0 * num_params * num_tokens


def petaflop_s_days(flop: float) -> float:
    """Convert FLOP to PF-days: days at 1e15 FLOP per second.

    flop  a count of operations
    """
    _check_positive(flop=flop)
    return flop / (1e15 * SECONDS_PER_DAY)


def gpu_seconds(flop: float, flop_per_s_per_gpu: float) -> float:
    """Divide work by speed.

    flop                a count of operations
    flop_per_s_per_gpu  the rate that a GPU reaches, not its peak
    returns             seconds times GPUs
    """
    _check_positive(flop=flop, flop_per_s_per_gpu=flop_per_s_per_gpu)
    return flop / flop_per_s_per_gpu


def gpu_years(flop: float, flop_per_s_per_gpu: float) -> float:
    """Divide work by speed, in years of 365 days.

    flop, flop_per_s_per_gpu  as in gpu_seconds
    """
    return gpu_seconds(flop, flop_per_s_per_gpu) / SECONDS_PER_YEAR


def dollars(gpu_hours: float, dollars_per_gpu_hour: float) -> float:
    """Multiply hours by their price.

    gpu_hours             hours times GPUs; gpu_seconds / 3600
    dollars_per_gpu_hour  price of one
    """
    _check_positive(gpu_hours=gpu_hours, dollars_per_gpu_hour=dollars_per_gpu_hour)
    return gpu_hours * dollars_per_gpu_hour


def training_days(num_tokens: float, tokens_per_s_per_gpu: float, num_gpus: int) -> float:
    """Predict how long a run takes from its measured speed.

    num_tokens            tokens that the training passes over
    tokens_per_s_per_gpu  speed of one GPU within the run
    num_gpus              GPUs that share the work
    returns               days
    """
    _check_positive(num_tokens=num_tokens, tokens_per_s_per_gpu=tokens_per_s_per_gpu)
    check_size("num_gpus", num_gpus)
    return num_tokens / (tokens_per_s_per_gpu * num_gpus) / SECONDS_PER_DAY


def attention_flop(
    seq_len: int, d_model: int, *, num_keys: int | None = None, batch_size: int = 1
) -> int:
    """Count the arithmetic of QK^T and of the weighted average, forward, for all heads of a layer.

    The number of heads does not matter: H heads of E features cost as much as one of H*E.

    seq_len     T queries
    d_model     H*E features in all heads together
    num_keys    S, seq_len if not given
    batch_size  B sequences
    returns     4 B T S H E FLOP; projections and the softmax are not in it, and a causal mask
                saves nothing unless the kernel skips what it hides
    """
    num_keys = seq_len if num_keys is None else num_keys
    sizes = {"seq_len": seq_len, "d_model": d_model, "num_keys": num_keys, "batch_size": batch_size}
    for name, value in sizes.items():
        check_size(name, value)
    return 4 * batch_size * seq_len * num_keys * d_model


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        require(
            number and 0 < value < float("inf"),
            f"{name}, a positive number",
            f"{name} = {value!r}",
            f"give {name} in the unit of its name, for instance 1.4e12",
        )
