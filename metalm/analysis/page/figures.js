// Plotly's figures: loaded when the first is wanted, drawn when they come near the window, and
// dressed in the page's colours.

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const coarsePointer = matchMedia("(pointer: coarse)");

// Colours of methods that would be too dark on a dark ground (metalm/analysis/appearance.py).
const AT_NIGHT = { "#333333": "#D5D9DD", "#8A8A8A": "#8F979F", "#0072B2": "#3B93D9", "#56B4E9": "#A6DCFA", "#D55E00": "#EE7F2D", "#009E73": "#27B98D", "#8C510A": "#B57B40" };

// The library is a script whose hash the page's policy names.
const library = once(async () => {
  const script = document.createElement("script");
  script.textContent = await inflatedText("plotly");
  document.head.append(script);
  return window.Plotly;
});

const figureData = once(async () => JSON.parse(await inflatedText("figure-data")));

function pageColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A copy of a figure in which colours suit the scheme.
function dressed(value) {
  if (typeof value === "string") return (darkScheme.matches && AT_NIGHT[value]) || value;
  if (Array.isArray(value)) return value.map(dressed);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, dressed(item)]));
}

// Where there is little room: smaller letters, and names of places without their second line.
const NARROW = 480;
const firstLine = (text) => text.split("<br>")[0];

function dressedLayout(layout, narrow) {
  const [ink, line, surface, muted] = ["--ink", "--line", "--surface", "--muted"].map(pageColour);
  const axis = { gridcolor: line, linecolor: line, tickcolor: line };
  const copy = dressed(layout);
  const named = narrow && copy.xaxis.ticktext ? { ticktext: copy.xaxis.ticktext.map(firstLine) } : {};
  const titles = ["xaxis", "yaxis"].map((name) => ({ ...copy[name]?.title, font: { size: narrow ? 11 : 13 } }));
  return {
    ...copy,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: ink },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
    hoverlabel: { ...copy.hoverlabel, bgcolor: surface, bordercolor: line, font: { color: ink } },
    dragmode: coarsePointer.matches ? false : "zoom",
    xaxis: { ...axis, ...copy.xaxis, ...named, title: titles[0] },
    yaxis: { ...axis, ...copy.yaxis, title: titles[1] },
  };
}

// Draws a figure into an element; drawing again changes what is there.
async function draw(element, { data, layout }) {
  const plotly = await library();
  await plotly.react(element, data.map(dressed), dressedLayout(layout, element.clientWidth < NARROW), {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  });
}

// Lines whose marks stand beside one another, each a little away from the middle of its place.
function besideOneAnother(lines, { reach, step }) {
  const span = Math.min(reach, step * (lines.length - 1));
  return lines.map((line, i) => {
    const shift = lines.length < 2 ? 0 : span * ((2 * i) / (lines.length - 1) - 1);
    return { ...line, x: line.x.map((place) => place + shift) };
  });
}

const BROAD = /^(gain_along_articles|recorded_)/;
const SVG = "http://www.w3.org/2000/svg";
const LINES = { solid: "", dash: "5 3", dot: "1.5 2.5" };
// Outlines of markers around the middle of a 30 x 12 picture, by plotly's names.
const OUTLINES = {
  circle: "M11.5 6a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
  square: "M11.8 2.8h6.4v6.4h-6.4z",
  "triangle-up": "M15 2l4 7h-8z",
  "triangle-down": "M15 10l4-7h-8z",
  "triangle-left": "M11 6l7-4v8z",
  diamond: "M15 1.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
  cross: "M13.8 2h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z",
  x: "M12.2 2l2.8 2.6l2.8-2.6l1.4 1.4l-2.8 2.6l2.8 2.6l-1.4 1.4l-2.8-2.6l-2.8 2.6l-1.4-1.4l2.8-2.6l-2.8-2.6z",
};

// The line and the marker of a method, as figures draw them.
function picture({ colour, dash, symbol }) {
  const svg = document.createElementNS(SVG, "svg");
  const shown = dressed(colour);
  const solid = symbol.replace("-open", "");
  const parts = [
    ["path", { d: "M0 6h30", stroke: shown, "stroke-width": 2, "stroke-dasharray": LINES[dash] }],
    ["path", { d: OUTLINES[solid], stroke: shown, "stroke-width": 1.2, fill: symbol === solid ? shown : pageColour("--surface") }],
  ];
  for (const [key, value] of [["width", 30], ["height", 12], ["aria-hidden", "true"]]) svg.setAttribute(key, value);
  for (const [tag, attributes] of parts) {
    const part = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    svg.append(part);
  }
  return svg;
}

class Figures {
  constructor(onArticle) {
    this.place = document.getElementById("figures");
    this.legend = document.getElementById("methods");
    this.fewer = document.getElementById("fewer");
    this.onArticle = onArticle;
    // Methods that are not ticked; at first those that would make the figures crowded.
    this.hidden = new Set(facts.modes.flatMap((mode) => mode.keys.filter((_, i) => !mode.first[i])));
    this.charts = new Map();
    this.near = new IntersectionObserver((entries) => this.drawNear(entries), { rootMargin: "200px" });
  }

  // Puts up the figures of a reading mode; each is drawn once it comes near the window.
  async show(mode) {
    this.mode = mode;
    this.drawLegend();
    const charts = (await figureData())[mode.key];
    this.near.disconnect();
    for (const plot of this.charts.keys()) window.Plotly?.purge(plot);
    this.charts.clear();
    this.place.replaceChildren(...charts.map((chart) => this.framed(chart)));
    for (const plot of this.charts.keys()) this.near.observe(plot);
  }

  // One legend for all figures; it takes methods out of them and puts them back.
  drawLegend() {
    const labels = this.mode.methods.map((name, i) => {
      const key = this.mode.keys[i];
      const choice = document.createElement("input");
      choice.type = "checkbox";
      choice.checked = !this.hidden.has(key);
      choice.addEventListener("change", () => {
        if (choice.checked) this.hidden.delete(key);
        else this.hidden.add(key);
        this.drawAgain();
      });
      const label = document.createElement("label");
      label.append(choice, picture(this.mode.looks[i]), name);
      return label;
    });
    this.legend.replaceChildren(this.legend.firstElementChild, ...labels);
    this.fewer.hidden = this.mode.first.every((first) => first);
  }

  framed(chart) {
    const figure = document.createElement("figure");
    figure.classList.toggle("broad", BROAD.test(chart.name));
    const heading = document.createElement("h3");
    heading.textContent = chart.title;
    const plot = document.createElement("div");
    plot.className = chart.name.startsWith("recorded_") ? "plot tall" : "plot";
    plot.id = chart.name;
    const caption = document.createElement("figcaption");
    caption.className = "caption";
    caption.textContent = chart.caption;
    figure.append(heading, plot, caption);
    this.charts.set(plot, chart);
    return figure;
  }

  async drawNear(entries) {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      this.near.unobserve(target);
      await this.draw(target);
      if (this.charts.get(target)?.name === "gain_by_article") {
        target.on("plotly_click", ({ points }) => this.onArticle(points[0].customdata));
      }
    }
  }

  draw(plot) {
    const { data, layout } = this.charts.get(plot).figure;
    const shown = data.filter((line) => !this.hidden.has(line.meta));
    return draw(plot, { data: layout.meta ? besideOneAnother(shown, layout.meta) : shown, layout });
  }

  // What has been drawn, in other colours or with other methods.
  drawAgain() {
    for (const plot of this.charts.keys()) {
      if (plot.classList.contains("js-plotly-plot")) this.draw(plot);
    }
  }

  redress() {
    this.drawLegend();
    this.drawAgain();
  }
}
