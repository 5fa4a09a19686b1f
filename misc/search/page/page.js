"use strict";

const DEFAULT_COUNT = 20;
const TYPING_PAUSE = 350; // milliseconds after the last keystroke until a changed setting takes effect
const HINT = "Type a description and press Enter.";
const UNREACHABLE = "The server does not answer. Is “python search.py serve” still running?";

const byId = (id) => document.getElementById(id);
const [countField, thresholdField, compareButton] = ["count", "threshold", "compare"].map(byId);
const wholeNumber = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });

// The state that the address of the page records: the settings, and the query of each column (null: column hidden).
const settings = { count: DEFAULT_COUNT, threshold: null };
const columns = [makeColumn(1, ""), makeColumn(2, "2")];

function makeColumn(number, suffix) {
  const like = byId(`like-${number}`);
  return {
    suffix, // of the column's parameters in the address of the page: q and like, or q2 and like2
    section: byId(`column-${number}`),
    form: byId(`search-${number}`),
    text: byId(`text-${number}`),
    like,
    likePicture: like.querySelector("img"),
    likeText: like.querySelector("p"),
    back: byId(`back-${number}`),
    status: byId(`status-${number}`),
    error: byId(`error-${number}`),
    results: byId(`results-${number}`),
    query: null,
    asked: null, // the request whose answer is shown or awaited
    request: new AbortController(),
  };
}

// The address of the page

function readPageAddress() {
  const parameters = new URLSearchParams(location.search);
  settings.count = countFrom(parameters.get("n"));
  settings.threshold = thresholdFrom(parameters.get("t"));
  for (const column of columns) {
    const { suffix } = column;
    const shown = suffix === "" || parameters.has(`q${suffix}`);
    column.query = shown
      ? { text: parameters.get(`q${suffix}`) ?? "", like: parameters.get(`like${suffix}`) || null }
      : null;
  }
}

function countFrom(written) {
  const count = Number(written);
  if (!Number.isInteger(count) || count < 1) return DEFAULT_COUNT;
  return Math.min(count, Number(countField.max) || count);
}

function thresholdFrom(written) {
  const threshold = Number(written || NaN);
  return threshold >= -1 && threshold <= 1 ? threshold : null;
}

function pageAddress() {
  const parameters = new URLSearchParams();
  for (const { suffix, query } of columns) {
    if (!query) continue;
    if (query.text || suffix) parameters.set(`q${suffix}`, query.text);
    if (query.like) parameters.set(`like${suffix}`, query.like);
  }
  if (settings.count !== DEFAULT_COUNT) parameters.set("n", settings.count);
  if (settings.threshold !== null) parameters.set("t", settings.threshold);
  const written = parameters.toString();
  return written ? `${location.pathname}?${written}` : location.pathname;
}

function pushPage() {
  const address = pageAddress();
  if (address !== location.pathname + location.search) history.pushState(null, "", address);
  showPage();
}

function showPageAddress() {
  readPageAddress();
  countField.value = settings.count;
  thresholdField.value = settings.threshold ?? "";
  for (const column of columns) column.text.value = column.query?.text ?? "";
  showPage();
}

// The page

function showPage() {
  const [, second] = columns;
  compareButton.setAttribute("aria-pressed", String(second.query !== null));
  second.section.hidden = second.query === null;
  document.title = [...columns.map(nameOfQuery).filter(Boolean), "Person search"].join(" · ");
  for (const column of columns) {
    showLike(column);
    search(column);
  }
}

function nameOfQuery({ query }) {
  return query?.like ? `like ${query.like}` : query?.text;
}

function showLike(column) {
  const path = column.query?.like;
  column.like.hidden = !path;
  if (!path) return;
  column.likePicture.hidden = false;
  column.likePicture.src = pictureAddress(path);
  column.likeText.textContent = `like ${path}`;
}

// Addresses are relative, because the page may be behind a path of another server.
function pictureAddress(path) {
  return `images/${path.split("/").map(encodeURIComponent).join("/")}`;
}

// Searching

function requestOf(query) {
  if (!query?.like && !query?.text) return null;
  const parameters = new URLSearchParams(query.like ? { path: query.like } : { text: query.text });
  parameters.set("results", settings.count);
  if (settings.threshold !== null) parameters.set("threshold", settings.threshold);
  return `api/${query.like ? "similar" : "search"}?${parameters}`;
}

async function search(column) {
  const asked = requestOf(column.query);
  if (asked && asked === column.asked) return;
  column.asked = asked;
  column.request.abort(); // its answer would be out of date
  const { signal } = (column.request = new AbortController());
  column.error.hidden = true;
  column.status.textContent = asked ? "Searching …" : HINT;
  column.section.setAttribute("aria-busy", String(asked !== null));
  if (!asked) return showCards(column, []);
  try {
    const answer = await ask(asked, signal);
    if (signal.aborted) return;
    showCards(column, answer.results);
    column.status.textContent = summary(answer);
  } catch (problem) {
    if (signal.aborted) return;
    showProblem(column, problem);
  }
  column.section.setAttribute("aria-busy", "false");
}

async function ask(address, signal) {
  const response = await fetch(address, { signal }).catch(() => {
    throw new Error(UNREACHABLE);
  });
  const answer = await response.json().catch(() => null);
  if (response.ok && answer) return answer;
  throw new Error(answer?.error ?? `The server's answer cannot be read (status ${response.status}).`);
}

function summary({ results, best, images, milliseconds, notice }) {
  const time = wholeNumber.format(Math.max(1, milliseconds));
  const found =
    results.length === 0 && best !== null
      ? `nothing above ${settings.threshold.toFixed(2)}; the best score is ${best.toFixed(3)}`
      : `${wholeNumber.format(results.length)} of ${wholeNumber.format(images)} pictures in ${time} ms`;
  return notice ? `${found}. Note: ${notice}` : found;
}

function showProblem(column, problem) {
  column.asked = null; // so that the same request can be tried again
  showCards(column, []);
  column.status.textContent = "";
  column.error.textContent = problem.message;
  column.error.hidden = false;
}

// The cards

function showCards(column, results) {
  const focused = column.results.contains(document.activeElement) ? cardOf(document.activeElement) : null;
  column.results.replaceChildren(...results.map(makeCard));
  markBoth();
  if (focused) focusCard(column, focused.dataset.path);
}

function makeCard({ path, score }, index) {
  const card = byId("card").content.firstElementChild.cloneNode(true);
  const part = (selector) => card.querySelector(selector);
  Object.assign(card.dataset, { path, score });
  card.title = path;
  part("img").addEventListener("error", () => showGone(card));
  part("img").src = pictureAddress(path);
  part(".rank").textContent = index + 1;
  part(".score").textContent = score.toFixed(3);
  const nameAt = path.lastIndexOf("/") + 1;
  part(".folder").textContent = path.slice(0, nameAt);
  part(".file bdi").textContent = path.slice(nameAt);
  part(".open").href = pictureAddress(path);
  part(".open").setAttribute("aria-label", `Open ${path} in a new tab`);
  return card;
}

function showGone(card) {
  card.querySelector("img").hidden = true;
  card.querySelector(".gone").hidden = false;
}

function markBoth() {
  const [first, second] = columns.map(({ results }) => new Set([...results.children].map((card) => card.dataset.path)));
  for (const card of document.querySelectorAll(".results > .card")) {
    const { path } = card.dataset;
    card.querySelector(".both").hidden = !(first.has(path) && second.has(path));
  }
}

function cardOf(element) {
  return element.closest?.(".card") ?? null;
}

// New results replace the focused card: the focus goes to the card of the same picture, or else to the first card.
function focusCard(column, path) {
  const cards = [...column.results.children];
  const card = cards.find((one) => one.dataset.path === path) ?? cards[0];
  (card?.querySelector(".more") ?? column.text).focus({ preventScroll: true });
}

// Mouse and touch

function submitText(column) {
  const text = column.text.value.trim();
  if (!text) {
    column.status.textContent = HINT;
    column.text.focus();
    return;
  }
  column.query = { text, like: null };
  column.asked = null; // so that the same text is searched again: the server may work again
  pushPage();
}

function searchLike(column, path) {
  column.query = { ...column.query, like: path };
  if (column.section.getBoundingClientRect().top < 0) column.section.scrollIntoView();
  pushPage();
}

function leaveLike(column) {
  focusCard(column, column.query.like); // the focused button disappears
  column.query = { ...column.query, like: null };
  pushPage();
}

function toggleCompare() {
  const [, second] = columns;
  second.query = second.query ? null : { text: "", like: null };
  second.text.value = "";
  pushPage();
  if (second.query) second.text.focus();
}

function changeSettings() {
  if (!countField.validity.valid || !thresholdField.validity.valid) return;
  settings.count = countFrom(countField.value);
  settings.threshold = thresholdFrom(thresholdField.value);
  history.replaceState(null, "", pageAddress());
  showPage();
}

// The keyboard

function pressKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const card = cardOf(event.target);
  const handled = card ? pressOnCard(event.key, card) : false;
  if (handled || (event.key === "/" && !event.target.matches("input") && focusText(columns[0]))) event.preventDefault();
}

function pressOnCard(key, card) {
  const column = columns.find(({ results }) => results.contains(card));
  if (key === "Escape") return focusText(column);
  if (key === "o") {
    card.querySelector(".open").click();
    return true;
  }
  const next = nextCard(key, card, [...column.results.children]);
  next?.querySelector(".more").focus();
  return next !== undefined;
}

function focusText(column) {
  column.text.focus();
  column.text.select();
  return true;
}

// Returns the card that a key moves to: null at the edge, undefined for any other key.
function nextCard(key, card, cards) {
  if (key === "ArrowLeft") return card.previousElementSibling;
  if (key === "ArrowRight") return card.nextElementSibling;
  if (key === "Home") return cards[0];
  if (key === "End") return cards.at(-1);
  if (key === "ArrowUp") return nearestCard(card, cards.filter((one) => one.offsetTop < card.offsetTop).reverse());
  if (key === "ArrowDown") return nearestCard(card, cards.filter((one) => one.offsetTop > card.offsetTop));
  return undefined;
}

function nearestCard(card, others) {
  const distance = (one) => Math.abs(one.offsetLeft - card.offsetLeft);
  const row = others.filter((one) => one.offsetTop === others[0].offsetTop);
  return row.reduce((best, one) => (best && distance(best) <= distance(one) ? best : one), null);
}

// Start-up

async function showAbout() {
  try {
    const about = await ask("api/about");
    byId("about").textContent =
      `${about.folder}: ${wholeNumber.format(about.images)} pictures, ${about.checkpoint}, ${about.engine} search`;
    countField.max = about.most_results;
    for (const { text } of columns) text.maxLength = about.longest_query;
    if (settings.count > about.most_results) {
      countField.value = about.most_results;
      changeSettings();
    }
  } catch (problem) {
    byId("about").textContent = problem.message;
  }
}

function listen() {
  for (const column of columns) {
    column.form.addEventListener("submit", (event) => {
      event.preventDefault();
      submitText(column);
    });
    column.back.addEventListener("click", () => leaveLike(column));
    column.likePicture.addEventListener("error", () => (column.likePicture.hidden = true));
    column.results.addEventListener("click", (event) => {
      if (event.target.closest(".more")) searchLike(column, cardOf(event.target).dataset.path);
    });
  }
  let pause;
  for (const field of [countField, thresholdField]) {
    field.addEventListener("input", () => {
      clearTimeout(pause);
      pause = setTimeout(changeSettings, TYPING_PAUSE);
    });
    field.addEventListener("change", () => field.reportValidity());
  }
  compareButton.addEventListener("click", toggleCompare);
  document.addEventListener("keydown", pressKey);
  addEventListener("popstate", showPageAddress);
}

listen();
showPageAddress();
showAbout();
if (!location.search) columns[0].text.focus();
