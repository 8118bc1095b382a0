"""Pruned models and distilled students trained by ranks: equal to one process, bytes predicted."""

import comm_runtimes
import pytest
from parallel_cases import (
    NUM_STEPS,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    tiny_model,
    zero_gradient_names,
)
from tensor_cases import GPT, LLAMA, batch_of, counted

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError
from slimlab.parallel.data import DataParallel
from slimlab.parallel.mesh import Mesh, MeshShape
from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.parallel.tensor_state import gather_whole
from slimlab.plan import data_parallel
from slimlab.plan import tensor_parallel as tensor_plan
from slimlab.plan.quantized_parallel import predict_distillation
from slimlab.slim.distill import DistillationObjective
from slimlab.slim.prune_structure import (
    head_scores,
    neuron_scores,
    remove_heads,
    remove_layers,
    remove_neurons,
    weakest,
)
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective

MODELS = {"GPT": GPT, "LLAMA": LLAMA}
SETTINGS = {"distill_temperature": 2, "soft_weight": 0.7}
BATCH_SIZE, SEQ_LEN, ITEM_BYTES = 5, 12, 8


def teacher(name):
    return tiny_model(seed=9, **MODELS[name])


def pruned(name, seed=0):
    """Of 12 heads 8 stay and of 24 neurons 16; heads are as wide as before."""
    model = tiny_model(seed=seed, **MODELS[name])
    groups = model.config.num_kv_heads if name == "LLAMA" else 1
    model = remove_heads(model, weakest(head_scores(model), 4, num_groups=groups))
    return remove_neurons(model, weakest(neuron_scores(model), 8))


def objective_of(name, taught):
    return DistillationObjective(teacher(name), **SETTINGS) if taught else causal_objective


def steps(model, gradients, whole=lambda named: named):
    optimizer, losses, grads = optimizer_of(model), [], []
    for step in range(NUM_STEPS):
        losses.append(float(gradients(step)[0]))
        grads.append(whole(copy_of_grads(model)))
        optimizer.step()
    return losses, grads, whole(copy_of_weights(model))


def alone(name, taught):
    model, objective = pruned(name), objective_of(name, taught)
    return steps(model, lambda step: accumulate_gradients(model, batch_of(step), objective))


def in_replicas(comm, name, taught):
    model, objective = pruned(name, comm.rank), objective_of(name, taught)
    replica = DataParallel(model, comm)

    def gradients(step):
        return replica.gradients(share_of(comm, step), objective, 2)

    return steps(model, gradients)


def share_of(comm, step):
    ends = [BATCH_SIZE * rank // comm.world_size for rank in (comm.rank, comm.rank + 1)]
    return tuple(one[slice(*ends)] for one in batch_of(step))


def in_parts(comm, name, taught):
    """Student and teacher are both cut; each rank begins with other weights than the first."""
    model = tensor_parallel(pruned(name, comm.rank), comm)
    objective = tensor_parallel_objective
    if taught:
        objective = DistillationObjective(tensor_parallel(teacher(name), comm), **SETTINGS)

    def gradients(step):
        return accumulate_gradients(model, batch_of(step), objective)

    return steps(model, gradients, lambda named: gather_whole(model, named))


def in_both(comm, name, taught):
    mesh = Mesh(comm, MeshShape(data=2, tensor=2))
    data, tensor = mesh.group("data"), mesh.group("tensor")
    model = tensor_parallel(pruned(name), tensor)
    objective = DistillationObjective(tensor_parallel(teacher(name), tensor), **SETTINGS)
    replica = DataParallel(model, data)

    def gradients(step):
        return replica.gradients(share_of(data, step), objective)

    return steps(model, gradients, lambda named: gather_whole(model, named))


def check(results, name, taught):
    expected, zero = alone(name, taught), zero_gradient_names(pruned(name))
    for found in results:
        check_same_run(found, expected, zero)


@pytest.mark.parametrize("program", [in_replicas, in_parts])
@pytest.mark.parametrize("taught", [False, True], ids=["pruned", "distilled"])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_train_a_smaller_model_as_one_process_does(name, taught, program):
    check(run_ranks(program, 2, args=(name, taught)), name, taught)


def test_four_ranks_share_a_student_of_eight_heads_and_two_groups_of_keys():
    check(run_ranks(in_parts, 4, args=("LLAMA", True)), "LLAMA", True)


def test_replicas_of_a_student_that_is_cut_learn_the_same():
    check(run_ranks(in_both, 4, args=("LLAMA", True)), "LLAMA", True)


def on_processes(comm):
    return [one(comm, "LLAMA", True) for one in (in_replicas, in_parts)]


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_processes_train_a_distilled_student_as_one_does(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(on_processes, 2, backend=backend)
    check([found for both in results for found in both], "LLAMA", True)


def calls_of_a_step(comm, make, objective, cut):
    """Of one forward and one backward pass, after everything is equal on all ranks."""
    model = make()
    run = tensor_parallel(model, comm) if cut else DataParallel(model, comm)
    if cut and objective is None:
        whole = tensor_parallel(teacher("LLAMA"), comm)
        objective = DistillationObjective(whole, **SETTINGS)
    before = len(comm.ledger.entries)
    if cut:
        accumulate_gradients(model, batch_of(0), objective)
    else:
        run.gradients(share_of(comm, 0), objective)
    return model.config, [(e.call, e.n_bytes) for e in comm.ledger.entries[before:]]


def smaller():
    return remove_layers(pruned("LLAMA"), [1])


SMALLER = {
    "teacher": lambda: teacher("LLAMA"),
    "heads, neurons": lambda: pruned("LLAMA"),
    "layers": smaller,
}


def bytes_of(calls):
    return sum(n_bytes for _, n_bytes in calls)


@pytest.mark.parametrize("cut", [False, True], ids=["data", "tensor"])
def test_the_calls_of_pruned_models_are_those_predicted_beside_those_of_the_teacher(cut):
    sent, objective = {}, tensor_parallel_objective if cut else causal_objective
    for name, make in SMALLER.items():
        sizes = [param.numel() for param in make().parameters()]
        for config, calls in run_ranks(calls_of_a_step, 2, args=(make, objective, cut)):
            if cut:
                step = tensor_plan.predict_step(config, BATCH_SIZE, SEQ_LEN, 2, ITEM_BYTES)
                assert counted(calls) == counted(step.calls)
            else:
                step = data_parallel.predict_step(sizes, ITEM_BYTES, 2, 4 * 2**20)
                assert bytes_of(calls) == step.payload_bytes
                assert len(calls) == step.num_calls
            sent[name] = bytes_of(calls)
    # The stream is as wide as before: only layers that are gone send less of it.
    assert (sent["heads, neurons"] == sent["teacher"]) == cut
    assert sent["layers"] < sent["heads, neurons"] <= sent["teacher"]


@pytest.mark.parametrize("make", ["heads, neurons", "layers"])
def test_the_calls_of_a_distillation_are_those_predicted(make):
    args = (SMALLER[make], None, True)
    sizes, big = (BATCH_SIZE, SEQ_LEN), teacher("LLAMA").config
    for config, calls in run_ranks(calls_of_a_step, 2, args=args):
        step = predict_distillation(big, config, *sizes, 2, ITEM_BYTES)
        assert calls[: len(step.forward)] == list(step.forward)
        assert calls[len(step.forward) :] == list(step.backward)
    assert predict_distillation(big, config, *sizes, 1, ITEM_BYTES).calls == ()
    other = tiny_model(**{**LLAMA, "vocab_size": 16}).config
    with pytest.raises(InputError, match="one vocabulary"):
        predict_distillation(big, other, *sizes, 2, ITEM_BYTES)


def test_heads_that_are_left_and_do_not_divide_are_refused_by_every_rank():
    def program(comm):
        model = tiny_model(**GPT)
        model = remove_heads(model, weakest(head_scores(model), 5))
        with pytest.raises(InputError, match="(?s)num_heads = 7.*num_heads=6 or 8"):
            tensor_parallel(model, comm)
        return [(one.call, one.n_bytes) for one in comm.ledger.entries]

    assert run_ranks(program, 2) == [[("all_gather", 8)]] * 2
