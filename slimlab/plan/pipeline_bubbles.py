"""Closed forms for a step of a pipeline: its length, its bubble, the activations held.

Chapter 10 derives them, and compares them with slimlab.plan.pipeline_simulator and with counted
slots. They hold for stages that are equal; the simulator takes any. Letters: p stages of v chunks,
m micro-batches; F, I and W are the seconds of a forward, an input gradient and a weight gradient of
one chunk, and c those of a message.

The papers state the bubbles without messages. With messages, the forms for 1F1B and interleaved
1F1B were read off the critical path and compared with the simulator; the tests repeat that.
"""

from collections.abc import Callable
from dataclasses import dataclass

from slimlab.config import check_choice, check_size, require
from slimlab.plan.stage_times import COMPUTING, TIMES, StageTimes


@dataclass(frozen=True)
class StepForecast:
    """What a step will take; the same on every stage.

    computing_s  seconds that a stage computes
    bubble_s     seconds in which it does not: it waits for others, or for messages
    """

    computing_s: float
    bubble_s: float

    @property
    def step_s(self) -> float:
        """Seconds from the beginning of the step to its end."""
        return self.computing_s + self.bubble_s

    @property
    def bubble_fraction(self) -> float:
        """Bubble over the whole step: (p - 1) / (m + p - 1) for GPipe (arXiv:1811.06965)."""
        return self.bubble_s / self.step_s

    @property
    def bubble_ratio(self) -> float:
        """Bubble over computing: (p - 1) / m for GPipe and 1F1B (arXiv:2104.04473)."""
        return self.bubble_s / self.computing_s


def forecast_step(
    name: str, num_stages: int, num_micro_batches: int, times: StageTimes, num_chunks: int = 1
) -> StepForecast:
    """Say how long a step takes and how much of it is bubble, from a closed form.

    name               naive, gpipe, 1f1b, interleaved, zb_h1 or zb_v
    num_stages         p
    num_micro_batches  m
    times              of one chunk, as plain numbers: StageTimes.in_chunks divides those of a stage
    num_chunks         v: 2 for zb_v; 1 for all others but interleaved

    naive        m (p - 1) (F + I + W + 2 c)
    gpipe        (p - 1) (F + I + W + 2 c)
    1f1b         (p - 1) (F + I + W) + 2 c ((p - 1) (q + 1) + max(0, r - 1)), where m - 1 = q p + r:
                 every p-th micro-batch waits for a message around all stages
    interleaved  (p - 1 + (v - 1) max(0, p - m)) (F + I + W), and 2 (p v - 1) c if p divides m and
                 c is at most F and at most I + W: then messages are hidden but for one way around
    zb_h1        (p - 1) (F + I) - (min(m, p) - 1) min(F, I, W), without messages; this is the
                 paper's (p - 1) (F + I - W) where W is not the longest and m at least p
    zb_v         (p - 1) F, if F = I = W, m is at least 2 p - 1 and there are no messages; all of it
                 before the first and after the last instruction of a stage

    Raises InputError for a name, sizes or times that no closed form is known for.
    Huang et al. 2019 (arXiv:1811.06965), Narayanan et al. 2021 (arXiv:2104.04473), Qi et al. 2024
    (arXiv:2401.10241), table 2.
    """
    check_choice("name", name, tuple(BUBBLES))
    _check_sizes(name, num_stages, num_micro_batches, num_chunks)
    listed = [one for one in TIMES if isinstance(getattr(times, one), tuple)]
    _require_form(not listed, "one number for all stages", f"lists for {', '.join(listed)}")
    still = times.messages == "overlap" or times.message_s == 0
    _require_form(still, "messages that overlap", f"messages = {times.messages!r}")
    bubble_s = BUBBLES[name](num_stages, num_micro_batches, num_chunks, times)
    return StepForecast(num_micro_batches * num_chunks * _work(times), bubble_s)


def _naive(p: int, m: int, v: int, times: StageTimes) -> float:
    return m * (p - 1) * (_work(times) + 2 * times.message_s)


def _gpipe(p: int, m: int, v: int, times: StageTimes) -> float:
    return (p - 1) * (_work(times) + 2 * times.message_s)


def _one_forward_one_backward(p: int, m: int, v: int, times: StageTimes) -> float:
    if p == 1:
        return 0.0
    rounds, rest = divmod(m - 1, p)
    messages = 2 * ((p - 1) * (rounds + 1) + max(0, rest - 1))
    return (p - 1) * _work(times) + messages * times.message_s


def _interleaved(p: int, m: int, v: int, times: StageTimes) -> float:
    if v == 1:
        return _one_forward_one_backward(p, m, v, times)
    if p == 1:
        return 0.0
    shortest = min(times.forward_s, times.input_gradient_s + times.weight_gradient_s)
    hidden = times.message_s == 0 or (m % p == 0 and times.message_s <= shortest)
    given = f"message_s = {times.message_s:g}, p = {p}, m = {m}"
    _require_form(hidden, "messages no longer than a pass, m a multiple of p", given)
    passes = p - 1 + (v - 1) * max(0, p - m)
    return passes * _work(times) + 2 * (p * v - 1) * times.message_s


def _zb_h1(p: int, m: int, v: int, times: StageTimes) -> float:
    _require_form(times.message_s == 0, "no message time", f"message_s = {times.message_s:g}")
    forward, gradient, weights = (getattr(times, name) for name in COMPUTING)
    filled = (min(m, p) - 1) * min(forward, gradient, weights)
    return (p - 1) * (forward + gradient) - filled


def _zb_v(p: int, m: int, v: int, times: StageTimes) -> float:
    _require_form(times.message_s == 0, "no message time", f"message_s = {times.message_s:g}")
    each = [getattr(times, name) for name in COMPUTING]
    _require_form(len(set(each)) == 1, "three equal times", f"{each}")
    enough = m >= 2 * p - 1
    _require_form(enough, f"at least 2 p - 1 = {2 * p - 1} micro-batches", f"m = {m}")
    return (p - 1) * times.forward_s


Bubble = Callable[[int, int, int, StageTimes], float]
BUBBLES: dict[str, Bubble] = {
    "naive": _naive,
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zb_h1": _zb_h1,
    "zb_v": _zb_v,
}


def forecast_peaks(
    name: str, num_stages: int, num_micro_batches: int, num_chunks: int = 1
) -> tuple[int, ...]:
    """Say how many activations each stage holds when it holds most.

    name, num_stages, num_micro_batches, num_chunks  as in forecast_step
    returns  for each stage, in units of one micro-batch in one chunk: of its activations a stage
             holds that number over v

    Raises InputError for an unknown name or sizes that do not fit.
    Narayanan et al. 2021 (arXiv:2104.04473), section 2.2; Korthikanti et al. 2022
    (arXiv:2205.05198), section 4.2.3; Qi et al. 2024 (arXiv:2401.10241), table 2.
    """
    check_choice("name", name, tuple(BUBBLES))
    _check_sizes(name, num_stages, num_micro_batches, num_chunks)
    p, m, v = num_stages, num_micro_batches, num_chunks
    if name == "interleaved" and v > 1:
        # Rounds of p micro-batches; if p does not divide m, of some more.
        count = max(1, m // p)
        first = -(-m // count)
        return tuple(min(m * v, (v - 1) * first + 2 * (p - 1 - stage) + 1) for stage in range(p))
    most = {
        "naive": lambda stage: 1,
        "gpipe": lambda stage: m,
        "1f1b": lambda stage: min(m, p - stage),
        "interleaved": lambda stage: min(m, p - stage),
        "zb_h1": lambda stage: min(m, p),
        "zb_v": lambda stage: min(2 * m, 2 * p, m + stage + 1),
    }
    return tuple(most[name](stage) for stage in range(p))


def bubble_remark(num_stages: int, num_micro_batches: int) -> str:
    """Say what fewer micro-batches than stages cost; nothing if there are enough.

    num_stages         p
    num_micro_batches  m
    returns            a sentence with the bubble of GPipe and 1F1B, now and with 4 p micro-batches;
                       empty if m is at least p

    Raises InputError for sizes that are no whole numbers of at least 1.
    """
    _check_sizes("1f1b", num_stages, num_micro_batches, 1)
    if num_micro_batches >= num_stages:
        return ""
    times = StageTimes(1, 1, 1)
    now, many = (
        forecast_step("1f1b", num_stages, number, times).bubble_fraction
        for number in (num_micro_batches, 4 * num_stages)
    )
    return (
        f"{num_micro_batches} micro-batches for {num_stages} stages: each stage stands idle for "
        f"{now:.0%} of the step. {4 * num_stages} would make it {many:.0%}."
    )


def _work(times: StageTimes) -> float:
    return times.forward_s + times.input_gradient_s + times.weight_gradient_s


def _check_sizes(name: str, num_stages: int, num_micro_batches: int, num_chunks: int) -> None:
    check_size("num_stages", num_stages)
    check_size("num_micro_batches", num_micro_batches)
    check_size("num_chunks", num_chunks)
    wanted = {"interleaved": num_chunks, "zb_v": 2}.get(name, 1)
    require(
        num_chunks == wanted,
        f"{name}, which has {wanted} chunk{'s' * (wanted > 1)} on each stage",
        f"num_chunks = {num_chunks}",
        f'give num_chunks = {wanted}, or name = "interleaved"',
    )


def _require_form(condition: bool, asked: str, given: str) -> None:
    change = "simulate the schedule: slimlab.plan.pipeline_simulator takes any times"
    require(condition, f"what a closed form is known for: {asked}", given, change)
