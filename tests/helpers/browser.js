// What helpers/browser.py looks for in a page; it calls these functions by their names.

const place = (element) => `#${element.closest("section")?.id ?? ""}`;
const isShown = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
const brief = ({ text }) => text.slice(0, 40);
const wide = (box) => box.right - box.left;
const high = (box) => box.bottom - box.top;
const meet = (one, other) => ({
  left: Math.max(one.left, other.left),
  right: Math.min(one.right, other.right),
  top: Math.max(one.top, other.top),
  bottom: Math.min(one.bottom, other.bottom),
});

function* withAncestors(element) {
  for (let one = element; one && one !== document.documentElement; one = one.parentElement) yield one;
}

// The part of a box that is painted, null for none, and whether some of it is hidden for good.
function painted(box, element) {
  const hides = (overflow) => overflow === "hidden" || overflow === "clip";
  let part = box;
  let lost = false;
  let scrolls = false;
  for (const one of withAncestors(element)) {
    const { overflowX, overflowY, textOverflow } = getComputedStyle(one);
    if (overflowX === "visible" && overflowY === "visible") continue;
    const frame = one.getBoundingClientRect();
    if (frame.width <= 2 || frame.height <= 2) return { part: null, lost: false }; // for screen readers only
    const before = part;
    part = meet(part, frame);
    scrolls ||= !hides(overflowX);
    if (scrolls || textOverflow === "ellipsis") continue;
    lost ||= hides(overflowX) && wide(before) - wide(part) > 2;
    lost ||= hides(overflowY) && high(before) - high(part) > 0.3 * high(before);
  }
  const outside = box.left < -1 || box.right > document.documentElement.clientWidth + 1;
  return { part: wide(part) > 2 && high(part) > 2 ? part : null, lost: lost || (outside && !scrolls) };
}

function lines() {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("svg, script, style, template, select") || !isShown(element)) continue;
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      found.push({ node, element, text: node.data.trim().replace(/\s+/g, " "), ...painted(box, element) });
  }
  return found;
}

function sideways() {
  const { scrollWidth, clientWidth } = document.documentElement;
  if (scrollWidth <= clientWidth) return [];
  const boxes = [...document.body.querySelectorAll("*")]
    .filter(isShown)
    .map((element) => ({ element, ...painted(element.getBoundingClientRect(), element) }));
  const tooWide = [...lines(), ...boxes]
    .filter(({ part }) => part && part.right > clientWidth + 1)
    .map((one) => `${place(one.element)}: ${one.text ? brief(one) : one.element.outerHTML.slice(0, 80)}, to ${one.part.right}`);
  return [`${scrollWidth} px wide in a window of ${clientWidth}`, ...tooWide.slice(0, 8)];
}

function texts() {
  return lines().filter(({ element, part }) => part && element.closest("main")).map(({ text }) => text);
}

function media() {
  return [...document.body.querySelectorAll("img, svg, canvas, video, input, select")]
    .filter((element) => isShown(element) && !element.parentElement.closest("svg"))
    .map((element) => ({ element, ...painted(element.getBoundingClientRect(), element) }))
    .filter(({ part }) => part);
}

function overlaps() {
  const all = lines();
  const said = all.filter((line) => line.lost).map((line) => `${place(line.element)}: "${brief(line)}" is cut off`);
  const over = (one, other) => {
    const both = meet(one, other);
    return wide(both) > 2 && high(both) > Math.max(3, 0.25 * Math.min(high(one), high(other)));
  };
  const texts = all.filter((line) => line.part);
  const pictures = media();
  texts.forEach((one, i) => {
    for (const other of texts.slice(i + 1))
      if (one.node !== other.node && over(one.part, other.part))
        said.push(`${place(one.element)}: "${brief(one)}" over "${brief(other)}"`);
    const placed = [...withAncestors(one.element)].find((a) => getComputedStyle(a).position === "absolute");
    for (const { element, part } of pictures) {
      const onPurpose = placed && !placed.contains(element) && placed.parentElement.contains(element);
      if (!onPurpose && !element.contains(one.node) && over(one.part, part))
        said.push(`${place(one.element)}: "${brief(one)}" over <${element.tagName.toLowerCase()}>`);
    }
  });
  return said;
}

function cutByScrolling() {
  return [...document.body.querySelectorAll("*")]
    .filter((one) => ["auto", "scroll"].includes(getComputedStyle(one).overflowX))
    .filter((one) => one.scrollWidth > one.clientWidth + 1)
    .map((one) => `${place(one)}: ${one.outerHTML.slice(0, 80)}, ${one.scrollWidth} in ${one.clientWidth} px`);
}

function brokenPictures() {
  const broken = [...document.images].filter((image) => isShown(image) && !image.naturalWidth);
  broken[0]?.scrollIntoView(); // it may be drawn only now
  return broken.map((image) => `${place(image)}: ${image.outerHTML.slice(0, 60)} alt="${image.alt}"`);
}

function withoutAlternative() {
  const isNamed = (element) => {
    const labels = (element.getAttribute("aria-labelledby") ?? "").split(" ");
    const names = labels.map((id) => document.getElementById(id)?.textContent);
    names.push(element.getAttribute("aria-label"), element.getAttribute("alt"));
    if (element.tagName === "svg") {
      names.push(element.querySelector(":scope > title")?.textContent);
      if (element.getAttribute("role") !== "img") return false; // it is read out as its parts
    }
    return names.some((name) => name?.trim());
  };
  const isDecoration = (element) =>
    element.closest("[aria-hidden=true]") || ["presentation", "none"].includes(element.getAttribute("role"));
  return [...document.querySelectorAll("img, svg, canvas, [role=img]")]
    .filter((element) => !element.parentElement.closest("svg") && !isDecoration(element) && !isNamed(element))
    .map((element) => `${place(element)}: ${element.outerHTML.slice(0, 120)}`);
}

function visibleFrames() {
  const pictures = new Map();
  for (const frame of document.querySelectorAll("#pictures [data-block]")) {
    const seen = pictures.get(frame.parentElement) ?? [];
    pictures.set(frame.parentElement, seen);
    const box = frame.getBoundingClientRect();
    if (isShown(frame) && box.width > 1 && box.height > 1) seen.push(frame.dataset.block);
  }
  return [...pictures.values()];
}

function sections() {
  return [...document.querySelectorAll("main > section[id]")].map((section) => section.id);
}

function rows(table) {
  return [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.innerText.trim()).join(" | "));
}

function orders(table, column) {
  const cells = [...table.tBodies[0].rows].map((row) => row.cells[column]);
  const isNumeric = cells.every((cell) => cell.dataset.value);
  const compares = isNumeric
    ? [(one, other) => Number(one.dataset.value) - Number(other.dataset.value)]
    : [undefined, { numeric: true }].map((options) => {
        const { compare } = new Intl.Collator(undefined, options); // "10" before "9", or after it
        return (one, other) => compare(one.textContent, other.textContent);
      });
  const found = new Set();
  for (const compare of compares) {
    const ways = cells.slice(1).map((cell, i) => compare(cells[i], cell));
    if (ways.every((way) => way <= 0)) found.add("ascending");
    if (ways.every((way) => way >= 0)) found.add("descending");
  }
  return [...found];
}

function sortedBy(table) {
  return [...table.querySelectorAll("th[aria-sort]")]
    .map((head) => [head.cellIndex, head.ariaSort])
    .filter(([, sort]) => sort !== "none");
}
