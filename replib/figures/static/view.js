// View of figures with controls in the browser, drawn by Plotly.react.
// `render` serves the live widget, `mount` serves the widget and the exported page; a move needs no kernel.
//
// payload = {title, controls: [{name, values, menu}], figure: {data: {0: trace, …}, layout}, frames: [{at, change}]}
// A frame has one index per control and only its difference from `figure`. A part of the figure that follows some
// controls only has its own sheet of frames, whose indices of the other controls are null.

const PLAY_MS = 700;

const isTree = (value) => value?.constructor === Object && !("bdata" in value);

/** Apply the difference of a frame to the figure. */
function merge(base, change) {
  if (!isTree(base) || !isTree(change)) return change;
  const merged = { ...base };
  for (const [key, value] of Object.entries(change)) merged[key] = merge(base[key], value);
  return merged;
}

/** Convert arrays of a widget to buffers for plotly; the exported page has them in base64. */
function unpack(value) {
  if (value instanceof DataView) return value.buffer.slice(value.byteOffset, value.byteOffset + value.byteLength);
  if (Array.isArray(value)) return value.map(unpack);
  if (value?.constructor !== Object) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, unpack(item)]));
}

function element(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

/** Group frames into sheets by the controls that they follow. */
function sheetsOf(frames) {
  const sheets = new Map();
  for (const frame of frames) {
    const followed = frame.at.map((index) => index !== null).join();
    if (!sheets.has(followed)) sheets.set(followed, []);
    sheets.get(followed).push(frame);
  }
  return [...sheets.values()];
}

/** Find the frame of a sheet at the indices `at`. */
const frameAt = (frames, at) => frames.find((frame) => frame.at.every((index, k) => index === null || index === at[k]));

function control({ name, values, menu }, moved) {
  const shown = element("output");
  const input = menu
    ? element("select", {}, ...values.map((value, index) => element("option", { value: index }, value)))
    : element("input", { type: "range", min: 0, max: values.length - 1, step: 1, disabled: values.length < 2 });
  input.addEventListener("input", () => moved(Number(input.value)));
  const label = element("label", { className: "replib-control" }, element("span", {}, name), input, ...(menu ? [] : [shown]));
  const show = (index) => {
    input.value = index;
    input.setAttribute("aria-valuetext", `${name} ${values[index]}`);
    shown.textContent = values[index];
  };
  return { label, show };
}

/** Build controls and plot inside `root`; `moved(at)` is called after each move. Returns {move, destroy}. */
export function mount(root, payload, Plotly, { start, moved = () => {} } = {}) {
  const { controls, figure, frames } = payload;
  const sheets = sheetsOf(frames);
  let at = start?.length === controls.length ? [...start] : [...frames[0].at];
  let pending = 0;
  let timer = 0;

  const plot = element("div", { className: "replib-plot" });
  plot.style.minHeight = `${figure.layout.height ?? 450}px`;
  const parts = controls.map((spec, k) => control(spec, (index) => move(at.with(k, index))));
  const bar = element("div", { className: "replib-controls", role: "group" }, ...parts.map((part) => part.label));
  bar.setAttribute("aria-label", payload.title || "figure controls");

  function draw() {
    pending = 0;
    const frames = sheets.map((sheet) => frameAt(sheet, at));
    const { data, layout } = structuredClone(frames.reduce((drawn, frame) => merge(drawn, frame.change), figure));
    const traces = Object.values(data).filter(Boolean);
    return Plotly.react(plot, traces, { ...layout, autosize: true, uirevision: "kept" }, { displaylogo: false });
  }

  function move(place) {
    at = [...place];
    parts.forEach((part, k) => part.show(at[k]));
    pending ||= requestAnimationFrame(draw);
    moved(at);
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "▶ play";
  }

  function step() {
    if (at[0] + 1 < controls[0].values.length) move([at[0] + 1]);
    else stop();
  }

  const play = element("button", { type: "button", className: "replib-play", textContent: "▶ play" });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (at[0] + 1 === controls[0].values.length) move([0]);
    timer = setInterval(step, PLAY_MS);
    play.textContent = "❚❚ pause";
  });
  if (controls.length === 1 && !controls[0].menu && controls[0].values.length > 1) bar.append(play);
  // JupyterLab takes the arrow keys of a focused control for its own, unless the very element forbids it.
  bar.querySelectorAll("input, select, button").forEach((node) => (node.dataset.lmSuppressShortcuts = "true"));

  const heading = payload.title ? [element("p", { className: "replib-title", textContent: payload.title })] : [];
  root.replaceChildren(element("div", { className: "replib-scrub" }, ...heading, bar, plot));
  parts.forEach((part, k) => part.show(at[k]));
  pending = requestAnimationFrame(draw);

  let width = 0;
  const observer = new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now && now !== width && plot.data) Plotly.Plots.resize(plot);
    width = now;
  });
  observer.observe(plot);

  function destroy() {
    stop();
    cancelAnimationFrame(pending);
    observer.disconnect();
    Plotly.purge(plot);
  }
  return { move, destroy };
}

/** Load plotly.js once a page, from the loader widget that every view of a kernel shares. */
function loadPlotly(model) {
  globalThis.replibPlotly ??= (async () => {
    const loader = await model.widget_manager.get_model(model.get("plotly").replace("IPY_MODEL_", ""));
    const url = URL.createObjectURL(new Blob([loader.get("source")], { type: "text/javascript" }));
    await new Promise((resolve, reject) => {
      document.head.append(element("script", { src: url, onload: resolve, onerror: reject }));
    });
    URL.revokeObjectURL(url);
    return globalThis.Plotly;
  })().catch((error) => {
    globalThis.replibPlotly = undefined;
    throw error;
  });
  return globalThis.replibPlotly;
}

async function render({ model, el }) {
  const Plotly = await loadPlotly(model);
  let last = JSON.stringify(model.get("position"));
  const moved = (at) => {
    last = JSON.stringify(at);
    model.set("position", at);
    model.save_changes();
  };
  const build = () => mount(el, unpack(model.get("payload")), Plotly, { start: model.get("position"), moved });
  let view = build();
  model.on("change:payload", () => {
    view.destroy();
    view = build();
  });
  model.on("change:position", () => {
    const now = JSON.stringify(model.get("position"));
    if (now !== last) view.move(JSON.parse(now));
  });
  return () => view.destroy();
}

export default { render };
