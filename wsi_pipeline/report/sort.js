"use strict";
// A click on the head of a column sorts the table by it, another one the other way around.
for (const head of document.querySelectorAll(".sorted th")) {
  const isNumber = head.classList.contains("n");
  const sort = () => {
    const [top, ...rows] = head.closest("table").rows;
    const first = isNumber ? "descending" : "ascending";
    const second = isNumber ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    for (const other of top.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const value = (row) => row.cells[head.cellIndex].dataset.value;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      // What has no value comes last in either order.
      if (x === "" || y === "") return (x === "") - (y === "");
      const sign = order === "ascending" ? 1 : -1;
      return sign * (isNumber ? x - y : x.localeCompare(y, undefined, { numeric: true }));
    });
    top.parentElement.append(...rows);
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => {
    if (event.key === "Enter") sort();
  });
}
