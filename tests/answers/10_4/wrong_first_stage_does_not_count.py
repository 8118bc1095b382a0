import torch

from slimlab.classroom.check import numbers


def compute(own, h, c):
    """What every stage does with what came to it, and with the context."""
    return h + torch.tanh(h @ own["mix"] + c @ own["read"])


def loss_of(y, target):
    """The loss of a micro-batch; those of all are added up."""
    return (y - target).square().sum() / 2


def my_diagnosis():
    """Which gradients are wrong under which schedule, on your number of stages."""
    # pop() takes the newest: the right one where one is held at a time, and under GPipe, where all
    # stages take the same wrong one. The context's way back ends at once on every stage but 0.
    p = numbers("10.4")["num_stages"]
    early = [f"{name} {s}" for s in range(p - 1) for name in ("mix", "read")]
    return {"gpipe": ["context 0"], "1f1b": ["context 0", *early]}


def mended_step(comm, schedule, weights, inputs, targets):
    """step, with gradients that are those of one process."""
    rank, last, kept, sends, loss = comm.rank, comm.world_size - 1, {}, [], 0.0
    own = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    for one in schedule.stages[rank]:
        n = one.micro_batch
        if one.kind == "forward":
            if rank == 0:
                came = None
                h, c = inputs[n], torch.tanh(inputs[n] @ own["context"])
            else:
                came = comm.recv(rank - 1, n).requires_grad_()
                h, c = came.unbind()
            both = torch.stack(
                [compute(own, h, c.detach() if rank == 0 else c), c]
            )  # the context goes on: its gradient adds up
            if rank < last:
                sends.append(comm.isend(both.detach(), rank + 1, n))
            kept[n] = came, both if rank < last else loss_of(both[0], targets[n])
        else:
            came, result = kept.pop(n)
            loss += result.item() if rank == last else 0.0
            result.backward(comm.recv(rank + 1, n) if rank < last else None)
            if rank > 0:
                sends.append(comm.isend(came.grad, rank - 1, n))
    [handle.wait() for handle in sends]
    return loss, {name: weight.grad for name, weight in own.items()}
