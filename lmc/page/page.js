// Pictures in, the network (network.js) beside, pictures out.

const $ = (id) => document.getElementById(id);
const size = Number(document.body.dataset.size);
const source = document.body.dataset.source;
const radios = [...document.querySelectorAll("[name=target]")];
const names = radios.filter((radio) => radio.value !== "all").map((radio) => radio.dataset.name);
const LARGEST = 4096; // pixels a side that every browser's canvas can hold

let picture = null; // { name, image }
let results = new Map(); // of the picture, by target
let times = [];
let job = 0;
let device = "";

document.body.classList.toggle("small", size <= 64); // larger, its pixels would be all that is seen
document.body.classList.toggle("touch", navigator.maxTouchPoints > 0); // a phone, with a camera

// ---- The picture as the network takes it: the middle square, resized as PyTorch does.

function middleSquare(bitmap) {
  const side = Math.min(bitmap.width, bitmap.height);
  const length = Math.min(side, LARGEST);
  const [left, top] = [bitmap.width, bitmap.height].map((x) => Math.floor((x - side) / 2));
  const canvas = new OffscreenCanvas(length, length);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // behind what is transparent
  context.fillRect(0, 0, length, length);
  context.drawImage(bitmap, left, top, side, side, 0, 0, length, length);
  return { pixels: context.getImageData(0, 0, length, length).data, length };
}

// For each of `to` output pixels the first input pixel and the weights: bilinear, antialiased.
function weights(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = scale * (i + 0.5);
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), from);
    const raw = Array.from({ length: end - first }, (_, j) =>
      Math.max(0, 1 - Math.abs((first + j + 0.5 - center) / support)));
    const total = raw.reduce((a, b) => a + b);
    return { first, share: raw.map((x) => x / total) };
  });
}

// RGBA bytes of a square to 3 x size x size in [-1, 1].
function resized({ pixels, length }) {
  const across = weights(length, size);
  const rows = new Float32Array(3 * length * size); // as wide as the result, as high as the source
  for (let y = 0; y < length; y++)
    for (let x = 0; x < size; x++) {
      const { first, share } = across[x];
      let [r, g, b] = [0, 0, 0];
      for (let k = 0, at = 4 * (y * length + first); k < share.length; k++, at += 4) {
        r += share[k] * pixels[at];
        g += share[k] * pixels[at + 1];
        b += share[k] * pixels[at + 2];
      }
      const at = y * size + x;
      rows[at] = r;
      rows[at + length * size] = g;
      rows[at + 2 * length * size] = b;
    }
  const image = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c++)
    for (let y = 0; y < size; y++) {
      const { first, share } = across[y];
      for (let x = 0; x < size; x++) {
        let sum = 0;
        for (let k = 0; k < share.length; k++) sum += share[k] * rows[(c * length + first + k) * size + x];
        image[(c * size + y) * size + x] = sum / 127.5 - 1;
      }
    }
  return image;
}

function draw(canvas, image) {
  const drawn = new ImageData(size, size);
  const n = size * size;
  for (let i = 0; i < n; i++) {
    for (let c = 0; c < 3; c++) drawn.data[4 * i + c] = (image[c * n + i] + 1) * 127.5; // rounded and clamped
    drawn.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(drawn, 0, 0);
}

// ---- Asking the network, and showing what it says.

const network = new Worker(`network.js?size=${size}`, { type: "module" });
network.onmessage = ({ data }) => {
  if (data.failed) return fail(data.failed);
  if (data.device) device = data.device === "webgpu" ? "GPU" : "CPU";
  if (data.id === job && data.output) {
    results.set(data.target, data.output);
    times.push(data.ms);
  }
  show();
};
network.onerror = (event) => fail(event.message || "its worker cannot be loaded");

function fail(why) {
  $("status").textContent = "";
  complain(`The network cannot be run in this browser: ${why}`);
}

function complain(text) {
  $("wrong").textContent = text;
  $("wrong").hidden = !text;
  if (text) $("wrong").scrollIntoView({ block: "nearest" });
}

const chosen = () => radios.find((radio) => radio.checked).value;
const wanted = () => (chosen() === "all" ? names.map((_, i) => i) : [Number(chosen())]);

function ask() {
  const missing = picture ? wanted().filter((target) => !results.has(target)) : [];
  if (missing.length) {
    times = [];
    network.postMessage({ id: ++job, image: picture.image, targets: missing });
  }
  show();
}

function show() {
  const all = chosen() === "all";
  const done = picture !== null && wanted().every((target) => results.has(target));
  $("all").hidden = !all || !picture;
  $("compare").hidden = !$("all").hidden;
  $("compare").classList.toggle("empty", !picture);
  $("save").disabled = !done;
  if (picture) {
    draw($("before"), picture.image);
    draw($("source"), picture.image);
    if (!all) {
      draw($("after"), results.get(Number(chosen())) ?? picture.image);
      $("became").textContent = done ? names[chosen()] : "";
      $("after").setAttribute("aria-label", `The ${source} as ${names[chosen()]}`);
    }
  }
  for (const button of document.querySelectorAll("#all button")) {
    const result = results.get(Number(button.dataset.target));
    button.disabled = !result;
    if (result) draw(button.querySelector("canvas"), result);
    else button.querySelector("canvas").getContext("2d").clearRect(0, 0, size, size);
  }
  const mean = times.reduce((a, b) => a + b, 0) / times.length;
  const took = times.length ? `${mean < 10 ? mean.toFixed(1) : mean.toFixed(0)} ms an image on the ${device}` : "";
  if (!$("wrong").hidden && !device) return; // it cannot be loaded
  $("status").textContent = !device ? "Loading the network …" : !picture ? "Ready." : done ? took : "Translating …";
}

// ---- Where pictures come from.

async function take(blob, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    return complain(`${name} is no picture that this browser can read. Take a JPEG, PNG or WebP.`);
  }
  complain("");
  picture = { name: name.replace(/\.[^.]*$/, ""), image: resized(middleSquare(bitmap)) };
  bitmap.close();
  results = new Map();
  job++;
  for (const button of samples) button.setAttribute("aria-pressed", String(button.dataset.name === name));
  ask();
}

const samples = [...document.querySelectorAll("#samples button")];
async function sample(button) {
  const response = await fetch(button.querySelector("img").src);
  await take(await response.blob(), button.dataset.name);
}
for (const button of samples) button.onclick = () => sample(button);

for (const input of [$("file"), $("camera")])
  input.onchange = () => {
    if (input.files[0]) take(input.files[0], input.files[0].name);
    input.value = ""; // so that the same file can be chosen again
  };

let over = 0; // elements within elements that a file is dragged over
addEventListener("dragenter", () => document.body.classList.toggle("over", ++over > 0));
addEventListener("dragleave", () => document.body.classList.toggle("over", --over > 0));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  document.body.classList.remove("over");
  given(event.dataTransfer.files, "What was dropped is no file: save the picture first, then drop it.");
});
addEventListener("paste", (event) => given(event.clipboardData.files, "There is no picture on the clipboard."));

function given(files, otherwise) {
  if (files.length) take(files[0], files[0].name);
  else complain(otherwise);
}

// ---- What can be changed, and kept.

for (const radio of radios) radio.onchange = ask;
for (const button of document.querySelectorAll("#all button"))
  button.onclick = () => {
    const radio = radios.find((each) => each.value === button.dataset.target);
    radio.checked = true;
    radio.focus();
    ask();
  };

$("slider").oninput = () => {
  const at = Number($("slider").value);
  $("before").style.clipPath = `inset(0 ${100 - at}% 0 0)`;
  document.querySelector(".edge").style.left = `${at}%`;
};

$("save").onclick = () => {
  let canvas = $("after");
  if (chosen() === "all") {
    const each = [$("source"), ...document.querySelectorAll("#all button canvas")];
    canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [size * each.length, size];
    each.forEach((one, i) => canvas.getContext("2d").drawImage(one, i * size, 0));
  }
  const link = document.createElement("a");
  link.download = `${picture.name}-${radios.find((radio) => radio.checked).dataset.name}.png`;
  canvas.toBlob((blob) => {
    link.href = URL.createObjectURL(blob);
    link.click();
    URL.revokeObjectURL(link.href);
  });
};

show();
if (samples.length) sample(samples[0]);
