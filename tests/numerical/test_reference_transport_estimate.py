"""The procedure behind the table of reference W2^2, run again with fewer points: closed forms and every entry."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

from flowbench.data.reference_transport import REFERENCES

NUM, REPEATS = 2048, 4  # the table: 8,192 points and 6 scramblings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def procedure() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "reference_transport.py"
    spec = importlib.util.spec_from_file_location("reference_transport_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pair", list(REFERENCES), ids=lambda pair: f"{pair[0]}-{pair[2]}")
def test_the_procedure_finds_the_entries_of_the_table(procedure, pair):
    source, _, target, _ = pair
    known = REFERENCES[pair]
    exact = procedure.closed_form(source, target)
    assert (exact is not None) == (known.standard_error == 0)
    if exact is not None:
        assert exact == pytest.approx(known.w2_squared, rel=1e-7)
    value, error = procedure.estimate(source, target, NUM, REPEATS)
    # An error that grew would let anything pass.
    assert 0 < error < 8e-3 * known.w2_squared
    assert value == pytest.approx(known.w2_squared, abs=4 * math.hypot(error, known.standard_error))
    assert value == pytest.approx(known.w2_squared, rel=5e-3)


def test_the_table_holds_the_pairs_of_the_procedure(procedure):
    assert sorted(procedure.PAIRS) == sorted((source, target) for source, _, target, _ in REFERENCES)
