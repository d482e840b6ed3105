// Numbers to pictures: what was packed is unpacked, maps are coloured, patches are drawn.

// cividis, which rises in brightness alone: colour-blind people and grey printers read it.
const STOPS = [
  [0, 34, 78], [0, 46, 106], [26, 56, 111], [50, 67, 109], [67, 78, 108], [83, 90, 109], [97, 101, 111], [111, 112, 115],
  [125, 124, 120], [140, 136, 120], [155, 148, 118], [171, 160, 114], [188, 174, 108], [205, 187, 99], [222, 201, 88],
  [240, 216, 70], [254, 232, 56],
];

/** Returns [red, green, blue] for a share from 0 to 1. */
export function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((value, i) => Math.round(value + (at - low) * (STOPS[low + 1][i] - value)));
}

function decodeBytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** Rows of numbers packed in bytes, each row on its own scale: an array of any shape, read row by row. */
export class Rows {
  constructor({ shape, data, scales }) {
    this.shape = shape;
    this.length = shape[shape.length - 1];
    this.bytes = decodeBytes(data);
    const raw = decodeBytes(scales);
    const view = new DataView(raw.buffer);
    this.scales = Float32Array.from({ length: raw.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  }

  /** Returns a row as numbers. */
  row(index) {
    const scale = this.scales[index] / 255;
    return Float32Array.from(this.bytes.subarray(index * this.length, (index + 1) * this.length), (byte) => byte * scale);
  }

  /** Returns the sum of weights[i] * row(first + i). */
  weigh(first, weights) {
    const sum = new Float32Array(this.length);
    weights.forEach((weight, i) => {
      if (weight) this.row(first + i).forEach((value, j) => { sum[j] += weight * value; });
    });
    return sum;
  }
}

/** Similarities in bytes between one low and one high. */
export class Grid {
  constructor({ shape, data, low, high }) {
    this.length = shape[1];
    this.bytes = decodeBytes(data);
    this.low = low;
    this.step = (high - low) / 255;
  }

  row(index) {
    const codes = this.bytes.subarray(index * this.length, (index + 1) * this.length);
    return Float32Array.from(codes, (byte) => this.low + this.step * byte);
  }
}

/** Returns the indices of the largest values, largest first. */
export function largest(values, count) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a]).slice(0, count);
}

/** Returns the lowest and the highest value, 0 within unless `isFree`. */
export function findRange(values, isFree = false) {
  let low = isFree ? Infinity : 0;
  let high = isFree ? -Infinity : 0;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

/** Draws a map as a thumbnail, a pixel a patch. */
export function drawThumbnail(canvas, values, [rows, columns], [low, high] = findRange(values)) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  values.forEach((value, i) => pixels.data.set([...colour((value - low) / (high - low || 1)), 255], 4 * i));
  context.putImageData(pixels, 0, 0);
}

/** The image that entered the model: its pixels, in colours and in grey, and its patches' places. */
export class Picture {
  static async load(url, model) {
    const image = new Image();
    image.src = url;
    await image.decode();
    return new Picture(image, model);
  }

  constructor(image, model) {
    [this.height, this.width] = [image.naturalHeight, image.naturalWidth];
    this.grid = model.grid;
    [this.tops, this.lefts] = model.edges;
    this.colours = this.copy(image);
    this.grey = this.copy(image);
    const context = this.grey.getContext("2d");
    const pixels = context.getImageData(0, 0, this.width, this.height);
    this.data = pixels.data.slice();
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [red, green, blue] = this.data.subarray(i, i + 3);
      pixels.data.fill(Math.round(0.299 * red + 0.587 * green + 0.114 * blue), i, i + 3);
    }
    context.putImageData(pixels, 0, 0);
  }

  copy(image) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.width, this.height];
    canvas.getContext("2d", { willReadFrequently: true }).drawImage(image, 0, 0);
    return canvas;
  }

  /** Whether its pixels should be seen as such when enlarged. */
  get isSmall() {
    return Math.max(this.width, this.height) < 128;
  }

  /** Returns [left, top, width, height] of a patch's cell, in pixels of the image. */
  cell(patch) {
    const [row, column] = this.place(patch);
    const [left, top] = [this.lefts[column], this.tops[row]];
    return [left, top, this.lefts[column + 1] - left, this.tops[row + 1] - top];
  }

  /** Returns [row, column] of a patch. */
  place(patch) {
    return [Math.floor(patch / this.grid[1]), patch % this.grid[1]];
  }

  /** Returns the mean [red, green, blue] of a patch's cell, 0 to 255. */
  meanColour(patch) {
    const [left, top, width, height] = this.cell(patch);
    const sum = [0, 0, 0];
    for (let y = top; y < top + height; y += 1) {
      for (let x = left; x < left + width; x += 1) {
        for (let c = 0; c < 3; c += 1) sum[c] += this.data[4 * (y * this.width + x) + c];
      }
    }
    return sum.map((value) => value / (width * height));
  }

  /** Returns a canvas's context, sized for its place on the page and the screen's pixels, in units of the image's. */
  prepare(canvas, margin = 0) {
    const width = canvas.clientWidth || 320;
    const scale = (width * Math.min(window.devicePixelRatio || 1, 3)) / (this.width + margin);
    canvas.width = Math.round((this.width + margin) * scale);
    canvas.height = Math.round((this.height + margin) * scale);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = !this.isSmall;
    context.imageSmoothingQuality = "high";
    return [context, canvas.width / (this.width + margin)];
  }

  /** Draws a map over the image in grey, and a frame around one patch. */
  drawMap(canvas, values, [low, high], opacity, patch) {
    const [context, scale] = this.prepare(canvas);
    context.drawImage(values ? this.grey : this.colours, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = opacity;
    values?.forEach((value, i) => {
      context.fillStyle = `rgb(${colour((value - low) / (high - low || 1)).join(" ")})`;
      const [left, top, width, height] = this.cell(i).map((x) => x * scale);
      context.fillRect(Math.floor(left), Math.floor(top), Math.ceil(left + width) - Math.floor(left), Math.ceil(top + height) - Math.floor(top));
    });
    context.globalAlpha = 1;
    if (patch !== null) frame(context, this.cell(patch).map((x) => x * scale));
  }

  /** Draws the patches pulled apart, `apart` from 0 to 1. */
  drawExploded(canvas, apart, patch) {
    const [rows, columns] = this.grid;
    const full = 0.22 * Math.min(this.width / columns, this.height / rows);
    const margin = full * Math.max(columns, rows);
    const [context, scale] = this.prepare(canvas, margin);
    const gap = full * apart;
    const start = [(margin - gap * (columns - 1)) / 2, (margin - gap * (rows - 1)) / 2];
    for (let i = 0; i < rows * columns; i += 1) {
      const [row, column] = this.place(i);
      const source = this.cell(i);
      const target = [start[0] + source[0] + gap * column, start[1] + source[1] + gap * row, source[2], source[3]].map((x) => x * scale);
      context.drawImage(this.colours, ...source, ...target);
      if (i === patch) frame(context, target);
    }
    canvas.dataset.margin = margin;
  }

  /** Draws one patch alone, its pixels as squares. */
  drawPatch(canvas, patch) {
    const source = this.cell(patch);
    const width = Math.round((canvas.clientWidth || 144) * (window.devicePixelRatio || 1));
    [canvas.width, canvas.height] = [width, Math.round((width * source[3]) / source[2])];
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(this.colours, ...source, 0, 0, canvas.width, canvas.height);
  }

  /** Returns the patch below a pointer, or null. */
  find(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const margin = Number(canvas.dataset.margin || 0);
    const across = (edges, share, count) => {
      const total = edges[edges.length - 1];
      const at = share * (total + margin);
      const gap = margin / Math.max(this.grid[0], this.grid[1]);
      const start = (margin - gap * (count - 1)) / 2;
      for (let i = 0; i < count; i += 1) if (at < start + edges[i + 1] + gap * (i + 0.5)) return i;
      return count - 1;
    };
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (x < 0 || x >= 1 || y < 0 || y >= 1) return null;
    return across(this.tops, y, this.grid[0]) * this.grid[1] + across(this.lefts, x, this.grid[1]);
  }
}

/** Frames a box, in white and black: one of them is seen on any colour. */
function frame(context, [left, top, width, height]) {
  const line = Math.max(2, context.canvas.width / 220);
  for (const [style, thickness] of [["#000", 2 * line], ["#fff", line]]) {
    context.strokeStyle = style;
    context.lineWidth = thickness;
    context.strokeRect(left, top, width, height);
  }
}
