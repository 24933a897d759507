// Suspected labels
const percentOf = (share) => (share > 0.99 && share < 1 ? `${(Math.floor(1000 * share) / 10).toFixed(1)}%` : `${Math.round(100 * share)}%`); // 100% is all
function drawSuspects() {
  const view = byId("suspects");
  view.append(make("h2", {}, "Suspected labels"));
  if (!suspects) {
    view.append(make("p", { class: "intro" }, "Self-influence is not known: the gradients that it is computed from lie in the trace, which is gone, or another fit took its place. Put the trace back where it was, load the result again and make this page anew."));
    return;
  }
  const { by, n, n_issues, agreement, columns, rows } = suspects;
  const said = agreement === null ? "" : ` The model has said the label of ${percentOf(agreement)} of all.`;
  const flagged = n_issues === null ? "" : n_issues === 0 ? `${said} No label can be called probably wrong.` : `${said} Of all, ${count(n_issues, "label")} ${n_issues === 1 ? "is" : "are"} probably wrong: the model has said another class, and thought the label about as unlikely as it does for examples of other labels.`;
  view.append(make("p", { class: "intro" }, `A training example that influences itself most is often mislabelled, or unlike all others. These are the ${rows.length} highest of ${count(n, "training example")}, by ${by}, in bold.${flagged} Label scores go from 0 to 1, lower is worse. Say what is right, download the CSV, and hand it to apply_corrections.`));
  const corrected = new Map(); // what is right, by training example
  const names = [...new Set(rows.flatMap(([index, , , , predicted]) => [train[index][0], predicted]))].filter((name) => name !== null).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const field = make("input", { type: "search", placeholder: "Search texts, numbers", "aria-label": "Search the suspected labels", input: () => draw() });
  const only = make("select", { "aria-label": "Label", change: () => draw() });
  const wrong = make("input", { type: "checkbox", change: () => draw() });
  const tally = make("span", { class: "share", "aria-live": "polite" });
  const cards = make("div", {});
  view.append(
    make("div", { class: "table-tools" }, field, only,
      n_issues === null ? null : make("label", { class: "check" }, wrong, " Probably wrong"),
      make("button", { id: "csv-suspects", class: "quiet", click: () => save("label-issues.csv", [columns.join(","), ...rows.map(line)]) }, "Download as CSV"), tally),
    cards
  );
  fill(only, "All labels", rows.map(([index]) => train[index][0]));
  const texts = rows.map(([index]) => `#${index} ${textOf(train[index][1]) || train[index][2]}`.toLowerCase());
  const most = rows[0]?.[1] || 0;
  function line([index, value, issue, score, predicted, rank, inClass]) {
    const [label, words, unread] = train[index];
    const known = { train_index: index, is_label_issue: issue === null ? "" : issue ? "True" : "False", label_score: score, given_label: label, predicted_label: predicted,
      corrected_label: corrected.get(index), self_influence: value, rank, rank_in_class: inClass, text: textOf(words) || unread };
    return columns.map((name) => cellOf(known[name])).join(",");
  }
  function draw() {
    const wanted = field.value.trim().toLowerCase();
    const label = only.value && JSON.parse(only.value);
    const kept = rows.filter(([index, , issue], place) =>
      (!wanted || texts[place].includes(wanted)) && (only.value === "" || train[index][0] === label) && (!wrong.checked || issue));
    tally.textContent = kept.length === rows.length ? count(rows.length, "example") : `${kept.length} of ${count(rows.length, "example")}`;
    cards.replaceChildren(...kept.map(suspect));
  }
  function suspect([index, value, issue, score, predicted, rank, inClass]) {
    const [label, words, unread] = train[index];
    const pushed = pushedBy(index).length;
    const right = make("select", { "aria-label": `What is right for example ${index}`, change: () => corrected.set(index, right.value) },
      make("option", { value: "" }, "label is right"),
      names.filter((name) => name !== label).map((name) => make("option", { value: name, dir: "auto", selected: corrected.get(index) === name }, named(name))),
      make("option", { value: "drop", selected: corrected.get(index) === "drop" }, "drop this example"));
    return make(
      "div",
      { class: "card suspect" },
      make(
        "div",
        { class: "card-head" },
        make("span", { class: "rank", title: inClass === null ? null : `number ${inClass} of its label` }, String(rank)),
        label === null ? null : chip(label, "", `label ${named(label)}`),
        predicted === null || predicted === label ? null : [make("span", { class: "differs", title: "differs from" }, "≠"), chip(predicted, issue ? "said" : "", `the model says ${named(predicted)}`)],
        make("span", { class: "score" }, signed(value).replace("+", "")),
        bar(most ? value / most : 0),
        score === null ? null : make("span", { class: "share" }, `label score ${score.toFixed(2)}`),
        label === null ? null : right,
        link(index, `example ${index}, pushed ${count(pushed, "test example")}`)
      ),
      shaded(words, unread && words.length ? " …" : unread, new Map(), { limit: LONG })
    );
  }
  draw();
}

// Words over the whole test set
function drawWords() {
  const { words, stops, classes, labels, values } = page.word_table;
  const group = tests.some((test) => test.prediction !== null) ? "Model says" : "Test label"; // as the table was grouped
  const view = byId("words");
  const field = make("input", { type: "search", placeholder: "Search words", "aria-label": "Search words", input: () => draw() });
  const only = make("select", { "aria-label": "What the model says", change: () => draw() },
    make("option", { value: "" }, "All classes"),
    classes.map((name, number) => make("option", { value: number, dir: "auto" }, `${group} ${named(name)}`)));
  const scroll = make("div", { class: "scroll wide", tabindex: "0", role: "region", "aria-label": "Words by class and label" });
  const more = make("button", { class: "more wide", click: () => ((limit += 200), draw()) });
  const sums = values.map((row) => row.reduce((sum, value) => sum + Math.abs(value), 0));
  const most = values.reduce((max, row) => row.reduce((larger, value) => Math.max(larger, Math.abs(value)), max), 0);
  let sorting = { column: null, sign: -1 };
  let limit = 200;
  view.append(
    make("h2", { class: "wide" }, "Words over the whole test set"),
    make("p", { class: "intro wide" }, `The ${count(words.length, "strongest word")}: what each added, in training examples of a label (second line), to the scores of all test examples of a class (first line). Blue, solid: it ${page.target === "label" ? "lowered their loss" : "made their target likelier"}. Orange, dotted: the opposite.`),
    make("div", { class: "table-tools wide" }, field, classes.length > 1 ? only : null), scroll, more
  );
  function sortBy(column) {
    const next = { null: -1, "-1": 1, 1: null }[sorting.column === column ? sorting.sign : null];
    sorting = next === null ? { column: null, sign: -1 } : { column, sign: next };
    draw();
  }
  function header(text, column, attributes) {
    const sorted = sorting.column === column && column !== null;
    return make("th", { scope: "col", "aria-sort": sorted ? (sorting.sign < 0 ? "descending" : "ascending") : "none", ...attributes },
      make("button", { dir: "auto", click: () => sortBy(column) }, text + (sorted ? (sorting.sign < 0 ? " ↓" : " ↑") : "")));
  }
  function draw() {
    const wanted = field.value.trim().toLowerCase();
    const kept = classes.map((_, number) => number).filter((number) => only.value === "" || Number(only.value) === number);
    const columns = kept.flatMap((number) => labels.map((_, label) => number * labels.length + label));
    const order = [...words.keys()].filter((word) => !wanted || words[word].toLowerCase().includes(wanted));
    const { column, sign } = sorting;
    if (column === "word") order.sort((a, b) => -sign * words[b].localeCompare(words[a]));
    else if (column === null) order.sort((a, b) => sums[b] - sums[a]);
    else order.sort((a, b) => sign * (values[a][column] - values[b][column]));
    const head = make("thead", {},
      make("tr", {}, header("word", "word", { class: "corner", rowspan: 2 }),
        kept.map((number) => make("th", { class: "group", colspan: labels.length, scope: "colgroup", dir: "auto" }, `${group} ${named(classes[number])}`))),
      make("tr", {}, columns.map((each) => header(named(labels[each % labels.length]), each, { class: each % labels.length ? "" : "first" }))));
    const body = order.slice(0, limit).map((word) =>
      make("tr", {}, make("th", { scope: "row", dir: "auto", title: words[word], class: stops[word] ? "little" : "" }, words[word].trim() === "" ? "(blank)" : words[word]),
        columns.map((each) => {
          const value = values[word][each];
          const level = most ? levelOf(Math.abs(value) / most) : 0;
          const kind = level ? `word ${value < 0 ? "against" : "for"} level-${level}` : "";
          return make("td", { class: each % labels.length ? "" : "first" }, value ? make("span", { class: kind }, signed(value)) : "");
        })));
    scroll.replaceChildren(make("table", {}, head, make("tbody", {}, body)));
    more.hidden = order.length <= limit;
    more.textContent = `${count(order.length - limit, "more word")}`;
  }
  draw();
}

// CSV, as to_pandas has it; a text that a spreadsheet would take for a formula is given an apostrophe
const safe = (text) => (/^[=+\-@\t\r]/.test(text) && !/^[+-]?\d+(\.\d*)?(e[+-]?\d+)?$/.test(text) ? `'${text}` : text);
const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const cellOf = (value) => (value === null || value === undefined ? "" : typeof value === "string" ? cell(safe(value)) : String(value));
function save(name, lines) {
  const parts = ["\ufeff", ...lines.map((line) => `${line}\r\n`)]; // the mark tells Excel that it is UTF-8
  const address = URL.createObjectURL(new Blob(parts, { type: "text/csv;charset=utf-8" }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
const COLUMNS = "test_row,test_index,test_text,test_label,prediction,confidence,target,role,rank,train_index,score,share,train_text,train_label,words";
function strongestWords(words, terms, parts) {
  const found = new Map(); // by name, what its words add, and whether all of them are stop words
  for (const [place, term] of terms) {
    const [text, , , kind = 0] = vocabulary[words[place]];
    const { name = text, stop = kind & (SPECIAL | COMMON) } = parts.get(place) || {};
    const known = found.get(name) || { term: 0, stop: 1 };
    found.set(name, { term: known.term + term, stop: known.stop && stop ? 1 : 0 });
  }
  const strongest = [...found].sort(([, a], [, b]) => a.stop - b.stop || Math.abs(b.term) - Math.abs(a.term)).slice(0, 5);
  return strongest.map(([name, { term }]) => `${name} ${term < 0 ? "" : "+"}${Number(term.toPrecision(3))}`).join(", ");
}
function download(which, name) {
  const texts = new Map();
  const several = tests.some((test) => test.loader !== null);
  const lines = [(several ? "test_loader," : "") + COLUMNS];
  const textAndLabel = (index) => [textOf(train[index][1]) || train[index][2], train[index][0]].map(cellOf).join(",");
  for (const row of which) {
    const test = tests[row];
    const first = [...(several ? [test.loader] : []), row, test.index, textOf(test.words) || test.unread, test.label, test.prediction, test.confidence, test.target ?? test.label].map(cellOf).join(",");
    for (const role of ["proponent", "opponent"])
      test[`${role}s`].map(pairOf).forEach(({ index, score, share, terms, parts }, place) => {
        if (!texts.has(index)) texts.set(index, textAndLabel(index));
        const numbers = [role, place + 1, index, score, share].map(cellOf).join(",");
        lines.push(`${first},${numbers},${texts.get(index)},${cellOf(strongestWords(train[index][1], terms, parts))}`);
      });
  }
  save(name, lines);
}

// Going about: the address says what is shown, so that "back" goes back
const views = ["tests", "suspects", "words"].filter((name) => byId(name));
const drawn = new Set();
let address = null;
function goTo(name) {
  location.hash = name;
  show();
}
const go = (row) => goTo(`#test-${row}`);
function show() {
  if (location.hash === address) return;
  address = location.hash;
  unpoint();
  if (dialog.open) dialog.close();
  const asked = location.hash.slice(1);
  const row = /^test-\d+$/.test(asked) && tests[Number(asked.slice(5))] ? Number(asked.slice(5)) : null;
  const name = views.includes(asked) ? asked : "tests";
  for (const view of views) {
    byId(view).hidden = view !== name;
    byId(`tab-${view}`).setAttribute("aria-selected", String(view === name));
    byId(`tab-${view}`).tabIndex = view === name ? 0 : -1;
  }
  document.body.dataset.shows = name === "tests" && row === null ? "list" : "detail";
  if (name !== "tests") document.body.dataset.shows = "other";
  if (name !== "tests" && !drawn.has(name)) {
    drawn.add(name);
    ({ suspects: drawSuspects, words: drawWords })[name]();
  }
  if (name === "tests") {
    const chosen = row ?? current ?? shown[0] ?? null;
    if (chosen !== null && chosen !== current) {
      current = chosen;
      drawDetail(chosen);
    }
    reveal(current);
    drawList();
    drawTools();
  }
}
for (const view of views) byId(`tab-${view}`).addEventListener("click", () => goTo(`#${view}`));
document.querySelector(".tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const here = views.findIndex((view) => byId(`tab-${view}`) === document.activeElement);
  const tab = byId(`tab-${views[(here + step + views.length) % views.length]}`);
  tab.click();
  tab.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea, dialog, .text") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") (byId("search").focus(), event.preventDefault());
  if (event.key === "j") step(1);
  if (event.key === "k") step(-1);
  if (document.activeElement === list && ["ArrowDown", "ArrowUp", "Home", "End"].includes(event.key)) {
    if (event.key === "Home") go(shown[0]);
    else if (event.key === "End") go(shown[shown.length - 1]);
    else step(event.key === "ArrowDown" ? 1 : -1);
    event.preventDefault();
  }
});
list.addEventListener("scroll", () => requestAnimationFrame(drawList), { passive: true });
addEventListener("resize", drawList);
addEventListener("hashchange", show);
for (const id of ["search", "by-label", "by-prediction", "order", "mistaken"]) byId(id).addEventListener("input", find);
byId("clear").addEventListener("click", clearFilters);
byId("csv-all").addEventListener("click", () => download([...tests.keys()], "influence.csv"));

fill(byId("by-label"), "All labels", tests.map((test) => test.label));
fill(byId("by-prediction"), "All predictions", tests.map((test) => test.prediction));
byId("mistaken-field").hidden = !tests.some((test) => test.mistaken);
if (!tests.some((test) => test.confidence !== null)) for (const option of byId("order").querySelectorAll("[value=unsure], [value=sure]")) option.remove();
find();
show();
