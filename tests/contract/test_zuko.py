"""A family of an installed package outside of flowbench: a zuko flow is checked, trained, measured, and in a bench."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flowbench.core.rows import read_rows

pytest.importorskip("zuko")

SOURCE = Path(__file__).parent / "zuko_flows" / "zuko_flows.py"
METADATA = "Metadata-Version: 2.1\nName: zuko-flows\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
MODEL = """
data: {dataset: eight_gaussians, batch_size: 64}
model: {class_path: CLASS, init_args: {ARGUMENTS}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 20}
evaluator:
  reference: val
  num_samples: 50
  num_trajectories: 4
  num_likelihood: 50
  metrics:
    w2: {class_path: flowbench.evaluation.Wasserstein2}
    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}
    straightness: {class_path: flowbench.tasks.generation.PathStraightness}
    cost: {class_path: flowbench.evaluation.CostReport}
"""
BENCH = """
question: Does a spline flow of zuko stand beside flow matching?
contenders: {spline: spline.yaml, tarflow: tarflow.yaml}
seeds: [0]
budget: {steps: 20}
claims: [spline.nll < noise.w2, spline.parameters < 1000000]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that pip has installed the package into, from a wheel."""
    folder = tmp_path_factory.mktemp("zuko")
    files = {
        "zuko_flows.py": SOURCE.read_text(encoding="utf-8"),
        "zuko_flows-1.0.dist-info/METADATA": METADATA,
        "zuko_flows-1.0.dist-info/WHEEL": WHEEL,
    }
    record = [f"{name},sha256={_digest(text)},{len(text.encode())}" for name, text in files.items()]
    files["zuko_flows-1.0.dist-info/RECORD"] = "\n".join([*record, "zuko_flows-1.0.dist-info/RECORD,,", ""])
    wheel = folder / "zuko_flows-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(folder / "site")]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    return folder / "site"


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def flowbench(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "flowbench.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "FLOWBENCH_RUNS": str(folder / "runs")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_its_contract_is_kept(installed, tmp_path):
    done = flowbench(installed, tmp_path, "check", "zuko_flows.SplineFlow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "log_prob" in done.stdout or "density" in done.stdout


@pytest.mark.slow
def test_it_stands_in_a_bench(installed, tmp_path):
    arguments = "layers: [1, 1], width: 16, head_dim: 8"
    families = {"spline": ("zuko_flows.SplineFlow", "width: 16"), "tarflow": ("flowbench.families.TARFlow", arguments)}
    for name, (cls, given) in families.items():
        (tmp_path / f"{name}.yaml").write_text(MODEL.replace("CLASS", cls).replace("ARGUMENTS", given))
    (tmp_path / "bench.yaml").write_text(BENCH)
    done = flowbench(installed, tmp_path, "bench", "-c", "bench.yaml", "jobs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in read_rows(tmp_path / "runs" / "bench" / "results.jsonl") if row.contender == "spline"]
    assert {row.family for row in rows} == {"SplineFlow"}
    assert {"w2", "nll", "straightness", "parameters"} <= {row.metric for row in rows}
    assert all(row.status == "ok" for row in rows)
    report = next((tmp_path / "runs" / "bench").glob("report*.md")).read_text()
    assert "| spline" in report
