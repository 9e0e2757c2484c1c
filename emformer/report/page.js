"use strict";
// Draws the figures of a report from the data beside it. A figure is a function of its box; it is called when the reader comes near.
// Strings in the data have every unseen character written out already; here they become text nodes, or go through `shown`.
(() => {
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#8A8A8A"]; // Okabe and Ito
  const SYMBOLS = ["circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star"];
  const SOLIDS = ["circle", "square", "diamond", "cross", "x", "circle-open", "square-open", "diamond-open"]; // plotly has these in 3-D
  const GLYPHS = ["●", "■", "◆", "✚", "✖", "▲", "▼", "★"];
  const SOLID_GLYPHS = ["●", "■", "◆", "✚", "✖", "○", "□", "◇"];
  const INK = "#222222", GREY = "#8A8A8A", PALE = "#D9D9D9", BLUE = "#0072B2", VERMILION = "#D55E00", PURPLE = "#CC79A7";
  const BANDS = { attn: "#FDF0DD", ffn: "#E9F2F9" };
  const VIRIDIS = ["#C8E020", "#7AD151", "#22A884", "#2A788E", "#414487", "#440154"]; // pale to dark, without what white swallows
  const DIVERGING = [[0, "#2166AC"], [0.25, "#92C5DE"], [0.5, "#F7F7F7"], [0.75, "#F4A582"], [1, "#B2182B"]];
  const BLUES = [[0, "#FFFFFF"], [0.15, "#DEEBF7"], [0.5, "#6BAED6"], [1, "#08306B"]];
  const ORANGES = [[0, "#FFFFFF"], [0.5, "#FDAE6B"], [1, "#A63603"]];
  const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"; // the reader's own; none is loaded
  const Z95 = 1.96; // half width of a 95 % interval in standard errors
  const coarse = matchMedia("(pointer: coarse)").matches;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

  // data

  const cache = {};
  const read = name => {
    const source = document.getElementById(`data-${name}`);
    return (cache[name] ??= source && JSON.parse(source.textContent));
  };

  /** An array that emformer.report.packing packed: flat numbers, NaN where undefined, and its shape. */
  function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.codes), c => c.charCodeAt(0));
    const wide = packed.bits === 16, low = Number(packed.low), high = Number(packed.high);
    const step = (high - low) / (2 ** packed.bits - 2);
    const values = new Float64Array(wide ? bytes.length / 2 : bytes.length);
    for (let k = 0; k < values.length; k++) {
      const code = wide ? bytes[2 * k] + 256 * bytes[2 * k + 1] : bytes[k];
      values[k] = code ? low + (code - 1) * step : NaN;
    }
    return { values, shape: packed.shape };
  }

  const range = count => Array.from({ length: count }, (_, k) => k);
  const finite = values => Array.from(values).filter(Number.isFinite);
  const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
  const mix = share => { // a colour of VIRIDIS, share in [0, 1]
    const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), k = Math.min(Math.floor(at), VIRIDIS.length - 2), part = at - k;
    const channel = (text, c) => parseInt(text.slice(1 + 2 * c, 3 + 2 * c), 16);
    return `rgb(${range(3).map(c => Math.round(channel(VIRIDIS[k], c) * (1 - part) + channel(VIRIDIS[k + 1], c) * part)).join(",")})`;
  };
  const number = (value, digits = 3) => (value === null || !Number.isFinite(value) ? "undefined" : String(Number(value.toPrecision(digits))));
  const span = (values, pad = 0.06) => {
    const known = finite(values);
    if (!known.length) return [0, 1];
    const low = Math.min(...known), high = Math.max(...known), room = (high - low || Math.abs(high) || 1) * pad;
    return [low - room, high + room];
  };

  /** Text for plotly, which reads a little HTML, and formulas between dollars; isolated, so that its direction stays its own. */
  const shown = text => "\u2068" + String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("$", "&#36;") + "\u2069";
  /** A token by its id: two of the same letters are told apart by the space before, and parts of a character by their number. */
  const spelt = id => {
    const { ids, words } = read("cloud"), text = words.flat()[ids.indexOf(id)];
    if (text.includes("\ufffd")) return `bytes (id ${id})`;
    return /^ ./.test(text) ? `␣${word(text).replace(/^[ ␣·]/, "")}` : word(text);
  };
  const place = (prompt, position) => `prompt ${prompt}, token ${position}`;

  /** A token between its neighbours, for a hover label. */
  function context(prompt, position, reach = 5) {
    const words = read("cloud").words[prompt];
    const part = (from, to) => shown(words.slice(Math.max(0, from), to).join(""));
    const before = (position > reach ? "… " : "") + part(position - reach, position);
    const after = part(position + 1, position + 1 + reach) + (position + 1 + reach < words.length ? " …" : "");
    return `${before}<b>${shown(words[position])}</b>${after}`;
  }
  const word = text => (text.trim() === "" ? text.replaceAll(" ", "␣") : text.trim());

  // elements

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function labelled(box, name, input, wide) {
    const label = element("label", name);
    if (wide) label.className = "wide";
    label.append(input);
    box.controls.append(label);
    return label;
  }

  /** A select of [value, text] or [group, [[value, text] …]]; `change` is called with the value. */
  function select(box, name, options, change) {
    const input = element("select", undefined, { name });
    const add = (parent, [value, text]) => parent.append(element("option", text, { value }));
    for (const option of options) {
      if (Array.isArray(option[1])) {
        const group = element("optgroup", undefined, { label: option[0] });
        option[1].forEach(one => add(group, one));
        input.append(group);
      } else add(input, option);
    }
    input.addEventListener("change", () => change(input.value));
    labelled(box, name, input);
    return input;
  }

  /** A slider over `names`, which says where it stands; `change` is called with the index. */
  function slider(box, name, names, change) {
    const input = element("input", undefined, { type: "range", name, min: 0, max: names.length - 1, step: 1, value: 0 });
    const label = labelled(box, `${name} `, input, true), said = element("output");
    label.insertBefore(said, input);
    const tell = () => {
      said.textContent = names[input.value] ?? "";
      input.setAttribute("aria-valuetext", said.textContent);
    };
    input.addEventListener("input", () => { tell(); change(Number(input.value)); });
    tell();
    input.hidden = names.length < 2; // what it stands at is told all the same
    return { input, set(index) { input.value = index; tell(); change(index); }, get at() { return Number(input.value); }, rename(next) {
      names = next; input.max = names.length - 1; input.hidden = names.length < 2; tell();
    } };
  }

  function player(box, track, count, pause = 1000) { // milliseconds between two
    const button = element("button", "▶ play", { type: "button" });
    let timer = null;
    const stop = () => { clearTimeout(timer); timer = null; button.textContent = "▶ play"; };
    const tick = () => {
      if (track.at >= count - 1) return stop();
      track.set(track.at + 1);
      timer = setTimeout(tick, pause);
    };
    button.addEventListener("click", () => {
      if (timer !== null) return stop();
      button.textContent = "❚❚ pause";
      if (track.at >= count - 1) track.set(0);
      timer = setTimeout(tick, Math.min(400, pause));
    });
    track.input.addEventListener("pointerdown", stop);
    button.hidden = count < 2;
    box.controls.append(button);
    return button;
  }

  function legend(box, entries) {
    box.legend.replaceChildren(...entries.map(([glyph, colour, text]) => {
      const entry = element("span"), mark = element("i", glyph);
      mark.style.color = colour;
      entry.append(mark, element("bdi", text));
      return entry;
    }));
  }

  /** Buttons that switch what they name, and the legend at once: [glyph, colour, text]; `change` is called with the index and whether it is on. */
  function switches(box, entries, change) {
    const made = entries.map(([glyph, colour, text], k) => {
      const button = element("button", undefined, { type: "button", "aria-pressed": "true" }), mark = element("i", glyph, { "aria-hidden": "true" });
      mark.style.color = colour;
      button.append(mark, element("bdi", text));
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", on);
        change(k, on);
      });
      return button;
    });
    box.legend.replaceChildren(...made);
  }

  // plotly

  const narrow = plot => plot.clientWidth < 520;

  function axis(title, extra = {}) {
    return { title: { text: title, standoff: 8 }, zeroline: false, gridcolor: "#E4E4E4", linecolor: "#555555", ticks: "outside", tickcolor: "#999999", automargin: true, ...extra };
  }

  function layout(extra) {
    return {
      font: { family: FONT, size: 13, color: INK },
      paper_bgcolor: "#FFFFFF", plot_bgcolor: "#FFFFFF", margin: { l: 54, r: 14, t: 14, b: 44 }, hovermode: "closest", showlegend: false,
      hoverlabel: { align: "left", bgcolor: "#FFFFFF", bordercolor: "#555555", font: { family: FONT, color: INK, size: 13 }, namelength: -1 },
      legend: { orientation: "h", y: -0.18, yanchor: "top", x: 0, font: { size: 12 } },
      dragmode: coarse ? false : "zoom", // a finger scrolls the page
      ...extra,
    };
  }

  const draw = (plot, traces, shape) => Plotly.react(plot, traces, layout(shape), {
    responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover", typesetMath: false,
    showSendToCloud: false, plotlyServerURL: "", // nothing leaves the page
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  });

  /** Training steps on a scale that is even in log(1 + step). */
  const early = step => Math.log10(1 + step);
  function stepAxis(steps) {
    const kept = [];
    const width = early(steps.at(-1)) - early(steps[0]) || 1;
    for (const step of [...steps].reverse()) if (!kept.length || early(kept.at(-1)) - early(step) > 0.07 * width) kept.push(step);
    return axis("training step", { tickvals: kept.map(early), ticktext: kept.map(step => step.toLocaleString("en")) });
  }
  const share = (step, steps) => (steps.length < 2 ? 1 : (early(step) - early(steps[0])) / (early(steps.at(-1)) - early(steps[0]) || 1));

  /** Grounds that tell the steps of attention from those of the FFN, on an axis of states 0, 1, 2 … */
  const grounds = points => points.flatMap((point, k) => (BANDS[point] ? [{
    type: "rect", xref: "x", yref: "paper", x0: k - (k ? 1 : 0.5), x1: k, y0: 0, y1: 1, fillcolor: BANDS[point], line: { width: 0 }, layer: "below",
  }] : []));

  // series of records

  const grid = (series, name, row, column) => {
    const values = series[name];
    return values === undefined ? null : Array.isArray(values) ? values[row][column] : values;
  };
  const find = (key, cloud, param = "") => read("explorer").series.find(one => one.key === key && one.cloud === cloud && one.param === param);
  const bars = se => (se.some(one => one !== null) ? { array: se.map(one => (one === null ? 0 : Z95 * one)), thickness: 1.3, width: 3 } : undefined);

  function hoverOf(series, row, column) {
    const se = grid(series, "se", row, column), chance = grid(series, "null", row, column);
    return `${shown(series.places[column])}, step ${series.steps[row].toLocaleString("en")}<br><b>${number(series.mean[row][column], 4)}</b>` +
      (se === null ? "" : ` ± ${number(se, 2)} (standard error)`) + (chance === null ? "" : `<br>by chance ${number(chance)}`);
  }

  /** Lines of one series: by depth, a line a step; or by training step, a line a place. */
  function lines(plot, series, along, name) {
    const { steps, places } = series, depth = along === "depth";
    const outer = range(depth ? steps.length : places.length), inner = range(depth ? places.length : steps.length);
    const cell = (line, k) => (depth ? [line, k] : [k, line]);
    const x = depth ? inner : steps.map(early);
    const traces = outer.map(line => {
      const last = line === outer.length - 1;
      const colour = mix(depth ? share(steps[line], steps) : outer.length < 2 ? 1 : line / (outer.length - 1));
      const se = inner.map(k => grid(series, "se", ...cell(line, k)));
      return {
        x, y: inner.map(k => series.mean[cell(line, k)[0]][cell(line, k)[1]]), mode: "lines+markers",
        name: depth ? `step ${steps[line].toLocaleString("en")}` : shown(places[line]), connectgaps: false,
        line: { color: colour, width: last ? 2.6 : 1.6 }, marker: { color: colour, size: last ? 7 : 5, symbol: depth ? "circle" : SYMBOLS[line % 4] },
        error_y: last || !depth ? bars(se) : undefined,
        text: inner.map(k => hoverOf(series, ...cell(line, k))), hovertemplate: "%{text}<extra></extra>",
      };
    });
    const chance = inner.map(k => grid(series, "null", ...cell(outer.length - 1, k)));
    if (chance.some(one => one !== null)) {
      traces.push({ x, y: chance, mode: inner.length > 1 ? "lines" : "markers", name: "by chance", line: { color: "#555555", dash: "dash", width: 1.5 }, marker: { symbol: "line-ew-open", color: "#555555", size: 22 }, hoverinfo: "skip" });
    }
    const most = narrow(plot) ? 6 : 12;
    if (traces.length > most) traces.forEach((one, k) => { one.showlegend = k === 0 || k >= outer.length - 1 || k % Math.ceil(outer.length / (most - 2)) === 0; });
    const ticks = places.length > 24 ? range(places.length).filter(k => k % Math.ceil(places.length / 20) === 0) : range(places.length);
    return draw(plot, traces, {
      showlegend: true, shapes: depth ? grounds(series.points) : [],
      xaxis: depth ? axis(narrow(plot) ? "state" : "state (a after attention, f after FFN)", { tickvals: ticks, ticktext: ticks.map(k => shown(places[k])), range: [-0.4, places.length - 0.6], showgrid: false }) : stepAxis(steps),
      yaxis: axis(shown(name)), margin: { l: 58, r: 14, t: 14, b: 90 }, legend: { orientation: "h", y: -0.22, yanchor: "top", x: 0, font: { size: 12 } },
    });
  }

  // charts

  const DASHES = ["dash", "dot", "dashdot", "longdash"];
  const titled = text => (text ? { title: { text: shown(text), font: { size: 14 }, x: 0, xref: "paper", xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 8 } }, margin: { l: 54, r: 14, t: 36, b: 44 } } : {});
  const dark = colour => `rgb(${(colour.startsWith("#") ? range(3).map(c => parseInt(colour.slice(1 + 2 * c, 3 + 2 * c), 16)) : colour.match(/\d+/g).map(Number)).map(part => Math.round(0.6 * part)).join(",")})`;

  /** Where cells end: halfway to the next. */
  function edges(x) {
    const n = x.length, middle = range(n - 1).map(k => (x[k] + x[k + 1]) / 2);
    return n === 1 ? [x[0] - 0.5, x[0] + 0.5] : [2 * x[0] - middle[0], ...middle, 2 * x[n - 1] - middle[n - 2]];
  }

  /** A pale ball, through which shines what is behind it. (A mesh: a surface would be worked out anew whenever a point moves.) */
  function ball(radius, rows = 24, columns = 48) {
    const corners = range(rows + 1).flatMap(r => range(columns).map(c => [(Math.PI * r) / rows, (2 * Math.PI * c) / columns])), at = (r, c) => r * columns + (c % columns);
    const cells = range(rows).flatMap(r => range(columns).flatMap(c => [[at(r, c), at(r, c + 1), at(r + 1, c)], [at(r, c + 1), at(r + 1, c + 1), at(r + 1, c)]]));
    return {
      type: "mesh3d", x: corners.map(([a, b]) => radius * Math.sin(a) * Math.cos(b)), y: corners.map(([a, b]) => radius * Math.sin(a) * Math.sin(b)), z: corners.map(([a]) => radius * Math.cos(a)),
      i: cells.map(one => one[0]), j: cells.map(one => one[1]), k: cells.map(one => one[2]), color: "#F4F6F8", opacity: 0.6, hoverinfo: "skip", lighting: { ambient: 1, diffuse: 0, specular: 0, fresnel: 0 },
    };
  }

  /** Move the marks of the last trace at once, without plotly, which takes its time over thousands; whether that could be done. */
  function glide(plot, x, y) {
    const marks = plot.querySelectorAll(".scatterlayer > .trace:last-child .points path"), { xaxis, yaxis } = plot._fullLayout;
    if (marks.length !== x.length || !x.every(Number.isFinite)) return false;
    marks.forEach((mark, k) => mark.setAttribute("transform", `translate(${xaxis.c2p(x[k])},${yaxis.c2p(y[k])})`));
    return true;
  }

  /** What is drawn around points that move: nets of the sphere and the cone z² = x² + y², or the circle. */
  function surface(name, deep, frames) {
    const turn = range(121).map(k => (2 * Math.PI * k) / 120), curves = [];
    let veil = [];
    if (name === "sphere" && deep) {
      const up = range(61).map(k => -Math.PI / 2 + (Math.PI * k) / 60);
      for (const height of range(5).map(k => ((k - 2) * Math.PI) / 6)) curves.push(turn.map(a => [Math.cos(height) * Math.cos(a), Math.cos(height) * Math.sin(a), Math.sin(height)]));
      for (const round of range(12).map(k => (k * Math.PI) / 6)) curves.push(up.map(a => [Math.cos(a) * Math.cos(round), Math.cos(a) * Math.sin(round), Math.sin(a)]));
      veil = [ball(0.985)];
    } else if (name === "cone" && deep) {
      const top = Math.max(1e-12, ...frames.map(frame => frame[2].reduce((most, z) => (z > most ? z : most), 0)));
      for (const z of range(5).map(k => (top * (k + 1)) / 5)) curves.push(turn.map(a => [z * Math.cos(a), z * Math.sin(a), z]));
      for (const a of range(24).map(k => (k * Math.PI) / 12)) curves.push([[0, 0, 0], [top * Math.cos(a), top * Math.sin(a), top]]);
    } else if (name !== null && !deep) curves.push(turn.map(a => [Math.cos(a), Math.sin(a)]));
    const along = axis_ => curves.flatMap(curve => [...curve.map(point => point[axis_]), null]);
    const net = { type: deep ? "scatter3d" : "scatter", x: along(0), y: along(1), mode: "lines", line: { color: "#C9C9C9", width: deep ? 1 : 1.4 }, hoverinfo: "skip", connectgaps: false };
    return curves.length ? [...veil, deep ? { ...net, z: along(2) } : net] : [];
  }

  // figures

  let follow = null; // a word that the reader pressed in the cloud

  const FIGURES = {
    loss(box) {
      const { curves, unit, several } = read("loss"), plot = box.plot("plot");
      const traces = curves.map(({ name, kind, run, steps, loss }) => {
        const colour = several ? COLOURS[run % COLOURS.length] : kind === "validation" ? VERMILION : BLUE, whole = kind === "validation";
        return {
          x: steps, y: loss, name: shown(several ? `${name}, ${kind}` : kind), mode: whole ? "lines+markers" : "lines", opacity: whole ? 1 : 0.55,
          line: { color: colour, width: whole ? 2 : 1.2 }, marker: { size: 7 }, hovertemplate: "step %{x:,}<br><b>%{y:.4f}</b><extra>%{fullData.name}</extra>",
        };
      });
      draw(plot, traces, { showlegend: true, xaxis: axis("training step"), yaxis: axis(shown(unit)), margin: { l: 54, r: 14, t: 14, b: 80 }, legend: { orientation: "h", y: -0.25, yanchor: "top", x: 0 } });
    },

    cloud(box) {
      const d = read("cloud"), plot = box.plot("plot"), { values, shape: [S, P, N] } = unpack(d.coords), n = P * N;
      const cloud = range(S).map(s => range(3).map(axis => range(n).map(k => values[3 * (s * n + k) + axis])));
      const ends = range(3).map(axis => span(cloud.flatMap(state => state[axis])));
      const counts = new Map();
      d.ids.forEach(id => counts.set(id, (counts.get(id) ?? 0) + 1));
      const common = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 7).map(([id]) => id);
      const classes = d.classes && [...new Set(d.classes)].filter(one => one >= 0).sort((a, b) => a - b);
      const category = {
        cluster: { of: (s, k) => d.clusters[s][k], name: one => `cluster ${one}`, all: s => [...new Set(d.clusters[s])].filter(one => one >= 0).sort((a, b) => a - b) },
        token: { of: (s, k) => common.indexOf(d.ids[k]), name: one => (one < 0 ? "other words" : `${spelt(common[one])} ×${counts.get(common[one])}`), all: () => [...common.keys(), -1] },
        class: { of: (s, k) => classes.indexOf(d.classes[k]), name: one => (one < 0 ? "no class" : `class ${classes[one]}`), all: () => [...classes.keys(), -1] },
      };
      const look = one => { // beyond eight the same colours come with other symbols
        const shift = (one + Math.floor(one / 8)) % 8;
        return one < 0 ? [PALE, "circle", "●"] : [COLOURS[one % 8], (three ? SOLIDS : SYMBOLS)[shift], (three ? SOLID_GLYPHS : GLYPHS)[shift]];
      };
      let state = 0, three = false, by = "cluster";

      const marker = () => {
        const base = { size: three ? 4 : narrow(plot) ? 6 : 8, opacity: 0.85, line: { width: three ? 0 : 0.6, color: "#FFFFFF" } };
        if (by === "position") {
          return { ...base, color: range(n).map(k => k % N), symbol: "circle", colorscale: "Viridis", cmin: 0, cmax: Math.max(1, N - 1), showscale: true,
            colorbar: { orientation: "h", thickness: 10, len: 0.6, y: 1.0, yanchor: "bottom", title: { text: "position in the prompt", side: "top" } } };
        }
        const looks = range(n).map(k => look(category[by].of(state, k)));
        return { ...base, color: looks.map(one => one[0]), symbol: looks.map(one => one[1]), showscale: false };
      };
      const text = () => range(n).map(k => {
        const prompt = Math.floor(k / N), position = k % N;
        return `${context(prompt, position)}<br>${place(prompt, position)}, cluster ${d.clusters[state][k]}` + (d.classes ? `, ${shown(d.class_name)} ${d.classes[k]}` : "");
      });
      const entries = () => (by === "position" ? [] : category[by].all(state).map(one => { const [colour, , glyph] = look(one); return [glyph, colour, category[by].name(one)]; }));
      const title = axis => `component ${axis + 1} (${(100 * d.explained[axis]).toFixed(0)} %)`;

      const whole = () => {
        const [x, y, z] = cloud[state];
        legend(box, entries());
        const trace = three ? { type: "scatter3d", x, y, z } : { type: "scatter", x, y };
        Object.assign(trace, { mode: "markers", marker: marker(), text: text(), hovertemplate: "%{text}<extra></extra>" });
        const flat = axis_ => axis(title(axis_), { range: ends[axis_], showgrid: false, zeroline: true, zerolinecolor: "#E4E4E4" });
        const deep = axis_ => ({ title: { text: title(axis_) }, range: ends[axis_], showbackground: false, gridcolor: "#E4E4E4", zerolinecolor: "#BBBBBB" });
        Plotly.purge(plot);
        draw(plot, [trace], three
          ? { margin: { l: 0, r: 0, t: by === "position" ? 60 : 0, b: 0 }, scene: { xaxis: deep(0), yaxis: deep(1), zaxis: deep(2), aspectmode: "cube", dragmode: "orbit", camera: { eye: { x: 1.95, y: 1.95, z: 1.25 }, center: { x: 0, y: 0, z: -0.12 } } } }
          : { margin: { l: 54, r: 14, t: by === "position" ? 70 : 14, b: 44 }, xaxis: flat(0), yaxis: { ...flat(1), scaleanchor: "x" } });
        plot.on("plotly_click", event => {
          follow = d.ids[event.points[0].pointNumber];
          box.figure.dispatchEvent(new CustomEvent("follow", { bubbles: true }));
        });
      };
      const move = () => {
        const [x, y, z] = cloud[state];
        legend(box, entries());
        const looks = marker();
        const change = { text: [text()], "marker.color": [looks.color], "marker.symbol": [looks.symbol] };
        if (three || still) return Plotly.restyle(plot, three ? { ...change, x: [x], y: [y], z: [z] } : { ...change, x: [x], y: [y] }, [0]);
        // the symbols change first: on the way from one to another a path is none
        return Plotly.restyle(plot, change, [0]).then(() => Plotly.animate(plot, { data: [{ x, y }], traces: [0] },
          { mode: "immediate", transition: { duration: 600, easing: "cubic-in-out" }, frame: { duration: 600, redraw: false } }));
      };

      const track = slider(box, "state", d.states.map((name, k) => `${k + 1} of ${S}: ${name}`), index => { state = index; move(); });
      player(box, track, S);
      select(box, "colour", [["cluster", "cluster"], ["token", "word"], ...(d.classes ? [["class", d.class_name]] : []), ["position", "position"]], value => { by = value; whole(); });
      select(box, "view", [["2", "2-D"], ["3", "3-D"]], value => { three = value === "3"; whole(); });
      whole();
    },

    paths(box) {
      const d = read("cloud"), plot = box.plot("plot"), { values, shape: [S, P, N] } = unpack(d.coords), n = P * N;
      const places_ = new Map();
      d.ids.forEach((id, k) => places_.set(id, [...(places_.get(id) ?? []), k]));
      const ordered = [...places_].sort((a, b) => b[1].length - a[1].length);
      const at = (s, k, axis) => values[3 * (s * n + k) + axis];
      const ends = [0, 1].map(axis => span(range(S * n).map(k => values[3 * k + axis])));
      const show = index => {
        const own = ordered[index][1].slice(0, 32);
        const sizes = range(S).map(s => (s === 0 || s === S - 1 ? 11 : 4)), marks = range(S).map(s => (s === 0 ? "circle-open" : "circle"));
        const traces = own.map(k => {
          const colour = COLOURS[Math.max(0, d.clusters[S - 1][k]) % 8], prompt = Math.floor(k / N), position = k % N;
          return {
            x: range(S).map(s => at(s, k, 0)), y: range(S).map(s => at(s, k, 1)), mode: "lines+markers", opacity: 0.85, line: { color: colour, width: 1.4, shape: "spline", smoothing: 0.6 },
            marker: { size: sizes, symbol: marks, color: colour, opacity: 1 }, text: d.states.map(name => `${context(prompt, position)}<br>${place(prompt, position)}<br>${shown(name)}`), hovertemplate: "%{text}<extra></extra>",
          };
        });
        const clusters = [...new Set(own.map(k => d.clusters[S - 1][k]))].sort((a, b) => a - b);
        legend(box, clusters.map(one => ["●", COLOURS[Math.max(0, one) % 8], `ends in cluster ${one}`]));
        const flat = axis_ => axis(`component ${axis_ + 1}`, { range: ends[axis_], showgrid: false, zeroline: true, zerolinecolor: "#E4E4E4" });
        draw(plot, traces, { xaxis: flat(0), yaxis: { ...flat(1), scaleanchor: "x" } });
      };
      // the word whose places end farthest apart is seen first
      const scatter = own => mean([0, 1].map(axis => { const x = own.map(k => at(S - 1, k, axis)), middle = mean(x); return mean(x.map(value => (value - middle) ** 2)); }));
      const told = ordered.map(([id, own], k) => [own.length < 4 || spelt(id).startsWith("byte") ? -1 : scatter(own), k]).reduce((a, b) => (b[0] > a[0] ? b : a))[1];
      const input = select(box, "word", ordered.map(([id, where], k) => [k, `${spelt(id)}   ×${where.length}`]), value => show(Number(value)));
      const take = () => {
        const index = ordered.findIndex(([id]) => id === follow);
        if (index >= 0) { input.value = index; show(index); }
      };
      document.addEventListener("follow", take);
      input.value = told;
      show(told);
      if (follow !== null) take();
    },

    breathing(box) {
      const plot = box.plot("plot"), clouds = ["raw", "read"].filter(cloud => find("geo.id_twonn", cloud));
      let cloud = clouds[0], row = 0;
      const own = () => find("geo.id_twonn", cloud);
      const show = () => {
        const series = own(), shuffled = find("geo.id_twonn", cloud, "shuffled"), x = range(series.places.length), step = series.steps[row];
        const line = (from, k, name, look) => ({
          x, y: series.places.map(where => from.mean[k][from.places.indexOf(where)] ?? null), name, mode: "lines+markers", ...look,
          error_y: bars(series.places.map(where => (from.places.includes(where) ? grid(from, "se", k, from.places.indexOf(where)) : null))),
          text: series.places.map(where => (from.places.includes(where) ? hoverOf(from, k, from.places.indexOf(where)) : "")), hovertemplate: `${name}<br>%{text}<extra></extra>`,
        });
        const traces = [];
        if (series.steps[0] === 0 && row > 0) traces.push(line(series, 0, "untrained (step 0)", { line: { color: GREY, dash: "dash", width: 1.5 }, marker: { color: GREY, size: 5 } }));
        const before = shuffled ? shuffled.steps.findLastIndex(one => one <= step) : -1;
        if (before >= 0) traces.push(line(shuffled, before, `shuffled prompts (step ${shuffled.steps[before].toLocaleString("en")})`, { line: { color: PURPLE, dash: "dot", width: 2 }, marker: { color: PURPLE, size: 6, symbol: "square" } }));
        traces.push(line(series, row, `step ${step.toLocaleString("en")}`, { line: { color: INK, width: 2.6 }, marker: { color: INK, size: 8 } }));
        const all = series.mean.flatMap((values, k) => values.flatMap((value, j) => [value - Z95 * (grid(series, "se", k, j) ?? 0), value + Z95 * (grid(series, "se", k, j) ?? 0)]));
        const ends = span(all);
        draw(plot, traces, {
          showlegend: true, shapes: grounds(series.points), margin: { l: 58, r: 14, t: 14, b: 90 }, legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0 },
          xaxis: axis(narrow(plot) ? "state" : "state (X⁰ embedded, a after attention, f after FFN)", { tickvals: x, ticktext: series.places.map(shown), range: [-0.5, x.length - 0.5], showgrid: false }),
          yaxis: axis("dimension (TwoNN)", { range: [Math.max(0, ends[0]), ends[1]] }),
        });
      };
      const names = () => own().steps.map(step => step.toLocaleString("en"));
      const track = slider(box, "training step", names(), index => { row = index; show(); });
      player(box, track, own().steps.length);
      select(box, "cloud", clouds.map(one => [one, `${one} cloud`]), value => { cloud = value; row = Math.min(row, own().steps.length - 1); track.rename(names()); show(); training(); });
      const training = () => {
        const under = box.plot("training"), traces = [];
        let steps = null;
        for (const [key, name, colour] of [["breath.b_attn", "over attention", VERMILION], ["breath.b_mlp", "over the FFN", BLUE]]) {
          const series = find(key, cloud);
          if (!series) continue;
          steps = series.steps;
          const average = name_ => series.steps.map((_, k) => { const known = finite(series.places.map((_, j) => grid(series, name_, k, j) ?? NaN)); return known.length ? mean(known) : null; });
          const x = steps.map(early), y = average("mean"), se = average("se"), chance = average("null");
          traces.push({ x, y, name, mode: "lines+markers", line: { color: colour, width: 2.2 }, marker: { size: 7 }, error_y: bars(se), text: y.map((value, k) => `step ${steps[k]}<br><b>${number(value)}</b>${se[k] === null ? "" : ` ± ${number(se[k], 2)}`}`), hovertemplate: "%{text}<extra>%{fullData.name}</extra>" });
          if (chance.some(one => one !== null)) traces.push({ x, y: chance, name: `${name}, by chance`, mode: "lines", line: { color: colour, dash: "dash", width: 1.2 }, hoverinfo: "skip" });
        }
        under.hidden = !steps;
        if (steps) draw(under, traces, { showlegend: true, xaxis: stepAxis(steps), yaxis: axis("change of log dimension", { zeroline: true, zerolinecolor: "#999999" }), margin: { l: 58, r: 14, t: 14, b: 80 }, legend: { orientation: "h", y: -0.27, yanchor: "top", x: 0 } });
      };
      track.set(own().steps.length - 1);
      training();
    },

    motion(box) {
      const { keys } = read("motion");
      const show = along => keys.forEach((key, k) => { const series = find(key, "raw"); if (series) lines(box.plot(`p${k}`), series, along, key); });
      select(box, "across", [["depth", "depth"], ["training", "training step"]], show);
      show("depth");
    },

    cosines(box) {
      const d = read("cosines"), plot = box.plot("plot"), { values, shape: [S, n] } = unpack(d.cosines);
      const z = s => range(n).map(i => range(n).map(j => values[(s * n + i) * n + j])).map(row => row.map(value => (Number.isFinite(value) ? value : null)));
      const name = d.tokens.map(([prompt, position]) => context(prompt, position, 3));
      const edges = range(n - 1).filter(k => d.clusters[k] !== d.clusters[k + 1]).map(k => k + 0.5);
      const edge = (k, across) => ({ type: "line", [across ? "x0" : "y0"]: -0.5, [across ? "x1" : "y1"]: n - 0.5, [across ? "y0" : "x0"]: k, [across ? "y1" : "x1"]: k, line: { color: "#555555", width: 0.7 } });
      const text = range(n).map(i => range(n).map(j => `${name[i]}<br>${name[j]}`));
      const track = slider(box, "state", d.states.map((one, k) => `${k + 1} of ${S}: ${one}`), index => Plotly.restyle(plot, { z: [z(index)] }, [0]));
      player(box, track, S);
      const bare = { visible: false, constrain: "domain" };
      draw(plot, [{ type: "heatmap", z: z(0), zmin: -1, zmax: 1, colorscale: DIVERGING, text, hovertemplate: "%{text}<br>cosine <b>%{z:.2f}</b><extra></extra>", colorbar: { thickness: 12, len: 0.8, title: { text: "cos" } } }],
        { margin: { l: 8, r: 8, t: 8, b: 8 }, xaxis: bare, yaxis: { ...bare, autorange: "reversed", scaleanchor: "x" }, plot_bgcolor: PALE, shapes: edges.flatMap(k => [edge(k, true), edge(k, false)]) });
    },

    merges(box) {
      const d = read("merges"), plot = box.plot("plot"), S = d.states.length, n = d.tokens.length;
      const pieces = d.merges.map(row => { const found = new Map(); row.forEach((piece, i) => found.set(piece, [...(found.get(piece) ?? []), i])); return found; });
      const y = (s, i) => { const piece = pieces[s].get(d.merges[s][i]); return mean(piece) + 0.16 * (piece.indexOf(i) - (piece.length - 1) / 2); };
      const traces = range(n).map(i => ({ x: range(S), y: range(S).map(s => y(s, i)), mode: "lines", hoverinfo: "skip", opacity: 0.75, line: { color: COLOURS[Math.max(0, d.clusters[i]) % 8], width: 1.3, shape: "spline", smoothing: 0.8 } }));
      const marks = pieces.flatMap((found, s) => [...found.values()].map(piece => [s, mean(piece), piece]));
      traces.push({
        x: marks.map(one => one[0]), y: marks.map(one => one[1]), mode: "markers", marker: { color: INK, opacity: 0.7, size: marks.map(one => (one[2].length === 1 ? 2.5 : 3 + 2 * Math.sqrt(one[2].length))) },
        text: marks.map(([s, , piece]) => `${shown(d.states[s])}<br><b>${piece.length} token${piece.length > 1 ? "s" : ""}</b><br>` + piece.slice(0, 8).map(i => context(...d.tokens[i], 2)).join("<br>") + (piece.length > 8 ? "<br>…" : "")), hovertemplate: "%{text}<extra></extra>",
      });
      const ticks = range(S).filter(k => k % Math.ceil(S / (narrow(plot) ? 5 : 14)) === 0);
      const brief = name => name.replace("X⁰, as embedded", "X⁰").replace("layer ", "").replace(", after attention", "a").replace(", after the FFN", "f").replace(", after the block", "b");
      draw(plot, traces, { xaxis: axis(narrow(plot) ? "state" : "state (a after attention, f after FFN)", { tickvals: ticks, ticktext: ticks.map(k => shown(brief(d.states[k]))), showgrid: false, range: [-0.2, S - 0.8] }), yaxis: { visible: false, autorange: "reversed" }, margin: { l: 10, r: 14, t: 10, b: 44 } });
    },

    attention(box) {
      const d = read("attention"), { values: a, shape: [, H, T] } = unpack(d.pattern), scores = d.scores && unpack(d.scores).values, words = read("cloud").words[0];
      const picture = box.plot("plot"), leaves = scores && box.plot("leaves"), tilt = d.tilt && box.plot("tilt");
      let step = 0, head = 0, query = T - 1;
      const at = (values, i, j) => { const value = values[((step * H + head) * T + i) * T + j]; return Number.isFinite(value) ? value : null; };
      const names = range(T).map(k => shown(word(words[k])));
      const frame = () => [{ type: "rect", x0: -0.5, x1: T - 0.5, y0: query - 0.5, y1: query + 0.5, line: { color: VERMILION, width: 2 } }];
      const ticks = range(T).filter(k => k % Math.ceil(T / 32) === 0);

      const whole = () => {
        const z = range(T).map(i => range(T).map(j => (scores && at(scores, i, j) === null && Math.abs(at(a, i, j) ?? 0) < 1e-4 ? null : at(a, i, j))));
        const text = range(T).map(i => range(T).map(j => `${context(0, i, 2)}<br>looks at ${context(0, j, 2)}`));
        const side = extra => axis("", { tickvals: ticks, ticktext: ticks.map(k => names[k]), tickfont: { size: T > 32 ? 8 : 10 }, showgrid: false, constrain: "domain", ticks: "", ...extra });
        // the root shows light weights too
        const root = z.map(row => row.map(value => (value === null ? null : Math.sign(value) * Math.sqrt(Math.abs(value)))));
        const signed = z.flat().some(value => value < -1e-3), top = Math.max(1e-3, ...finite(z.flat().map(value => (value === null ? NaN : Math.abs(value)))));
        const scale = [0, 0.02, 0.1, 0.25, 0.5, 1].filter((share, k) => !signed || k === 0 || k === 5).flatMap(share => (signed && share ? [-share, share] : [share])), marks = scale.map(share => share * top);
        draw(picture, [{ type: "heatmap", z: root, customdata: z, zmin: signed ? -Math.sqrt(top) : 0, zmax: Math.sqrt(top), colorscale: signed ? DIVERGING : BLUES, text, hovertemplate: "%{text}<br>weight <b>%{customdata:.3f}</b><extra></extra>", showscale: !narrow(picture),
          colorbar: { thickness: 10, len: 0.7, title: { text: "weight" }, tickvals: marks.map(one => Math.sign(one) * Math.sqrt(Math.abs(one))), ticktext: marks.map(one => number(one, 2)) } }],
          { margin: { l: 50, r: 8, t: 8, b: 60 }, xaxis: side({ tickangle: -90, title: { text: "key" } }), yaxis: side({ autorange: "reversed", scaleanchor: "x", title: { text: "query" } }), shapes: frame() });
        picture.removeAllListeners?.("plotly_click");
        picture.on("plotly_click", event => track.set(event.points[0].y));
        slice();
        if (tilt) bend();
      };
      const slice = () => {
        Plotly.relayout(picture, { shapes: frame() });
        if (!leaves) return;
        const keys = range(T).filter(j => at(scores, query, j) !== null && d.leaf_axis[step][j] !== null);
        const x = keys.map(j => at(scores, query, j)), y = keys.map(j => d.leaf_axis[step][j]), weight = keys.map(j => Math.abs(at(a, query, j) ?? 0));
        const top = Math.max(...weight, 1e-9), heavy = [...weight.keys()].sort((p, q) => weight[q] - weight[p]).slice(0, 4);
        const ends = span(x, 0.12), levels = range(9).map(k => ends[0] + ((ends[1] - ends[0]) * (k + 0.5)) / 9);
        draw(leaves, [{
          x, y, mode: "markers+text", textposition: "top center", textfont: { size: 11 }, texttemplate: keys.map((j, k) => (heavy.includes(k) ? names[j] : "")),
          text: keys.map((j, k) => `${context(0, j, 3)}<br>score ${number(x[k])}, weight <b>${number(weight[k])}</b>`), hovertemplate: "%{text}<extra></extra>",
          marker: { size: weight.map(one => 6 + 24 * Math.sqrt(one / top)), color: keys.map(j => (j === query ? VERMILION : BLUE)), opacity: 0.7, symbol: keys.map(j => (j === query ? "diamond" : "circle")), line: { color: "#FFFFFF", width: 1 } },
        }], {
          xaxis: axis("score s, constant on a leaf", { range: ends, showgrid: false }), yaxis: axis("first component of what is read", { range: span(y, 0.14), showgrid: false }),
          shapes: levels.map(level => ({ type: "line", x0: level, x1: level, yref: "paper", y0: 0, y1: 1, line: { color: "#B9D6E8", width: 1.2 }, layer: "below" })),
          margin: { l: 54, r: 12, t: 14, b: 48 },
        });
      };
      const bend = () => {
        const x = d.offsets.map(offset => -offset);
        const curve = (one, chosen) => ({ x, y: d.tilt[step][one], mode: "lines+markers", name: `head ${one}`, line: { color: chosen ? VERMILION : "#BBBBBB", width: chosen ? 2.6 : 1.2 }, marker: { size: chosen ? 7 : 3 }, hovertemplate: `head ${one}<br>distance %{x}<br><b>%{y:.1f}°</b><extra></extra>` });
        draw(tilt, [...range(H).filter(one => one !== head).map(one => curve(one, false)), curve(head, true)], { xaxis: axis("distance i − j, tokens"), yaxis: axis("tilt, degrees", { rangemode: "tozero" }) });
      };
      const layers = select(box, "layer", d.steps.map((name, k) => [k, name]), value => { step = Number(value); whole(); });
      const heads = select(box, "head", range(H).map(k => [k, `head ${k}`]), value => { head = Number(value); whole(); });
      const track = slider(box, "query", range(T).map(k => `token ${k}: ${word(words[k])}`), index => { query = index; slice(); });
      const sure = range(d.steps.length * H).map(k => mean(range(T).slice(Math.min(4, T - 1)).map(i => Math.max(...finite(range(T).slice(1).map(j => a[(k * T + i) * T + j])), 0))));
      const first = sure.indexOf(Math.max(...sure)); // the head that is surest of something else than the first token
      step = Math.floor(first / H); head = first % H;
      layers.value = step; heads.value = head;
      track.input.value = query;
      track.rename(range(T).map(k => `token ${k}: ${word(words[k])}`));
      whole();
    },

    sinks(box) {
      const d = read("sinks"), plot = box.plot("plot"), H = d.sinks[0].length, few = H * d.sinks.length <= 200 && H * 45 < plot.clientWidth;
      plot.style.height = `${Math.max(12, 6 + 1.9 * d.sinks.length)}rem`;
      const chance = d.null === null ? [] : [{ xref: "paper", yref: "paper", x: 1, y: 1.02, xanchor: "right", yanchor: "bottom", showarrow: false, text: `uniform attention: ${d.null.toFixed(2)}`, font: { size: 12, color: "#555555" } }];
      draw(plot, [{ type: "heatmap", z: d.sinks, x: range(H), y: range(d.sinks.length), zmin: 0, zmax: 1, colorscale: ORANGES, xgap: 1, ygap: 1, texttemplate: few ? "%{z:.2f}" : undefined, hovertemplate: "%{customdata}<br>head %{x}<br><b>%{z:.3f}</b><extra></extra>", customdata: d.steps.map(name => range(H).map(() => shown(name))),
        showscale: !few, colorbar: { thickness: 12, title: { text: "weight" } } }],
        { xaxis: axis("head", { tickvals: range(H).filter(k => k % Math.ceil(H / 16) === 0), showgrid: false }), yaxis: axis("", { tickvals: range(d.steps.length), ticktext: d.steps.map(shown), showgrid: false }), plot_bgcolor: PALE, margin: { l: 64, r: 12, t: 30, b: 44 }, annotations: chance });
    },

    spectra(box) {
      const d = read("spectra");
      let step = 0, head = 0;
      const show = () => {
        for (const [id, name, colour] of [["form", "M", BLUE], ["content", "F", VERMILION]]) {
          const re = d[id].re[step][head], im = d[id].im[step][head], size = re.map((value, k) => Math.hypot(value, im[k]));
          const radius = Math.max(1e-12, ...finite(size)), end = 1.15 * radius, plot = box.plot(id);
          draw(plot, [{ x: re, y: im, mode: "markers", marker: { color: colour, size: 9, opacity: 0.75, line: { color: "#FFFFFF", width: 0.8 } }, text: re.map((value, k) => `λ = ${number(value)} ${im[k] < 0 ? "−" : "+"} ${number(Math.abs(im[k]))} i<br>|λ| = ${number(size[k])}`), hovertemplate: "%{text}<extra></extra>" }], {
            xaxis: axis(`Re λ of ${name}`, { range: [-end, end], zeroline: true, zerolinecolor: "#777777", constrain: "domain" }), yaxis: axis("Im λ", { range: [-end, end], zeroline: true, zerolinecolor: "#777777", scaleanchor: "x", constrain: "domain" }),
            shapes: [{ type: "circle", x0: -radius, x1: radius, y0: -radius, y1: radius, line: { color: "#999999", dash: "dot", width: 1 } }], margin: { l: 58, r: 12, t: 14, b: 48 },
          });
        }
      };
      select(box, "layer", d.steps.map((name, k) => [k, name]), value => { step = Number(value); show(); });
      select(box, "head", range(d.heads).map(k => [k, `head ${k}`]), value => { head = Number(value); show(); });
      show();
    },

    lens(box) {
      const d = read("lens"), plot = box.plot("plot"), S = d.states.length, { values: prob, shape: [, T, K] } = unpack(d.prob), entropy = unpack(d.entropy).values, words = read("cloud").words[0];
      let first = 0;
      const count = () => Math.max(3, Math.min(T, Math.floor((plot.clientWidth - 90) / 78)));
      const top = Math.max(1e-6, ...finite(entropy));
      plot.style.height = `${Math.max(18, 6 + 1.7 * S)}rem`;
      const brief = name => name.replace(", as embedded", "").replace(", after attention", " a").replace(", after the FFN", " f").replace(", after the block", "");
      const show = () => {
        const own = range(count()).map(k => first + k).filter(t => t < T);
        const z = range(S).map(s => own.map(t => (Number.isFinite(entropy[s * T + t]) ? entropy[s * T + t] : null)));
        const cut = text => (text.length > 11 ? `${text.slice(0, 10)}…` : text);
        const label = range(S).map(s => own.map(t => shown(cut(word(d.words[s][t][0])))));
        const text = range(S).map(s => own.map(t => `after ${context(0, t, 3)}<br>` + range(K).map(k => `${shown(word(d.words[s][t][k]))}  <b>${number(prob[(s * T + t) * K + k])}</b>`).join("<br>") + `<br>entropy ${number(entropy[s * T + t])} nats`));
        draw(plot, [{ type: "heatmap", x: own, y: range(S), z, zmin: 0, zmax: top, colorscale: BLUES, reversescale: true, customdata: text, text: label, texttemplate: "%{text}", textfont: { size: 11 }, hovertemplate: "%{customdata}<extra></extra>", xgap: 1, ygap: 1, showscale: !narrow(plot), colorbar: { thickness: 12, title: { text: "nats" } } }],
          { xaxis: axis("token of the prompt", { tickvals: own, ticktext: own.map(t => shown(cut(word(words[t])))), showgrid: false, ticks: "", side: "bottom" }), yaxis: axis("", { tickvals: range(S), ticktext: d.states.map(name => shown(brief(name))), showgrid: false, ticks: "" }), margin: { l: 70, r: 8, t: 8, b: 60 }, plot_bgcolor: PALE });
      };
      const last = Math.max(0, T - count());
      if (last) slider(box, "from token", range(last + 1).map(k => `${k}: ${word(words[k])}`), index => { first = index; show(); });
      show();
    },

    explorer(box) {
      const { series, definitions } = read("explorer"), plot = box.plot("plot"), keys = [...new Set(series.map(one => one.key))];
      const families = [...new Set(keys.map(key => key.split(".")[0]))], meaning = box.figure.querySelector(".meaning");
      let key = keys[0], variant = 0, along = "depth";
      const own = () => series.filter(one => one.key === key);
      const names = () => own().map((one, k) => [k, [one.cloud === "" ? "" : `${one.cloud} cloud`, one.param].filter(Boolean).join(", ") || "plain"]);
      const show = () => {
        const one = own()[variant], n = one.n[0] === one.n[1] ? one.n[0] : `${one.n[0]} to ${one.n[1]}`;
        meaning.textContent = `${definitions[key] || "recorded by an observable that is not loaded here"}; n = ${n}.`;
        lines(plot, one, one.places.length < 2 ? "training" : one.steps.length < 2 ? "depth" : along, key);
      };
      const pick = select(box, "key", families.map(family => [family, keys.filter(one => one.split(".")[0] === family).map(one => [one, one])]), value => { key = value; variant = 0; refill(); show(); });
      const input = select(box, "of", names(), value => { variant = Number(value); show(); });
      const refill = () => input.replaceChildren(...names().map(([value, text]) => element("option", text, { value })));
      select(box, "across", [["depth", "depth"], ["training", "training step"]], value => { along = value; show(); });
      pick.value = key;
      show();
    },

    forest(box) {
      const d = box.data, { rows, runs, base, definitions } = d, plot = box.plot("plot"), keys = [...new Set(rows.map(row => row.key))], meaning = box.figure.querySelector(".meaning");
      const side = (row, end) => (row.low === null ? 0 : Math.abs(row[end] - row.difference)); // of an interval that need not be even
      const show = key => {
        const all = key === "", half = row => (row.low === null ? null : (row.high - row.low) / 2);
        let own = rows.filter(row => (all ? row.stands && half(row) > 0 : row.key === key));
        const value = row => (all ? row.difference / half(row) : row.difference);
        if (all) own = own.sort((p, q) => Math.abs(value(q)) - Math.abs(value(p)));
        const folded = text => (narrow(plot) ? shown(text).replaceAll(/(.{14,}?) /g, "$1<br>") : shown(text.length > 64 ? `${text.slice(0, 63)}…` : text));
        const name = row => (all ? row.key : row.at), lines_ = [...new Set(own.map(name))].slice(0, all ? 40 : 80);
        const traces = runs.map((run, k) => {
          const some = own.filter(row => row.run === k && lines_.includes(name(row))), colour = COLOURS[k % COLOURS.length];
          return {
            x: some.map(value), y: some.map(row => lines_.indexOf(name(row)) + (runs.length > 1 ? 0.3 * (k / (runs.length - 1) - 0.5) : 0)), mode: "markers", name: shown(run),
            marker: { color: colour, size: 9, symbol: some.map(row => (row.low === null ? "x-thin-open" : row.sure ?? (row.q !== null && row.q <= 0.05) ? "circle" : "circle-open")), line: { width: 1.6 } },
            error_x: { symmetric: false, ...Object.fromEntries([["array", "high"], ["arrayminus", "low"]].map(([name, end]) => [name, some.map(row => (all ? 1 : side(row, end)))])), thickness: 1.4, width: 4, color: colour },
            text: some.map(row => `<b>${shown(row.key)}</b>, ${shown(row.at)}<br>${shown(run)}: ${number(row.mean, 4)}<br>difference ${number(row.difference)}` + (row.low === null ? "<br>no interval" : ` [${number(row.low)}, ${number(row.high)}]`) + (row.q === null ? "" : `<br>${d.p} = ${number(row.q, 2)}`)),
            hovertemplate: "%{text}<extra></extra>",
          };
        });
        plot.style.height = `${Math.max(14, 7 + 1.45 * lines_.length)}rem`;
        meaning.textContent = all ? "" : definitions[key] || "recorded by an observable that is not loaded here";
        draw(plot, traces, {
          showlegend: runs.length > 1, legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 }, margin: { l: 20, r: 14, t: runs.length > 1 ? 40 : 14, b: 48 },
          xaxis: axis(shown(all ? `difference to ${base}, in half widths of its interval` : narrow(plot) ? "difference" : `difference to ${base}`), { zeroline: true, zerolinecolor: INK, zerolinewidth: 1.2 }),
          yaxis: axis("", { tickvals: range(lines_.length), ticktext: lines_.map(folded), range: [lines_.length - 0.5, -0.5], tickfont: { size: narrow(plot) ? 10 : 12 } }),
          shapes: all ? [{ type: "rect", x0: -1, x1: 1, yref: "paper", y0: 0, y1: 1, fillcolor: "#F0F0F0", line: { width: 0 }, layer: "below" }] : [],
        });
      };
      const whole = rows.some(row => row.stands); // a row that stands for its key, in a list of all keys
      select(box, d.what, [...(whole ? [["", "all keys"]] : []), ...keys.map(key => [key, key])], show);
      show(whole ? "" : keys[0]);
    },

    /** Every key of an ablation study by depth, a line a combination of levels; what is of the whole flow alone, a point each. */
    levels(box) {
      const { series, groups, definitions } = box.data, plot = box.plot("plot"), keys = [...new Set(series.map(one => one.key))];
      const families = [...new Set(keys.map(key => key.split(".")[0]))], meaning = box.figure.querySelector(".meaning");
      let key = box.data.first, variant = 0, group = 0, off = new Set();
      const own = () => series.filter(one => one.key === key);
      const names = () => own().map((one, k) => [k, [one.cloud === "" ? "" : `${one.cloud} cloud`, one.param].filter(Boolean).join(", ") || "plain"]);
      const colour = k => (groups[group].names.length > COLOURS.length ? mix(k / (groups[group].names.length - 1)) : COLOURS[k]);
      const show = () => {
        const one = own()[variant], { names: lines_, rows } = groups[group], alone = one.places.length < 2, count = rows.length;
        meaning.textContent = `${definitions[key] || "recorded by an observable that is not loaded here"}; at step ${one.step.toLocaleString("en")}.`;
        const traces = rows.map((row, k) => {
          const x = range(one.places.length).map(at => (alone ? k : at + (count < 2 ? 0 : Math.min(0.3, 0.05 * count) * (k / (count - 1) - 0.5))));
          return {
            x, y: one.mean[row], name: shown(lines_[k]), mode: alone ? "markers" : "lines+markers", visible: !off.has(k), connectgaps: false,
            line: { color: colour(k), width: 2 }, marker: { color: colour(k), size: 8, symbol: SYMBOLS[k % 8] },
            error_y: { array: range(one.places.length).map(at => one.half[row][at] ?? 0), thickness: 1.3, width: 3, color: colour(k) },
            text: one.mean[row].map((value, at) => `${shown(one.places[at])}<br><b>${number(value, 4)}</b>` + (one.half[row][at] === null ? "" : ` ± ${number(one.half[row][at], 2)}`) + `<br>${grid(one, "n", row, at)} seed${grid(one, "n", row, at) === 1 ? "" : "s"}`),
            hovertemplate: "%{text}<extra>%{fullData.name}</extra>",
          };
        });
        const ticks = range(one.places.length).filter(k => k % Math.ceil(one.places.length / (narrow(plot) ? 8 : 20)) === 0);
        draw(plot, traces, {
          shapes: alone ? [] : grounds(one.points), margin: { l: 58, r: 14, t: 14, b: 60 }, yaxis: axis(shown(key)),
          xaxis: alone ? axis("", { tickvals: range(count), ticktext: lines_.map(shown), range: [-0.6, count - 0.4], showgrid: false })
            : axis(narrow(plot) ? "state" : "state (a after attention, f after FFN)", { tickvals: ticks, ticktext: ticks.map(k => shown(one.places[k])), range: [-0.5, one.places.length - 0.5], showgrid: false }),
        });
      };
      const entries = () => switches(box, groups[group].names.map((name, k) => [GLYPHS[k % 8], colour(k), name]), (k, on) => { if (on) off.delete(k); else off.add(k); show(); });
      const fill = input => input.replaceChildren(...names().map(([value, text]) => element("option", text, { value })));
      const first = select(box, "key", families.map(family => [family, keys.filter(one => one.split(".")[0] === family).map(one => [one, one])]), value => { key = value; variant = 0; fill(of); show(); });
      const of = select(box, "of", names(), value => { variant = Number(value); show(); });
      if (groups.length > 1) select(box, "factor", groups.map((one, k) => [k, one.title]), value => { group = Number(value); off = new Set(); entries(); show(); });
      first.value = key;
      entries();
      show();
    },

    // charts of an experiment

    curves(box) {
      const d = box.data, several = d.groups.length > COLOURS.length;
      const colour = k => (d.groups[k].theory ? INK : several ? mix(d.groups[k].shade) : COLOURS[k]);
      const spoken = d.groups.flatMap((group, k) => (group.theory ? [k] : []));
      const dash = k => DASHES[Math.max(0, spoken.indexOf(k)) % DASHES.length];
      const within = d.panels.some(panel => panel.lines.some(line => line.theory && !d.groups[line.group].theory));
      const owner = line => (line.theory && !d.groups[line.group].theory ? d.groups.length : line.group);
      const off = new Set(), traces = d.panels.map(panel => {
        const crowd = range(d.groups.length).map(k => panel.lines.filter(line => line.group === k && line.seed).length);
        const led = range(d.groups.length).map(k => panel.lines.some(line => line.group === k && !line.seed && !line.theory)); // by the mean of its seeds
        return panel.lines.flatMap(line => {
          const many = line.seed && crowd[line.group] > 1, behind = many && led[line.group], few = line.x.length <= 12, own = owner(line), tint = owner(line) === d.groups.length ? dark(colour(line.group)) : colour(line.group);
          const trace = {
            x: line.x, y: line.y, name: shown(line.name), owner: own, connectgaps: false, meta: [shown(d.x), shown(d.y)], opacity: behind ? 0.35 : many ? 0.6 : 1,
            mode: (few && !line.theory && !behind) || line.y.filter(y => y !== null).length === 1 ? "lines+markers" : "lines", marker: { size: many ? 5 : 7, symbol: SYMBOLS[line.group % 8], color: tint },
            line: { color: tint, width: many ? 1.1 : 2, dash: line.theory ? dash(line.group) : "solid" },
            hovertemplate: "%{meta[0]} %{x:.5~g}<br>%{meta[1]} <b>%{y:.5~g}</b><extra>%{fullData.name}</extra>",
          };
          if (!line.low) return [trace];
          const known = range(line.x.length).filter(k => line.x[k] !== null && line.low[k] !== null && line.high[k] !== null), back = [...known].reverse();
          const band = { x: [...known, ...back].map(k => line.x[k]), y: [...known.map(k => line.high[k]), ...back.map(k => line.low[k])], owner: own, mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: tint, opacity: 0.16, hoverinfo: "skip" };
          return [band, trace];
        });
      });
      const scale = (log, name, panel) => {
        if (!log) return {};
        const known = finite(panel.lines.flatMap(line => line[name])).filter(value => value > 0);
        const low = known.reduce((a, b) => Math.min(a, b), Infinity), high = known.reduce((a, b) => Math.max(a, b), 0), decades = known.length ? Math.log10(high / low) : 1;
        // plotly would write 2 and 5 where 20 and .5 are meant
        const within = decades < 1 ? [1, 1.5, 2, 3, 5, 7] : decades < 2.2 ? [1, 2, 5] : [1], first = Math.floor(Math.log10(low));
        const marks = known.length && decades <= 4 ? range(Math.ceil(decades) + 2).flatMap(k => within.map(one => one * 10 ** (first + k))).filter(one => one > low / 1.1 && one < high * 1.1) : [];
        const ticks = marks.length > 1 || decades > 4 ? marks : range(5).map(k => low + k * (high - low) / 4);
        if (known.length && decades <= 4 && high > low) return { type: "log", tickvals: ticks, ticktext: ticks.map(one => number(one)) };
        return { type: "log", exponentformat: decades > 4 ? "power" : "none", nticks: Math.min(8, Math.max(3, Math.floor(decades / 0.71))) };
      };
      const show = () => d.panels.forEach((panel, k) => draw(box.plot(`panel${k}`), traces[k].map(trace => ({ ...trace, visible: !off.has(trace.owner) })), {
        ...titled(panel.title), xaxis: axis(shown(d.x), scale(d.log[0], "x", panel)), yaxis: axis(shown(d.y), scale(d.log[1], "y", panel)), uirevision: d.groups.map(group => group.name).join(), // another view begins whole
      }));
      const marked = k => d.panels.some(panel => panel.lines.some(line => line.group === k && line.x.length <= 12));
      const glyph = k => (d.groups[k].theory ? "╌╌" : several || !marked(k) ? "━━" : `━${GLYPHS[k]}━`);
      const entries = d.groups.map((group, k) => [glyph(k), colour(k), group.name]);
      if (within) entries.push(["╌╌", GREY, "theory, in the colour of its line"]);
      switches(box, entries, (k, on) => { if (on) off.delete(k); else off.add(k); show(); });
      show();
    },

    /** One of several charts of lines, which the reader chooses. */
    views(box) {
      const { charts } = box.data, panels = [...box.figure.querySelectorAll(".plot")];
      const show = k => {
        panels.forEach((plot, panel) => { plot.hidden = panel >= charts[k].data.panels.length; });
        FIGURES.curves({ ...box, data: charts[k].data });
      };
      if (charts.length > 1) select(box, "factor", charts.map((one, k) => [k, one.title]), value => show(Number(value)));
      show(0);
    },

    grids(box) {
      const d = box.data, [low, high] = d.limits, even = Math.abs(low + high) <= 1e-9 * Math.abs(high);
      d.panels.forEach((panel, k) => {
        const plot = box.plot(`panel${k}`), cells = panel.x.length * panel.y.length;
        const text = panel.values.map((row, r) => row.map((value, c) => `${shown(d.x)} ${number(panel.x[c], 4)}<br>${shown(d.y)} ${number(panel.y[r], 4)}<br>${shown(d.value)} <b>${number(value, 4)}</b>`));
        const at = (own, log) => (log ? own.map(Math.log10) : own), few = own => range(own.length).filter(k => own.length <= 10 || k % Math.ceil(own.length / 8) === 0);
        const line = (name, own, log) => axis(shown(name), { showgrid: false, ticks: "", ...(log || own.length <= 10 ? { tickvals: few(own).map(k => at(own, log)[k]), ticktext: few(own).map(k => number(own[k])) } : {}) });
        draw(plot, [{
          type: "heatmap", x: edges(at(panel.x, d.log[0])), y: edges(at(panel.y, d.log[1])), z: panel.values, zmin: low, zmax: high, colorscale: even ? DIVERGING : "Viridis", text, hovertemplate: "%{text}<extra></extra>", hoverongaps: true,
          ...(cells <= 80 && !narrow(plot) ? { texttemplate: "%{z:.3~g}", textfont: { size: 11 } } : {}), colorbar: { thickness: 12, title: { text: shown(d.value), side: "right" } },
        }], { ...titled(panel.title), xaxis: line(d.x, panel.x, d.log[0]), yaxis: line(d.y, panel.y, d.log[1]), plot_bgcolor: PALE });
      });
    },

    ways(box) {
      const d = box.data, deep = d.solid, T = d.times.length, axes = deep ? 3 : 2, several = d.groups.length > COLOURS.length;
      const panels = d.panels.map(panel => {
        const { values, shape: [, P] } = unpack(panel.points), at = (t, k, a) => values[axes * (t * P + k) + a];
        const frames = range(T).map(t => range(axes).map(a => range(P).map(k => at(t, k, a))));
        // one line through all ways, broken between them; of very many, none
        const trail = P > 300 ? null : range(axes).map(a => range(P).flatMap(k => [...range(T).map(t => at(t, k, a)), null]));
        return { ...panel, P, frames, trail };
      });
      const colour = k => (several ? mix(d.shades[k]) : COLOURS[k]);
      const named = values => ({ x: values[0], y: values[1], ...(deep ? { z: values[2] } : {}) }), kind = deep ? "scatter3d" : "scatter";
      let moment = 0, chosen = 0, trails = true;
      const shownPanels = () => (deep ? [[chosen, "panel0"]] : panels.map((_, k) => [k, `panel${k}`]));

      const whole = () => {
        for (const [k, id] of shownPanels()) {
          const panel = panels[k], plot = box.plot(id), tints = panel.groups.map(colour);
          const around = surface(d.surface, deep, panel.frames);
          const trail = panel.trail && trails ? [{ type: kind, ...named(panel.trail), mode: "lines", line: { color: "#B5B5B5", width: deep ? 2 : 1 }, opacity: deep ? 0.7 : 0.6, hoverinfo: "skip", connectgaps: false }] : [];
          const dots = {
            type: kind, ...named(panel.frames[moment]), mode: "markers", text: panel.names.map(shown), hovertemplate: "%{text}<extra></extra>",
            marker: { size: deep ? 5 : panel.P > 200 ? 6 : 9, color: tints, opacity: deep ? 1 : 0.9, symbol: several || panel.P > 200 ? "circle" : panel.groups.map(one => (deep ? SOLIDS : SYMBOLS)[one % 8]), line: { width: deep ? 0 : 0.6, color: "#FFFFFF" } },
          };
          const ends = range(axes).map(a => d.surface === "sphere" || d.surface === "circle" ? [-1.1, 1.1] : span(panel.frames.flatMap(frame => frame[a])));
          const flat = a => axis(shown(d.axes[a]), { range: ends[a], zeroline: true, zerolinecolor: "#E4E4E4", showgrid: d.surface === null });
          const space = a => ({ title: { text: shown(d.axes[a]) }, showbackground: false, gridcolor: "#E4E4E4", zerolinecolor: "#BBBBBB", ...(d.surface === "sphere" ? { visible: false } : {}) });
          panel.dots = around.length + trail.length;
          if (deep) Plotly.purge(plot);
          draw(plot, [...around, ...trail, dots], deep
            ? { ...titled(panel.title), margin: { l: 0, r: 0, t: 36, b: 0 }, scene: { xaxis: space(0), yaxis: space(1), zaxis: space(2), ...(d.surface === "cone" ? { aspectmode: "manual", aspectratio: { x: 1.5, y: 1.5, z: 0.75 } } : { aspectmode: "data" }), dragmode: "orbit", camera: { eye: d.surface === "sphere" ? { x: 0.72, y: -1.1, z: 0.44 } : { x: 1.35, y: -2.35, z: 1.05 }, center: { x: 0, y: 0, z: d.surface === "sphere" ? 0 : -0.1 } } } }
            : { ...titled(panel.title), xaxis: { ...flat(0), constrain: "domain" }, yaxis: { ...flat(1), scaleanchor: "x", constrain: "domain" }, uirevision: "zoomed" });
        }
      };
      const settle = () => shownPanels().forEach(([k, id]) => {
        const values = panels[k].frames[moment];
        Plotly.restyle(box.plot(id), { x: [values[0]], y: [values[1]], ...(deep ? { z: [values[2]] } : {}) }, [panels[k].dots]);
      });
      let later = null; // plotly, whose labels and zoom have to know, is told once the points rest
      const move = () => {
        clearTimeout(later);
        const moved = !deep && shownPanels().every(([k, id]) => glide(box.plot(id), ...panels[k].frames[moment]));
        if (moved) later = setTimeout(settle, 250); else settle();
      };

      const track = slider(box, "time", d.times.map((time, k) => `${time}  (${k + 1} of ${T})`), index => { moment = index; move(); });
      player(box, track, T, still ? 400 : Math.max(30, Math.min(250, 8000 / T)));
      if (deep && panels.length > 1) select(box, "panel", panels.map((panel, k) => [k, panel.title]), value => { chosen = Number(value); whole(); });
      if (panels.some(panel => panel.trail)) select(box, "ways", [["1", "shown"], ["0", "hidden"]], value => { trails = value === "1"; whole(); });
      const glyph = k => (several ? "●" : (deep ? SOLID_GLYPHS : GLYPHS)[k]);
      legend(box, several ? [["●", mix(0), d.groups[d.shades.indexOf(0)]], ["●", mix(0.5), "…"], ["●", mix(1), d.groups[d.shades.indexOf(1)]]] : d.groups.map((name, k) => [glyph(k), colour(k), name]));
      whole();
    },
  };

  // when

  const waiting = new Map([...document.querySelectorAll("figure[data-figure]")].map(figure => [figure, figure.dataset.figure]));
  function render(figure) {
    const name = waiting.get(figure);
    if (name === undefined) return;
    waiting.delete(figure);
    const box = { figure, data: read(name), controls: figure.querySelector(".controls"), legend: figure.querySelector(".legend"), plot: id => document.getElementById(`${name}-${id}`) };
    try {
      FIGURES[figure.dataset.kind](box);
    } catch (error) {
      box.legend.textContent = "This figure cannot be drawn from the data in the file.";
      console.error(name, error);
    }
    figure.dataset.drawn = "";
  }
  const near = new IntersectionObserver(entries => entries.filter(one => one.isIntersecting).forEach(one => { near.unobserve(one.target); render(one.target); }), { rootMargin: "500px" });
  for (const figure of waiting.keys()) near.observe(figure);

  // Paper is 17 cm wide, and a browser does not wait for what measures itself: every figure gets its size on it, and its own afterwards.
  const square = plot => ["cosines-plot", "attention-plot"].includes(plot.id) || plot.closest("figure").dataset.kind === "ways", drawn = () => document.querySelectorAll(".js-plotly-plot");
  addEventListener("beforeprint", () => {
    for (const figure of [...waiting.keys()]) render(figure);
    for (const plot of drawn()) Plotly.relayout(plot, { autosize: false, width: square(plot) ? 450 : 640, height: square(plot) ? 450 : 355 });
  });
  addEventListener("afterprint", () => {
    for (const plot of drawn()) Plotly.relayout(plot, { autosize: true, width: null, height: null });
  });
})();
