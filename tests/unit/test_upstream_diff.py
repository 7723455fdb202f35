"""What the comparison of two SGLang releases says, on small wheels."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_kvc.tools.upstream_diff import compare, report
from sglang_kvc.tools.upstream_diff.compare import Status
from sglang_kvc.tools.upstream_diff.ours import Needed, Ours
from sglang_kvc.tools.upstream_diff.release import CheckError, Release
from tests.unit.small_wheels import make_wheel, two

MODULE = "sglang/srt/managers/scheduler.py"
TARGET = "sglang.srt.managers.scheduler:Scheduler.step"


def judge(
    tmp_path: Path, old: str, new: str, allowed: tuple[tuple[str, ...], ...] = ()
) -> compare.Row:
    """What becomes of the patch on `TARGET`."""
    ours = Ours(patches=[Needed(TARGET, "patch.py", allowed)])
    releases = two(tmp_path, {MODULE: old}, {MODULE: new})
    (row,) = compare.compare_patches(*releases, ours)
    return row


STEP = """
class Scheduler:
    def step(self, batch, fast=False):
        return batch
"""
OTHER_LOOKS = '''
import os
class Scheduler:
    """Schedules."""
    def other(self): pass
    def step(self, batch: "Batch",
             fast: bool = False):
        """One step."""
        # Now.
        return (batch)
'''
INHERITED = f"{STEP.replace('Scheduler', 'Base')}\nclass Scheduler(Base): pass\n"


@pytest.mark.parametrize(
    ("new", "status"),
    [
        (STEP, Status.UNCHANGED),
        (STEP.replace("return batch", "return None"), Status.BODY),
        (STEP.replace("    def", "    @fast\n    def"), Status.BODY),
        (STEP.replace("fast=False", "fast=False, plan=None"), Status.SIGNATURE),
        (STEP.replace("batch,", "work,"), Status.SIGNATURE),
        (STEP.replace("fast=False", "fast=True"), Status.SIGNATURE),
        (STEP.replace("batch,", "batch, *,"), Status.SIGNATURE),
        (STEP.replace("def step", "def run"), Status.GONE),
        (STEP.replace("class Scheduler", "class Planner"), Status.GONE),
        ("from elsewhere import Scheduler", Status.GONE),
        ("", Status.GONE),
        (f"if True:\n{STEP}".replace("\n", "\n    "), Status.UNCHANGED),
        (INHERITED, Status.UNCHANGED),
    ],
    ids=[
        "same",
        "body",
        "decorator",
        "more_parameters",
        "renamed_parameter",
        "default",
        "kind",
        "renamed",
        "class_renamed",
        "moved_out",
        "empty",
        "in_if",
        "inherited",
    ],
)
def test_patch(tmp_path: Path, new: str, status: Status) -> None:
    known = (("self", "batch", "fast"),)
    row = judge(tmp_path, STEP, new, known)
    assert row.status is status
    assert row.status.needs_work == (status is not Status.UNCHANGED)


def test_looks_do_not_matter(tmp_path: Path) -> None:
    assert judge(tmp_path, STEP, OTHER_LOOKS).status is Status.UNCHANGED


def test_a_patch_that_is_written_for_the_new_parameters_must_only_be_read(
    tmp_path: Path,
) -> None:
    new = STEP.replace("fast=False", "fast=False, plan=None")
    both = (("self", "batch", "fast"), ("self", "batch", "fast", "plan"))
    assert judge(tmp_path, STEP, new, both).status is Status.BODY
    assert judge(tmp_path, STEP, new, both[:1]).status is Status.SIGNATURE
    assert judge(tmp_path, STEP, new).status is Status.BODY, "takes whatever comes"
    assert judge(tmp_path, "", new, both).status is Status.NEITHER
    assert judge(tmp_path, "", "").status is Status.NEITHER


@pytest.mark.parametrize(
    ("span", "status"),
    [
        ({"since": "2.0"}, Status.GONE),
        ({"until": "2.1"}, Status.GONE),
        ({"since": "2.1"}, Status.NEITHER),
        ({"until": "2.0"}, Status.NEITHER),
    ],
    ids=str,
)
def test_what_another_release_needs_is_not_judged(
    tmp_path: Path, span: dict[str, str], status: Status
) -> None:
    ours = Ours(patches=[Needed(TARGET, "patch.py", **span)])
    releases = two(tmp_path, {MODULE: STEP}, {MODULE: ""})
    (row,) = compare.compare_patches(*releases, ours)
    assert row.status is status


def test_diff_shows_what_has_changed(tmp_path: Path) -> None:
    row = judge(tmp_path, STEP, STEP.replace("return batch", "return None"))
    assert row.detail == "+1 -1 of 2 lines"
    assert row.where == "managers/scheduler.py:3"
    text = "\n".join(report.diffs([row]))
    assert "-    return batch" in text
    assert "+    return None" in text


def test_symbols_are_followed(tmp_path: Path) -> None:
    """Through re-exports, stars, relative imports, objects; classes by their fields."""
    old = {
        "sglang/srt/a.py": "from dataclasses import dataclass\nLIMIT = 1\n"
        "def f(x): return x\n@dataclass\nclass Key:\n    ids: list\n"
        "class Envs:\n    FLAG = 1\nenvs = Envs()\n",
        "sglang/srt/pkg/__init__.py": "from .inner import *\n",
        "sglang/srt/pkg/inner.py": "def g(): pass\n",
    }
    new = {
        "sglang/srt/a.py": "from sglang.srt.b import LIMIT, f, Key\n"
        "class Envs:\n    FLAG = 2\nenvs = Envs()\n",
        "sglang/srt/b.py": "LIMIT = 2\ndef f(x): return x\n@dataclass\nclass Key:\n"
        "    ids: list\n    salt: str = ''\n",
    }
    targets = ["a:LIMIT", "a:f", "a:Key", "a:envs.FLAG", "pkg:g", "pkg:inner"]
    ours = Ours(symbols=[Needed(f"sglang.srt.{target}", "x") for target in targets])
    rows = compare.compare_symbols(*two(tmp_path, old, new), ours)
    assert [row.status for row in rows] == [
        Status.BODY,
        Status.MOVED,
        Status.SIGNATURE,
        Status.BODY,
        Status.UNCHANGED,
        Status.UNCHANGED,
    ]
    assert rows[2].detail == "+salt"
    assert rows[0].detail == "-LIMIT = 1 +LIMIT = 2"


REQ = """
class ReqKvInfo:
    pass
class Req:
    def __init__(self):
        self.kv: object = None
        self.row, self.prefix = None, []
    def start(self):
        self.lock = 1
"""
NEW_REQ = """
class ReqKvInfo:
    row: int = 0
class Req:
    def __init__(self):
        self.kv = ReqKvInfo()
    def start(self):
        self.lock = 2
"""


def test_members(tmp_path: Path) -> None:
    path = "sglang/srt/managers/schedule_batch.py"
    ours = Ours(members={"Req": {"kv", "row", "prefix", "lock", "older"}})
    releases = two(tmp_path, {path: REQ}, {path: NEW_REQ})
    rows = {row.name: row for row in compare.compare_members(*releases, ours)}
    assert {name: row.status for name, row in rows.items()} == {
        "Req.kv": Status.BODY,
        "Req.row": Status.MOVED,
        "Req.prefix": Status.GONE,
        "Req.lock": Status.UNCHANGED,
        "Req.older": Status.NEITHER,
    }
    assert rows["Req.row"].detail == "now in ReqKvInfo"


def test_a_class_that_becomes_another_kind_is_seen(tmp_path: Path) -> None:
    path = "sglang/srt/server_args.py"
    old = "@dataclass\nclass ServerArgs:\n    a: int = 1\n"
    releases = two(tmp_path, {path: old}, {path: old.replace("@dataclass", "")})
    rows = compare.compare_members(*releases, Ours(config_words={"a", "words"}))
    assert [(row.name, row.status) for row in rows] == [
        ("class ServerArgs", Status.BODY),
        ("ServerArgs.a", Status.UNCHANGED),
    ]


def test_new_settings_are_listed_until_they_are_judged(tmp_path: Path) -> None:
    path = "sglang/srt/server_args.py"
    old = "class ServerArgs:\n    a: A[int, 'help'] = 1\n"
    new = {
        path: "class ServerArgs:\n    pass\n",
        "sglang/srt/arg_groups/fields/x.py": "class X(Struct):\n    _NS_PATH = 'x'\n"
        "    a: A[int, 'better help'] = 1\n    b: A[bool, ''] = False\n    c: int = 2\n"
        "    _d: int = 3\nclass Other:\n    e: int = 4\n",
    }
    releases = two(tmp_path, {path: old}, new)
    ours = Ours(words={"c"}, config_words={"a"})
    (row,) = compare.compare_new(*releases, ours)
    assert (row.name, row.detail) == ("server setting b", "False")
    (kept,) = compare.compare_members(*releases, ours)
    assert (kept.name, kept.status) == ("ServerArgs.a", Status.UNCHANGED)


def test_new_methods_of_a_base_are_listed(tmp_path: Path) -> None:
    path, target = "sglang/srt/cache.py", "sglang.srt.cache:Cache"
    old = "class Cache:\n    def put(self): pass\n    def get(self): pass\n"
    new = old.replace("get", "take") + "    def lock(self, node): pass\n"
    releases = two(tmp_path, {path: old}, {path: new})
    ours = Ours(derived={target: {"get", "lock_up", "put"}})
    rows = list(compare.compare_inherited(*releases, ours))
    assert [row.name for row in rows] == ["Cache.lock", "Cache.take"]
    gone = {row.name: row.status for row in compare.compare_members(*releases, ours)}
    assert gone == {"Cache.get": Status.GONE, "Cache.put": Status.UNCHANGED}


def test_requirements(tmp_path: Path) -> None:
    pins = (
        "Requires-Python: >=3.11\nRequires-Dist: torch==2.0\n"
        "Requires-Dist: Flashinfer_Python[cu13]==3; extra == 'x'\n"
        "Requires-Dist: flashinfer_python[cu13]==2\nRequires-Dist: timm>1\n"
    )
    wheels = (make_wheel(tmp_path, {}), make_wheel(tmp_path, {}, "2.0", pins))
    rows, others = compare.compare_pins(*map(Release, wheels))
    assert [(row.name, row.detail) for row in rows] == [
        ("flashinfer-python", "none -> ==2"),
        ("python", ">=3.10 -> >=3.11"),
        ("torch", "==1.0 -> ==2.0"),
    ]
    assert others == 1
    bare = Release(make_wheel(tmp_path, {}, "3.0", pins=""), "3.0")
    assert bare.version == "3.0"
    with pytest.raises(CheckError, match="has no METADATA"):
        compare.compare_pins(bare, bare)
