// Panels: show the frame for the positions of the controls. All else on the page is plain HTML.
for (const panel of document.querySelectorAll("section.panel")) {
  const frames = [...panel.querySelectorAll(".panel-frame")];
  const grid = panel.querySelector(".panel-frames").dataset.grid.split(" ").map(Number);
  const said = panel.querySelector(".panel-said");
  let speaking;

  const controls = [...panel.querySelectorAll(".panel-control")].map((control) => {
    const knob = control.querySelector("input[type=range]");
    const choices = [...control.querySelectorAll("input[type=radio]")];
    const words = knob
      ? [...control.querySelectorAll(".panel-ticks span")].map((tick) => tick.textContent)
      : choices.map((choice) => choice.parentElement.textContent);
    return {
      knob,
      words,
      inputs: knob ? [knob] : choices,
      output: control.querySelector(".panel-value"),
      label: control.querySelector("label, legend").textContent,
      index: () => Number(knob ? knob.value : choices.find((choice) => choice.checked).value),
    };
  });

  const show = (speak) => {
    let place = 0;
    for (const { knob, words, output, index } of controls) {
      place = place * words.length + index();
      if (!knob) continue;
      output.textContent = words[index()];
      knob.setAttribute("aria-valuetext", words[index()]);
      knob.style.setProperty("--part", index() / (words.length - 1));
    }
    frames.forEach((frame, i) => (frame.hidden = i !== grid[place]));
    if (!speak) return;
    // For screen readers: the new numbers, once the knob has come to rest.
    clearTimeout(speaking);
    speaking = setTimeout(() => {
      const numbers = frames[grid[place]].querySelector(".effnb-numbers");
      const where = controls.map(({ label, words, index }) => `${label} ${words[index()]}`);
      said.textContent = `${where.join(", ")}. ${numbers ? numbers.textContent : ""}`;
    }, 400);
  };

  // Frames that are hidden have not fetched their pictures yet: do it when a hand comes near.
  const fetchAll = () => {
    for (const picture of panel.querySelectorAll("img[loading=lazy]")) picture.loading = "eager";
  };
  for (const sign of ["pointerenter", "focusin", "touchstart"]) {
    panel.addEventListener(sign, fetchAll, { once: true, passive: true });
  }
  for (const { inputs } of controls) {
    for (const input of inputs) input.addEventListener("input", () => show(true));
  }
  show(false);

  // A question comes first: the panel opens when a guess is made, or skipped.
  const form = panel.querySelector(".panel-question");
  if (!form) continue;
  const body = panel.querySelector(".panel-body");
  const verdict = form.querySelector(".panel-verdict");
  body.hidden = true;
  const open = (words) => {
    body.hidden = false;
    form.querySelector("fieldset").disabled = true;
    form.classList.add("panel-answered");
    verdict.textContent = `${words} ${form.dataset.answer}`.trim();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const chosen = form.querySelector("input:checked");
    const typed = form.querySelector("input[type=text]");
    const words = typed ? typed.value.trim() : chosen && chosen.parentElement.textContent;
    const number = typed && Number(words.replace(",", ".").replace("%", ""));
    if (!words || (typed && !Number.isFinite(number))) {
      verdict.textContent = typed ? "Not yet: type a number." : "Not yet: choose one.";
      return;
    }
    const unit = typed && !words.endsWith(form.dataset.unit) ? ` ${form.dataset.unit}` : "";
    open(`Your guess: ${words}${unit}.`);
  });
  form.querySelector(".panel-skip").addEventListener("click", () => open(""));
}

// What scrolls sideways has to be reachable from the keyboard.
const scrolling = ".cell_output pre, .cell_output .output.text_html, .math-block, .listing pre, table";
const reach = () => {
  for (const box of document.querySelectorAll(scrolling)) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("load", reach);
addEventListener("resize", reach);

// Claims: an outcome and a section may be chosen.
const filter = document.querySelector(".claims-filter");
if (filter) {
  const choose = () => {
    let shown = 0;
    for (const claim of document.querySelectorAll("section.claim")) {
      const { outcome, section } = claim.dataset;
      const fits = [[filter.outcome.value, outcome], [filter.section.value, section]];
      claim.hidden = !fits.every(([wanted, is]) => !wanted || wanted === is);
      shown += !claim.hidden;
    }
    for (const article of document.querySelectorAll("article section:has(> section.claim)")) {
      article.hidden = !article.querySelector("section.claim:not([hidden])");
    }
    filter.querySelector("[role=status]").textContent = `${shown} ${shown === 1 ? "claim" : "claims"}`;
  };
  filter.addEventListener("change", choose);
  filter.addEventListener("submit", (event) => event.preventDefault());
}

// Escape closes the definition of a term, where it covers what is to be read.
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const term of document.querySelectorAll(".term:hover, .term:focus-within")) {
    term.classList.add("term-closed");
    const open = () => term.classList.remove("term-closed");
    for (const leaving of ["mouseleave", "focusout"]) term.addEventListener(leaving, open, { once: true });
  }
});

// Code can be taken along.
for (const pre of document.querySelectorAll("article .cell_input pre, article .listing pre, article .chapter-bar pre")) {
  if (!navigator.clipboard) break;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy-code";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy this code");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(pre.innerText);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  const box = pre.closest(".highlight") || pre.parentElement;
  box.classList.add("copy-place");
  box.append(button);
}
