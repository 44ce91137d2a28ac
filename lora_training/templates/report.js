for (const films of document.querySelectorAll('.films')) {
  const slider = films.querySelector('[type=range]'), title = films.querySelector('output');
  const titles = films.dataset.names.split('|'), shots = films.querySelectorAll('.shot');
  slider.addEventListener('input', () => {
    title.textContent = titles[slider.value];
    for (const shot of shots) shot.classList.toggle('on', shot.dataset.i === slider.value);
  });
  const sideBySide = films.querySelector('[type=checkbox]');
  sideBySide.addEventListener('change', () => films.classList.toggle('all', sideBySide.checked));
}
addEventListener('beforeprint', () => {
  for (const details of document.querySelectorAll('details:not(.extra)')) details.open = true;
});
