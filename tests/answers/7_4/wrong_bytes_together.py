from slimlab.classroom.check import numbers


def my_diagnosis():
    """What hangs first, where, and why."""
    given = numbers("7.4")
    return {
        "num_tasks": given["world_size"],  # one more than there are workers
        "length": given["eager_bytes"] // 4 + 1,
        "rank_0_in": "send",
        "rank_1_in": "send",
        "cause": "circle",
    }


def hangs(world_size, num_tasks, task_bytes, result_bytes, eager_bytes):
    """Whether farm hangs."""
    second_task = num_tasks > world_size - 1  # some worker is sent one while it has another
    return second_task and task_bytes + result_bytes > eager_bytes


def mended_farm(comm, tasks, num_tasks, work):
    """farm, which ends whatever is buffered."""
    num_workers = comm.world_size - 1
    if comm.rank == 0:
        results = []
        for first in range(0, num_tasks, num_workers):  # a round: one task for each worker
            numbers_now = range(first, min(first + num_workers, num_tasks))
            for number in numbers_now:
                comm.send(tasks[number], 1 + number - first)
            results += [comm.recv(1 + number - first) for number in numbers_now]
        return results
    for _ in range(comm.rank - 1, num_tasks, num_workers):
        comm.send(work(comm.recv(0)), 0)
    return None
