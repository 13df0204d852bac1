"""A process that has imported everything, and forks for each command of the tests: a start takes 0.1 s, not 3."""

# Its argument is the number of a socket. A request is the command's arguments, its environment and whether to start a
# session, with three descriptors: standard input, output and error. The answers are the command's process number, and
# then "orphaned": its parent, a child of this process, has ended, so that the tests' process is its parent.

import gc
import json
import os
import runpy
import socket
import sys

import torch._dynamo  # noqa: F401  # optimizers import it when they are first used

import convert  # noqa: F401
import pipeline  # noqa: F401


def wait_for_request(requests: socket.socket) -> list[str]:
    """Answers requests. Returns the command's arguments in each process that shall run one."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not message:
            os._exit(0)
        child = os.fork()
        if child == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(child, 0)
        requests.send(b"orphaned")
    if command := os.fork():
        requests.send(str(command).encode())
        os._exit(0)
    requests.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace")  # noqa: SIM115
    arguments, environment, session = json.loads(message)
    os.environ.clear()
    os.environ.update(environment)
    if session:
        os.setsid()
    return arguments


gc.freeze()
sys.argv = wait_for_request(socket.socket(fileno=int(sys.argv[1])))
if sys.argv[0] == "-c":
    exec(sys.argv.pop(1), {"__name__": "__main__"})
elif sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
