/* A box above a table or a list that leaves only the rows which hold every word typed into it. */
"use strict";

function addFilter(container) {
  const rows = [...container.querySelectorAll(":scope > .paper, tbody > tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const isTopic = rows.map((row) => row.classList.contains("of-topic"));

  const box = document.createElement("input");
  box.type = "search";
  box.className = "filter-box";
  box.placeholder = `Filter the ${container.dataset.what}`;
  box.setAttribute("aria-label", box.placeholder);
  const count = document.createElement("output");
  count.className = "filter-count";
  const line = document.createElement("div");
  line.className = "filter-line";
  line.append(box, count);
  container.prepend(line);

  function apply() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = texts.map(
      (text, i) => !isTopic[i] && words.every((word) => text.includes(word)),
    );
    // A topic's line stays while a method of the topic does, and shows all where it is meant.
    for (let start = 0; start < rows.length; start += 1) {
      if (!isTopic[start]) continue;
      let end = start + 1;
      while (end < rows.length && !isTopic[end]) end += 1;
      if (words.length && words.every((word) => texts[start].includes(word))) {
        shown.fill(true, start + 1, end);
      }
      shown[start] = shown.slice(start + 1, end).includes(true);
    }
    rows.forEach((row, i) => { row.hidden = !shown[i]; });
    const left = shown.filter((is, i) => is && !isTopic[i]).length;
    count.textContent = words.length ? `${left} found` : "";
  }

  box.addEventListener("input", apply);
  const asked = new URLSearchParams(window.location.search).get("filter");
  if (asked) {
    box.value = asked;
    apply();
  }
}

document.querySelectorAll(".filtered").forEach(addFilter);
