"""``python -m flowbench.cli.server N`` forks ``flowbench`` commands for the bench at the other end of the socket N."""

import socket
import sys

import torch

import flowbench.cli.main
import flowbench.commands.runs  # noqa: F401  (what every cell needs, imported once)
from flowbench.core.forking import become, serve


def main() -> None:
    """Serve; in what is forked, run the command."""
    if torch.cuda.is_initialized():
        raise RuntimeError("a process that uses a GPU cannot be forked")
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words is not None:
        become("flowbench.cli", words)


if __name__ == "__main__":
    main()
