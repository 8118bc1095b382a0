"""Stage 3 of ZeRO: the whole weights of a unit exist only while it computes.

Chapter 08 uses it. Before a unit computes, forward or backward, its row is gathered from the
shards, and the next unit's is asked for; all others are freed, but for one that is tied to a later
unit and would only come back. The last unit stays from its forward to its backward pass, since that
is where the backward pass begins.

What is gathered, and when, follows from the list of units alone, so a rank without data makes the
same calls and computes nothing. A freed parameter reads as NaN.

Production (fully_shard) gathers on a stream of its own, and keeps weights between the two passes on
request (reshard_after_forward=False).
"""

from functools import partial

import torch
from torch import Tensor, nn

from slimlab.config import InputError, require
from slimlab.parallel.zero_gradients import ShardedGradients
from slimlab.parallel.zero_shards import FlatParameter
from slimlab.parallel.zero_units import Unit


class ShardedUnits(ShardedGradients):
    """The gradients of all units, as in stage 2, and their weights, each there when it is needed.

    units         in the order of the forward pass
    flats         the flat parameters of each unit; they are freed
    model         of the units
    check_finite  as in ShardedGradients
    prefetch      ask for the next unit's weights before a unit computes

    gathered_peak_bytes  most memory that whole rows of weights had at one time
    """

    def __init__(
        self,
        units: list[Unit],
        flats: list[list[FlatParameter]],
        model: nn.Module,
        check_finite: bool,
        prefetch: bool,
    ):
        trained = [flat for some in reversed(flats) for flat in some if flat.trained]
        super().__init__(trained, 3, check_finite)
        self._unit_flats, self._prefetch = flats, prefetch
        self._units, self._last = units, len(units) - 1
        self.gathered_peak_bytes = self._gathered_bytes = 0
        self._there: set[int] = set()
        self._at, self._in_backward = -1, False
        needs = [set(unit.needs) for unit in units]
        self._forward_needs = needs
        self._backward_needs = [
            some - {number} if unit.lookup_only else some
            for number, (unit, some) in enumerate(zip(units, needs))
        ]
        # Rows that stand before this one are complete when the backward pass comes to a unit.
        self._due = [
            next((flat for some in flats[number::-1] for flat in some if flat.trained), None)
            for number in range(len(units))
        ]
        # Units before the first that is trained have no backward pass.
        is_trained = [any(flat.trained for flat in some) for some in flats]
        self._first = next(n for n, some in enumerate(needs) if any(is_trained[m] for m in some))
        for number, unit in enumerate(units):
            for module in unit.modules:
                self._hooks += [
                    module.register_forward_pre_hook(partial(self._before_forward, number)),
                    module.register_forward_hook(partial(self._after_forward, number)),
                ]
        self._hooks.append(model.register_forward_hook(self._after_model))
        for some in flats:
            for flat in some:
                flat.free()

    def close(self) -> None:
        """Gather all weights, and leave the model alone from now on.

        Communicates: one all_gather per flat parameter.
        """
        super().close()
        self._end()
        self._gather(set(range(len(self._units))))

    def begin_pass(self, send: bool) -> None:
        """Prepare for a backward pass.

        send  ignored: every pass is sent

        Raises InputError if the forward pass did not come to the last unit.
        """
        super().begin_pass(send)
        require(
            self._at == self._last and not self._in_backward,
            f"a forward pass through all {len(self._units)} units before the backward pass",
            f"one that came to {self._units[self._at].name if self._at >= 0 else 'none'}",
            "compute the loss from what the model returns, and call backward once for it",
        )
        self._in_backward, self._at = True, len(self._units)

    def send_rest(self) -> None:
        """Go through the units that the backward pass did not reach, and send all rows left.

        Communicates: one all_gather per flat parameter that such a unit needs, and one
        reduce_scatter per row that has not been sent.
        """
        self._backward_to(self._first)
        super().send_rest()
        self._end()

    def forward_without_data(self) -> None:
        """Make the calls of a forward pass and compute nothing.

        Communicates: one all_gather per flat parameter.
        """
        for number in range(len(self._units)):
            self._forward_to(number)

    def renew_weights(self) -> None:
        """Free what was gathered before the shards changed; new weights are gathered at their use.

        Communicates: nothing.
        """
        self._end()

    def give_up(self) -> None:
        """Free what a pass that was not finished has left, and be ready for a new one."""
        super().give_up()
        self._end()

    def _before_forward(self, number: int, module: nn.Module, given: tuple) -> None:
        if self._in_backward:  # a block is computed again (slimlab.model.recompute)
            self._backward_to(number)
        else:
            self._forward_to(number)

    def _after_forward(self, number: int, module: nn.Module, given: tuple, output) -> None:
        for one in output if isinstance(output, tuple) else (output,):
            if isinstance(one, Tensor) and one.requires_grad:
                one.register_hook(lambda grad: self._before_backward(number))

    def _after_model(self, module: nn.Module, given: tuple, output) -> None:
        if not torch.is_grad_enabled():
            self._end()

    def _before_backward(self, number: int) -> None:
        if not self._in_backward:
            raise InputError(
                "a backward pass begun by Zero.backward or Zero.gradients",
                "a call of loss.backward()",
                "give Zero.backward the sum of the losses and the number of tokens",
            )
        self._backward_to(number)

    def _forward_to(self, number: int) -> None:
        if number == self._at:
            return
        if number == 0:
            self._end()
        require(
            number == self._at + 1,
            f"a forward pass through the units in their order; after "
            f"{self._units[self._at].name if self._at >= 0 else 'the start'} comes "
            f"{self._units[self._at + 1].name if self._at < self._last else 'the end'}",
            self._units[number].name,
            "make the parts of the model in the order in which they are used, each once; stages 1 "
            "and 2 take any order",
        )
        self._at = number
        self._keep(set().union(*self._forward_needs[number:]))
        self._gather(self._forward_needs[number])
        if self._prefetch and number < self._last:
            self._start(self._forward_needs[number + 1])

    def _backward_to(self, number: int) -> None:
        while self._at > max(number, self._first):
            self._at -= 1
            self.send_before(self._due[self._at])
            later = self._backward_needs[self._first : self._at + 1]
            self._keep(set().union(*later))
            self._gather(later[-1])
            if self._prefetch and self._at > self._first:
                self._start(later[-2])

    def _end(self) -> None:
        self._at, self._in_backward = -1, False
        self._keep(set())

    def _keep(self, numbers: set[int]) -> None:
        for number in self._there - numbers:
            for flat in self._unit_flats[number]:
                self._gathered_bytes -= flat.whole.untyped_storage().nbytes()
                flat.free()
        self._there &= numbers

    def _gather(self, numbers: set[int]) -> None:
        self._start(numbers, wait=True)
        for number in numbers:
            for flat in self._unit_flats[number]:
                flat.finish_gather()

    def _start(self, numbers: set[int], wait: bool = False) -> None:
        for number in sorted(numbers - self._there):
            for flat in self._unit_flats[number]:
                flat.start_gather(wait=wait)
                self._gathered_bytes += flat.whole.untyped_storage().nbytes()
            self._there.add(number)
        self.gathered_peak_bytes = max(self.gathered_peak_bytes, self._gathered_bytes)
