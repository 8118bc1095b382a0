"""Every operation of a Communicator, as cases that any runtime can run in one launched world."""

import json
import traceback
from pathlib import Path

import comm_cases_collectives
import comm_cases_groups
import comm_cases_messages
from comm_checks import CASES

from slimlab.comm.report import CommunicationError

# Each of these modules adds its cases to CASES.
MODULES = (comm_cases_messages, comm_cases_collectives, comm_cases_groups)


def run_cases(comm, names: list[str], directory: str) -> tuple[int, int]:
    """Run cases on every rank; directory/<rank> gets a line of JSON for each that came to its end.

    A line holds the name and how the case failed, an empty text if it did not.
    """
    with open(Path(directory, str(comm.rank)), "w") as file:
        for name in names:
            failure = ""
            try:
                CASES[name](comm)
            except CommunicationError:
                raise  # the ranks cannot go on together
            except Exception as error:
                steps = [step for step in traceback.extract_tb(error.__traceback__)
                         if step.filename in [module.__file__ for module in MODULES]]  # fmt: skip
                lines = "".join(f"line {step.lineno} of {step.name}: " for step in steps)
                failure = f"{lines}{type(error).__name__}: {error}"
            print(json.dumps([name, failure]), file=file, flush=True)
    return comm.rank, comm.world_size
