// The legend shows the values of the step under the pointer
function startPlots(part) {
  for (const plot of part.querySelectorAll('.plot')) {
    const shown = [...plot.querySelectorAll('.legend b')], last = shown.map(b => b.textContent);
    for (const stop of plot.querySelectorAll('.stop')) stop.addEventListener('pointerenter', () =>
      stop.dataset.values.split('|').forEach((v, i) => shown[i].textContent = v));
    plot.addEventListener('pointerleave', () => shown.forEach((b, i) => b.textContent = last[i]));
  }
}
startPlots(document);
