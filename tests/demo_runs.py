"""Run demos one after another in the processes that a launcher started, for tests/test_demos.py.

    mpirun -n 2 python tests/demo_runs.py '{"hello": ["--ranks", "2"]}'

Each demo is run as `python -m slimlab.demos.NAME` runs it. The first that does not end with exit
code 0 ends the process with its own. Nothing is printed here: lines of two ranks could mix.
"""

import json
import runpy
import sys

if __name__ == "__main__":
    for name, arguments in json.loads(sys.argv[1]).items():
        sys.argv[1:] = arguments
        try:
            runpy.run_module(f"slimlab.demos.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise
