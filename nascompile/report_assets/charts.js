"use strict";
// Draws the report's charts from the JSON in the page, in the page's own colours, again whenever those change.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const text = value => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const wrap = value => text(value).replace(/ · |; /g, "<br>");
  const fixed = (value, digits) => value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});
  const ms = value => fixed(value, value < 10 ? 2 : 1) + " ms";
  const mb = value => fixed(value / 1e6, 2) + " MB";
  const observed = text(`${facts.observed} ${facts.statistic}`.trim());
  const narrow = () => window.innerWidth < 640;

  const axis = (title, more) => ({title: {text: title, standoff: 10, font: {size: narrow() ? 12 : 13}}, gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, ...more});
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 56, r: 12, t: 10, b: 48}, hovermode: "closest", dragmode: false,
    font: {family: getComputedStyle(document.body).fontFamily, size: narrow() ? 12 : 13, color: colour("soft")},
    legend: {orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: {color: colour("ink")}},
    hoverlabel: {bgcolor: colour("card"), bordercolor: colour("accent"), font: {color: colour("ink"), size: 13}, align: "left"},
    ...more,
  });

  const point = (kind, p, metric) =>
    `<b>${kind}</b> ${text(p.id)}<br>predicted ${ms(p.latency_ms)} [${fixed(p.low_ms, 2)}, ${fixed(p.high_ms, 2)}]` +
    `<br>emulated ${text(metric)} ${fixed(p.score, 2)} ± ${fixed(p.stderr, 2)} (n ${p.n.toLocaleString("en")})` +
    `<br>${mb(p.size_bytes)} · ${fixed(p.parameters / 1e6, 2)} M parameters<br>${wrap(p.text)}`;

  const MARKS = {baseline: "square", uniform: "diamond", chosen: "star", other: "circle-open"};
  const mark = e => e.chosen ? "chosen" : e.role in MARKS ? e.role : "other";

  function front() {
    const f = facts.front, metric = f.metric, traces = [];
    const unit = f.unit ? `, ${f.unit}` : "";
    if (f.scored.length) traces.push({
      type: "scatter", mode: "markers", name: `scored (${f.scored.length}, predicted)`, x: f.scored.map(p => p.latency_ms), y: f.scored.map(p => p.score),
      marker: {size: 6, color: colour("fourth"), opacity: 0.55}, hovertext: f.scored.map(p => point("Scored", p, metric)), hoverinfo: "text",
    });
    traces.push({
      type: "scatter", mode: "lines+markers", name: "front (predicted, with interval)", x: f.points.map(p => p.latency_ms), y: f.points.map(p => p.score),
      error_x: {type: "data", symmetric: false, array: f.points.map(p => p.high_ms - p.latency_ms), arrayminus: f.points.map(p => p.latency_ms - p.low_ms), color: colour("accent"), thickness: 1, width: 3},
      line: {color: colour("accent"), width: 2, shape: "hv"}, marker: {size: 9, color: colour("accent")},
      hovertext: f.points.map(p => point("Front", p, metric)), hoverinfo: "text",
    });
    for (const e of facts.engines) {
      if (!e.measured || !e.validation) continue;
      const which = mark(e), value = e.measured.value;
      traces.push({
        type: "scatter", mode: "markers", name: `${text(e.title)} (${text(e.measured.kind)})`, x: [value], y: [e.validation.value],
        marker: {symbol: MARKS[which], size: which === "chosen" ? 18 : 13, color: colour(which === "chosen" ? "accent" : "ink"), line: {width: 1.5, color: colour(which === "other" ? "ink" : "card")}},
        hovertext: [`<b>${text(e.title)}</b><br>${text(e.measured.kind)} ${text(e.measured.statistic)} ${ms(value)}` + (e.measured.statistic !== "p50" && e.measured.p50 ? `, p50 ${ms(e.measured.p50)}` : "") + (e.predicted ? `<br>predicted ${ms(e.predicted.value)} [${fixed(e.predicted.low, 2)}, ${fixed(e.predicted.high, 2)}]` : "") +
          `<br>engine ${text(e.validation.metric)} ${fixed(e.validation.value, 2)} ± ${fixed(e.validation.stderr, 2)} (validation)<br>${mb(e.size_bytes)}` + (e.candidate ? `<br>${wrap(e.candidate.text)}` : "")],
        hoverinfo: "text",
      });
    }
    return [traces, layout({xaxis: axis(`latency of one call, ${facts.ms}`, {rangemode: "normal"}), yaxis: axis(`${text(metric)} on validation${unit}`)})];
  }

  const device = number => () => {
    const v = facts.devices, d = v.devices[number], shared = v.shared.map(c => c.devices[number].shared);
    const bars = rows => ({type: "data", symmetric: false, array: rows.map(p => p.high_ms - p.latency_ms), arrayminus: rows.map(p => p.latency_ms - p.low_ms), color: colour("accent"), thickness: 1, width: 3});
    const trace = (name, rows, more) => ({type: "scatter", mode: "markers", name, x: rows.map(p => p.latency_ms), y: rows.map(p => p.score), hovertext: rows.map(p => point(name, p, v.metric)), hoverinfo: "text", ...more});
    const traces = [];
    if (d.scored.length) traces.push(trace("scored", d.scored, {marker: {size: 6, color: colour("fourth"), opacity: 0.55}}));
    traces.push(trace("front of this device", d.front, {mode: "lines+markers", line: {color: colour("accent"), width: 2, shape: "hv"}, marker: {size: 9, color: colour("accent")}, error_x: bars(d.front)}));
    traces.push(trace("shared front", shared, {marker: {symbol: "circle-open", size: 14, color: colour("ink"), line: {width: 1.5}}}));
    const chosen = v.shared.filter(c => c.chosen).map(c => c.devices[number].shared);
    if (chosen.length) traces.push(trace("chosen network", chosen, {marker: {symbol: "star", size: 18, color: colour("accent"), line: {width: 1.5, color: colour("card")}}}));
    return [traces, layout({xaxis: axis(`predicted latency on ${text(d.label)}, ms`), yaxis: axis(`emulated ${text(v.metric)}${facts.front.unit ? `, ${facts.front.unit}` : ""}`)})];
  };

  function diagonal(values) {
    const low = Math.min(...values), high = Math.max(...values), pad = (high - low || 1) * 0.06;
    return {type: "scatter", mode: "lines", name: "equal", x: [low - pad, high + pad], y: [low - pad, high + pad], line: {color: colour("second"), dash: "dot", width: 1.5}, hoverinfo: "skip"};
  }

  function prediction() {
    const p = facts.prediction, all = p.networks.concat(p.engines).flatMap(r => [r.predicted_ms, r.measured_ms]);
    const words = r => `<b>${text(r.title)}</b><br>predicted ${ms(r.predicted_ms)}` + (r.low_ms === null ? "" : ` [${fixed(r.low_ms, 2)}, ${fixed(r.high_ms, 2)}]`) +
      `<br>${observed} ${ms(r.measured_ms)} (${r.residual_percent >= 0 ? "+" : "−"}${fixed(Math.abs(r.residual_percent), 1)} %)`;
    const trace = (name, rows, marker, bars) => ({
      type: "scatter", mode: "markers", name, x: rows.map(r => r.predicted_ms), y: rows.map(r => r.measured_ms), marker, hovertext: rows.map(words), hoverinfo: "text",
      error_x: {type: "data", symmetric: false, array: rows.map(r => (r.high_ms ?? r.predicted_ms) - r.predicted_ms), arrayminus: rows.map(r => r.predicted_ms - (r.low_ms ?? r.predicted_ms)), color: bars, thickness: 1, width: 3},
    });
    const traces = [diagonal(all)];
    if (p.networks.length) traces.push(trace("validation networks of the table", p.networks, {size: 7, color: colour("fourth"), symbol: "circle"}, colour("fourth")));
    if (p.engines.length) traces.push(trace("engines of this run", p.engines, {
      size: p.engines.map(r => r.chosen ? 16 : 11), symbol: p.engines.map(r => MARKS[mark(r)]), color: colour("accent"), opacity: 1, line: {width: 1.5, color: colour("accent")},
    }, colour("accent")));
    return [traces, layout({xaxis: axis(`predicted, ${facts.ms}`), yaxis: axis(`${observed}, ms`)})];
  }

  function agreement() {
    const pairs = facts.agreement.pairs, unit = facts.front.unit ? `, ${facts.front.unit}` : "";
    return [[diagonal(pairs.flatMap(p => [p[1], p[2]])), {
      type: "scatter", mode: "markers", name: "random candidates", x: pairs.map(p => p[1]), y: pairs.map(p => p[2]), marker: {size: 9, color: colour("accent")},
      hovertext: pairs.map(p => `<b>${text(p[0])}</b><br>emulated ${fixed(p[1], 2)}<br>engine ${fixed(p[2], 2)}`), hoverinfo: "text",
    }], layout({xaxis: axis(`emulated (search)${unit}`), yaxis: axis(`engine file${unit}`)})];
  }

  const KINDS = [["accent", ""], ["third", "/"], ["second", ""], ["fourth", "x"], ["soft", "."], ["ink", "-"]];
  function operators() {
    const o = facts.operators, rows = o.engines.map(e => text(e.title)), traces = [];
    const rank = k => ({attention: 0, mlp: 1, embedding: 2, head: 3, call: 4})[k] ?? 5;
    for (const kind of [...o.kinds].sort((a, b) => rank(a) - rank(b))) {
      const [name, pattern] = KINDS[Math.min(rank(kind), KINDS.length - 1)];
      let first = true;
      o.engines.forEach((e, i) => e.blocks.filter(b => b.kind === kind).forEach(b => {
        traces.push({
          type: "bar", orientation: "h", name: text(kind), legendgroup: kind, showlegend: first, y: [rows[i]], x: [b.latency_ms],
          marker: {color: colour(name), line: {color: colour("card"), width: 1}, pattern: {shape: pattern, fillmode: "overlay", fgcolor: colour("card"), size: 6, solidity: 0.25}},
          hovertext: [`<b>${text(b.block)}</b>, ${text(e.title)}<br>predicted ${ms(b.latency_ms)} (${fixed(100 * b.latency_ms / e.total_ms, 1)} % of ${ms(e.total_ms)})<br>${text(b.operator)}` + (b.noisy ? "<br>noisy row" : "")],
          hoverinfo: "text", textposition: "none",
        });
        first = false;
      }));
    }
    const measured = o.engines.filter(e => e.measured_ms !== null);
    if (measured.length) traces.push({
      type: "scatter", mode: "markers", name: `whole engine, ${observed}`, x: measured.map(e => e.measured_ms), y: measured.map(e => text(e.title)),
      marker: {symbol: "diamond", size: 12, color: colour("ink"), line: {width: 2, color: colour("card")}}, hovertext: measured.map(e => `<b>${text(e.title)}</b><br>${observed} ${ms(e.measured_ms)}`), hoverinfo: "text",
    });
    return [traces, layout({barmode: "stack", bargap: 0.35, xaxis: axis(`predicted ${facts.ms} of one call`, {rangemode: "tozero"}), yaxis: axis("", {autorange: "reversed", showgrid: false, type: "category"}), margin: {l: 20, r: 12, t: 10, b: 48}, ...(narrow() ? {legend: {orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom", font: {color: colour("ink")}}} : {})})];
  }

  function search() {
    const h = facts.search.hypervolume;
    return [[{type: "scatter", mode: "lines", name: "hypervolume", x: h.map(p => p[0]), y: h.map(p => p[1]), line: {color: colour("accent"), width: 2.5, shape: "hv"}, hovertemplate: "%{x:,} scored<br>hypervolume %{y:.4g}<extra></extra>"}],
      layout({showlegend: false, xaxis: axis("candidates scored", {rangemode: "tozero"}), yaxis: axis("hypervolume")})];
  }

  const GENES = 24;
  function genes() {
    const x = facts.explain, most = g => g.ms.reduce((a, b) => a + b, 0);
    const largest = [Math.max(...x.genes.map(g => g.points)) || 1, Math.max(...x.genes.map(most)) || 1];
    const weight = g => Math.max(g.points / largest[0], most(g) / largest[1]);
    const shown = [...x.genes].sort((a, b) => weight(b) - weight(a)).slice(0, GENES).reverse(), names = shown.map(g => text(g.gene));
    const bars = (name, values, axes, which, pattern, unit) => ({
      type: "bar", orientation: "h", name, y: names, x: values, ...axes, marker: {color: colour(which), pattern: {shape: pattern, fillmode: "overlay", fgcolor: colour("card"), size: 6, solidity: 0.25}},
      hovertext: values.map((v, i) => `<b>${names[i]}</b><br>${name}: ${fixed(v, 3)} ${unit}`), hoverinfo: "text", textposition: "none",
    });
    const traces = [bars(`${text(x.metric)} (predicted)`, shown.map(g => g.points), {}, "accent", "", "points")];
    x.targets.forEach((on, i) => traces.push(bars(`latency${text(on)} (table)`, shown.map(g => g.ms[i]), {xaxis: "x2"}, ["second", "third", "fourth"][i % 3], ["/", "x", "."][i % 3], "ms")));
    const box = document.getElementById("plot-genes");
    box.style.height = `${Math.max(260, 22 * names.length * (narrow() ? 1.1 : 1) + 120)}px`;
    return [traces, layout({
      barmode: "group", bargap: 0.3, yaxis: axis("", {type: "category", showgrid: false, dtick: 1}),
      xaxis: axis(narrow() ? "points" : `${text(x.metric)}, points`, {domain: [0, 0.47], rangemode: "tozero"}),
      xaxis2: axis(narrow() ? "ms" : "latency, ms", {domain: [0.53, 1], rangemode: "tozero", anchor: "y"}),
    })];
  }

  function thinned() {
    const x = facts.explain, traces = [], edge = 0.7 * Math.max(...x.layers.map(t => t.ms[0]));
    for (const [kind, symbol] of [["predicted", "circle-open"], ["scored", "circle"]]) {
      const rows = x.layers.filter(t => t.kind === kind).sort((a, b) => a.points - b.points);  // layers alike save alike: names beside each other
      if (rows.length) traces.push({
        type: "scatter", mode: "markers+text", name: `loss ${kind}`, x: rows.map(t => t.ms[0]), y: rows.map(t => t.points), text: rows.map(t => text(t.title)), textposition: rows.map((t, i) => i % 2 || t.ms[0] > edge ? "middle left" : "middle right"), cliponaxis: false,
        error_y: {type: "data", array: rows.map(t => t.spread ?? 0), color: colour("accent"), thickness: 1, width: 3}, marker: {symbol, size: 10, color: colour("accent"), line: {width: 1.5}},
        hovertext: rows.map(t => `<b>${text(t.title)}</b><br>${wrap(t.change)}<br>${t.points >= 0 ? "loses" : "gains"} ${fixed(Math.abs(t.points), 2)} points` + (t.spread === null ? " (scored)" : ` ± ${fixed(t.spread, 2)} (predicted)`) + t.ms.map((v, i) => `<br>saves ${fixed(v, 3)} ms${text(x.targets[i])} (table)`).join("")), hoverinfo: "text",
      });
    }
    return [traces, layout({xaxis: axis(`${facts.ms} saved${text(x.targets[0])} (table)`, {rangemode: "tozero"}), yaxis: axis(`${text(x.metric)} lost, points`)})];
  }

  const charts = {front, prediction, agreement, operators, search, genes, thinned};
  (facts.devices ? facts.devices.devices : []).forEach((_, number) => { charts[`device-${number}`] = device(number); });
  function draw() {
    for (const [name, make] of Object.entries(charts)) {
      const box = document.getElementById("plot-" + name);
      if (box) Plotly.react(box, ...make(), {responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false});
    }
    document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn || 0) + 1);
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("(max-width: 639px)").addEventListener("change", draw);
  matchMedia("print").addEventListener("change", draw);
  addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
})();
