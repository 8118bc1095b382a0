"""The small program that mpirun starts for each rank: it hands the launcher's lines to run_ranks.

mpirun tells a rank who it is by environment variables and open files. A rank that had to import
torch first would be ready after two seconds; instead, this program sends both to the process that
called run_ranks, which forks itself and is the rank (slimlab.comm.mpirun). Where that process must
not be forked, it sends back the command of a fresh Python, which takes this one's place.

It is run as a file, without slimlab and without any package, and is ready in 20 ms.
"""

import json
import os
import socket
import sys

SIZE_BYTES, MAX_FILES = 8, 8


def read_words(line: socket.socket) -> tuple[object, list[int]]:
    """Wait for words on a line, and the open files that come with them.

    line     a connected socket
    returns  the words, and the numbers of the files; None if the other end has closed the line
    """
    head, files, _, _ = socket.recv_fds(line, SIZE_BYTES, MAX_FILES)
    if len(head) < SIZE_BYTES:
        return None, files
    words = bytearray()
    while len(words) < int.from_bytes(head, "big"):
        part = line.recv(int.from_bytes(head, "big") - len(words))
        if not part:
            return None, files
        words += part
    return json.loads(words), files


def send_words(line: socket.socket, words: object, files: list[int]) -> None:
    """Send words, and open files with them.

    line   a connected socket
    words  as JSON can hold them
    files  numbers of open files, at most MAX_FILES
    """
    text = json.dumps(words).encode()
    socket.send_fds(line, [len(text).to_bytes(SIZE_BYTES, "big")], files)
    line.sendall(text)


def main() -> None:
    """Hand over what the launcher gave, and wait until the run is over; the argument says where."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(sys.argv[1])
    files = [int(os.environ["PMI_FD"])] if "PMI_FD" in os.environ else []
    send_words(line, dict(os.environ), files)
    command, files = read_words(line)
    if command is not None:
        for number in files:
            os.set_inheritable(number, True)
        # "{0}" and so on stand for the numbers that the files have here.
        os.execv(command[0], [word.format(*files) for word in command])


if __name__ == "__main__":
    main()
