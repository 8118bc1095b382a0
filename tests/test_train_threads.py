"""The number of threads is asked of the machine, and put back whatever happens."""

import time

import pytest
import torch

from slimlab.config import InputError
from slimlab.train.threads import fastest_threads, num_processors


def slow_with(*numbers):
    """A trial that takes longer with these numbers of threads."""

    def trial():
        time.sleep(0.03 if torch.get_num_threads() in numbers else 0.0)

    return trial


@pytest.mark.parametrize(("slow", "chosen"), [((1, 4), 2), ((2, 4), 1), ((1, 2), 4)])
def test_the_fastest_number_is_chosen_and_the_old_one_put_back(slow, chosen):
    before = torch.get_num_threads()
    with fastest_threads(slow_with(*slow), (1, 2, 4)) as number:
        assert number == torch.get_num_threads() == chosen
    assert torch.get_num_threads() == before


def test_the_old_number_is_put_back_after_an_error_too():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), fastest_threads(slow_with(), (before + 1,)):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), fastest_threads(lambda: 1 / 0, (1, before + 1)):
        pass
    assert torch.get_num_threads() == before


def test_no_more_threads_are_tried_than_there_are_processors():
    seen = set()
    with fastest_threads(lambda: seen.add(torch.get_num_threads())):
        pass
    assert max(seen, default=1) <= num_processors()


def test_no_more_threads_are_tried_than_the_user_allows(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with fastest_threads(slow_with(1)) as number:
        assert number == 1


@pytest.mark.parametrize("candidates", [(), (0,), (1, 2.0)])
def test_candidates_that_are_no_numbers_of_threads_are_refused(candidates):
    with pytest.raises(InputError), fastest_threads(slow_with(), candidates):
        pass
