"""Discovery of the catalogue's data sets: entry points of the group ``flowbench.datasets``, ours included."""

from __future__ import annotations

import importlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.data.dataset_entry import DatasetEntry

if TYPE_CHECKING:
    from importlib.metadata import Distribution

__all__ = ["GROUP", "Offer", "offers_of_others", "own_offers"]

GROUP = "flowbench.datasets"
"""The group of entry points. Each names a :class:`~flowbench.data.DatasetEntry`, or a list or tuple of them."""

OWN = "flowbench"
_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class Offer:
    """An entry point: data sets of an installed package that are not imported yet.

    Attributes:
        package: name of the distribution.
        name: of the entry point.
        value: where the entries lie, ``module:attribute``.
    """

    package: str
    name: str
    value: str

    def entries(self) -> tuple[DatasetEntry, ...]:
        """Import the data sets.

        Raises:
            ValueError: one line that names the package: it cannot be imported, or holds something else.
        """
        found = self._import()
        entries = tuple(found) if isinstance(found, list | tuple) else (found,)
        for entry in entries:
            if not isinstance(entry, DatasetEntry):
                raise ValueError(f"{self}: it is of type {type(entry).__name__}, not a DatasetEntry; ask its authors")
        return entries

    def _import(self) -> object:
        module, _, attributes = self.value.partition(":")
        try:
            found: object = importlib.import_module(module.strip())
            for attribute in attributes.strip().split("."):
                found = getattr(found, attribute)
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{self}: it cannot be imported ({reason}); update or uninstall the package") from error
        return found

    def __str__(self) -> str:
        return f"the package {self.package!r} offers data sets as {self.name} = {self.value}"


def own_offers() -> list[Offer]:
    """Those of flowbench itself.

    In a checkout they are read from its ``pyproject.toml``: the metadata are of the day when it was installed, and lack
    what came since, or it never was. An installed wheel has no such file, and its metadata are as old as its code.

    Raises:
        ValueError: one line: there are neither.
    """
    if _PROJECT.is_file():
        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == OWN:
            return [Offer(OWN, name, value) for name, value in project["entry-points"][GROUP].items()]
    from importlib import metadata

    try:
        points = metadata.distribution(OWN).entry_points
    except metadata.PackageNotFoundError:
        points = metadata.EntryPoints()
    found = [Offer(OWN, point.name, point.value) for point in points if point.group == GROUP]
    if not found:
        raise ValueError("flowbench is neither a checkout nor installed with its data sets; install it with pip")
    return found


def offers_of_others() -> tuple[list[Offer], list[str]]:
    """Those of other installed packages; nothing of them is imported.

    Returns:
        The offers, and one line for every package whose entry points cannot be read.
    """
    from importlib import metadata

    offers: list[Offer] = []
    faults: list[str] = []
    seen = {OWN}
    for distribution in metadata.distributions():
        # Most packages have none: their metadata are not parsed, which would take longer than all the rest.
        if not _mentions_group(distribution):
            continue
        package = distribution.metadata["Name"] or "(without a name)"
        key = re.sub(r"[-_.]+", "-", package).lower()
        if key in seen:  # the first on the path is the one that is imported
            continue
        seen.add(key)
        try:
            offers += [Offer(package, p.name, p.value) for p in distribution.entry_points if p.group == GROUP]
        except Exception as error:  # a broken file makes the parser raise nearly anything
            reason = " ".join(str(error).split())
            faults.append(f"the package {package!r} has entry points that cannot be read ({reason}); reinstall it")
    return offers, faults


def _mentions_group(distribution: Distribution) -> bool:
    try:
        return GROUP in (distribution.read_text("entry_points.txt") or "")
    except (OSError, ValueError):
        return False
