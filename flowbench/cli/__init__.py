"""The ``flowbench`` command: reads the command line, calls one function, reports errors in one line."""

from flowbench.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
