// Under the pointer, a line on every chart over steps, and in their legends the values there.
const charts = [...document.querySelectorAll("svg[data-curves]")].map((svg) => ({
  svg,
  scale: JSON.parse(svg.dataset.scale),
  curves: JSON.parse(svg.dataset.curves),
  cursor: svg.querySelector(".cursor"),
  name: svg.querySelector(".name"),
  values: [...svg.closest("figure").querySelectorAll("output")],
}));

const number = (x) =>
  x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6)
    ? x.toExponential(1).replace(".0e", "e").replace("e+", "e")
    : Math.abs(x) >= 100 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(3)));

const nearest = (steps, step) =>
  steps.reduce((best, at, i) => (Math.abs(at - step) < Math.abs(steps[best] - step) ? i : best), 0);

function show(step) {
  for (const { scale: [low, high, start, end], curves, cursor, name, values } of charts) {
    const x = start + ((step - low) / (high - low)) * (end - start);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.classList.toggle("on", step >= low && step <= high);
    name.textContent = `step ${Math.round(step)}`;
    curves.forEach(([steps, ys], i) => (values[i].textContent = number(ys[nearest(steps, step)])));
  }
}

function hide() {
  for (const { curves, cursor, name, values } of charts) {
    cursor.classList.remove("on");
    name.textContent = "step";
    curves.forEach(([, ys], i) => (values[i].textContent = number(ys[ys.length - 1])));
  }
}

for (const { svg, scale: [low, high, start, end] } of charts) {
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(Math.min(high, Math.max(low, low + ((x - start) / (end - start)) * (high - low))));
  });
  svg.addEventListener("pointerleave", hide);
}
