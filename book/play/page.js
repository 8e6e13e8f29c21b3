// The controls of the page, and what is seen of a drawing.

const find = (name) => document.getElementById(`play-${name}`);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let working = false; // whether something is being drawn
const waiting = new Map(); // of each request, what to do with its messages
const canvases = {}; // of each figure, what it shows

const value = (name) => Number(find(name).value);
const say = (text) => find("status").textContent = text;

/** Enable the buttons that can be pressed now. */
function buttons() {
  const erased = Object.values(canvases).some((figure) => figure.erased.size);
  for (const name of ["draw", "pixels-draw"]) find(name).disabled = working;
  find("repaint").disabled = working || !erased;
  find("cancel").disabled = !working;
}

/** Have the worker draw; `show` sees each step. Null if it was cancelled. */
function ask(request, show) {
  const id = crypto.randomUUID?.() ?? String(Math.random());
  return new Promise((resolve, reject) => {
    waiting.set(id, (message) => {
      if (message.type === "step") return show(message);
      waiting.delete(id);
      if (message.type === "error") reject(new Error(message.message));
      else resolve(message.tokens ? message : null);
    });
    worker.postMessage({ id, ...request });
  });
}
worker.onmessage = ({ data }) => waiting.get(data.id)?.(data);
worker.onerror = () => say("The drawing cannot start: build the book again.");

/** A figure: an image, its tokens, what was known of each, and which are erased. */
class Figure {
  constructor(name) {
    Object.assign(this, { name, canvas: find(name), note: find(`${name}-note`) });
    this.context = this.canvas.getContext("2d");
    this.clear(1);
  }

  clear(side) {
    Object.assign(this, { side, tokens: [], chosen: new Map(), erased: new Set() });
    this.cursor = 0;
    this.paint("#808080");
    this.image = null;
  }

  paint(color) {
    this.context.fillStyle = color;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** Fill the square of a token. */
  fill(position, color) {
    const width = this.canvas.width / this.side;
    const x = position % this.side * width;
    const y = Math.floor(position / this.side) * width;
    this.context.fillStyle = color;
    this.context.fillRect(x, y, width, width);
  }

  step({ chosen }, colors) {
    for (const [position, choice] of chosen) {
      this.chosen.set(position, choice);
      this.fill(position, `rgb(${colors[choice.token]})`);
    }
  }

  finish({ tokens, image }) {
    Object.assign(this, { tokens, image, erased: new Set() });
    this.show();
  }

  /** The image, with gray squares where it is erased. */
  show() {
    const { rgba, width, height } = this.image;
    this.context.putImageData(new ImageData(rgba, width, height), 0, 0);
    for (const position of this.erased) this.fill(position, "#808080");
    buttons();
  }

  erase(position, on = true) {
    if (working || !this.image) return;
    this.erased[on ? "add" : "delete"](position);
    this.show();
  }

  /** Say of a token how likely it was, and what else could have stood there. */
  look(position) {
    this.cursor = position;
    const mark = find(`${this.name}-mark`), size = 100 / this.side;
    mark.style.cssText = `display: block; width: ${size}%; height: ${size}%;
      left: ${position % this.side * size}%;
      top: ${Math.floor(position / this.side) * size}%`;
    const found = this.chosen.get(position), rows = find("best");
    rows.replaceChildren();
    if (!found) return;
    const share = (p) => p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`;
    find("token").textContent = `Token ${found.token}, row ${
      Math.floor(position / this.side) + 1
    }, column ${position % this.side + 1}: drawn with ${share(found.probability)}.`;
    for (const [token, p] of found.best) {
      const row = rows.insertRow(), bar = document.createElement("meter");
      bar.max = found.best[0][1];
      bar.value = p;
      row.insertCell().textContent = token;
      row.insertCell().textContent = share(p);
      row.insertCell().append(bar);
      if (token === found.token) row.className = "play-drawn";
    }
  }

  /** Let a pointer and the keyboard look and erase. */
  listen() {
    let begun = null;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left, event.clientY - box.top].map((
        distance,
      ) =>
        Math.max(
          0,
          Math.min(this.side - 1, Math.floor(distance / box.width * this.side)),
        )
      );
      return y * this.side + x;
    };
    this.canvas.onpointerdown = (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.look(begun = at(event));
      this.erase(begun, !this.erased.has(begun));
    };
    this.canvas.onpointermove = (event) => {
      this.look(at(event));
      if (begun !== null && at(event) !== begun) this.erase(at(event));
    };
    this.canvas.onpointerup = this.canvas.onpointercancel = () => begun = null;
    this.canvas.onkeydown = (event) => {
      const move = {
        ArrowLeft: -1,
        ArrowRight: 1,
        ArrowUp: -this.side,
        ArrowDown: this.side,
      };
      const next = this.cursor + move[event.key];
      if (next >= 0 && next < this.side ** 2) this.look(next);
      else if (event.key === " ") {
        this.erase(this.cursor, !this.erased.has(this.cursor));
      }
      if (event.key in move || event.key === " ") event.preventDefault();
    };
  }
}

/** What both models of tokens are told. */
function options() {
  return {
    label: value("label"),
    guidance: value("guidance"),
    temperature: value("temperature"),
    topP: value("top-p"),
  };
}

/** One drawing after the other, with the buttons in the state that this needs. */
async function busy(work) {
  working = true;
  buttons();
  try {
    say(await work() ? "" : "Cancelled.");
  } catch (error) {
    say(`Nothing was drawn: ${error.message}.`);
  }
  working = false;
  buttons();
}

/** Have a model draw, or repaint, into a figure; whether it came to an end. */
async function run(figure, name, count, more) {
  const colors = await (await fetch(
    new URL(
      `models/vq-${count}/colors.json`,
      import.meta.url,
    ),
  )).json();
  const shown = name === "imagegpt" ? "ImageGPT" : "MaskGIT";
  say(`${shown} is drawing.`);
  figure.note.textContent = "";
  const before = new Map(figure.chosen);
  const done = await ask({
    name: `${name}-${count}`,
    decoder: `vq-${count}`,
    seed: value("seed"),
    options: { ...options(), ...more },
  }, (message) => figure.step(message, colors));
  if (!done) {
    figure.chosen = before;
    if (figure.image) figure.show();
    return false;
  }
  figure.finish(done);
  figure.note.textContent = `${shown}: tokens in ${done.seconds.toFixed(2)} s, ` +
    `image in ${done.decoding.toFixed(2)} s`;
  return true;
}

async function draw() {
  const count = value("tokens"), side = Math.sqrt(count);
  for (const name of ["imagegpt", "maskgit"]) canvases[name].clear(side);
  return await run(canvases.imagegpt, "imagegpt", count) &&
    await run(canvases.maskgit, "maskgit", count, { steps: value("steps") });
}

async function repaint() {
  for (const figure of [canvases.imagegpt, canvases.maskgit]) {
    if (!figure.erased.size) continue;
    const count = figure.side ** 2;
    const tokens = figure.tokens.map((token, n) => figure.erased.has(n) ? null : token);
    const more = { tokens, steps: value("steps") };
    if (!await run(figure, "maskgit", count, more)) return false;
  }
  return true;
}

/** An image of chapter 1's model, which continues from its first pixel. */
async function drawPixels() {
  const canvas = find("pixels"), context = canvas.getContext("2d");
  const [red, green, blue] = find("first").value.match(/\w\w/g)
    .map((pair) => parseInt(pair, 16) >> 4);
  context.fillStyle = "#808080";
  context.fillRect(0, 0, canvas.width, canvas.height);
  find("pixels-note").textContent = "";
  say("PixelGPT is drawing.");
  const done = await ask({
    name: "pixelgpt",
    seed: value("seed"),
    options: {
      first: (red << 8) | (green << 4) | blue,
      temperature: value("temperature"),
      topP: value("top-p"),
    },
  }, ({ colors }) => {
    for (const n of [0, colors.length - 1]) {
      context.fillStyle = `rgb(${colors[n]})`;
      context.fillRect(n % canvas.width, Math.floor(n / canvas.width), 1, 1);
    }
  });
  if (done) find("pixels-note").textContent = `PixelGPT: ${done.seconds.toFixed(2)} s`;
  return done !== null;
}

for (const name of ["imagegpt", "maskgit"]) {
  canvases[name] = new Figure(name);
  canvases[name].listen();
}
for (const slider of document.querySelectorAll(".play input[type=range]")) {
  const output = slider.parentElement.querySelector("output");
  slider.oninput = () => output.textContent = slider.value;
  slider.oninput();
}
find("draw").onclick = () => busy(draw);
find("repaint").onclick = () => busy(repaint);
find("pixels-draw").onclick = () => busy(drawPixels);
find("cancel").onclick = () => worker.postMessage({ cancel: true });
buttons();
say("");
