'use strict';
const $ = id => document.getElementById(id), data = JSON.parse($('data').textContent);
const css = name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();

// A problem: pipelines, the second in the opposite direction. A form says how they are cut: stages of a rank (laps), whether
// the second lap turns back, whether backwards are in halves. Operations are [pipeline, stage, micro-batch, kind], kinds
// F, B, I and W; what follows is schedules/timing.py.
const WHOLE = {laps: 1, turns: false, halves: false};
function problemOf(s, form = WHOLE) {
  const ranks = [...Array(s.stages).keys()], lap = way => form.laps === 1 ? way : [...way, ...(form.turns ? way.slice().reverse() : way)];
  const model = (name, way) => ({name, ranks: lap(way), count: s.microBatches, f: s[name + 'Forward'] / form.laps, b: s[name + 'Backward'] / form.laps, held: s[name + 'Memory'] / form.laps});
  const pipelines = [model('actor', ranks)];
  if (s.models > 1) pipelines.push(model('critic', ranks.slice().reverse()));
  return {ranks: s.stages, pipelines, limit: s.limit || null};
}
const ticks = (problem, [p, , , kind]) => { const {f, b} = problem.pipelines[p]; return kind === 'F' ? f : kind === 'B' ? b : b / 2; };
const taken = (problem, [p, , , kind]) => kind === 'F' ? problem.pipelines[p].held : kind === 'I' ? 0 : -problem.pipelines[p].held;
const keyOf = (p, s, m, isForward) => ((p * 64 + s) * 256 + m) * 2 + (isForward ? 1 : 0);  // a B and an I are the same to others
function needsOf(problem, [p, s, m, kind]) {
  if (kind === 'F') return s ? [keyOf(p, s - 1, m, true)] : [];
  if (kind === 'W') return [keyOf(p, s, m, false)];
  const own = [keyOf(p, s, m, true)];
  return s < problem.pipelines[p].ranks.length - 1 ? [...own, keyOf(p, s + 1, m, false)] : own;
}

function evaluate(problem, orders) {
  const ends = new Map(), next = orders.map(() => 0), free = orders.map(() => 0), level = orders.map(() => 0), peak = orders.map(() => 0), busy = orders.map(() => 0);
  const times = orders.map(() => []);
  let moved = true;
  while (moved) {
    moved = false;
    orders.forEach((order, rank) => {
      while (next[rank] < order.length) {
        const op = order[next[rank]], needs = needsOf(problem, op);
        if (needs.some(key => !ends.has(key))) break;
        const start = Math.max(free[rank], ...needs.map(key => ends.get(key))), end = start + ticks(problem, op);
        if (op[3] !== 'W') ends.set(keyOf(op[0], op[1], op[2], op[3] === 'F'), end);
        free[rank] = end; busy[rank] += end - start; times[rank].push([start, end]);
        level[rank] += taken(problem, op); peak[rank] = Math.max(peak[rank], level[rank]); next[rank]++; moved = true;
      }
    });
  }
  const makespan = Math.max(0, ...free);
  return {times, makespan, peak, idle: makespan ? 1 - busy.reduce((a, b) => a + b, 0) / makespan / orders.length : 0};
}

// The greedy rule, for pipelines of one stage per rank and whole backwards: schedules/fused/greedy.py.
// Least ticks from the end of each operation to the makespan: earliest starts of the pipeline run backwards.
function tailsOf(pipeline) {
  const S = pipeline.ranks.length, M = pipeline.count, forward = pipeline.b, backward = pipeline.f;
  const F = [...Array(S)].map(() => Array(M).fill(0)), B = [...Array(S)].map(() => Array(M).fill(0));
  const atLeast = (row, gap) => { for (let m = 1; m < M; m++) row[m] = Math.max(row[m], row[m - 1] + gap); };
  for (let before = -1, sum = 0; before !== sum;) {
    before = sum;
    for (let s = 0; s < S; s++) { if (s) for (let m = 0; m < M; m++) F[s][m] = Math.max(F[s][m], F[s - 1][m] + forward); atLeast(F[s], forward); }
    for (let s = S - 1; s >= 0; s--) {
      let lead = -Infinity;
      for (let m = 0; m < M; m++) {
        B[s][m] = Math.max(B[s][m], s === S - 1 ? F[s][m] + forward : B[s + 1][m] + backward);
        lead = Math.max(lead, F[s][m] - m * (forward + backward));
        B[s][m] = Math.max(B[s][m], lead + m * (forward + backward) + forward);
      }
      atLeast(B[s], backward);
    }
    sum = [...F, ...B].flat().reduce((a, b) => a + b, 0);
  }
  return {forward: B.map(row => row.slice().reverse()), backward: F.map(row => row.slice().reverse())};
}

function construct(problem, admission) {
  const tails = problem.pipelines.map(tailsOf), next = new Map(), arrival = new Map(), orders = [...Array(problem.ranks)].map(() => []);
  const free = Array(problem.ranks).fill(0), held = Array(problem.ranks).fill(0), reserved = Array(problem.ranks).fill(0), limit = problem.limit;
  let left = 0;
  problem.pipelines.forEach((one, p) => { arrival.set(keyOf(p, 0, 0, true), 0); left += 2 * one.ranks.length * one.count; });
  const events = [0], push = time => { let i = events.length; while (i && events[i - 1] > time) i--; events.splice(i, 0, time); };
  const fits = (op, rank) => {
    if (limit === null || op[3] !== 'F') return true;
    const one = problem.pipelines[op[0]];
    if (!admission) return held[rank] + one.held <= limit;
    return op[1] > 0 || one.ranks.every(r => reserved[r] + one.held <= limit);
  };
  while (left) {
    if (!events.length) return null;
    const now = events.shift();
    while (events.length && events[0] === now) events.shift();
    for (let rank = 0; rank < problem.ranks; rank++) {
      if (free[rank] > now) continue;
      let best = null;
      problem.pipelines.forEach((one, p) => {
        const s = one.ranks.indexOf(rank);
        for (const f of [false, true]) {
          const m = next.get(keyOf(p, s, 0, f)) || 0, at = arrival.get(keyOf(p, s, m, f)), op = [p, s, m, f ? 'F' : 'B'];
          if (m >= one.count || at === undefined || at > now || !fits(op, rank)) continue;
          const rank_ = [f ? 1 : 0, -(f ? tails[p].forward : tails[p].backward)[s][m], p];
          if (!best || rank_[0] < best[0][0] || (rank_[0] === best[0][0] && (rank_[1] < best[0][1] || (rank_[1] === best[0][1] && rank_[2] < best[0][2])))) best = [rank_, op];
        }
      });
      if (!best) continue;
      const [p, s, m, kind] = best[1], f = kind === 'F', one = problem.pipelines[p], end = now + ticks(problem, best[1]), last = one.ranks.length - 1;
      orders[rank].push(best[1]); free[rank] = end; held[rank] += taken(problem, best[1]); next.set(keyOf(p, s, 0, f), m + 1); left--;
      if (s === 0) for (const r of one.ranks) reserved[r] += f ? one.held : -one.held;
      push(end);
      if (f && s === 0 && m + 1 < one.count) arrival.set(keyOf(p, 0, m + 1, true), end);
      const fed = f ? (s < last ? [s + 1, true] : [s, false]) : s ? [s - 1, false] : null;
      if (fed) { arrival.set(keyOf(p, fed[0], m, fed[1]), end); push(end); }
    }
  }
  return orders;
}
const greedy = problem => construct(problem, false) || construct(problem, true);

// Known orders: a number per operation, of its pipeline, stage, kind and micro-batch.
const known = codes => codes.map(row => row.map(code => [code >> 14, code >> 10 & 15, code & 255, 'FBIW'[code >> 8 & 3]]));
// All schedules for the sliders, by name: each of a problem of its form.
function schedules(s) {
  const whole = problemOf(s), all = {};
  for (const [name, form] of Object.entries(data.orders[`${whole.pipelines.length} ${s.stages} ${s.microBatches}`] || {}))
    all[name] = {problem: problemOf(s, form), orders: known(form.codes)};
  const planned = greedy(whole);
  if (planned) all.greedy = {problem: whole, orders: planned};
  return all;
}

// The page
const SLIDERS = [['models', 'models', 1, 2, 1, 2], ['stages', 'stages', ...data.stages, 2, 4], ['microBatches', 'micro-batches', ...data.microBatches, 4, 8],
  ['actorForward', 'actor: forward ticks', 1, 8, 1, 2], ['actorBackward', 'actor: backward ticks', 1, 16, 1, 4], ['actorMemory', 'actor: memory of a micro-batch', 0, 8, 1, 2],
  ['criticForward', 'critic: forward ticks', 1, 8, 1, 1], ['criticBackward', 'critic: backward ticks', 1, 16, 1, 2], ['criticMemory', 'critic: memory of a micro-batch', 0, 8, 1, 1],
  ['limit', 'memory limit, 0 for none', 0, 48, 1, 0]];
const settings = {};
for (const [name, text, low, high, by, value] of SLIDERS) {
  const label = document.createElement('label'), out = document.createElement('output'), input = document.createElement('input');
  Object.assign(input, {type: 'range', min: low, max: high, step: by, value, id: name});
  settings[name] = value; out.textContent = value; label.append(text, out, input); $('sliders').append(label);
  input.oninput = () => { settings[name] = +input.value; out.textContent = input.value; draw(); };
}
const chosen = {first: '1F1B', second: 'solved'};
for (const pane of ['first', 'second']) $(pane).onchange = () => { chosen[pane] = $(pane).value; draw(); };
function chart(canvas, problem, orders, timing, end) {
  const width = canvas.parentElement.clientWidth || 600, row = Math.max(16, Math.min(34, 300 / problem.ranks)), margin = 52, ratio = devicePixelRatio || 1, height = row * problem.ranks + 20;
  canvas.width = width * ratio; canvas.height = height * ratio; canvas.style.height = height + 'px';
  const pen = canvas.getContext('2d'), scale = (width - margin - 6) / end;
  pen.scale(ratio, ratio); pen.font = '12px sans-serif'; pen.textBaseline = 'middle'; pen.fillStyle = css('paper'); pen.fillRect(0, 0, width, height);
  orders.forEach((order, rank) => {
    pen.fillStyle = css('space'); pen.fillRect(margin, rank * row + 1, timing.makespan * scale, row - 2);
    pen.fillStyle = css('ink'); pen.fillText('rank ' + rank, 4, rank * row + row / 2);
    order.forEach((op, i) => {
      const [a, b] = timing.times[rank][i], x = margin + a * scale, w = Math.max(.6, (b - a) * scale - .6);
      pen.fillStyle = data.looks[op[0]][op[3]]; pen.fillRect(x, rank * row + 2, w, row - 4);
      if (w > 14) { pen.fillStyle = op[3] === 'F' ? '#1f2430' : '#ffffff'; pen.fillText(op[2], x + 3, rank * row + row / 2); }
    });
  });
  pen.fillStyle = css('muted'); pen.fillText('0', margin, row * problem.ranks + 10); pen.textAlign = 'right'; pen.fillText(`${end} ticks`, width - 6, row * problem.ranks + 10); pen.textAlign = 'left';
}
function draw() {
  const all = schedules(settings), names = Object.keys(all), timed = {}, limit = settings.limit;
  for (const name of names) timed[name] = evaluate(all[name].problem, all[name].orders);
  for (const pane of ['first', 'second']) {
    if (!names.includes(chosen[pane])) chosen[pane] = names[pane === 'first' ? 0 : names.length - 1];
    $(pane).replaceChildren(...names.map(name => { const o = document.createElement('option'); o.textContent = o.value = name; return o; }));
    $(pane).value = chosen[pane];
  }
  const end = Math.max(timed[chosen.first].makespan, timed[chosen.second].makespan), percent = x => (100 * x).toFixed(1) + ' %';
  const over = name => limit > 0 && Math.max(...timed[name].peak) > limit;
  for (const pane of ['first', 'second']) {
    const name = chosen[pane], t = timed[name];
    chart($(pane + '-chart'), all[name].problem, all[name].orders, t, end);
    const words = `${t.makespan} ticks, ${percent(t.idle)} idle, peak memory ${Math.max(...t.peak)}${over(name) ? ', over the limit' : ''}`;
    $(pane + '-words').textContent = words; $(pane + '-words').className = over(name) ? 'over' : ''; $(pane + '-chart').setAttribute('aria-label', `${name}: ${words}`);
  }
  const a = timed[chosen.first], b = timed[chosen.second], by = b.makespan - a.makespan;
  $('difference').textContent = `${chosen.second} takes ${by === 0 ? 'as long as' : `${Math.abs(by)} ticks ${by < 0 ? 'less' : 'more'} than`} ${chosen.first}` +
    (by ? ` (${(a.makespan / b.makespan).toFixed(3)} times as fast)` : '') + `, with ${Math.max(...b.peak) - Math.max(...a.peak)} more peak memory.` + (all.greedy ? '' : ' No schedule fits into this memory.');
  $('table').replaceChildren(...names.map(name => {
    const tr = document.createElement('tr'), t = timed[name];
    for (const text of [name, t.makespan, percent(t.idle), Math.max(...t.peak) + (over(name) ? ' (over the limit)' : ''), (a.makespan / t.makespan).toFixed(3) + 'x']) { const td = document.createElement('td'); td.textContent = text; tr.append(td); }
    return tr;
  }));
  const kinds = new Set(['first', 'second'].flatMap(pane => all[chosen[pane]].orders.flat().map(op => op[3])));
  const words = {F: 'forward', B: 'backward', I: 'input gradient', W: 'weight gradient'};
  $('keys').replaceChildren(...all[chosen.first].problem.pipelines.flatMap((one, p) => Object.keys(words).filter(kind => kinds.has(kind)).map(kind => {
    const key = document.createElement('span'), box = document.createElement('i'); key.className = 'key'; box.style.background = data.looks[p][kind]; key.append(box, `${one.name} ${words[kind]}`); return key;
  })));
}
onresize = draw;
matchMedia('(prefers-color-scheme: dark)').onchange = draw;
draw();
