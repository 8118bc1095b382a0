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
    first, last, total = comm.rank == 0, comm.rank == comm.world_size - 1, 0.0
    own = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    kept, sends = [None] * len(inputs), []
    for one in schedule.stages[comm.rank]:
        n = one.micro_batch
        if one.kind == "forward":
            if first:
                h, c = inputs[n], torch.tanh(inputs[n] @ own["context"])
            else:
                h, c = (x.clone().requires_grad_() for x in comm.recv(comm.rank - 1, n))
            y = compute(own, h, c)
            if not last:
                sends.append(comm.isend(torch.stack([y.detach(), c.detach()]), comm.rank + 1, n))
            kept[n] = h, c, y
            continue
        h, c, y = kept[n]
        if last:
            loss = loss_of(y, targets[n])
            total += loss.item()
            loss.backward()
        else:
            back_y, back_c = comm.recv(comm.rank + 1, n)
            torch.autograd.backward([y, c], [back_y, back_c])
        if not first:
            sends.append(comm.isend(torch.stack([h.grad, c.grad]), comm.rank - 1, n))
        kept[n] = None
    for handle in sends:
        handle.wait()
    return total, {name: weight.grad for name, weight in own.items()}
