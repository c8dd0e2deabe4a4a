// A job's page: progress and loss curve from its event stream.
"use strict";

const ENDED = ["completed", "failed", "cancelled"];
const [WIDTH, HEIGHT, MARGIN, MOST] = [600, 200, 6, 600]; // of the plot, and points that are drawn
const page = document.getElementById("job");
const part = (name) => page.querySelector(`[data-part="${name}"]`);
const live = page.dataset.live === "yes";
const points = []; // [step, loss]
let [status, latest, drawing, settling] = [page.dataset.status, null, false, 0];

function draw() {
  drawing = false;
  if (latest) {
    part("bar").value = page.dataset.status === "completed" ? 1 : latest.step / Math.max(1, latest.total);
    const loss = latest.loss === null ? "" : `, loss ${latest.loss.toPrecision(4)}`;
    const rate = latest.learning_rate === null ? "" : `, learning rate ${latest.learning_rate.toExponential(2)}`;
    part("numbers").textContent = `step ${latest.step} of ${latest.total}${loss}${rate}`;
  }
  if (points.length < 2) {
    return;
  }
  const losses = points.map((point) => point[1]);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const [first, last] = [points[0][0], points[points.length - 1][0]];
  const x = (step) => (WIDTH * (step - first)) / Math.max(1, last - first);
  const y = (loss) => MARGIN + ((HEIGHT - 2 * MARGIN) * (high - loss)) / (high - low || 1);
  const every = Math.ceil(points.length / MOST);
  const shown = points.filter((_, i) => i % every === 0 || i === points.length - 1);
  part("path").setAttribute("d", "M" + shown.map(([s, l]) => `${x(s).toFixed(1)} ${y(l).toFixed(1)}`).join("L"));
  part("high").textContent = high.toPrecision(3);
  part("low").textContent = low.toPrecision(3);
  part("first").textContent = `step ${first}`;
  part("last").textContent = `step ${last}`;
  part("curve").setAttribute(
    "aria-label",
    `Training loss from ${losses[0].toPrecision(3)} at step ${first} to ${losses[losses.length - 1].toPrecision(3)} at step ${last}`,
  );
  part("loss").hidden = false;
}

function take(event) {
  const data = JSON.parse(event.data);
  status = data.status ?? status;
  if (data.step !== undefined && data.total !== undefined) {
    while (points.length && points[points.length - 1][0] >= data.step) {
      points.pop(); // an attempt that resumed from a checkpoint
    }
    latest = { loss: null, learning_rate: null, ...data };
    if (latest.loss !== null) {
      points.push([latest.step, latest.loss]);
    }
  }
  if (live) {
    clearTimeout(settling); // the stream begins with the past, whose statuses nobody needs to see
    settling = setTimeout(() => (part("status").textContent = status), 300);
  }
  if (!drawing) {
    drawing = true;
    requestAnimationFrame(draw);
  }
}

const source = new EventSource(`/jobs/${page.dataset.id}/events`);
for (const kind of ["progress", "heartbeat", "complete"]) {
  source.addEventListener(kind, take);
}
source.addEventListener("error", (event) => {
  if (event.data !== undefined) {
    take(event); // the service's event of that name: the job has failed
  } else if (ENDED.includes(status)) {
    source.close(); // the stream is over
    if (live) {
      location.reload(); // verdict, metrics and report
    }
  }
});
