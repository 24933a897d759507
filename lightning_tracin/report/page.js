// Data only ever becomes text: elements are made by make(), texts are set as text nodes, nothing is parsed as HTML.
const page = JSON.parse(document.getElementById("data").textContent);
const { tests, train, vocabulary, suspects } = page;
const LEVELS = [0.01, 0.03, 0.07, 0.14, 0.25]; // shares of the sum of the terms' magnitudes
const ROW = 92; // height of a row of the list, as in the style sheet
const SPECIAL = 1, COMMON = 2, PROMPT = 4; // what a word is: a special token, in many training texts, of a prompt
const LONG = 160; // words of a training example that are shown at once
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Numbers, labels
function signed(number) {
  if (number === null) return "unknown";
  const size = Math.abs(number);
  const digits = size === 0 ? "0" : size < 1e-3 || size >= 1e5 ? size.toExponential(2) : size.toPrecision(3);
  return (number < 0 ? "−" : number > 0 ? "+" : "") + digits.replace("e-", "e−").replace("e+", "e");
}
function percent(share) {
  if (share === null) return "";
  return share > 0 && share < 0.001 ? "<0.1\u00a0%" : `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)}\u00a0%`;
}
const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const numbered = (test) => (test.loader === null ? `${test.index}` : `${test.index} of ${test.loader}`);
const named = (label) => (label === null ? "no label" : label.trim() === "" ? "(empty name)" : label);
function chip(label, kind = "", title = null) {
  const isNone = label === null || label.trim() === "";
  return make("span", { class: `chip ${kind} ${isNone ? "none" : ""}`, dir: "auto", title: title || named(label) }, named(label));
}
function link(index, text) {
  const what = `Training example ${index}: which test examples did it push?`;
  return make("button", { class: "link", title: what, "aria-label": what, click: () => follow(index) }, text);
}
function bar(part) {
  const inner = make("i");
  inner.style.setProperty("--part", Math.min(1, part || 0));
  return make("span", { class: "bar", "aria-hidden": "true" }, inner);
}

// Texts
const textOf = (words) =>
  words
    .map((number) => vocabulary[number])
    .map(([text, , before = " ", kind = 0]) => (kind & SPECIAL ? "" : before + text))
    .join("")
    .trim();
const startOf = (test) => (textOf(test.words.slice(0, 40)) || test.unread).slice(0, 160) || "(no text stored)";
function pairOf([index, score, share, equal, flat, unit, ...packed]) {
  const parts = new Map(); // of words that are not shared whole: what is, and whether it stands in many training texts
  for (let at = 0; at < flat.length; at += 3) parts.set(flat[at], { name: flat[at + 1], stop: flat[at + 2] });
  return { index, score, share, equal, parts, terms: termsOf(unit, packed) };
}
function termsOf(unit, packed) {
  const terms = new Map();
  for (let at = 0; at < packed.length; at += 2) terms.set(packed[at], packed[at + 1] * unit);
  return terms;
}
const total = (terms) => [...terms.values()].reduce((sum, term) => sum + Math.abs(term), 0);
const levelOf = (share) => LEVELS.filter((least) => share >= least).length;

/* A text whose words are shaded by their terms. Every word of the test text is an element, for words are marked in it;
   of other texts, those that have a term. */
function shaded(words, unread, terms, { score = 1, limit = Infinity, every = false, of = "", parts = new Map() } = {}) {
  if (words.length === 0) return unread ? make("p", { class: "text", dir: "auto" }, unread) : make("p", { class: "text unknown" }, "(no text stored)");
  const sum = total(terms);
  const text = make("p", { class: "text", dir: "auto" });
  if (terms.size) {
    text.tabIndex = 0;
    text.setAttribute("aria-description", "Arrow keys go from word to word");
  }
  const part = (from, to) => {
    const pieces = document.createDocumentFragment();
    for (let place = from; place < to; place++) {
      const [content, , before = " ", kind = 0, tag = null] = vocabulary[words[place]];
      pieces.append(before);
      const term = terms.get(place);
      const { name = content, stop = kind & (SPECIAL | COMMON) } = parts.get(place) || {};
      if (kind & (SPECIAL | PROMPT) || term !== undefined || every) {
        const level = sum ? levelOf(Math.abs(term || 0) / sum) : 0;
        const shade = term === undefined || !level ? "" : `${term * score >= 0 ? "for" : "against"} level-${level}`;
        const little = kind & SPECIAL ? "special" : stop && shade ? "stop" : kind & PROMPT ? "prompt" : "";
        const element = make("span", { class: `${little} word ${shade}`, tabindex: "-1" }, content);
        Object.assign(element, { number: words[place], term: term === undefined ? null : term, sum, of, name, stop });
        pieces.append(element);
      } else pieces.append(content);
      if (tag !== null) pieces.append(make("span", { class: "tag" }, tag));
    }
    return pieces;
  };
  const shown = Math.min(words.length, limit);
  text.append(part(0, shown));
  const end = unread ? make("span", { class: "unread", title: "The model was not given this." }, unread) : "";
  if (shown === words.length) {
    text.append(end);
    return text;
  }
  const hidden = [...terms].filter(([place]) => place >= shown).reduce((part, [, term]) => part + Math.abs(term), 0);
  const share = hidden ? `, ${percent(hidden / sum)} of what its words add` : "";
  const more = make("button", { class: "more", click: () => (more.remove(), text.append(part(shown, words.length), end)) });
  more.append(`${count(words.length - shown, "more word")}${share}`);
  return [text, more];
}

// The word that is pointed at: its term, and where else it stands
const tip = byId("tip");
let lit = [];
const piecesOf = (number) => vocabulary[number][1];
function isSame(one, other) {
  if (one === other) return true;
  const pieces = piecesOf(one);
  return pieces.length ? piecesOf(other).some((piece) => pieces.includes(piece)) : false;
}
function point(word) {
  unpoint();
  if (word.number === undefined) return;
  const inTest = word.closest(".subject") !== null;
  const others = [...document.querySelectorAll(inTest ? "#detail .card .word" : "#detail .subject .text .word")];
  lit = word.closest("#detail") ? others.filter((other) => isSame(word.number, other.number)) : [];
  for (const other of lit) other.classList.add("lit");
  const first = inTest ? null : lit[0];
  if (first) {
    const box = first.closest(".text"); // scrolled on its own, where the text is long
    if (first.offsetTop < box.scrollTop || first.offsetTop + first.offsetHeight > box.scrollTop + box.clientHeight)
      box.scrollTop = first.offsetTop - box.clientHeight / 2;
  }
  const rows = [make("b", { dir: "auto" }, word.name)];
  if (word.term !== null) {
    rows.push(make("span", { class: "term" }, signed(word.term)));
    rows.push(make("small", {}, `${percent(word.sum ? Math.abs(word.term) / word.sum : 0)} of what all words add${word.of}`));
  } else rows.push(make("small", {}, "no term in the pairs that are listed"));
  if (word.name !== word.textContent) rows.push(make("small", {}, `all that it shares of ${word.textContent}`));
  if (word.stop) rows.push(make("small", {}, word.classList.contains("special") ? "a special token" : "in more than a tenth of the training texts"));
  if (word.closest("#detail"))
    rows.push(make("small", {}, inTest ? `in the training texts below ${lit.length}×` : `in the test text ${lit.length}×`));
  tip.replaceChildren(...rows);
  tip.hidden = false;
  word.setAttribute("aria-describedby", "tip");
  const at = word.getClientRects()[0] || word.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8));
  const top = at.top > tip.offsetHeight + 12 ? at.top - tip.offsetHeight - 7 : at.bottom + 7;
  tip.style.transform = `translate(${left}px, ${top}px)`;
  (word.closest("dialog") || document.querySelector("main")).append(tip); // a dialog covers what is outside it
}
function unpoint() {
  for (const other of lit) other.classList.remove("lit");
  lit = [];
  tip.hidden = true;
}
const wordAt = (event) => (event.target.closest ? event.target.closest(".text .word") : null);
document.addEventListener("pointerover", (event) => {
  const word = wordAt(event);
  if (word) point(word);
  else if (!tip.hidden) unpoint();
});
document.addEventListener("focusin", (event) => wordAt(event) && point(wordAt(event)));
document.addEventListener("focusout", unpoint);
document.addEventListener("scroll", (event) => event.target.classList?.contains("text") || unpoint(), true);
document.addEventListener("keydown", (event) => {
  const text = event.target.closest?.(".text");
  if (!text || !["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "Home", "End", "Escape"].includes(event.key)) return;
  if (event.key === "Escape") {
    if (event.target !== text) event.preventDefault(); // the first one leaves the word, not the dialog
    text.focus();
    return;
  }
  const words = [...text.querySelectorAll(".word")].filter((word) => word.term !== null);
  const here = words.indexOf(event.target);
  const isRtl = getComputedStyle(text).direction === "rtl";
  const step = event.key === (isRtl ? "ArrowLeft" : "ArrowRight") || event.key === "ArrowDown" ? 1 : -1;
  const to = { Home: 0, End: words.length - 1 }[event.key] ?? (here < 0 ? 0 : here + step);
  if (words[to]) words[to].focus();
  event.preventDefault();
});

// The list of test examples
const list = byId("list");
const rows = byId("rows");
const strongest = tests.map((test) =>
  Math.max(0, ...[...test.proponents, ...test.opponents].map(([, score]) => Math.abs(score)))
);
let searched = null; // what is searched, made at the first search
let shown = []; // rows of the test examples that the filters leave, in order
let current = null;

function fill(select, all, values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  const known = [...counts.keys()].sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
  select.hidden = known.length < 2 || known.length > 200; // numbers of a regression are found by searching
  select.append(make("option", { value: "" }, all));
  for (const value of known)
    select.append(make("option", { value: JSON.stringify(value), dir: "auto" }, `${named(value)} (${counts.get(value)})`));
}
function find() {
  const wanted = byId("search").value.trim().toLowerCase();
  if (wanted && !searched)
    searched = tests.map((test) => `#${numbered(test)} ${test.label ?? ""} ${test.prediction ?? ""} ${textOf(test.words) || test.unread}`.toLowerCase());
  const label = byId("by-label").value && JSON.parse(byId("by-label").value);
  const prediction = byId("by-prediction").value && JSON.parse(byId("by-prediction").value);
  const is = { label: byId("by-label").value !== "", prediction: byId("by-prediction").value !== "" };
  const mistaken = byId("mistaken").checked;
  shown = [...tests.keys()].filter(
    (row) =>
      (!wanted || searched[row].includes(wanted)) &&
      (!is.label || tests[row].label === label) &&
      (!is.prediction || tests[row].prediction === prediction) &&
      (!mistaken || tests[row].mistaken)
  );
  const sure = (row, unknown) => tests[row].confidence ?? unknown;
  const orders = {
    unsure: (a, b) => sure(a, 2) - sure(b, 2),
    sure: (a, b) => sure(b, -1) - sure(a, -1),
    strong: (a, b) => strongest[b] - strongest[a],
  };
  const order = orders[byId("order").value];
  if (order) shown.sort(order);
  const tally = shown.length === tests.length ? count(tests.length, "test example") : `${shown.length} of ${count(tests.length, "test example")}`;
  byId("tally").textContent = tally;
  list.scrollTop = 0;
  drawList();
  drawTools();
}
function drawList() {
  list.hidden = shown.length === 0;
  byId("none").hidden = !list.hidden;
  rows.style.height = `${shown.length * ROW}px`;
  const from = Math.max(0, Math.floor(list.scrollTop / ROW) - 3);
  const to = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 3);
  rows.replaceChildren(...shown.slice(from, to).map((row, number) => listRow(row, from + number)));
  if (shown.includes(current)) list.setAttribute("aria-activedescendant", `row-${current}`);
  else list.removeAttribute("aria-activedescendant");
}
function listRow(row, place) {
  const test = tests[row];
  const element = make(
    "div",
    {
      class: "row", id: `row-${row}`, role: "option", "aria-selected": String(row === current),
      "aria-setsize": shown.length, "aria-posinset": place + 1, click: () => go(row),
    },
    make(
      "div",
      { class: "row-head" },
      make("span", { class: "number" }, numbered(test)),
      test.label === null ? null : chip(test.label, "", `label ${named(test.label)}`),
      test.mistaken ? [make("span", { class: "differs", title: "differs from" }, "≠"), chip(test.prediction, "said", `the model says ${named(test.prediction)}`)] : null,
      !test.mistaken && test.prediction !== null && (test.label === null || test.confidence === null)
        ? make("span", { class: "says" }, `→ ${test.prediction}`) : null,
      test.confidence === null ? null : make("span", { class: "percent", title: "how sure the model is of what it says" }, percent(test.confidence))
    ),
    make("div", { class: "start", dir: "auto" }, startOf(test))
  );
  element.style.top = `${place * ROW}px`;
  return element;
}
function clearFilters() {
  for (const id of ["search", "by-label", "by-prediction"]) byId(id).value = "";
  byId("mistaken").checked = false;
  find();
}
function step(by) {
  const here = shown.indexOf(current);
  const to = shown[here < 0 ? 0 : here + by];
  if (to !== undefined) go(to);
}
function reveal(row) {
  const top = shown.indexOf(row) * ROW;
  if (top < 0) return;
  if (top < list.scrollTop || top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2 + ROW / 2;
}

// One test example
const detail = byId("detail");
const says = (text) => (text === "" ? null : make("span", { class: "says" }, text));
const fact = (name, ...what) => make("span", { class: "fact" }, says(name), what); // on one line, with its name
function drawDetail(row) {
  const test = tests[row];
  const sides = ["proponents", "opponents"].map((side) => test[side].map(pairOf));
  const [unit, ...packed] = test.terms;
  const terms = termsOf(unit, packed);
  const subject = make(
    "div",
    { class: "subject" },
    make(
      "div",
      { class: "subject-card" },
      shaded(test.words, test.unread, terms, { limit: 600, every: true, of: " to the proponents below, together" }),
      terms.size ? legend() : null
    )
  );
  const inner = make(
    "div",
    { class: "detail-inner" },
    make(
      "div",
      { class: "detail-head" },
      make("button", { class: "back", click: () => goTo("#tests") }, "‹ All"),
      make(
        "div",
        { class: "heading" },
        make("h2", {}, `Test example ${numbered(test)}`),
        test.label === null ? null : fact("label", chip(test.label)),
        test.prediction === null ? null : fact("model says", chip(test.prediction, "said"), says(percent(test.confidence)), test.mistaken ? make("span", { class: "differs" }, "≠ label") : null),
        test.target === null ? null : fact("target", chip(test.target))
      ),
      make(
        "div",
        { class: "tools" },
        make("button", { id: "previous", "aria-label": "Previous test example", title: "Previous (k)", click: () => step(-1) }, "↑"),
        make("button", { id: "next", "aria-label": "Next test example", title: "Next (j)", click: () => step(1) }, "↓"),
        make("button", { id: "csv-one", click: () => download([row], `test-example-${test.index}.csv`) }, "CSV")
      )
    ),
    subject,
    make(
      "div",
      { class: "sides" },
      side("Proponents", `Training on them ${test.target === null ? "lowered the loss" : "made the target likelier"}`, sides[0], test, row, 1),
      side("Opponents", `Training on them ${test.target === null ? "raised the loss" : "made it less likely"}`, sides[1], test, row, -1)
    )
  );
  detail.replaceChildren(inner);
  detail.scrollTop = 0;
  drawTools();
}
function drawTools() {
  if (!byId("next")) return;
  const here = shown.indexOf(current);
  byId("previous").disabled = here <= 0;
  byId("next").disabled = here === shown.length - 1;
}
function legend() {
  const swatch = (kind, text) => make("span", {}, make("span", { class: `word ${kind} level-3` }, "words"), ` ${text}`);
  return make("div", { class: "legend" }, swatch("for", "pushed with the score"), swatch("against", "against it"), swatch("for stop", "in many training texts"), make("span", {}, "added over the proponents below"));
}
function side(name, what, pairs, test, row, sign) {
  const most = strongest[row];
  const shares = pairs.filter((pair) => pair.score * sign > 0 && pair.share !== null).map((pair) => pair.share);
  const covered = shares.length ? `; the ${pairs.length} here make ${percent(shares.reduce((sum, share) => sum + share, 0))}` : "";
  const said = pairs.length ? `${what}${covered}.` : `None: no training example ${sign > 0 ? "lowered" : "raised"} the loss.`;
  return make(
    "section",
    { "aria-label": name },
    make("div", { class: "side-head" }, make("h3", {}, name), make("p", { title: `of the sum of all ${name.toLowerCase()}' scores` }, said)),
    ...pairs.map((pair, place) => card(pair, place + 1, most, test))
  );
}
function card({ index, score, share, equal, parts, terms }, rank, most, test) {
  const [label, words, unread] = train[index];
  const same = test.prediction === null ? label === test.label : label === test.prediction;
  const as = test.prediction === null ? "the label of the test example" : "what the model says of the test example";
  return make(
    "div",
    { class: "card" },
    make(
      "div",
      { class: "card-head" },
      make("span", { class: "rank" }, String(rank)),
      label === null ? null : chip(label, same ? "same" : "", `${named(label)}: ${same ? "" : "not "}${as}`),
      make("span", { class: "score" }, signed(score)),
      bar(most ? Math.abs(score) / most : 0),
      make("span", { class: "share", title: `of all ${score < 0 ? "opponents'" : "proponents'"} scores` }, percent(share)),
      equal.length ? make("span", { class: "equal", title: `also ${equal.slice(0, 100).join(", ")}` }, `${equal.length + 1} equal texts`) : null,
      link(index, `example ${index}`)
    ),
    shaded(words, unread && words.length ? " …" : unread, terms, { score, parts, limit: LONG, of: " to this score" })
  );
}

// Following a training example
const dialog = byId("follow");
let pushes = null; // of each training example: the test examples in whose lists it is
function pushedBy(index) {
  if (!pushes) {
    pushes = new Map();
    tests.forEach((test, row) => {
      const seen = new Set();
      for (const pair of [...test.proponents, ...test.opponents]) {
        if (seen.has(pair[0])) continue; // in both lists, where there are few training examples
        seen.add(pair[0]);
        if (!pushes.has(pair[0])) pushes.set(pair[0], []);
        pushes.get(pair[0]).push({ row, score: pair[1], share: pair[2] });
      }
    });
  }
  return (pushes.get(index) || []).sort((a, b) => Math.abs(b.score) - Math.abs(a.score));
}
function follow(index) {
  const [label, words, unread] = train[index];
  const pushed = pushedBy(index);
  const most = Math.abs(pushed[0]?.score ?? 0);
  const place = suspects ? suspects.rows.findIndex(([suspect]) => suspect === index) : -1;
  const entries = pushed.slice(0, 500).map(({ row, score, share }) => {
    const test = tests[row];
    return make(
      "button",
      { class: "go", click: () => (dialog.close(), clearIfHidden(row), go(row)) },
      bar(most ? Math.abs(score) / most : 0),
      make("span", { class: "score" }, signed(score)),
      make("span", { class: "end" }, make("span", { class: "share" }, percent(share)), make("span", {}, `test example ${numbered(test)}`),
        test.label === null ? null : chip(test.label),
        test.mistaken ? [make("span", { class: "differs" }, "≠"), chip(test.prediction, "said")] : null),
      make("span", { class: "start", dir: "auto" }, startOf(test))
    );
  });
  const kinds = [pushed.filter(({ score }) => score > 0).length, pushed.filter(({ score }) => score < 0).length];
  dialog.replaceChildren(
    make(
      "div",
      { class: "follow-head" },
      make("h2", { id: "follow-title" }, `Training example ${index}`),
      label === null ? "" : chip(label),
      make("button", { class: "close", click: () => dialog.close(), autofocus: true }, "Close")
    ),
    ...[shaded(words, unread, new Map())].flat(),
    place < 0 ? "" : make("p", {}, `Number ${place + 1} of the suspected labels.`),
    make("h3", {}, pushed.length ? `Among the strongest of ${count(pushed.length, "test example")}` : "Not among the strongest of any test example"),
    make("p", {}, pushed.length ? `a proponent of ${kinds[0]}, an opponent of ${kinds[1]}; strongest first` : ""),
    ...entries,
    pushed.length > entries.length ? make("p", {}, `${pushed.length - entries.length} weaker ones are in the CSV.`) : ""
  );
  dialog.showModal();
  dialog.scrollTop = 0;
}
function clearIfHidden(row) {
  if (!shown.includes(row)) clearFilters();
}
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("close", () => (unpoint(), document.querySelector("main").append(tip)));
