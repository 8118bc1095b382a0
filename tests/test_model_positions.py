"""Positions: the sinusoidal table, rotary angles and turns, against formulas written out."""

import math

import pytest
import torch

from slimlab.config import InputError
from slimlab.model.positions import rotary_angles, rotate, sinusoidal_positions


def test_the_sinusoidal_table_is_the_formula_entry_by_entry():
    table = sinusoidal_positions(5, 6, dtype=torch.float64)
    for position in range(5):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            # The angles are float32: half a unit in the last place of an angle up to 4.
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=3e-7)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=3e-7)


def test_an_angle_far_along_a_text_is_right_to_the_last_bit_of_its_type():
    angles = rotary_angles(torch.tensor([100_000]), 4, 10000.0)
    assert angles.tolist() == [[100_000.0, pytest.approx(1000.0, rel=1e-6)]]


def complex_rotation(x, angles, layout):
    pairs = x.unflatten(-1, (2, -1)).mT if layout == "half" else x.unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angles)
    out = torch.view_as_real(turned)
    return (out.mT if layout == "half" else out).flatten(-2)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_turning_pairs_is_multiplying_complex_numbers(layout):
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 5, 8), rotary_angles(torch.arange(5), 8, 500.0)
    torch.testing.assert_close(rotate(x, angles, layout), complex_rotation(x, angles, layout))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_scores_depend_on_the_distance_only_and_keep_lengths(layout):
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        turned = [
            rotate(x, rotary_angles(torch.tensor([at]), 8), layout)
            for x, at in ((query, i), (key, j))
        ]
        assert turned[0].norm() == pytest.approx(query.norm().item())
        return (turned[0] * turned[1]).sum().item()

    # Cosines of float32 angles below 32: 2e-6 each, eight products.
    assert score(7, 3) == pytest.approx(score(31, 27), abs=2e-5)
    assert abs(score(7, 3) - score(3, 7)) > 1e-2


def test_the_two_layouts_differ_by_an_order_of_the_features():
    torch.manual_seed(0)
    x, angles = torch.randn(1, 2, 4, 6), rotary_angles(torch.arange(4), 6)
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    half = rotate(x[..., order], angles, "half")
    torch.testing.assert_close(half, rotate(x, angles, "interleaved")[..., order], rtol=0, atol=0)


def test_sequences_may_have_positions_of_their_own():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6)
    positions = torch.tensor([[0, 1, 2, 3], [5, 0, 1, 9]])
    together = rotate(x, rotary_angles(positions, 6))
    for row in range(2):
        alone = rotate(x[row : row + 1], rotary_angles(positions[row], 6))
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=0)


def test_bad_positions_are_refused():
    angles = rotary_angles(torch.arange(4), 6)
    with pytest.raises(InputError, match="interleaved"):
        rotate(torch.randn(1, 1, 4, 6), angles, "halves")
    with pytest.raises(InputError, match="one per position"):
        rotate(torch.randn(1, 1, 5, 6), angles)
    with pytest.raises(InputError, match="d_model"):
        sinusoidal_positions(4, 5)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_gradient_of_a_turn_is_that_of_finite_differences(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    angles = rotary_angles(torch.arange(3), 6)

    def call(x):
        return rotate(x.transpose(1, 2), angles, layout)

    assert torch.autograd.gradcheck(call, (x,))
    assert call(x).stride() == x.transpose(1, 2).stride()
