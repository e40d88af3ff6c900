"use strict";
// Everything is in the page already: this puts rows in another order, hides some, and copies a text.
(() => {
  const table = document.querySelector(".ranks");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.missing !== undefined) return null;
    return cell.dataset.number === undefined ? cell.textContent.trim() : Number(cell.dataset.number);
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b, "en", { numeric: true });
  };
  const sort = (column) => {
    const down = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
    // What is missing stands below, whichever way is up.
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(column)));

  const field = document.querySelector("#filter");
  const count = document.querySelector("#shown");
  const filter = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${body.rows.length} shown`;
  };
  field.addEventListener("input", filter);
  document.querySelectorAll(".tools, .copy").forEach((part) => { part.hidden = false; });
  filter();

  document.querySelectorAll(".copy").forEach((button) => {
    const command = button.parentElement.querySelector("pre");
    button.addEventListener("click", () => {
      getSelection().selectAllChildren(command);
      const said = (text) => { button.textContent = text; };
      // Where a page may not write to the clipboard, the text is selected at least.
      if (navigator.clipboard) navigator.clipboard.writeText(command.textContent).then(() => said("copied"), () => said("selected"));
      else said("selected");
    });
  });
})();
