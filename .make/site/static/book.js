// Panels: show the frame on which the control stands. Everything else on the page is plain HTML.
for (const panel of document.querySelectorAll("section.panel")) {
  const frames = [...panel.querySelectorAll(".panel-frame")];
  const knob = panel.querySelector("input[type=range]");
  const choices = [...panel.querySelectorAll("input[type=radio]")];
  const output = panel.querySelector(".panel-value");
  const said = panel.querySelector(".panel-said");
  const words = knob
    ? [...panel.querySelectorAll(".panel-ticks span")].map((tick) => tick.textContent)
    : choices.map((choice) => choice.parentElement.textContent);
  const label = panel.querySelector(".panel-control > label, legend").textContent;
  let speaking;

  const show = (index, speak) => {
    frames.forEach((frame, i) => (frame.hidden = i !== index));
    if (knob) {
      output.textContent = words[index];
      knob.setAttribute("aria-valuetext", words[index]);
      knob.style.setProperty("--part", index / (frames.length - 1));
    }
    if (!speak) return;
    // For screen readers: the new numbers, once the knob has come to rest.
    clearTimeout(speaking);
    speaking = setTimeout(() => {
      const numbers = frames[index].querySelector(".effnb-numbers");
      said.textContent = `${label} ${words[index]}. ${numbers ? numbers.textContent : ""}`;
    }, 400);
  };

  // Frames that are hidden have not fetched their pictures yet: do it when a hand comes near.
  const fetchAll = () => {
    for (const picture of panel.querySelectorAll("img[loading=lazy]")) picture.loading = "eager";
  };
  for (const sign of ["pointerenter", "focusin", "touchstart"]) {
    panel.addEventListener(sign, fetchAll, { once: true, passive: true });
  }

  if (knob) {
    knob.addEventListener("input", () => show(Number(knob.value), true));
    show(Number(knob.value), false);
  }
  for (const choice of choices) {
    choice.addEventListener("change", () => show(Number(choice.value), true));
    if (choice.checked) show(Number(choice.value), false);
  }
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
