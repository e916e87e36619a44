// Choose an image, ask, show the answer as it streams, and draw its boxes on the image. No library.

const $ = (id) => document.getElementById(id);
const COLORS = ["#ffd33d", "#4cc2ff", "#ff8fd0"];
const SHORT = " Answer the question using a single word or phrase.";
const STEP = 0.02; // share of the image by which a key moves the box that is being drawn
const NS = "http://www.w3.org/2000/svg";
let image = null; // {url: what is sent, name, width, height}
let answers = []; // {model, question, text, boxes}
let drawn = null; // the box that is being drawn: {x1, y1, x2, y2} as shares of the image
let draws = false;
let asking = null;
let chosen = 0; // counts what was chosen: the last one is shown, whichever comes first

function svg(name, attributes, text) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function trouble(text) {
  $("trouble").textContent = text;
}

// ---- the image

const read = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

const sides = (url) => new Promise((resolve, reject) => {
  const probe = new Image();
  probe.onload = () => resolve([probe.naturalWidth, probe.naturalHeight]);
  probe.onerror = () => reject(new Error("the browser does not know this format"));
  probe.src = url;
});

async function choose(blob, name) {
  const mine = ++chosen;
  trouble("");
  try {
    const url = await read(await blob);
    let shown = url, width, height;
    try {
      [width, height] = await sides(url);
    } catch { // a GeoTIFF: the server shows it
      const answer = await fetch("preview", { method: "POST", headers: headers(), body: await blob });
      if (!answer.ok) throw new Error(await reason(answer));
      shown = await read(await answer.blob());
      [width, height] = [Number(answer.headers.get("x-width")), Number(answer.headers.get("x-height"))];
    }
    if (mine !== chosen) return;
    image = { url, name, width, height };
    answers = [];
    drawn = null;
    const view = $("view");
    view.replaceChildren(svg("image", { href: shown, width, height, preserveAspectRatio: "none" }), svg("g", { id: "boxes" }),
      svg("g", { id: "drawn" }));
    view.setAttribute("viewBox", `0 0 ${width} ${height}`);
    view.setAttribute("aria-label", `${name}, ${width} x ${height} pixels`);
    view.removeAttribute("hidden");
    $("empty").hidden = true;
    $("about").replaceChildren(`${name}, ${width} × ${height} pixels `, another());
    setDraws(draws);
  } catch (error) {
    if (mine === chosen) trouble(`${name}: ${error.message}`);
  }
}

function another() {
  const label = document.createElement("label");
  label.htmlFor = "file";
  label.className = "button";
  label.textContent = "another file";
  label.style.display = "inline-block";
  return label;
}

$("file").addEventListener("change", () => {
  const file = $("file").files[0];
  $("file").value = ""; // or the same file could not be chosen again
  if (file) choose(file, file.name);
});
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) choose(file, file.name);
});
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (file) choose(file, file.name || "pasted image");
});

// ---- boxes

function show() {
  const group = $("boxes");
  if (!group) return;
  group.replaceChildren();
  const size = Math.max(image.width, image.height) / 34;
  answers.forEach(({ model, boxes }, at) => {
    for (const { label, polygon } of boxes) {
      const shape = svg("polygon", { points: polygon.map((p) => p.join(",")).join(" "), stroke: COLORS[at % COLORS.length] });
      shape.append(svg("title", {}, `${model}: ${label || "box"}`));
      group.append(shape);
      const down = at % 2; // the second model's labels stand below its boxes
      const [x, y] = polygon.reduce((a, b) => ((b[1] < a[1]) !== Boolean(down) ? b : a));
      const line = Math.min(Math.max(down ? y + size : y - size / 3, size), image.height - size / 3);
      if (label) group.append(svg("text", { x, y: line, "font-size": size, fill: COLORS[at % COLORS.length] }, label));
    }
  });
  const box = $("drawn");
  box.replaceChildren();
  if (drawn) {
    const [x, y] = [Math.min(drawn.x1, drawn.x2) * image.width, Math.min(drawn.y1, drawn.y2) * image.height];
    const [w, h] = [Math.abs(drawn.x2 - drawn.x1) * image.width, Math.abs(drawn.y2 - drawn.y1) * image.height];
    box.append(svg("rect", { x, y, width: w, height: h, stroke: "#fff", "stroke-dasharray": "6 4" }));
  }
  $("copies").hidden = !answers.some((answer) => answer.text);
}

function setDraws(on) {
  draws = on;
  $("view").classList.toggle("draws", on);
  $("hint").hidden = !on;
  document.querySelector("[data-task=identify]").setAttribute("aria-pressed", on);
  if (on && !drawn) drawn = { x1: 0.35, y1: 0.35, x2: 0.65, y2: 0.65 };
  if (!on) drawn = null;
  if (image) show();
  if (on) $("view").focus();
}

function where(event) { // as shares of the image, which may not fill the element
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform($("view").getScreenCTM().inverse());
  const clip = (value) => Math.min(1, Math.max(0, value));
  return [clip(at.x / image.width), clip(at.y / image.height)];
}

$("view").addEventListener("pointerdown", (event) => {
  if (!draws) return;
  $("view").setPointerCapture(event.pointerId);
  const [x, y] = where(event);
  drawn = { x1: x, y1: y, x2: x, y2: y };
});
$("view").addEventListener("pointermove", (event) => {
  if (!draws || !event.buttons || !drawn) return;
  [drawn.x2, drawn.y2] = where(event);
  show();
});
$("view").addEventListener("pointerup", () => {
  if (draws && drawn && drawn.x1 !== drawn.x2) identify();
});
$("view").addEventListener("keydown", (event) => {
  const ways = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
  if (!draws || !drawn) return;
  if (event.key === "Enter") return identify();
  if (event.key === "Escape") return setDraws(false);
  const way = ways[event.key];
  if (!way) return;
  event.preventDefault();
  const corners = event.shiftKey ? ["2"] : ["1", "2"];
  for (const [axis, step] of [["x", way[0]], ["y", way[1]]]) { // as far as the first corner can go: the box keeps its shape
    const values = corners.map((corner) => drawn[axis + corner]);
    const room = Math.min(Math.max(step, -Math.min(...values)), 1 - Math.max(...values));
    for (const corner of corners) drawn[axis + corner] += room;
  }
  show();
});

const SMALLEST = 0.01; // of the image's sides: less is a click

function identify() {
  if (Math.abs(drawn.x2 - drawn.x1) < SMALLEST || Math.abs(drawn.y2 - drawn.y1) < SMALLEST) {
    return trouble("Draw a larger box: drag with the pointer, or hold Shift with the arrow keys.");
  }
  const percent = (value) => Math.round(100 * value);
  const [x1, x2] = [drawn.x1, drawn.x2].sort((a, b) => a - b).map(percent);
  const [y1, y2] = [drawn.y1, drawn.y2].sort((a, b) => a - b).map(percent);
  put(`[identify] what is at {<${x1}><${y1}><${x2}><${y2}>|<0>}?`);
}

// ---- questions

function put(question) {
  $("question").value = question;
  ask();
}

for (const button of document.querySelectorAll("[data-task]")) {
  button.addEventListener("click", () => {
    const task = button.dataset.task;
    if (!image) return trouble("Choose an image first: drop one, or take a sample.");
    if (task === "identify") return setDraws(!draws);
    setDraws(false);
    if (task === "classify") put("What is the class of this scene?" + SHORT);
    if (task === "describe") put("Describe the image in detail.");
    if (task === "find") {
      const box = $("question");
      box.value = "[refer] where is <p>building</p>?";
      box.focus();
      box.setSelectionRange(box.value.indexOf(">") + 1, box.value.indexOf("</p>"));
    }
  });
}
$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); ask(); }
});
$("stop").addEventListener("click", () => asking && asking.abort());

function headers() {
  const token = $("token").value;
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function reason(answer) {
  if (answer.status === 401) $("token-row").hidden = false;
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

async function ask() {
  const question = $("question").value.trim();
  trouble("");
  if (!image) return trouble("Choose an image first: drop one, or take a sample.");
  if (!question) return trouble("Write a question, or take one of the tasks.");
  await ready;
  const models = [...document.querySelectorAll("#models input:checked")].map((box) => box.value);
  if (!models.length) return $("trouble").textContent || trouble("Choose a model."); // why there are none may stand there
  if (asking) asking.abort();
  const mine = (asking = new AbortController());
  answers = models.map((model) => ({ model, question, text: "", boxes: [] }));
  $("answers").replaceChildren(...answers.map((answer, at) => card(answer, at)));
  $("stop").hidden = false;
  show();
  await Promise.all(answers.map((answer) => write(answer, mine.signal)));
  if (asking === mine) {
    asking = null;
    $("stop").hidden = true;
  }
}

function readable(text) { // the boxes are on the image, and as numbers in the copies
  return text.replace(/<\/?p>/g, "").replace(/<delim>/g, " ").replace(/\{<[^}]*>\}/g, "▭");
}

function card({ model }, at) {
  const node = document.createElement("article");
  node.className = "card answer writes";
  const head = document.createElement("h3");
  const key = document.createElement("i");
  key.style.borderColor = COLORS[at % COLORS.length];
  head.append(key, model);
  node.append(head, document.createElement("p"));
  return node;
}

async function write(answer, signal) {
  const node = $("answers").children[answers.indexOf(answer)];
  const text = node.querySelector("p");
  const content = [{ type: "image_url", image_url: { url: image.url } }, { type: "text", text: answer.question }];
  const body = { model: answer.model, stream: true, messages: [{ role: "user", content }] };
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST", signal, headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(body),
    });
    if (!reply.ok) throw new Error(await reason(reply));
    for await (const piece of events(reply)) {
      if (piece.error) throw new Error(piece.error.message);
      const delta = piece.choices[0].delta;
      answer.text += delta.content || "";
      text.textContent = readable(answer.text);
      if (delta.boxes) answer.boxes = delta.boxes;
    }
    if (!answer.text) text.textContent = "(no words)";
  } catch (error) {
    if (error.name !== "AbortError") trouble(error.message);
  }
  node.classList.remove("writes");
  show();
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// ---- copies

async function copy(value, what) {
  const text = JSON.stringify(value, null, 1);
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without https: select what there is to copy
    const box = document.createElement("textarea");
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  $("copied").textContent = `${what} copied`;
}

function json() {
  return { image: image.name, width: image.width, height: image.height, answers };
}

function geojson() { // pixels of the image, x to the right and y down: it has no place on the earth here
  const features = answers.flatMap(({ model, question, boxes }) => boxes.map(({ label, polygon, angle }) => ({
    type: "Feature",
    properties: { image: image.name, model, question, label, angle },
    geometry: { type: "Polygon", coordinates: [[...polygon, polygon[0]]] },
  })));
  return { type: "FeatureCollection", features };
}

$("copy-json").addEventListener("click", () => copy(json(), "JSON"));
$("copy-geojson").addEventListener("click", () => copy(geojson(), "GeoJSON"));

// ---- what the server has

async function begin() {
  const samples = await (await fetch("samples")).json();
  $("samples").replaceChildren(...samples.map(({ name, url }) => {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    button.type = "button";
    button.title = name;
    [picture.src, picture.alt] = [url, name];
    button.append(picture);
    button.addEventListener("click", () => choose(fetch(url).then((answer) => answer.blob()), `${name}.png`));
    return button;
  }));
  await models();
}

async function models() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (!answer.ok) return trouble(await reason(answer));
  const found = (await answer.json()).data;
  $("models").append(...found.map(({ id }, at) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    [box.type, box.value, box.checked] = ["checkbox", id, at === 0 || found.length < 3];
    label.append(box, id);
    return label;
  }));
}

let ready = begin().catch((error) => trouble(error.message)); // `ask` waits for it
$("token").addEventListener("change", () => {
  trouble("");
  ready = ready.then(() => $("models").querySelector("input") || models()).catch((error) => trouble(error.message));
});
