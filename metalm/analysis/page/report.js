// Puts the page together: the picker of the reading mode, the words, the curves.

function fail(error) {
  const notice = document.getElementById("failure");
  notice.textContent = `This part of the page did not start (${error.message}). It needs a browser of 2023 or later; tables and configuration are complete without it.`;
  notice.hidden = false;
  throw error;
}

const words = new Words();
const figures = new Figures(async (article) => {
  await words.pick(article);
  document.getElementById("words").scrollIntoView();
});

async function showMode(number) {
  for (const part of document.querySelectorAll("section.mode")) {
    part.hidden = Number(part.dataset.mode) !== number;
  }
  const mode = facts.modes[number];
  await Promise.all([words.showMode(mode), figures.show(mode)]);
}

function offerModes() {
  const place = document.getElementById("modes");
  facts.modes.forEach((mode, number) => {
    const choice = document.createElement("input");
    choice.type = "radio";
    choice.name = "mode";
    choice.value = number;
    choice.checked = number === 0;
    choice.addEventListener("change", () => showMode(number).catch(fail));
    const label = document.createElement("label");
    label.append(choice, mode.name);
    place.append(label);
  });
  place.hidden = facts.modes.length < 2;
}

offerModes();
darkScheme.addEventListener("change", () => {
  words.redress();
  figures.redress();
});
showMode(0)
  .then(() => words.courseDrawn)
  .then(() => {
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  })
  .catch(fail);
