"""The table of ops: every op is in it, and both forms give the same on its calls."""

import ast
from pathlib import Path

import pytest
import torch

from sglang_kvc.kernels import layout
from sglang_kvc.kernels.layout import Arena
from sglang_kvc.kernels.ops import OPS, Op, outcome
from sglang_kvc.kernels.testing import Case, make_case
from tests.kernels.touch_kv import TOUCH_KV

FOLDER = Path(layout.__file__).parent
# Its forms give the plan in different shapes; test_decode_plan.py compares them.
OWN_TEST = {"plan_decode"}

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_of_kv = pytest.mark.parametrize(
    "op", [op for op in OPS if op.name in TOUCH_KV], ids=lambda op: op.name
)


# Query heads a KV head, head_dim: the widest of both, and what is no power of two.
SHAPES = [(5, 80), (12, 128), (16, 64), (16, 128), (8, 256)]


def case(device: str, folds: list[int] | None = None) -> Case:
    """Three requests; the last one has a partly filled page."""
    lengths = [70, 160, 227]
    return make_case(lengths, folds, layers=2, group=3, head_dim=32, device=device)


def test_every_op_with_a_kernel_is_listed() -> None:
    found = {
        node.name.removesuffix("_triton")
        for path in FOLDER.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_triton")
    } - {"use"}
    assert found - OWN_TEST == {op.name for op in OPS}
    for op in OPS:
        assert op.kernel.__name__ == f"{op.name}_triton"
        assert op.reference.__name__ == f"{op.name}_ref"


@pytest.mark.interpreter
@each_op
@pytest.mark.parametrize("folds", [None, [0, 144, 96]], ids=["new", "packed"])
def test_kernel_equals_reference(op: Op, folds: list[int] | None, device: str) -> None:
    compare(op, case(device, folds))


@pytest.mark.interpreter
@each_of_kv
@pytest.mark.parametrize(("group", "head_dim"), SHAPES)
def test_kernel_equals_reference_for_every_shape(
    op: Op, group: int, head_dim: int, device: str
) -> None:
    """Of K and V; two requests of two tiles and more, one layer."""
    shape = {"layers": 1, "group": group, "head_dim": head_dim}
    compare(op, make_case([70, 131], [0, 96], **shape, device=device))


@each_op
def test_who_touches_keys_and_values(op: Op) -> None:
    """The others give the same whatever keys and values are, and leave them as such."""
    touched = False
    for call in op.make_calls(case("cpu", [0, 144, 96])):
        args = [redrawn(arg) if isinstance(arg, Arena) else arg for arg in call.args]
        before = [part for arg in args if isinstance(arg, Arena) for part in arg[:2]]
        one = outcome(op.reference, call)
        other = outcome(op.reference, call._replace(args=tuple(args)))
        for mine, theirs in zip(one, other, strict=True):
            like = [part for part in before if part.shape == theirs.shape] or [mine]
            touched |= not any(torch.equal(part, theirs) for part in like)
    assert touched == (op.name in TOUCH_KV)


def redrawn(arena: Arena) -> Arena:
    """The same with other keys and values."""
    k, v = (torch.rand_like(part) for part in arena[:2])
    return arena._replace(k=k, v=v)


def compare(op: Op, made: Case) -> None:
    """Both forms leave the same, within what the op allows."""
    calls = list(op.make_calls(made))
    assert calls
    for call in calls:
        ours, theirs = outcome(op.kernel, call), outcome(op.reference, call)
        for mine, other in zip(ours, theirs, strict=True):
            close = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
            if op.tolerance and other.is_floating_point():
                largest = other[other.isfinite()].abs().max()
                close["atol"] = op.tolerance * float(largest)
            torch.testing.assert_close(mine, other, **close)


@each_op
@pytest.mark.parametrize("use_triton", [False, True])
def test_the_wrapper_takes_the_form_it_is_told(
    op: Op, use_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for form in (op.kernel, op.reference):
        name = form.__name__
        monkeypatch.setattr(op.module, name, lambda *a, _=name, **k: ran.append(_))
    monkeypatch.setattr(op.module, "use_triton", lambda tensor: use_triton)
    for args, settings in op.make_calls(case("cpu")):
        op.run(*args, **settings)
    expected = op.kernel if use_triton else op.reference
    assert set(ran) == {expected.__name__}
