// The page: which run, its facts, layers, classes and regions; what is drawn when. Texts from files are put
// in as text only, never as HTML.

import { Outlines } from "./outlines.js";
import { Regions, polygonRows } from "./regions.js";
import { Overview, drawRuler } from "./ruler.js";
import { Tiles, ask, make, picture } from "./tiles.js";
import { View } from "./view.js";
import { Volume } from "./volume.js";

const element = (id) => document.getElementById(id);
const LAYERS = [["slide", "Slide", 1], ["mask", "Mask", 0.4], ["lines", "Polygons", 1], ["probability", "Probability", 0], ["other", "Other", 0], ["differences", "Differences", 0.7], ["quality", "Quality", 0.5]];
const AGAINST = ["other", "differences"];
const canvases = Object.fromEntries(LAYERS.map(([id]) => [id, element(id)]));
const view = new View(element("stage"), redraw, clicked);
const overview = new Overview(element("map"), view);
const KEYS = {
  h: () => document.body.classList.toggle("bare"), n: () => shown?.cut || shown?.regions?.step(1), p: () => shown?.cut || shown?.regions?.step(-1), r: toggleRuler,
  "[": () => step(-1), "]": () => step(1), g: () => element("choice").hidden || gallery(), "?": () => element("keys").showModal(),
};
const hidden = new Set(); // classes, by their number
let shown = null; // what the page knows of the slide it shows
let runs = []; // all that there are
let cutting = 0; // the timer of an exact answer
let ruler = null; // { from, to }, level-0 places, while it is on
let pointer = null; // where it is over the slide
let frame = 0, saving = 0;

start();

async function start() {
  LAYERS.forEach(([id, title, opacity]) => element("sliders").append(slider(id, title, opacity)));
  element("window").addEventListener("input", moveWindow);
  window.addEventListener("hashchange", () => open(readHash()));
  element("runs").addEventListener("change", ({ target }) => open({ run: target.value }));
  for (const name of ["pointermove", "pointerleave"]) {
    element("stage").addEventListener(name, (event) => {
      pointer = name === "pointermove" ? view.place(event) : null;
      tellWhere();
    });
  }
  document.addEventListener("keydown", (event) => {
    const isTaken = event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select") || document.querySelector("dialog[open]");
    if (isTaken || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  for (const [id, key] of [["before", "["], ["after", "]"], ["all", "g"], ["help", "?"], ["rule", "r"]]) element(id).addEventListener("click", KEYS[key]);
  element("compare").querySelector("select").addEventListener("change", compare);
  element("scale").querySelector("select").addEventListener("change", showProbability);
  element("cut").querySelector("button").addEventListener("click", () => { shown.thresholds.fill(""); tellClasses(shown.facts.classes); cut(); });
  runs = await attempt(async () => (await ask("runs")).json()) ?? [];
  element("choice").hidden = runs.length < 2;
  for (const { id, folder, status, reason } of runs) {
    const option = new Option(status === "done" ? folder : `${folder} – ${status || "not shown"}`, id);
    option.title = reason;
    element("runs").append(option);
  }
  open({ run: runs[0]?.id, ...readHash() });
}

async function open({ run, x, y, d, at }) {
  if (!run) return;
  if (run === shown?.run) {
    if (d) view.go(x, y, 1 / d);
    return;
  }
  close();
  document.body.dataset.state = "loading";
  element("runs").value = run;
  const mine = { run, url: `runs/${run}`, selected: null };
  shown = mine;
  mine.facts = await attempt(async () => (await ask(mine.url)).json());
  const { facts } = mine;
  if (!facts || shown !== mine) return; // another was chosen meanwhile
  tellFacts(facts);
  if (!facts.size) return;
  if (facts.body) {
    const failed = (sentence) => say(sentence, "bad");
    const told = (place) => { element("spot").textContent = place; };
    mine.volume = new Volume(element("planes"), mine.url, facts, hidden, at, { failed, told, came: slicesCame });
    if (facts.probability) offerProbability();
    return;
  }
  const [width, height] = facts.size;
  const base = facts.thumbnail && await attempt(() => picture(`${mine.url}/thumbnail`));
  if (shown !== mine) return;
  mine.slide = tiles("slide", { base: base && { ...facts.thumbnail, picture: base } });
  mine.mask = tiles("mask", { smooth: false });
  const last = facts.slide.at(-1), isOne = last && Math.max(...last.size) <= facts.tile;
  const whole = base || (isOne && await attempt(() => picture(`${mine.url}/slide/${facts.slide.length - 1}/0/0`)));
  if (shown !== mine) return;
  overview.show(whole || null, facts.size);
  offerOthers();
  if (facts.probability) offerProbability();
  if (facts.quality.length) offerQuality();
  if (facts.polygons) {
    mine.regions = listOf(polygonRows(mine.url, hidden));
    mine.lines = new Outlines(canvases.lines, mine.url, { changed: redraw, came: polygonsCame });
    element("notice").textContent = "Polygons are being read …";
  }
  view.home = facts.bounds ?? { x: 0, y: 0, width, height };
  if (d) view.go(x, y, 1 / d);
  else view.goHome();
  element("stage").focus({ focusVisible: false });
}

function close() {
  [...LAYERS.map(([id]) => id), "volume"].forEach((layer) => shown?.[layer]?.close());
  if (ruler) toggleRuler();
  document.body.classList.remove("cutting");
  overview.show(null);
  shown = view.home = null;
  hidden.clear();
  Object.values(canvases).forEach((canvas) => { canvas.width = 0; });
  element("said").replaceChildren();
  ["name", "facts", "notice", "zoom"].forEach((id) => { element(id).textContent = ""; });
  tellWhere();
  ["bar", "layers", "found", "window", "regions", "compare", "kinds", "flaws", "scale", "cut"].forEach((id) => { element(id).hidden = true; });
}

// layer: "slide", "mask", of which classes may be hidden, or one of AGAINST, which lie as the mask does.
function tiles(layer, options) {
  const { url, facts } = shown, hide = layer === "mask" && hidden.size ? `?hide=${[...hidden].sort().join()}` : "";
  const isCut = layer === "mask" && shown.cut, place = isCut ? "cut" : AGAINST.includes(layer) ? `against/${shown.against}/${layer}` : options.place ?? layer;
  const query = isCut ? `?${shown.cut.slice(1)}${hide.replace("?", "&")}` : hide;
  const of = (level, column, row) => `${url}/${place}/${level}/${column}/${row}${query}`;
  const failed = (sentence) => say(sentence, "bad");
  const levels = isCut || layer === "probability" ? facts.probability.levels : facts[layer] ?? facts.mask;
  return new Tiles(canvases[layer], levels, facts.tile, of, { changed: redraw, failed, ...options });
}

// Draws once a frame, whatever has changed since.
function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (!shown?.slide) return;
    const ratio = window.devicePixelRatio || 1, { facts } = shown;
    const colors = facts.classes.map(({ color }) => `rgb(${color.join()})`);
    const came = ["slide", "mask", "probability", "quality", ...AGAINST].filter((id) => shown[id]).map((id) => shown[id].draw(view, ratio));
    if (shown.lines) came.push(shown.lines.draw(view, ratio, colors, hidden, shown.selected, facts.bad_regions));
    document.body.dataset.state = came.every(Boolean) ? "still" : "loading";
    overview.draw(ratio);
    drawRuler(element("ruler"), view, ratio, ruler, facts.mpp);
    if (facts.mpp) tellScale(facts.mpp[0]);
    element("zoom").textContent = facts.kind === "slide" ? `${number(10 * view.scale / facts.mpp[0])}×` : `${number(100 * view.scale)} %`;
    tellWhere(); // keys and wheel move the slide under a pointer at rest
    clearTimeout(saving);
    saving = setTimeout(saveHash, 200);
  });
}

function polygonsCame({ error, more, left_out, classes, is_exact }) {
  if (error) return say(error, "bad");
  if (is_exact !== undefined) {
    const rest = more ? `; ${more.toLocaleString()} smaller ones are not drawn here` : "";
    element("notice").textContent = is_exact ? `outlines cut anew${rest}` : `outlines cut from coarser probabilities: approximate${rest}`;
    return;
  }
  const known = shown.facts.classes;
  classes.slice(known.length).forEach((of) => known.push(of)); // drawn or edited in QuPath
  if (element("classes").childElementCount !== known.length - 1) tellClasses(known);
  if (left_out) say(`${left_out} features of the polygons cannot be read`);
  element("notice").textContent = more ? `${more.toLocaleString()} smaller polygons are not drawn here; zoom in` : "";
}

async function clicked([x, y]) {
  if (!shown?.lines || shown.cut) return;
  const query = new URLSearchParams({ x: Math.floor(x), y: Math.floor(y) });
  if (hidden.size) query.set("hide", [...hidden].join());
  const { url } = shown;
  const found = await attempt(async () => (await ask(`${url}/at?${query}`)).json());
  if (shown?.url !== url) return;
  shown.selected = found?.id ?? null;
  element("found").hidden = !found;
  if (found) tellFound(found);
  redraw();
}

function listOf(rows) {
  const told = ({ class: value, area_px, area_mm2, size, probability }) => {
    const { name, color } = shown.facts.classes[value], [mx, my] = shown.facts.mpp ?? [];
    const mm2 = area_mm2 ?? area_px * mx * my * 1e-6;
    const amount = size != null ? `${number(size)} ml` : mx ? `${number(mm2)} mm²` : `${number(area_px)} px`;
    return { color, texts: [name, amount, probability == null ? "" : probability.toFixed(2)] };
  };
  const go = (region) => {
    if (region.middle) return shown.volume.goTo(region.middle);
    const [x0, y0, x1, y1] = region.box, room = 2.5; // times its box
    view.go((x0 + x1) / 2, (y0 + y1) / 2, Math.min(view.width / (x1 - x0) / room, view.height / (y1 - y0) / room, 4 / (shown.facts.mpp?.[0] ?? 1)));
    shown.selected = region.id;
    element("found").hidden = false;
    tellFound(region);
    redraw();
  };
  return new Regions(element("regions"), { rows: (by, first) => attempt(() => rows(by, first)), told, go });
}

// Lesions of a volume are few, and known already.
function lesionRows(lesions) {
  return async (by) => {
    const key = by.startsWith("class") ? "class" : "size", sign = by.endsWith("up") ? 1 : -1;
    return { regions: [...lesions].sort((a, b) => sign * (a[key] - b[key])), count: lesions.length };
  };
}

// Runs of the same slide, and what the command named.
function offerOthers() {
  const { facts, run } = shown, own = runs.find(({ id }) => id === run)?.fingerprint, select = element("compare").querySelector("select");
  const others = runs.filter(({ id, fingerprint }) => id !== run && own && fingerprint === own);
  select.replaceChildren(new Option("nothing", "-"), ...others.map(({ id, folder }) => new Option(folder, id)));
  if (facts.against) select.append(new Option(facts.against, "", true, true));
  element("compare").hidden = select.length < 2 || !facts.mask.length;
  compare();
}

function compare() {
  const { value } = element("compare").querySelector("select"), is = value !== "-" && !element("compare").hidden;
  document.body.dataset.state = "loading";
  AGAINST.forEach((layer) => { shown[layer]?.close(); shown[layer] = null; canvases[layer].width = 0; });
  shown.against = value;
  if (is) AGAINST.forEach((layer) => { shown[layer] = tiles(layer, { smooth: false }); });
  LAYERS.forEach(([id], i) => { if (AGAINST.includes(id)) element("sliders").children[i].hidden = !is; });
  element("kinds").hidden = !is;
  tellColours("kinds", shown.facts.kinds);
  redraw();
}

function tellColours(id, kinds) {
  element(id).replaceChildren(...kinds.map(({ name, color }) => {
    const swatch = make("i"), item = make("li");
    swatch.style.background = `rgb(${color.join()})`;
    item.append(swatch, ` ${name}`);
    return item;
  }));
}

function offerQuality() {
  shown.quality = tiles("quality", { smooth: false });
  element("sliders").lastElementChild.hidden = element("flaws").hidden = false;
  tellColours("flaws", shown.facts.flaws);
}

function offerProbability() {
  const { classes, colors } = shown.facts.probability, select = element("scale").querySelector("select");
  shown.thresholds = classes.map(() => "");
  select.replaceChildren(...classes.map((value, channel) => new Option(shown.facts.classes[value].name, channel)));
  element("scale").querySelector("i").style.background = `linear-gradient(to right, ${colors.map((color) => `rgb(${color.join()})`).join()})`;
  ["scale", "cut"].forEach((id) => { element(id).hidden = false; });
  element("sliders").children[3].hidden = false;
  tellClasses(shown.facts.classes);
  showProbability();
}

function showProbability() {
  if (shown.volume) return shown.volume.use({ channel: element("scale").querySelector("select").value });
  shown.probability?.close();
  shown.probability = tiles("probability", { place: `probability/${element("scale").querySelector("select").value}` });
  redraw();
}

// Shows the mask and its outlines as thresholds cut them: at once from coarse probabilities, then exactly.
function cut() {
  const mine = shown, { facts, thresholds } = mine, some = thresholds.some(Boolean), names = facts.probability.classes.map((value) => facts.classes[value].name);
  mine.cut = some ? `&t=${thresholds.join()}` : "";
  if (mine.lines) mine.lines.cut = mine.cut;
  if (mine.volume) mine.volume.use({ cut: mine.cut });
  else {
    mine.mask.close();
    mine.mask = tiles("mask", { smooth: false });
  }
  document.body.classList.toggle("cutting", some); // what is told of regions is of the file's
  // the shell of Windows knows no single quotes, and most names need none
  const quote = (text) => (/^[\w./:=-]+$/.test(text) ? text : text.includes("\\") ? `"${text}"` : `'${text.replaceAll("'", "'\\''")}'`);
  const quoted = names.map((name, i) => thresholds[i] && `--threshold ${quote(`${name}=${thresholds[i]}`)}`).filter(Boolean);
  element("cut").querySelector("code").textContent = some ? `wsi-pipeline export ${quote(run().path)} ${quoted.join(" ")}` : "";
  clearTimeout(cutting);
  if (some) tellAreas("").then(() => { if (shown === mine) cutting = setTimeout(() => tellAreas("&exact=1"), 400); });
  else facts.classes.forEach((of, value) => tellAmount(value, of.amount == null ? "" : `${number(of.amount)} ${facts.unit}`));
  element("cut").querySelector("p").textContent = some ? `${facts.unit} being counted …` : "";
  element("notice").textContent = some && mine.lines ? "outlines being cut …" : "";
  document.body.dataset.state = "loading";
  redraw();
}

async function tellAreas(exact) {
  const { url, cut: asked, facts: { unit } } = shown;
  const found = await attempt(async () => (await ask(`${url}/areas?${asked.slice(1)}${exact}`)).json());
  if (!found || shown?.url !== url || shown.cut !== asked) return;
  const about = found.is_exact ? "" : "≈ ";
  Object.entries(found.amounts).forEach(([value, amount]) => tellAmount(value, `${about}${number(amount)} ${unit}`));
  element("cut").querySelector("p").textContent = found.is_exact ? `${unit} counted in all probabilities, at their resolution` : "≈ approximate, counted in coarser probabilities";
}

function tellAmount(value, text) {
  const span = element("classes").children[value - 1]?.querySelector("span");
  if (span) span.textContent = text;
}

function run() {
  return runs.find(({ id }) => id === shown.run) ?? { path: "RUN" };
}

function toggleRuler() {
  ruler = ruler || !shown || shown.volume ? null : { from: [view.x, view.y], to: null };
  view.rule = ruler && ((from, to) => { ruler = { from, to }; redraw(); });
  element("rule").setAttribute("aria-pressed", Boolean(ruler));
  element("stage").classList.toggle("ruling", Boolean(ruler));
  redraw();
}

function step(by) {
  const next = runs[runs.findIndex(({ id }) => id === shown?.run) + by];
  if (next) open({ run: next.id });
}

function gallery() {
  element("gallery").querySelector("div").replaceChildren(...runs.map(({ id, folder, picture }) => {
    const button = make("button"), image = Object.assign(make("img"), { loading: "lazy", alt: "", src: picture ? `runs/${id}/preview` : "icon.svg" });
    button.setAttribute("aria-current", id === shown?.run);
    button.append(image, make("span", folder));
    button.onclick = () => { element("gallery").close(); open({ run: id }); };
    return button;
  }));
  element("gallery").showModal();
}

function tellFound(found) {
  const [mx, my] = shown.facts.mpp ?? [], own = found.area_mm2 ?? found.area_px * mx * my * 1e-6;
  const area = mx ? `${number(own)} mm²` : `${number(found.area_px)} px`;
  const rows = [["name", found.name || "–"], ["class", shown.facts.classes[found.class].name], ["area", area]];
  if (found.probability !== null) rows.push(["mean probability", found.probability.toFixed(3)]);
  element("found").querySelector("dl").replaceChildren(...rows.flatMap(([term, value]) => [make("dt", term), make("dd", value)]));
}

function tellFacts(facts) {
  document.title = facts.name;
  element("name").textContent = facts.name;
  const lines = [`model ${facts.model}`];
  if (facts.size) {
    const unit = facts.kind === "slide" ? `${number(facts.mpp[0])} µm/px` : facts.mpp ? `${facts.mpp.map((um) => number(um / 1000)).join(" × ")} mm` : "";
    lines.unshift([`${facts.size.join(" × ")} px`, unit].filter(Boolean).join(" · "));
    if (facts.tissue_mm2 !== null) lines.push(`tissue ${number(facts.tissue_mm2)} mm²`);
    Object.entries(facts.labels).forEach(([label, share]) => lines.push(`${label} ${share.toFixed(3)}`));
    tellClasses(facts.classes);
  }
  element("facts").textContent = lines.join("\n");
  if (facts.status !== "done") say(`${facts.status}: ${facts.reason}`, "bad");
  facts.problems.forEach((sentence) => say(sentence, "bad"));
  if (facts.limits) say(`limits of ${facts.model}: ${facts.limits}`);
  facts.warnings.forEach((sentence) => say(sentence));
  element("layers").hidden = !facts.size;
  element("stage").hidden = Boolean(facts.body);
  element("planes").hidden = !facts.body;
  const [picture, , polygons, ...others] = element("sliders").children;
  picture.children[1].textContent = { slide: "Slide", image: "Image", volume: "Volume" }[facts.kind];
  polygons.hidden = Boolean(facts.body);
  others.forEach((slider) => { slider.hidden = true; });
  element("rule").hidden = Boolean(facts.body);
  if (facts.lesions?.length) shown.regions = listOf(lesionRows(facts.lesions));
}

function tellClasses(classes) {
  const items = classes.slice(1).map(({ name, color, amount, regions, lesions }, i) => {
    const box = make("input"), swatch = make("i"), label = make("label"), item = make("li");
    Object.assign(box, { type: "checkbox", checked: !hidden.has(i + 1) });
    box.addEventListener("change", () => toggle(i + 1, box.checked));
    swatch.style.background = `rgb(${color.join()})`;
    label.append(box, swatch, make("b", name), make("span", amount == null ? "" : `${number(amount)} ${shown.facts.unit}`));
    const [count, what] = lesions == null ? [regions, "polygon"] : [lesions, "lesion"];
    if (count != null) label.append(make("small", `${count.toLocaleString()} ${what}${count === 1 ? "" : "s"}`));
    item.append(label);
    const channel = shown.thresholds ? shown.facts.probability.classes.indexOf(i + 1) : -1;
    if (channel >= 0) item.append(threshold(name, channel));
    return item;
  });
  element("classes").replaceChildren(...items);
}

function threshold(name, channel) {
  const label = make("label"), range = make("input"), told = make("output");
  label.className = "threshold";
  Object.assign(range, { type: "range", min: 0.01, max: 1, step: 0.01, value: shown.thresholds[channel] || 0.5, ariaLabel: `threshold of ${name}` });
  told.textContent = shown.thresholds[channel] || "–";
  range.addEventListener("input", () => {
    shown.thresholds[channel] = told.textContent = (+range.value).toFixed(2);
    cut();
  });
  label.append(range, told);
  return label;
}

function toggle(value, on) {
  if (on) hidden.delete(value);
  else hidden.add(value);
  if (shown.volume) return shown.volume.panes.forEach((pane) => shown.volume.paint(pane));
  shown.regions?.clear();
  shown.mask.close();
  shown.mask = tiles("mask", { smooth: false });
  redraw();
}

// id: of the layer, whose canvases of all views take their opacity from a variable of its name.
function slider(id, title, opacity) {
  const label = make("label"), box = make("input"), range = make("input");
  Object.assign(box, { type: "checkbox", checked: true, ariaLabel: `show ${title}` });
  Object.assign(range, { type: "range", min: 0, max: 1, step: 0.05, value: opacity, ariaLabel: `opacity of ${title}` });
  const apply = () => document.body.style.setProperty(`--${id}`, box.checked ? range.value : 0);
  box.addEventListener("change", apply);
  range.addEventListener("input", apply);
  apply();
  label.append(box, make("span", title), range);
  return label;
}

function slicesCame() {
  const { volume } = shown;
  document.body.dataset.state = "still";
  if (volume.range) {
    const [low, high] = volume.range, [from, to] = volume.window, [width, level] = element("window").querySelectorAll("input");
    element("window").hidden = false;
    Object.assign(width, { min: 0, max: Math.max(high - low, to - from), value: to - from });
    Object.assign(level, { min: Math.min(low, (from + to) / 2), max: Math.max(high, (from + to) / 2), value: (from + to) / 2 });
    tellWindow();
  }
  clearTimeout(saving);
  saving = setTimeout(saveHash, 200);
}

function moveWindow() {
  const [width, level] = [...element("window").querySelectorAll("input")].map(({ value }) => +value);
  shown.volume.setWindow(level - width / 2, level + width / 2);
  tellWindow();
}

function tellWindow() {
  const [low, high] = shown.volume.window, [width, level] = element("window").querySelectorAll("output");
  width.textContent = number(high - low);
  level.textContent = number((low + high) / 2);
}

// A bar of 1, 2 or 5 times a power of ten, about 120 px long.
function tellScale(mpp) {
  const um = (120 * mpp) / view.scale, ten = 10 ** Math.floor(Math.log10(um));
  const length = [5, 2, 1].find((n) => n * ten <= um) * ten;
  const [text, line] = element("bar").children;
  element("bar").hidden = false;
  text.textContent = length < 1000 ? `${+length.toPrecision(1)} µm` : `${length / 1000} mm`;
  line.style.width = `${(length / mpp) * view.scale}px`;
}

function tellWhere() {
  const [x, y] = pointer && view.home ? view.toLevel0(pointer).map(Math.floor) : [];
  element("where").textContent = x === undefined ? "" : `x ${x}, y ${y} px`;
}

function say(sentence, kind = "") {
  const said = element("said");
  if ([...said.children].some((item) => item.textContent === sentence)) return;
  said.append(Object.assign(make("li", sentence), { className: kind }));
}

async function attempt(what) {
  try {
    return await what();
  } catch (error) {
    say(error.message, "bad");
    return null;
  }
}

function readHash() {
  const parts = location.hash.slice(1).split("&").map((part) => part.split("="));
  const { run, ...place } = Object.fromEntries(parts); // run as it stands there, in URL's letters
  const [x, y, d] = [place.x, place.y, place.d].map(Number);
  const at = /^\d+(,\d+){2}$/.test(place.at) && place.at.split(",").map(Number);
  return { ...(run && { run }), ...(at && { at }), ...([x, y, d].every(Number.isFinite) && d > 0 && { x, y, d }) };
}

function saveHash() {
  if (!shown?.slide && !shown?.volume) return;
  const place = shown.volume ? `at=${shown.volume.at.join()}` : `x=${Math.round(view.x)}&y=${Math.round(view.y)}&d=${+(1 / view.scale).toPrecision(4)}`;
  history.replaceState(null, "", `#run=${shown.run}&${place}`); // no entry for each move
}

function number(value) {
  return value === 0 ? "0" : value.toLocaleString("en", { maximumSignificantDigits: 3 });
}
