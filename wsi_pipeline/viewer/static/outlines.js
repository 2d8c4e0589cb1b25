// Outlines of the polygons in view, and what cannot be read of the slide.

import { ask, fit } from "./tiles.js";

const MARGIN = 0.5; // of the view on all sides, fetched with it
const CROWDED = 300; // polygons in view from which on lines are thin, or they hide the rest
const WAIT = 120; // ms without a move before they are fetched anew
const REST = 400; // ms without a change before those of a cut are fetched exactly
const RINGS = [0, 1, 2];

export class Outlines {
  constructor(canvas, url, { changed, came }) {
    // cut: the query of thresholds, where polygons are not those of the file
    Object.assign(this, { canvas, url, changed, came, cut: "", held: null, asked: "", paths: new Map() });
  }

  // hidden: classes that are not shown. Returns whether what is wanted has come.
  draw(view, ratio, colors, hidden, selected, marks) {
    const context = fit(this.canvas, view, ratio);
    this.want(view, ratio, hidden);
    const { scale } = view, { held } = this;
    const around = (x, y) => context.setTransform(
      scale * ratio, 0, 0, scale * ratio,
      ((x - view.x) * scale + view.width / 2) * ratio, ((y - view.y) * scale + view.height / 2) * ratio,
    );
    for (const { x, y, width, height } of marks) {
      around(x, y);
      for (const [color, line, dash] of [["#000", 6, []], ["#fff", 4, []], ["#ff00ff", 2, [6 / scale, 4 / scale]]]) {
        stroke(context, color, line / scale, dash, (c) => c.strokeRect(0, 0, width, height));
      }
    }
    if (!held) return !this.waiting;
    around(held.x, held.y); // paths count from there: far from the origin a float is too coarse
    const seen = [...this.paths].filter(([value]) => !hidden.has(value));
    const width = held.shapes.length > CROWDED ? 1 : 2;
    for (const ring of RINGS) for (const [value, path] of seen) outline(context, ring, colors[value], width, scale, path);
    const chosen = held.shapes.find((shape) => shape.id === selected);
    if (chosen) {
      const path = new Path2D();
      trace(path, chosen, held);
      for (const ring of RINGS) outline(context, ring, colors[chosen.class], 4, scale, path);
    }
    return !this.waiting;
  }

  want(view, ratio, hidden) {
    const pixel = 1 / (view.scale * ratio), hide = [...hidden].sort().join(), { held } = this;
    const seen = view.box();
    const fits = held && hide === held.hide && this.cut === held.cut && pixel <= held.pixel * 1.3 && pixel >= held.pixel / 1.5 &&
      seen.x >= held.x && seen.y >= held.y && seen.x + seen.w <= held.x + held.w && seen.y + seen.h <= held.y + held.h;
    const key = fits ? "" : [view.x, view.y, pixel, hide, this.cut, view.width, view.height].join();
    if (key === this.asked) return;
    this.asked = key;
    if (fits && this.refining) return; // the exact ones of what is held come
    this.close();
    if (fits) return;
    const { x, y, w, h } = view.box(MARGIN);
    const box = { x: Math.floor(x), y: Math.floor(y), w: Math.ceil(w) + 1, h: Math.ceil(h) + 1 };
    this.waiting = new AbortController();
    const wait = held && this.cut === held.cut ? WAIT : 0;
    this.timer = setTimeout(() => this.load({ ...box, pixel, hide, cut: this.cut }, this.waiting.signal), wait);
  }

  async load({ x, y, w, h, pixel, hide, cut, exact = false }, signal) {
    const query = new URLSearchParams({ x, y, w, h, downsample: pixel.toFixed(6) });
    if (hide) query.set("hide", hide);
    let more = false;
    try {
      const found = await (await ask(`${this.url}/polygons?${query}${cut}${exact ? "&exact=1" : ""}`, signal)).json();
      more = cut && !exact;
      this.held = { x, y, w, h, pixel, hide, cut, shapes: found.shapes };
      this.paths = new Map();
      for (const shape of found.shapes) {
        if (!this.paths.has(shape.class)) this.paths.set(shape.class, new Path2D());
        trace(this.paths.get(shape.class), shape, this.held);
      }
      this.came(found);
    } catch (error) {
      if (signal.aborted) return;
      this.came({ error: error.message });
    }
    this.refining = Boolean(more);
    if (more) this.timer = setTimeout(() => this.load({ x, y, w, h, pixel, hide, cut, exact: true }, signal), REST);
    else this.waiting = null;
    this.changed();
  }

  close() {
    clearTimeout(this.timer);
    this.waiting?.abort();
    this.waiting = null;
    this.refining = false;
  }
}

function trace(path, { lines }, { x, y }) {
  for (const line of lines) {
    path.moveTo(line[0] - x, line[1] - y);
    for (let i = 2; i < line.length; i += 2) path.lineTo(line[i] - x, line[i + 1] - y);
  }
}

// A line with a rim, white or, of a bright colour, black, and a line of the other of both around that: one of
// them stands out from tissue of any colour. Each is a pixel of the screen on either side; less melts together.
// ring: 0 the outermost, 2 the line itself.
function outline(context, ring, color, width, scale, path) {
  const [r, g, b] = color.match(/\d+/g).map(Number), isBright = 0.299 * r + 0.587 * g + 0.114 * b > 150;
  const rims = isBright ? ["#fff", "#000"] : ["#000", "#fff"];
  stroke(context, [...rims, color][ring], (width + 4 - 2 * ring) / scale, [], (c) => c.stroke(path));
}

function stroke(context, color, width, dash, draw) {
  Object.assign(context, { strokeStyle: color, lineWidth: width, lineJoin: "round" });
  context.setLineDash(dash);
  draw(context);
}
