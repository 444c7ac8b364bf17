"""Install flowbench and its development tools into this environment, editable and pinned.

uv downloads and unpacks on all cores, in a quarter of pip's time, but does not read pip's settings. Those of where
packages come from are handed on; where pip has others that decide what is installed, where uv cannot be had, or where
it cannot resolve what pip can, pip installs.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

PIP = [sys.executable, "-m", "pip"]
INSTALL = [*PIP, "install", "--quiet", "--disable-pip-version-check"]
WANTED = ["-c", "constraints.txt", "-e", ".[dev]"]
# By environment variables, because an address may hold a password.
VARIABLES = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_EXTRA_INDEX_URL", "cert": "SSL_CERT_FILE"}
# Settings that change how pip works, and not what it installs.
HARMLESS = {
    "cache-dir", "config-file", "default-timeout", "disable-pip-version-check", "no-cache-dir", "no-color",
    "no-compile", "no-input", "no-warn-script-location", "prefer-binary", "progress-bar", "quiet", "require-virtualenv",
    "retries", "root-user-action", "timeout", "verbose",
}  # fmt: skip
# Of these places the later one counts; settings of pip's other commands do not.
PLACES = ("global", "install", ":env:")


class NotForUv(Exception):
    """pip is told something that uv cannot be told."""


def pip_settings() -> dict[str, str]:
    """Pip's settings for an installation, from its files and environment variables.

    Raises:
        NotForUv: when pip does not list them in the way that is read here.
    """
    plain = {**os.environ, "PIP_QUIET": "0", "PIP_VERBOSE": "0"}
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=False, env=plain)
    found: dict[str, dict[str, str]] = {place: {} for place in PLACES}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        place, _, name = key.rpartition(".")
        if place in found:
            try:
                found[place][name] = str(ast.literal_eval(value))
            except (SyntaxError, ValueError):
                raise NotForUv(f"{key} is listed as {value}") from None
    if listed.returncode:
        raise NotForUv("pip config list failed")
    return {name: value for place in PLACES for name, value in found[place].items()}


def uv_command() -> tuple[list[str], dict[str, str]]:
    """What installs by uv, and its environment.

    Raises:
        NotForUv: for a setting of pip's that uv is not given.
    """
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--index-strategy", "unsafe-best-match"]
    environment = dict(os.environ)
    for name, value in pip_settings().items():
        if name in VARIABLES:
            environment[VARIABLES[name]] = " ".join(value.split())
        elif name == "find-links":
            environment["UV_FIND_LINKS"] = ",".join(value.split())
        elif name == "constraint":
            command += [word for file in value.split() for word in ("-c", file)]
        elif name == "no-index":
            command += ["--no-index"] * (value.lower() in ("1", "true", "yes", "on"))
        elif name not in HARMLESS:
            raise NotForUv(f"pip has the setting {name}")
    return [*command, "--python", sys.executable, *WANTED], environment


def by_uv() -> bool:
    """Install by uv, and whether it could."""
    try:
        command, environment = uv_command()
    except NotForUv as reason:
        print(f"pip installs: {reason}", file=sys.stderr)
        return False
    get = [*INSTALL, "--only-binary", "uv", "-c", "constraints.txt", "uv"]
    done = (subprocess.run(words, check=False, env=given) for words, given in ((get, None), (command, environment)))
    if any(process.returncode for process in done):
        print("pip installs: uv could not", file=sys.stderr)
        return False
    return True


def main() -> int:
    """Install; the exit status of what did it."""
    if by_uv():
        return 0
    return subprocess.run([*INSTALL, "--no-compile", *WANTED], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
