/** Reads picture files as the server wants them, and draws the example pictures. */

import { make } from "./dom.js";

const SENT = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // what the server decodes
const SIDE = 4096; // pixels; longer ones are made smaller, the model sees far fewer
const BYTES = 8 << 20; // of a picture that is sent
const ORIENTATION = 0x0112; // the tag of Exif

/**
 * Returns a picture for the server: the file's bytes where it reads them as the browser shows
 * them, otherwise drawn anew. Fails for a file that is no picture.
 */
export async function readPicture(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name || "This"} is no picture that this browser reads.`);
  });
  const { width, height } = bitmap;
  const fits = SENT.includes(file.type) && file.size <= BYTES && Math.max(width, height) <= SIDE;
  if (fits && orientation(await file.arrayBuffer()) === 1) return named(file, file.name);
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const size = { width: Math.ceil(width * scale), height: Math.ceil(height * scale) };
  const canvas = make("canvas", size);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const png = await encoded(canvas, "image/png");
  return named(png.size <= BYTES ? png : await encoded(canvas, "image/jpeg"), file.name);
}

/** Returns the orientation of a JPEG's Exif, which browsers obey and the server does not. */
function orientation(buffer) {
  const view = new DataView(buffer);
  try {
    if (view.getUint16(0) !== 0xffd8) return 1;
    for (let at = 2; (view.getUint16(at) & 0xff00) === 0xff00; at += 2 + view.getUint16(at + 2)) {
      if (view.getUint16(at) !== 0xffe1 || view.getUint32(at + 4) !== 0x45786966) continue;
      const tiff = at + 10;
      const little = view.getUint16(tiff) === 0x4949;
      const entries = tiff + view.getUint32(tiff + 4, little);
      for (let i = 0; i < view.getUint16(entries, little); i++) {
        const entry = entries + 2 + 12 * i;
        if (view.getUint16(entry, little) === ORIENTATION) return view.getUint16(entry + 8, little);
      }
    }
  } catch {
    // Cut off: the server says what it thinks of it.
  }
  return 1;
}

const named = (blob, name) => new File([blob], name || "picture", { type: blob.type });

const encoded = (canvas, type) => new Promise((done) => canvas.toBlob(done, type, 0.95));

/** Returns a picture as a `data:` URL, which is how it is sent. */
export function asDataUrl(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}

const urls = new WeakMap();

/** Returns a URL under which the page shows a picture. */
export function asUrl(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

const DISK = (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`;
const BOX = (x, y, w, h) => `M${x} ${y}h${w}v${h}h${-w}`;
const NESTED = ["#22577a", "#38a3a5", "#57cc99", "#ffd166", "#ef476f"];

/** The examples: name, question, width of the picture (all are 336 high), its shapes. */
export const EXAMPLES = [
  ["A disk", "what shape is in the image?", 336,
    [["#fbeed8", BOX(0, 0, 336, 336)], ["#0f8b8d", DISK(188, 150, 84)]]],
  ["Nested squares", "Which color is the square in the middle?", 336,
    NESTED.map((color, i) => [color, BOX(34 * i, 34 * i, 336 - 68 * i, 336 - 68 * i)])],
  ["A house", "Describe this picture.", 448, [
    ["#bfe3f5", BOX(0, 0, 448, 336)], ["#ffc53d", DISK(372, 70, 38)],
    ["#7fb069", "M0 230L110 150 230 232 448 176V336H0"], ["#f4efe6", BOX(128, 172, 136, 110)],
    ["#c8553d", "M112 176L196 104 280 176"], ["#7a4e2d", BOX(206, 218, 36, 64)],
    ["#6db1d1", BOX(150, 196, 36, 34)], ["#8a5a35", BOX(350, 200, 18, 84)],
    ["#4f8a3c", DISK(359, 182, 44)]]],
];

/** Returns the picture of an example as a file. */
export async function drawExample([name, , width, shapes]) {
  const canvas = make("canvas", { width, height: 336 });
  const context = canvas.getContext("2d");
  for (const [color, path] of shapes) {
    context.fillStyle = color;
    context.fill(new Path2D(path));
  }
  return named(await encoded(canvas, "image/png"), `${name}.png`);
}
