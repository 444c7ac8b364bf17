"""How `make setup` installs: by uv, under pip's settings, or by pip."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.marks import slow

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
    """A file that is all of pip's settings but those that it hides (the machine's own stay below it)."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_")) or name == "SSL_CERT_FILE"]:
        monkeypatch.delenv(name)
    file = tmp_path / "pip.conf"
    file.touch()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    return file


SETTINGS = """
[global]
index-url = https://u:secret@a.example/simple
extra-index-url =
    file:///b
    file:///c
find-links = /overridden
constraint = more.txt
cert = /d.pem
timeout = 5

[download]
index-url = https://other.example
"""


@pytest.mark.parametrize("variable", ["", *map(slow, ["PIP_QUIET", "PIP_VERBOSE"])])
def test_settings_of_a_file_and_of_the_environment_are_handed_on(install, pip_file, monkeypatch, variable):
    pip_file.write_text(SETTINGS)
    monkeypatch.setenv("PIP_FIND_LINKS", "/e /f")
    if variable:
        monkeypatch.setenv(variable, "1")
    command, environment = install.uv_command()
    assert environment["UV_DEFAULT_INDEX"] == "https://u:secret@a.example/simple"
    assert environment["UV_EXTRA_INDEX_URL"] == "file:///b file:///c"
    assert environment["UV_FIND_LINKS"] == "/e,/f"
    assert environment["SSL_CERT_FILE"] == "/d.pem"
    assert "secret" not in " ".join(command)
    assert command[-6:] == ["-c", "more.txt", "--python", install.sys.executable, *install.WANTED][-6:]
    assert "more.txt" in command
    assert "--no-index" not in command


def test_the_environment_comes_before_the_file_and_an_installation_before_all_commands(install, pip_file, monkeypatch):
    pip_file.write_text("[global]\nindex-url = https://a\n[install]\nindex-url = https://b\n")
    assert install.uv_command()[1]["UV_DEFAULT_INDEX"] == "https://b"
    monkeypatch.setenv("PIP_INDEX_URL", "https://c")
    assert install.uv_command()[1]["UV_DEFAULT_INDEX"] == "https://c"


def test_without_an_index_uv_has_none_either(install, pip_file, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "--no-index" in install.uv_command()[0]


@pytest.mark.parametrize("setting", ["only-binary = :all:", "require-hashes = true", "proxy = http://p:8080"])
def test_a_setting_that_uv_is_not_given_leaves_the_installation_to_pip(install, pip_file, setting, monkeypatch, capsys):
    pip_file.write_text(f"[global]\n{setting}\n")
    seen = []
    run = subprocess.run
    monkeypatch.setattr(
        install.subprocess,
        "run",
        lambda command, **options: run(command, **options) if "config" in command else ended(seen, command, 0),
    )
    assert install.main() == 0
    assert [command[2] for command in seen] == ["pip"]
    assert setting.split()[0] in capsys.readouterr().err


def ended(seen: list[list[str]], command: list[str], code: int) -> subprocess.CompletedProcess[str]:
    seen.append(command)
    return subprocess.CompletedProcess(command, code)


@pytest.mark.parametrize(("codes", "last"), [([0, 0], "uv"), ([0, 1, 0], "pip"), ([1, 7], "pip")])
def test_pip_installs_what_uv_cannot(install, pip_file, monkeypatch, codes, last):
    seen, left, run = [], iter(codes), subprocess.run
    monkeypatch.setattr(
        install.subprocess,
        "run",
        lambda command, **options: run(command, **options) if "config" in command else ended(seen, command, next(left)),
    )
    assert install.main() == codes[-1]
    assert seen[-1][2] == last
    assert seen[-1][-2:] == ["-e", ".[dev]"]
    assert len(seen) == len(codes)
