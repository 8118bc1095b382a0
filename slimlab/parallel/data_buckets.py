"""Buckets: gradients that travel together, each on its way as soon as it is full.

Chapter 08 explains them. A small all_reduce costs its latency, whatever it carries; one for all
gradients cannot start before the last of them is there. Buckets are between the two. The backward
pass reaches the last parameters first, so they are in the first bucket.

Buckets are sent in a fixed order, a full one after those before it, since ranks must make the same
calls in the same order, and autograd may reach two branches of a model in different orders.

Production (DistributedDataParallel) orders its buckets by the first backward pass that it saw,
makes the first bucket small, and starts NCCL on a stream of its own. Li et al. 2020
(arXiv:2006.15704), section 3.2.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Handle
from slimlab.config import InputError, check_size, require
from slimlab.parallel.compression import Compressor


def bucket_layout(tensors: Iterable[Tensor], bucket_bytes: int | None) -> list[list[int]]:
    """Divide tensors into buckets of neighbours that have one dtype and one device.

    tensors       any shapes, in the order in which they are to travel
    bucket_bytes  a bucket is full when the next tensor would make it larger than this; a larger
                  tensor has one to itself; None: one bucket for each run of equal dtypes
    returns       the numbers of the tensors in each bucket

    Raises InputError if bucket_bytes is not a whole number of at least 1.
    """
    if bucket_bytes is not None:
        check_size("bucket_bytes", bucket_bytes)
    buckets, kind, held_bytes = [], None, 0
    for number, tensor in enumerate(tensors):
        n_bytes = tensor.numel() * tensor.element_size()
        full = bucket_bytes is not None and held_bytes + n_bytes > bucket_bytes
        if kind != (tensor.dtype, tensor.device) or (full and held_bytes):
            buckets.append([])
            kind, held_bytes = (tensor.dtype, tensor.device), 0
        buckets[-1].append(number)
        held_bytes += n_bytes
    return buckets


class Bucket:
    """Gradients that travel together: one flat tensor, and the parameters whose views are in it.

    params  their parameters, of one dtype and device
    names   of the parameters
    """

    def __init__(self, params: list[nn.Parameter], names: list[str]):
        self.params, self.names = params, names
        sizes = [param.numel() for param in params]
        self.flat = torch.zeros(sum(sizes), dtype=params[0].dtype, device=params[0].device)
        parts = self.flat.split(sizes)
        self.views = [part.view_as(param) for part, param in zip(parts, params)]
        self.filled = [False] * len(params)  # since the step began
        self.arrived = [False] * len(params)  # in this backward pass
        self.handle: Handle | None = None

    def take(self, number: int) -> None:
        """Bring a gradient into the flat tensor, and let the parameter's grad be that view.

        number  of the parameter in the bucket
        """
        param, view = self.params[number], self.views[number]
        if param.grad is not view:
            # Autograd keeps a first gradient as it is and adds later ones in place, in the view.
            view.copy_(param.grad)
            param.grad = view
        self.filled[number] = True

    def not_finite(self) -> int | None:
        """Return the number of the first parameter whose gradient is not finite; None: all are."""
        # The sum is one pass; it may be infinite where no term is, so look again.
        if self.flat.sum().isfinite():
            return None
        return next((i for i, view in enumerate(self.views) if not view.isfinite().all()), None)


class GradientBuckets:
    """All gradients of a model in buckets, summed over the ranks.

    model         whose parameters that require a gradient are meant
    comm          of the ranks that hold replicas of the model
    bucket_bytes  as in bucket_layout; None: one flat buffer
    overlap       start the all_reduce of a bucket in the backward pass, as soon as it is full
    check_finite  look for gradients that are not finite before they are mixed with other ranks'
    compressor    stands between each bucket and its sum over the ranks, which the backward pass
                  then waits for; None: plain sums

    names    of the parameters, in the order of the buckets
    buckets  of slimlab.parallel.data_buckets.Bucket, in the order of sending

    Raises InputError for a model without anything to train, or one that does not fit the
    compressor.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        *,
        bucket_bytes: int | None,
        overlap: bool,
        check_finite: bool,
        compressor: Compressor | None = None,
    ):
        self._comm, self._overlap, self._check_finite = comm, overlap, check_finite
        self._compressor = compressor
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad][::-1]
        require(
            bool(named),
            "a model with parameters that require a gradient",
            f"a {type(model).__name__} with none",
            "unfreeze what you want to train: param.requires_grad_(True)",
        )
        if compressor is not None:
            compressor.check([param.shape for _, param in named])
        self.names = [name for name, _ in named]
        self.buckets = [
            Bucket([named[i][1] for i in numbers], [named[i][0] for i in numbers])
            for numbers in bucket_layout((param for _, param in named), bucket_bytes)
        ]
        self._sending, self._next, self.bad_name = False, 0, None
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._arrive, bucket, number))
            for bucket in self.buckets
            for number, param in enumerate(bucket.params)
        ]

    def close(self) -> None:
        """Leave the model alone from now on; gradients stay where they are."""
        for hook in self._hooks:
            hook.remove()

    def begin_step(self) -> None:
        """Forget all gradients."""
        self._next, self.bad_name = 0, None
        if self._compressor is not None:
            self._compressor.begin_step()
        for bucket in self.buckets:
            bucket.filled = [False] * len(bucket.params)
            bucket.handle = None
            for param in bucket.params:
                param.grad = None

    def begin_pass(self, send: bool) -> None:
        """Prepare for a backward pass.

        send  it is the last of the step: send what it completes
        """
        self._sending = send
        for bucket in self.buckets:
            bucket.arrived = [False] * len(bucket.params)

    def filled(self) -> list[bool]:
        """Tell which parameters got a gradient in this step on this rank, in the order of names."""
        return [one for bucket in self.buckets for one in bucket.filled]

    def send_rest(self) -> None:
        """Send the buckets that the backward pass did not complete, zeros for what is missing.

        Communicates: one all_reduce per bucket that is not on its way, or the compressor's calls.
        """
        self._sending = False
        while self._next < len(self.buckets):
            self._send(self.buckets[self._next])

    def finish(self, factor: float, used: list[bool], accepted: bool = True) -> None:
        """Wait for all buckets, and leave the scaled sums as the parameters' gradients.

        factor    what each sum is multiplied by
        used      which parameters have a gradient on some rank, in the order of names; the others
                  are left without, so that no optimizer touches them, but for what a compressor
                  sent of their earlier gradients
        accepted  False: the step is about to be refused
        """
        if self._compressor is not None:
            self._compressor.finish_step(accepted)
        used = iter(used)
        for bucket in self.buckets:
            if bucket.handle is not None:
                bucket.handle.wait()
                bucket.handle = None
            bucket.flat.mul_(factor)
            for param, view in zip(bucket.params, bucket.views):
                sent_late = self._compressor is not None and bool(view.any())
                param.grad = view if next(used) or sent_late else None

    def _arrive(self, bucket: Bucket, number: int, param: nn.Parameter) -> None:
        if bucket.arrived[number]:
            raise InputError(
                "one gradient for each parameter in a backward pass",
                f"a second one for {bucket.names[number]}",
                "call backward through this replica only, once per micro-batch; recompute with "
                "use_reentrant=False",
            )
        bucket.take(number)
        bucket.arrived[number] = True
        if self._sending and self._overlap:
            while self._next < len(self.buckets) and all(self.buckets[self._next].arrived):
                self._send(self.buckets[self._next])

    def _send(self, bucket: Bucket) -> None:
        for view, filled in zip(bucket.views, bucket.filled):
            if not filled:
                view.zero_()
        if self._check_finite and self.bad_name is None:
            number = bucket.not_finite()
            self.bad_name = None if number is None else bucket.names[number]
        flat = bucket.flat
        if self._compressor is not None:
            shapes = [param.shape for param in bucket.params]
            self._compressor.sum_over_ranks(self._next, flat, shapes, self._comm)
        elif self._overlap:
            bucket.handle = self._comm.all_reduce(flat, out=flat, async_op=True)
        else:
            self._comm.all_reduce(flat, out=flat)
        self._next += 1
