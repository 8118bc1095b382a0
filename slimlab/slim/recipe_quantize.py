"""The last step of slim_checkpoint: integers for every linear layer and table.

Chapter 15 measures what it costs; slimlab.slim.quantize does the work. Production chooses a width
for each layer by what it costs there.
"""

import copy
from collections.abc import Iterable, Iterator

from torch import nn

from slimlab.model.transformer import Decoder
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize import quantize_model
from slimlab.slim.quantize_cast import CASTS, cast_model
from slimlab.slim.quantize_training import FakeQuantizedEmbedding, FakeQuantizedLinear
from slimlab.slim.recipe_config import SlimConfig
from slimlab.slim.recipe_work import Work, learn, sample_windows
from slimlab.text.progress import progress_bar

# The model of the book in 4 bits, 50 steps: 1.675 bits per byte at 3e-4, 1.685 at 1e-3.
AWARE_LR = 0.3
GROUP_SIZE, LEAST_GROUP = 32, 16


def quantize_step(model: Decoder, work: Work) -> nn.Module:
    """Quantize a copy of a model, layers of one width after the other.

    model    left as it is; groups have a size for each width
    work     its config says how
    returns  a model of integers, or of 16 bits
    """
    config, small = work.config, model
    if config.quantize in CASTS:
        return cast_model(model, config.quantize)
    if config.aware_steps:
        small = learn(
            _pretending(copy.deepcopy(small), config), work, config.aware_steps, lr_part=AWARE_LR
        )
    nearest = config.quantize == "int8" or config.aware_steps
    rounding = config.rounding or ("nearest" if nearest else "compensated")
    layers = _layers(small)
    schemes = {name: scheme_of(config, one.weight.shape[1]) for name, one in layers.items()}
    batches = sample_windows(work) if rounding == "compensated" else None
    for scheme in _in_turn(schemes.values(), work.show):
        others = {name for name, one in schemes.items() if one != scheme}
        small = quantize_model(
            small,
            scheme,
            activations=config.activations,
            rounding=rounding,
            batches=batches,
            skip=[name for name in _layers(small) if name in others],
        )
    return small


def _in_turn(schemes: Iterable[QuantScheme], show: bool) -> Iterator[QuantScheme]:
    """Each different scheme once, with a bar."""
    different = list(dict.fromkeys(schemes))
    with progress_bar("quantizing", len(different), shown=show) as bar:
        for scheme in different:
            yield scheme
            bar.update()


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear | nn.Embedding)
    }


def _pretending(model: Decoder, config: SlimConfig) -> Decoder:
    for name, one in _layers(model).items():
        scheme = scheme_of(config, one.weight.shape[1])
        if isinstance(one, nn.Linear):
            layer = FakeQuantizedLinear(one, scheme, config.activations != "none")
        else:
            layer = FakeQuantizedEmbedding(one, scheme)
        model.set_submodule(name, layer)
    return model


def scheme_of(config: SlimConfig, width: int) -> QuantScheme:
    """Choose how a matrix becomes integers.

    config   its quantize and quant_group_size
    width    columns of the matrix
    returns  a QuantScheme
    """
    num_bits = int(config.quantize.removeprefix("int"))
    if num_bits == 8:
        return QuantScheme(8)
    size = config.quant_group_size
    if size is None:
        fitting = [n for n in range(LEAST_GROUP, width + 1) if width % n == 0]
        size = min(fitting or [width], key=lambda n: abs(n - GROUP_SIZE))
    return QuantScheme(num_bits, granularity="group", quant_group_size=size, scale_dtype="bfloat16")
