// The clips of a report: filters, order, address, keyboard, cards made when they are scrolled to, the enlarged clip.
// It reads the JSON of media.gallery_data and builds elements; text is only ever set as text.
'use strict';
const data = JSON.parse(document.getElementById('gallery').textContent);
const form = document.getElementById('filters'), box = document.getElementById('clips');
const more = document.getElementById('more'), large = document.getElementById('large');
const count = document.getElementById('count');
const STEP = 12;
let shown = [], made = 0, only = null;

function make(tag, names, ...children) {
  const element = document.createElement(tag);
  if (names) element.className = names;
  element.append(...children.filter(child => child !== null && child !== undefined && child !== ''));
  return element;
}
const value = name => form.elements[name] ? form.elements[name].value : '';
const others = row => Object.values(row.said);
const said = row => row.said[value('run')];
const beside = row => value('beside') && value('beside') !== value('run') ? row.said[value('beside')] : undefined;
const goodness = answer => answer.jf !== null ? answer.jf : 100 - answer.scores.S;
const TESTS = {
  right: a => a.right, wrong: a => a.right === false, unfaithful: a => a.faithful === false, noseg: a => !a.seg,
  high: a => a.jf !== null && a.jf >= 80, low: a => a.jf !== null && a.jf < 30,
};
const change = row => beside(row) ? goodness(said(row)) - goodness(beside(row)) : 0;
const ORDERS = {
  row: (a, b) => a.row - b.row, worst: (a, b) => goodness(said(a)) - goodness(said(b)),
  best: (a, b) => goodness(said(b)) - goodness(said(a)), gain: (a, b) => change(b) - change(a),
  loss: (a, b) => change(a) - change(b),
};
function words(row) {
  const steps = others(row).flatMap(a => [a.answer || '', ...a.steps.map(step => data.texts[step[1]])]);
  return [row.row, row.ref, row.cls, row.clip, ...steps].join(' ').toLowerCase();
}
function choose() {
  const text = value('text').trim().toLowerCase(), test = TESTS[value('result')];
  shown = data.rows.filter(row => {
    const answer = said(row);
    if (!answer || (only !== null && row.row !== only)) return false;
    if (Object.entries(data.fields).some(([name, key]) => value(name) && row[key] !== value(name))) return false;
    if (test && !test(answer)) return false;
    if (!text) return true;
    row.words = row.words || words(row);
    return row.words.includes(text);
  });
  shown.sort(ORDERS[value('order')] || ORDERS.row);
  box.replaceChildren();
  made = 0;
  grow();
  const known = data.rows.filter(said).length;
  count.textContent = `${shown.length} of ${known} clips.`;
}
function grow() {
  for (const row of shown.slice(made, made + STEP)) box.append(card(row));
  made = Math.min(made + STEP, shown.length);
  more.hidden = made >= shown.length;
}
function picture(src, alt) {
  const image = make('img');
  image.loading = 'lazy';
  image.decoding = 'async';
  image.alt = alt;
  image.src = src;
  return image;
}
function grid(row) {
  const columns = Math.min(data.columns, row.n), lines = Math.ceil(row.n / data.columns);
  return {columns, lines, ratio: `${columns * row.hw[1]} / ${lines * row.hw[0]}`};
}
function layers(row, mask, title, kind) {
  const strip = make('div', 'strip');
  strip.style.aspectRatio = grid(row).ratio;
  strip.append(picture(row.frames, `${row.n} frames, ${title}`));
  if (mask) {
    const layer = picture(mask, '');
    layer.className = 'mask';
    strip.append(layer);
  }
  return make('figure', kind, make('figcaption', '', title), strip);
}
function scores(answer) {
  const all = Object.entries(answer.scores).concat(answer.jf === null ? [] : [['J&F', answer.jf]]);
  return all.map(([name, number]) => `${name} ${number.toFixed(1)}`).join('   ');
}
function chip(text, good) {
  return make('span', 'chip' + (good === null ? '' : good ? ' good' : ' bad'), text);
}
function verdicts(row, answer) {
  const line = make('p', 'chips', chip(`answer: ${answer.answer || 'none'}`, answer.right));
  if (answer.faithful !== null) line.append(chip(answer.faithful ? 'faithful' : 'unfaithful', answer.faithful));
  if (!answer.seg) line.append(chip('no [SEG]', false));
  line.append(chip(scores(answer), null));
  return line;
}
function reasoning(answer) {
  const list = make('ol', 'steps');
  for (const [step, text] of answer.steps) list.append(make('li', '', make('b', '', step), ' ', data.texts[text]));
  return answer.steps.length ? list : make('p', 'note', '(no answer)');
}
function sound(answer) {
  if (!answer.sound) return null;
  const player = make('audio');
  player.controls = true;
  player.preload = 'none';
  player.src = answer.sound;
  player.setAttribute('aria-label', 'sound that the model heard');
  return player;
}
function opinion(row, name, answer) {
  const part = make('section', 'said', make('h4', '', name), verdicts(row, answer), reasoning(answer));
  if (answer.note) part.append(make('p', 'note', answer.note));
  return part;
}
function card(row) {
  const answer = said(row), other = beside(row), pictures = make('div', 'pictures');
  if (row.frames) {
    pictures.append(layers(row, row.truth, 'ground truth', 'truth'));
    pictures.append(layers(row, answer.masks, value('run'), 'predicted'));
    if (other) pictures.append(layers(row, other.masks, value('beside'), 'predicted'));
  } else if (answer.strip) {
    pictures.append(picture(answer.strip, 'frames, ground truth (green), prediction (orange)'));
  } else pictures.append(make('p', 'note', 'No picture was drawn of this row.'));
  const player = sound(answer), controls = make('div', 'controls', player);
  const where = [row.split, row.kind, `target ${row.cls}`, row.size, row.failure && `failure: ${row.failure}`];
  const meta = make('p', 'meta', `row ${row.row} · ` + where.filter(Boolean).join(' · '));
  const text = make('div', 'text', opinion(row, value('run'), answer));
  if (other) text.append(opinion(row, value('beside'), other));
  const article = make('article', '', make('header', '', make('h3', '', row.ref), meta), pictures,
    make('div', 'below', text, controls));
  article.tabIndex = 0;
  article.setAttribute('aria-label', `row ${row.row}: ${row.ref}`);
  if (row.frames) {
    const button = make('button', 'enlarge', 'enlarge');
    button.type = 'button';
    button.addEventListener('click', () => enlarge(row));
    controls.append(button);
    for (const strip of pictures.querySelectorAll('.strip')) strip.addEventListener('click', event => {
      const area = strip.getBoundingClientRect(), g = grid(row);
      const x = Math.floor((event.clientX - area.left) / area.width * g.columns);
      const y = Math.floor((event.clientY - area.top) / area.height * g.lines);
      enlarge(row, Math.min(row.n - 1, y * data.columns + x));
    });
  }
  article.addEventListener('keydown', event => {
    if (event.key === 'Enter' && event.target === article && row.frames) enlarge(row);
  });
  return article;
}
function enlarge(row, start = 0) {
  const g = grid(row), answer = said(row), other = beside(row), views = [];
  const shownMasks = [['ground truth', row.truth], [value('run'), answer.masks]];
  if (other) shownMasks.push([value('beside'), other.masks]);
  const stage = make('div', 'views');
  for (const [title, mask] of shownMasks) {
    const view = make('div', 'view'), inner = make('div', 'inner', picture(row.frames, title));
    if (mask) { const layer = picture(mask, ''); layer.className = 'mask'; inner.append(layer); }
    view.style.aspectRatio = `${row.hw[1]} / ${row.hw[0]}`;
    inner.style.width = `${100 * g.columns}%`;
    view.append(inner);
    views.push(inner);
    const kind = mask === row.truth ? 'truth' : 'predicted';
    stage.append(make('figure', kind, make('figcaption', '', title), view));
  }
  const slider = make('input'), label = make('span', 'meta');
  Object.assign(slider, {type: 'range', min: 0, max: row.n - 1, value: start});
  slider.setAttribute('aria-label', 'frame');
  function show() {
    const t = Number(slider.value), x = t % data.columns, y = Math.floor(t / data.columns);
    for (const inner of views) inner.style.transform = `translate(${-100 * x / g.columns}%, ${-100 * y / g.lines}%)`;
    label.textContent = `frame ${t + 1} of ${row.n}`;
  }
  slider.addEventListener('input', show);
  const player = sound(answer);
  if (player) player.addEventListener('timeupdate', () => {
    if (!player.duration) return;
    slider.value = Math.min(row.n - 1, Math.floor(player.currentTime / player.duration * row.n));
    show();
  });
  const close = make('button', '', 'close');
  close.type = 'button';
  close.addEventListener('click', () => large.close());
  const head = make('div', 'head', make('h3', '', row.ref), close);
  large.replaceChildren(head, stage, make('div', 'slide', slider, label));
  if (player) large.append(player);
  large.append(opinion(row, value('run'), answer));
  show();
  large.showModal();
  slider.focus();
}
function remember() {
  const state = new URLSearchParams();
  for (const [name, text] of new FormData(form)) if (name !== 'masks' && text) state.set(name, text);
  for (const field of form.querySelectorAll('select')) {
    if (field.options[field.selectedIndex].defaultSelected) state.delete(field.name);
  }
  if (only !== null) state.set('row', only);
  const address = String(state);
  history.replaceState(null, '', address ? '#' + address : location.pathname + location.search);
}
function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  only = state.has('row') && data.rows.some(row => String(row.row) === state.get('row')) ? +state.get('row') : null;
  for (const [name, text] of state) {
    const field = form.elements[name];
    if (field && name !== 'masks') field.value = text;
    if (!field || field.tagName !== 'SELECT' || field.selectedIndex >= 0) continue;
    field.value = [...field.options].find(option => option.defaultSelected).value;
  }
}
let wait = 0;
form.addEventListener('input', event => {
  if (event.target.name === 'masks') { document.body.classList.toggle('plain', !event.target.checked); return; }
  only = null;
  clearTimeout(wait);
  wait = setTimeout(() => { choose(); remember(); }, event.target.name === 'text' ? 150 : 0);
});
form.addEventListener('submit', event => event.preventDefault());
form.addEventListener('reset', () => setTimeout(() => {
  only = null;
  document.body.classList.remove('plain');
  choose();
  remember();
}));
more.firstChild.addEventListener('click', grow);
new IntersectionObserver(entries => { if (entries.some(entry => entry.isIntersecting) && !more.hidden) grow(); },
  {rootMargin: '600px'}).observe(more);
for (const link of document.querySelectorAll('a.show')) link.addEventListener('click', event => {
  event.preventDefault();
  form.reset();
  for (const name of ['run', 'beside']) {
    const field = form.elements[name];
    if (field && [...field.options].some(o => o.value === link.dataset[name])) field.value = link.dataset[name];
  }
  setTimeout(() => {
    only = +link.hash.replace('#row=', '');
    choose();
    remember();
    form.scrollIntoView();
    const first = box.querySelector('article');
    if (first) first.focus({preventScroll: true});
  }, 10);
});
document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || large.open) return;
  if (event.target.closest('input, select, textarea')) {
    if (event.key === 'Escape') event.target.blur();
    return;
  }
  const cards = [...box.querySelectorAll('article')], here = cards.indexOf(document.activeElement.closest('article'));
  if (event.key === 'j' || event.key === 'k') {
    const next = cards[Math.max(0, here + (event.key === 'j' ? 1 : -1))];
    if (next) { next.focus({preventScroll: true}); next.scrollIntoView({block: 'start'}); }
  } else if (event.key === '/') form.elements.text.focus();
  else if (event.key === 'm') form.elements.masks.click();
  else if (event.key === 'p' && here >= 0) {
    const player = cards[here].querySelector('audio');
    if (player) player.paused ? player.play() : player.pause();
  } else return;
  event.preventDefault();
});
addEventListener('hashchange', () => { recall(); choose(); });
recall();
choose();
