// Every page: a form is sent once, and the list of jobs follows them.
"use strict";

for (const form of document.querySelectorAll("form[data-busy]")) {
  form.addEventListener("submit", () => {
    // after the browser has read the form, or the button's own value would be missing
    setTimeout(() => {
      for (const button of form.querySelectorAll("button")) {
        button.disabled = true;
      }
      form.querySelector("button").textContent = form.dataset.busy;
    });
  });
}
// a page that the browser kept, to which the user returned
addEventListener("pageshow", (event) => {
  if (event.persisted) {
    location.reload();
  }
});

const list = document.querySelector("[data-live]");
if (list) {
  const live = new Set(list.dataset.live.split(",").filter(Boolean));
  const ended = ["completed", "failed", "cancelled"];
  const follow = async () => {
    if (!document.hidden) {
      const answer = await fetch("/jobs/progress?ids=" + [...live].join(","));
      if (!answer.ok) {
        return; // logged out, or the server stops: the page stays as it is
      }
      for (const [id, job] of Object.entries(await answer.json())) {
        const row = document.getElementById(id);
        row.querySelector("[data-status]").textContent = job.status;
        row.querySelector("progress").value = job.fraction;
        row.querySelector("[data-verdict]").textContent = job.verdict ?? "";
        if (ended.includes(job.status)) {
          live.delete(id);
        }
      }
    }
    if (live.size) {
      setTimeout(follow, 2000);
    }
  };
  if (live.size) {
    setTimeout(follow, 2000);
  }
}

// the keys of the labelling page press its buttons
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.matches("input, textarea, select")) {
    return;
  }
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key.toLowerCase())}"]:not(:disabled)`);
  if (button) {
    event.preventDefault();
    button.click();
  }
});
