import torch


class Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, bias, comm):
        own = torch.arange(rows.shape[1]).tensor_split(comm.world_size)[comm.rank]
        ctx.save_for_backward(x, rows, own)
        y = x @ rows
        y[..., own] += bias
        return comm.all_reduce(y)

    @staticmethod
    def backward(ctx, grad):
        x, rows, own = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        return grad @ rows.T, x.reshape(len(flat), -1).T @ flat, flat[:, own].sum(0), None


def row_layer(comm, x, rows, bias):
    return Row.apply(x, rows, bias, comm)


class Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, bias, comm):
        w = comm.world_size
        ctx.comm = comm
        ctx.sizes = [len(part) for part in torch.arange(rows.shape[1]).tensor_split(w)]
        ctx.save_for_backward(x, rows)
        y = torch.tensordot(rows, x, dims=([0], [x.dim() - 1]))  # (O, ...)
        y[sum(ctx.sizes[: comm.rank]) :][: len(bias)].add_(bias.view(-1, *[1] * (x.dim() - 1)))
        return comm.reduce_scatter(y, sizes=ctx.sizes).movedim(0, -1)

    @staticmethod
    def backward(ctx, own):
        x, rows = ctx.saved_tensors
        grad = ctx.comm.all_gather(own.movedim(-1, 0).contiguous(), sizes=ctx.sizes).movedim(0, -1)
        flat = grad.reshape(-1, grad.shape[-1])
        bias = own.reshape(len(flat), -1).sum(0)
        return grad @ rows.T, x.reshape(len(flat), -1).T @ flat, bias, None


def row_layer_slices(comm, x, rows, bias):
    return Slices.apply(x, rows, bias, comm)
