"""Compressed gradients: fewer bytes, an approximate sum, and a memory of what was left out.

Chapter 08 uses it. A compressor stands between a bucket of gradients and the ranks' sum: each rank
sends a short form of its gradients, and all ranks add up the same short forms, so their gradients
are equal bit for bit, though not those of one process.

Error feedback makes up for it: what a rank did not send stays in a residual and is added to its
gradients in the next step. All that was sent and what is left add up to all gradients. It holds one
more gradient in memory, and two during a step. Gradients are sums over tokens here (see
slimlab.parallel.data), so residuals are sums too, and unequal shares are weighted as ever.

Half        16 bits per element, one all_reduce
Sign        1 bit per element and a scale per parameter: Bernstein et al. 2018 (arXiv:1802.04434),
            Karimireddy et al. 2019 (arXiv:1901.09847)
TopK        the largest elements and their places: Lin et al. 2018 (arXiv:1712.01887), here without
            its momentum correction, clipping and warm-up
PowerSGD    in slimlab.parallel.compression_powersgd

Short forms that cannot be added, signs and places, are gathered: each rank receives those of all,
so what arrives grows with the number of ranks (slimlab.plan.compression.ring_bytes).

Production (DistributedDataParallel) calls them communication hooks and has 16 bits and PowerSGD. It
lets the backward pass go on meanwhile; here it waits for each bucket that is compressed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.config import check_number, require

# Of the bits below float16's largest power of two, 2^15, the sum of w ranks needs log2(w).
FLOAT16_EXPONENT = 15
FLOAT32_LEAST_EXPONENT = -126


class Compressor:
    """What all compressors share: the residuals, and when they change.

    One compressor is the start of many: each slimlab.parallel.data.DataParallel copies it.
    Residuals are not part of a checkpoint: a run that goes on starts without. They are in the units
    of the loss that was back-propagated: where a loss scaler changes its scale, call
    scale_residuals.

    error_feedback  add to each gradient what was not sent before; False: forget it

    residuals       number of a bucket -> what this rank has not sent yet, flat as the bucket; each
                    rank's own
    """

    def __init__(self, *, error_feedback: bool = True):
        self.error_feedback = error_feedback
        self.residuals: dict[int, Tensor] = {}
        self._pending: dict[int, Tensor] = {}
        self._finite = True

    def check(self, shapes: Sequence[torch.Size]) -> None:
        """Refuse a model that the compressor cannot be used for.

        shapes  of all parameters that are trained, the same on every rank

        Communicates: nothing.
        Raises InputError.
        """

    def begin_step(self) -> None:
        """Forget what a step that was given up has left behind."""
        self._pending, self._finite = {}, True

    def sum_over_ranks(
        self, number: int, flat: Tensor, shapes: Sequence[torch.Size], comm: Communicator
    ) -> None:
        """Replace this rank's gradients by the sum of what all ranks sent.

        number  of the bucket
        flat    (n,) this rank's gradients, one behind the other; changed in place: afterwards the
                same on every rank, bit for bit
        shapes  of the gradients in it
        comm    of the ranks that hold replicas

        Communicates: the calls that slimlab.plan.compression predicts.
        """
        if self.error_feedback and number in self.residuals:
            flat.add_(self.residuals[number])
        total, sent = self._exchange(number, flat, shapes, comm)
        if self.error_feedback:
            self._pending[number] = flat - sent
        flat.copy_(total)
        self._finite = self._finite and bool(flat.isfinite().all())

    def finish_step(self, accepted: bool) -> None:
        """Keep the new residuals, or the old ones if nobody will use the gradients of this step.

        accepted  the step was not refused; sums that are not finite, which all ranks see alike, are
                  not accepted either: a loss scaler skips such a step
        """
        if accepted and self._finite:
            self._keep()
        self.begin_step()

    @torch.no_grad()
    def scale_residuals(self, factor: float) -> None:
        """Bring residuals to another unit, for instance that of a loss scaler's new scale.

        factor  new scale / old scale, the same on every rank
        """
        check_number("factor", factor, float, 0, math.inf, above=True)
        for residual in self.residuals.values():
            residual.mul_(factor)

    def _keep(self) -> None:
        self.residuals = self._pending

    def _exchange(self, number, flat, shapes, comm) -> tuple[Tensor, Tensor]:
        """Return the sum of what the ranks sent, and what this one sent, both (n,)."""
        raise NotImplementedError


class Half(Compressor):
    """16 bits per element.

    A sum over ranks could exceed 65504, the largest float16. So the ranks agree on a power of two,
    which rounds nothing, that brings the largest gradient of any rank below 2^15 / w: the sum of w
    such numbers stays below 2^15. Small gradients are moved up by the same, away from the end of
    the range below. bfloat16 has the range of float32 and needs none of it, but has 8 bits of
    precision where float16 has 11.

    Runtimes may round after each addition or once at the end; no residual holds that last error.

    dtype           torch.float16 or torch.bfloat16
    error_feedback  as in Compressor

    Raises InputError for another dtype.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, *, error_feedback: bool = True):
        super().__init__(error_feedback=error_feedback)
        require(
            dtype in (torch.float16, torch.bfloat16),
            "dtype: torch.float16 or torch.bfloat16",
            f"dtype = {dtype!r}",
            "choose one of these; for fewer bits, Sign()",
        )
        self.dtype = dtype

    def _exchange(self, number, flat, shapes, comm):
        scale = _common_scale(flat, comm) if self.dtype == torch.float16 else 1.0
        short = (flat / scale).to(self.dtype)
        sent = short.to(flat.dtype).mul_(scale)
        short = comm.all_reduce(short, out=short)
        return short.to(flat.dtype).mul_(scale), sent


class Sign(Compressor):
    """1 bit per element: its sign; and one number per parameter, the mean of its absolute values.

    Without error feedback it can stall: where large parts of the ranks' gradients cancel, the small
    part that does not has no say in any sign. A 0 counts as positive.

    error_feedback  as in Compressor
    """

    def _exchange(self, number, flat, shapes, comm):
        sizes = [shape.numel() for shape in shapes]
        scales = torch.stack([part.abs().mean() for part in flat.split(sizes)])
        message = _join([scales, pack_bits(flat >= 0)])
        messages = comm.all_gather(message).view(comm.world_size, -1)
        repeats = torch.tensor(sizes, device=flat.device)
        total = _unpack_signs(messages[0], scales, repeats)
        for row in messages[1:]:
            total += _unpack_signs(row, scales, repeats)
        return total, _unpack_signs(message, scales, repeats)


class TopK(Compressor):
    """The largest elements of each bucket, by absolute value, and their places.

    Without error feedback an element that is never among the largest is never sent.

    density         elements sent, as a part of those of the bucket: above 0 and at most 1; at least
                    one is sent
    error_feedback  as in Compressor

    Raises InputError for a density that is not above 0 and at most 1.
    """

    def __init__(self, density: float = 0.01, *, error_feedback: bool = True):
        super().__init__(error_feedback=error_feedback)
        check_number("density", density, float, 0, 1, above=True)
        self.density = density

    def _exchange(self, number, flat, shapes, comm):
        num_sent = max(1, round(self.density * len(flat)))
        places = flat.abs().topk(num_sent, sorted=False).indices
        whole = torch.int32 if len(flat) < 2**31 else torch.int64
        message = _join([flat[places], places.to(whole)])
        total = torch.zeros_like(flat)
        # One rank after the other, in the same order everywhere; a rank's places are all different.
        for row in comm.all_gather(message).view(comm.world_size, -1):
            values, at = _cut(row, [(num_sent, flat.dtype), (num_sent, whole)])
            total[at.long()] += values
        sent = torch.zeros_like(flat)
        sent[places] = flat[places]
        return total, sent


def pack_bits(bits: Tensor) -> Tensor:
    """Put eight truth values into each byte, the first one lowest.

    bits     (n,) bool
    returns  (ceil(n / 8),) uint8; the last byte is filled with zeros
    """
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8))
    return (padded.view(-1, 8) << _places(bits.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """Undo pack_bits.

    packed    (ceil(n / 8),) uint8
    num_bits  n
    returns   (n,) bool
    """
    return ((packed[:, None] >> _places(packed.device)) & 1).view(-1)[:num_bits].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _common_scale(flat: Tensor, comm: Communicator) -> float:
    """Find the power of two that brings every rank's gradients below 2^15 / w."""
    largest = flat.abs().max().double()
    # Not every runtime's maximum passes on what is not a number.
    largest = torch.where(largest.isfinite(), largest, torch.inf).view(1)
    largest = float(comm.all_reduce(largest, op="max", out=largest))
    if largest == 0 or largest == math.inf:
        return 1.0
    exponent = math.frexp(largest)[1] + (comm.world_size - 1).bit_length() - FLOAT16_EXPONENT
    return 2.0 ** max(exponent, FLOAT32_LEAST_EXPONENT)


def _unpack_signs(message: Tensor, scales: Tensor, sizes: Tensor) -> Tensor:
    num_elements = int(sizes.sum())
    wanted = [(len(scales), scales.dtype), (-(-num_elements // 8), torch.uint8)]
    its_scales, packed = _cut(message, wanted)
    spread = its_scales.repeat_interleave(sizes)
    return torch.where(unpack_bits(packed, num_elements), spread, -spread)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors])


def _cut(message: Tensor, wanted: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Cut a message of _join into its tensors, of so many elements of a dtype each."""
    parts = message.split([count * dtype.itemsize for count, dtype in wanted])
    # Cloned, since a number must begin at a multiple of its size.
    return [part.clone().view(dtype) for part, (_, dtype) in zip(parts, wanted)]
