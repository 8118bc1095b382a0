"""Expert parallelism: many feed-forward layers, of which each token visits a few, on many ranks.

Chapter 09 explains it. A router scores the experts for every token, and the best top_k compute it,
so parameters grow with the number of experts and arithmetic does not. Every rank has some of the
experts and some of the tokens. Tokens travel to their experts and back by all_to_all, with as many
rows for each rank as the router happens to choose; gradients travel the same ways backward, since
all_to_all permutes rows, and a permutation's transpose is its inverse.

An expert has met the tokens of all ranks, so its gradient is whole where it lives. All other
weights are replicated, and their gradients are summed over the ranks as in data parallelism.

Production (GShard, Switch, DeepSpeed-MoE, Megatron-LM) adds a loss that spreads tokens evenly, and
most give each expert a capacity and drop the tokens beyond it; that keeps all sizes equal, and no
longer computes what one process does. Here none is dropped, as in MegaBlocks.
Shazeer et al. 2017 (arXiv:1701.06538); Lepikhin et al. 2020 (arXiv:2006.16668), section 3; gates as
in Fedus et al. 2021 (arXiv:2101.03961), section 2.1.
"""

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import check_number, check_size, require
from slimlab.model.layers import FeedForward
from slimlab.parallel.layout_checks import nearest_divisors
from slimlab.train.accumulate import Objective


class MixtureOfExperts(nn.Module):
    """Send every token to the experts that the router scores highest, and add what they say.

    d_model      D
    d_ff         F of each expert
    num_experts  N
    top_k        experts that each token visits
    kind         of the feed-forward layers, see slimlab.model.layers.FeedForward
    bias         give their linear layers biases

    Its parts are router, (N, D), and experts, by number: all N, until expert_parallel shares them
    out. Each result is multiplied by the router's probability for its expert, through which the
    router gets a gradient; the choice itself has none.

    rows_per_expert  (N,) int64: how many rows this rank sent to each expert in the last forward
                     pass; None before the first

    Raises InputError for sizes that are no whole numbers of at least 1, and top_k above N.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        top_k: int = 1,
        kind: str = "gelu",
        bias: bool = False,
    ):
        super().__init__()
        check_size("num_experts", num_experts)
        check_number("top_k", top_k, int, 1, num_experts)
        self.top_k, self.num_experts = top_k, num_experts
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.experts = nn.ModuleDict(
            {str(e): FeedForward(d_model, d_ff, kind, bias=bias) for e in range(num_experts)}
        )
        self.comm: Communicator | None = None
        self.rows_per_expert: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map every token by itself.

        x        (..., D), this rank's tokens
        returns  (..., D), the same tokens

        Communicates: with experts on several ranks three all_to_alls: of the number of rows, of the
        rows, of the results; backward two.
        """
        tokens = x.reshape(-1, x.shape[-1])
        probabilities, chosen = torch.softmax(self.router(tokens), dim=-1).topk(self.top_k)
        order = chosen.flatten().argsort(stable=True)  # the rows for one expert stand together
        self.rows_per_expert = chosen.flatten().bincount(minlength=self.num_experts)
        rows = self._ask_experts(tokens[order // self.top_k])
        results = torch.empty_like(rows).index_copy(0, order, rows).view(*chosen.shape, x.shape[-1])
        return (probabilities[..., None] * results).sum(1).view(x.shape)

    def _ask_experts(self, rows: Tensor) -> Tensor:
        counts = self.rows_per_expert
        if self.comm is None or self.comm.world_size == 1:
            return self._compute(rows, counts[None])
        arriving = self.comm.all_to_all(counts).view(self.comm.world_size, -1)
        sent = counts.view(self.comm.world_size, -1).sum(1).tolist()
        received = arriving.sum(1).tolist()
        rows = exchange_rows(rows, self.comm, sent, received)
        return exchange_rows(self._compute(rows, arriving), self.comm, received, sent)

    def _compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Apply this rank's experts; rows stand by rank, then by expert, counts[rank, expert]."""
        num_ranks, num_here = counts.shape
        pieces = rows.split(counts.flatten().tolist())
        by_expert = [torch.cat(pieces[e::num_here]) for e in range(num_here)]
        # An expert without rows is asked all the same: its gradient is then zero, not missing.
        results = [expert(some) for expert, some in zip(self.experts.values(), by_expert)]
        back = [one.split(counts[:, e].tolist()) for e, one in enumerate(results)]
        return torch.cat([back[e][rank] for rank in range(num_ranks) for e in range(num_here)])


def exchange_rows(
    rows: Tensor, comm: Communicator, send_sizes: list[int], recv_sizes: list[int]
) -> Tensor:
    """Send rows to their ranks; gradients come back the same way.

    rows        (n, D), those for rank 0 first
    comm        of the ranks that share the experts
    send_sizes  rows for each rank
    recv_sizes  rows from each rank
    returns     (m, D), those from rank 0 first: a shard

    Communicates: one all_to_all of the rows; backward one of the gradients of the result.
    """
    return _Exchange.apply(rows, comm, send_sizes, recv_sizes)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, comm, send_sizes, recv_sizes):
        ctx.given = comm, send_sizes, recv_sizes
        return comm.all_to_all(rows.contiguous(), send_sizes=send_sizes, recv_sizes=recv_sizes)

    @staticmethod
    def backward(ctx, grad):
        comm, send_sizes, recv_sizes = ctx.given
        return exchange_rows(grad, comm, recv_sizes, send_sizes), None, None, None


def expert_parallel(model: nn.Module, comm: Communicator) -> nn.Module:
    """Leave this rank its part of the experts of every MixtureOfExperts.

    model    has all experts, and the same weights on every rank; changed in place. Parameters keep
             their names: experts.3 is the fourth expert, wherever it lives
    comm     of the ranks that share the experts; rank r gets those from r N / w on
    returns  model

    Raises InputError if the model has no such layer, was shared out before, or the ranks do not
    divide the experts.
    """
    layers = [one for one in model.modules() if isinstance(one, MixtureOfExperts)]
    require(
        bool(layers) and all(layer.comm is None for layer in layers),
        "a model with layers MixtureOfExperts, all experts in each",
        "layers that were shared out before" if layers else "none",
        "put MixtureOfExperts(d_model, d_ff, num_experts) in the place of feed-forward layers, and "
        "call expert_parallel once",
    )
    for layer in layers:
        require(
            layer.num_experts % comm.world_size == 0,
            "a number of ranks that divides num_experts",
            f"{comm.world_size} ranks, num_experts = {layer.num_experts}, remainder "
            f"{layer.num_experts % comm.world_size}",
            f"start {nearest_divisors('world_size', comm.world_size, layer.num_experts)}",
        )
    for layer in layers:
        here = layer.num_experts // comm.world_size
        mine = [str(comm.rank * here + e) for e in range(here)]
        layer.experts = nn.ModuleDict({name: layer.experts[name] for name in mine})
        layer.comm = comm
    return model


def expert_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that only one rank has: those of experts.

    model  with layers MixtureOfExperts
    """
    return {
        f"{name}.experts.{param}" if name else f"experts.{param}"
        for name, layer in model.named_modules()
        if isinstance(layer, MixtureOfExperts)
        for param, _ in layer.experts.named_parameters()
    }


def expert_gradients(
    model: nn.Module, comm: Communicator, batch: object, objective: Objective
) -> tuple[Tensor, int]:
    """Set every gradient to that of the mean loss over all target tokens of all ranks.

    model      from expert_parallel; its gradients are replaced
    comm       as it was given there
    batch      this rank's part, at least one sequence, as in slimlab.train.accumulate
    objective  as in slimlab.train.objectives
    returns    () the mean loss per token over all ranks, and the tokens, the same on every rank

    Communicates: what the layers do, one all_reduce of 16 bytes, and one of the gradients of all
    replicated parameters together.
    Raises InputError, on every rank, if no rank has a target token.
    """
    model.zero_grad(set_to_none=True)
    loss_sum, num_tokens = objective(model, batch)
    report = torch.stack((loss_sum.detach().double(), loss_sum.new_tensor(num_tokens).double()))
    loss_sum.backward()
    total_loss, total = comm.all_reduce(report)
    require(
        int(total) > 0,
        "a batch with at least one target token on some rank",
        f"none on any of {comm.world_size} ranks",
        "check what marks the positions that do not count",
    )
    own = expert_names(model)
    replicated = [param for name, param in model.named_parameters() if name not in own]
    replicated = [param for param in replicated if param.grad is not None]
    flat = torch.cat([param.grad.reshape(-1) for param in replicated])
    flat = comm.all_reduce(flat, out=flat).split([param.numel() for param in replicated])
    for param, grad in zip(replicated, flat):
        param.grad = grad.view_as(param)
    for param in model.parameters():
        if param.grad is not None:
            param.grad /= total.to(param.dtype)
    return total_loss / total, int(total)
