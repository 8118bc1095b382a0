"""Ranks on two hosts: their bytes cross the network, and whoever is killed there is named."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_hosts import DEADLINE_S, HOSTFILE, NoRights, TwoHosts, spaces_of

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NUM_BYTES = 4_000_000

OVER_MPI = f"""
import socket
import numpy as np
from mpi4py import MPI

world = MPI.COMM_WORLD
sent = np.full({NUM_BYTES}, world.rank, np.uint8)
got = np.empty_like(sent)
other = 1 - world.rank
world.Sendrecv(sent, other, recvbuf=got, source=other)
here = world.Split_type(MPI.COMM_TYPE_SHARED).size
line = f"{{world.rank}} of {{world.size}} on {{socket.gethostname()}} with {{here}}: {{got[0]}}"
print(line + "\\n", end="")
"""
LAST_IS_KILLED = f"""
import os
import signal
import socket
import time
import torch
from slimlab.comm.connect import connect

comm = connect(timeout_s=20.0)
tensor = torch.full(({NUM_BYTES // 4},), comm.rank + 1.0)
assert comm.all_reduce(tensor).eq(3.0).all()
print(f"{{comm.rank}} of {{comm.world_size}} on {{socket.gethostname()}}\\n", end="", flush=True)
comm.barrier()
if comm.rank == 1:
    time.sleep(0.5)  # so that its reports have shown this line
    os.kill(os.getpid(), signal.SIGKILL)
comm.barrier()
"""


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("network namespaces are Linux's")
    try:
        hosts = TwoHosts(tmp_path_factory.mktemp("hosts")).__enter__()
    except NoRights as why:
        pytest.skip(f"no two hosts on this machine: {why}")
    yield hosts
    hosts.__exit__()
    assert spaces_of(hosts.prefix) == []


@pytest.fixture
def environment(monkeypatch):
    for name in os.environ:
        if name.startswith(("PMI", "SLURM_", "OMPI_", "MPI4PY_", "GLOO_", "UCX_", "SLIMLAB_")):
            monkeypatch.delenv(name)
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def mpirun(two_hosts, *program):
    """The command line of hosts/README.md, a rank on each host, with a launcher instead of ssh."""
    if not (BIN / "mpirun").exists():
        pytest.skip("no MPICH beside this Python")
    options = ["-f", str(HOSTFILE), "-ppn", "1", "-n", "2", "-iface", "eth0"]
    launcher = ["-launcher", "ssh", "-launcher-exec", str(two_hosts.launcher)]
    command = [str(BIN / "mpirun"), *launcher, *options, sys.executable, *program]
    return two_hosts.on(0, *command)


def run(command, env):
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE_S)


def nothing_runs_on(two_hosts, within_s=5.0):
    deadline_s = time.monotonic() + within_s
    while two_hosts.processes() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return two_hosts.processes() == []


def crossed(two_hosts, before):
    return [now - then for now, then in zip(two_hosts.crossed_bytes(), before, strict=True)]


def test_two_hosts_have_names_and_networks_of_their_own_and_not_the_machines_memory(
    two_hosts, environment
):
    look = ["sh", "-c", "uname -n; readlink /proc/self/ns/net; readlink /proc/self/ns/ipc"]
    seen = [run(two_hosts.on(host, *look), environment).stdout.split() for host in range(2)]
    names, networks, memories = zip(*seen, strict=True)
    assert list(names) == two_hosts.names
    assert len({*networks, os.readlink("/proc/self/ns/net")}) == 3
    # The two memories do not exist at one time here, so the second may bear the first one's number.
    assert os.readlink("/proc/self/ns/ipc") not in memories


def test_mpich_sends_between_two_hosts_over_their_network(two_hosts, environment):
    before = two_hosts.crossed_bytes()
    done = run(mpirun(two_hosts, "-c", OVER_MPI), environment)
    first, second = two_hosts.names
    expected = [f"0 of 2 on {first} with 1: 1", f"1 of 2 on {second} with 1: 0"]
    assert sorted(done.stdout.split("\n"))[-2:] == expected, done.stderr
    assert done.returncode == 0
    # Whoever took the memory of one machine instead would leave no trace here.
    assert all(NUM_BYTES <= n_bytes < 2 * NUM_BYTES for n_bytes in crossed(two_hosts, before))


def test_a_demo_runs_on_two_hosts_and_says_so(two_hosts, environment):
    done = run(mpirun(two_hosts, "-m", "slimlab.demos.hello", "--json"), environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["agrees"], report["world_size"], report["num_hosts"]) == (True, 2, 2)
    assert [place["host"] for place in report["places"]] == two_hosts.names
    assert nothing_runs_on(two_hosts)


def assert_the_killed_rank_is_named(text, two_hosts):
    found = re.findall(r"rank (\d) \(process \d+ on (\S+)\) ended without a word", text)
    assert found == [("1", two_hosts.names[1])], text
    assert text.count("All ranks were ended.") == 1
    assert re.search(r"time\.sleep|os\.kill", text), text


def test_under_mpirun_a_rank_killed_on_the_other_host_is_named(two_hosts, environment, tmp_path):
    program, before = tmp_path / "program.py", two_hosts.crossed_bytes()
    program.write_text(LAST_IS_KILLED)
    done = run(mpirun(two_hosts, str(program)), environment)
    assert done.returncode != 0
    assert f"0 of 2 on {two_hosts.names[0]}\n" in done.stdout
    assert_the_killed_rank_is_named(done.stderr, two_hosts)
    assert "EXIT CODE: 9" in done.stdout + done.stderr
    assert all(n_bytes >= NUM_BYTES for n_bytes in crossed(two_hosts, before))
    assert nothing_runs_on(two_hosts)


def test_under_torchrun_a_rank_killed_on_the_other_host_is_named(two_hosts, environment, tmp_path):
    program, before = tmp_path / "program.py", two_hosts.crossed_bytes()
    program.write_text(LAST_IS_KILLED)
    # Nothing else runs in these namespaces, so any port is free.
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "1"]
    meeting += ["--rdzv-endpoint", f"{two_hosts.names[0]}:29400", "--rdzv-conf", "join_timeout=30"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", *meeting]
    started = [
        subprocess.Popen(
            two_hosts.on(host, *torchrun, str(program)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(2)
    ]
    said = [one.communicate(timeout=DEADLINE_S)[0] for one in started]
    for host, text in enumerate(said):
        assert f"{host} of 2 on {two_hosts.names[host]}\n" in text, text
    assert all(one.returncode != 0 for one in started)
    assert_the_killed_rank_is_named(said[0], two_hosts)
    assert "exitcode  : -9" in said[1]
    assert all(n_bytes >= NUM_BYTES for n_bytes in crossed(two_hosts, before))
    assert nothing_runs_on(two_hosts)
