"""What a training step holds in memory besides its activations, and with them.

Weights, gradients, 32-bit masters and the optimizer's state are known to the byte from the
configuration; so are activations (activations.py). Chapter 05 draws where every byte goes and
compares it with what the real objects hold. GB is 1e9 bytes and GiB is 2**30.

Rajbhandari et al. 2020 (arXiv:1910.02054), section 3.1: 16 bytes per parameter in mixed precision
with Adam.

Not counted: tensors that live for a moment (the gradient that is just being computed, an
optimizer's intermediate results), what the allocator rounds up and keeps, and the program itself.
Production adds buffers for communication, and cuts everything here into shards.
"""

from math import prod

from slimlab.config import ModelConfig, check_choice, check_size
from slimlab.plan.activations import FLOAT32_BYTES, activation_bytes
from slimlab.plan.params import param_shapes

# Bytes per element of weight, gradient, master and optimizer state.
PRECISIONS = {"float32": (4, 4, 0, 4), "mixed": (2, 2, 4, 4), "pure_16": (2, 2, 0, 2)}
# Tensors of the parameter's size that an optimizer keeps.
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adamw": 2}


def bytes_per_param(precision: str = "float32", optimizer: str = "adamw") -> int:
    """Count the bytes that training holds for every parameter, activations apart.

    precision  "float32"; "mixed": weights and gradients of 16 bits (either format), masters and
               optimizer state in float32; "pure_16": 16 bits throughout, small updates are lost.
               Autocast keeps weights and gradients in 32 bits: it counts as "float32" here
    optimizer  "sgd", "momentum" or "adamw": 0, 1 or 2 numbers per parameter
    returns    16 for AdamW in float32 and in mixed precision alike

    Raises InputError for an unknown precision or optimizer.
    """
    check_choice("precision", precision, tuple(PRECISIONS))
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    weight, gradient, master, state = PRECISIONS[precision]
    return weight + gradient + master + OPTIMIZERS[optimizer] * state


def state_bytes(
    config: ModelConfig,
    *,
    precision: str = "float32",
    optimizer: str = "adamw",
    gathered: bool = False,
) -> dict[str, int]:
    """Predict the bytes of weights, gradients, masters and optimizer state.

    config     all of it is read
    precision, optimizer  as in bytes_per_param
    gathered   gradients of micro-batches are summed in 32 bits, beside those of 16 that the
               backward pass leaves: 4 bytes per parameter more, in mixed precision only
    returns    "weights", "gradients", "gathered_gradients", "masters", "optimizer" and
               "optimizer_steps" (AdamW counts the updates of every tensor in one float32 each) ->
               bytes; what there is none of is left out

    Raises InputError as bytes_per_param does.
    """
    check_choice("precision", precision, tuple(PRECISIONS))
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    weight, gradient, master, state = PRECISIONS[precision]
    shapes = param_shapes(config)
    num_params = sum(prod(shape) for shape in shapes.values())
    items = {
        "weights": num_params * weight,
        "gradients": num_params * gradient,
        "gathered_gradients": num_params * FLOAT32_BYTES if gathered and master else 0,
        "masters": num_params * master,
        "optimizer": num_params * OPTIMIZERS[optimizer] * state,
        "optimizer_steps": len(shapes) * FLOAT32_BYTES if optimizer == "adamw" else 0,
    }
    return {name: num_bytes for name, num_bytes in items.items() if num_bytes}


def training_bytes(
    config: ModelConfig,
    batch_size: int,
    seq_len: int | None = None,
    *,
    source_len: int | None = None,
    precision: str = "float32",
    optimizer: str = "adamw",
    recompute: str = "none",
    form: str = "fused",
    mask: str = "none",
    gathered: bool = False,
) -> dict[str, int]:
    """Predict all that training holds between a forward and a backward pass.

    config, batch_size, seq_len, source_len, recompute, form, mask  as in activation_bytes of
                         slimlab.plan.activations
    precision, optimizer, gathered  as in state_bytes
    returns  the items of state_bytes, and "activations", their sum; gradients are counted, as after
             the first micro-batch

    Raises InputError for sizes that are not positive whole numbers, and for unknown words.
    """
    items = state_bytes(config, precision=precision, optimizer=optimizer, gathered=gathered)
    kept = activation_bytes(
        config,
        batch_size,
        seq_len,
        source_len=source_len,
        recompute=recompute,
        form=form,
        mask=mask,
        bytes_per_element=PRECISIONS[precision][0],
    )
    return {**items, "activations": sum(kept.values())}


def korthikanti_block_bytes(batch_size: int, seq_len: int, d_model: int, num_heads: int) -> int:
    """Count the activations of a GPT block in 16 bits as Korthikanti et al. do.

    batch_size  b sequences
    seq_len     s tokens
    d_model     h features, 4 h in the feed-forward layer
    num_heads   a
    returns     s b h (34 + 5 a s / h) bytes

    The explicit form of a causal block with LayerNorm, GELU, bias and dropout, in 16 bits on a CPU,
    keeps 36 s b h + 2 a s^2 b + 8 s b + s^2: no dropout of attention weights (its mask and its
    result, 3 a s^2 b, are missing), two dropout masks of 2 bytes instead of 1 (2 s b h more), mean
    and deviation of two norms (8 s b more) and a causal mask of 1 byte (s^2 more), which the paper
    leaves out.

    Korthikanti et al. 2022 (arXiv:2205.05198), equation 1.
    """
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "d_model": d_model}
    for name, value in {**sizes, "num_heads": num_heads}.items():
        check_size(name, value)
    return 34 * seq_len * batch_size * d_model + 5 * num_heads * seq_len**2 * batch_size
