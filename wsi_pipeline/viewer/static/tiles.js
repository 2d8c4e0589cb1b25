// A pyramid of tiles on a canvas: the level that fits the screen is fetched, coarser tiles stand in
// until it has come, and what is no longer wanted is given up.

const MOST_KEPT = 160; // tiles, a megabyte each
const AT_ONCE = 6; // a browser opens no more connections

export class Tiles {
  // levels: the finest first. url(level, column, row): where a tile is. failed(sentence): told once
  // for a tile that the server cannot give. whole: the coarsest level is always fetched.
  constructor(canvas, levels, side, url, { changed, failed, base = null, smooth = true }) {
    Object.assign(this, { canvas, levels, side, url, changed, failed, base, smooth });
    this.tiles = new Map(); // by name; the latest used last
  }

  // Returns whether all that is wanted has come.
  draw(view, ratio) {
    const context = fit(this.canvas, view, ratio);
    const pixel = 1 / (view.scale * ratio); // level-0 pixels per pixel of the screen
    let level = this.levels.findLastIndex((of) => of.downsample[0] <= pixel * 1.25);
    if (level < 0) level = 0;
    const wanted = this.levels.length ? this.around(level, view) : [];
    const last = this.levels.length - 1;
    if (level < last && !this.base) wanted.push(...this.around(last, view));
    this.fetch(wanted);
    if (this.base) this.paint(context, view, ratio, this.base, 0, 0, this.base.picture);
    const seen = [...this.tiles.values()].filter((tile) => tile.picture && tile.level >= level);
    for (const tile of seen.sort((a, b) => b.level - a.level)) {
      const { downsample } = this.levels[tile.level];
      const left = tile.column * this.side * downsample[0], top = tile.row * this.side * downsample[1];
      this.paint(context, view, ratio, { downsample }, left, top, tile.picture);
    }
    return wanted.every(({ name }) => this.tiles.get(name)?.done);
  }

  paint(context, view, ratio, { downsample }, left, top, picture) {
    // edges lie on whole pixels of the screen, so that neighbours leave no seam
    const across = (x) => Math.round(((x - view.x) * view.scale + view.width / 2) * ratio);
    const down = (y) => Math.round(((y - view.y) * view.scale + view.height / 2) * ratio);
    const x0 = across(left), x1 = across(left + picture.width * downsample[0]);
    const y0 = down(top), y1 = down(top + picture.height * downsample[1]);
    if (x1 <= 0 || y1 <= 0 || x0 >= this.canvas.width || y0 >= this.canvas.height) return;
    context.imageSmoothingEnabled = this.smooth && view.scale * ratio * downsample[0] < 4;
    context.clearRect(x0, y0, x1 - x0, y1 - y0); // clear parts must not show a coarser tile
    context.drawImage(picture, x0, y0, x1 - x0, y1 - y0);
  }

  // The tiles of a level that are seen, the nearest to the middle first.
  around(level, view) {
    const { size, downsample } = this.levels[level];
    const { x, y, w, h } = view.box();
    const span = (from, length, axis) => {
      const step = this.side * downsample[axis];
      return [Math.max(0, Math.floor(from / step)), Math.min(Math.ceil(size[axis] / this.side), Math.ceil((from + length) / step))];
    };
    const found = [], [left, right] = span(x, w, 0), [top, bottom] = span(y, h, 1);
    for (let row = top; row < bottom; row++) {
      for (let column = left; column < right; column++) {
        const dx = (column + 0.5) * this.side * downsample[0] - view.x, dy = (row + 0.5) * this.side * downsample[1] - view.y;
        found.push({ name: `${level}/${column}/${row}`, level, column, row, far: Math.hypot(dx, dy) });
      }
    }
    return found.sort((a, b) => a.far - b.far);
  }

  fetch(wanted) {
    const names = new Set(wanted.map(({ name }) => name));
    for (const [name, tile] of this.tiles) {
      if (!tile.done && !names.has(name)) {
        tile.abort.abort();
        this.tiles.delete(name);
      }
    }
    let loading = [...this.tiles.values()].filter((tile) => !tile.done).length;
    for (const place of wanted) {
      const known = this.tiles.get(place.name);
      if (known) {
        this.tiles.delete(place.name);
        this.tiles.set(place.name, known);
      } else if (loading < AT_ONCE) {
        loading += 1;
        this.load(place);
      }
    }
    for (const [name, tile] of this.tiles) {
      if (this.tiles.size <= Math.max(MOST_KEPT, 2 * wanted.length)) break;
      this.drop(name, tile);
    }
  }

  async load(place) {
    const tile = { ...place, abort: new AbortController(), done: false, picture: null };
    this.tiles.set(place.name, tile);
    try {
      tile.picture = await picture(this.url(place.level, place.column, place.row), tile.abort.signal);
    } catch (error) {
      if (tile.abort.signal.aborted) return;
      this.failed(error.message);
    }
    tile.done = true; // where it failed there is none, and it is not asked for again
    this.changed();
  }

  drop(name, tile) {
    tile.abort.abort();
    tile.picture?.close();
    this.tiles.delete(name);
  }

  close() {
    for (const [name, tile] of this.tiles) this.drop(name, tile);
  }
}

// Fetches an answer; where the server refuses, its sentence is the error.
export async function ask(url, signal) {
  const answer = await fetch(url, { signal });
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer;
}

export function make(tag, text = "") {
  return Object.assign(document.createElement(tag), { textContent: text });
}

export async function picture(url, signal) {
  return createImageBitmap(await (await ask(url, signal)).blob());
}

// Makes a canvas as fine as the screen and empty; returns its context.
export function fit(canvas, view, ratio) {
  canvas.width = Math.round(view.width * ratio);
  canvas.height = Math.round(view.height * ratio);
  canvas.style.width = `${view.width}px`; // not stretched while the window changes
  canvas.style.height = `${view.height}px`;
  return canvas.getContext("2d");
}
