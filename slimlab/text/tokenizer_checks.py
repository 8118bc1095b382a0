"""What a tokenizer must hold, and the checks of a file that may be damaged, foreign or hostile.

Chapter 04 uses it; the format is described in `slimlab.text.tokenizer`.

Production differs: the JSON of `tokenizers` also names normalizers and patterns to run; here
nothing in a file is run, and a pattern other than our own is refused.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from slimlab.config import InputError, require
from slimlab.text.bpe import NUM_BYTES
from slimlab.text.presplit import GPT2_PATTERN

FORMAT, VERSION = "slimlab byte-pair tokenizer", 1
MAX_SPECIAL_TOKENS, MAX_SPECIAL_CHARS = 1000, 200
MAX_FILE_BYTES = 1 << 26
# Merges can double a token's length: without a limit forty of them fill the memory.
MAX_VOCAB_BYTES = 1 << 26


def check_special_tokens(special_tokens: Sequence[str]) -> None:
    """Raise InputError unless `special_tokens` is a list or tuple of distinct non-empty texts."""
    asked = "special_tokens, distinct non-empty texts in a tuple"
    require(
        isinstance(special_tokens, list | tuple),
        asked,
        f"special_tokens = {special_tokens!r}"[:200],
        "put them in a tuple, one as well: special_tokens=('<|endoftext|>',)",
    )
    require(
        len(special_tokens) <= MAX_SPECIAL_TOKENS,
        f"at most {MAX_SPECIAL_TOKENS} special tokens",
        f"{len(special_tokens)}",
        "leave words to the merges",
    )
    for token in special_tokens:
        require(
            isinstance(token, str) and 0 < len(token) <= MAX_SPECIAL_CHARS and _is_whole(token),
            f"{asked}, each at most {MAX_SPECIAL_CHARS} characters",
            f"{token!r}"[:200],
            "give a short text of whole characters",
        )
    repeated = [token for token, count in Counter(special_tokens).items() if count > 1]
    require(not repeated, asked, f"{repeated[:3]} more than once", "name each one once")


def _is_whole(text: str) -> bool:
    return text.encode("utf-8", "ignore").decode() == text


def check_merges(merges: Sequence[Sequence[int]]) -> None:
    """Raise InputError unless each of `merges` joins two ids that exist into a token that does not.

    merges  pairs of ids; merge r may name ids below 256 + r

    A learned list never makes the same bytes twice: a second way to write them would have been
    merged into the first at its turn.
    """
    asked = "merges, pairs of ids that the bytes and the merges before them have made"
    change = "the list is damaged: train again, or load the file that was saved"
    require(
        isinstance(merges, Sequence) and not isinstance(merges, str),
        asked,
        f"a {type(merges).__name__}",
        change,
    )
    tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
    seen, vocab_bytes = set(tokens), NUM_BYTES
    for rank, pair in enumerate(merges):
        given = f"merge {rank} is {pair!r}"[:200]
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        whole = is_pair and all(type(part) is int for part in pair)
        require(whole, asked, given, change)
        require(
            all(0 <= part < len(tokens) for part in pair),
            asked,
            f"{given}, and only ids below {len(tokens)} exist by then",
            change,
        )
        vocab_bytes += len(tokens[pair[0]]) + len(tokens[pair[1]])
        require(
            vocab_bytes <= MAX_VOCAB_BYTES,
            f"tokens of at most {MAX_VOCAB_BYTES} bytes together",
            f"more from merge {rank} on",
            "do not trust this file; of a text of your own, cut the longest words",
        )
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        require(tokens[-1] not in seen, asked, f"{given}, and makes a token a second time", change)
        seen.add(tokens[-1])


def read_tokenizer_file(path: str | os.PathLike) -> dict:
    """Read the JSON object of a tokenizer's file.

    path     the file
    returns  a dict with the keys "merges" and "special_tokens", both lists

    Raises InputError if the file is missing, no JSON, too large, or of another kind or version.
    """
    asked, path = "a tokenizer that slimlab saved", Path(path)
    change = "give the file that Tokenizer.save wrote, or train and save again"
    try:
        size_bytes = path.stat().st_size
        require(size_bytes <= MAX_FILE_BYTES, asked, f"{path}: {size_bytes} bytes", change)
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(asked, f"{path}: {error.strerror or error}", change) from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(asked, f"{path}: no complete JSON ({error})", change) from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    require(found == FORMAT, asked, f"{path}: format {found!r}"[:300], change)
    version = content.get("version")
    require(
        type(version) is int and version == VERSION,
        f"version {VERSION} of the format",
        f"{path}: version {version!r}"[:300],
        "a newer slimlab may have written it: update, or save it again",
    )
    require(
        content.get("pattern") == GPT2_PATTERN,
        "GPT-2's pre-split pattern, the only one this version knows",
        f"{path}: pattern {content.get('pattern')!r}"[:300],
        change,
    )
    for key in ("merges", "special_tokens"):
        value = content.get(key)
        require(
            isinstance(value, list),
            f'a list under "{key}"',
            f"{path}: {type(value).__name__}",
            change,
        )
    return content
