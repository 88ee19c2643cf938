"use strict";
// Draws each chart when it comes near the screen, in the page's own colours, and again when light and dark change.
(() => {
  const charts = Array.from(document.querySelectorAll(".chart"), (box) => ({
    box,
    figure: JSON.parse(box.querySelector("script").textContent),
    drawn: false,
  }));
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const inks = () => ({
    "font.color": colour("--soft"),
    "yaxis.gridcolor": colour("--line"),
    "xaxis.linecolor": colour("--line"),
    "xaxis.tickcolor": colour("--line"),
    "hoverlabel.bgcolor": colour("--card"),
    "hoverlabel.font.color": colour("--ink"),
  });
  const draw = (chart) => {
    if (chart.drawn) return;
    chart.drawn = true;
    const options = { displayModeBar: false, responsive: true };
    Plotly.newPlot(chart.box, chart.figure.data, chart.figure.layout, options).then(() => Plotly.relayout(chart.box, inks()));
  };
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
      near.unobserve(entry.target);
      draw(charts.find((chart) => chart.box === entry.target));
    }),
    { rootMargin: "800px" },
  );
  charts.forEach((chart) => near.observe(chart.box));
  addEventListener("beforeprint", () => charts.forEach(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    charts.filter((chart) => chart.drawn).forEach((chart) => Plotly.relayout(chart.box, inks())));
})();
