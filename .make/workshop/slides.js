// Slides: one at a time by keys, buttons or swipes; notes below, or in a window of the speaker's.
const slides = [...document.querySelectorAll(".slide")];
const place = document.querySelector(".place");
const keys = document.querySelector(".keys");
const began = Date.now();
let here = 0;
let speaker = null;

// A slide shrinks until it fits, to 13 pixels a letter; code then runs in two columns. What is still
// too long scrolls in a box, with words that say so.
const wide = (stage) =>
  [...stage.querySelectorAll(".output, .after, .katex-display")].filter((one) => one.scrollWidth > one.clientWidth + 2);
const tall = (stage) => stage.scrollHeight - stage.clientHeight - 2;
const hint = (words) => {
  const said = document.createElement("p");
  said.className = "more";
  said.textContent = words;
  return said;
};

const boxed = (one, words) => {
  one.classList.add("boxed");
  one.tabIndex = 0;
  one.setAttribute("role", "region");
  one.setAttribute("aria-label", words);
  one.after(hint(words));
};

const fit = (slide) => {
  const stage = slide.querySelector(".stage");
  const body = slide.querySelector(".body");
  body.querySelectorAll(".more").forEach((one) => one.remove());
  body.querySelectorAll(".boxed").forEach((one) => {
    one.classList.remove("boxed");
    ["tabindex", "role", "aria-label"].forEach((name) => one.removeAttribute(name));
    one.style.maxHeight = "";
  });
  const code = body.querySelector("pre.effnb-code, pre.code");
  const sizes = [1, 0.9, 0.8, 0.72, 0.65].map((size) => [size, false]);
  if (code && innerWidth >= 900) sizes.splice(4, 1, [0.9, true], [0.8, true], [0.72, true], [0.65, true]);
  for (const [size, columns] of sizes) {
    body.style.zoom = size;
    body.classList.toggle("columns", columns);
    if (tall(stage) <= 0 && !wide(stage).length) return;
  }
  for (const one of wide(stage)) boxed(one, "Goes on to the right: scroll here, or see the chapter.");
  if (tall(stage) <= 0) return;
  const height = (one) => one.getBoundingClientRect().height;
  const long = [...body.children].filter((one) => !one.matches(".more")).sort((a, b) => height(b) - height(a))[0];
  if (!long.matches(".boxed")) boxed(long, "Goes on below: scroll here, or see the chapter.");
  long.style.maxHeight = `${Math.max(120, (height(long) - tall(stage) - 6) / body.style.zoom)}px`;
};

const minutes = () => {
  const seconds = Math.floor((Date.now() - began) / 1000);
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
};

const tell = () => {
  if (!speaker || speaker.closed) return;
  const notes = slides[here].querySelector(".notes");
  const next = slides[here + 1];
  const title = (slide) => slide.querySelector("h1, h2").innerHTML;
  speaker.document.body.innerHTML =
    `<p class="clock"></p><h1>${title(slides[here])}</h1>${notes ? notes.innerHTML : "<p>No notes.</p>"}` +
    `<hr><p>Next: ${next ? title(next) : "the end"}</p>`;
};

const go = (to, remember = true) => {
  here = Math.max(0, Math.min(slides.length - 1, to));
  slides.forEach((slide, i) => slide.classList.toggle("here", i === here));
  fit(slides[here]);
  place.textContent = `${here + 1} / ${slides.length}`;
  if (remember) history.replaceState(null, "", `#s${here + 1}`);
  tell();
};

const openSpeaker = () => {
  speaker = window.open("", "speaker", "width=900,height=700");
  if (!speaker) return;
  const style = [...document.querySelectorAll("style")].map((one) => one.outerHTML).join("");
  speaker.document.head.innerHTML = `<title>Notes</title>${style}<style>body { padding: 1.5rem; }</style>`;
  speaker.addEventListener("keydown", pressed);
  tell();
};

const toggleNotes = () => {
  document.body.classList.toggle("with-notes");
  fit(slides[here]);
};

const actions = {
  ArrowRight: () => go(here + 1), PageDown: () => go(here + 1), " ": () => go(here + 1),
  ArrowLeft: () => go(here - 1), PageUp: () => go(here - 1), Backspace: () => go(here - 1),
  Home: () => go(0), End: () => go(slides.length - 1),
  n: toggleNotes, s: openSpeaker, f: () => document.documentElement.requestFullscreen(),
};

function pressed(event) {
  const inField = event.target.closest && event.target.closest("input, button, textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || inField) return;
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

for (const [words, does] of [["Back", "ArrowLeft"], ["Next", "ArrowRight"], ["Notes (N)", "n"], ["Speaker (S)", "s"]]) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = words;
  button.addEventListener("click", actions[does]);
  keys.append(button);
}

let touched = null;
addEventListener("touchstart", (event) => (touched = event.target.closest("input, pre, table") ? null : event.touches[0].clientX), { passive: true });
addEventListener("touchend", (event) => {
  if (touched === null) return;
  const moved = event.changedTouches[0].clientX - touched;
  if (Math.abs(moved) > 60) go(here + (moved < 0 ? 1 : -1));
});
addEventListener("keydown", pressed);
addEventListener("resize", () => fit(slides[here]));
document.addEventListener("click", () => setTimeout(() => fit(slides[here]))); // a panel has opened
addEventListener("hashchange", () => go(Number(location.hash.slice(2)) - 1 || 0, false));
setInterval(() => {
  const clock = speaker && !speaker.closed && speaker.document.querySelector(".clock");
  if (clock) clock.textContent = minutes();
}, 1000);

document.documentElement.classList.add("playing");
document.body.classList.add("playing");
go(Number(location.hash.slice(2)) - 1 || 0, false);
