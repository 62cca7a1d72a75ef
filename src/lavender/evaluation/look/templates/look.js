"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const LONGEST = 240; // pixels of a drawn map
const byId = (id) => document.getElementById(id);
const state = { word: 0, layer: 0, head: 0, show: "own" };
const atlases = new Map();

async function valuesOf(atlas) {
  if (!atlases.has(atlas)) {
    const image = new Image();
    image.src = atlas.src;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    atlases.set(atlas, context.getImageData(0, 0, canvas.width, canvas.height));
  }
  return atlases.get(atlas);
}

/* The map of a word in the chosen layer and head, in shares of its attention: {rows, cols, cells}. */
async function mapOf(word) {
  const layers = data.layers, { layer, head } = state;
  const single = layer > 0 && head > 0;
  const atlas = single ? word.detail : word.summary;
  const tile = single ? (layer - 1) * data.heads + head - 1 : head > 0 ? layers + head : layer;
  const [rows, cols] = atlas.grid, pixels = await valuesOf(atlas);
  const x0 = (tile % atlas.columns) * cols, y0 = Math.floor(tile / atlas.columns) * rows;
  const cells = new Float64Array(rows * cols), scale = word.top[viewOf()] / 255;
  for (let row = 0; row < rows; row++)
    for (let col = 0; col < cols; col++)
      cells[row * cols + col] = scale * pixels.data[4 * ((y0 + row) * pixels.width + x0 + col)];
  return { rows, cols, cells };
}

function viewOf() {
  if (data.has_detail) return state.layer * (data.heads + 1) + state.head;
  return state.head > 0 ? data.layers + state.head : state.layer; // numbers of the means alone, as the tiles of a summary
}

/* Bilinear, with the centres of cells, as the still pictures of this page. */
function stretched(map, height, width) {
  const out = new Float64Array(height * width);
  const axis = (size, cells) => Array.from({ length: size }, (_, at) => {
    const place = Math.max(0, ((at + 0.5) * cells) / size - 0.5);
    const low = Math.min(Math.floor(place), cells - 1);
    return [low, Math.min(low + 1, cells - 1), place - low];
  });
  const down = axis(height, map.rows), across = axis(width, map.cols);
  down.forEach(([top, bottom, v], y) => across.forEach(([left, right, u], x) => {
    const at = (row, col) => map.cells[row * map.cols + col];
    out[y * width + x] = (1 - v) * ((1 - u) * at(top, left) + u * at(top, right)) + v * ((1 - u) * at(bottom, left) + u * at(bottom, right));
  }));
  return out;
}

function drawn(values, height, width, largest) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  values.forEach((value, index) => {
    const colour = 4 * (largest > 0 ? Math.round(255 * Math.min(1, Math.max(0, value) / largest)) : 0);
    for (let channel = 0; channel < 4; channel++) image.data[4 * index + channel] = data.palette[colour + channel];
  });
  context.putImageData(image, 0, 0);
  return canvas.toDataURL("image/png");
}

/* Shares are whole numbers of ten thousandths, so that both halves of this page round them in one way. */
function percent(share) {
  const tenths = Math.floor((share + 5) / 10);
  return tenths < 100 ? `${Math.floor(tenths / 10)}.${tenths % 10} %` : `${Math.floor((share + 50) / 100)} %`;
}

function placeOf(peak, [rows, cols] = data.grid) {
  const down = (Math.floor(peak / cols) + 0.5) / rows, across = ((peak % cols) + 0.5) / cols;
  const row = ["top", "middle", "bottom"][Math.floor(3 * down)], col = ["left", "centre", "right"][Math.floor(3 * across)];
  const whole = (share) => Math.floor(100 * share + 0.5);
  const name = row === "middle" && col === "centre" ? "centre" : `${row} ${col}`;
  return { left: 100 * across, top: 100 * down, text: `${name}, ${whole(across)} % from left and ${whole(down)} % from top` };
}

function factsOf(word) {
  const view = viewOf(), place = placeOf(word.peak[view]).text; // of the map itself, whatever is drawn
  const region = `${percent(word.region[view])}, on ${percent(word.area[view])} of the picture`;
  if (!data.layers) return [region, place, ...word.more];
  const placed = word.placed[view], on = word.on_picture[view];
  return [on - placed > 50 ? `${percent(on)}; ${percent(on - placed)} without a place` : percent(on), region, place];
}

function writeFacts(list, facts, level) {
  list.querySelectorAll("[data-fact]").forEach((fact, index) => {
    fact.querySelector(".value").textContent = facts[index];
    const bar = fact.querySelector(".level > span");
    if (bar) bar.style.width = `${level / 100}%`;
  });
}

const places = []; // of the maximum of each drawn map; null if nothing is drawn

function put(view, index, source) {
  const word = data.words[index], place = places[index], image = view.querySelector("img"), peak = view.querySelector(".peak");
  image.src = source;
  image.alt = `Map of “${word.word}”: ${place ? `highest ${place.text}` : "nothing exceeds the mean of the words"}`;
  peak.hidden = !place;
  if (!place) return;
  peak.style.left = `${place.left}%`;
  peak.style.top = `${place.top}%`;
}

let turn = 0;
async function render() {
  const mine = ++turn;
  const maps = await Promise.all(data.words.map(mapOf));
  if (mine !== turn) return; // a later choice came first
  const height = Math.max(1, Math.round(data.ratio > 1 ? LONGEST / data.ratio : LONGEST));
  const width = Math.max(1, Math.round(data.ratio > 1 ? LONGEST : LONGEST * data.ratio));
  const values = maps.map((map) => stretched(map, height, width));
  if (state.show === "particular") {
    const mean = values[0].map((_, index) => values.reduce((sum, one) => sum + one[index], 0) / values.length);
    values.forEach((one) => one.forEach((value, index) => (one[index] = Math.max(0, value - mean[index]))));
  }
  const tops = values.map((one) => one.reduce((most, value) => Math.max(most, value), 0));
  const common = Math.max(...tops);
  data.words.forEach((word, index) => {
    const source = drawn(values[index], height, width, state.show === "own" ? tops[index] : common);
    const card = document.querySelector(`[data-card="${index}"]`);
    const isParticular = state.show === "particular";
    places[index] = !isParticular ? placeOf(word.peak[viewOf()]) : tops[index] > 0 ? placeOf(values[index].indexOf(tops[index]), [height, width]) : null;
    put(card.querySelector(".view"), index, source);
    writeFacts(card, factsOf(word), data.layers ? word.on_picture[viewOf()] : 0);
  });
  choose(state.word, true);
}

function choose(index, says) {
  state.word = index;
  const word = data.words[index], source = document.querySelector(`[data-card="${index}"] img`).src;
  document.querySelectorAll(".word").forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.word) === index)));
  put(byId("large"), index, source);
  byId("chosen-word").textContent = word.word;
  const facts = factsOf(word);
  writeFacts(byId("chosen"), facts, data.layers ? word.on_picture[viewOf()] : 0);
  if (says) byId("status").textContent = `“${word.word}”: ${facts.join("; ")}`;
}

function controlChanged(event) {
  const select = event.target;
  if (select.id === "show") state.show = select.value;
  else state[select.id] = Number(select.value);
  if (!data.has_detail && state.layer > 0 && state.head > 0) { // maps of single heads did not fit: the other choice falls back to its mean
    const other = select.id === "layer" ? "head" : "layer";
    state[other] = 0;
    byId(other).value = "0";
  }
  render();
}

const buttons = [...document.querySelectorAll(".word")];
buttons.forEach((button, at) => {
  const index = Number(button.dataset.word);
  button.addEventListener("click", () => choose(index, true));
  button.addEventListener("mouseenter", () => choose(index, false));
  button.addEventListener("focus", () => choose(index, true));
  button.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    buttons[Math.min(buttons.length - 1, Math.max(0, to))].focus();
  });
});
document.querySelectorAll("#controls select").forEach((select) => select.addEventListener("change", controlChanged));
byId("controls").hidden = false;
byId("show").querySelector("[value=particular]").disabled = data.words.length < 2; // one word is its own mean
byId("keys").hidden = false;
