// What lies over the picture beside its layers: the overview with the part that is seen, and the ruler.

import { fit } from "./tiles.js";

const SIDE = 170; // CSS pixels of the overview

export class Overview {
  constructor(canvas, view) {
    Object.assign(this, { canvas, view, picture: null });
    const lead = (event) => {
      event.stopPropagation(); // the picture below must not be dragged
      if (!this.picture || !(event.buttons & 1)) return;
      const { left, top } = canvas.getBoundingClientRect();
      view.go((event.clientX - left) / this.scale, (event.clientY - top) / this.scale, view.scale);
    };
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); lead(event); });
    canvas.addEventListener("pointermove", lead);
    canvas.addEventListener("dblclick", (event) => event.stopPropagation());
  }

  // picture: of all, or null; size: (x, y) level-0 pixels.
  show(picture, size) {
    this.canvas.hidden = !picture;
    Object.assign(this, { picture, size, scale: size && SIDE / Math.max(...size) });
  }

  draw(ratio) {
    if (!this.picture) return;
    const { canvas, scale, view, size } = this, [width, height] = size.map((n) => Math.max(1, n * scale));
    const context = fit(canvas, { width, height }, ratio), { x, y, w, h } = view.box();
    context.drawImage(this.picture, 0, 0, canvas.width, canvas.height);
    context.scale(ratio, ratio);
    for (const [color, line] of [["#111", 6], ["#fff", 4], ["#0b5cad", 2]]) {
      Object.assign(context, { strokeStyle: color, lineWidth: line });
      context.strokeRect(x * scale, y * scale, Math.max(w * scale, 3), Math.max(h * scale, 3));
    }
  }
}

// A line from one level-0 place to another, or to the middle of the view, with its length.
export function drawRuler(canvas, view, ratio, ruler, mpp) {
  const context = fit(canvas, view, ratio);
  if (!ruler) return;
  const to = ruler.to ?? [view.x, view.y], [mx, my] = mpp ?? [1, 1];
  const place = ([x, y]) => [(x - view.x) * view.scale + view.width / 2, (y - view.y) * view.scale + view.height / 2];
  const [[x0, y0], [x1, y1]] = [place(ruler.from), place(to)];
  const text = lengthOf(Math.hypot((to[0] - ruler.from[0]) * mx, (to[1] - ruler.from[1]) * my), Boolean(mpp));
  canvas.setAttribute("aria-label", text);
  context.scale(ratio, ratio);
  context.font = "600 13px system-ui, sans-serif";
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  for (const [x, y] of [[x0, y0], [x1, y1]]) {
    context.moveTo(x + 4, y);
    context.arc(x, y, 4, 0, 7);
  }
  for (const [color, line] of [["#fff", 5], ["#111", 2]]) {
    Object.assign(context, { strokeStyle: color, lineWidth: line, lineJoin: "round" });
    context.stroke();
  }
  context.lineWidth = 4;
  context.strokeStyle = "#fff";
  context.strokeText(text, x1 + 10, y1 - 8);
  context.fillText(text, x1 + 10, y1 - 8);
}

// um: µm, or pixels where their size is not known.
export function lengthOf(um, isKnown) {
  if (!isKnown) return `${um.toFixed(1)} px`;
  return um < 1000 ? `${um.toFixed(um < 100 ? 1 : 0)} µm` : `${(um / 1000).toPrecision(4)} mm`;
}
