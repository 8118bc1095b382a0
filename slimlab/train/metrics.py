"""How good a model is: its loss on text that it never saw.

Chapter 05 measures with it, beside compressors and n-gram models. Bits per byte compare models with
different tokenizers; loss per token does not.

Every token is scored once, in windows that lie side by side, so the first tokens of a window have
little to go by. Production lets windows overlap and scores their second halves only, which costs
more and gives a lower loss, and measures benchmarks beside it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimlab.config import require
from slimlab.model.transformer import device_of
from slimlab.text.batches import consecutive_windows, text_ids
from slimlab.text.tokenizer import Tokenizer
from slimlab.train.accumulate import Objective, move_batch
from slimlab.train.objectives import bits_per_byte, causal_objective


def held_out_loss(model: nn.Module, ids: Sequence[int] | Tensor, seq_len: int, batch_size: int):
    """Measure the mean loss of a text's tokens, all but the first, each once.

    model       a Decoder
    ids         (N,) token ids of text that it was not trained on
    seq_len     T, tokens of a window; a shorter text is one window
    batch_size  B, windows at a time; changes rounding only
    returns     nats per token, a float

    Raises InputError as consecutive_windows does.
    """
    tokens = text_ids(ids, 1)
    windows = consecutive_windows(tokens, min(seq_len, len(tokens) - 1), batch_size)
    loss_sum, num_tokens = total_loss(model, windows)
    return loss_sum / num_tokens


def total_loss(
    model: nn.Module, batches: Iterable, objective: Objective = causal_objective
) -> tuple[float, int]:
    """Add up an objective over batches, in evaluation mode and without gradients.

    model      on any device
    batches    what the objective takes
    objective  as in slimlab.train.objectives
    returns    the sum in nats and the number of target tokens

    Raises InputError if no token is a target.
    """
    loss_sum, num_tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            piece_loss, piece_tokens = objective(model, move_batch(batch, device_of(model)))
            loss_sum += float(piece_loss)
            num_tokens += int(piece_tokens)
    require(
        num_tokens > 0,
        "held-out batches with target tokens",
        "none",
        "hold out more text, or make the batches anew: an iterator can be walked through only once",
    )
    return loss_sum, num_tokens


def bits_per_byte_of(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    seq_len: int | None = None,
    batch_size: int = 16,
) -> float:
    """Measure how many bits the model would spend on a byte of a text; 8 if it knows nothing.

    model       a Decoder
    tokenizer   the one that it was trained with
    text        of at least two tokens
    seq_len     T, tokens of a window; defaults to the model's
    batch_size  windows at a time
    returns     bits per byte of `text` in UTF-8. The first token, before which nothing stands,
                counts as if all tokens were equally likely, so that this is the length of a code
                from which the whole text could be restored.

    Raises InputError if the text is too short.
    """
    ids = tokenizer.encode(text, allow_special=False)
    require(
        len(ids) >= 2,
        "a text of at least two tokens",
        f"{len(ids)} tokens",
        "give more of the held-out text",
    )
    seq_len = min(seq_len or model.config.seq_len, len(ids) - 1)
    loss_sum, _ = total_loss(model, consecutive_windows(ids, seq_len, batch_size))
    return bits_per_byte(loss_sum + math.log(model.config.vocab_size), len(text.encode()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off for a while.

    model  afterwards in the mode in which it was
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
