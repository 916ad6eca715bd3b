// Slides: one at a time by keys, buttons or swipes; notes below, or in a window of the speaker's.
const slides = [...document.querySelectorAll(".slide")];
const place = document.querySelector(".place");
const keys = document.querySelector(".keys");
const began = Date.now();
let here = 0;
let speaker = null;

// A slide shrinks until it fits; what is still too long scrolls.
const fit = (slide) => {
  const stage = slide.querySelector(".stage");
  for (const size of [1, 0.9, 0.8, 0.72, 0.65, 0.58]) {
    slide.querySelector(".body").style.zoom = size;
    if (stage.scrollHeight <= stage.clientHeight + 2) break;
  }
  stage.tabIndex = stage.scrollHeight > stage.clientHeight + 2 ? 0 : -1;
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
