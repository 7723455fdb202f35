"""The table of ops: every op is in it, and both forms give the same on its calls."""

import ast
from pathlib import Path

import pytest
import torch

from sglang_kvc.kernels import layout
from sglang_kvc.kernels.ops import OPS, Op, outcome
from sglang_kvc.kernels.testing import Case, make_case

FOLDER = Path(layout.__file__).parent
# Its forms give the plan in different shapes; test_decode_plan.py compares them.
OWN_TEST = {"plan_decode"}

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


# Query heads a KV head, head_dim: the widest of both, and what is no power of two.
SHAPES = [(5, 80), (12, 128), (16, 64), (16, 128), (8, 256)]


def case(
    device: str, folds: list[int] | None = None, group: int = 3, head_dim: int = 32
) -> Case:
    """Three requests; the last one has a partly filled page."""
    lengths = [70, 160, 227]
    return make_case(
        lengths, folds, layers=2, group=group, head_dim=head_dim, device=device
    )


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
@each_op
@pytest.mark.parametrize(("group", "head_dim"), SHAPES)
def test_kernel_equals_reference_for_every_shape(
    op: Op, group: int, head_dim: int, device: str
) -> None:
    compare(op, case(device, [0, 144, 96], group, head_dim))


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
