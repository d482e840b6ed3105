// One answer, looked at from inside: what is chosen, and everything that follows from it.

import { Grid, Picture, Rows, drawThumbnail, findRange, largest } from "./drawing.js";
import { create, cut, fillFacts, percent, setShare, short, showPatch, showWalk } from "./walk.js";

const FORMAT = 1;
const MEAN = -1; // in the place of a head: the mean over all

const at = (id) => document.getElementById(id);
const isStill = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;

export class View {
  /** `findRelevance(name)` fetches the relevance for one more class; null where nothing can be fetched. */
  constructor(findRelevance = null) {
    this.findRelevance = findRelevance;
    this.look = null;
    this.apart = 1;
    this.pickPatches(at("map"));
    this.pickPatches(at("exploded"));
    for (const radio of document.querySelectorAll('[name="mode"]')) {
      radio.addEventListener("change", () => { this.mode = radio.value; this.showMode(); });
    }
    at("strength").addEventListener("input", () => this.drawMap());
    at("class").addEventListener("change", () => this.chooseClass(at("class").value));
    at("sheet").addEventListener("keydown", (event) => this.moveInSheet(event));
    new ResizeObserver(() => this.fit()).observe(at("map"));
    window.addEventListener("beforeprint", () => this.fit());
  }

  /** Shows the answer to one image. */
  async show(look, name) {
    if (look.format !== FORMAT) {
      throw new Error(`This page reads answers of format ${FORMAT}. Received: format ${look.format}. Reload the page.`);
    }
    const picture = await Picture.load(look.image, look.model);
    this.look = look;
    this.picture = picture;
    this.prefix = look.model.prefix_tokens;
    this.attention = new Rows(look.attention);
    this.rollout = new Rows(look.rollout);
    this.positions = look.positions && new Grid(look.positions);
    this.heads = [...(look.attention.heads ?? []), MEAN];
    this.blocks = look.attention.blocks;
    this.block = this.blocks[this.blocks.length - 1];
    this.head = MEAN;
    this.mode = "attention";
    this.className = look.predictions[0]?.class ?? null;
    this.pinned = null;
    this.patch = null;
    this.readOut = new Map();
    for (const id of ["answer", "inside", "walk"]) at(id).hidden = false;
    fillFacts(look);
    this.showAnswer(name);
    this.fillClasses();
    this.makeSheet();
    this.makeClassSheet();
    showWalk(look);
    for (const radio of document.querySelectorAll('[name="mode"]')) {
      radio.checked = radio.value === this.mode;
      radio.disabled = (radio.value === "relevance" && !this.className) || (radio.value === "positions" && !this.positions);
    }
    this.showMode();
    this.explode();
  }

  // ----- the answer

  showAnswer(name) {
    const { look } = this;
    const [first] = look.predictions;
    const picture = at("picture");
    picture.src = look.image;
    picture.alt = first ? `What the model saw; it answers ${first.class}` : "What the model saw";
    picture.classList.toggle("pixels", this.picture.isSmall);
    at("picture-name").textContent = name ? `${cut(name, 60)}, as it enters the model` : "As it enters the model";
    const found = look.predictions.filter((each) => each.probability >= 0.5).map((each) => each.class);
    let verdict = "This model has no head: it gives features, no classes.";
    if (first && look.model.is_multi_label) verdict = found.length ? found.join(", ") : "None of its labels";
    else if (first) verdict = `${first.class}, ${percent(first.probability)}`;
    at("verdict").textContent = verdict + (look.is_sure === false ? " (not sure)" : "");
    at("bars").replaceChildren(...look.predictions.map((each) => {
      const button = create("button", { type: "button", title: `Show what speaks for ${each.class}` },
        create("span", { className: "name" }, each.class),
        create("span", { className: "number" }, percent(each.probability)),
        setShare(create("span", { className: "bar", "aria-hidden": "true" }), each.probability));
      button.addEventListener("click", () => {
        this.chooseMode("relevance");
        this.chooseClass(each.class);
        at("inside").scrollIntoView({ behavior: isStill() ? "auto" : "smooth" });
      });
      return create("li", {}, button);
    }));
    const others = look.model.classes.length - look.predictions.length;
    at("other").textContent = others > 0 && look.other !== null
      ? `${others === 1 ? "The other class" : `All ${others.toLocaleString("en")} other classes together`}: ${percent(look.other)}. ` : "";
    at("other").append(first ? "Choose a class to see what speaks for it." : "");
  }

  // ----- which map

  chooseMode(mode) {
    this.mode = mode;
    for (const radio of document.querySelectorAll('[name="mode"]')) radio.checked = radio.value === mode;
    this.showMode();
  }

  showMode() {
    for (const element of document.querySelectorAll("[data-mode]")) element.hidden = element.dataset.mode !== this.mode;
    if (this.positions) {
      const kind = { learned: "learnt", sincos: "fixed waves (sines and cosines)", rotary: "rotations" }[this.look.positions.kind];
      at("positions-note").textContent = `This model's positions are ${kind}. 1: the same direction; 0: nothing in common; `
        + "below 0: the opposite. A bright cross or spot around the patch means that near places count as alike.";
    }
    this.redraw();
  }

  /** The map for the patch in question, or for the answer. */
  values() {
    const { look, patch, prefix } = this;
    if (this.mode === "attention") return this.attend(this.block, this.head, patch).subarray(prefix.length);
    if (this.mode === "rollout") return this.follow(patch).subarray(prefix.length);
    if (this.mode === "relevance") return Float32Array.from(look.relevance[this.className] ?? []);
    return this.positions.row(patch ?? this.focus);
  }

  /** The attention of a patch, or of what the head reads, in a block and head: a number for each token. */
  attend(block, head, patch) {
    const count = this.attention.length;
    const [, heads] = this.attention.shape;
    const place = this.blocks.indexOf(block);
    const first = (each) => (place * heads + each) * count;
    const key = `${block} ${head}`;
    if (patch === null && this.readOut.has(key)) return this.readOut.get(key);
    const chosen = head === MEAN ? [...Array(heads).keys()] : [head];
    const sum = new Float32Array(count);
    for (const each of chosen) {
      const values = patch === null ? this.attention.weigh(first(each), this.look.read_out)
        : this.attention.row(first(each) + this.prefix.length + patch);
      values.forEach((value, i) => { sum[i] += value / chosen.length; });
    }
    if (patch === null) this.readOut.set(key, sum);
    return sum;
  }

  follow(patch) {
    return patch === null ? this.rollout.weigh(0, this.look.read_out) : this.rollout.row(this.prefix.length + patch);
  }

  /** The patch that is followed while none is pointed at: the most relevant one. */
  get focus() {
    const relevance = this.look.relevance[this.look.predictions[0]?.class];
    return largest(relevance ?? this.follow(null).subarray(this.prefix.length), 1)[0];
  }

  // ----- drawing

  redraw() {
    if (!this.look) return;
    this.drawMap();
    this.drawSheet();
    this.drawClassSheet();
    this.drawWalk();
  }

  /** Draws everything for the width that there is now. */
  fit() {
    if (!this.look) return;
    showWalk(this.look);
    this.redraw();
  }

  drawMap() {
    if (!this.look) return;
    const values = this.values();
    const isFree = this.mode === "positions";
    const [low, high] = findRange(values, isFree);
    const marked = this.patch ?? (isFree ? this.focus : null);
    this.picture.drawMap(at("map"), values.length ? values : null, [low, high], at("strength").value / 100, marked);
    const isShare = this.mode === "attention" || this.mode === "rollout";
    at("low").textContent = isShare ? percent(low) : short(low);
    at("high").textContent = isShare ? percent(high) : short(high);
    const bar = Array.from({ length: 256 }, (_, i) => i);
    drawThumbnail(at("scale"), bar, [1, 256], [0, 255]);
    at("readout").textContent = values.length ? this.describe(values) : "";
  }

  place(patch) {
    const [row, column] = this.picture.place(patch);
    return `row ${row}, column ${column}`;
  }

  /** What the map says, in words. */
  describe(values) {
    const { patch, prefix } = this;
    const best = largest(values, 3);
    const list = (write) => best.map((each) => `${each === patch ? "itself" : this.place(each)} (${write(values[each])})`).join("; ");
    if (this.mode === "positions") {
      const from = patch ?? this.focus;
      const others = largest(values, 4).filter((each) => each !== from).slice(0, 3);
      return `Position of the patch in ${this.place(from)}. Most like it: ${others.map((each) => `${this.place(each)} (${values[each].toFixed(2)})`).join("; ")}.`;
    }
    if (this.mode === "relevance") {
      if (patch === null) return `For ${this.className} speak most: ${list(short)}.`;
      const rank = values.filter((value) => value > values[patch]).length + 1;
      return `The patch in ${this.place(patch)}: relevance ${short(values[patch])} for ${this.className}, number ${rank} of ${values.length}.`;
    }
    const isRollout = this.mode === "rollout";
    const whole = isRollout ? this.follow(patch) : this.attend(this.block, this.head, patch);
    const where = isRollout ? "All blocks" : `Block ${this.block}, ${this.head === MEAN ? "mean of its heads" : `head ${this.head}`}`;
    const who = patch === null ? "the answer is read from" : `the patch in ${this.place(patch)} ${isRollout ? "draws on" : "looks at"}`;
    const rest = prefix.length ? ` ${percent(whole.subarray(0, prefix.length).reduce((a, b) => a + b, 0))} goes to the ${[...new Set(prefix)].join(" and ")} token${prefix.length > 1 ? "s" : ""}.` : "";
    return `${where}: ${who} ${list(percent)}.${rest}`;
  }

  drawWalk() {
    const patch = this.patch ?? this.focus;
    this.picture.drawExploded(at("exploded"), this.apart, patch);
    showPatch(this.look, this.picture, patch, (block) => this.blocks.includes(block) ? this.attend(block, MEAN, patch) : null);
  }

  /** Pulls the patches apart. */
  explode() {
    const start = performance.now();
    const move = (now) => {
      this.apart = isStill() ? 1 : Math.min(1, Math.max(0, (now - start) / 900));
      this.picture.drawExploded(at("exploded"), 1 - (1 - this.apart) ** 3, this.patch ?? this.focus);
      if (this.apart < 1) requestAnimationFrame(move);
    };
    move(start);
  }

  // ----- all blocks and heads at a glance

  makeSheet() {
    const sheet = at("sheet");
    sheet.style.gridTemplateColumns = `max-content repeat(${this.heads.length}, minmax(0, 5rem))`;
    sheet.replaceChildren(create("span"),
      ...this.heads.map((head) => create("span", { className: "column-name" }, head === MEAN ? "mean" : `head ${head}`)));
    this.tiles = [];
    for (const block of this.blocks) {
      sheet.append(create("span", { className: "row-name" }, `block ${block}`));
      for (const head of this.heads) {
        const tile = create("button", { type: "button", role: "radio", "aria-label": `Block ${block}, ${head === MEAN ? "mean of heads" : `head ${head}`}` }, create("canvas"));
        tile.addEventListener("click", () => this.chooseHead(block, head));
        this.tiles.push({ tile, block, head });
        sheet.append(tile);
      }
    }
    const isWhole = this.look.attention.heads !== null && this.blocks.length === this.look.model.num_blocks;
    at("sheet-note").textContent = (isWhole ? "" : "The model is large: heads are averaged, and not every block is here. ")
      + "Each map is on its own scale. Early heads often look nearby, late ones at what matters.";
    this.markHead();
  }

  chooseHead(block, head) {
    [this.block, this.head] = [block, head];
    this.markHead();
    this.drawMap();
  }

  markHead() {
    for (const { tile, block, head } of this.tiles) {
      const isChosen = block === this.block && head === this.head;
      tile.setAttribute("aria-checked", isChosen);
      tile.tabIndex = isChosen ? 0 : -1;
    }
  }

  moveInSheet(event) {
    const width = this.heads.length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width }[event.key];
    if (!step) return;
    event.preventDefault();
    const place = this.tiles.findIndex(({ block, head }) => block === this.block && head === this.head) + step;
    if (!this.tiles[place]) return;
    const { tile, block, head } = this.tiles[place];
    this.chooseHead(block, head);
    tile.focus();
  }

  drawSheet() {
    if (this.mode !== "attention") return;
    for (const { tile, block, head } of this.tiles) {
      drawThumbnail(tile.firstChild, this.attend(block, head, this.patch).subarray(this.prefix.length), this.look.model.grid);
    }
  }

  // ----- classes

  fillClasses() {
    const { look } = this;
    const names = this.findRelevance ? look.model.classes : Object.keys(look.relevance);
    const first = look.predictions.map((each) => each.class).filter((name) => names.includes(name));
    const order = [...first, ...names.filter((name) => !first.includes(name))];
    at("class").replaceChildren(...order.map((name) => create("option", { value: name }, name)));
    at("class").value = this.className ?? "";
    at("class-note").textContent = this.findRelevance ? "A class that is not here yet is computed: a moment."
      : "Only these were written into this file; vitreous explain --class adds another.";
  }

  async chooseClass(name) {
    const { look } = this;
    if (!Object.hasOwn(look.relevance, name)) {
      const found = await this.findRelevance?.(name);
      if (this.look !== look) return;
      if (!found) {
        at("class").value = this.className;
        return;
      }
      look.relevance[name] = found;
      this.makeClassSheet();
    }
    this.className = name;
    at("class").value = name;
    this.redraw();
  }

  makeClassSheet() {
    at("class-sheet").replaceChildren(...Object.keys(this.look.relevance).map((name) => {
      const tile = create("button", { type: "button", "data-class": name }, create("canvas"), create("span", {}, cut(name, 24)));
      tile.addEventListener("click", () => this.chooseClass(name));
      return tile;
    }));
  }

  /** Draws the classes on one scale: a class that lost has the paler map. */
  drawClassSheet() {
    if (this.mode !== "relevance") return;
    const range = findRange(Object.values(this.look.relevance).flat());
    for (const tile of at("class-sheet").children) {
      drawThumbnail(tile.firstChild, this.look.relevance[tile.dataset.class], this.look.model.grid, range);
      tile.setAttribute("aria-pressed", tile.dataset.class === this.className);
    }
  }

  // ----- patches, by mouse, touch and keys

  pickPatches(canvas) {
    canvas.addEventListener("pointermove", (event) => {
      if (this.look && event.pointerType === "mouse") this.setPatch(this.picture.find(canvas, event));
    });
    canvas.addEventListener("pointerleave", (event) => {
      if (this.look && event.pointerType === "mouse") this.setPatch(this.pinned);
    });
    canvas.addEventListener("click", (event) => {
      if (!this.look) return;
      const found = this.picture.find(canvas, event);
      this.pinned = found === this.pinned ? null : found;
      this.setPatch(this.pinned);
    });
    canvas.addEventListener("keydown", (event) => {
      const [rows, columns] = this.look?.model.grid ?? [0, 0];
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") this.pinned = null;
      else if (move) {
        const from = this.patch ?? Math.floor(rows / 2) * columns + Math.floor(columns / 2);
        const [row, column] = this.picture.place(from).map((place, axis) => place + (this.patch === null ? 0 : move[axis]));
        this.pinned = Math.min(Math.max(row, 0), rows - 1) * columns + Math.min(Math.max(column, 0), columns - 1);
      } else return;
      event.preventDefault();
      this.setPatch(this.pinned);
    });
  }

  setPatch(patch) {
    if (patch === this.patch) return;
    this.patch = patch;
    this.redraw();
  }
}
