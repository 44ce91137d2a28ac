// Every two seconds: what has changed on the page is replaced, and stays as a person has set it
const served = new Map();  // id of a part: its HTML as it came, before sliders were moved
const parts = page => [...page.querySelectorAll('body > [id], .runs > [id]')];
for (const part of parts(document)) served.set(part.id, part.outerHTML);

function replacePart(old, part) {
  const details = [...(old?.querySelectorAll('details') ?? [])].map(d => d.open);
  const slider = old?.querySelector('[type=range]'), shown = old?.querySelector('output')?.textContent;
  const isLast = !slider || slider.value === slider.max;
  const sideBySide = old?.querySelector('.films [type=checkbox]')?.checked;
  old ? old.replaceWith(part) : document.querySelector('.runs, body').append(part);
  part.querySelectorAll('details').forEach((d, i) => { if (i in details) d.open = details[i]; });
  startPlots(part);
  startFilms(part);
  const films = part.querySelector('.films');
  if (films && !isLast) {
    const fresh = films.querySelector('[type=range]'), i = films.dataset.names.split('|').indexOf(shown);
    if (i >= 0) { fresh.value = i; fresh.dispatchEvent(new Event('input')); }
  }
  if (films && sideBySide) films.querySelector('[type=checkbox]').click();
}

function update(page) {
  document.title = page.title;
  const fresh = parts(page), ids = new Set(fresh.map(part => part.id));
  for (const id of [...served.keys()]) if (!ids.has(id)) { document.getElementById(id)?.remove(); served.delete(id); }
  let before = null;
  for (const part of fresh) {
    const html = part.outerHTML, id = part.id;
    if (served.get(id) !== html) {
      const isNew = !served.has(id), copy = document.adoptNode(part);
      replacePart(isNew ? null : document.getElementById(id), copy);
      if (isNew && before) before.after(copy);
      served.set(id, html);
    }
    before = document.getElementById(id);
  }
}

let last = null;
async function follow() {
  if (!document.hidden) try {
    const answer = await fetch(location.href, {cache: 'no-cache'}), text = await answer.text();
    if (answer.ok && text !== last) update(new DOMParser().parseFromString(text, 'text/html'));
    last = text;
    document.body.classList.toggle('silent', !answer.ok);
  } catch { document.body.classList.add('silent'); }
  setTimeout(follow, 2000);
}
setTimeout(follow, 2000);
