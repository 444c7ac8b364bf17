"""The numerical tests on other processors' arithmetic: ``make test-portable``.

Torch, oneDNN and MKL choose their instructions when a process starts and can be told to take older ones, so that one
machine stands in for many. Every configuration runs to its end; the exit status is not zero when one of them failed.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

import torch

from flowbench.bench.machine import available_cores

FOLDERS = ("tests/numerical", "tests/families", "tests/contract", "tests/metrics")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
CONFIGURATIONS: dict[str, dict[str, str]] = {
    "torch-default": {"ATEN_CPU_CAPABILITY": "default"},
    "torch-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch-avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "onednn-off": {"FLOWBENCH_TEST_ONEDNN": "0"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "all-avx2": AVX2,
    "all-oldest": OLDEST,
    "kernels-plain": {"FLOWBENCH_KERNELS": "plain"},
    "kernels-onednn": {"FLOWBENCH_KERNELS": "onednn"},
    "threads-1": {"FLOWBENCH_TEST_THREADS": "1"},
    "threads-2": {"FLOWBENCH_TEST_THREADS": "2"},
    "random-order": {},
}


def missing(name: str) -> str | None:
    """Why this processor cannot run a configuration; instructions that it lacks would end the process."""
    if name.endswith("avx512") and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "this processor has no AVX-512"
    if name.endswith("avx2") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "this processor has no AVX2"
    return None


def run(name: str, arguments: list[str]) -> tuple[bool, float]:
    """One configuration in processes of its own: whether it passed, and its seconds."""
    settings = CONFIGURATIONS[name]
    workers = max(1, available_cores() // int(settings.get("FLOWBENCH_TEST_THREADS", "1")))
    order = ["--random-order", f"--random-order-seed={random.randrange(10**6)}"] if name == "random-order" else []
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal", *order]
    print(f"\n==== {name}", *(f"{key}={value}" for key, value in settings.items()), *order, flush=True)
    begin = time.monotonic()
    done = subprocess.run([*command, *(arguments or FOLDERS)], env={**os.environ, **settings}, check=False)
    return done.returncode == 0, time.monotonic() - begin


def main() -> int:
    """Run the configurations that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), help="configurations"
    )
    parser.add_argument("arguments", nargs="*", help="of pytest; the numerical tests by default")
    given = parser.parse_args()
    report = []
    for name in given.only:
        if reason := missing(name):
            report.append((name, "skipped", reason))
            continue
        passed, seconds = run(name, given.arguments)
        report.append((name, "passed" if passed else "FAILED", f"{seconds:.0f} s"))
    print("\n==== the same tests on other arithmetic")
    for name, result, remark in report:
        print(f"{name:14} {result:8} {remark}")
    return int(any(result == "FAILED" for _, result, _ in report))


if __name__ == "__main__":
    sys.exit(main())
