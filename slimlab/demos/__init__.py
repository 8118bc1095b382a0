"""Runnable programs: one per parallel idea, for mpirun, torchrun and plain python."""
