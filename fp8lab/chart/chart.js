// Makes a figure's picture interactive: the same points, each with the facts of its record.
//
// The page holds the data as JSON (a script of class "chart-data") and the figure as an ordinary picture, which
// readers without JavaScript see. This draws the points as SVG in the picture's place. Nothing is fetched.
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 250;
  const MARGIN = { top: 8, right: 10, bottom: 42, left: 52 };
  const DODGE = 8;
  const REACH = 40;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function shape(name, attributes = {}, text = "") {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  // Outlines of the static figure's markers: corners on a circle, or two radii in turn for stars and crosses.
  const OUTLINES = {
    s: [4, 45], D: [4, 0], "^": [3, 0], v: [3, 180], p: [5, 0], h: [6, 0],
    "*": [10, 0, 0.4], X: [8, 0, 0.45], P: [8, 45, 0.45],
  };

  function outline(marker, x, y, radius) {
    if (!(marker in OUTLINES)) {
      return `M${x - radius} ${y}a${radius} ${radius} 0 1 0 ${2 * radius} 0a${radius} ${radius} 0 1 0 ${-2 * radius} 0Z`;
    }
    const [corners, turn, inner = 1] = OUTLINES[marker];
    const shift = marker === "X" || marker === "P" ? 1 : 0;
    const points = Array.from({ length: corners }, (_, index) => {
      const angle = ((turn + (360 / corners) * index - 90) * Math.PI) / 180;
      const length = 1.2 * radius * ((index + shift) % 2 ? inner : 1);
      return `${(x + length * Math.cos(angle)).toFixed(2)} ${(y + length * Math.sin(angle)).toFixed(2)}`;
    });
    return `M${points.join("L")}Z`;
  }

  function niceTicks(low, high) {
    const rough = (high - low) / 6;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const ticks = [];
    for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step) ticks.push(value);
    return ticks.map((value) => [value, value.toFixed(digits).replace("-", "−")]);
  }

  class Panel {
    constructor(chart, spec) {
      this.chart = chart;
      this.spec = spec;
      this.series = chart.series.filter((series) => spec.points.some((point) => point.series === series.name));
      this.svg = shape("svg", {
        tabindex: "0", role: "group", "aria-roledescription": "chart", height: HEIGHT,
        "aria-label": `${spec.title}. Arrow keys go from point to point.`,
      });
      this.node = element("div", { class: "chart-panel" }, element("p", { class: "chart-title" }, spec.title), this.svg);
      this.svg.addEventListener("pointermove", (event) => this.choose(event));
      this.svg.addEventListener("pointerdown", (event) => this.choose(event));
      this.svg.addEventListener("keydown", (event) => this.step(event));
      this.svg.addEventListener("focus", () => {
        if (!this.shown().includes(chart.selected) && this.shown().length) chart.select(this.shown()[0]);
      });
    }

    shown() {
      return this.spec.points
        .filter((point) => !this.chart.off.has(point.series))
        .sort((a, b) => a.place[0] - b.place[0] || a.place[1] - b.place[1]);
    }

    draw(width) {
      const { x, y, points } = this.spec;
      const right = width - MARGIN.right;
      const bottom = HEIGHT - MARGIN.bottom;
      const logs = points.map((point) => Math.log(point.x));
      const [first, last] = [Math.min(...logs) - 0.25, Math.max(...logs) + 0.25];
      const values = points.flatMap((point) => [point.low ?? point.y, point.high ?? point.y, y.reference]);
      const room = 0.06 * (Math.max(...values) - Math.min(...values) || 1);
      const [low, high] = [Math.min(...values) - room, Math.max(...values) + room];
      const across = (value) => MARGIN.left + ((Math.log(value) - first) / (last - first)) * (right - MARGIN.left);
      const down = (value) => bottom - ((value - low) / (high - low)) * (bottom - MARGIN.top);

      this.svg.setAttribute("width", width);
      this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      this.svg.replaceChildren();
      for (const [value, text] of niceTicks(low, high)) {
        this.svg.append(shape("line", { x1: MARGIN.left, x2: right, y1: down(value), y2: down(value), class: "chart-grid" }));
        this.svg.append(shape("text", { x: MARGIN.left - 6, y: down(value) + 4, "text-anchor": "end" }, text));
      }
      let free = 0;
      for (const [value, text] of x.ticks) {
        if (across(value) < free) continue;
        free = across(value) + 7 * text.length + 8;
        this.svg.append(shape("text", { x: across(value), y: bottom + 17, "text-anchor": "middle" }, text));
      }
      this.svg.append(shape("line", { x1: MARGIN.left, x2: right, y1: bottom, y2: bottom, class: "chart-axis" }));
      const at = down(y.reference);
      this.svg.append(shape("line", { x1: MARGIN.left, x2: right, y1: at, y2: at, class: "chart-reference" }));
      const middle = (MARGIN.left + right) / 2;
      this.svg.append(shape("text", { x: middle, y: HEIGHT - 6, "text-anchor": "middle" }, x.label));
      const half = (MARGIN.top + bottom) / 2;
      const turned = { x: 12, y: half, "text-anchor": "middle", transform: `rotate(-90 12 ${half})` };
      this.svg.append(shape("text", turned, y.label));

      for (const point of points) {
        const index = this.series.findIndex((series) => series.name === point.series);
        const left = across(point.x) + DODGE * (index - (this.series.length - 1) / 2);
        point.place = [left, down(point.y)];
        const { colour, marker } = this.series[index];
        const group = shape("g", { class: "chart-point" });
        if (point.low != null) {
          const ends = { x1: left, x2: left, y1: down(point.low), y2: down(point.high) };
          group.append(shape("line", { ...ends, stroke: colour, "stroke-width": 2 }));
        }
        const fill = point.hollow || point.series === "bf16" ? "#fff" : colour;
        const style = { fill, stroke: colour, "stroke-width": 1.6 };
        group.append(shape("path", { d: outline(marker, left, down(point.y), 4.5), ...style }));
        point.node = group;
        this.svg.append(group);
      }
      this.ring = shape("circle", { r: 10, class: "chart-ring", visibility: "hidden" });
      this.svg.append(this.ring);
    }

    choose(event) {
      const box = this.svg.getBoundingClientRect();
      const distance = ({ place }) => Math.hypot(place[0] - event.clientX + box.left, place[1] - event.clientY + box.top);
      const nearest = this.shown().reduce((a, b) => (a && distance(a) <= distance(b) ? a : b), null);
      if (nearest && distance(nearest) < REACH) this.chart.select(nearest);
    }

    step(event) {
      const shown = this.shown();
      const at = shown.indexOf(this.chart.selected);
      const next = {
        ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1,
      }[event.key];
      if (next === undefined || !shown.length) return;
      event.preventDefault();
      this.chart.select(shown[Math.min(Math.max(next, 0), shown.length - 1)]);
    }
  }

  class Chart {
    constructor(spec, picture) {
      this.series = spec.series;
      this.off = new Set();
      this.panels = spec.panels.map((panel) => new Panel(this, panel));
      this.facts = element("div", { class: "chart-facts", "aria-live": "polite" });
      const toggles = element("div", { class: "chart-series", role: "group", "aria-label": "Recipes shown" });
      toggles.append(...this.series.map((series) => this.toggle(series)));
      const drawn = element("div", {}, toggles, ...this.panels.map((panel) => panel.node), this.facts);
      this.node = element("div", { class: "chart" }, this.pictureButton(picture, drawn), drawn);
      picture.before(this.node);
      picture.hidden = true;
      new ResizeObserver(() => this.draw()).observe(this.node);
      this.draw();
      const [{ spec: { points } }] = this.panels;
      this.select(points.reduce((best, point) => (point.y > best.y ? point : best)));
    }

    toggle({ name, colour, marker }) {
      const icon = shape("svg", { width: 14, height: 14, "aria-hidden": "true" });
      const fill = name === "bf16" ? "#fff" : colour;
      icon.append(shape("path", { d: outline(marker, 7, 7, 4.5), fill, stroke: colour, "stroke-width": 1.6 }));
      const button = element("button", { type: "button", "aria-pressed": "true" }, icon, name);
      button.addEventListener("click", () => {
        if (!this.off.delete(name)) this.off.add(name);
        button.setAttribute("aria-pressed", String(!this.off.has(name)));
        this.update();
      });
      return button;
    }

    pictureButton(picture, drawn) {
      const button = element("button", { type: "button", class: "chart-picture" }, "Show as a picture");
      button.addEventListener("click", () => {
        picture.hidden = !picture.hidden;
        drawn.hidden = !picture.hidden;
        button.textContent = picture.hidden ? "Show as a picture" : "Show the interactive chart";
      });
      return button;
    }

    draw() {
      const width = Math.floor(this.node.clientWidth);
      if (!width || width === this.width) return;
      this.width = width;
      for (const panel of this.panels) panel.draw(width);
      this.update();
    }

    update() {
      for (const { spec, ring } of this.panels) {
        ring.setAttribute("visibility", "hidden");
        for (const point of spec.points) {
          point.node.style.display = this.off.has(point.series) ? "none" : "";
          if (point === this.selected && !this.off.has(point.series)) {
            ring.setAttribute("cx", point.place[0]);
            ring.setAttribute("cy", point.place[1]);
            ring.setAttribute("visibility", "visible");
          }
        }
      }
    }

    select(point) {
      if (point === this.selected) return;
      this.selected = point;
      const list = element("dl");
      for (const [name, value] of point.facts) {
        list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
      }
      this.facts.replaceChildren(element("p", { class: "chart-title" }, point.title), list);
      this.update();
    }
  }

  for (const source of document.querySelectorAll("script.chart-data")) {
    const spec = JSON.parse(source.textContent);
    const picture = document.getElementById(spec.figure)?.querySelector("img");
    if (picture) new Chart(spec, picture);
  }
})();
