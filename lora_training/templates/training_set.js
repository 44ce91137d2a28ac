const cards = [...document.querySelectorAll('#set figure')], count = document.getElementById('count');
const controls = ['words', 'bucket', 'source'].map(id => document.getElementById(id));
function show() {
  const [words, bucket, source] = controls.map(c => c ? c.value.toLowerCase() : '');
  let n = 0;
  for (const card of cards) {
    const fits = card.textContent.toLowerCase().includes(words) && (!bucket || card.dataset.bucket === bucket)
      && (!source || card.dataset.source === source);
    card.hidden = !fits; n += fits;
  }
  count.textContent = n + ' of ' + cards.length;
}
for (const c of controls) if (c) c.addEventListener('input', show);
show();
