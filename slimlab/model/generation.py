"""Writing text: one token at a time, the greedy way or drawn from the model's distribution.

Chapter 03 shows that a cache changes the cost and not the result; chapter 04 that only a model
trained on the next token can do this at all; chapter 16 has more ways to choose.

Production serves many texts at once, of different lengths and at different places (continuous
batching), and drafts several tokens ahead with a small model (speculative decoding).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from slimlab.config import InputError, check_number, check_size, require
from slimlab.model.block import check_ids
from slimlab.model.cache import KVCache


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    *,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_id: int | None = None,
    use_cache: bool = True,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Tensor:
    """Continue every text of a batch.

    model           a Decoder, or an EncoderDecoder with the memory that it encoded
    ids             (B, T) the texts so far, all of one length; T >= 1
    max_new_tokens  tokens to add at most
    memory          (B, S, D) an encoder's output, for an EncoderDecoder
    memory_mask     which positions of the source may be attended to, as in decode
    temperature     0 takes the likeliest token (greedy); 1 draws from the model's distribution,
                    less sharpens it, more flattens it
    top_k           draw from the k likeliest tokens only
    top_p           draw from the fewest likeliest tokens that together have this probability
    seed            of the draws; torch's global generator is used if not given
    stop_id         a text that reaches it ends; the rest of its row is filled with it
    use_cache       keep keys and values (cost of a token: one token) or read all again each time;
                    the result is the same up to rounding
    progress        wraps the range of new tokens, for instance slimlab.show.progress
    returns         (B, T + new) with new <= max_new_tokens, beginning with ids

    Raises InputError for a model that does not score next tokens, options that contradict each
    other, and a text that would outgrow a table of positions.
    """
    _check_model(model, ids, max_new_tokens, memory)
    _check_options(temperature, top_k, top_p, seed)
    weight = next(model.parameters())
    generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    cache = _cache_for(model, ids, max_new_tokens) if use_cache else None
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=weight.device)
    given = {} if memory is None else {"memory": memory, "memory_mask": memory_mask}
    steps = range(max_new_tokens)
    try:
        for _ in progress(steps) if progress else steps:
            new = ids[:, cache.length :] if cache else ids
            logits = _next_logits(model, new, cache, given)
            chosen = choose(logits, temperature, top_k, top_p, generator)
            if stop_id is not None:
                chosen = torch.where(ended, stop_id, chosen)
                ended |= chosen == stop_id
            ids = torch.cat((ids, chosen[:, None]), dim=1)
            if bool(ended.all()):
                break
    finally:
        model.train(was_training)
    return ids


def choose(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one token per row.

    logits       (B, V)
    temperature, top_k, top_p  as in generate
    generator    of the draws, on the device of logits
    returns      (B,) int64

    Raises InputError for scores that are not numbers.
    Holtzman et al. 2019 (arXiv:1904.09751) for top_p.
    """
    require(
        not bool(logits.isnan().any()),
        "scores of the next token that are numbers",
        f"{int(logits.isnan().sum())} of {logits.numel()} that are not (NaN)",
        "look for weights that are not finite, or numbers beyond those of float16",
    )
    if temperature == 0:
        return logits.argmax(dim=-1)
    # With the greatest at 0, no division overflows, nor divides by a 0 of 32 bits.
    logits = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    logits = logits / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        hidden = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(hidden, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _cache_for(model: nn.Module, ids: Tensor, max_new_tokens: int) -> KVCache:
    weight = next(model.parameters())
    kept = {"dtype": weight.dtype, "device": weight.device}
    return KVCache(model.config, ids.shape[0], ids.shape[1] + max_new_tokens, **kept)


def _next_logits(model: nn.Module, new: Tensor, cache: KVCache | None, given: dict) -> Tensor:
    if given:
        return model.decode(new, cache=cache, **given)[:, -1]
    hidden = model.hidden(new, cache=cache)
    logits = model.logits(hidden[:, -1:])[:, 0]  # one row of V scores, not T of them
    require(
        logits.shape[-1] == model.config.vocab_size,
        f"scores of all {model.config.vocab_size} tokens of the vocabulary",
        f"{logits.shape[-1]} of them: this model holds a part of its output table",
        "write with a whole model: join the parts of a model that was cut (gather_state of "
        "slimlab.parallel.tensor_state) and load them into one",
    )
    return logits


def _check_model(model: nn.Module, ids: Tensor, max_new_tokens: int, memory: object) -> None:
    config = getattr(model, "config", None)
    kind = getattr(config, "kind", type(model).__name__)
    require(
        kind in ("decoder", "encoder_decoder"),
        "a model that scores the next token: a Decoder or an EncoderDecoder",
        f"a model of kind {kind!r}",
        "an encoder sees both sides of a token and cannot write; train a Decoder (chapter 04)",
    )
    require(
        (memory is not None) == (kind == "encoder_decoder"),
        "memory for an EncoderDecoder, and for no other model",
        f"kind {kind!r} {'without' if memory is None else 'with'} memory",
        "give memory=model.encode(source_ids) to an EncoderDecoder; a Decoder has no use for it",
    )
    check_size("max_new_tokens", max_new_tokens)
    check_ids("ids", ids, config.vocab_size)
    # The last new token is never read.
    room = config.seq_len + 1 - ids.shape[1]
    require(
        config.positions not in ("learned", "sinusoidal") or max_new_tokens <= room,
        f"at most {config.seq_len} positions (seq_len) in all",
        f"{ids.shape[1]} given and {max_new_tokens} new tokens",
        (f"set max_new_tokens to at most {room}, or " if room > 0 else "")
        + "cut the beginning: ids[:, -n:]",
    )


def _check_options(
    temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    number = isinstance(temperature, int | float) and 0 <= temperature < float("inf")
    require(
        number,
        "temperature, a number of at least 0",
        f"temperature = {temperature!r}",
        "give 0 for greedy, 1 for the model's own distribution",
    )
    if top_k is not None:
        check_size("top_k", top_k)
    if top_p is not None and not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise InputError("top_p, above 0 and at most 1", f"top_p = {top_p!r}", "give top_p=0.9")
    require(
        temperature > 0 or (top_k is None and top_p is None),
        "top_k and top_p together with a temperature above 0",
        f"temperature = {temperature}, top_k = {top_k}, top_p = {top_p}",
        "give temperature=1.0 to draw, or leave them out",
    )
    if seed is not None:
        check_number("seed", seed, int, -(2**63), 2**63 - 1)
