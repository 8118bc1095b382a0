"""An n-gram model over token ids, Witten-Bell interpolation: what counting alone can predict.

Chapter 05 puts it beside the language model: of the two, only the latter generalises to contexts
that it has never seen. Witten and Bell 1991; in the recursive form of Chen and Goodman 1998,

    P(w | h) = (c(h w) + t(h) P(w | h')) / (c(h) + t(h))

with c(h w) how often w followed the context h, c(h) the sum over w, t(h) how many different tokens
followed h, and h' the context without its oldest token. Below the empty context stands 1 / V, so
every token has a probability, also in contexts never seen. The one-token model is `order=1`.

Production differs: n-gram models with modified Kneser-Ney discounts, pruned and packed into tries
over billions of words (KenLM), which are a little better; language models replaced them.
"""

import math
import operator
import random
from collections import Counter
from collections.abc import Iterable, Iterator

from slimlab.config import InputError, check_size, require

Context = tuple[int, ...]


class NGram:
    """Counts of what follows each context of up to order - 1 tokens, and their probabilities.

    ids         the token ids to learn from, one sequence: documents with a special token between
    vocab_size  V, ids are 0 to V - 1
    order       n, tokens of the longest counted sequence: 1 for unigrams, 5 for 5-grams

    Raises InputError if ids are empty or out of range, or a size is not at least 1.
    """

    def __init__(self, ids: Iterable[int], vocab_size: int, order: int = 5):
        check_size("vocab_size", vocab_size)
        check_size("order", order)
        self.vocab_size, self.order = vocab_size, order
        tokens = self._check_ids(ids, "ids")
        require(bool(tokens), "ids to learn from", "no ids at all", "give a text with tokens")
        self._followers: dict[Context, dict[int, int]] = {}
        for length in range(order):
            shifted = (tokens[at:] for at in range(length + 1))
            for sequence, count in Counter(zip(*shifted)).items():
                self._followers.setdefault(sequence[:-1], {})[sequence[-1]] = count
        # c(h) + t(h) and t(h) for each context that was followed by something
        self._sums = {
            context: (sum(counts.values()) + len(counts), len(counts))
            for context, counts in self._followers.items()
        }

    def log_prob(self, token_id: int, context: Iterable[int] = ()) -> float:
        """Return the natural logarithm of P(token | context).

        token_id  from 0 to V - 1
        context   the tokens before it, oldest first; only the last order - 1 count

        Raises InputError if an id is out of range.
        """
        (token,) = self._check_ids([token_id], "token_id")
        return math.log(self._prob(token, self._recent(context)))

    def log_probs(self, context: Iterable[int] = ()) -> list[float]:
        """Return the natural logarithms of P(w | context) for all w, V of them.

        context  as for `log_prob`

        Raises InputError if an id is out of range.
        """
        probs = [1 / self.vocab_size] * self.vocab_size
        for known in self._known(self._recent(context)):
            denominator, kinds = self._sums[known]
            weight = kinds / denominator
            probs = [weight * prob for prob in probs]
            for token, count in self._followers[known].items():
                probs[token] += count / denominator
        return [math.log(prob) for prob in probs]

    def token_log_probs(self, ids: Iterable[int]) -> list[float]:
        """Return the natural log-probability of each token of a text, given those before it.

        ids  a text as token ids; the first token is predicted from the empty context

        Raises InputError if ids are empty or out of range.
        """
        tokens = self._check_ids(ids, "ids")
        require(bool(tokens), "ids to judge", "no ids at all", "give a text with tokens")
        reach = self.order - 1
        return [
            math.log(self._prob(token, tuple(tokens[max(0, at - reach) : at])))
            for at, token in enumerate(tokens)
        ]

    def bits_per_byte(self, ids: Iterable[int], num_bytes: int) -> float:
        """Measure the bits that the model would spend on a text, per byte of that text.

        ids        the text as token ids; each one is predicted and counts
        num_bytes  size of the text in UTF-8; special tokens are no bytes of it

        Raises InputError if ids are empty or out of range, or num_bytes is not at least 1.
        """
        check_size("num_bytes", num_bytes)
        return -math.fsum(self.token_log_probs(ids)) / math.log(2) / num_bytes

    def generate(
        self,
        ids: Iterable[int],
        max_new_tokens: int,
        *,
        seed: int = 0,
        stop_id: int | None = None,
    ) -> list[int]:
        """Draw a continuation, each token with its probability.

        ids             the text before, may be empty
        max_new_tokens  tokens to draw
        seed            a whole number; equal seeds, equal texts
        stop_id         stop behind this token; None: never
        returns         the new tokens only

        Raises InputError if ids are out of range or max_new_tokens is not at least 1.
        """
        check_size("max_new_tokens", max_new_tokens)
        require(isinstance(seed, int), "seed, a whole number", f"seed = {seed!r}", "give seed=0")
        context, generator = self._recent(ids), random.Random(seed)
        drawn: list[int] = []
        while len(drawn) < max_new_tokens and (not drawn or drawn[-1] != stop_id):
            drawn.append(self._draw(context, generator))
            context = self._recent((*context, drawn[-1]))
        return drawn

    def _draw(self, context: Context, generator: random.Random) -> int:
        # The formula as a lottery: of c + t tickets t send us on to the shorter context.
        for known in reversed(list(self._known(context))):
            denominator, kinds = self._sums[known]
            if generator.randrange(denominator) >= kinds:
                followers = self._followers[known]
                return generator.choices(list(followers), list(followers.values()))[0]
        return generator.randrange(self.vocab_size)

    def _prob(self, token: int, context: Context) -> float:
        prob = 1 / self.vocab_size
        for known in self._known(context):
            denominator, kinds = self._sums[known]
            prob = (self._followers[known].get(token, 0) + kinds * prob) / denominator
        return prob

    def _known(self, context: Context) -> Iterator[Context]:
        """Yield the ends of a context that were seen, the empty one first."""
        for start in range(len(context), -1, -1):
            if context[start:] not in self._sums:
                return  # then no longer one was seen either
            yield context[start:]

    def _recent(self, context: Iterable[int]) -> Context:
        tokens = self._check_ids(context, "context")
        return tuple(tokens[max(0, len(tokens) - self.order + 1) :])

    def _check_ids(self, ids: Iterable[int], name: str) -> list[int]:
        asked = f"{name}, whole numbers from 0 to {self.vocab_size - 1}"
        change = "encode the text with the tokenizer of this vocabulary: tokenizer.encode(text)"
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            tokens = [operator.index(token) for token in values]
        except TypeError as error:
            raise InputError(asked, f"a {type(ids).__name__}: {error}", change) from error
        for at, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise InputError(asked, f"{token} at position {at}", change)
        return tokens
