"""What may be swept, and over which values."""

from __future__ import annotations

import pytest

from flowbench.core.sweep import read_sweep


def test_points_stay_as_written_and_what_is_empty_is_not_swept():
    found = read_sweep("sweep", {"guidance": [1, 2.5], "network_evaluations": [4, 1.0, 10**6]})
    assert found == {"guidance": [1, 2.5], "network_evaluations": [4, 1, 10**6]}
    assert list(found) == ["guidance", "network_evaluations"]
    assert [type(point) for point in found["network_evaluations"]] == [int] * 3
    assert read_sweep("sweep", {"guidance": None, "network_evaluations": []}) == read_sweep("sweep", None) == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], r"sweep must be a mapping, e\.g\. \{network_evaluations: \[1, 2, 4\]\}, got \[1\]"),
        ({"nfe": [1]}, "sweep goes over network_evaluations and guidance, got nfe"),
        ({"guidance": 2}, r"sweep\.guidance must be a list of numbers, got 2"),
        ({"guidance": [1, 0.5]}, r"sweep\.guidance\[1\] must be a number in \[1, 1e\+12\], got 0\.5"),
        ({"guidance": [2, 2.0]}, r"sweep\.guidance must be distinct numbers, got 2\.0 twice"),
        ({"network_evaluations": [1.5]}, r"sweep\.network_evaluations must be whole numbers >= 1, got 1\.5"),
        ({"network_evaluations": [True]}, r"sweep\.network_evaluations\[0\] must be a number in .*, got True"),
        (
            {"network_evaluations": [10**7]},
            r"sweep\.network_evaluations\[0\] must be a number in .*, got 10000000",
        ),
    ],
)
def test_mistakes_are_named(value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read_sweep("sweep", value)
