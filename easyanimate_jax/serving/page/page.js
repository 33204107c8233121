// The page of a server: one form for every way of generating, and the list of its jobs.
// All options come from the server (/v1/options); texts.json holds the words in two languages.

import { Painter } from "./painter.js";
import { poses, PRESETS, SLIDERS } from "./camera.js";

const $ = (id) => document.getElementById(id);
const PAGE = 12; // jobs that are asked for at once
const MAIN = ["width", "height", "frames", "steps", "guidance", "seed"];
// What each way asks for: [field, is it needed]; the first fields of "drawn" ones are painted.
const WAYS = {
  text: [],
  image: [["image", false], ["end_image", false]],
  video: [["video", true], ["strength", false]],
  inpaint: [["video", true], ["mask", false]],
  control: [["control", true], ["operator", false], ["reference", false]],
  trajectory: [["trajectory", true], ["spot", false], ["reference", false]],
  camera: [["camera", true], ["reference", false]],
};
const OPERATORS = ["", "canny", "soft_edge", "scribble", "lines", "line_art"];
const FILES = { image: "image/*", end_image: "image/*", mask: "image/*,video/*", reference: "image/*",
  video: "video/*,image/gif,image/webp", control: "video/*,image/gif,image/webp", camera: "text/plain,.txt" };

let texts, words, offer; // all texts, those of the language, what the server offers
const jobs = new Map(); // id -> { job, card, events }

const say = (name) => words[name] ?? name;

class Refusal extends Error {}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refusal(say("offline"));
  }
  if (answer.status === 401) {
    showLogin();
    throw new Refusal(say("token_wrong"));
  }
  const body = await answer.json();
  if (!answer.ok) throw new Refusal(body.error.message);
  return body;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Language

function translate() {
  const language = $("language").value;
  words = texts[language];
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const one of document.querySelectorAll("[data-text]")) one.textContent = say(one.dataset.text);
  localStorage.setItem("language", language);
  if (offer) {
    const kept = values();
    showModel();
    fill(kept);
    for (const id of jobs.keys()) draw(id);
  }
}

// Token

function showLogin() {
  $("login").hidden = false;
  $("request").hidden = $("jobs").hidden = true;
  $("token").focus();
}

$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const token = $("token").value;
  const answer = await fetch("login", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ token: token.trim() }),
  });
  if (answer.ok) start();
  else if ($("token").value === token) { // another one may have been typed meanwhile
    $("token").setCustomValidity(say("token_wrong"));
    $("token").reportValidity();
  }
});
$("token").addEventListener("input", () => $("token").setCustomValidity(""));

// The form

const painter = new Painter($("canvas"), $("brush"), () => {
  const area = $("field_trajectory");
  if (area) area.value = JSON.stringify(painter.paths);
});
$("undo").addEventListener("click", () => painter.undo());
$("clear").addEventListener("click", () => painter.clear());

const model = () => offer.models.find((one) => one.id === $("model").value);
const way = () => document.querySelector("input[name=way]:checked")?.value ?? "text";
const fieldOf = (name) => offer.fields.find((one) => one.name === name);

function showModel() {
  const before = way();
  const legend = $("ways").querySelector("legend");
  $("ways").replaceChildren(legend);
  for (const name of model().ways) {
    const radio = element("input", { type: "radio", name: "way", value: name, id: `way_${name}` });
    radio.checked = name === before || (name === model().ways[0] && !model().ways.includes(before));
    radio.addEventListener("change", showWay);
    $("ways").append(element("label", {}, radio, ` ${say(`way_${name}`)}`));
  }
  showWay();
}

function control(field, needed) {
  const id = `field_${field.name}`;
  let input;
  if (field.name === "trajectory") {
    input = element("textarea", { rows: 2 });
    input.addEventListener("change", () => painter.setPaths(input.value));
  } else if (field.kind === "file") {
    input = element("input", { type: "file", accept: FILES[field.name] });
    if (["video", "image", "end_image", "control"].includes(field.name))
      input.addEventListener("change", () => field.name === "video" && showPainter());
  } else if (field.choices.length || field.name === "operator" || field.name === "sampler") {
    const choices = { operator: OPERATORS, sampler: ["", ...model().samplers] }[field.name] ?? field.choices;
    input = element("select");
    for (const choice of choices)
      input.append(element("option", { value: choice, textContent: choice || say("default") }));
  } else {
    const number = field.kind !== "text" && field.kind !== "numbers";
    input = element("input", { type: number ? "number" : "text" });
    if (number) {
      input.step = field.kind === "integer" ? 1 : "any";
      if (field.low !== null) [input.min, input.max] = [field.low, field.high];
    }
    const own = ["width", "height", "frames", "steps", "guidance"].includes(field.name) && model()[field.name];
    input.placeholder = String(own || (field.default ?? ""));
    if (field.name === "width" || field.name === "height") input.step = 16;
  }
  input.id = id;
  input.name = field.name;
  input.dataset.kind = field.kind;
  const help = words.help?.[field.name] ?? field.help;
  const note = element("span", { className: "note", id: `${id}_help`, textContent: help });
  input.setAttribute("aria-describedby", note.id);
  const label = element("label", { htmlFor: id, textContent: say(`name_${field.name}`) + (needed ? " *" : "") });
  return element("div", {}, label, input, note);
}

function showWay() {
  const asked = WAYS[way()];
  const names = asked.map(([name]) => name);
  const known = new Set(model().inputs);
  $("inputs").replaceChildren(
    ...asked
      .filter(([name]) => name === "strength" || name === "operator" || name === "spot" || known.has(name))
      .map(([name, needed]) => control(fieldOf(name), needed)),
  );
  const free = (field) => field.kind !== "file" && !names.includes(field.name) && field.name !== "prompt";
  const others = ["strength", "operator", "spot", "size"];
  const segments = ["segment", "overlap"];
  const rest = offer.fields.filter(
    (field) =>
      free(field) &&
      !MAIN.includes(field.name) &&
      !others.includes(field.name) &&
      (!segments.includes(field.name) || known.has("segment")),
  );
  $("main_options").replaceChildren(...MAIN.map((name) => control(fieldOf(name), false)));
  $("options").replaceChildren(...rest.map((field) => control(field, false)));
  $("lora_row").hidden = model().loras.length === 0;
  $("loras").replaceChildren(
    ...model().loras.map((name) => {
      const input = element("input", { type: "number", step: 0.1, id: `lora_${name}`, placeholder: "0" });
      input.dataset.lora = name;
      return element("div", {}, element("label", { htmlFor: input.id, textContent: name }), input);
    }),
  );
  $("camera_moves").hidden = way() !== "camera";
  showPainter();
}

async function showPainter() {
  const kind = { inpaint: "mask", trajectory: "path" }[way()];
  $("painter").hidden = !kind;
  $("brush_row").hidden = kind !== "mask";
  if (!kind) return;
  $("painter_note").textContent = say(`paint_${kind}`);
  $("canvas").setAttribute("aria-label", say(`paint_${kind}`));
  if (kind === "path") {
    painter.begin("path", number("width"), number("height"));
    return;
  }
  const film = $("field_video")?.files[0];
  $("canvas").hidden = !film;
  if (film && !(await painter.onFilm(film))) {
    $("canvas").hidden = true;
    $("painter_note").textContent = say("film_unknown");
  }
}

const number = (name) => Number($(`field_${name}`)?.value) || model()[name];

for (const name of ["width", "height"])
  document.addEventListener("change", (event) => {
    if (event.target.id === `field_${name}` && way() === "trajectory") showPainter();
  });

// Camera

for (const name of SLIDERS) {
  const input = element("input", { type: "range", min: -1, max: 1, step: 0.1, value: 0, id: `slider_${name}` });
  $("sliders").append(
    element("div", {}, element("label", { htmlFor: input.id }, element("span")), input),
  );
  input.previousElementSibling.firstChild.dataset.text = `move_${name}`;
}
for (const name of Object.keys(PRESETS)) {
  const option = element("option", { value: name });
  option.dataset.text = `preset_${name}`;
  $("preset").append(option);
}
$("preset").addEventListener("change", () => {
  for (const name of SLIDERS) $(`slider_${name}`).value = PRESETS[$("preset").value][name] ?? 0;
});

// Values of the form

function values() {
  const found = { prompt: $("prompt").value, way: way() };
  for (const input of document.querySelectorAll("#request [name]:not([name=way])"))
    if (input.type !== "file" && input.value !== "") found[input.name] = input.value;
  return found;
}

function fill(kept) {
  $("prompt").value = kept.prompt ?? "";
  for (const input of document.querySelectorAll("#request [name]:not([name=way])")) {
    const value = kept[input.name];
    if (input.type !== "file" && value !== undefined && value !== null)
      input.value = Array.isArray(value) ? value.join(", ") : value;
  }
}

async function form() {
  const body = new FormData();
  body.append("model", $("model").value);
  const found = values();
  delete found.way;
  for (const [name, value] of Object.entries(found)) body.append(name, value);
  const loras = [...document.querySelectorAll("#loras input")].filter((input) => Number(input.value));
  if (loras.length) body.append("lora", loras.map((input) => `${input.dataset.lora}:${input.value}`).join(","));
  for (const input of document.querySelectorAll("#request input[type=file]"))
    if (input.files[0]) body.append(input.name, input.files[0]);
  if (way() === "inpaint" && !body.has("mask") && painter.touched) body.append("mask", await painter.mask());
  if (way() === "camera" && !body.has("camera")) {
    const moves = Object.fromEntries(SLIDERS.map((name) => [name, Number($(`slider_${name}`).value)]));
    const size = [number("frames"), number("height"), number("width")];
    body.append("camera", poses(moves, ...size, Number(found.fps) || model().fps));
  }
  return body;
}

$("request").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("send").disabled = true;
  $("message").textContent = "";
  try {
    const body = await form();
    for (const [name, needed] of WAYS[way()])
      if (needed && !body.has(name)) throw new Refusal(`${say(`name_${name}`)}: ${say("missing")}`);
    show(await ask("v1/videos", { method: "POST", body }), true);
    $("list").firstElementChild?.scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    $("message").textContent = error.message;
  } finally {
    $("send").disabled = false;
  }
});

// The jobs

function show(job, first) {
  const known = jobs.get(job.id);
  if (known) known.job = job;
  else {
    const card = element("article", { id: job.id });
    if (first) $("list").prepend(card);
    else $("list").append(card);
    jobs.set(job.id, { job, card, events: null });
  }
  draw(job.id);
  follow(job.id);
  $("none").hidden = jobs.size > 0;
}

function button(name, work) {
  const made = element("button", { type: "button", textContent: say(name) });
  made.addEventListener("click", () =>
    work().catch((error) => {
      if (!(error instanceof Refusal)) throw error;
      $("message").textContent = error.message;
    }),
  );
  return made;
}

function draw(id) {
  const { job, card } = jobs.get(id);
  const parts = [];
  const picture = job.num_frames === 1;
  const source = `v1/videos/${id}/content`;
  if (job.status === "completed" && picture)
    parts.push(element("img", { src: source, alt: job.prompt }));
  if (job.status === "completed" && !picture) {
    const kept = card.querySelector("video");
    const video = kept ?? element("video", { src: source, controls: true, loop: true, muted: true, playsInline: true });
    video.poster = `${source}?variant=thumbnail`;
    video.setAttribute("aria-label", job.prompt);
    parts.push(video);
  }
  parts.push(element("p", { textContent: job.prompt || "–" }));
  parts.push(
    element("p", {
      className: "note",
      textContent: `${job.size} · ${job.num_frames} ${say("frames")} · ${say("name_seed")} ${job.seed} · ${job.model}`,
    }),
  );
  if (job.status === "queued" || job.status === "in_progress") {
    const place = job.queue_position === null ? "" : ` (${job.queue_position})`;
    parts.push(element("p", { textContent: say(`status_${job.status}`) + place }));
    const bar = element("progress", { max: 100, value: job.progress });
    bar.setAttribute("aria-label", say("progress"));
    parts.push(bar);
  }
  if (job.status === "failed")
    parts.push(element("p", { className: "failed", textContent: words.codes?.[job.error.code] ?? job.error.message }));
  const ended = job.status === "completed" || job.status === "failed";
  const row = element("p", { className: "buttons" });
  if (job.status === "completed")
    row.append(element("a", { href: source, download: `${id}.${picture ? "png" : "mp4"}`, textContent: say("download") }));
  row.append(button("again", () => again(job)));
  row.append(button(ended ? "delete" : "cancel", () => remove(id)));
  parts.push(row);
  card.replaceChildren(...parts);
}

function follow(id) {
  const known = jobs.get(id);
  if (known.events || known.job.status === "completed" || known.job.status === "failed") return;
  known.events = new EventSource(`v1/videos/${id}/events`);
  known.events.addEventListener("video", (event) => {
    known.job = JSON.parse(event.data);
    draw(id);
    if (known.job.status === "completed" || known.job.status === "failed") {
      known.events.close();
      known.events = null;
    }
  });
}

async function remove(id) {
  const answer = await ask(`v1/videos/${id}`, { method: "DELETE" });
  if (!answer.deleted) return;
  jobs.get(id).card.remove();
  jobs.delete(id);
  $("none").hidden = jobs.size > 0;
}

async function again(job) {
  const settings = job.request;
  $("model").value = job.model;
  showModel();
  const name =
    settings.camera ? "camera" : settings.trajectory ? "trajectory" : settings.control ? "control"
    : settings.mask ? "inpaint" : settings.video ? "video" : settings.image || settings.end_image ? "image" : "text";
  if ($(`way_${name}`)) $(`way_${name}`).checked = true;
  showWay();
  const files = new Set(offer.fields.filter((field) => field.kind === "file").map((field) => field.name));
  fill(Object.fromEntries(Object.entries(settings).filter(([key]) => !files.has(key) && key !== "lora")));
  for (const [name, weight] of settings.lora ?? []) {
    const input = document.querySelector(`#loras input[data-lora="${CSS.escape(name)}"]`);
    if (input) input.value = weight;
  }
  $("message").textContent = Object.keys(settings).some((key) => files.has(key)) ? say("files_again") : "";
  $("prompt").focus();
}

async function list(after) {
  const where = after ? `&after=${after}` : "";
  const page = await ask(`v1/videos?limit=${PAGE}${where}`);
  for (const job of page.data) show(job, false);
  $("older").hidden = !page.has_more;
  $("none").hidden = jobs.size > 0;
}

$("older").addEventListener("click", () => list([...jobs.keys()].at(-1)));
$("model").addEventListener("change", showModel);
$("language").addEventListener("change", translate);

async function start() {
  try {
    offer = await ask("v1/options");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if ($("login").hidden) $("message").textContent = error.message;
    return;
  }
  $("login").hidden = true;
  $("request").hidden = $("jobs").hidden = false;
  $("model").replaceChildren(
    ...offer.models.map((one) => element("option", { value: one.id, textContent: one.id })),
  );
  $("model_row").hidden = offer.models.length < 2;
  showModel();
  await list();
}

texts = await (await fetch("texts.json")).json();
const wanted = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
$("language").value = wanted in texts ? wanted : "en";
translate();
start();
