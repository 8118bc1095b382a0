"""Distillation in training: on the fly, over ranks, from layers, from texts; what is refused."""

import copy
import math

import pytest
import torch
from distill_cases import SIZES, TEXT, batch_of, student, teacher
from parallel_cases import (
    CHOICES,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    zero_gradient_names,
)
from torch import nn

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError, ModelConfig, TrainingConfig
from slimlab.model.build import build_model
from slimlab.parallel.data import DataParallel
from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_state import gather_whole
from slimlab.plan.data_parallel import shard_sizes
from slimlab.slim.distill import (
    DistillationObjective,
    fingerprint,
    freeze,
    smoothed_objective,
)
from slimlab.slim.distill_losses import distillation_loss, smoothed_loss, soft_targets
from slimlab.slim.distill_match import attention_loss, hidden_loss, run_model
from slimlab.slim.distill_sequence import sequence_batch
from slimlab.slim.distill_start import spread_layers, student_from_layers
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.loop import train
from slimlab.train.objectives import IGNORE, causal_objective

SETTINGS = {"distill_temperature": 2, "soft_weight": 0.7}


def test_the_objective_compares_both_models_on_the_same_batch():
    big, small, (inputs, targets) = teacher(), student(), batch_of(0)
    loss, count = DistillationObjective(big, **SETTINGS)(small, (inputs, targets))
    soft = soft_targets(big(inputs), distill_temperature=2)
    expected = distillation_loss(small(inputs), targets, soft, soft_weight=0.7)
    assert torch.equal(loss, expected[0])
    assert count == expected[1] == int((targets >= 0).sum())


def test_without_a_soft_part_it_is_the_ordinary_objective():
    objective = DistillationObjective(teacher(), distill_temperature=2, soft_weight=0)
    found = objective(student(), batch_of(0))
    expected = causal_objective(student(), batch_of(0))
    assert torch.allclose(found[0], expected[0], rtol=1e-14)
    assert found[1] == expected[1]


def test_documents_in_one_row_do_not_see_each_other_in_either_model():
    objective, small = DistillationObjective(teacher(), **SETTINGS), student()
    (inputs, targets), ids = batch_of(0), torch.tensor([[0, 0, 1, 1, 1]]).expand(7, 5)
    packed = objective(small, (inputs, targets, ids))
    parts = [objective(small, (inputs[:, a:b], targets[:, a:b])) for a, b in ((0, 2), (2, 5))]
    assert torch.allclose(packed[0], parts[0][0] + parts[1][0], rtol=1e-12)


def test_the_teacher_stays_as_it_is_and_draws_no_dropout():
    big, small = teacher(dropout=0.5), student()
    before = copy_of_weights(big)
    objective = DistillationObjective(big, **SETTINGS)
    for _ in range(2):
        accumulate_gradients(small, batch_of(0), objective)
    assert copy_of_grads(big) == {}
    assert not big.training
    assert all(torch.equal(before[name], one) for name, one in big.named_parameters())
    assert torch.equal(*(objective(small, batch_of(0))[0] for _ in range(2)))


def test_a_student_of_any_kind_is_trained_by_its_logits():
    torch.manual_seed(0)
    big, small = nn.Linear(4, 3), nn.Linear(4, 3)
    x, labels = torch.randn(50, 4), torch.zeros(50).long()
    config = TrainingConfig(
        num_steps=200, batch_size=50, seq_len=1, peak_lr=0.1, weight_decay=0, device="cpu"
    )
    objective = DistillationObjective(big, distill_temperature=2, soft_weight=1)
    train(small, lambda step: (x, labels), config, objective=objective, show=False)
    probs = [one(x).detach().softmax(dim=-1) for one in (big, small)]
    assert float((probs[0] - probs[1]).abs().max()) < 0.02


def test_a_run_does_not_go_on_with_another_teacher_or_temperature(tmp_path):
    config = TrainingConfig(num_steps=2, batch_size=2, seq_len=5, device="cpu")
    run = {"run_folder": tmp_path, "show": False, "say": lambda _: None}
    train(student(), TEXT, config, objective=DistillationObjective(teacher(), **SETTINGS), **run)
    other = {**SETTINGS, "distill_temperature": 4}
    for objective in (
        DistillationObjective(teacher(), **other),
        DistillationObjective(student(), **SETTINGS),
    ):
        with pytest.raises(InputError, match="objective = .*T=2"):
            train(student(), TEXT, config, objective=objective, **run)


def steps(gradients, model):
    optimizer, losses, grads = optimizer_of(model), [], []
    for step in range(3):
        losses.append(float(gradients(step)[0]))
        grads.append(copy_of_grads(model))
        optimizer.step()
    return losses, grads, copy_of_weights(model)


def in_one_process(**sizes):
    model = student(**sizes)
    objective = DistillationObjective(teacher(**CHOICES | sizes), **SETTINGS)
    return steps(lambda step: accumulate_gradients(model, batch_of(step), objective), model)


def with_replicas(comm, objective):
    model = student(seed=1 + comm.rank)
    replica, sizes = DataParallel(model, comm), shard_sizes(7, comm.world_size)
    start = sum(sizes[: comm.rank])

    def gradients(step):
        part = tuple(one[start : start + sizes[comm.rank]] for one in batch_of(step))
        return replica.gradients(part, objective, 2)

    return steps(gradients, model)


def test_replicas_that_share_a_teacher_equal_one_process():
    objective = DistillationObjective(teacher(), **SETTINGS)
    expected, zero = in_one_process(), zero_gradient_names(student())
    for found in run_ranks(with_replicas, 2, args=(objective,)):
        check_same_run(found, expected, zero)


def with_cut_teacher(comm):
    model, big = student(vocab_size=12), teacher(**CHOICES, vocab_size=12)
    objective = DistillationObjective(tensor_parallel(big, comm), **SETTINGS)
    return steps(lambda step: accumulate_gradients(model, batch_of(step), objective), model)


def test_a_teacher_cut_over_ranks_teaches_the_same():
    expected, zero = in_one_process(vocab_size=12), zero_gradient_names(student())
    for found in run_ranks(with_cut_teacher, 2):
        check_same_run(found, expected, zero)


def with_cut_student(comm):
    model, big = student(vocab_size=12), teacher(**CHOICES, vocab_size=12)
    tensor_parallel(model, comm)
    objective = DistillationObjective(big, **SETTINGS)
    loss, _ = accumulate_gradients(model, batch_of(0), objective)
    return float(loss), gather_whole(model, copy_of_grads(model))


def test_a_student_cut_over_ranks_learns_the_same():
    losses, grads, _ = in_one_process(vocab_size=12)
    for loss, found in run_ranks(with_cut_student, 2):
        assert loss == pytest.approx(losses[0], rel=1e-12)
        assert found.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            assert torch.allclose(found[name], grad, rtol=1e-9, atol=1e-14), name


def test_hidden_states_that_point_the_same_way_cost_nothing():
    states, targets = torch.randn(2, 3, 4), torch.tensor([[1, 1, IGNORE], [1, 1, 1]])
    assert float(hidden_loss(3 * states, states, targets)) == pytest.approx(0, abs=1e-5)
    assert float(hidden_loss(-states, states, targets)) == pytest.approx(2 * 5)
    big, small = teacher(), student()
    plain = DistillationObjective(big, **SETTINGS)(small, batch_of(0))[0]
    both = DistillationObjective(big, **SETTINGS, hidden_weight=0.5)(small, batch_of(0))[0]
    inputs, targets = batch_of(0)
    distance = hidden_loss(small.hidden(inputs), big.hidden(inputs), targets)
    assert torch.allclose(both, plain + 0.5 * distance, rtol=1e-12)


def test_hidden_states_of_other_widths_are_refused():
    objective = DistillationObjective(teacher(), **SETTINGS, hidden_weight=1)
    with pytest.raises(InputError, match=r"student \(7, 5, 12\), teacher \(7, 5, 8\)"):
        objective(student(d_model=12), batch_of(0))
    linear = DistillationObjective(nn.Linear(5, 3), **SETTINGS, hidden_weight=1)
    with pytest.raises(InputError, match="a Linear"):
        linear(nn.Linear(5, 3), (torch.randn(2, 5), torch.tensor([0, 1])))


def test_attention_is_compared_by_its_divergence_averaged_over_heads():
    big = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.9, 0.1]]]])
    small = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.9, 0.1]]]])
    small.requires_grad_()
    by_hand = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    found = attention_loss(small, big, torch.tensor([[3, 4]]))
    assert found.item() == pytest.approx(by_hand / 2)
    assert bool(torch.autograd.grad(found, small)[0].isfinite().all())
    assert attention_loss(small, big, torch.tensor([[3, IGNORE]])).item() == 0
    assert abs(float(attention_loss(big, big, torch.tensor([[3, 4]])))) < 1e-7


def test_the_weights_that_are_matched_are_those_of_the_last_block_and_teach_it():
    big, small, (inputs, targets) = teacher(), student(), batch_of(0)
    found = run_model(small, inputs, {}, attention=True)
    assert torch.equal(found.logits, small(inputs))
    assert found.attention.shape == (7, 2, 5, 5)
    assert torch.allclose(found.attention.sum(dim=-1), torch.ones((), dtype=torch.float64))
    assert not bool(found.attention.triu(1).any())
    block, rows = small.blocks[0], small.embedding(inputs, torch.arange(5))
    _, weights = block.attention(block.attention_norm(rows), causal=True, return_weights=True)
    assert torch.allclose(found.attention, weights, rtol=1e-12)
    objective = DistillationObjective(big, **SETTINGS, attention_weight=2)
    plain = DistillationObjective(big, **SETTINGS)(small, (inputs, targets))[0]
    said = run_model(big, inputs, {}, attention=True)
    distance = attention_loss(found.attention, said.attention, targets)
    loss = objective(small, (inputs, targets))[0]
    assert torch.allclose(loss, plain + 2 * distance, rtol=1e-12)
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.02)
    for _ in range(60):
        accumulate_gradients(small, (inputs, targets), objective)
        optimizer.step()
    found = run_model(small, inputs, {}, attention=True)
    learned = attention_loss(found.attention, said.attention, targets)
    assert learned.item() < 0.2 * distance.item()


def test_attention_of_other_heads_or_of_a_student_that_recomputes_is_refused():
    objective = DistillationObjective(teacher(), **SETTINGS, attention_weight=1)
    with pytest.raises(InputError, match=r"student \(7, 1, 5, 5\), teacher \(7, 2, 5, 5\)"):
        objective(student(num_heads=1), batch_of(0))
    small = student()
    small.recompute = "block"
    with pytest.raises(InputError, match="recompute = 'block'"):
        objective(small, batch_of(0))


def test_label_smoothing_is_an_objective_too():
    small, (inputs, targets) = student(), batch_of(0)
    found = smoothed_objective(small, (inputs, targets), smoothing=0.2)
    expected = smoothed_loss(small(inputs), targets, smoothing=0.2)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_a_student_with_another_vocabulary_is_refused_before_anything_runs():
    objective = DistillationObjective(teacher(), **SETTINGS)
    with pytest.raises(InputError, match="the student's 13 tokens, the teacher's 11"):
        objective(student(vocab_size=13), batch_of(0))


def test_a_student_that_is_its_teacher_or_shares_a_table_with_it_is_refused():
    big, small = teacher(), student()
    objective = DistillationObjective(big, **SETTINGS)
    with pytest.raises(InputError, match="weights of its own"):
        objective(big, batch_of(0))
    small.embedding.tokens.weight = big.embedding.tokens.weight
    with pytest.raises(InputError, match="1 shared with the teacher.*embedding.tokens.weight"):
        objective(small, batch_of(0))


def test_a_teacher_with_a_weight_that_is_not_a_number_is_refused():
    big = teacher()
    with torch.no_grad():
        big.final_norm.weight[0] = math.nan
    with pytest.raises(InputError, match="teacher_logits"):
        DistillationObjective(big, **SETTINGS)(student(), batch_of(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distill_temperature": 0}, "distill_temperature"),
        ({"soft_weight": 1.5}, "soft_weight"),
        ({"divergence": "both"}, "forward, reverse"),
        ({"hidden_weight": -1}, "hidden_weight"),
        ({"attention_weight": math.nan}, "attention_weight"),
    ],
)
def test_settings_out_of_range_are_refused_and_the_teacher_left_alone(change, message):
    big = teacher()
    with pytest.raises(InputError, match=message):
        DistillationObjective(big, **SETTINGS | change)
    assert big.training
    assert all(p.requires_grad for p in big.parameters())


def test_a_fingerprint_changes_with_one_bit_and_with_the_configuration():
    big, same, other = teacher(), teacher(), teacher()
    assert fingerprint(big) == fingerprint(same)
    assert len(fingerprint(big)) == 16
    with torch.no_grad():
        gain = other.final_norm.weight
        gain[0] = torch.nextafter(gain[0], gain[0] + 1)
    heads = [build_model(ModelConfig(**SIZES | {"num_heads": n})) for n in (2, 4)]
    heads[1].load_state_dict(heads[0].state_dict())
    assert fingerprint(other) != fingerprint(big)
    assert fingerprint(heads[0]) != fingerprint(heads[1])
    assert len(fingerprint(copy.deepcopy(big).bfloat16())) == 16


def test_a_student_from_all_layers_is_the_teacher_and_learns_though_that_is_frozen():
    big = freeze(teacher())
    small = student_from_layers(big, [0, 1])
    assert torch.equal(small(batch_of(0)[0]), big(batch_of(0)[0]))
    assert small.training
    assert all(p.requires_grad for p in small.parameters())
    assert not {id(p) for p in small.parameters()} & {id(p) for p in big.parameters()}
    assert not big.training
    assert not any(p.requires_grad for p in big.parameters())
    assert small.lm_head.weight is small.embedding.tokens.weight


def test_a_student_gets_the_layers_that_are_named():
    big = teacher(num_layers=3)
    small = student_from_layers(big, [0, 2])
    assert small.config.num_layers == 2
    assert big.config.num_layers == 3
    for mine, theirs in ((0, 0), (1, 2)):
        found, wanted = small.blocks[mine].state_dict(), big.blocks[theirs].state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_layers_are_spread_from_the_first_to_the_last():
    assert spread_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spread_layers(6, 3) == [0, 3, 5]
    assert (spread_layers(5, 1), spread_layers(5, 5)) == ([0], [0, 1, 2, 3, 4])
    for layers in range(1, 9):
        for kept in range(2, layers + 1):
            found = spread_layers(layers, kept)
            assert found == sorted(set(found))
            assert (found[0], found[-1]) == (0, layers - 1)


@pytest.mark.parametrize("layers", [[2], [-1], [1, 0], [0, 0], [], [0.5], [True], 0.5, None])
def test_layers_that_the_teacher_has_not_are_refused(layers):
    with pytest.raises(InputError, match="from 0 to 1"):
        student_from_layers(teacher(), layers)


def test_more_layers_than_the_teacher_has_cannot_be_spread():
    with pytest.raises(InputError, match="at most 4"):
        spread_layers(4, 5)
    with pytest.raises(InputError, match="layers of the teacher"):
        student_from_layers(nn.Linear(2, 2), [0])


def test_the_teachers_own_words_are_the_targets_and_prompts_do_not_count():
    big, prompts = teacher().eval(), TEXT[:6].view(3, 2)
    inputs, targets = sequence_batch(big, prompts, 3)
    assert inputs.shape == targets.shape == (3, 4)
    assert torch.equal(inputs[:, :2], prompts)
    assert bool((targets[:, 0] == IGNORE).all())
    assert torch.equal(targets[:, 1:-1], inputs[:, 2:])
    assert torch.equal(big(inputs).argmax(dim=-1)[:, 1:], targets[:, 1:])


def test_what_stands_behind_the_end_of_a_text_does_not_count():
    big, prompts = teacher().eval(), torch.arange(11)[:, None]
    _, whole = sequence_batch(big, prompts, 4, sampling_temperature=1.0, seed=3)
    stop_id = int(whole[0, 1])
    _, targets = sequence_batch(big, prompts, 4, sampling_temperature=1.0, seed=3, stop_id=stop_id)
    assert targets[0, :2].tolist() == whole[0, :2].tolist()
    assert bool((targets[0, 2:] == IGNORE).all())
    for row in targets:
        counted = row[row != IGNORE]
        assert stop_id not in counted[:-1]
        assert len(counted) >= 1


def test_a_student_learns_to_write_what_its_teacher_writes():
    big, small = teacher().eval(), student(norm="rms", bias=False, d_model=16)
    batch = sequence_batch(big, torch.arange(11)[:, None], 3)
    before = causal_objective(small, batch)[0].item()
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.02)
    for _ in range(60):
        accumulate_gradients(small, batch, causal_objective)
        optimizer.step()
    assert causal_objective(small, batch)[0].item() < 0.3 * before


def test_prompts_without_tokens_are_refused():
    for prompts in (torch.zeros(2, 0).long(), torch.zeros(3).long(), [[1, 2]]):
        with pytest.raises(InputError, match="prompts"):
            sequence_batch(teacher(), prompts, 2)
