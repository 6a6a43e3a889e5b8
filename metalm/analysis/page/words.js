// One article: every word coloured by the change of its loss between two methods. Words only ever
// become text nodes.

// Changes, in nats, from which a colour begins; below the first a word has none.
const LEVELS = [0.1, 0.3, 0.7, 1.5, 3];
const WINDOW = 200;
const MOST_POINTS = 1200;

function level(saved) {
  const size = Math.abs(saved) + 1e-9;
  let found = 0;
  while (found < LEVELS.length && size >= LEVELS[found]) found += 1;
  return found;
}

function colourOf(saved) {
  const found = level(saved);
  return found === 0 ? "" : (saved > 0 ? "b" : "r") + found;
}

// Mean of the values around each one, as many as the window, cut off at both ends.
function runningMean(values, window) {
  const totals = new Float64Array(values.length + 1);
  for (let i = 0; i < values.length; i += 1) totals[i + 1] = totals[i] + values[i];
  return Float64Array.from(values, (_, i) => {
    const low = Math.max(i - Math.floor(window / 2), 0);
    const high = Math.min(i - Math.floor(window / 2) + window, values.length);
    return (totals[high] - totals[low]) / (high - low);
  });
}

function element(tag, content = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = content;
  if (className) made.className = className;
  return made;
}

function signed(number, digits) {
  return (number < 0 ? "\u2212" : "+") + Math.abs(number).toFixed(digits);
}

class Words {
  constructor() {
    for (const id of ["article", "method", "against", "previous", "next", "tally", "scale", "course", "text", "precision", "figure"]) {
      this[id] = document.getElementById(id);
    }
    this.shown = null; // the text whose words stand in the page
    this.spans = [];
    this.at = null;
    this.turn = 0;
    this.article.addEventListener("change", () => this.update());
    this.method.addEventListener("change", () => this.update());
    this.against.addEventListener("change", () => this.update());
    this.previous.addEventListener("click", () => this.go(-1));
    this.next.addEventListener("click", () => this.go(1));
    document.getElementById("pickers").addEventListener("submit", (event) => event.preventDefault());
    this.text.addEventListener("pointerover", (event) => this.point(event.target));
    // A finger that is lifted leaves too, but then the figures are to stay.
    this.text.addEventListener("pointerleave", ({ pointerType }) => pointerType !== "touch" && this.point(null));
    document.addEventListener("pointerdown", ({ target }) => this.text.contains(target) || this.point(null));
    this.text.addEventListener("scroll", () => this.point(null));
    this.text.addEventListener("keydown", (event) => this.walk(event));
    this.text.addEventListener("blur", () => this.point(null));
    this.drawLegend();
    this.digits = step < 0.1 ? 2 : 1;
    this.precision.textContent = this.explained();
  }

  explained() {
    const all = facts.modes.reduce((sum, mode) => sum + mode.keys.length, 0);
    const fewer = facts.columns.length < all ? " The page has no room for the words of the other methods." : "";
    return `Losses on hover are in nats, rounded to multiples of ${step}; the figures above the text are exact. A \u23ce is the end of a line, which is predicted like a word.${fewer}`;
  }

  drawLegend() {
    const marks = [...LEVELS].reverse().map((from, i) => [LEVELS.length - i, from, "b"]);
    for (const [number, from, side] of marks) this.scale.append(element("span", from, `w ${side}${number}`));
    this.scale.append(element("span", "0", "w"));
    LEVELS.forEach((from, i) => this.scale.append(element("span", from, `w r${i + 1}`)));
  }

  // Offers the articles and methods of a reading mode, with the choices that were made if it has them.
  async showMode(mode) {
    const kept = { article: this.chosenTitle(), method: this.chosenKey(this.method), against: this.chosenKey(this.against) };
    this.mode = mode;
    this.columns = mode.keys.map((key) => facts.columns.findIndex((c) => c.mode === mode.key && c.method === key));
    this.kept = mode.keys.map((_, i) => i).filter((i) => this.columns[i] >= 0);
    const [best, baseline] = mode.best;
    for (const [select, wanted, otherwise] of [[this.method, kept.method, best], [this.against, kept.against, baseline]]) {
      select.replaceChildren(...this.kept.map((i) => new Option(mode.methods[i], i)));
      select.value = mode.keys.indexOf(wanted);
      if (select.selectedIndex < 0) select.value = mode.keys.indexOf(otherwise);
    }
    this.article.replaceChildren(
      ...mode.articles.map((article, i) => {
        const option = new Option(article.title, i);
        option.disabled = !hasWords(article.text);
        return option;
      }),
    );
    const same = mode.articles.findIndex((article) => article.title === kept.article);
    const first = mode.articles.findIndex((article) => hasWords(article.text));
    this.article.value = Math.max(same, first, 0);
    await this.update();
  }

  chosenTitle() {
    return this.mode?.articles[this.article.value]?.title;
  }

  chosenKey(select) {
    return this.mode?.keys[select.value];
  }

  async go(by) {
    let place = Number(this.article.value) + by;
    while (this.article.options[place]?.disabled) place += by;
    if (this.article.options[place]) await this.pick(place);
  }

  async pick(article) {
    if (this.article.options[article].disabled) return;
    this.article.value = article;
    await this.update();
  }

  // Shows the picked article under the picked methods.
  async update() {
    const turn = (this.turn += 1);
    const mode = this.mode;
    const article = mode.articles[this.article.value];
    const [method, against] = [Number(this.method.value), Number(this.against.value)];
    this.nameArticles(method, against);
    this.tell(article, method, against);
    if (!hasWords(article.text)) {
      this.text.replaceChildren(element("p", "There was no room for the words of this article."));
      return;
    }
    const text = this.shown?.number === article.text ? this.shown : await unpackText(article.text);
    if (turn !== this.turn) return; // another choice was made meanwhile
    if (text !== this.shown) this.write({ ...text, number: article.text });
    const [own, other] = [method, against].map((n) => this.shown.losses.get(this.columns[n]));
    this.saved = Float64Array.from(own, (loss, i) => other[i] - loss);
    this.spans.forEach((span, i) => {
      const end = this.shown.words[i] === "\n" ? "w end" : "w";
      span.className = `${end} ${colourOf(this.saved[i])}`;
    });
    this.point(null);
    this.drawCourse();
  }

  nameArticles(method, against) {
    this.mode.articles.forEach((article, i) => {
      const words = facts.texts[article.text].words;
      const gain = (article.nats[against] - article.nats[method]) / words;
      const missing = hasWords(article.text) ? "" : ", words left out";
      this.article.options[i].textContent = `${article.title} (${words.toLocaleString("en")} words, ${signed(gain, 3)}${missing})`;
    });
    const place = Number(this.article.value);
    this.previous.disabled = place === 0;
    this.next.disabled = place === this.mode.articles.length - 1;
  }

  tell(article, method, against) {
    const words = facts.texts[article.text].words;
    const perplexity = (n) => Math.exp(article.nats[n] / words).toPrecision(4);
    const gain = (article.nats[against] - article.nats[method]) / words;
    this.tally.replaceChildren(
      `${this.mode.methods[method]} `,
      element("b", perplexity(method)),
      ` against ${this.mode.methods[against]} `,
      element("b", perplexity(against)),
      " perplexity per word in this article; it saves ",
      element("b", signed(gain, 3)),
      " nats a word.",
    );
  }

  // Puts the words of a text into the page, a paragraph a line.
  write(text) {
    const lines = document.createDocumentFragment();
    let line = document.createElement("p");
    this.spans = text.words.map((word, i) => {
      const span = element("span", word === "\n" ? "\u23ce" : word);
      span.place = i;
      line.append(span, " ");
      if (word === "\n") {
        lines.append(line);
        line = document.createElement("p");
      }
      return span;
    });
    lines.append(line);
    for (const one of lines.children) one.dir = "auto";
    this.text.replaceChildren(lines);
    this.text.scrollTop = 0;
    this.shown = text;
  }

  drawCourse() {
    const gains = runningMean(this.saved, WINDOW);
    const every = Math.max(1, Math.ceil(gains.length / MOST_POINTS));
    const places = [];
    for (let i = 0; i < gains.length; i += every) places.push(i);
    const data = [{
      x: places,
      y: places.map((i) => Number(gains[i].toPrecision(4))),
      type: "scatter",
      mode: "lines",
      line: { color: "#0072B2", width: 1.8 },
      hovertemplate: "word %{x:,}: %{y:.3f} nats a word<extra></extra>",
    }];
    const layout = {
      margin: { l: 8, r: 8, t: 8, b: 8 },
      hovermode: "x",
      showlegend: false,
      xaxis: { title: { text: "word of the article (click to go there)" }, automargin: true, zeroline: false, showgrid: false, tickformat: ",", range: [0, Math.max(1, gains.length - 1)] },
      yaxis: { title: { text: "gain (nats)" }, automargin: true, zeroline: true, zerolinecolor: "#8A8A8A" },
    };
    this.courseFigure = { data, layout };
    this.courseDrawn = draw(this.course, this.courseFigure).then(() => {
      this.course.removeAllListeners("plotly_click");
      this.course.on("plotly_click", ({ points }) => this.goTo(points[0].x));
    });
  }

  redress() {
    if (this.courseFigure) draw(this.course, this.courseFigure);
  }

  goTo(place) {
    const span = this.spans[place];
    if (!span) return;
    span.scrollIntoView({ block: "nearest" });
    const middle = span.getBoundingClientRect().top - this.text.getBoundingClientRect().top;
    this.text.scrollTop += middle - this.text.clientHeight / 2;
    requestAnimationFrame(() => requestAnimationFrame(() => this.point(span)));
  }

  walk(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") this.point(null);
    if (by === undefined) return;
    event.preventDefault();
    const place = Math.min(Math.max((this.last ?? -1) + by, 0), this.spans.length - 1);
    this.spans[place].scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => requestAnimationFrame(() => this.point(this.spans[place])));
  }

  // Shows the figures of the word under the pointer; anything else takes them away.
  point(target) {
    const place = target?.place;
    this.at?.classList.remove("at");
    this.at = null;
    this.figure.hidden = place === undefined;
    if (place === undefined) return;
    this.at = target;
    this.last = place;
    target.classList.add("at");
    this.figure.replaceChildren(...this.figures(place));
    this.putBeside(target);
  }

  figures(place) {
    const [method, against] = [Number(this.method.value), Number(this.against.value)];
    const word = this.shown.words[place];
    const saved = this.saved[place];
    const size = Math.abs(saved).toFixed(this.digits);
    const said = level(saved) === 0 ? "about the same" : saved > 0 ? `better by ${size} nats` : `worse by ${size} nats`;
    const table = document.createElement("table");
    this.kept.forEach((i) => {
      const row = table.insertRow();
      const name = element("th", this.mode.methods[i]);
      name.scope = "row";
      const loss = this.shown.losses.get(this.columns[i])[place];
      row.append(name, element("td", loss.toFixed(this.digits)));
      row.append(element("td", i === against ? "" : signed(this.shown.losses.get(this.columns[against])[place] - loss, this.digits)));
      row.className = i === method || i === against ? "strong" : "";
    });
    return [
      element("div", word === "\n" ? "end of the line" : word, "head"),
      element("div", `word ${(place + 1).toLocaleString("en")} of ${this.shown.words.length.toLocaleString("en")}: ${said}`),
      table,
    ];
  }

  putBeside(target) {
    const word = target.getBoundingClientRect();
    const tip = this.figure.getBoundingClientRect();
    const left = Math.min(Math.max(8, word.left), innerWidth - tip.width - 8);
    const below = word.bottom + 8;
    const top = below + tip.height < innerHeight ? below : word.top - tip.height - 8;
    this.figure.style.left = `${left}px`;
    this.figure.style.top = `${Math.max(8, top)}px`;
  }
}
