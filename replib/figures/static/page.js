// Brings the exported page to life; the build puts it behind view.js, whose `mount` it uses.

const read = (node) => JSON.parse(node.querySelector("script").textContent);

function draw(node) {
  if (node.dataset.drawn) return;
  node.dataset.drawn = "yes";
  const content = read(node);
  const place = node.querySelector(".live");
  if (node.classList.contains("replib-view")) mount(place, content, Plotly);
  else Plotly.newPlot(place, content.data, content.layout, { responsive: true, displaylogo: false });
}

// Figures are drawn when they come near the window: a report holds dozens of them.
const lively = document.querySelectorAll(".replib-view, .replib-figure");
const watcher = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
  { rootMargin: "600px" },
);
lively.forEach((node) => watcher.observe(node));
addEventListener("beforeprint", () => lively.forEach(draw));

const toggle = document.querySelector("#code-toggle");
toggle.addEventListener("click", () => {
  const open = toggle.getAttribute("aria-pressed") !== "true";
  document.querySelectorAll("details.code").forEach((details) => (details.open = open));
  toggle.setAttribute("aria-pressed", open);
  toggle.textContent = open ? "hide all code" : "show all code";
});
