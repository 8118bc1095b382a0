"""Ranks that talk: the Communicator and its runtimes.

A map for readers. Chapter 07 needs the first two rooms; the others are there so that one program
runs anywhere and ends in time whatever goes wrong.

What a program sees     base (the Communicator), messages, reductions, calls, parts, groups; launch
                        (run_ranks), connect (for programs that mpirun, srun or torchrun starts)
Written by hand         collectives, and its kinds: _ring, _tree, _recursive, _pairwise, _hosts,
                        _direct; _shared is what they have in common
Counted, drawn, slowed  ledger, trace, trace_data, events, clocks; network (dialled: every message
                        takes the time you say), links, ports; wrapped; calibrate, timings, place
Ranks as threads        threads, world, thread_ranks, rank_state, mail, world_report
Ranks over MPI          mpi, mpi_buffers, mpi_messages, mpi_transport, mpi_compare; mpi_start,
                        mpi_stub, mpirun
torch.distributed       distributed, gloo_messages, torch_carriers, torch_compare, torch_links,
                        torch_lookout, torch_memory
On the way              wire (headers of messages), agree (ranks compare calls), report (errors)
Starting processes      launchers, process_ranks, processes, rank_process, cells, shipping, outputs,
                        channel, interrupts
Ending in time          watch and standing (in each rank), board and keeper (who knows of all),
                        supervise, session, counts, stuck, stacks, voice
"""
