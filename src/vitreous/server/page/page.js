// The page of a server: an image goes there, what the model makes of it comes back.

import { View } from "./view.js";
import { create, cut, percent, setShare } from "./walk.js";

const at = (id) => document.getElementById(id);

let image = null; // the file that is shown
let request = null; // the one on its way
let turn = 0; // of what was chosen last
let isFirst = true;
let whyNot = null; // why nothing can be explained

const view = new View(async (name) => {
  const found = await send(image, `${cut(name, 40)}: what speaks for it …`, `v1/look?classes=${encodeURIComponent(name)}`);
  return found?.relevance[name];
});

/** Asks the server; an answer that is no success becomes an error in its words. */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running? Start it again with vitreous serve, then try once more.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  throw new Error(body.error ?? `The server refused: status ${response.status}${wait ? `, try again in ${wait} s` : ""}.`);
}

function showStatus(text) {
  at("status").textContent = text ?? "";
  at("status").hidden = !text;
  document.body.classList.toggle("is-busy", Boolean(text));
  document.body.setAttribute("aria-busy", Boolean(text));
}

function showError(text) {
  at("error").textContent = text ?? "";
  at("error").hidden = !text;
}

/** Sends an image; null where it failed, which is said, or another one was sent meanwhile. */
async function send(file, status, path) {
  request?.abort();
  const mine = new AbortController();
  request = mine;
  showError();
  showStatus(status);
  try {
    const form = new FormData();
    form.append("image", file, "image"); // its name is nobody's business
    const response = await ask(path, { method: "POST", body: form, signal: mine.signal });
    return await response.json();
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
    return null;
  } finally {
    if (request === mine) {
      request = null;
      showStatus();
    }
  }
}

async function open(file, name) {
  turn += 1;
  if (file.type && !file.type.startsWith("image/")) {
    showError(`Cannot read ${cut(name, 60)}. Expected an image. Received: ${file.type}. Choose a JPEG or PNG file.`);
    return;
  }
  for (const button of at("examples").children) button.setAttribute("aria-pressed", button.dataset.name === name);
  if (whyNot) {
    await openWithoutLook(file, name);
    return;
  }
  const first = isFirst ? " (the first image takes longer: the model is loaded)" : "";
  const look = await send(file, `Looking at ${cut(name, 60)} …${first}`, "v1/look");
  if (!look) return;
  isFirst = false;
  image = file;
  try {
    await view.show(look, name);
  } catch (error) {
    showError(error.message);
  }
}

/** Shows the answer alone, of a server that has nothing to look into. */
async function openWithoutLook(file, name) {
  const answers = await send(file, `Looking at ${cut(name, 60)} …`, "v1/predict");
  if (!answers) return;
  const [{ predictions, is_sure: isSure }] = answers;
  at("answer").hidden = false;
  URL.revokeObjectURL(at("picture").src);
  at("picture").src = URL.createObjectURL(file);
  at("picture").alt = name;
  at("picture-name").textContent = cut(name, 60);
  at("verdict").textContent = `${predictions[0].class}, ${percent(predictions[0].probability)}${isSure === false ? " (not sure)" : ""}`;
  at("bars").replaceChildren(...predictions.map((each) => create("li", {},
    create("span", { className: "name" }, `${each.class} `), create("span", { className: "number" }, percent(each.probability)),
    setShare(create("span", { className: "bar", "aria-hidden": "true" }), each.probability))));
  at("other").textContent = `There is no look inside: ${whyNot}`;
}

function openFirst(files, kind) {
  if (files.length) open(files[0], files[0].name || `the ${kind} image`);
  else showError(`There was no image in what was ${kind}. Expected an image file, or a copied picture.`);
}

function listen() {
  at("choose").hidden = false;
  at("file").addEventListener("change", () => {
    if (at("file").files.length) openFirst(at("file").files, "chosen");
    at("file").value = ""; // the same file may be chosen again
  });
  let depth = 0; // of elements that the pointer is inside of
  const drag = (change) => (event) => {
    event.preventDefault();
    depth += change;
    document.body.classList.toggle("is-dragging", depth > 0);
  };
  document.addEventListener("dragenter", drag(1));
  document.addEventListener("dragleave", drag(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    document.body.classList.remove("is-dragging");
    openFirst(event.dataTransfer.files, "dropped");
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length || event.clipboardData.types.length) openFirst(files, "pasted");
  });
}

async function showExamples(model) {
  const examples = model.examples ?? [];
  at("examples").hidden = !examples.length;
  at("examples").replaceChildren(...examples.map(({ name, class: label }, index) => {
    const words = label ? `${label} (${name})` : name;
    const button = create("button", { type: "button", title: words, "data-name": words, "aria-pressed": "false" },
      create("img", { src: `v1/examples/${index}`, alt: "", loading: "lazy" }), label ?? name);
    button.addEventListener("click", async () => {
      turn += 1;
      const mine = turn;
      try {
        const response = await ask(`v1/examples/${index}`);
        const file = await response.blob();
        if (mine === turn) await open(file, words);
      } catch (error) {
        showError(error.message);
      }
    });
    return button;
  }));
}

async function start() {
  listen();
  try {
    const model = await (await ask("v1/model")).json();
    document.title = `${model.name}: vitreous`;
    at("facts").textContent = `${model.name}: ${model.classes.length.toLocaleString("en")} classes`;
    whyNot = model.why_no_explanations ?? null;
    await showExamples(model);
  } catch (error) {
    showError(error.message);
  }
}

start();
