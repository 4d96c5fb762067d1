"use strict";
const shown = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const tone = name => getComputedStyle(root).getPropertyValue(name).trim();

function layout(figure, narrow) {
  const axis = { gridcolor: tone("--line"), zerolinecolor: tone("--line"), linecolor: tone("--front"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: tone("--front"), size: 13 },
    margin: { l: 10, r: 10, t: 10, b: 10 }, showlegend: true, hovermode: "closest",
    legend: narrow ? { orientation: "h", y: -0.25 } : {},
    xaxis: { ...axis, ...figure.x }, yaxis: { ...axis, ...figure.y },
  };
}

function draw() {
  const narrow = window.innerWidth < 640;
  for (const [name, figure] of Object.entries(shown)) {
    const place = document.getElementById(name).querySelector(".plot");
    Plotly.react(place, figure.data, layout(figure, narrow), { responsive: true, displaylogo: false });
  }
}

document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
