// A volume in three planes, as radiologists look at them: a slider for each, a click leads the others
// there, wheel and arrow keys go from slice to slice. Values come as they are; window and level are
// applied here.

import { ask, make } from "./tiles.js";

const LOWEST = 0.01, HIGHEST = 0.995; // shares of the values that a window leaves out where the file names none
const AXES = ["x", "y", "z"];

export class Volume {
  // hidden: classes that are not shown. told(place): where the pointer is. came(window): all slices are there.
  constructor(root, url, facts, hidden, at, { failed, told, came }) {
    Object.assign(this, { root, url, facts, hidden, failed, told, came, window: facts.window, range: null, channel: "0", cut: "" });
    const known = at?.length === 3 && facts.body.every(({ axis, size }) => at[axis] >= 0 && at[axis] < size);
    this.at = known ? at : [...facts.start]; // x, y and z of the file
    this.panes = facts.planes.map((plane) => this.pane(plane));
    root.replaceChildren(...this.panes.map(({ figure }) => figure));
    this.observer = new ResizeObserver(() => this.fit());
    this.observer.observe(root);
    this.show();
  }

  pane(plane) {
    const [across, down, along] = [plane.across, plane.down, plane.along].map((n) => this.facts.body[n]);
    const figure = make("figure"), frame = make("div"), caption = make("figcaption"), slider = make("input");
    const canvases = ["slide", "mask", "probability"].map((name) => {
      const canvas = Object.assign(make("canvas"), { width: along.size, height: down.size });
      canvas.className = name;
      return canvas;
    });
    const pane = { plane, across, down, along, figure, frame, canvases, slider, number: make("span"), lines: [make("i"), make("i")] };
    figure.className = plane.name;
    Object.assign(slider, { type: "range", min: 0, max: across.size - 1, ariaLabel: `${plane.name} slice` });
    slider.addEventListener("input", () => this.go(across.axis, this.turned(across, +slider.value)));
    frame.append(...canvases, ...pane.lines, Object.assign(make("b", plane.left), { className: "left" }),
      Object.assign(make("b", plane.top), { className: "top" }));
    caption.append(make("span", plane.name), slider, pane.number);
    figure.append(caption, frame);
    const lead = (event) => {
      const [column, row] = this.place(pane, event);
      this.at[along.axis] = this.turned(along, column);
      this.go(down.axis, this.turned(down, row));
    };
    frame.addEventListener("pointerdown", (event) => { frame.setPointerCapture(event.pointerId); lead(event); });
    frame.addEventListener("pointermove", (event) => {
      if (event.buttons & 1) lead(event);
      this.tell(pane, this.place(pane, event));
    });
    frame.addEventListener("pointerleave", () => this.told(""));
    frame.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.go(across.axis, this.at[across.axis] + Math.sign(event.deltaY) * (across.is_forward ? -1 : 1));
    }, { passive: false });
    return pane;
  }

  // Indices count from the right, the front and the top on the page, and as they lie in the file.
  turned({ size, is_forward }, index) {
    return is_forward ? size - 1 - index : index;
  }

  place({ frame, along, down }, event) {
    const box = frame.getBoundingClientRect();
    const index = (share, size) => Math.min(Math.max(Math.floor(share * size), 0), size - 1);
    return [index((event.clientX - box.left) / box.width, along.size), index((event.clientY - box.top) / box.height, down.size)];
  }

  tell({ across, along, down, values }, [column, row]) {
    const at = [];
    at[across.axis] = this.at[across.axis];
    at[along.axis] = this.turned(along, column);
    at[down.axis] = this.turned(down, row);
    const value = values ? `: ${+values[row * along.size + column].toPrecision(6)}` : "";
    this.told(`${AXES.map((name, axis) => `${name} ${at[axis]}`).join(", ")}${value}`);
  }

  go(axis, index) {
    const { size } = this.facts.body.find((own) => own.axis === axis);
    this.at[axis] = Math.min(Math.max(index, 0), size - 1);
    this.show();
  }

  // at: (x, y, z) of the file.
  goTo(at) {
    this.at = [...at];
    this.show();
  }

  // Fetches what is wanted: of a slider that moves on meanwhile, the latest slice only.
  show() {
    document.body.dataset.state = "loading";
    for (const pane of this.panes) {
      const { across, along, down, slider, number, lines } = pane;
      slider.value = this.turned(across, this.at[across.axis]);
      number.textContent = `${+slider.value + 1} / ${across.size}`;
      lines[0].style.left = `${(100 * (this.turned(along, this.at[along.axis]) + 0.5)) / along.size}%`;
      lines[1].style.top = `${(100 * (this.turned(down, this.at[down.axis]) + 0.5)) / down.size}%`;
      if (!pane.isBusy) this.load(pane);
    }
  }

  async load(pane) {
    pane.isBusy = true;
    while (!this.isClosed && pane.shown !== this.at[pane.across.axis]) {
      const index = this.at[pane.across.axis];
      const get = async (is, layer, numbers, query = "") => {
        if (!is) return null;
        return new numbers(await (await ask(`${this.url}/${layer}/${pane.plane.name}/${index}${query}`)).arrayBuffer());
      };
      const { layers, probability } = this.facts, { channel, cut } = this;
      try {
        [pane.values, pane.classes, pane.shares] = await Promise.all([
          get(layers.includes("values"), "values", Float32Array),
          cut ? get(true, "cut", Uint8Array, `?${cut.slice(1)}`) : get(layers.includes("classes"), "classes", Uint8Array),
          get(probability, `probability/${channel}`, Uint8Array),
        ]);
      } catch (error) {
        pane.values = pane.classes = pane.shares = null;
        if (!this.isClosed) this.failed(error.message);
      }
      if (channel === this.channel && cut === this.cut) pane.shown = index;
      this.paint(pane);
    }
    pane.isBusy = false;
    if (this.isClosed || this.panes.some(({ isBusy }) => isBusy)) return;
    const seen = this.panes.map(({ values }) => values).filter(Boolean);
    if (seen.length) {
      const ends = seen.flatMap((values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))]);
      this.range = [Math.min(...ends, this.range?.[0] ?? Infinity), Math.max(...ends, this.range?.[1] ?? -Infinity)];
      if (!this.window) {
        const sorted = Float32Array.from(seen.flatMap((values) => [...values])).sort();
        this.window = [LOWEST, HIGHEST].map((share) => sorted[Math.round(share * (sorted.length - 1))]);
        this.panes.forEach((own) => this.paint(own));
      }
    }
    this.came();
  }

  // what: channel of the probabilities, or thresholds that cut the mask anew, "" for as it is.
  use(what) {
    Object.assign(this, what);
    this.panes.forEach((pane) => { pane.shown = null; });
    this.show();
  }

  setWindow(low, high) {
    this.window = [low, high];
    this.panes.forEach((pane) => this.paint(pane));
  }

  paint({ canvases, values, classes, shares, along, down }) {
    const [low, high] = this.window ?? [0, 1], gain = 255 / Math.max(high - low, 1e-6);
    const colors = this.facts.classes.map(({ color }, i) => (i && !this.hidden.has(i) ? [...color, 255] : [0, 0, 0, 0]));
    const fill = (canvas, layer, each) => {
      const image = new ImageData(along.size, down.size);
      layer?.forEach((value, i) => each(image.data, 4 * i, value));
      canvas.getContext("2d").putImageData(image, 0, 0);
    };
    fill(canvases[0], this.window && values, (data, i, value) => {
      data[i] = data[i + 1] = data[i + 2] = (value - low) * gain; // clamped by the array
      data[i + 3] = 255;
    });
    fill(canvases[1], classes, (data, i, value) => {
      if (value) data.set(colors[value], i);
    });
    const ends = this.facts.probability?.colors;
    fill(canvases[2], shares, (data, i, value) => {
      const at = value / 255 * (ends.length - 1), first = Math.min(Math.floor(at), ends.length - 2);
      if (value) data.set([...ends[first].map((part, n) => part + (at - first) * (ends[first + 1][n] - part)), 255], i);
    });
  }

  // As large as they go, in the proportions of the body: coronal below axial, sagittal beside coronal.
  fit() {
    const [right, front, top] = this.facts.body.map(({ size, mm }) => size * mm);
    const scale = Math.min((this.root.clientWidth - 40) / (right + front), (this.root.clientHeight - 100) / (front + top));
    for (const { frame, along, down } of this.panes) {
      frame.style.width = `${Math.max(1, along.size * along.mm * scale)}px`;
      frame.style.height = `${Math.max(1, down.size * down.mm * scale)}px`;
    }
  }

  close() {
    this.isClosed = true;
    this.observer.disconnect();
    this.root.replaceChildren();
  }
}
