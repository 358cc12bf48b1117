'use strict';
const $ = id => document.getElementById(id);
const json = id => { const one = $(id); return one ? JSON.parse(one.textContent) : null; };
const styles = new Map();
const css = name => styles.get(name) ?? (styles.set(name, getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()), styles.get(name));
const make = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
const number = x => x === null || x === undefined ? '–' : Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(4));
const seconds = s => s === 0 ? '0 s' : s >= 7200 ? (s / 3600).toFixed(1) + ' h' : s >= 120 ? (s / 60).toFixed(1) + ' min' : s >= 1 ? s.toPrecision(3) + ' s' : (s * 1e3).toPrecision(3) + ' ms';
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const KEY = ['objective/scores', 'reward', 'objective/scores_std', 'reward_std', 'objective/kl', 'kl', 'completions/mean_length',
  'completions/max_length', 'completions/clipped_ratio', 'val/sampler_logprob_diff', 'critic/explained_variance', 'grad_norm',
  'grad_norm/actor', 'grad_norm/critic', 'policy/entropy_avg', 'entropy', 'tokens_per_s/total', 'time/total'];
const COLOURS = {generate: 'generate', transfer: 'transfer', infer: 'infer', train: 'train', optimizer: 'optimizer', weights: 'weights'};
const PHASES = {rollout: 'generate', generation: 'generate', inference: 'infer', logprobs: 'infer', reward: 'reward', training: 'train', weights: 'weights'};
let run = json('run'), chosen = run.updates.length - 1, step = 0, view = null;
const colourOf = letter => css(COLOURS[run.busy[letter]] || 'busy');

// Tooltips: every drawing keeps what it has drawn, and finds what is under the pointer.
const tip = $('tip');
function hover(canvas, find) {
  const show = (x, y) => {
    const box = canvas.getBoundingClientRect(), text = find(x - box.left, y - box.top);
    tip.style.display = text ? 'block' : 'none';
    if (!text) return;
    tip.textContent = text;
    tip.style.left = clamp(x + 14, 4, innerWidth - tip.offsetWidth - 4) + 'px';
    tip.style.top = clamp(y + 16, 4, innerHeight - tip.offsetHeight - 4) + 'px';
  };
  canvas.onmousemove = e => show(e.clientX, e.clientY);
  canvas.onmouseleave = () => { tip.style.display = 'none'; };
}
function sized(canvas, height) {
  const width = canvas.parentElement.clientWidth || 600, ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); canvas.style.height = height + 'px';
  const pen = canvas.getContext('2d');
  pen.scale(ratio, ratio); pen.font = '12px sans-serif'; pen.textBaseline = 'middle';
  pen.fillStyle = css('paper'); pen.fillRect(0, 0, width, height);
  return [pen, width];
}
function legend(id, entries) {
  $(id).replaceChildren(...entries.map(([name, colour]) => {
    const key = make('span', undefined, 'key'), box = make('i');
    box.style.background = colour; key.append(box, name); return key;
  }));
}

// Curves
function curve(name) {
  const values = run.metrics[name], known = values.filter(x => x !== null), [unit, meaning, healthy] = run.words[name];
  const card = make('div', undefined, 'curve'), last = known[known.length - 1];
  const head = make('header');
  head.append(make('b', name), make('span', number(last) + (unit && unit !== 'share' ? ' ' + unit : '')));
  card.append(head, make('small', meaning + (healthy ? '. Healthy: ' + healthy : '')));
  const low = Math.min(...known), high = Math.max(...known), span = high - low || 1, n = Math.max(1, values.length - 1);
  const stride = Math.max(1, Math.floor(values.length / 600));
  let path = '', pen = 'M';
  values.forEach((x, i) => {
    if (x === null) { pen = 'M'; return; }
    if (i % stride && i !== values.length - 1) return;
    path += pen + (100 * i / n).toFixed(2) + ' ' + (60 - 56 * (x - low) / span).toFixed(2); pen = 'L';
  });
  if (known.length === 1) path += 'h2';
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', '0 0 100 64'); svg.setAttribute('preserveAspectRatio', 'none'); svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', `${name} from ${number(known[0])} to ${number(last)}, between ${number(low)} and ${number(high)}`);
  const line = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  line.setAttribute('d', path); svg.append(line); card.append(svg);
  card.append(make('small', `${number(low)} to ${number(high)}`));
  card.onclick = e => { const box = svg.getBoundingClientRect(); choose(Math.round(n * clamp((e.clientX - box.left) / box.width, 0, 1))); };
  return card;
}
function curves() {
  const names = Object.keys(run.metrics), first = KEY.filter(name => names.includes(name));
  $('curves').replaceChildren(...first.map(curve));
  const rest = $('rest');
  rest.replaceChildren();
  $('all').ontoggle = () => { if ($('all').open && !rest.children.length) rest.append(...names.filter(name => !first.includes(name)).map(curve)); };
}

// The first update of several starts the models: figures of a run leave it out, and its bar is cut.
const afterFirst = values => values.length > 1 ? values.slice(1) : values;

// Where the time went: a bar per update
function phaseBars() {
  const canvas = $('phases'), height = 150, [pen, width] = sized(canvas, height), n = run.updates.length;
  const longest = Math.max(...afterFirst(run.end.map((e, i) => e - run.start[i]))), w = width / n, top = 8;
  for (let i = 0; i < n; i++) {
    let y = height;
    const total = run.end[i] - run.start[i];
    const sums = new Map();
    for (const [name, a, b] of run.phases[i]) sums.set(name, (sums.get(name) || 0) + b - a);
    let left = total;
    for (const [name, s] of sums) {
      const h = (height - top) * s / longest; left -= s;
      pen.fillStyle = css(PHASES[name] || 'busy'); pen.fillRect(i * w, y - h, Math.max(1, w - (w > 4 ? 1 : 0)), h); y -= h;
    }
    if (left > 0) { const h = (height - top) * left / longest; pen.fillStyle = css('busy'); pen.fillRect(i * w, y - h, Math.max(1, w - (w > 4 ? 1 : 0)), h); }
    if (i === chosen) { pen.strokeStyle = css('ink'); pen.lineWidth = 2; pen.strokeRect(i * w + 1, 1, Math.max(3, w - 2), height - 2); }
  }
  const at = x => clamp(Math.floor(x / w), 0, n - 1);
  hover(canvas, x => { const i = at(x); return `update ${run.updates[i]}: ${seconds(run.end[i] - run.start[i])}\n` + run.phases[i].map(([name, a, b]) => `${name} ${seconds(b - a)}`).join('\n'); });
  canvas.onclick = e => choose(at(e.clientX - canvas.getBoundingClientRect().left));
  const names = [...new Set(run.phases.flat().map(p => p[0]))];
  legend('phase-key', [...names.map(name => [name, css(PHASES[name] || 'busy')]), ['rest', css('busy')]]);
}

const ORDER = ['G', 'X', 'I', 'T', 'O', 'W', 'B'];  // of what is stacked where updates are narrow

// Devices on one clock. Pauses between updates, as of a run that was resumed later, are cut to a sliver.
let clock = [], counts = new Uint8Array();
function makeClock() {
  const mean = run.updates.reduce((s, _, i) => s + run.end[i] - run.start[i], 0) / run.updates.length;
  let at = 0;
  clock = run.updates.map((_, i) => {
    if (i) at += clamp(run.start[i] - run.end[i - 1], 0, mean / 20);
    const begin = at; at += run.end[i] - run.start[i]; return [begin, at];
  });
  const n = ORDER.length, places = new Map(ORDER.map((letter, k) => [letter.charCodeAt(0), k]));
  counts = new Uint8Array(run.updates.length * run.devices.length * n);
  run.strips.forEach((strips, i) => strips.forEach((strip, d) => {
    const at = (i * run.devices.length + d) * n;
    for (let c = 0; c < strip.length; c++) { const k = places.get(strip.charCodeAt(c)); if (k !== undefined) counts[at + k]++; }
  }));
}
const whole = () => clock[clock.length - 1][1] || 1;
function updateAt(t) {
  let low = 0, high = clock.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (clock[middle][0] <= t) low = middle; else high = middle - 1; }
  return low;
}
function devices() {
  const canvas = $('devices'), rows = run.devices.length, row = clamp(Math.floor(420 / rows), 6, 34), margin = Math.min(90, 14 + 7 * Math.max(...run.devices.map(d => d.length)));
  const height = rows * row + 22, [pen, width] = sized(canvas, height), plot = width - margin;
  view = view || [0, whole()];
  const [from, to] = view, scale = plot / (to - from), colours = {};
  for (const letter of ORDER) colours[letter] = colourOf(letter);
  pen.fillStyle = css('space'); for (let d = 0; d < rows; d++) pen.fillRect(margin, d * row, plot, row - 1);
  pen.save(); pen.beginPath(); pen.rect(margin, 0, plot, height); pen.clip();
  const first = updateAt(from), last = updateAt(to);
  if (plot / (last - first + 1) < 6) far(pen, margin, Math.max(1, Math.floor(plot)), rows, row);
  else for (let i = first; i <= last; i++) {
    const x0 = margin + (clock[i][0] - from) * scale, x1 = margin + (clock[i][1] - from) * scale;
    for (let d = 0; d < rows; d++) {
      const strip = run.strips[i][d], cell = (x1 - x0) / strip.length;
      for (let c = 0; c < strip.length;) {
        let e = c + 1; while (e < strip.length && strip[e] === strip[c]) e++;
        if (colours[strip[c]]) { pen.fillStyle = colours[strip[c]]; pen.fillRect(x0 + c * cell, d * row, (e - c) * cell + .4, row - 1); }
        c = e;
      }
    }
  }
  const a = margin + (clock[chosen][0] - from) * scale, b = margin + (clock[chosen][1] - from) * scale;
  pen.strokeStyle = css('ink'); pen.lineWidth = 2; pen.strokeRect(a, 1, Math.max(2, b - a), rows * row - 2);
  pen.restore();
  pen.fillStyle = css('ink');
  if (row >= 11) run.devices.forEach((name, d) => pen.fillText(name, 4, d * row + row / 2, margin - 8));
  else { pen.fillText(run.devices[0], 4, 8, margin - 8); pen.fillText(run.devices[rows - 1], 4, rows * row - 8, margin - 8); }
  pen.fillStyle = css('muted');
  for (let k = 0; k <= 4; k++) { const t = from + k * (to - from) / 4; pen.textAlign = k === 0 ? 'left' : k === 4 ? 'right' : 'center'; pen.fillText(seconds(t), margin + plot * k / 4, rows * row + 12); }
  pen.textAlign = 'left';
  const time = x => from + (x - margin) / scale;
  hover(canvas, (x, y) => {
    const d = Math.floor(y / row); if (x < margin || d >= rows) return '';
    const i = updateAt(time(x)), strip = run.strips[i][d], share = (time(x) - clock[i][0]) / (clock[i][1] - clock[i][0]);
    const letter = strip[clamp(Math.floor(share * strip.length), 0, strip.length - 1)];
    const what = run.busy[letter] || (run.idle[letter] ? `idle, ${run.idle[letter][0]}: ${run.idle[letter][1]}` : 'busy');
    return `${run.devices[d]}, update ${run.updates[i]}\n${what}`;
  });
  canvas.onpointerdown = e => { drag = [e.clientX, ...view]; moved = false; };
  onpointerup = () => { drag = null; };
  canvas.onpointermove = e => {
    if (!drag) return;
    const by = (drag[0] - e.clientX) / plot * (drag[2] - drag[1]);
    if (Math.abs(e.clientX - drag[0]) > 3) moved = true;
    if (moved) look(drag[1] + by, drag[2] + by);
  };
  canvas.onclick = e => { const x = e.clientX - canvas.getBoundingClientRect().left; if (!moved && x >= margin) choose(updateAt(time(x))); };
  canvas.onwheel = e => { if (!e.ctrlKey && !e.metaKey) return; e.preventDefault(); zoom(e.deltaY > 0 ? 1.25 : .8, time(e.clientX - canvas.getBoundingClientRect().left)); };
}
// Where updates are narrow: in every column of pixels, what share of its updates each device spent on what.
function far(pen, margin, width, rows, row) {
  const n = ORDER.length, image = new ImageData(width, rows * row), pixels = new Uint32Array(image.data.buffer), [from, to] = view;
  const pixel = hex => { const x = parseInt(hex.slice(1), 16); return (0xff000000 | (x & 255) << 16 | (x >> 8 & 255) << 8 | x >> 16) >>> 0; };
  const paints = ORDER.map(letter => pixel(colourOf(letter))), space = pixel(css('space')), paper = pixel(css('paper'));
  let i = updateAt(from);
  for (let x = 0; x < width; x++) {
    const end = updateAt(from + (to - from) * (x + 1) / width), all = (end - i + 1) * run.cells;
    for (let d = 0; d < rows; d++) {
      let y = (d + 1) * row - 1, sum = 0;
      pixels[y * width + x] = paper;
      for (let k = 0; k < n; k++) {
        for (let u = i; u <= end; u++) sum += counts[(u * rows + d) * n + k];
        const top = (d + 1) * row - 1 - Math.round((row - 1) * sum / all);
        while (y > top) { y--; pixels[y * width + x] = paints[k]; }
      }
      while (y > d * row) { y--; pixels[y * width + x] = space; }
    }
    i = end;
  }
  const drawn = document.createElement('canvas');
  drawn.width = width; drawn.height = rows * row;
  drawn.getContext('2d').putImageData(image, 0, 0);
  pen.imageSmoothingEnabled = false; pen.drawImage(drawn, margin, 0);
}
let waiting = false, drag = null, moved = false;
function look(from, to) {
  const span = clamp(to - from, whole() / 1e5, whole());
  from = clamp(from, 0, whole() - span); view = [from, from + span];
  if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; devices(); }); }
}
function zoom(by, at) { const [a, b] = view; at = at === undefined ? (a + b) / 2 : at; look(at - (at - a) * by, at + (b - at) * by); }

// Idle time by cause
function causes() {
  const rows = Object.values(run.idle).map(([cause, meaning]) => [cause, meaning, run.metrics['idle_cause/' + cause]]).filter(r => r[2]);
  const mean = values => { const last = afterFirst(values).slice(-50); return last.reduce((s, x) => s + (x || 0), 0) / last.length; };
  rows.sort((a, b) => mean(b[2]) - mean(a[2]));
  $('causes').replaceChildren(...rows.map(([cause, meaning, values]) => {
    const tr = make('tr'); tr.append(make('td', cause.replace('_', '-')), make('td', (100 * mean(values)).toFixed(1) + ' %', 'n'), make('td', meaning)); return tr;
  }));
}

// One update
const cache = new Map();
const served = !!document.body.dataset.served;  // then details are asked for
async function detailsOf(update) {
  if (!run.detailed.includes(update)) return null;
  if (!cache.has(update)) {
    const inPage = json('update-' + update);
    const answer = !inPage && served ? await fetch(`details/${update}.json`) : null;
    cache.set(update, inPage || (answer && answer.ok ? await answer.json() : null));
  }
  return cache.get(update);
}
async function choose(i) {
  chosen = clamp(i, 0, run.updates.length - 1); step = 0;
  const update = run.updates[chosen];
  $('number').textContent = `Update ${update}`;
  $('about').textContent = `${seconds(run.end[chosen] - run.start[chosen])}, ` + run.phases[chosen].map(([name, a, b]) => `${name} ${seconds(b - a)}`).join(', ');
  phaseBars(); devices();
  const found = await detailsOf(update);
  if (run.updates[chosen] === update) detail(found);
}
function detail(found) {
  $('detail').hidden = !found;
  $('no-detail').hidden = !!found;
  if (!found) { $('no-detail').textContent = run.detailed.length ? `This page has no trace of update ${run.updates[chosen]}. It has those of ${run.detailed.join(', ')}.` : 'No traces are kept: set trace_steps and trace_limit.'; return; }
  $('notes').replaceChildren(...found.notes.map(text => make('p', text, 'muted')));
  $('rollouts').hidden = !found.rollout;
  if (found.rollout) {
    const end = Math.max(found.rollout.makespan, found.simulated ? found.simulated.makespan : 0);
    rollout('rollout', found.rollout, found.devices, end);
    $('rollout-words').textContent = said(found.rollout, 'As it was');
    $('simulated-box').hidden = !found.simulated;
    if (found.simulated) { rollout('simulated', found.simulated, found.devices, end); $('simulated-words').textContent = said(found.simulated, `As the simulator has it under policy ${found.policy}, by the costs of this update`); }
    legend('rollout-key', [['sample generates', css('generate')], ['sample that is migrated', css('moved')], ['inference', css('infer')]]);
  }
  $('training').hidden = !found.steps.length;
  if (found.steps.length) {
    $('step').replaceChildren(...found.steps.map((_, k) => { const o = make('option', `step ${k + 1} of ${found.steps.length}`); o.value = k; return o; }));
    $('step').value = step; $('step').onchange = () => { step = +$('step').value; training(found.steps[step]); };
    training(found.steps[step]);
  }
}
const said = (r, how) => `${how}: ${seconds(r.makespan)}, of these ${seconds(r.generation)} of generation; ${(100 * r.idle).toFixed(1)} % idle, ${r.migrations} migrations.`;
function rollout(id, r, names, end) {
  const canvas = $(id), rows = names.length, row = clamp(Math.min(r.lanes * 5, 900 / rows), 16, 90), margin = 76;
  const [pen, width] = sized(canvas, rows * row + 20), scale = (width - margin) / end, lane = (row - 4) / r.lanes;
  pen.fillStyle = css('space'); for (let d = 0; d < rows; d++) pen.fillRect(margin, d * row + 1, width - margin, row - 2);
  const place = new Map();
  for (const b of r.bars) {
    const x = margin + b[2] * scale, w = Math.max(.6, (b[3] - b[2]) * scale), y = b[0] * row + 2 + b[1] * lane;
    pen.fillStyle = css(b[7] ? 'moved' : 'generate'); pen.fillRect(x, y, w, Math.max(.7, lane - (lane > 3 ? 1 : .2)));
    if (b[7]) { if (!place.has(b[4])) place.set(b[4], []); place.get(b[4]).push([x, x + w, y + lane / 2]); }
  }
  pen.globalAlpha = .85; pen.fillStyle = css('infer'); for (const [d, a, b] of r.infer) pen.fillRect(margin + a * scale, d * row + 2, Math.max(1, (b - a) * scale), row - 4);
  pen.globalAlpha = 1; pen.strokeStyle = css('ink'); pen.lineWidth = .8;
  for (const stays of place.values()) { stays.sort((a, b) => a[0] - b[0]); for (let k = 1; k < stays.length; k++) { pen.beginPath(); pen.moveTo(stays[k - 1][1], stays[k - 1][2]); pen.lineTo(stays[k][0], stays[k][2]); pen.stroke(); } }
  pen.fillStyle = css('ink'); names.forEach((name, d) => { if (row >= 12 || d % 4 === 0) pen.fillText(name, 4, d * row + row / 2, margin - 8); });
  pen.fillStyle = css('muted'); pen.fillText('0', margin, rows * row + 10); pen.textAlign = 'right'; pen.fillText(seconds(end), width - 2, rows * row + 10); pen.textAlign = 'left';
  hover(canvas, (x, y) => {
    const d = Math.floor(y / row), t = (x - margin) / scale, l = Math.floor((y - d * row - 2) / lane);
    const bar = r.bars.find(b => b[0] === d && b[1] === l && b[2] <= t && t <= b[3]);
    const job = r.infer.find(j => j[0] === d && j[1] <= t && t <= j[2]);
    if (job) return `inference on ${names[d]}\n${seconds(job[1])} to ${seconds(job[2])}`;
    return bar ? `sample ${bar[4]} on ${names[d]}\n${seconds(bar[2])} to ${seconds(bar[3])}\n${bar[5]} tokens after a prompt of ${bar[6]}${bar[7] ? '\nmigrated' : ''}` : '';
  });
}
function training(s) {
  const canvas = $('steps'), rows = s.ranks, half = s.planned ? 2 : 1, row = clamp(640 / rows, 10, 27) * half, margin = 76;
  const end = Math.max(s.executed[0], s.planned ? s.planned[0] : 0), [pen, width] = sized(canvas, rows * row + 20), scale = (width - margin) / end, lane = row / half;
  for (let d = 0; d < rows; d++) for (let k = 0; k < half; k++) { pen.fillStyle = css('space'); pen.fillRect(margin, d * row + k * lane + 1, width - margin, lane - 2); }
  const box = (o, a, b, k, alpha) => {
    const x = margin + a * scale, w = Math.max(.7, (b - a) * scale), y = o[0] * row + k * lane + 1;
    pen.globalAlpha = alpha; pen.fillStyle = run.looks[o[2] % run.looks.length][o[1]]; pen.fillRect(x, y, w, lane - 2);
    if (w > 16 && lane > 11) { pen.globalAlpha = 1; pen.fillStyle = o[1] === 'B' || o[1] === 'I' ? '#fff' : '#1f2430'; pen.fillText(o[4], x + 3, y + lane / 2 - 1); }
  };
  for (const o of s.ops) { if (s.planned) box(o, o[7], o[8], 0, .55); box(o, o[5], o[6], half - 1, 1); }
  pen.globalAlpha = 1; pen.fillStyle = css('ink');
  for (let d = 0; d < rows; d++) if (row >= 12 || d % 4 === 0) pen.fillText('rank ' + d, 4, d * row + row / 2, margin - 8);
  pen.fillStyle = css('muted'); pen.textAlign = 'right'; pen.fillText(seconds(end), width - 2, rows * row + 10); pen.textAlign = 'left';
  const words = ['executed', 'planned'].filter(k => s[k]).map(k => `${k} ${seconds(s[k][0])}, ${(100 * s[k][1]).toFixed(1)} % idle`);
  $('step-words').textContent = (s.planned ? 'The plan above, what was executed below it, of every rank: ' : 'As executed; there was no plan: ') + words.join('; ') + '.';
  const kinds = {F: 'forward', B: 'backward', I: 'input gradient', W: 'weight gradient'}, used = new Set(s.ops.map(o => o[2] + o[1]));
  legend('step-key', s.pipelines.flatMap((name, p) => Object.keys(kinds).filter(k => used.has(p + k)).map(k => [`${name} ${kinds[k]}`, run.looks[p % run.looks.length][k]])));
  hover(canvas, (x, y) => {
    const d = Math.floor(y / row), planned = s.planned && (y - d * row) < lane, t = (x - margin) / scale;
    const o = s.ops.find(o => o[0] === d && (planned ? o[7] <= t && t <= o[8] : o[5] <= t && t <= o[6]));
    if (!o) return '';
    return `${s.pipelines[o[2]]} ${kinds[o[1]]}, stage ${o[3]}, micro-batch ${o[4]}\n${planned ? 'planned' : 'executed'} ${seconds(planned ? o[7] : o[5])} to ${seconds(planned ? o[8] : o[6])}`;
  });
}

// The page
function draw() {
  $('title').textContent = run.title;
  $('summary').textContent = `${run.updates.length} updates on ${run.devices.length} devices, ${seconds(whole())} in all; the latest took ${seconds(run.end[run.end.length - 1] - run.start[run.start.length - 1])}.`;
  $('alarms').replaceChildren(...(run.alarms.length ? run.alarms.map(text => make('div', text, 'alarm')) : [make('p', 'No alarms.', 'muted')]));
  $('advice').replaceChildren(...run.advice.map(text => make('li', text)));
  legend('device-key', [...ORDER.filter(l => run.busy[l]).map(l => [run.busy[l], colourOf(l)]), ['idle', css('space')]]);
  curves(); causes(); choose(chosen);
}
$('before').onclick = () => choose(chosen - 1);
$('after').onclick = () => choose(chosen + 1);
$('in').onclick = () => zoom(.5, (clock[chosen][0] + clock[chosen][1]) / 2);
$('out').onclick = () => zoom(2);
$('fit').onclick = () => look(0, whole());
onkeydown = e => {
  if (e.target.matches('select, input, textarea') || e.ctrlKey || e.metaKey || e.altKey) return;
  const keys = {ArrowLeft: () => choose(chosen - 1), ArrowRight: () => choose(chosen + 1), Home: () => choose(0), End: () => choose(run.updates.length - 1),
    '+': () => $('in').click(), '-': () => $('out').click(), '0': () => $('fit').click()};
  if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
};
let resize;
onresize = () => { clearTimeout(resize); resize = setTimeout(() => choose(chosen), 120); };
matchMedia('(prefers-color-scheme: dark)').onchange = () => { styles.clear(); draw(); };
makeClock(); draw();
async function refresh() {
  try {
    const fresh = await (await fetch('run.json')).json();
    if (fresh.updates.length !== run.updates.length || fresh.began_s !== run.began_s) {
      const follows = chosen === run.updates.length - 1, all = view[0] === 0 && view[1] === whole();
      run = fresh; cache.clear(); makeClock(); if (all) view = null;
      if (follows) chosen = run.updates.length - 1;
      draw();
    }
    $('live').textContent = 'live';
  } catch { $('live').textContent = 'the server has ended; this is what it told last'; }
}
if (served) setInterval(refresh, 2000);
