"""Which weights to prune: the smallest ones, one by one or in whole groups.

Chapter 15 uses it. A score says how much a weight, or a group of them, is worth; a `prune_mask` has
the shape of the weight, True where it stays. Sparsity is the part that goes. Of a single weight
magnitude and L1 norm are the same number; norms tell groups apart: rows, columns, heads.

Han et al. 2015 (arXiv:1506.02626, magnitude); Li et al. 2017 (arXiv:1608.08710, norms of groups).

Production systems score with gradients or with the second moment of the inputs too, and prune while
they train.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimlab.config import check_choice, check_number, require

SCOPES = ("layer", "global")
NORMS = (1, 2)


def prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    """List the matrices of the linear layers, those that are usually pruned.

    model    read only
    returns  name -> weight (O, I), in the order of the model; a matrix that is a table of
             embeddings too, as a tied lm_head, is left out

    Raises InputError if there is none.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = {
        f"{name}.weight".lstrip("."): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in tables
    }
    require(
        bool(weights),
        "a model with linear layers",
        f"a {type(model).__name__} without",
        "give the model itself, not a part of it",
    )
    return weights


def magnitude_masks(
    weights: Mapping[str, Tensor], sparsity: float, *, scope: str = "layer"
) -> dict[str, Tensor]:
    """Mark the weights of smallest absolute value for removal.

    weights   name -> weight of any shape, left as it is
    sparsity  part of the weights that goes, from 0 up to, not including, 1; of n weights
              round(sparsity * n) go, no more and no less
    scope     "layer": this part of every tensor; "global": of all together, so that a layer of
              small weights loses more than others
    returns   name -> prune_mask (bool, True: stays); of equal weights the first ones go

    Raises InputError for weights that are not finite, and for a sparsity that is out of range or
    would empty a tensor.
    Han et al. 2015, section 3.
    """
    check_choice("scope", scope, SCOPES)
    check_weights(weights)
    check_sparsity(sparsity)
    scores = {name: weight.detach().abs().flatten() for name, weight in weights.items()}
    if scope == "global":
        kept = _keep_largest("all weights together", torch.cat(_on_cpu(scores)), sparsity)
        parts = kept.split([score.numel() for score in scores.values()])
        _check_none_empty(scores, parts, sparsity)
    else:
        parts = [_keep_largest(name, score, sparsity) for name, score in scores.items()]
    return {
        name: part.to(weight.device).view(weight.shape)
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }


def group_norms(weight: Tensor, dim: int = 0, *, norm: int = 2) -> Tensor:
    """Score every row or column of a matrix by its norm.

    weight   at least two dims
    dim      whose slices are the groups: 0 the rows (output features), 1 the columns (inputs)
    norm     1: sum of absolute values; 2: root of the sum of squares
    returns  (weight.shape[dim],)

    Raises InputError for a dim or a norm that there is not, or weights that are not finite.
    Li et al. 2017, section 3.1, with norm 1.
    """
    check_weights({"weight": weight})
    require(
        norm in NORMS, "norm: 1 or 2", f"norm = {norm!r}", "1 for absolute values, 2 for squares"
    )
    whole = isinstance(dim, int) and not isinstance(dim, bool)
    require(
        weight.dim() >= 2 and whole and -weight.dim() <= dim < weight.dim(),
        "a matrix and one of its dims",
        f"weight {tuple(weight.shape)}, dim = {dim!r}",
        "give dim 0 for rows, 1 for columns; single weights have magnitude_masks",
    )
    groups = weight.detach().movedim(dim, 0).flatten(1)
    return torch.linalg.vector_norm(groups, ord=norm, dim=1)


def group_mask(weight: Tensor, sparsity: float, dim: int = 0, *, norm: int = 2) -> Tensor:
    """Mark the rows or columns of smallest norm for removal.

    weight    (O, I), left as it is
    sparsity  part of the groups that goes; of n groups round(sparsity * n)
    dim       0: rows; 1: columns
    norm      1 or 2, as in group_norms
    returns   prune_mask of the weight's shape, constant along each group

    Raises InputError as group_norms does, and for a sparsity that is out of range or leaves no
    group.
    Li et al. 2017.
    """
    check_sparsity(sparsity)
    kept = _keep_largest(f"groups along dim {dim}", group_norms(weight, dim, norm=norm), sparsity)
    shape = [1] * weight.dim()
    shape[dim] = -1
    return kept.view(shape).expand(weight.shape).clone()


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Return the part of all weights that the masks remove.

    masks  name -> prune_mask
    """
    n_all = sum(mask.numel() for mask in masks.values())
    return sum(int((~mask).sum()) for mask in masks.values()) / n_all


def check_sparsity(sparsity: object) -> None:
    """Refuse what is no part of a whole.

    sparsity  from 0 to 1
    """
    check_number("sparsity, the part that goes", sparsity, float, 0, 1)


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that cannot be ranked.

    weights  name -> tensor

    Raises InputError that names the first tensor with a number that is not finite.
    """
    require(bool(weights), "weights to prune", "none", "give prunable_weights(model)")
    for name, weight in weights.items():
        fits = isinstance(weight, Tensor) and weight.is_floating_point() and weight.numel() > 0
        given = (
            f"{name} {tuple(weight.shape)} of dtype {weight.dtype}"
            if isinstance(weight, Tensor)
            else f"{name}, a {type(weight).__name__}"
        )
        require(fits, "weights: floating, at least one", given, "prune before quantizing")
        bad = int((~torch.isfinite(weight)).sum())
        require(
            bad == 0,
            "weights that are finite, so that they can be ranked",
            f"{name}: {bad} of {weight.numel()} are NaN or infinite",
            "take a checkpoint from before the training diverged",
        )


def _on_cpu(scores: Mapping[str, Tensor]) -> list[Tensor]:
    return [score.cpu() for score in scores.values()]


def _keep_largest(name: str, scores: Tensor, sparsity: float) -> Tensor:
    """Return a mask (n,) that drops exactly round(sparsity * n) of the smallest scores."""
    n_pruned = round(sparsity * scores.numel())
    require(
        n_pruned < scores.numel(),
        f"a sparsity that leaves something of {name}",
        f"sparsity = {sparsity:g}, all {scores.numel()} would go",
        f"give at most {_sparsity_text(scores.numel() - 1, scores.numel())}",
    )
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(stable=True)[:n_pruned]] = False
    return kept


def _check_none_empty(scores: Mapping[str, Tensor], parts: list[Tensor], sparsity: float) -> None:
    """Refuse a global sparsity that takes all of one tensor; name the largest that does not."""
    empty = [name for name, part in zip(scores, parts, strict=True) if not part.any()]
    if not empty:
        return
    flat = torch.cat(_on_cpu(scores))
    place = torch.empty(len(flat), dtype=torch.long)
    place[flat.argsort(stable=True)] = torch.arange(len(flat))
    sizes = [score.numel() for score in scores.values()]
    n_most = min(int(part.max()) for part in place.split(sizes))
    raise_at = f"sparsity = {sparsity:g} would take all {scores[empty[0]].numel()} of {empty[0]}"
    require(
        False,
        "a global sparsity that empties no tensor",
        raise_at,
        f'give at most {_sparsity_text(n_most, len(flat))}, or scope="layer"',
    )


def _sparsity_text(n_pruned: int, n_all: int) -> str:
    """Write n_pruned / n_all with four decimals or as many as it takes, never rounded up."""
    digits = max(4, len(str(n_all)))
    return f"{10**digits * n_pruned // n_all / 10**digits:.{digits}g}"
