/**
 * Draws what the model sees: the picture as the square that it reads, and over it the view behind
 * each spatial token: bins of patches, along rows and columns.
 */

import { byId, make } from "./dom.js";

const PIXELS = 672; // of the drawn square
const THUMB = 96; // of a token's small picture
const STEP = 4; // pixels between those that are averaged

// How a picture of (width, height) becomes a square of side 1: its scales.
const RESIZES = {
  pad: (w, h) => [1 / Math.max(w, h), 1 / Math.max(w, h)],
  crop: (w, h) => [1 / Math.min(w, h), 1 / Math.min(w, h)],
  squash: (w, h) => [1 / w, 1 / h],
};

const canvasOf = (size) => make("canvas", { width: size, height: size });
const contextOf = (canvas) => canvas.getContext("2d", { willReadFrequently: true });

/** Draws a bitmap as the square that the model reads. */
function square(model, bitmap) {
  const canvas = canvasOf(PIXELS);
  const context = contextOf(canvas);
  const [x, y] = RESIZES[model.resize](bitmap.width, bitmap.height);
  const [width, height] = [bitmap.width * x * PIXELS, bitmap.height * y * PIXELS];
  context.fillStyle = `rgb(${model.pad_color.join(" ")})`;
  context.fillRect(0, 0, PIXELS, PIXELS);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (PIXELS - width) / 2, (PIXELS - height) / 2, width, height);
  return canvas;
}

/** Returns [left, top, width, height] of what a view covers, in patches. */
function extent({ rows, columns }) {
  const [top, left] = [rows[0][0], columns[0][0]];
  return [left, top, columns.at(-1)[1] - left, rows.at(-1)[1] - top];
}

/** Returns the square with the mean color of each bin in place of the pixels that it averages. */
function painted(square, view, grid) {
  const canvas = canvasOf(PIXELS);
  const context = contextOf(canvas);
  context.drawImage(square, 0, 0);
  if (![...view.rows, ...view.columns].some(([first, after]) => after - first > 1)) return canvas;
  const scale = PIXELS / grid;
  const { data } = contextOf(square).getImageData(0, 0, PIXELS, PIXELS);
  const [left, top, width, height] = extent(view).map((each) => each * scale);
  const [cellWidth, cellHeight] = [width / view.columns.length, height / view.rows.length];
  view.rows.forEach((row, i) =>
    view.columns.forEach((column, j) => {
      const sum = [0, 0, 0];
      let count = 0;
      for (let y = Math.round(row[0] * scale); y < row[1] * scale; y += STEP) {
        for (let x = Math.round(column[0] * scale); x < column[1] * scale; x += STEP) {
          sum.forEach((_, c) => (sum[c] += data[4 * (y * PIXELS + x) + c]));
          count++;
        }
      }
      context.fillStyle = `rgb(${sum.map((each) => each / count).join(" ")})`;
      const [x, y] = [Math.floor(left + j * cellWidth), Math.floor(top + i * cellHeight)];
      context.fillRect(x, y, Math.ceil(cellWidth) + 1, Math.ceil(cellHeight) + 1);
    }),
  );
  return canvas;
}

/** Returns the path around a view. */
function frame(view) {
  const [x, y, w, h] = extent(view);
  return `M${x} ${y}h${w}v${h}h${-w}z`;
}

/** Returns the path of the lines between the cells of a view. */
function lines(view) {
  const [x, y, w, h] = extent(view);
  const [rows, columns] = [view.rows.length, view.columns.length];
  const across = view.rows.slice(1).map((_, i) => `M${x} ${y + (h * (i + 1)) / rows}h${w}`);
  const down = view.columns.slice(1).map((_, i) => `M${x + (w * (i + 1)) / columns} ${y}v${h}`);
  return [...across, ...down].join("");
}

/** Shows pictures in the panel "What the model sees". */
export class Viewer {
  constructor(model) {
    this.model = model;
    const { grid, views, says } = model;
    const cells = Array.from({ length: grid }, (_, i) => [i, i + 1]);
    const patches = { kind: "patches", rows: cells, columns: cells, says: says.patches };
    const seeing = views.filter((view) => view.rows.length);
    const framed = new Set(seeing.map(frame)).size > 1; // otherwise one frame around them all
    this.choices = [
      ...(framed ? [{ name: "all", says: says.all, frames: seeing.map(frame) }] : []),
      ...[...views, patches].map((view) => {
        const frames = view.rows.length ? [frame(view)] : [];
        return { name: `${view.kind} ${view.size || ""}`, says: view.says, frames, view };
      }),
    ];
    byId("overlay").setAttribute("viewBox", `0 0 ${grid} ${grid}`);
    byId("about").textContent = says.model;
    const labels = this.choices.map((choice, i) => {
      const input = make("input", { type: "radio", name: "view", checked: !i });
      input.addEventListener("change", () => this.choose(choice));
      choice.thumb = canvasOf(THUMB);
      return make("label", {}, input, choice.thumb, make("span", {}, choice.name));
    });
    byId("tokens").replaceChildren(...labels);
    [this.chosen] = this.choices;
  }

  /** Shows a picture, called `name`. */
  async show(blob, name) {
    const bitmap = await createImageBitmap(blob);
    const { grid } = this.model;
    const whole = square(this.model, bitmap);
    for (const choice of this.choices) {
      const { view, thumb, frames } = choice;
      choice.canvas = view?.rows.length ? painted(whole, view, grid) : whole;
      const place = view && frames.length ? extent(view) : [0, 0, grid, grid];
      const context = thumb.getContext("2d");
      context.reset();
      if (!frames.length) continue;
      const pixels = place.map((each) => (each * PIXELS) / grid);
      context.drawImage(choice.canvas, ...pixels, 0, 0, THUMB, THUMB);
      const [left, top, width, height] = place;
      context.setTransform(THUMB / width, 0, 0, THUMB / height, 0, 0);
      context.translate(-left, -top);
      Object.assign(context, { lineWidth: width / THUMB, strokeStyle: view ? "#fff5" : "#fff" });
      context.stroke(new Path2D(view ? lines(view) : frames.join("")));
    }
    byId("picture").ariaLabel = `${name}, as the model reads it`;
    byId("no-picture").hidden = true;
    byId("seen").hidden = false;
    this.choose(this.chosen);
  }

  clear() {
    byId("no-picture").hidden = false;
    byId("seen").hidden = true;
  }

  /** Draws the view of a token over the picture, or the frames of all of them. */
  choose(choice) {
    this.chosen = choice;
    const { canvas, view, frames, says } = choice;
    const picture = Object.assign(byId("picture"), { width: PIXELS, height: PIXELS });
    picture.getContext("2d").drawImage(canvas, 0, 0);
    const { grid } = this.model;
    const [shade, net] = byId("overlay").children;
    shade.setAttribute("d", view ? `M0 0h${grid}v${grid}h${-grid}z${frames.join("")}` : "");
    net.setAttribute("d", view?.rows.length ? lines(view) : "");
    const paths = frames.map((d) => {
      const path = shade.cloneNode();
      path.removeAttribute("class");
      path.setAttribute("d", d);
      return path;
    });
    byId("overlay").lastElementChild.replaceChildren(...paths);
    byId("caption").textContent = says;
  }
}
