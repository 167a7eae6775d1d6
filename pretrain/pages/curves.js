/* Draws the curves of a report: reads the page's own numbers, unpacks the plotting library that the page carries, and
   asks nobody else for anything. */
"use strict";
(function () {
  const NARROW = 560;
  const FEW = 30;
  const EMPTY = [];
  const data = JSON.parse(document.getElementById("curves-numbers").textContent);
  const plots = Array.from(document.querySelectorAll(".plot"));
  const hidden = new Set();
  const look = { along: "step", smooth: 0.6, log: false };
  let zoom = null;
  let busy = false;

  function style(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function colour(number) {
    return style("--run-" + (number % data.colours));
  }

  function faint(hex, share) {
    const parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return "rgba(" + parts.join(",") + "," + share + ")";
  }

  function scaled(values) {
    return look.along === "seconds" ? values.map((value) => value / 3600) : values;
  }

  /* Where a step lies on the axis that is chosen: steps of an evaluation need not be those of a point. */
  function places(run, steps) {
    if (look.along === "step") return steps;
    const known = run.along.step || EMPTY;
    const axis = run.along[look.along];
    if (!axis) return null;
    return scaled(steps.map((step) => {
      let low = 0;
      let high = known.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (known[middle] < step) low = middle + 1; else high = middle;
      }
      if (low === known.length) return axis[axis.length - 1];
      const before = low ? known[low - 1] : 0;
      const start = low ? axis[low - 1] : 0;
      const share = known[low] === before ? 1 : (step - before) / (known[low] - before);
      return start + share * (axis[low] - start);
    }));
  }

  function points(run) {
    const axis = run.along[look.along];
    return axis ? scaled(axis) : null;
  }

  /* An exponential mean that starts at the first value, and passes over what is missing. */
  function smoothed(values, weight) {
    let sum = 0;
    let mass = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return sum / mass;
    });
  }

  function short(value, chart) {
    return chart.percent ? (100 * value).toPrecision(4) + "%" : String(Number(value.toPrecision(5)));
  }

  function curve(chart, run, number) {
    const found = run.curves[chart.key];
    const x = points(run);
    if (!found || !x) return EMPTY;
    const ink = colour(number);
    const made = [];
    if (found.low) {
      const edge = { x: x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", name: run.name };
      made.push(Object.assign({ y: found.low }, edge));
      made.push(Object.assign({ y: found.high, fill: "tonexty", fillcolor: faint(ink, 0.2) }, edge));
    }
    const weight = chart.smooth && x.length >= FEW ? look.smooth : 0;
    if (weight > 0 && !found.low) {
      const line = { color: ink, width: 1 };
      made.push({ x: x, y: found.mean, mode: "lines", line: line, opacity: 0.3, hoverinfo: "skip", name: run.name });
    }
    const exact = found.mean.map((value, at) => (value === null ? "" : found.low
      ? short(value, chart) + " (" + short(found.low[at], chart) + " to " + short(found.high[at], chart) + ")"
      : short(value, chart)));
    made.push({
      x: x, y: weight > 0 ? smoothed(found.mean, weight) : found.mean, customdata: exact, name: run.name,
      mode: x.length > 1 ? "lines" : "markers", line: { color: ink, width: 1.6 }, marker: { color: ink },
      hovertemplate: "%{customdata}",
    });
    return made;
  }

  function score(chart, run, number) {
    const found = run.scores[chart.key];
    const x = found && places(run, found.steps);
    if (!x) return EMPTY;
    const ink = colour(number);
    return [{
      x: x, y: found.values, mode: "lines+markers", name: run.name, line: { color: ink, width: 1.6 },
      marker: { color: ink, size: 5 }, hovertemplate: chart.percent ? "%{y:.2%}" : "%{y:.5~g}",
    }];
  }

  function marks(run, number) {
    return run.marks.map((kind) => {
      const x = places(run, kind.steps);
      return x && {
        x: x, y: x.map(() => 0.97), yaxis: "y2", mode: "markers", name: run.name, text: kind.texts,
        marker: { symbol: data.symbols[kind.kind], size: 8, color: colour(number), line: { width: 1, color: style("--ground") } },
        hovertemplate: "%{text}",
      };
    }).filter(Boolean);
  }

  function lines() {
    const made = [];
    data.runs.forEach((run, number) => {
      if (hidden.has(number)) return;
      (places(run, run.restarts) || EMPTY).forEach((x) => made.push({
        type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper",
        line: { color: colour(number), width: 1, dash: "dot" },
      }));
    });
    return made;
  }

  /* From the first step to the last one of all runs that are shown. */
  function whole() {
    let most = 0;
    data.runs.forEach((run, number) => {
      if (hidden.has(number)) return;
      const ends = [points(run) || EMPTY].concat(Object.values(run.scores).map((one) => places(run, one.steps) || EMPTY));
      ends.forEach((axis) => { most = Math.max(most, axis.length ? axis[axis.length - 1] : 0); });
    });
    return [-0.01 * (most || 1), 1.02 * (most || 1)];
  }

  /* The values between two places on the axis, with some room; null where there are none. */
  function fitting(traces, range, log) {
    let low = Infinity;
    let high = -Infinity;
    traces.forEach((trace) => {
      if (trace.yaxis !== "y2") trace.x.forEach((x, at) => {
        const y = trace.y[at];
        if (y === null || x < range[0] || x > range[1] || (log && y <= 0)) return;
        low = Math.min(low, y);
        high = Math.max(high, y);
      });
    });
    if (low > high) return null;
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    const room = 0.06 * (high - low) || 0.06 * Math.abs(high) || 1;
    return [low - room, high + room];
  }

  function figure(chart) {
    const traces = [];
    data.runs.forEach((run, number) => {
      if (hidden.has(number)) return;
      traces.push(...(chart.kind === "score" ? score : curve)(chart, run, number));
      if (chart.marked) traces.push(...marks(run, number));
    });
    const ink = style("--soft");
    const grid = style("--line");
    const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, tickfont: { size: 11 } };
    const form = { step: ",d", tokens: ".4s", seconds: ".4~g" }[look.along];
    const y = Object.assign({ exponentformat: "power", nticks: 6 }, axis);
    if (chart.percent) y.tickformat = ".3~%";
    if (chart.large) y.tickformat = "~s";
    if (chart.log && look.log) y.type = "log"; else if (chart.zero) y.rangemode = "tozero";
    const range = zoom || whole();
    const fit = zoom && fitting(traces, range, y.type === "log");
    if (fit) Object.assign(y, { range: fit, autorange: false });
    y.fixedrange = true;
    const shown = traces.some((trace) => trace.yaxis !== "y2");
    return {
      traces: traces,
      layout: {
        autosize: true, height: 250, margin: { l: 12, r: 10, t: 8, b: 30 }, showlegend: false,
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui, sans-serif" },
        hovermode: "x unified", hoverdistance: 30, shapes: lines(),
        hoverlabel: { bgcolor: style("--card"), bordercolor: style("--edge"), font: { color: style("--ink"), size: 12 }, namelength: 24 },
        dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
        xaxis: Object.assign({ hoverformat: form, spikecolor: ink, spikethickness: 1, nticks: innerWidth < NARROW ? 5 : 8,
          tickformat: look.along === "step" ? "~s" : look.along === "tokens" ? "~s" : "",
          range: range.slice(), autorange: false, ticksuffix: look.along === "seconds" ? " h" : "" }, axis),
        yaxis: y,
        yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
        annotations: shown ? [] : [{ text: "no numbers", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }],
      },
    };
  }

  async function draw() {
    busy = true;
    for (const plot of plots) {
      const made = figure(data.charts[Number(plot.dataset.chart)]);
      await Plotly.react(plot, made.traces, made.layout, { displayModeBar: false, responsive: true, doubleClick: false });
    }
    busy = false;
  }

  /* One zoom along the steps is every chart's. */
  function follow(change) {
    if (busy) return;
    if (change["xaxis.range[0]"] !== undefined) zoom = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    else return;
    draw();
  }

  function listen() {
    const along = document.getElementById("curves-along");
    const smooth = document.getElementById("curves-smooth");
    const log = document.getElementById("curves-log");
    along.addEventListener("change", () => { look.along = along.value; zoom = null; draw(); });
    smooth.addEventListener("input", () => { look.smooth = Number(smooth.value); draw(); });
    log.addEventListener("change", () => { look.log = log.checked; draw(); });
    look.along = along.value;
    look.smooth = Number(smooth.value);
    look.log = log.checked;
    document.querySelectorAll("button.run").forEach((button) => button.addEventListener("click", () => {
      const number = Number(button.dataset.run);
      const off = !hidden.delete(number);
      if (off) hidden.add(number);
      button.setAttribute("aria-pressed", String(!off));
      draw();
    }));
    plots.forEach((plot) => {
      plot.on("plotly_relayout", follow);
      plot.on("plotly_doubleclick", () => { zoom = null; draw(); });
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }

  async function unpack() {
    const packed = document.getElementById("curves-library").textContent.trim();
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  unpack().then(draw).then(listen).then(() => { document.body.dataset.drawn = "yes"; }).catch((error) => {
    const word = document.getElementById("curves-word");
    word.hidden = false;
    word.textContent = "The curves could not be drawn here (" + error + "); every other part of the page stands.";
  });
}());
