// Where one looks: the middle in level-0 pixels, and CSS pixels per level-0 pixel. It hears pointer,
// wheel and keys on its element and calls `changed`; a click without a move calls `clicked`.

const CLOSEST = 32; // CSS pixels per level-0 pixel
const STEP = 1.25; // of the keys

export class View {
  constructor(stage, changed, clicked) {
    // rule(from, to): called in place of a move while it is set
    Object.assign(this, { stage, changed, clicked, rule: null, x: 0, y: 0, scale: 1, home: null });
    this.pointers = new Map(); // by id, where each was last
    const on = (name, what) => stage.addEventListener(name, what);
    on("pointerdown", (event) => this.press(event));
    on("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"]) on(name, (event) => this.release(event));
    on("dblclick", (event) => this.zoom(event.shiftKey ? 0.5 : 2, this.place(event)));
    stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    on("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.changed()).observe(stage);
  }

  get width() { return this.stage.clientWidth; }
  get height() { return this.stage.clientHeight; }

  // The part that is seen, in level-0 pixels, and more of it on all sides.
  box(margin = 0) {
    const w = (this.width / this.scale) * (1 + 2 * margin), h = (this.height / this.scale) * (1 + 2 * margin);
    return { x: this.x - w / 2, y: this.y - h / 2, w, h };
  }

  toLevel0([left, top]) {
    return [this.x + (left - this.width / 2) / this.scale, this.y + (top - this.height / 2) / this.scale];
  }

  goHome() {
    const { x, y, width, height } = this.home;
    const scale = 0.95 * Math.min(this.width / width, this.height / height);
    this.go(x + width / 2, y + height / 2, scale);
  }

  go(x, y, scale) {
    if (!this.home) return;
    const { home } = this; // never so far away that the slide is lost
    const farthest = 0.3 * Math.min(this.width / home.width, this.height / home.height);
    this.scale = Math.min(Math.max(scale, farthest), CLOSEST);
    this.x = Math.min(Math.max(x, home.x), home.x + home.width);
    this.y = Math.min(Math.max(y, home.y), home.y + home.height);
    this.changed();
  }

  zoom(factor, at = [this.width / 2, this.height / 2]) {
    if (!this.home) return;
    const [x, y] = this.toLevel0(at);
    const before = this.scale;
    this.go(this.x, this.y, before * factor);
    const ratio = before / this.scale; // the point under the pointer stays there
    this.go(x + (this.x - x) * ratio, y + (this.y - y) * ratio, this.scale);
  }

  place(event) {
    const { left, top } = this.stage.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  press(event) {
    if (event.button) return;
    this.stage.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.place(event));
    this.pressed = this.toLevel0(this.place(event));
    this.moved = this.pointers.size > 1 ? Infinity : 0;
  }

  drag(event) {
    const from = this.pointers.get(event.pointerId);
    if (!from) return;
    const to = this.place(event);
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.pointers.set(event.pointerId, to);
    this.moved += Math.hypot(to[0] - from[0], to[1] - from[1]);
    if (this.moved < 4) return; // a click with a trembling hand
    if (this.rule && !other) return this.rule(this.pressed, this.toLevel0(to));
    this.stage.classList.add("moving");
    const share = other ? 2 : 1; // two fingers each move the middle between them by half
    this.go(this.x - (to[0] - from[0]) / this.scale / share, this.y - (to[1] - from[1]) / this.scale / share, this.scale);
    if (!other) return;
    const apart = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
    this.zoom(apart(to) / Math.max(apart(from), 1), [(to[0] + other[0]) / 2, (to[1] + other[1]) / 2]);
  }

  release(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    this.stage.classList.remove("moving");
    if (event.type === "pointerup" && this.moved < 4) this.clicked(this.toLevel0(this.place(event)));
  }

  wheel(event) {
    event.preventDefault();
    const lines = event.deltaY * (event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 400 : 1);
    this.zoom(2 ** (-Math.max(-300, Math.min(lines, 300)) / 300), this.place(event));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.home) return;
    const by = 80 / this.scale;
    const moves = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] };
    if (moves[event.key]) this.go(this.x + moves[event.key][0], this.y + moves[event.key][1], this.scale);
    else if (event.key === "+" || event.key === "=") this.zoom(STEP);
    else if (event.key === "-") this.zoom(1 / STEP);
    else if (event.key === "0") this.goHome();
    else return;
    event.preventDefault();
  }
}
