"use strict";
// Values under the pointer for every chart, and search, filter, order and token colours for the samples.
// Data come from attributes and text nodes alone; nothing here makes HTML out of strings.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (name, text, parent) => {
    const node = document.createElement(name);
    node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const short = (value) => Number(value.toPrecision(4)).toLocaleString("en");

  // ------------------------------------------------------------------------------------------------------- charts
  for (const chart of all("svg.chart")) {
    const lines = JSON.parse(chart.dataset.lines);
    const [start, end, , , left, right, top, bottom] = JSON.parse(chart.dataset.scale);
    let box, rule;
    const clear = () => { box?.remove(); rule?.remove(); };
    chart.addEventListener("pointerleave", clear);
    chart.addEventListener("pointermove", (event) => {
      clear();
      const shape = chart.getBoundingClientRect();
      const unit = shape.width / chart.viewBox.baseVal.width;
      const wanted = start + ((event.clientX - shape.left) / unit - left) / (right - left) * (end - start);
      const nearest = (xs) => xs.reduce((best, x, i) => Math.abs(x - wanted) < Math.abs(xs[best] - wanted) ? i : best, 0);
      const step = lines[0][2][nearest(lines[0][2])];
      const at = left + (step - start) / (end - start) * (right - left);
      rule = document.createElementNS("http://www.w3.org/2000/svg", "line");
      rule.setAttribute("class", "pointer");
      for (const [name, value] of [["x1", at], ["x2", at], ["y1", top], ["y2", bottom]]) rule.setAttribute(name, value);
      chart.append(rule);
      box = make("div", "", chart.parentElement);
      box.className = "tip-box";
      make("div", `${chart.dataset.x} ${short(step)}`, box);
      for (const [label, kind, xs, ys] of lines) {
        const i = nearest(xs);
        const note = Math.abs(xs[i] - step) > (end - start) / 100 ? ` (at ${short(xs[i])})` : "";
        make("div", `${label}: ${short(ys[i])}${note}`, box).className = kind;
      }
      const room = chart.parentElement.clientWidth - box.offsetWidth;
      box.style.left = `${Math.max(0, Math.min(room, at * unit + (at * unit > room - 12 ? -box.offsetWidth - 12 : 12)))}px`;
      box.style.top = `${shape.bottom - chart.parentElement.getBoundingClientRect().top}px`;
    });
  }

  // ------------------------------------------------------------------------------------------------------ samples
  const controls = document.querySelector(".controls");
  if (!controls) return;
  const field = Object.fromEntries(all("[id]", controls).map((node) => [node.id, node]));
  const groups = all(".group");
  const PAGE = 20;
  let heat = "", shown = PAGE;
  const more = make("button", "show more");
  more.type = "button";
  more.className = "more";
  groups.forEach((group) => all("article", group).forEach((article, place) => { article.place = place; }));

  const group = () => groups[Number(field.group.value)];
  const side = (article, label) => all(".side", article).find((node) => node.dataset.label === label);
  const number = (node, name) => node && node.dataset[name] !== "" ? Number(node.dataset[name]) : NaN;
  const words = (article) => article.words ??= article.textContent.toLowerCase();
  const orders = {
    gain: (pair) => number(pair.left, "score") - number(pair.right, "score"),
    loss: (pair) => number(pair.right, "score") - number(pair.left, "score"),
    high: (pair) => -number(pair.right, "score"),
    low: (pair) => number(pair.right, "score"),
    kl: (pair) => -number(pair.right, "kl"),
  };

  function choose() {
    const labels = JSON.parse(group().dataset.labels);
    for (const [select, index] of [[field.left, 0], [field.right, labels.length - 1]]) {
      select.replaceChildren();
      labels.forEach((label) => make("option", label, select).value = label);
      select.selectedIndex = index;
    }
    field["score-name"].textContent = group().dataset.score;
    const coloured = group().querySelector("[data-token-kl]") !== null;
    all("button", controls).forEach((button) => { button.disabled = !coloured && button.dataset.heat !== ""; });
    groups.forEach((node) => { node.hidden = node !== group(); });
    paint(coloured ? heat : "");
  }

  function update() {
    const wanted = field.search.value.trim().toLowerCase();
    const least = field.least.value === "" ? -Infinity : Number(field.least.value);
    const most = field.most.value === "" ? Infinity : Number(field.most.value);
    const list = group().querySelector(".list");
    let pairs = all("article", list).map((article) => ({
      article, left: side(article, field.left.value), right: side(article, field.right.value),
    }));
    const total = pairs.length;
    for (const { article, left, right } of pairs) {
      article.hidden = true;
      all(".side", article).forEach((node) => { node.hidden = node !== left && node !== right; });
    }
    const visible = (pair) => [pair.article.querySelector(".prompt"), pair.left, pair.right]
      .map((node) => node ? (node.querySelector(".response") ?? node).textContent : "").join("\n").toLowerCase();
    pairs = pairs.filter((pair) => {
      const score = number(pair.right, "score");
      const inside = Number.isNaN(score) ? least === -Infinity && most === Infinity : score >= least && score <= most;
      return inside && (wanted === "" || words(pair.article).includes(wanted) && visible(pair).includes(wanted));
    });
    const key = orders[field.order.value] ?? ((pair) => pair.article.place);
    const rank = (pair) => { const value = key(pair); return Number.isNaN(value) ? Infinity : value; };
    pairs.sort((a, b) => rank(a) - rank(b) || a.article.place - b.article.place);
    pairs.forEach(({ article }, place) => { article.hidden = place >= shown; list.append(article); });
    field.count.textContent = `${pairs.length} of ${total} prompts`;
    more.hidden = pairs.length <= shown;
    list.after(more);
  }

  const values = (response, name) => (response.cache ??= {})[name] ??=
    JSON.parse(response.dataset[name] ?? "[]").map((value) => value ?? NaN);
  const camel = (name) => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase());

  // Blue below zero, orange above it; full colour at the 90th percentile of the sizes, so that one score does not
  // hide all the rest.
  function paint(name) {
    const responses = all(".response", group());
    const key = camel(name);
    const sizes = name ? responses.flatMap((r) => values(r, key)).filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b) : [];
    const full = sizes[Math.floor(0.9 * (sizes.length - 1))] || sizes.at(-1) || 1;
    const colour = (value) => {
      const strength = Math.min(1, Math.abs(value) / full) * 0.75;
      return value < 0 ? `rgba(0, 114, 178, ${strength})` : `rgba(230, 120, 0, ${strength})`;
    };
    for (const response of responses) {
      const numbers = name ? values(response, key) : [];
      [...response.children].forEach((token, i) => {
        token.style.backgroundColor = Number.isFinite(numbers[i]) ? colour(numbers[i]) : "";
      });
    }
    all("button[data-heat]", controls).forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.heat === name)));
    field.scale.replaceChildren();
    if (name) {
      field.scale.append(`-${short(full)}`);
      const ramp = make("span", "", field.scale);
      ramp.className = "ramp";
      ramp.style.background = `linear-gradient(90deg, ${colour(-full)}, transparent, ${colour(full)})`;
      field.scale.append(`+${short(full)}`);
    }
  }

  controls.parentElement.addEventListener("pointerover", (event) => {
    const token = event.target;
    if (token.tagName !== "I" || token.title) return;
    const response = token.parentElement, i = [...response.children].indexOf(token);
    const parts = [["reward", "tokenReward"], ["KL", "tokenKl"], ["value", "tokenValue"]]
      .filter(([, key]) => Number.isFinite(values(response, key)[i])).map(([name, key]) => `${name} ${values(response, key)[i]}`);
    token.title = parts.join("   ");
  });
  const again = () => { shown = PAGE; update(); };
  for (const id of ["search", "least", "most"]) field[id].addEventListener("input", again);
  for (const id of ["left", "right", "order"]) field[id].addEventListener("change", again);
  field.group.addEventListener("change", () => { choose(); again(); });
  more.addEventListener("click", () => { shown += PAGE; update(); });
  all("button[data-heat]", controls).forEach((button) => button.addEventListener("click", () => {
    heat = button.dataset.heat;
    paint(heat);
  }));
  controls.hidden = false;
  heat = groups[0].querySelector("[data-token-kl]") ? "token_kl" : "";
  choose();
  update();
})();
