"use strict";
(() => {
  // One frame of every picture at a time, moved by the slider; without this all stand side by side.
  const slider = document.getElementById("frame");
  if (slider) {
    const frames = [...document.querySelectorAll(".frame")];
    const caption = document.getElementById("frame-caption");
    const show = () => {
      for (const frame of frames) {
        frame.hidden = frame.dataset.block !== slider.value;
        if (!frame.hidden) caption.textContent = frame.dataset.caption;
      }
      slider.setAttribute("aria-valuetext", caption.textContent);
    };
    document.querySelector(".player").hidden = false;
    document.documentElement.classList.add("playing");
    slider.addEventListener("input", show);
    show();
  }

  const number = (cell) => Number(cell.dataset.value);
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const numeric = head.dataset.kind === "number";
        const before = head.getAttribute("aria-sort");
        // Numbers the largest first, names from A on; another click turns it round.
        const up = before === "none" ? !numeric : before === "descending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const order = (one, other) => {
          const [a, b] = [one.cells[column], other.cells[column]];
          const way = numeric ? number(a) - number(b) : a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
          return up ? way : -way;
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  }

  const tip = document.getElementById("tip");
  document.addEventListener("pointerover", (event) => {
    const over = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    const text = over ? over.dataset.tip : "";
    tip.hidden = !text;
    if (text) tip.textContent = text;
  });
  document.addEventListener("pointermove", (event) => {
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.transform = `translate(${Math.max(8, left)}px, ${event.clientY + 16}px)`;
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
})();
