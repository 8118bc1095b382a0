import torch

from slimlab.parallel.tensor_collectives import reduce_from_ranks


def row_layer(comm, x, rows, bias):
    """y (..., O), the same on every rank; the bias is cut into slices."""
    num_outputs = rows.shape[1]
    size, longer = divmod(num_outputs, comm.world_size)
    every = [size + (rank < longer) for rank in range(comm.world_size)]
    return reduce_from_ranks(x @ rows, comm) + comm.all_gather(bias, sizes=every)


class ScatterColumns(torch.autograd.Function):
    """For row_layer_slices, if you like: add up, and leave each rank its columns."""

    @staticmethod
    def forward(ctx, y, comm, sizes):
        ctx.comm, ctx.sizes = comm, sizes
        columns = y.movedim(-1, 0).contiguous()
        return comm.reduce_scatter(columns, sizes=sizes).movedim(0, -1)

    @staticmethod
    def backward(ctx, grad):
        columns = grad.movedim(-1, 0).contiguous()
        return ctx.comm.all_gather(columns, sizes=ctx.sizes).movedim(0, -1), None, None


def row_layer_slices(comm, x, rows, bias):
    """This rank's columns of y, cut as the bias is."""
    size, longer = divmod(rows.shape[1], comm.world_size)
    sizes = [size + (rank < longer) for rank in range(comm.world_size)]
    return ScatterColumns.apply(x @ rows, comm, sizes) + bias  # behind the sum: once
