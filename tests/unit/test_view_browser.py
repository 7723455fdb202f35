"""The page of `tools.view` in Chromium: scripts, keyboard, contrast, many tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_kvc.tools.view.page import View, render
from tests.unit.browser import Browser, running
from tests.unit.test_view import HOSTILE, answer, view

LEAST_CONTRAST = 4.5
MANY, MANY_S = 30_000, 30
CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d");
  const channels = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].reduce((sum, value, i) => {
    const s = value / 255;
    const part = s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
    return sum + part * [0.2126, 0.7152, 0.0722][i];
  }, 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = channels(getComputedStyle(node).backgroundColor);
      if (color[3] === 255) return color;
    }
    throw new Error("nothing behind");
  };
  const found = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((it) => it.nodeType === 3 && it.data.trim());
    if (!own || node.tagName === "SCRIPT") continue;
    const style = getComputedStyle(node);
    const ink = node.closest("svg") ? style.fill : style.color;
    const pair = [light(channels(ink)), light(behind(node))].sort((a, b) => b - a);
    const name = `${node.tagName} ${node.className.baseVal ?? node.className}`;
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    found[name] = Math.min(found[name] ?? 99, contrast);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Browser]:
    """A small page with every colour, whose texts are hostile."""
    browser.prefer("light")
    path = tmp_path / "view.html"
    path.write_text(render(view()), encoding="utf-8")
    browser.errors.clear()
    browser.open(path)
    yield browser
    assert not browser.errors


def readout(browser: Browser) -> str:
    text: str = browser.value("document.getElementById('readout').textContent")
    return text


def test_texts_are_shown_and_nothing_in_them_runs(page: Browser) -> None:
    shown = page.value("document.getElementById('text').textContent")
    assert "".join(shown.split("↵")) == "".join(view().tokens)
    assert HOSTILE in page.value("document.querySelector('.answers').textContent")
    assert page.value("window.hacked === undefined")
    assert page.value("document.querySelectorAll('img, iframe').length") == 0


def test_a_script_that_slipped_in_would_not_run(page: Browser) -> None:
    """The page names the one script that may run."""
    added = (
        "const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
        "document.body.append(s); window.bad === undefined"
    )
    assert page.value(added)
    # The refusal is in the log.
    assert page.errors
    page.errors.clear()


def test_tokens_are_reached_by_keyboard(page: Browser) -> None:
    last = len(view().tokens)
    for _ in range(10):
        page.press("Tab")
        if page.value("document.activeElement.id") == "text":
            break
    assert readout(page).startswith(f"Token 1 of {last}")
    page.press("ArrowRight")
    assert readout(page).startswith(f"Token 2 of {last}")
    assert "Rate 2: 5.0 %, Rate 8: 0.0 %" in readout(page)
    page.press("ArrowDown")
    below = int(readout(page).split()[1])
    assert below > 2
    page.press("ArrowUp")
    assert int(readout(page).split()[1]) < below
    page.press("End")
    assert readout(page).startswith(f"Token {last} of {last}")
    page.press("ArrowRight")
    assert readout(page).startswith(f"Token {last} of {last}")
    page.press("PageUp")
    page.press("Home")
    assert readout(page).startswith("Token 1 of")
    assert page.value("document.querySelectorAll('.at').length") == 1


def test_what_is_shown_is_chosen_by_keyboard(page: Browser) -> None:
    classes = "document.querySelector('.chunk').children[1].className"
    hidden = "[...document.querySelectorAll('[data-series]')].map((it) => it.hidden)"
    assert page.value(classes) == "l0"
    assert page.value(hidden) == [True, False]
    page.value("document.querySelector('input:checked').focus()")
    page.press("ArrowLeft")
    assert page.value(classes) == "l1"
    assert page.value(hidden) == [False, True]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("toggled", [False, True])
def test_every_text_has_contrast(page: Browser, scheme: str, toggled: bool) -> None:
    """Whether the theme is the system's or was chosen against it."""
    page.prefer(scheme)
    dark = scheme == "dark"
    if toggled:
        page.value("document.getElementById('theme').focus()")
        page.press("Enter")
        dark = not dark
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    pressed = "document.getElementById('theme').getAttribute('aria-pressed')"
    # A change of the system's setting is told with the next frame.
    page.value("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    assert page.value(pressed) == str(dark).lower()
    found = page.value(CONTRASTS)
    assert {f"{tag} l{i}" for tag in ("LI", "SPAN") for i in range(2, 9)} <= set(found)
    assert {"MARK ", "SPAN after", "TD l8", "text "} <= set(found)
    poor = {name: c for name, c in found.items() if c < LEAST_CONTRAST}
    assert not poor


def test_many_tokens_stay_smooth(browser: Browser, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [rng.choice((" the", " pool", ", ", " of", ".\n")) for _ in range(MANY)]
    answers = [
        answer(rate, [round(rng.random() ** 3, 3) for _ in words])
        for rate in (None, 2, 8)
    ]
    path = tmp_path / "many.html"
    path.write_text(render(View("m", "p.txt", words, answers)), encoding="utf-8")
    assert path.stat().st_size < 1_500_000
    browser.errors.clear()
    started = time.monotonic()
    browser.open(path)
    assert browser.value("document.querySelectorAll('#text span').length") == MANY
    assert time.monotonic() - started < MANY_S
    stops = "document.querySelectorAll('[tabindex], input, button, a').length"
    assert browser.value(stops) < 20
    browser.value("document.getElementById('text').focus()")
    started = time.monotonic()
    for key in ("End", "ArrowUp", "Home", "PageDown", "ArrowDown"):
        browser.press(key)
    browser.value("document.querySelector('input').click()")
    browser.value("new Promise((done) => requestAnimationFrame(done))")
    assert time.monotonic() - started < MANY_S
    assert readout(browser).startswith("Token 1")
    assert not browser.errors
