"""Install flowbench and its development tools into this environment, editable and pinned.

uv downloads and unpacks on all cores, in a quarter of pip's time. It does not read pip's settings, so those that both
have are handed on. Where uv cannot be had, or cannot resolve what pip can, pip does it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator

PIP = [sys.executable, "-m", "pip"]
WANTED = ["-c", "constraints.txt", "-e", ".[dev]"]
# pip's settings that hold any number of values, each of which is an argument of uv.
LISTS = {"extra-index-url": "--extra-index-url", "find-links": "--find-links", "constraint": "-c"}


def pip_settings() -> Iterator[tuple[str, str]]:
    """Names and values of pip's settings, from its files and environment variables."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        yield name.rpartition(".")[2], ast.literal_eval(value)


def uv_command() -> tuple[list[str], dict[str, str]]:
    """What installs by uv, and its environment."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--index-strategy", "unsafe-best-match"]
    environment = dict(os.environ)
    for name, value in pip_settings():
        if name in LISTS:
            command += [part for entry in value.split() for part in (LISTS[name], entry)]
        elif name == "index-url":
            command += ["--default-index", value]
        elif name == "cert":
            environment.setdefault("SSL_CERT_FILE", value)
    return [*command, "--python", sys.executable, *WANTED], environment


def main() -> int:
    """Install; the exit status of what did it."""
    quiet = ["install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*PIP, *quiet, "-c", "constraints.txt", "uv"], check=False).returncode == 0:
        command, environment = uv_command()
        if subprocess.run(command, env=environment, check=False).returncode == 0:
            return 0
        print("uv could not install: pip does it", file=sys.stderr)
    return subprocess.run([*PIP, *quiet, "--no-compile", *WANTED], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
