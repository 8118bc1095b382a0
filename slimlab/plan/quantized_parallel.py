"""What a slim model sends and holds on several ranks: quantized, pruned or taught by a teacher.

Chapter 15 sets these numbers beside those of the model it came from. A pruned model is an ordinary
one with another configuration: slimlab.plan.tensor_parallel and slimlab.plan.data_parallel predict
it. Removing heads or neurons leaves the calls of tensor parallelism as they are, since they carry
the stream of B T D elements; removing layers takes calls away. What replicas send of gradients
shrinks with every parameter.

A quantized model holds a quarter or less, and sends as many bytes as before: sums are floats or
integers of 32 bits. Rows of x that are quantized need their maximum besides, 4 bytes per position.

Production also quantizes what is sent; slimlab.plan.compression does that for gradients.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod

from slimlab.config import ModelConfig, check_choice, check_size, require
from slimlab.plan.params import param_shapes
from slimlab.plan.quantized_size import ITEM_BYTES, QuantScheme, stored_parts
from slimlab.plan.tensor_parallel import (
    CUT,
    CUT_DIMS,
    Calls,
    TensorParallelStep,
    local_param_shapes,
    predict_step,
)

ACTIVATIONS = ("none", "dynamic", "static")
FLOAT_BYTES = SUM_BYTES = 4  # of a float32; of a sum of 32 bits
TABLES = ("tokens", "positions")
STATIC_MAP_BYTES = 4 + 1  # of a layer's inputs: one scale, one zero point


def predict_forward(
    config: ModelConfig,
    batch_size: int,
    seq_len: int,
    world_size: int,
    *,
    activations: str = "none",
    cut: Sequence[str] = CUT,
    outliers: Collection[str] = (),
) -> Calls:
    """Predict the calls of a forward pass of a quantized model that ranks share.

    config       of a decoder
    batch_size   B, sequences
    seq_len      T, tokens of each
    world_size   ranks that share the model
    activations  "none", "dynamic" or "static", as quantize_model was given
    cut          which of "heads", "feed_forward" and "vocabulary" are cut
    outliers     names of layers that have outlier columns, such as "blocks.0.attention.out_proj"
    returns      (name, payload in bytes) of each rank's calls, in order: the embedding, the blocks.
                 The logits stay where they are

    Raises InputError for sizes that do not divide, and unknown words.
    """
    check_choice("activations", activations, ACTIVATIONS)
    for name, size in (("batch_size", batch_size), ("seq_len", seq_len)):
        check_size(name, size)
    local_param_shapes(config, world_size, cut=cut)
    if world_size == 1:
        return ()
    num_tokens = batch_size * seq_len
    stream = ("all_reduce", num_tokens * config.d_model * SUM_BYTES)
    told = {
        "none": (stream,),
        "dynamic": (("all_reduce", num_tokens * FLOAT_BYTES), stream),
        "static": (("all_reduce", stream[1] + SUM_BYTES),),
    }[activations]
    calls = [stream] if "vocabulary" in cut else []
    lasts = (("heads", "attention.out_proj"), ("feed_forward", "feed_forward.down_proj"))
    for number in range(config.num_layers):
        for part, name in lasts:
            if part in cut:
                loud = f"blocks.{number}.{name}" in outliers
                calls += [stream, *told] if loud else told
    return tuple(calls)


def local_quantized_bytes(
    config: ModelConfig,
    world_size: int,
    scheme: QuantScheme,
    *,
    table_scheme: QuantScheme | None = None,
    fit_groups: bool = False,
    activations: str = "none",
    cut: Sequence[str] = CUT,
) -> dict[str, int]:
    """Predict the bytes that each rank holds of a quantized model.

    config        of a decoder
    world_size    ranks that share the model; 1: the whole
    scheme        of the linear layers
    table_scheme  of the tables; None: scheme
    fit_groups    groups are fitted to the rows of each layer, as quantize_model does if asked
    activations   as in predict_forward
    cut           as in predict_forward
    returns       "packed", "scale", "zero_point" (if not symmetric), "floats" (norms, biases, and
                  what a layer knows of the range of its inputs) -> bytes, without outliers and
                  smoothing. A row's scale is held by every rank that has columns of it

    Raises InputError for sizes that do not divide, groups among them, and unknown words.
    """
    check_choice("activations", activations, ACTIVATIONS)
    whole = param_shapes(config)
    held = {"floats": 0}
    for name, shape in local_param_shapes(config, world_size, cut=cut).items():
        layer = name.split(".")[-2]
        if len(shape) < 2:
            held["floats"] += prod(shape) * FLOAT_BYTES
            continue
        own = (table_scheme or scheme) if layer in TABLES else scheme
        own = own.fitted(whole[name][1]) if fit_groups else own
        _check_groups(name, whole[name], shape, own)
        for part, (kind, stored) in stored_parts(shape, own).items():
            held[part] = held.get(part, 0) + prod(stored) * ITEM_BYTES[kind]
        linear = layer not in TABLES or (layer == "tokens" and config.tie_embeddings)
        if activations == "static" and linear:
            held["floats"] += STATIC_MAP_BYTES + shape[0] * FLOAT_BYTES  # and sums of its rows
    return held


def predict_logits(
    config: ModelConfig, num_rows: int, seq_len: int, *, item_bytes: int = FLOAT_BYTES
) -> Calls:
    """Predict the calls that bring the logits of replicas together.

    config      of the model
    num_rows    sequences of this rank
    seq_len     T, tokens of each
    item_bytes  bytes per logit
    returns     (name, payload in bytes) of this rank's calls
    """
    return (("all_gather", num_rows * seq_len * config.vocab_size * item_bytes),)


def predict_distillation(
    teacher: ModelConfig,
    student: ModelConfig,
    batch_size: int,
    seq_len: int,
    world_size: int,
    item_bytes: int,
) -> TensorParallelStep:
    """Predict the calls of a step in which a teacher teaches a student, both cut over the ranks.

    teacher     configuration of the one that only runs
    student     of the one that is trained
    batch_size  B, sequences that the ranks work on together
    seq_len     T, tokens of each
    world_size  ranks that share both models
    item_bytes  bytes per element of weights and activations
    returns     the calls of each rank; forward has the teacher's, then the student's. Soft targets
                need whole logits, so each model's are gathered in place of the loss's two numbers
                per position

    Raises InputError as predict_step does, and for different vocabularies.
    """
    require(
        teacher.vocab_size == student.vocab_size,
        "one vocabulary of student and teacher",
        f"the student's {student.vocab_size} tokens, the teacher's {teacher.vocab_size}",
        "give both models one tokenizer",
    )
    steps = [
        predict_step(one, batch_size, seq_len, world_size, item_bytes) for one in (teacher, student)
    ]
    if world_size == 1:
        return steps[1]
    part = batch_size * seq_len * (student.vocab_size // world_size) * item_bytes
    forward = tuple(
        call for one in steps for call in (*one.forward[:-1], ("all_gather", part))
    )  # the loss comes last
    return replace(steps[1], forward=forward)


def _check_groups(
    name: str, whole: tuple[int, ...], local: tuple[int, ...], scheme: QuantScheme
) -> None:
    size, cut = scheme.quant_group_size, CUT_DIMS.get(name.split(".")[-2])
    require(
        size is None or cut is None or local[-1] % size == 0,
        "groups that stay whole",
        f"{name} {whole}: {local[-1]} columns on each rank, groups of {size}",
        "choose a quant_group_size that divides the columns of a rank, or fewer ranks",
    )
