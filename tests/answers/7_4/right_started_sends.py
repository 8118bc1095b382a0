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
    if num_tasks < world_size:
        return False
    return min(task_bytes, result_bytes) > eager_bytes


def mended_farm(comm, tasks, num_tasks, work):
    workers = comm.world_size - 1
    if comm.rank > 0:
        for _ in range(comm.rank - 1, num_tasks, workers):
            comm.send(work(comm.recv(0)), 0)
        return None
    started = [comm.isend(task, 1 + k % workers) for k, task in enumerate(tasks)]
    results = [comm.recv(1 + k % workers) for k in range(num_tasks)]
    for handle in started:
        handle.wait()
    return results
