"""The guard, in processes of their own because it acts on imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Importing torch takes seconds and torchvision is what these tests are about: one process imports the first and forks.
FORKS = """
import json, os, sys, traceback, torch, flowbench.core.torchvision_guard as guard
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(request["output"], "w", encoding="utf-8")
        sys.path.insert(0, request["path"])
        status = 0
        try:
            exec(request["code"])
        except BaseException:
            status = 1
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def guarded(forks: subprocess.Popen[str], tmp_path: Path) -> Callable[[str, str], str]:
    """What code prints after the guard, beside a torchvision of the given source."""

    def run(torchvision: str, code: str) -> str:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(torchvision)
        (tmp_path / "torchvision" / "extra.py").write_text("VALUE = 3")
        output = tmp_path / "output.txt"
        request = {"code": code, "path": str(tmp_path), "output": str(output)}
        forks.stdin.write(json.dumps(request) + "\n")
        forks.stdin.flush()
        status = forks.stdout.readline()
        assert status == "0\n", output.read_text()
        return output.read_text().strip()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("first", ["data.FlowDataModule", "families.FlowModule"])
def test_everything_imports_after_a_class_that_is_used(first: str) -> None:
    """A room alone imports nothing: lists need no torch."""
    room, _, name = first.partition(".")
    code = f"from flowbench.{room} import {name}; import lightning, torchmetrics.image.fid, torch_fidelity, torchvision"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('ok')"], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_a_sound_torchvision_is_left_alone(guarded: Callable[[str, str], str]) -> None:
    said = guarded("SOUND = object()", "import torchvision; print(guard._library, hasattr(torchvision, 'SOUND'))")
    assert said == "None True"


def test_the_missing_operators_are_declared_once(guarded: Callable[[str, str], str]) -> None:
    # Fails as the CUDA wheel does: it registers a fake kernel for an operator that nobody has declared.
    torchvision = (
        "import torch, torchvision.extra\n@torch.library.register_fake('torchvision::nms')\ndef fake(*args): ...\n"
    )
    code = (
        "assert guard._library is None; import torchvision; first = guard._library; import torchvision.extra\n"
        "print(first is guard._library, torchvision.extra.VALUE, torch.ops.torchvision.qnms.default._schema)"
    )
    expected = "True 3 torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert guarded(torchvision, code) == expected


@pytest.mark.parametrize("fault", ["RuntimeError('another fault')", "ImportError('missing.so')"])
def test_other_faults_are_left_to_the_importer(guarded: Callable[[str, str], str], fault: str) -> None:
    code = f"try:\n    import torchvision\nexcept {fault.split('(')[0]}: print('met', guard._library)"
    assert guarded(f"raise {fault}", code) == "met None"


def test_without_torchvision_its_import_fails_as_ever(guarded: Callable[[str, str], str]) -> None:
    code = """
sys.path[:] = [request["path"]]
import pathlib; [file.unlink() for file in pathlib.Path(request["path"], "torchvision").iterdir() if file.is_file()]
pathlib.Path(request["path"], "torchvision").rmdir()
try:
    import torchvision
except ModuleNotFoundError as error: print(error)
"""
    assert guarded("", code) == "No module named 'torchvision'"
