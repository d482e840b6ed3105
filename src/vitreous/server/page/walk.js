// From pixels to the answer, step by step, in words and with the numbers of one image.

import { drawThumbnail, largest } from "./drawing.js";

const SVG = "http://www.w3.org/2000/svg";

/** Returns an element with attributes, classes and children; text is never read as HTML. */
export function create(name, { className, ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Returns a share in words: 12.3%. */
export function percent(share) {
  if (share > 0 && share < 0.0005) return "<0.1%";
  return `${(100 * share).toFixed(1)}%`;
}

/** Returns a number of three digits. */
export function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(1);
  return Number(value.toPrecision(3)).toString();
}

export function setShare(element, share) {
  element.style.setProperty("--share", Math.min(1, Math.max(0, share)));
  return element;
}

/** Writes what is known of the model and the image into the text. */
export function fillFacts(look) {
  const { model } = look;
  const [rows, columns] = model.grid;
  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
  const facts = {
    num_blocks: model.num_blocks,
    heads_times: model.num_heads === 1 ? "once" : `${model.num_heads} times over (heads)`,
    num_heads: model.num_heads,
    num_patches: rows * columns,
    num_values: model.patch_size[0] * model.patch_size[1] * model.num_channels * (model.stem === "shifted" ? 5 : 1),
    num_classes: model.classes.length.toLocaleString("en"),
    image_size: `${model.image_size[0]} × ${model.image_size[1]} pixels`,
    patch_size: `${model.patch_size[0]} × ${model.patch_size[1]}`,
    grid: `${rows} × ${columns}`,
    projection_dim: model.projection_dim,
    mlp_dim: model.mlp_dim,
    temperature: short(model.temperature),
    prefix: describePrefix(model.prefix_tokens),
  };
  for (const [key, value] of Object.entries(facts)) fill(key, value);
  const kind = look.positions?.kind;
  const holds = {
    "learned-positions": kind === "learned",
    "given-positions": kind !== "learned",
    linear: model.stem !== "convolution",
    shifted: model.stem === "shifted",
    stem: model.stem === "convolution",
    "added-positions": kind === "learned" || kind === "sincos",
    rotary: kind === "rotary",
    prefix: model.prefix_tokens.length > 0,
    head: look.predictions.length > 0,
    softmax: !model.is_multi_label,
    sigmoid: model.is_multi_label,
    temperature: model.temperature !== 1,
    "pool-class": model.pooling === "class",
    "pool-mean": model.pooling === "mean",
    "pool-class_mean": model.pooling === "class_mean",
    "pool-map": model.pooling === "map",
  };
  for (const element of document.querySelectorAll("[data-if]")) element.hidden = !holds[element.dataset.if];
  document.getElementById("facts").textContent = [
    model.name,
    `${model.num_blocks} × ${model.num_heads} attention heads`,
    count(rows * columns, "patch").replace("patchs", "patches"),
    `${short(model.num_parameters / 1e6)} million parameters`,
    ...(model.classes.length ? [count(model.classes.length, "class").replace("classs", "classes")] : []),
  ].join(" · ");
}

function fill(key, value) {
  for (const element of document.querySelectorAll(`[data-fill="${key}"]`)) element.textContent = value;
}

function describePrefix(names) {
  const counts = new Map();
  for (const name of names) counts.set(name, (counts.get(name) ?? 0) + 1);
  const words = [...counts].map(([name, count]) =>
    name === "register" ? `${count} register${count > 1 ? "s" : ""} (scratch paper)` : `the ${name} token`);
  return words.join(", ");
}

/** Shows what does not depend on the patch. */
export function showWalk(look) {
  const { model, walk } = look;
  const length = model.projection_dim * (model.pooling === "class_mean" ? 2 : 1);
  const strip = createStrip("What is read", walk.pooled, findMost([walk.pooled]), countRest(length, walk.pooled));
  document.getElementById("pooled").replaceChildren(strip);
  if (look.predictions.length) {
    showChart(look);
    showAnswers(look);
    showSoftmax(look);
  }
}

/** Shows what becomes of one patch. `attend(block)` gives its attention in a block, a number for each token. */
export function showPatch(look, picture, patch, attend) {
  const { model, walk } = look;
  const [row, column] = picture.place(patch);
  const mean = picture.meanColour(patch).slice(0, model.num_channels);
  const normal = mean.map((value, i) => (value / 255 - model.mean[i]) / model.std[i]);
  const names = model.num_channels === 3 ? ["red", "green", "blue"] : ["grey"];
  fill("patch_place", `row ${row}, column ${column}`);
  fill("patch_values", `${model.patch_size.join(" × ")} pixels of ${model.num_channels === 3 ? "3 colours" : "grey"}`
    + ` = ${model.patch_size[0] * model.patch_size[1] * model.num_channels} numbers`);
  fill("patch_colour", mean.map((value, i) => `${names[i]} ${Math.round(value)}`).join(", "));
  fill("patch_normal", normal.map((value) => value.toFixed(2)).join(", "));
  picture.drawPatch(document.getElementById("zoom"), patch);
  document.getElementById("zoom").setAttribute("aria-label", `The patch in row ${row}, column ${column}`);

  const projected = walk.projected[patch];
  const position = walk.position?.[patch];
  const sum = position && projected.map((value, i) => value + position[i]);
  const most = findMost([projected, ...(position ? [position, sum] : [])]);
  const more = countRest(model.projection_dim, projected);
  const strips = [createStrip(position ? "Projected" : "Token", projected, most, more)];
  if (position) strips.push(createStrip("+ position", position, most, more), createStrip("= token", sum, most, more));
  document.getElementById("tokens").replaceChildren(...strips);
  showBlocks(look, picture, patch, attend);
}

/** Says how many numbers of a list are not shown. */
function countRest(length, shown) {
  return length > shown.length ? `… ${length - shown.length} more` : "";
}

function findMost(lists) {
  return Math.max(...lists.flat().map(Math.abs)) || 1;
}

/** Returns a row of numbers as colours: orange above 0, purple below. */
function createStrip(label, values, most, more) {
  const written = values.map((value) => value.toFixed(Math.abs(value) < 10 ? 1 : 0).replace(/^-(?=0\.?0*$)/, ""));
  const strip = create("div", { className: "strip", role: "img", "aria-label": `${label}: ${values.map(short).join(", ")} ${more}` },
    create("span", { className: "label" }, label));
  values.forEach((value, i) => {
    const cell = create("i", { className: value < 0 ? "is-minus" : "is-plus", title: short(value) }, written[i]);
    cell.style.setProperty("--much", Math.abs(value) / most);
    strip.append(cell);
  });
  strip.append(create("span", { className: "sign" }, more));
  return strip;
}

function showBlocks(look, picture, patch, attend) {
  const { model, walk } = look;
  const prefix = model.prefix_tokens;
  const name = (token) => {
    if (token < prefix.length) return `the ${prefix[token]} token`;
    if (token - prefix.length === patch) return "itself";
    const [row, column] = picture.place(token - prefix.length);
    return `row ${row}, column ${column}`;
  };
  const most = Math.max(...walk.blocks.flatMap((block) => [block.attention, block.mlp]));
  const cell = (value, className) => create("td", {}, create("div", { className: "with-bar" },
    setShare(create("span", { className }), value / most), create("span", {}, `${(100 * value).toFixed(0)}%`)));
  const rows = walk.blocks.map((block, index) => {
    const weights = attend(index);
    const looks = create("div", { className: "looks" });
    if (weights) {
      const canvas = create("canvas", { "aria-hidden": "true" });
      drawThumbnail(canvas, weights.subarray(prefix.length), model.grid);
      looks.append(canvas, largest(weights, 2).map((token) => `${name(token)} (${percent(weights[token])})`).join("; "));
    }
    return create("tr", {}, create("th", { scope: "row" }, String(index)), cell(block.attention, "bar"),
      cell(block.mlp, "bar is-second"), create("td", {}, looks));
  });
  document.querySelector("#blocks tbody").replaceChildren(...rows);
}

function showAnswers({ walk, predictions }) {
  const head = create("tr", {}, create("th", { scope: "col" }, "After"), ...predictions.map((each) => create("th", { scope: "col" }, each.class)));
  const rows = walk.answers.map((shares, index) => create("tr", {},
    create("th", { scope: "row" }, index ? `block ${index - 1}` : "start"), ...shares.map((share) => create("td", {}, percent(share)))));
  document.getElementById("answers").replaceChildren(create("thead", {}, head), create("tbody", {}, ...rows));
}

function draw(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Draws how probable the first three classes are after each block. */
function showChart({ walk, predictions }) {
  const place = document.getElementById("chart");
  const width = Math.min(Math.max(place.clientWidth, 280), 640); // one unit a pixel: text is as large as elsewhere
  const [left, right, top, height] = [44, width < 480 ? 112 : 150, 12, 230];
  const steps = walk.answers.length - 1;
  const x = (index) => left + (index / steps) * (width - left - right);
  const y = (share) => top + (1 - share) * (height - top - 34);
  const shown = predictions.slice(0, 3);
  const words = shown.map((each, i) => `${each.class} from ${percent(walk.answers[0][i])} to ${percent(each.probability)}`);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Probability after each block: ${words.join(", ")}.` });
  for (const share of [0, 0.5, 1]) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: y(share), y2: y(share) }),
      draw("text", { class: "tick", x: left - 8, y: y(share) + 4, "text-anchor": "end" }, `${100 * share}%`));
  }
  const every = Math.ceil((steps * 24) / (width - left - right));
  for (let i = 0; i <= steps; i += every) {
    svg.append(draw("text", { class: "tick", x: x(i), y: height - 16, "text-anchor": "middle" }, i ? String(i - 1) : "start"));
  }
  svg.append(draw("text", { class: "tick", x: (left + width - right) / 2, y: height - 1, "text-anchor": "middle" }, "after block"));
  let lowest = Infinity;
  const labels = shown.map((each, i) => ({ i, at: y(walk.answers[steps][i]), text: `${cut(each.class, width < 480 ? 8 : 14)} ${percent(each.probability)}` }));
  for (const label of labels.sort((a, b) => b.at - a.at)) {  // from the bottom up, each with room for itself
    label.at = Math.min(label.at, lowest - 16);
    lowest = label.at;
  }
  for (const { i, at, text } of labels) {
    const points = walk.answers.map((shares, step) => `${x(step).toFixed(1)} ${y(shares[i]).toFixed(1)}`);
    svg.append(draw("path", { class: `line-${i}`, d: `M${points.join("L")}` }),
      draw("text", { x: width - right + 8, y: at + 4 }, text));
  }
  place.replaceChildren(svg);
}

export function cut(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

function showSoftmax(look) {
  const { model, predictions } = look;
  const isWarm = model.temperature !== 1;
  const scaled = predictions.map((each) => each.logit / model.temperature);
  const columns = ["Class", "Score", ...(isWarm ? [`÷ ${short(model.temperature)}`] : []), ...(model.is_multi_label ? [] : ["e to its power"]), "Probability"];
  const rows = predictions.map((each, i) => [each.class, short(each.logit), ...(isWarm ? [short(scaled[i])] : []),
    ...(model.is_multi_label ? [] : [short(Math.exp(scaled[i]))]), percent(each.probability)]);
  if (!model.is_multi_label) {
    const blank = Array(isWarm ? 2 : 1).fill("");
    const listed = scaled.reduce((sum, value) => sum + Math.exp(value), 0);
    const total = Math.exp(look.log_sum);
    if (model.classes.length > predictions.length) {
      rows.push([`${model.classes.length - predictions.length} others`, ...blank, short(Math.max(0, total - listed)), percent(look.other)]);
    }
    rows.push(["Sum", ...blank, short(total), "100%"]);
  }
  document.getElementById("softmax").replaceChildren(
    create("thead", {}, create("tr", {}, ...columns.map((text) => create("th", { scope: "col" }, text)))),
    create("tbody", {}, ...rows.map(([first, ...cells]) =>
      create("tr", {}, create("th", { scope: "row" }, first), ...cells.map((text) => create("td", {}, text))))));
}
