"""bench.quality's runs by name."""

from __future__ import annotations

import pytest

from bench.quality.__main__ import main, parse
from bench.quality.presets import (
    FACTORS,
    REPORTED_SEED,
    RUNS,
    TUNE,
    TUNING_SEED,
    shipped,
)
from bench.quality.systems import MIN_BUDGET, parse_setting, parse_system, parse_systems
from bench.quality.tasks import resolve
from sglang_kvc.config.options import SWITCH, KVCompressOptions


@pytest.mark.parametrize("name", RUNS)
def test_every_engine_of_a_preset_would_start(name: str) -> None:
    preset = RUNS[name]
    assert resolve(preset.tasks)
    assert [parse_setting(word) for word in preset.rates]
    systems = parse_systems(preset.systems)
    assert len(systems) == len(preset.systems)
    for system in systems:
        if system.kind == "ours":
            keywords = system.keywords()
            assert keywords.pop(SWITCH) is True
            KVCompressOptions(
                **{k.removeprefix(f"{SWITCH}_"): v for k, v in keywords.items()}
            )
    tunes = name.startswith(TUNE)
    assert preset.seed == (TUNING_SEED if tunes else REPORTED_SEED)


def test_tuning_changes_one_option_at_a_time() -> None:
    assert TUNING_SEED % 2 != REPORTED_SEED % 2
    for name, (option, values) in FACTORS.items():
        first, *others = parse_systems(RUNS[f"{TUNE}-{name}"].systems)
        assert first.options == ()
        found = [dict(system.options) for system in others]
        assert all(list(options) == [option] for options in found)
        # The defaults are one of the values, so all values are compared.
        got = {shipped(option), *(options[option] for options in found)}
        assert got == set(values)
    every = {s for name in FACTORS for s in RUNS[f"{TUNE}-{name}"].systems}
    every |= {s for s in RUNS[f"{TUNE}-long-passes"].systems}
    assert set(RUNS[TUNE].systems) == every


def test_tables_have_all_tasks() -> None:
    """Long answers and conversations have tables of their own."""
    others = {
        task
        for name in ("long", "long-replay", "chain", "sessions")
        for task in resolve(RUNS[name].tasks)
    }
    for name in ("table", "table-kvpress"):
        assert set(resolve(RUNS[name].tasks)) | others == set(resolve(["all"]))
    for name in ("sessions", "sessions-kvpress"):
        assert RUNS[name].tasks == ("sessions",)


def test_shares_of_an_answer_have_settings_without_them_around() -> None:
    """So that both are compared where they keep equally many tokens."""
    for name in ("long", "chain"):
        found = [parse_setting(word) for word in RUNS[name].rates]
        assert [one.label for one in found] == list(RUNS[name].rates)
        assert any(one.answer for one in found)
        plain = [one for one in found if not one.answer]
        assert len(plain) >= 5 and plain[0].is_full


def test_a_delay_is_an_option_of_a_system() -> None:
    systems = parse_systems(RUNS["tune-delay-long"].systems)
    asked = [one.keywords().get("kv_compress_delay") for one in systems]
    assert asked == [None, 16, 32, 32]
    assert systems[3].keywords()["kv_compress_window"] == 64


def test_flags_win_over_a_preset() -> None:
    words = ["run", "--model", "m", "--preset", "tune-windows"]
    args = parse(words)
    assert args.systems == list(RUNS["tune-windows"].systems)
    assert (args.seed, args.samples, args.rates) == (1, 20, ["1", "4", "8"])
    args = parse([*words, "--samples", "5", "--rates", "2"])
    assert (args.seed, args.samples, args.rates) == (1, 5, ["2"])
    assert parse(words[:3]).seed == 0
    with pytest.raises(SystemExit):
        parse([*words[:3], "--preset", "nonsense"])


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "  tune-windows: ours ours:window=16 ours:window=64" in said


def test_the_least_budget_holds_what_no_head_may_lose() -> None:
    def least(word: str) -> int:
        value: int = parse_system(word).keywords()["kv_compress_min_budget"]
        return value

    assert least("ours") == MIN_BUDGET
    assert least("ours:protected=64") == 80
    assert least("ours:head_floor=128") == 128
    assert least("ours:head_floor=128,min_budget=256") == 256
