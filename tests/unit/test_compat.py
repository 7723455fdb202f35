"""Version gate and seam checks, without SGLang where possible."""

from __future__ import annotations

import sys
from importlib.metadata import requires
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from sglang_kvc.errors import SeamDriftError, UnsupportedSGLangError
from sglang_kvc.upstream import compat


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that stands for a part of SGLang."""

    class Owner:
        def method(self, a: int, *, b: int = 0, **rest: int) -> None: ...

        @classmethod
        def build(cls, a: int) -> None: ...

        @staticmethod
        def add(a: int) -> None: ...

    module = ModuleType("fake_upstream")
    module.Owner = Owner  # type: ignore[attr-defined]
    module.FLAG = False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_upstream", module)
    return module


def test_installed_version_is_supported() -> None:
    compat.check_sglang_version()


@pytest.mark.parametrize(
    "version",
    ["0.5.16", "0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.17.post1", "none"],
)
def test_other_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(UnsupportedSGLangError, match=version):
        compat.check_sglang_version(version)


def test_the_package_asks_for_the_supported_versions() -> None:
    needed = (Requirement(text) for text in requires("sglang_kvc") or [])
    pin = next(one for one in needed if one.name == "sglang").specifier
    releases = [f"0.5.{number}" for number in range(10, 30)]
    assert tuple(filter(pin.contains, releases)) == compat.SUPPORTED_SGLANG


@pytest.mark.parametrize(
    ("symbol", "params"),
    [
        ("Owner.method", ("self", "a", "b", "rest")),
        ("Owner.build", ("cls", "a")),
        ("Owner.add", ("a",)),
        ("Owner", None),
        ("FLAG", None),
    ],
)
def test_seam_matches(
    upstream: ModuleType, symbol: str, params: tuple[str, ...] | None
) -> None:
    compat.check_seam(f"fake_upstream:{symbol}", params, "tests")


@pytest.mark.parametrize("symbol", ["Owner.gone", "Gone.method", "gone"])
def test_missing_symbol_is_named(upstream: ModuleType, symbol: str) -> None:
    with pytest.raises(SeamDriftError, match=f"fake_upstream:{symbol}"):
        compat.check_seam(f"fake_upstream:{symbol}", None, "tests")


def test_missing_module_is_named() -> None:
    with pytest.raises(SeamDriftError, match="no_such_upstream"):
        compat.check_seam("no_such_upstream:f", None, "tests")


def test_changed_parameters_are_named(upstream: ModuleType) -> None:
    with pytest.raises(SeamDriftError) as error:
        compat.check_seam("fake_upstream:Owner.add", ("a", "extra"), "patches/x.py")
    for part in ("fake_upstream:Owner.add", "(a)", "(a, extra)", "patches/x.py"):
        assert part in str(error.value)


def test_verify_leaves_unimported_modules_alone(upstream: ModuleType) -> None:
    compat.verify_seams([compat.Seam("never_imported_upstream:f", None, "tests")])
    assert "never_imported_upstream" not in sys.modules
    with pytest.raises(SeamDriftError, match="gone"):
        compat.verify_seams([compat.Seam("fake_upstream:gone", None, "tests")])


@pytest.mark.parametrize(
    ("since", "until", "holds"),
    [
        ("", "", ["0.5.17", "0.5.22", "0.5.23", "0.6.0", "none"]),
        ("0.5.22", "", ["0.5.22", "0.5.23", "0.6.0"]),
        ("", "0.5.22", ["0.5.17", "none"]),
        ("0.5.18", "0.5.23", ["0.5.22"]),
    ],
)
def test_releases_that_something_holds_for(
    since: str, until: str, holds: list[str]
) -> None:
    versions = ["0.5.17", "0.5.22", "0.5.23", "0.6.0", "none"]
    found = [it for it in versions if compat.in_force(since, until, version=it)]
    assert found == holds


@pytest.mark.parametrize(
    ("version", "fits"), [("0.5.17", True), ("0.5.22", False), ("0.5.23", True)]
)
def test_seam_has_parameters_by_release(
    upstream: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    monkeypatch.setattr(compat, "sglang_version", lambda: version)
    params = {"0.5.17": ("a",), "0.5.22": ("a", "b"), "0.5.23": None}
    seam = compat.Seam("fake_upstream:Owner.add", params, "tests")
    if fits:
        seam.check()
    else:
        with pytest.raises(SeamDriftError, match=r"written for \(a, b\)"):
            seam.check()


@pytest.mark.parametrize(
    "span", [{"since": "0.5.22"}, {"until": "0.5.17"}], ids=lambda span: str(span)
)
def test_seam_of_another_release_is_not_looked_for(
    upstream: ModuleType, monkeypatch: pytest.MonkeyPatch, span: dict[str, str]
) -> None:
    monkeypatch.setattr(compat, "sglang_version", lambda: "0.5.17")
    gone = "fake_upstream:gone"
    compat.verify_seams([compat.Seam(gone, None, "tests", **span)])
    with pytest.raises(SeamDriftError, match="gone"):
        compat.verify_seams([compat.Seam(gone, None, "tests")])
