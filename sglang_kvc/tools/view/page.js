"use strict";
(() => {
  const CHUNK = 200, LONGEST_CHUNK = 400, PAGE = 100;
  const byId = (id) => document.getElementById(id);
  const { tokens, levels, series } = JSON.parse(byId("data").textContent);
  const text = byId("text"), readout = byId("readout");
  const maps = document.querySelectorAll("[data-series]");
  const spans = [];
  const chosen = () => Number(document.querySelector("input:checked").value);
  let shown = chosen(), at = 0;

  // Chunks end with a line where they can; those out of sight are not laid out.
  let chunk = null;
  tokens.forEach((token, i) => {
    const full = chunk && chunk.childElementCount;
    const broken = i > 0 && tokens[i - 1].endsWith("\n");
    if (!chunk || full >= LONGEST_CHUNK || (full >= CHUNK && broken)) {
      chunk = document.createElement("div");
      chunk.className = "chunk";
      text.append(chunk);
    }
    const span = document.createElement("span");
    span.textContent = token.replaceAll("\n", "↵\n");
    span.place = i;
    spans.push(span);
    chunk.append(span);
  });

  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  function paint() {
    const { shares } = series[shown];
    spans.forEach((span, i) => {
      const share = shares[i];
      const level = levels.findIndex((end) => share <= end);
      span.className = `l${level < 0 ? levels.length - 1 : level}`;
    });
    maps.forEach((map) => { map.hidden = Number(map.dataset.series) !== shown; });
  }

  function tell(i) {
    const held = series.map((one) => `${one.name}: ${percent(one.shares[i])}`);
    const word = JSON.stringify(tokens[i]);
    readout.textContent =
      `Token ${(i + 1).toLocaleString("en")} of ${tokens.length.toLocaleString("en")}, ` +
      `${word}, held by ${held.join(", ")}`;
  }

  function go(i) {
    spans[at].classList.remove("at");
    at = Math.min(Math.max(i, 0), spans.length - 1);
    spans[at].classList.add("at");
    spans[at].scrollIntoView({ block: "nearest" });
    tell(at);
  }

  // The token in the line above or below that stands closest.
  function line(step) {
    const from = spans[at].getBoundingClientRect();
    let best = at, height = null;
    for (let i = at + step; i >= 0 && i < spans.length; i += step) {
      const box = spans[i].getBoundingClientRect();
      if ((box.top - from.top) * step < from.height / 2) continue;
      height ??= box.top;
      if (Math.abs(box.top - height) > from.height / 2) break;
      const near = spans[best].getBoundingClientRect();
      if (best === at || Math.abs(box.left - from.left) < Math.abs(near.left - from.left)) {
        best = i;
      }
    }
    return best;
  }

  const moves = {
    ArrowRight: () => at + 1,
    ArrowLeft: () => at - 1,
    ArrowDown: () => line(1),
    ArrowUp: () => line(-1),
    PageDown: () => at + PAGE,
    PageUp: () => at - PAGE,
    Home: () => 0,
    End: () => spans.length - 1,
  };
  text.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(move());
  });
  text.addEventListener("focus", () => { if (!text.matches(":active")) go(at); });
  text.addEventListener("blur", () => spans[at].classList.remove("at"));
  text.addEventListener("pointerover", (event) => {
    if (event.target.place !== undefined) tell(event.target.place);
  });
  text.addEventListener("click", (event) => {
    if (event.target.place !== undefined) go(event.target.place);
  });

  byId("choices").addEventListener("change", () => {
    shown = chosen();
    paint();
  });

  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = byId("theme"), root = document.documentElement.style;
  const isDark = () => (root.colorScheme ? root.colorScheme === "dark" : system.matches);
  const press = () => theme.setAttribute("aria-pressed", String(isDark()));
  press();
  system.addEventListener("change", press);
  theme.addEventListener("click", () => {
    root.colorScheme = isDark() ? "light" : "dark";
    press();
  });

  paint();
})();
