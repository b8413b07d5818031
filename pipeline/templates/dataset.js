"use strict";
const body = document.querySelector("#subjects tbody");
const rows = Array.from(body ? body.rows : []);
const search = document.querySelector("#search");
const chips = Array.from(document.querySelectorAll("button.chip"));
const shown = document.querySelector("#shown");

function filter() {
  const words = search.value.toLowerCase().split(/\s+/);
  const standing = chips.find((chip) => chip.getAttribute("aria-pressed") === "true").value;
  let count = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = (standing && row.dataset.standing !== standing) || !words.every((word) => text.includes(word));
    count += !row.hidden;
  }
  shown.textContent = count < rows.length ? count + " of " + rows.length + " shown" : "";
}

function sort(header) {
  const column = header.cellIndex;
  const down = header.getAttribute("aria-sort") === (header.dataset.first || "ascending");
  const ascending = (header.dataset.first || "ascending") === "ascending" ? !down : down;
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.value;
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what has no figure comes last either way
    const order = header.dataset.number === undefined ? x.localeCompare(y) : Number(x) - Number(y);
    return ascending ? order : -order;
  });
  body.append(...rows);
}

function age(minutes) {
  if (minutes < 1) return "just now";
  if (minutes < 60) return Math.floor(minutes) + " min ago";
  if (minutes < 48 * 60) return Math.floor(minutes / 60) + " h ago";
  return Math.floor(minutes / 1440) + " days ago";
}

for (const time of document.querySelectorAll("time")) {
  time.title = time.textContent;
  time.textContent = age((Date.now() - Date.parse(time.dateTime)) / 60000);
}
for (const chip of chips) {
  chip.addEventListener("click", () => {
    for (const other of chips) other.setAttribute("aria-pressed", String(other === chip));
    filter();
  });
}
if (search) search.addEventListener("input", filter);
for (const header of document.querySelectorAll("th[data-sort]")) {
  header.querySelector("button").addEventListener("click", () => sort(header));
}
for (const image of document.querySelectorAll("img")) {
  image.addEventListener("error", () => image.remove());
}
