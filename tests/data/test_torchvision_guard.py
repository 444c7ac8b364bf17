"""The guard, in processes of their own because it acts on imports."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = """
import sys, flowbench.torchvision_guard as guard
guard.ensure_importable()
"""


def python(code: str, *, extra_path: Path | None = None) -> str:
    env = dict(os.environ)
    if extra_path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(extra_path), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_torchvision(tmp_path: Path, source: str) -> Path:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(source)
    return tmp_path


@pytest.mark.parametrize("first", ["data.FlowDataModule", pytest.param("families.FlowModule", marks=pytest.mark.slow)])
def test_everything_imports_after_a_class_that_is_used(first: str) -> None:
    """A room alone imports nothing: lists need no torch."""
    room, _, name = first.partition(".")
    code = f"from flowbench.{room} import {name}; import lightning, torchmetrics.image.fid, torch_fidelity, torchvision"
    assert python(f"{code}; print('ok')") == "ok"


def test_a_sound_torchvision_is_left_alone(tmp_path: Path) -> None:
    path = fake_torchvision(tmp_path, "SOUND = object()")
    code = GUARDED + "import torchvision; print(guard._library, hasattr(torchvision, 'SOUND'))"
    assert python(code, extra_path=path) == "None True"


def test_the_missing_operators_are_declared_once(tmp_path: Path) -> None:
    # Fails as the CUDA wheel does: it registers a fake kernel for an operator that nobody has declared.
    path = fake_torchvision(
        tmp_path, "import torch\n@torch.library.register_fake('torchvision::nms')\ndef fake(*args): ...\n"
    )
    code = GUARDED + (
        "first = guard._library; guard.ensure_importable(); import torch, torchvision\n"
        "print(first is not None, first is guard._library, str(torch.ops.torchvision.qnms.default._schema))"
    )
    expected = "True True torchvision::qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert python(code, extra_path=path) == expected


@pytest.mark.parametrize("fault", ["RuntimeError('another fault')", "ImportError('missing.so')"])
def test_other_faults_are_left_to_the_importer(tmp_path: Path, fault: str) -> None:
    path = fake_torchvision(tmp_path, f"raise {fault}")
    code = GUARDED + f"print(guard._library)\ntry:\n    import torchvision\nexcept {fault.split('(')[0]}: print('met')"
    assert python(code, extra_path=path) == "None\nmet"


def test_no_torchvision_no_action(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowbench import torchvision_guard

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torchvision_guard, "_declare_missing_operators", lambda: pytest.fail("acted"))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    torchvision_guard.ensure_importable()
    assert "torchvision" not in sys.modules
