"""How `make setup` installs: by uv, under pip's settings."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pip_file(monkeypatch, tmp_path):
    for name in (
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
        "PIP_CERT",
        "PIP_CONSTRAINT",
        "SSL_CERT_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    return file


def values_of(command: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(command) if name == option]


def test_settings_of_a_file_and_of_the_environment_are_handed_on(install, pip_file, monkeypatch):
    pip_file.write_text(
        "[global]\nindex-url = https://a.example/simple\nextra-index-url =\n    file:///b\n    file:///c\n"
        "cert = /d.pem\ntimeout = 5\n"
    )
    monkeypatch.setenv("PIP_FIND_LINKS", "/e /f")
    command, environment = install.uv_command()
    assert values_of(command, "--default-index") == ["https://a.example/simple"]
    assert values_of(command, "--extra-index-url")[-2:] == ["file:///b", "file:///c"]
    assert values_of(command, "--find-links")[-2:] == ["/e", "/f"]
    assert values_of(command, "-c")[-1] == "constraints.txt"
    assert environment["SSL_CERT_FILE"] == "/d.pem"
    assert "5" not in command


@pytest.mark.parametrize(("codes", "last"), [([0, 0], "uv"), ([0, 1, 0], "pip"), ([1, 7], "pip")])
def test_pip_installs_what_uv_cannot(install, pip_file, monkeypatch, codes, last):
    seen, left, run = [], iter(codes), subprocess.run

    def fake(command, **options):
        if "config" in command:
            return run(command, **options)
        seen.append(command)
        return subprocess.CompletedProcess(command, next(left))

    monkeypatch.setattr(install.subprocess, "run", fake)
    assert install.main() == codes[-1]
    assert seen[-1][2] == last
    assert seen[-1][-2:] == ["-e", ".[dev]"]
    assert len(seen) == len(codes)
