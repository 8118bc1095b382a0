"""Who is where: ranks say their host, process and library; a greeting goes round.

    slimlab demo hello --ranks 4 --backend threads
    python -m slimlab.demos.hello --ranks 4 --backend gloo --json
    mpirun -n 4 python -m slimlab.demos.hello
    torchrun --nproc-per-node 4 -m slimlab.demos.hello

The greeting starts at rank 0 as a tensor of one number, its rank. Every rank adds its own and
passes it on, until rank 0 has it back with the names of all. So rank r sends one message of
8 (r + 1) bytes, which is the first prediction of the book about messages.

Run it first on a new machine: if two ranks that should share a host do not, or a GPU is not there,
no later measurement means what one thinks. Production jobs print this into their logs.
"""

import json
from dataclasses import asdict

import torch

from slimlab.comm.base import Communicator
from slimlab.comm.place import place_of
from slimlab.comm.trace import TracedCommunicator
from slimlab.demos.common import demo_command
from slimlab.demos.measure import count_links, flat, texts_of_all
from slimlab.demos.report import Report, report_of


def program(comm: Communicator) -> Report:
    """Let a greeting go round, and tell where every rank is.

    comm     the communicator of all ranks
    returns  the report, the same on every rank

    Communicates: one message from every rank to the next; then what the ranks tell each other.
    """
    traced = TracedCommunicator(comm)
    names = pass_round(traced)

    report = report_of("hello", comm)
    places = [json.loads(text) for text in texts_of_all(comm, json.dumps(asdict(place_of(comm))))]
    rows = [tuple(place.values()) for place in places]
    headers = ("rank", "host", "process", "device", "backend", "carried by")
    report.table("who is where", headers, rows)
    messages, n_bytes = count_links(comm, traced.events)
    came_back = [int(one) for one in texts_of_all(comm, names)[0].split()]
    report.check("ranks that the greeting met", list(range(comm.world_size)), came_back)
    predicted = greeting_bytes(comm.world_size)
    report.check("messages sent", [int(one > 0) for one in predicted], list(map(sum, messages)))
    report.check("bytes sent", predicted, list(map(sum, n_bytes)))
    report.check("links used", sum(map(bool, predicted)), sum(map(bool, flat(messages))))
    report.numbers |= {"places": places, "num_hosts": len({place["host"] for place in places})}
    return report


def pass_round(comm: Communicator) -> str:
    """Send the names of the ranks so far to the next rank, round the ring.

    comm     the communicator of all ranks
    returns  the names that this rank has got, with its own; on rank 0 those of all

    Communicates: one message out and one in.
    """
    own = torch.tensor([comm.rank], device=comm.device)
    if comm.world_size == 1:
        return "0"
    right, left = (comm.rank + 1) % comm.world_size, comm.rank - 1
    if comm.rank == 0:
        comm.send(own, right)
        names = comm.recv(comm.world_size - 1)
    else:
        names = torch.cat([comm.recv(left), own])
        comm.send(names, right)
    return " ".join(map(str, names.tolist()))


def greeting_bytes(world_size: int) -> list[int]:
    """Predict the bytes that each rank sends: one int64 for every name so far.

    world_size  number of ranks
    """
    return [8 * (rank + 1) if world_size > 1 else 0 for rank in range(world_size)]


main = demo_command(program)

if __name__ == "__main__":
    main()
