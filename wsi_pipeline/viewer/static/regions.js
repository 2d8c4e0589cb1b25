// The list of regions: a page of them at a time, in the order that was chosen; a button each goes there.

import { ask, make } from "./tiles.js";

export class Regions {
  // rows(by, first): resolves to { regions, count }. told(region): its class, colour and figures. go(region).
  constructor(root, { rows, told, go }) {
    Object.assign(this, { root, rows, told, go, regions: [], at: -1, count: null });
    const [select, list, more] = ["select", "ol", ":scope > button"].map((tag) => root.querySelector(tag));
    Object.assign(this, { select, list, more });
    root.hidden = false;
    select.onchange = () => this.clear();
    more.onclick = () => this.load();
    root.ontoggle = () => { if (root.open && this.count === null) this.load(); };
    this.clear();
  }

  // What is shown has changed: other classes, another order.
  clear() {
    Object.assign(this, { regions: [], at: -1, count: null });
    this.list.replaceChildren();
    this.more.hidden = true;
    if (this.root.open) this.load();
  }

  async load() {
    const { regions } = this, found = await this.rows(this.select.value, regions.length);
    if (!found || this.regions !== regions) return; // cleared meanwhile
    this.count = found.count;
    for (const region of found.regions) {
      const button = make("button"), swatch = make("i"), item = make("li"), index = regions.push(region) - 1;
      const { color, texts } = this.told(region);
      swatch.style.background = `rgb(${color.join()})`;
      button.append(swatch, ...texts.map((text) => make("span", text)));
      button.onclick = () => this.choose(index);
      item.append(button);
      this.list.append(item);
    }
    this.more.hidden = regions.length >= found.count;
    this.more.textContent = `More (${regions.length.toLocaleString()} of ${found.count.toLocaleString()})`;
  }

  async step(by) {
    this.root.open = true;
    if (this.count === null || this.at + by >= this.regions.length) await this.load();
    this.choose(Math.min(Math.max(this.at + by, 0), this.regions.length - 1));
  }

  choose(index) {
    if (!this.regions[index]) return;
    this.at = index;
    [...this.list.children].forEach((item, i) => item.firstChild.setAttribute("aria-current", i === index));
    this.list.children[index].scrollIntoView({ block: "nearest" });
    this.go(this.regions[index]);
  }
}

// Rows of a run's polygons, asked from the server.
export function polygonRows(url, hidden) {
  return async (by, first) => {
    const hide = hidden.size ? `&hide=${[...hidden].join()}` : "";
    return (await ask(`${url}/regions?by=${by.replace("&up", "&up=1")}&first=${first}${hide}`)).json();
  };
}
