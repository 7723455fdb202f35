"""The client gets one dict of ours, whatever SGLang does with lists per token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang_kvc.patches import tokenizer_manager__accumulate_request_meta_info as patch


def stock(meta_info: Any, state: Any, key: str, values: list[Any]) -> None:
    """What SGLang 0.5.19 and later do."""
    accumulated = state.customized_info_accumulated.setdefault(key, [])
    accumulated.extend(values)
    meta_info[key] = accumulated


def messages(key: str, *all_values: list[Any]) -> list[dict[str, Any]]:
    """The meta_info of each message of one request."""
    state = SimpleNamespace(customized_info_accumulated={})
    found: list[dict[str, Any]] = []
    for values in all_values:
        found.append({})
        patch.hook(stock, found[-1], state, key, values)
    return found


def test_the_newest_summary_is_shown_as_a_dict() -> None:
    one, two = {"passes": 1}, {"passes": 2}
    shown = messages("kv_compress", [one], [two], [None], [])
    assert [info["kv_compress"] for info in shown] == [one, two, two, two]


def test_nothing_is_shown_before_the_first_summary() -> None:
    assert messages("kv_compress", [None], []) == [{}, {}]


def test_lists_of_others_are_left_to_sglang() -> None:
    assert messages("theirs", [1], [2])[-1] == {"theirs": [1, 2]}
