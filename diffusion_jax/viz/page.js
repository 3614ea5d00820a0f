'use strict';

/* Four significant digits, thousands in groups. */
const shown = (value) => {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString('en-US');
  return size && size < 1e-4 ? value.toExponential(2) : String(+value.toPrecision(4));
};

/* One slider turns every set of frames below `root`: each shows its last one up to that step. */
const flip = (root) => {
  const input = root.querySelector('.turn input');
  if (!input) return;
  const sets = [...root.querySelectorAll('.frames')].map((set) => [...set.children]);
  const number = (image) => Number(image.dataset.step);
  const steps = [...new Set(sets.flat().map(number))].sort((a, b) => a - b);
  input.max = steps.length - 1;
  input.value = input.max;
  const turn = () => {
    const step = steps[input.value];
    for (const images of sets) {
      const known = images.filter((image) => number(image) <= step);
      const now = known.at(-1) ?? images[0];
      for (const image of images) image.classList.toggle('shown', image === now);
    }
    const text = `step ${step.toLocaleString('en-US')}`;
    input.setAttribute('aria-valuetext', text);
    root.querySelector('.turn output').textContent = text;
  };
  input.addEventListener('input', turn);
  root.querySelector('.turn').hidden = steps.length < 2;
  turn();
};

/* Values beside the pointer; with the keyboard a chart is a slider along its points. */
const hover = (frame) => {
  const data = JSON.parse(frame.dataset.plot);
  const points = data.lines.flatMap(({points}, line) =>
    points.map(([x, y, text]) => ({line, x, y, text})));
  if (!points.length) return;
  const place = (value, [low, high, isLog]) => {
    const f = isLog ? Math.log : (v) => v;
    return high === low ? 0.5 : (f(value) - f(low)) / (f(high) - f(low));
  };
  for (const point of points) {
    point.left = place(point.x, data.x);
    point.top = 1 - place(point.y, data.y);
  }
  const many = data.lines.length > 1;
  const name = (point) => data.lines[point.line].name;
  const stops = [];
  for (const point of data.apart ? points : points.sort((a, b) => a.x - b.x)) {
    if (!data.apart && stops.length && stops.at(-1)[0].x === point.x) stops.at(-1).push(point);
    else stops.push([point]);
  }
  const words = (at) => data.apart
    ? [many ? name(at[0]) : '', at[0].text ?? '', `${data.xlabel}: ${shown(at[0].x)}`,
       `${data.ylabel}: ${shown(at[0].y)}`].filter(Boolean).join('\n')
    : [`${data.xlabel} ${shown(at[0].x)}`,
       ...at.map((p) => (many ? `${name(p)}: ` : '') + shown(p.y))].join('\n');
  let marks = [];
  const clear = () => { marks.forEach((mark) => mark.remove()); marks = []; };
  const add = (kind, style, text = '') => {
    const mark = document.createElement('div');
    mark.className = kind;
    mark.textContent = text;
    Object.assign(mark.style, style);
    mark.setAttribute('aria-hidden', 'true');
    frame.append(mark);
    marks.push(mark);
  };
  const show = (number) => {
    clear();
    const at = stops[number], left = `${100 * at[0].left}%`;
    if (!data.apart) add('rule', {left});
    for (const p of at) add(`dot s${p.line % 6}`, {left: `${100 * p.left}%`, top: `${100 * p.top}%`});
    const side = at[0].left > 0.5 ? {right: `calc(${100 - 100 * at[0].left}% + .7rem)`}
                                  : {left: `calc(${left} + .7rem)`};
    add('tip', side, words(at));
    frame.setAttribute('aria-valuenow', number);
    frame.setAttribute('aria-valuetext', words(at).replaceAll('\n', ', '));
    current = number;
  };
  let current = stops.length - 1;
  frame.setAttribute('role', 'slider');
  frame.setAttribute('aria-valuemin', 0);
  frame.setAttribute('aria-valuemax', stops.length - 1);
  frame.setAttribute('aria-valuenow', current);
  frame.setAttribute('aria-valuetext', words(stops[current]).replaceAll('\n', ', '));
  frame.tabIndex = 0;
  frame.addEventListener('pointermove', (event) => {
    const box = frame.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const far = ([p]) => data.apart
      ? Math.hypot(p.left * box.width - x, p.top * box.height - y)
      : Math.abs(p.left * box.width - x);
    const away = stops.map(far);
    show(away.indexOf(Math.min(...away)));
  });
  frame.addEventListener('pointerleave', clear);
  frame.addEventListener('focus', () => frame.matches(':focus-visible') && show(current));
  frame.addEventListener('blur', clear);
  frame.addEventListener('keydown', (event) => {
    const last = stops.length - 1;
    const to = {ArrowRight: current + 1, ArrowUp: current + 1, ArrowLeft: current - 1,
                ArrowDown: current - 1, Home: 0, End: last,
                PageUp: current + 10, PageDown: current - 10}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(Math.min(last, Math.max(0, to)));
  });
};

const start = (root) => {
  for (const one of root.querySelectorAll('.flips')) flip(one);
  for (const frame of root.querySelectorAll('.frame[data-plot]')) hover(frame);
};

/* A page that is served asks for itself again, and takes over only the parts that have changed. */
const follow = (main) => {
  const word = document.getElementById('live');
  const parts = (root) => new Map(
    [...root.querySelectorAll('main section[id]')].map((one) => [one.id, one]));
  const texts = (some) => new Map([...some].map(([id, one]) => [id, one.outerHTML]));
  let tag = '', before = texts(parts(document));
  const replace = (text) => {
    const fresh = new DOMParser().parseFromString(text, 'text/html');
    const now = parts(document), next = parts(fresh), after = texts(next);
    document.title = fresh.title;
    if ([...now.keys()].join() !== [...next.keys()].join()) {
      main.replaceChildren(...fresh.querySelector('main').childNodes);
      start(main);
    } else {
      for (const [id, one] of next) if (after.get(id) !== before.get(id)) swap(now.get(id), one);
    }
    before = after;
  };
  const swap = (old, one) => {
    const opened = [...old.querySelectorAll('details')].map((each) => each.open);
    const slider = old.querySelector('.turn input');
    const back = slider && slider.max - slider.value ? slider.value : null;
    const focusable = (root) => [...root.querySelectorAll('a, summary, input, [tabindex], .frame')];
    const focus = focusable(old).indexOf(document.activeElement);
    old.replaceWith(one);
    start(one);
    one.querySelectorAll('details').forEach((each, i) => { each.open = opened[i] ?? each.open; });
    if (back !== null && one.querySelector('.turn input')) {
      one.querySelector('.turn input').value = back;
      one.querySelector('.turn input').dispatchEvent(new Event('input'));
    }
    if (focus >= 0) focusable(one)[focus]?.focus();
  };
  const say = (text) => { if (word.textContent !== text) word.textContent = text; };
  const ask = async () => {
    try {
      const answer = await fetch('/', {cache: 'no-store', headers: {'If-None-Match': tag}});
      if (answer.status === 200) { replace(await answer.text()); tag = answer.headers.get('ETag'); }
      say('Live: this page follows the run.');
    } catch {
      say('The server does not answer any more: this is the last that it has said.');
    }
    setTimeout(ask, 2000);
  };
  ask();
};

if (document.getElementById('live')) follow(document.querySelector('main'));
start(document);
