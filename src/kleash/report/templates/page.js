"use strict";
// Everything shown here comes from models and prompts. It becomes text nodes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const byId = (id) => document.getElementById(id);
  const named = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };
  const num = (value) => (typeof value === "string" ? named[value] : value);

  function make(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function number(value) {
    value = num(value);
    if (value === null || value === undefined) return "—";
    if (Number.isNaN(value)) return "NaN";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    let text;
    if (size === 0) text = "0";
    else if (size >= 1e7 || size < 1e-3) text = value.toExponential(1);
    else if (size >= 1000) text = Math.round(value).toLocaleString("en");
    else text = value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
    return text.replace(/-/g, "−");
  }

  // Controls, direction marks and lone surrogates would not show, or would mislead.
  const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

  function addText(node, text) {
    let from = 0;
    for (const match of text.matchAll(hidden)) {
      node.append(text.slice(from, match.index));
      const code = match[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(make("span", { class: "esc" }, "U+" + code));
      from = match.index + 1;
    }
    node.append(text.slice(from));
    return node;
  }
  const bdi = (text) => addText(make("bdi"), text);
  // Never cut a pair of surrogates in two: half a character would show as an escape.
  function shorten(text, length) {
    if (text.length <= length) return text;
    const paired = /[\ud800-\udbff]/.test(text[length - 1]);
    return text.slice(0, length - (paired ? 1 : 0)) + "…";
  }

  // ---- the tip: one box for charts, tokens and definitions -------------------------------------
  function showTip(content, box) {
    tip.replaceChildren(...content);
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left), window.innerWidth - width - 8);
    const below = box.bottom + 10;
    const top = below + height < window.innerHeight ? below : Math.max(8, box.top - height - 10);
    tip.style.left = left + "px";
    tip.style.top = top + "px";
  }
  const hideTip = () => { tip.hidden = true; };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  window.addEventListener("scroll", hideTip, { passive: true });

  function tipTable(rows) {
    const table = make("table");
    for (const [name, value, swatch] of rows) {
      const cell = make("td");
      if (swatch) cell.append(make("span", { class: "swatch " + swatch }));
      cell.append(name);
      table.append(make("tr", {}, cell, make("td", {}, value)));
    }
    return table;
  }

  // ---- definitions -----------------------------------------------------------------------------
  for (const link of document.querySelectorAll("a.what")) {
    const show = () => {
      const entry = byId(link.dataset.def);
      const part = (name) => entry.querySelector(name).textContent;
      showTip([
        make("div", { class: "head" }, part(".title")),
        make("div", {}, part(".meaning")),
        make("div", { class: "formula" }, part(".formula")),
        ...[...entry.querySelectorAll(".facts span:not(.formula)")].map((fact) =>
          make("div", { class: "quiet-text" }, fact.textContent)),
      ], link.getBoundingClientRect());
    };
    link.addEventListener("pointerenter", show);
    link.addEventListener("focus", show);
    link.addEventListener("click", () => { byId(link.dataset.def).closest("details").open = true; });
    link.addEventListener("pointerleave", hideTip);
    link.addEventListener("blur", hideTip);
  }

  // ---- charts ----------------------------------------------------------------------------------
  const [left, right, width] = data.area;
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = data.charts[Number(svg.dataset.chart)];
    const cursor = svg.querySelector(".cursor");
    const all = [...chart.series.flatMap((one) => one.points), ...chart.marks];
    const places = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
    const [low, high] = chart.domain;
    let at = -1;
    const read = (index) => {
      at = Math.min(Math.max(index, 0), places.length - 1);
      const x = places[at];
      const across = left + ((x - low) / (high - low)) * (right - left);
      cursor.setAttribute("x1", across);
      cursor.setAttribute("x2", across);
      cursor.setAttribute("visibility", "visible");
      const rows = [];
      for (const one of chart.series) {
        const point = one.points.find((p) => p[0] === x);
        if (!point) continue;
        const error = point[2] === null ? "" : " ± " + number(point[2]);
        rows.push([bdi(one.name), number(point[1]) + error, `${one.style} c${one.colour % 6}`]);
      }
      const box = svg.getBoundingClientRect();
      const here = box.left + (across / width) * box.width;
      showTip([
        make("div", { class: "head" }, `${chart.x.split(",")[0]} ${Number.isInteger(x) ? x : number(x)}`),
        tipTable(rows),
        make("div", { class: "quiet-text" }, rows.length ? chart.unit : ""),
        ...chart.marks.filter((mark) => mark[0] === x).map(([, kind, text]) =>
          make("div", {}, make("b", {}, kind), ": ", bdi(shorten(text, 260)))),
      ], { left: here + 12, top: box.top, bottom: box.top + box.height * 0.1 });
    };
    const leave = () => { cursor.setAttribute("visibility", "hidden"); at = -1; hideTip(); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const across = ((event.clientX - box.left) / box.width) * width;
      const x = low + ((across - left) / (right - left)) * (high - low);
      let best = 0;
      for (let i = 1; i < places.length; i += 1) {
        if (Math.abs(places[i] - x) < Math.abs(places[best] - x)) best = i;
      }
      if (best !== at || tip.hidden) read(best);
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: at + 1, ArrowLeft: at < 0 ? places.length - 1 : at - 1,
        Home: 0, End: places.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      read(moves[event.key]);
    });
  }

  // ---- responses -------------------------------------------------------------------------------
  const samples = data.samples;
  const several = data.runs.length > 1;
  const has = (name) => samples.some((sample) => sample[name] !== null);
  const voices = { policy: "Policy", reference: "Reference", text: "Text", given: "Response" };
  const kinds = { worst: "worst", random: "random", heldout: "held out" };

  function heatClass(kl) {
    if (kl === undefined) return "t";
    if (Number.isNaN(kl)) return "t hx";
    return "t h" + data.levels.filter((bound) => kl >= bound).length;
  }

  function tokenTip(sample, index) {
    const text = shorten(sample.tokens[index], 120).replace(/\n/g, "⏎").replace(/\t/g, "⇥");
    const head = make("div", { class: "head" }, "“", bdi(text), "”");
    const rows = [];
    const both = (name, list) => {
      if (!list.length) return;
      const value = num(list[index]);
      rows.push([name, `${number(value)} (${number(100 * Math.exp(value))} %)`]);
    };
    if (sample.token_kl.length) rows.push(["KL", number(sample.token_kl[index]) + " nats"]);
    if (sample.other_kl) rows.push(["KL, other direction", number(sample.other_kl[index]) + " nats"]);
    both("log π, policy", sample.logprobs);
    both("log π, reference", sample.ref_logprobs);
    if (sample.entropy.length) rows.push(["entropy", number(sample.entropy[index]) + " nats"]);
    if (sample.ref_entropy) rows.push(["entropy, reference", number(sample.ref_entropy[index]) + " nats"]);
    const where = `token ${index + 1} of ${sample.tokens.length + sample.tokens_cut}`;
    const tops = sample.policy_top[index] ? [topTable(sample, index)] : [];
    return [head, tipTable(rows), ...tops, make("div", { class: "quiet-text" }, where)];
  }

  // What each model found likeliest there, side by side.
  function topTable(sample, index) {
    const table = make("table", { class: "tops" },
      make("tr", {}, make("th", {}, "policy wanted"), make("th", {}, "reference wanted")));
    const [ours, theirs] = [sample.policy_top[index], sample.reference_top[index]];
    const cell = ([ids, probabilities], rank) => rank < ids.length
      ? make("td", {}, bdi(shorten(data.words[ids[rank]] ?? String(ids[rank]), 16).replace(/\n/g, "⏎").replace(/ /g, "␣")),
        ` ${number(100 * probabilities[rank])} %`)
      : make("td");
    for (let rank = 0; rank < Math.max(ours[0].length, theirs[0].length); rank += 1) {
      table.append(make("tr", {}, cell(ours, rank), cell(theirs, rank)));
    }
    return table;
  }

  function heat(sample) {
    const box = make("div", { class: "heat", dir: "auto" });
    if (!sample.tokens.length) return addText(box, sample.response);
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `Tokens of the ${sample.who}’s response; arrow keys move`);
    const spans = sample.tokens.map((token, index) => {
      const span = make("span", {
        class: heatClass(num(sample.token_kl[index])), tabindex: index ? "-1" : "0",
      });
      return addText(span, token);
    });
    box.append(...spans);
    const indexOf = (target) => spans.indexOf(target.closest(".t"));
    const show = (event) => {
      const index = indexOf(event.target);
      if (index < 0) return;
      const boxes = spans[index].getClientRects();
      showTip(tokenTip(sample, index), boxes[0] || spans[index].getBoundingClientRect());
    };
    box.addEventListener("pointerover", show);
    box.addEventListener("focusin", show);
    box.addEventListener("pointerleave", hideTip);
    box.addEventListener("focusout", hideTip);
    box.addEventListener("keydown", (event) => {
      const from = indexOf(event.target);
      const moves = { ArrowRight: from + 1, ArrowDown: from + 1, ArrowLeft: from - 1,
        ArrowUp: from - 1, Home: 0, End: spans.length - 1 };
      if (from < 0 || !(event.key in moves)) return;
      event.preventDefault();
      const next = Math.min(Math.max(moves[event.key], 0), spans.length - 1);
      spans[from].tabIndex = -1;
      spans[next].tabIndex = 0;
      spans[next].focus();
    });
    if (sample.tokens_cut) {
      box.append(make("span", { class: "cut" }, ` … ${sample.tokens_cut} more tokens were not kept`));
    }
    return box;
  }

  function voice(sample) {
    const head = make("header", {}, make("b", {}, voices[sample.who]));
    const add = (text) => head.append(make("span", {}, text));
    if (sample.score !== null) add("score " + number(sample.score));
    if (sample.gold !== null) add("gold " + number(sample.gold));
    if (sample.kl !== null) add("KL " + number(sample.kl) + " nats");
    if (sample.step !== null) add("step " + sample.step);
    if (several) head.append(bdi(data.runs[sample.run]));
    return make("div", { class: "voice" }, head, heat(sample));
  }

  // The reference is frozen: what it once wrote to a prompt stays its answer at any step.
  const references = new Map();
  const key = (sample) => JSON.stringify([sample.run, sample.prompt]);
  for (const sample of samples) {
    if (sample.who !== "reference") continue;
    if (!references.has(key(sample))) references.set(key(sample), []);
    references.get(key(sample)).push(sample);
  }
  function referenceOf(sample) {
    const found = references.get(key(sample)) || [];
    return found.find((one) => one.step === sample.step) || found[0];
  }

  function sideBySide(sample) {
    const box = make("div", {}, addText(make("p", { class: "prompt", dir: "auto" }), sample.prompt));
    const columns = make("div", { class: "columns" });
    const reference = sample.who === "policy" ? referenceOf(sample) : null;
    if (reference) columns.append(voice(reference));
    columns.append(voice(sample));
    box.append(columns);
    return box;
  }

  const pairs = samples.filter((sample) => sample.who === "policy" && referenceOf(sample));
  let shownPairs = 0;
  function morePairs(count) {
    for (const sample of pairs.slice(shownPairs, shownPairs + count)) {
      const box = sideBySide(sample);
      box.className = "pair";
      byId("pairs").append(box);
    }
    shownPairs = Math.min(pairs.length, shownPairs + count);
    const rest = pairs.length - shownPairs;
    byId("more-pairs").hidden = rest === 0;
    byId("more-pairs").textContent = `Show more (${rest})`;
  }
  byId("pairs-title").hidden = pairs.length === 0;
  morePairs(3);
  byId("more-pairs").addEventListener("click", () => morePairs(6));

  // ---- the table -------------------------------------------------------------------------------
  const columns = [
    ...(has("step") ? [{ label: "Step", css: "num", col: "col-narrow", value: (s) => s.step }] : []),
    ...(several ? [{ label: "Run", css: "word", col: "col-run", value: (s) => data.runs[s.run] }] : []),
    { label: "Kept as", css: "word", col: "col-word", value: (s) => kinds[s.kind] },
    { label: "By", css: "word", col: "col-word", value: (s) => s.who },
    { label: "KL", css: "num", col: "col-narrow", value: (s) => num(s.kl) },
    ...(has("score") ? [{ label: "Score", css: "num", col: "col-narrow", value: (s) => num(s.score) }] : []),
    ...(has("gold") ? [{ label: "Gold", css: "num", col: "col-narrow", value: (s) => num(s.gold) }] : []),
    { label: "Tokens", css: "num", col: "col-narrow", value: (s) => s.tokens.length + s.tokens_cut },
    { label: "Prompt", css: "text prompt", col: "col-text", value: (s) => s.prompt },
    { label: "Response", css: "text", col: "", value: (s) => s.response },
  ];
  const table = byId("samples");
  const body = table.tBodies[0];
  const group = make("colgroup");
  const headRow = make("tr");
  let sorted = { column: null, descending: true };
  columns.forEach((column) => {
    group.append(make("col", { class: column.col }));
    const button = make("button", { type: "button" }, column.label);
    const cell = make("th", { scope: "col", class: column.css }, button);
    button.addEventListener("click", () => sortBy(column, cell));
    headRow.append(cell);
  });
  table.prepend(group);
  table.tHead.append(headRow);

  function makeRow(sample) {
    const row = make("tr", { class: "row" });
    let opener;
    for (const column of columns) {
      const value = column.value(sample);
      const cell = make("td", { class: column.css, "data-label": column.label });
      if (column.css === "num") cell.append(column.label === "Step" || column.label === "Tokens" ? String(value) : number(value));
      else {
        const text = addText(make("span", { class: "clamp", dir: "auto" }), shorten(value, 260));
        if (column.label === "Response") {
          opener = make("button", { type: "button", class: "open", "aria-expanded": "false" }, text);
          cell.append(opener);
        } else cell.append(text);
      }
      row.append(cell);
    }
    const entry = { sample, row, detail: null,
      words: (sample.prompt + "\n" + sample.response).toLowerCase() };
    row.addEventListener("click", () => {
      if (entry.detail) {
        entry.detail.remove();
        entry.detail = null;
      } else {
        entry.detail = make("tr", { class: "detail" },
          make("td", { colspan: String(columns.length) }, sideBySide(sample)));
        row.after(entry.detail);
      }
      opener.setAttribute("aria-expanded", String(Boolean(entry.detail)));
    });
    return entry;
  }
  let rows = samples.map(makeRow);
  body.append(...rows.map((entry) => entry.row));

  // What has no value goes last in either direction.
  const missing = (value) => value === null || value === undefined || Number.isNaN(value);
  function sortBy(column, cell) {
    const again = sorted.column === column;
    sorted = { column, descending: again ? !sorted.descending : column.css === "num" };
    for (const other of headRow.cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", sorted.descending ? "descending" : "ascending");
    const sign = sorted.descending ? -1 : 1;
    rows.sort((a, b) => {
      const x = column.value(a.sample), y = column.value(b.sample);
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
    body.append(...rows.flatMap((entry) => (entry.detail ? [entry.row, entry.detail] : [entry.row])));
    filter();
  }

  // A page of rows at a time: sorting and searching go over all of them.
  const pageOfRows = 40;
  let limit = pageOfRows;
  byId("more-rows").addEventListener("click", () => { limit = Infinity; filter(); });

  function filter() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const who = byId("who").value, kind = byId("kind").value;
    let count = 0;
    for (const entry of rows) {
      const keep = (!who || entry.sample.who === who) && (!kind || entry.sample.kind === kind)
        && words.every((word) => entry.words.includes(word));
      count += keep;
      entry.row.hidden = !keep || count > limit;
      if (entry.detail) entry.detail.hidden = entry.row.hidden;
    }
    byId("more-rows").hidden = count <= limit;
    byId("more-rows").textContent = `Show all ${count}`;
    byId("count").textContent = `${count} of ${rows.length} responses`;
  }
  for (const id of ["search", "who", "kind"]) byId(id).addEventListener("input", filter);
  filter();

  // ---- light and dark --------------------------------------------------------------------------
  const button = byId("theme");
  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  function setTheme(next) {
    theme = themes.includes(next) ? next : "auto";
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.querySelector("span").textContent = theme;
  }
  // A page opened from disk may have no storage; the choice then lasts as long as the page.
  try { setTheme(localStorage.getItem("kleash-theme")); } catch { setTheme("auto"); }
  button.hidden = false;
  button.addEventListener("click", () => {
    setTheme(themes[(themes.indexOf(theme) + 1) % themes.length]);
    try { localStorage.setItem("kleash-theme", theme); } catch { /* as above */ }
  });
})();
