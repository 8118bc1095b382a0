import math

from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("4.1")
    bits = given["perplexity_a"].bit_length() - 1
    return 2 ** (bits * given["num_tokens_a"] // given["num_tokens_b"])


def needed_perplexity(perplexity_a, num_tokens_a, num_tokens_b):
    return perplexity_a ** (num_tokens_a / num_tokens_b)


def perplexity_per_word(perplexity, num_tokens, num_words):
    return perplexity * num_tokens / num_words


def pooled_perplexity(perplexities, token_counts):
    loss = sum(math.log(p) * n for p, n in zip(perplexities, token_counts))
    return math.exp(loss / sum(token_counts))
