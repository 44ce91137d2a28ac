// A slider shows the pictures of one step, or all of them side by side
function startFilms(part) {
  for (const films of part.querySelectorAll('.films')) {
    const slider = films.querySelector('[type=range]'), title = films.querySelector('output');
    const titles = films.dataset.names.split('|'), shots = films.querySelectorAll('.shot');
    slider.addEventListener('input', () => {
      title.textContent = titles[slider.value];
      for (const shot of shots) shot.classList.toggle('on', shot.dataset.i === slider.value);
    });
    const sideBySide = films.querySelector('[type=checkbox]');
    sideBySide.addEventListener('change', () => films.classList.toggle('all', sideBySide.checked));
  }
}
startFilms(document);
addEventListener('beforeprint', () => {
  for (const details of document.querySelectorAll('details:not(.extra)')) details.open = true;
});
