from __future__ import annotations

import importlib
import sys

import pytest

from flowbench.core.lazy import lazy_exports, lazy_module


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one export, whose home says when it is imported."""
    folder = tmp_path / "lazy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nfrom flowbench.core.lazy import lazy_exports\n"
        "if TYPE_CHECKING:\n    from lazy_package.home import thing\n"
        "    from lazy_package.home import other as renamed\n"
        "__all__ = ['renamed', 'thing']\n__getattr__ = lazy_exports(__name__)\n"
    )
    (folder / "home.py").write_text("thing, other = object(), 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("lazy_package")
    for name in [name for name in sys.modules if name.startswith("lazy_package")]:
        del sys.modules[name]


def test_an_export_is_imported_when_it_is_used(package):
    assert "lazy_package.home" not in sys.modules
    assert package.renamed == 3
    assert "lazy_package.home" in sys.modules
    assert package.thing is package.thing is sys.modules["lazy_package.home"].thing
    with pytest.raises(AttributeError, match="module 'lazy_package' has no attribute 'nothing'"):
        _ = package.nothing
    assert package.home is sys.modules["lazy_package.home"], "submodules are found as ever"


def test_a_star_import_finds_everything(package):
    names: dict[str, object] = {}
    exec("from lazy_package import *", names)
    assert names["renamed"] == 3
    assert names["thing"] is package.thing


def test_a_module_is_imported_at_its_first_use(package):
    sys.modules.pop("lazy_package.home", None)
    home = lazy_module("lazy_package.home")
    assert "lazy_package.home" not in sys.modules
    assert home.other == 3
    assert home.thing is sys.modules["lazy_package.home"].thing
    with pytest.raises(AttributeError):
        _ = home.nothing


def test_a_package_without_guarded_imports_exports_nothing(package):
    with pytest.raises(AttributeError):
        lazy_exports("flowbench.core")("anything")
