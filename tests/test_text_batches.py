"""Windows of token ids."""

import pytest
import torch

from slimlab.config import InputError
from slimlab.text.batches import consecutive_windows, token_windows


def test_targets_are_the_inputs_one_token_later_in_the_text():
    ids = [100 + i for i in range(11)]
    batches = list(token_windows(ids, seq_len=3, batch_size=2, num_batches=50, seed=0))
    assert len(batches) == 50
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (2, 3)
        assert inputs.dtype == targets.dtype == torch.int64
        for row, target in zip(inputs.tolist(), targets.tolist()):
            start = row[0] - 100
            assert [*row, target[-1]] == ids[start : start + 4]
            assert row[1:] == target[:-1]


def test_every_window_is_drawn_the_last_one_too():
    drawn = {int(x[0, 0]) for x, _ in token_windows(list(range(7)), 3, 1, 200, seed=1)}
    # Starts 0 to 3; the chance that 200 draws miss one of four is below 1e-24.
    assert drawn == {0, 1, 2, 3}


def test_the_shortest_text_gives_its_one_window():
    ((inputs, targets),) = token_windows([4, 5, 6], 2, 1, 1, seed=5)
    assert inputs.tolist() == [[4, 5]]
    assert targets.tolist() == [[5, 6]]


def test_the_seed_determines_the_batches():
    def draw(seed):
        return torch.stack([x for x, _ in token_windows(torch.arange(1000), 5, 3, 4, seed)])

    assert torch.equal(draw(7), draw(7))
    assert not torch.equal(draw(7), draw(8))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(token_windows(list(range(20)), 4, 2, 3, seed=9))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("length", [6, 7, 8, 11, 31, 32])
def test_consecutive_windows_make_each_token_a_target_once(length):
    batches = list(consecutive_windows(list(range(length)), seq_len=5, batch_size=2))
    targets = [token for _, y in batches for token in y.flatten().tolist()]
    inputs = [token for x, _ in batches for token in x.flatten().tolist()]
    assert targets == list(range(1, length))
    assert inputs == list(range(length - 1))
    assert all(1 <= x.shape[0] <= 2 and 1 <= x.shape[1] <= 5 for x, _ in batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [1, 2, 3]}, "3 tokens"),
        ({"ids": []}, "0 tokens"),
        ({"ids": [[1, 2], [3, 4]]}, r"shape \(2, 2\)"),
        ({"ids": torch.zeros(2, 9, dtype=torch.long)}, r"shape \(2, 9\)"),
        ({"ids": torch.zeros(9)}, "torch.float32"),
        ({"ids": "some text"}, "tokenizer.encode"),
        ({"seq_len": 0}, "seq_len = 0"),
        ({"seq_len": 2.5}, "seq_len = 2.5"),
        ({"batch_size": -1}, "batch_size = -1"),
        ({"num_batches": 0}, "num_batches = 0"),
        ({"seed": "a"}, "seed = 'a'"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1 << 64}, "seed = 18446744073709551616"),
    ],
)
def test_bad_input_is_named_before_the_first_batch(changes, message):
    good = {"ids": list(range(9)), "seq_len": 3, "batch_size": 2, "num_batches": 1, "seed": 0}
    with pytest.raises(InputError, match=message):
        token_windows(**{**good, **changes})
    if not {"num_batches", "seed"} & set(changes):
        del good["num_batches"], good["seed"]
        with pytest.raises(InputError, match=message):
            consecutive_windows(**{**good, **changes})
