"use strict";
// The time of a step beside its memory, where the page holds it. Text enters as text nodes only.

const shorten = (path) => path.split(/[/\\]/).at(-1);

/** Names, their time, and a bar as long as their share. */
function showShares(id, rows, name = (text) => text) {
  const made = rows.map(([text, time, share]) => {
    const bar = element("span", { className: "bar" });
    bar.style.width = `${100 * share}%`;
    return element(
      "tr",
      {},
      element("td", { textContent: name(text) || "(none)", title: text }),
      element("td", { className: "number", textContent: time }),
      element("td", { className: "number", textContent: formatShare(share, 1) }),
      element("td", { className: "bars", ariaHidden: "true" }, bar),
    );
  });
  $(id).tBodies[0].replaceChildren(...made);
}

function showKernels(rows) {
  const made = rows.map(([name, kind, layer, source, launches, bound, time]) => {
    const texts = [name, kind, layer, shorten(source)].map((text, i) =>
      element("td", { className: i === 3 ? "code" : "", textContent: text, title: i === 3 ? source : text }),
    );
    const numbers = [formatCount(launches), bound, time].map((text) =>
      element("td", { className: "number", textContent: text }),
    );
    return element("tr", {}, ...texts, ...numbers);
  });
  $("kernels").tBodies[0].replaceChildren(...made);
}

function showTime(time) {
  const total = element("dd", { textContent: time.text });
  $("totals").append(element("div", {}, element("dt", { textContent: "Step time" }), total));
  $("time-title").textContent = `Step time on ${time.target}: ${time.text}`;
  const bounds = time.bounds.map(([name, text]) => `${text} bound by ${name}`).join(", ");
  $("time-summary").textContent = `${time.summary}; ${bounds}`;
  showShares("time-kinds", time.kinds);
  showShares("time-sources", time.sources, shorten);
  showKernels(time.kernels);
  const all = time.kernels.length === time.number_of_kernels;
  $("kernels-title").textContent = all
    ? "Kernels"
    : `The ${time.kernels.length} longest of ${formatCount(time.number_of_kernels)} kernels`;
  $("time-assumptions").textContent = `A roofline of the compiled program, no measurement; ${time.assumptions}.`;
  $("time").hidden = false;
}

if (profile.time) showTime(profile.time);
