"""Heads, neurons and layers of a decoder removed for good: smaller matrices, not masked ones.

Chapter 15 uses it. The smaller model has a configuration of its own, so it is saved, loaded,
trained and cut over ranks as any other. That is why all layers keep equally many heads and neurons.

Michel et al. 2019 (arXiv:1905.10650, heads); Li et al. 2017 (arXiv:1608.08710, neurons by norm);
Fan et al. 2020 (arXiv:1909.11556) and Sanh et al. 2019 (arXiv:1910.01108) for layers.

Scores are norms of weights or, on a sample of text, sizes of what a part really writes.

Production also narrows d_model, lets layers differ in width, and scores by the loss on such a
sample.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from slimlab.config import ModelConfig, check_number, require
from slimlab.model.transformer import Decoder
from slimlab.slim.prune_scores import check_weights, group_norms
from slimlab.slim.quantize_calibrate import record_inputs


def remove_heads(model: Decoder, heads: Sequence[Sequence[int]]) -> Decoder:
    """Copy a model without some of its query heads; keys and values that nobody reads go too.

    model    left as it is
    heads    one list per layer of the query heads that go, equally many in every layer. With
             grouped queries, head h reads the keys of group h // (H/K); groups that stay must keep
             equally many heads, and all layers equally many groups
    returns  a model with its own weights and its own config; d_head is as before

    Raises InputError for heads that do not exist, lists that differ in length, a layer that would
    be empty, and groups that would differ.
    Michel et al. 2019, section 2.3.
    """
    config = _config_of(model)
    left = _check_lists("heads", heads, config.num_layers, config.num_heads)
    groups = [_check_groups(number, kept, config) for number, kept in enumerate(left)]
    require(
        len({len(kept) for kept in groups}) == 1,
        "equally many groups of keys and values left in every layer",
        f"{', '.join(str(len(kept)) for kept in groups)} left",
        "remove whole groups from every layer alike, or the same number of heads from each group",
    )
    smaller = copy.deepcopy(model)
    for block, heads_left, groups_left in zip(smaller.blocks, left, groups, strict=True):
        attention = block.attention
        rows = _features(heads_left, config.d_head)
        shared = _features(groups_left, config.d_head)
        _keep(attention.q_proj, 0, rows)
        _keep(attention.k_proj, 0, shared)
        _keep(attention.v_proj, 0, shared)
        _keep(attention.out_proj, 1, rows)
    return _with_config(smaller, num_heads=len(left[0]), num_kv_heads=len(groups[0]))


def remove_neurons(model: Decoder, neurons: Sequence[Sequence[int]]) -> Decoder:
    """Copy a model without some of the features inside its feed-forward layers.

    model    left as it is
    neurons  one list per layer of the features, from 0 to F - 1, that go, equally many in each
    returns  a model with its own weights and its own config, d_ff smaller

    Raises InputError for neurons that do not exist, lists that differ in length, and a layer that
    would be empty.
    """
    config = _config_of(model)
    left = _check_lists("neurons", neurons, config.num_layers, config.d_ff)
    smaller = copy.deepcopy(model)
    for block, kept in zip(smaller.blocks, left, strict=True):
        rows = torch.tensor(kept)
        for name in ("up_proj", "gate_proj") if config.gated else ("up_proj",):
            _keep(getattr(block.feed_forward, name), 0, rows)
        _keep(block.feed_forward.down_proj, 1, rows)
    return _with_config(smaller, d_ff=len(left[0]))


def remove_layers(model: Decoder, layers: Sequence[int]) -> Decoder:
    """Copy a model without some of its blocks.

    model    left as it is
    layers   numbers, from 0, of the blocks that go
    returns  a model with its own weights and its own config, num_layers smaller

    Raises InputError for layers that do not exist, or if none would stay.
    Sanh et al. 2019, section 3: a student that starts from some of its teacher's layers.
    """
    config = _config_of(model)
    kept = _check_list("layers", layers, config.num_layers)
    smaller = copy.deepcopy(model)
    smaller.blocks = nn.ModuleList(smaller.blocks[number] for number in kept)
    return _with_config(smaller, num_layers=len(kept))


def head_scores(model: Decoder, batches: Iterable[Tensor] | None = None) -> Tensor:
    """Score every query head by what it writes.

    model    left as it is
    batches  (B, T) token ids on which it is measured; None: judge by the weights alone
    returns  (num_layers, H). Measured: root mean square, over all tokens, of the length of what the
             head adds to the output. By weights: the norm of what it reads times that of what it
             writes. Scaling the values up and the output down by a number changes neither

    Raises InputError for weights or inputs that are not finite, and if there are no batches.
    """
    config = _config_of(model)
    if batches is not None:
        return _written(model, batches, "attention.out_proj", config.d_head)
    scores = []
    for block in model.blocks:
        values = block.attention.v_proj.weight.unflatten(0, (-1, config.d_head))
        outputs = block.attention.out_proj.weight.unflatten(1, (-1, config.d_head))
        shared = config.num_heads // config.num_kv_heads
        scores.append(group_norms(values).repeat_interleave(shared) * group_norms(outputs, 1))
    return torch.stack(scores)


def neuron_scores(model: Decoder, batches: Iterable[Tensor] | None = None) -> Tensor:
    """Score every feature of the feed-forward layers, as head_scores does heads.

    model    left as it is
    batches  as there
    returns  (num_layers, F). By weights: norm of its row of up_proj times that of its column of
             down_proj. The gate of "swiglu" is not read, so that on a trained model of that kind
             this may be worse than chance

    Raises InputError as head_scores does.
    """
    _config_of(model)
    if batches is not None:
        return _written(model, batches, "feed_forward.down_proj", 1)
    layers = [block.feed_forward for block in model.blocks]
    return torch.stack(
        [group_norms(f.up_proj.weight) * group_norms(f.down_proj.weight, 1) for f in layers]
    )


def weakest(scores: Tensor, num_removed: int, *, num_groups: int = 1) -> list[list[int]]:
    """List the heads or neurons of lowest score in every layer, ready to be removed.

    scores       (num_layers, n), from head_scores or neuron_scores
    num_removed  from each layer, from 0 to n - 1, a multiple of num_groups
    num_groups   of neighbours, which lose equally many each: with grouped queries give
                 config.num_kv_heads; 1 where every head has its own keys
    returns      per layer, ascending; of equal scores the first ones go

    Raises InputError for a number that is out of range or does not divide, and scores that are not
    finite.
    """
    check_weights({"scores": scores})
    require(
        scores.dim() == 2 and isinstance(num_groups, int) and num_groups >= 1,
        "scores (num_layers, n) and a number of groups of at least 1",
        f"scores {tuple(scores.shape)}, num_groups = {num_groups!r}",
        "give head_scores(model) or neuron_scores(model)",
    )
    width = scores.shape[1]
    check_number("num_removed", num_removed, int, 0, width - 1)
    below = num_removed // num_groups * num_groups
    nearest = f"{below} or {below + num_groups}" if below + num_groups < width else f"{below}"
    require(
        num_removed % num_groups == 0 and width % num_groups == 0,
        f"num_removed, a multiple of num_groups = {num_groups}, which divides {width}",
        f"num_removed = {num_removed}",
        f"remove {nearest}, equally many from each group",
    )
    grouped = scores.detach().unflatten(1, (num_groups, -1))
    lowest = grouped.argsort(dim=2, stable=True)[:, :, : num_removed // num_groups]
    firsts = torch.arange(num_groups, device=scores.device) * (width // num_groups)
    return (lowest + firsts[:, None]).flatten(1).sort(dim=1).values.tolist()


def _written(model: Decoder, batches: Iterable[Tensor], layer: str, width: int) -> Tensor:
    """Measure what every part of `width` inputs adds to a layer's output, in each block."""
    records = record_inputs(model, batches, max_rows=1, squares=True)
    scores = []
    for number in range(len(model.blocks)):
        name = f"blocks.{number}.{layer}"
        weight, record = model.get_submodule(name).weight.detach().double(), records[name]
        # |W_p x_p|^2 = sum of (W^T W)_ij x_i x_j over the inputs i, j of part p.
        products = (weight.t() @ weight) * record.squares / record.num_rows
        parts = products.unflatten(1, (-1, width)).unflatten(0, (-1, width))
        scores.append(parts.diagonal(dim1=0, dim2=2).sum((0, 1)).clamp(min=0).sqrt())
    return torch.stack(scores)


def _config_of(model: object) -> ModelConfig:
    require(
        isinstance(model, Decoder),
        "a Decoder, whole on one rank",
        f"a {type(model).__name__}",
        'build it with kind="decoder"',
    )
    config, first = model.config, model.blocks[0]
    width, d_ff = first.attention.q_proj.out_features, first.feed_forward.up_proj.out_features
    require(
        width == config.num_heads * config.d_head and d_ff == config.d_ff,
        f"a model of {config.num_heads} heads and d_ff = {config.d_ff}, as its config says",
        f"one whose layers have {width // config.d_head} heads and d_ff = {d_ff}",
        "gather the parts of all ranks first",
    )
    return config


def _check_list(name: str, numbers: Sequence[int], size: int) -> list[int]:
    """Return what stays of 0 ... size - 1."""
    listed = list(numbers) if isinstance(numbers, Sequence) else [numbers]
    for number in listed:
        whole = isinstance(number, int) and not isinstance(number, bool)
        nearest = min(max(number, 0), size - 1) if whole else 0
        require(
            whole and 0 <= number < size,
            f"{name} from 0 to {size - 1}",
            f"{number!r}",
            f"the nearest that exists is {nearest}",
        )
    require(
        len(set(listed)) == len(listed),
        f"{name}, each once",
        f"{listed}",
        f"name them once: {sorted(set(listed))}",
    )
    require(
        len(listed) < size,
        f"{name} of which at least one stays",
        f"all {size}",
        f"remove at most {size - 1}",
    )
    return [number for number in range(size) if number not in set(listed)]


def _check_lists(
    name: str, lists: Sequence[Sequence[int]], num_layers: int, size: int
) -> list[list[int]]:
    given = len(lists) if isinstance(lists, Sequence) else repr(lists)
    require(
        given == num_layers,
        f"{name}: one list for each of {num_layers} layers",
        f"{given} of them",
        f"give {name} as weakest(...) does",
    )
    left = [_check_list(f"{name} of layer {n}", numbers, size) for n, numbers in enumerate(lists)]
    counts = [size - len(kept) for kept in left]
    require(
        len(set(counts)) == 1,
        f"equally many {name} from every layer",
        f"{', '.join(map(str, counts))}",
        f"remove {min(counts)} or {max(counts)} from each",
    )
    return left


def _check_groups(number: int, kept: list[int], config: ModelConfig) -> list[int]:
    """Return the groups that stay in one layer, each with equally many query heads."""
    shared = config.num_heads // config.num_kv_heads
    counts = [sum(head // shared == group for head in kept) for group in range(config.num_kv_heads)]
    require(
        len({count for count in counts if count}) == 1,
        f"equally many heads in every group of layer {number} that stays",
        f"{', '.join(map(str, counts))} left in groups of {shared}",
        f"remove a multiple of {config.num_kv_heads} heads, as many from each group, or whole "
        f"groups of {shared} neighbours",
    )
    return [group for group, count in enumerate(counts) if count]


def _features(numbers: list[int], d_head: int) -> Tensor:
    return (torch.tensor(numbers)[:, None] * d_head + torch.arange(d_head)).flatten()


def _keep(linear: nn.Linear, dim: int, numbers: Tensor) -> None:
    """Keep some output (dim 0) or input (dim 1) features of a layer."""
    numbers = numbers.to(linear.weight.device)
    names = ("weight", "bias") if dim == 0 and linear.bias is not None else ("weight",)
    for name in names:
        old = getattr(linear, name)
        new = nn.Parameter(old.detach().index_select(dim, numbers), old.requires_grad)
        setattr(linear, name, new)
    setattr(linear, ("out_features", "in_features")[dim], len(numbers))


def _with_config(model: Decoder, **sizes: int) -> Decoder:
    model.config = model.embedding.config = replace(model.config, **sizes)
    return model
