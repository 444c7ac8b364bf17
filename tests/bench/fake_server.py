"""A server that forks fake cells."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from flowbench.core.forking import become, serve

Path(f"{os.environ['FAKE_CALLS']}-server").write_text(str(os.getpid()))
words = serve(socket.socket(fileno=int(sys.argv[1])))
if words is not None:
    become("fake_cell", words)
