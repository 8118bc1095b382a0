"""`python -m slimlab` is the command `slimlab`, also under mpirun and torchrun (chapter 11).

Production tools are started in the same two ways.
"""

from slimlab.cli import main

if __name__ == "__main__":
    main(prog_name="slimlab")
