"use strict";
// ---- data: see page_data in trace_page.py

const data = JSON.parse(document.getElementById("data").textContent);
const { engine, totals, sequences, steps } = data;
const KIND = Object.fromEntries(data.kinds.map((kind, code) => [kind, code]));
const STATE = Object.fromEntries(data.states.map((state, code) => [state, code]));
const [BEGIN, LAUNCHED, LANDED, END, WAITING, RUNNING, PREFILL, BEGAN, ENDED, TAKEN_BACK] = steps.length ? steps[0].keys() : [];
const NAME = 0, PROMPT_TOKENS = 1, OUTPUT_TOKENS = 2, ADDED = 3, FINISHED = 4, REASON = 5, PROMPT = 6;
const KEYFRAME = 64; // steps between two copies of the state
const $ = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");
const name = (sequence) => sequences[sequence][NAME];

function duration(us) {
  if (us >= 1e6) return `${(us / 1e6).toFixed(2)} s`;
  return us >= 1e3 ? `${(us / 1e3).toFixed(us >= 1e5 ? 0 : 1)} ms` : `${Math.round(us)} µs`;
}

// Events by step, what they are told under, and the place in the stream where the step has been planned.
const eventsOf = steps.map(() => [[], [], []]);
const stream = [];
const plannedAt = [];
const stepsWith = Object.fromEntries(data.kinds.map((kind) => [kind, []]));
let numBlocks = 0;
for (const [phase, step, events] of data.segments) {
  for (const event of events) {
    stream.push(event);
    for (let i = 3; i < event.length; i++) if (event[i] >= numBlocks) numBlocks = event[i] + 1;
    const at = Math.max(0, step);
    if (!steps.length) continue;
    eventsOf[at][step < 0 ? 0 : phase].push(event);
    const known = stepsWith[data.kinds[event[0]]];
    if (known[known.length - 1] !== at) known.push(at);
  }
  if (phase === 0) plannedAt[step] = stream.length;
}

// ---- the books at a step: replayed from the nearest keyframe

function emptyBooks() {
  return {
    at: 0, // events taken in
    step: -1,
    tables: new Map(),
    holders: new Uint16Array(numBlocks),
    published: new Uint8Array(numBlocks),
    owner: new Int32Array(numBlocks).fill(-1), // who took the block last
    decoding: new Map(), // position of the row of each sequence that decodes
    state: new Int8Array(sequences.length).fill(-1), // of sequences that are there: queued, resident or preempted
    computed: new Int32Array(sequences.length),
  };
}

function copyBooks(books) {
  return {
    ...books,
    tables: new Map([...books.tables].map(([sequence, table]) => [sequence, table.slice()])),
    holders: books.holders.slice(), published: books.published.slice(), owner: books.owner.slice(),
    decoding: new Map(books.decoding), state: books.state.slice(), computed: books.computed.slice(),
  };
}

function applyEvent(books, event) {
  const [kind, sequence, value] = event;
  if (kind === KIND.shared || kind === KIND.allocated) {
    let table = books.tables.get(sequence);
    if (!table) books.tables.set(sequence, (table = []));
    for (let i = 3; i < event.length; i++) {
      books.holders[event[i]]++;
      if (kind === KIND.allocated || books.holders[event[i]] === 1) books.owner[event[i]] = sequence;
      table.push(event[i]);
    }
  } else if (kind === KIND.freed) {
    const table = books.tables.get(sequence) || [];
    books.tables.delete(sequence);
    for (const block of table) {
      books.holders[block]--;
      if (books.holders[block] && books.owner[block] === sequence) books.owner[block] = holdersOf(books, block)[0] ?? -1;
    }
  } else if (kind === KIND.published || kind === KIND.evicted || kind === KIND.forgotten) {
    for (let i = 3; i < event.length; i++) books.published[event[i]] = kind === KIND.published ? 1 : 0;
  } else if (kind === KIND.added) {
    books.state[sequence] = STATE.queued;
  } else if (kind === KIND.admitted) {
    books.state[sequence] = STATE.resident;
    books.computed[sequence] = value;
  } else if (kind === KIND.preempted) {
    books.state[sequence] = STATE.preempted;
    books.computed[sequence] = 0;
  } else if (kind === KIND.finished) {
    books.state[sequence] = -1;
  }
}

function applyRows(books, step) {
  const line = steps[step];
  for (const sequence of line[ENDED]) books.decoding.delete(sequence);
  for (const [sequence, position] of books.decoding) books.decoding.set(sequence, position + 1);
  for (let i = 0; i < line[BEGAN].length; i += 2) books.decoding.set(line[BEGAN][i], line[BEGAN][i + 1]);
  for (const [sequence, position] of books.decoding) books.computed[sequence] = position + 1;
  for (let i = 0; i < line[PREFILL].length; i += 4) {
    books.computed[line[PREFILL][i]] = line[PREFILL][i + 1] + line[PREFILL][i + 2];
  }
}

function advance(books) {
  const step = books.step + 1;
  for (; books.at < plannedAt[step]; books.at++) applyEvent(books, stream[books.at]);
  applyRows(books, step);
  books.step = step;
}

const keyframes = [];
const heldOf = new Int32Array(steps.length), cachedOf = new Int32Array(steps.length), decodeOf = new Int32Array(steps.length);
{
  const books = emptyBooks();
  let held = 0, cached = 0; // kept up incrementally: a sum over all blocks a step would be slow
  const before = { holders: new Uint16Array(numBlocks), published: new Uint8Array(numBlocks) };
  for (let step = 0; step < steps.length; step++) {
    const from = books.at;
    const touched = new Set();
    for (let at = from; at < plannedAt[step]; at++) {
      const event = stream[at];
      if (event[0] === KIND.freed) for (const block of books.tables.get(event[1]) || []) touched.add(block);
      else for (let i = 3; i < event.length; i++) touched.add(event[i]);
      applyEvent(books, event);
    }
    books.at = plannedAt[step];
    for (const block of touched) {
      held += (books.holders[block] > 0) - (before.holders[block] > 0);
      cached += (!books.holders[block] && books.published[block]) - (!before.holders[block] && before.published[block]);
      before.holders[block] = books.holders[block];
      before.published[block] = books.published[block];
    }
    applyRows(books, step);
    books.step = step;
    heldOf[step] = held;
    cachedOf[step] = cached;
    decodeOf[step] = books.decoding.size;
    if (step % KEYFRAME === 0) keyframes.push(copyBooks(books));
  }
}

let books = keyframes.length ? copyBooks(keyframes[0]) : emptyBooks();
function goTo(step) {
  if (step < books.step || step - books.step > KEYFRAME) books = copyBooks(keyframes[Math.floor(step / KEYFRAME)]);
  while (books.step < step) advance(books);
}

function holdersOf(at, block) {
  const found = [];
  for (const [sequence, table] of at.tables) if (table.includes(block)) found.push(sequence);
  return found;
}

// ---- drawing

let current = 0, selected = -1, blockCursor = -1, byTime = false, showAll = false, colors = {};
const GUTTER = 68, CHART = 40, CHARTS = 4; // pixels: labels left of the tracks; a chart; how many
const PAD = 5; // above the first request
let rowHeight = 14, cell = 16, cellColumns = 1, drawn = null;

function readColors() {
  const style = getComputedStyle(document.documentElement);
  const names = ["panel", "ink", "quiet", "line", "faint", "accent", "prefill", "decode", "wait", "preempt", "shared", "cached"];
  for (const key of [...names, "on-shared", "on-owner"]) colors[key] = style.getPropertyValue(`--${key}`).trim();
  colors.owners = [...Array(8).keys()].map((i) => style.getPropertyValue(`--owner-${i}`).trim());
}

/** A canvas of that size in CSS pixels, sharp on any screen. */
function prepare(canvas, width, height) {
  const scale = Math.min(window.devicePixelRatio || 1, 8192 / Math.max(width, height, 1));
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.clearRect(0, 0, width, height);
  context.font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  context.textBaseline = "middle";
  return context;
}

function endOf(step) { return steps[step][BEGIN] + Math.max(steps[step][LAUNCHED], steps[step][END]); }

/** Where a step begins on a track of that width; the number of steps is where the last one ends. */
function xOf(step, width) {
  const room = width - GUTTER;
  if (!byTime) return GUTTER + (room * step) / steps.length;
  const first = steps[0][BEGIN], last = endOf(steps.length - 1);
  const time = step < steps.length ? steps[step][BEGIN] : last;
  return GUTTER + (room * (time - first)) / Math.max(1, last - first);
}

function stepAt(x, width) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (xOf(middle, width) <= x) low = middle; else high = middle - 1;
  }
  return low;
}

function tokensOf(step) {
  let prefill = 0;
  for (let i = 2; i < steps[step][PREFILL].length; i += 4) prefill += steps[step][PREFILL][i];
  return prefill;
}

function drawCharts() {
  const canvas = $("charts"), width = canvas.parentElement.clientWidth, context = prepare(canvas, width, CHARTS * CHART + 6);
  const total = engine.num_blocks, shownBlocks = Math.max(1, Math.min(total, Math.max(...addUp(heldOf, cachedOf), 1)));
  const prefill = steps.map((_, step) => tokensOf(step));
  const charts = [
    ["KV blocks", [[heldOf, colors.decode, 1], [cachedOf, colors.cached, 0.45]], shownBlocks],
    ["prefill", [[prefill, colors.prefill, 1]], 0],
    ["decode", [[decodeOf, colors.decode, 1]], 0],
    ["waiting", [[steps.map((line) => line[WAITING]), colors.wait, 0.7]], 0],
  ];
  charts.forEach(([title, layers, known], place) => {
    const top = place * CHART + 4, bottom = top + CHART - 10;
    const most = known || Math.max(1, ...addUp(...layers.map(([values]) => values)));
    context.strokeStyle = colors.line;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(GUTTER, bottom + 0.5);
    context.lineTo(width, bottom + 0.5);
    context.stroke();
    const base = new Float64Array(steps.length);
    for (const [values, color, alpha] of layers) {
      context.fillStyle = color;
      context.globalAlpha = alpha;
      context.beginPath();
      for (let step = 0; step < steps.length; step++) {
        if (!values[step]) continue;
        const x = xOf(step, width), w = Math.max(1, xOf(step + 1, width) - x), unit = (bottom - top) / most;
        context.rect(x, bottom - (base[step] + values[step]) * unit, w, values[step] * unit);
        base[step] += values[step];
      }
      context.fill();
    }
    context.globalAlpha = 1;
    context.fillStyle = colors.quiet;
    context.textAlign = "left";
    context.fillText(title, 0, top + 6);
    context.fillText(`≤ ${count(most)}`, 0, top + 21);
  });
}

function addUp(...layers) {
  return Array.from(layers[0], (value, i) => layers.reduce((sum, layer) => sum + layer[i], 0));
}

/** A stretch of a request: told apart by height and texture as well as by colour. */
function drawSpan(context, state, x, y, width, height) {
  const middle = y + height / 2;
  if (state === STATE.prefill || state === STATE.decode) {
    const share = state === STATE.prefill ? 0.86 : 0.5, h = Math.max(1.5, height * share);
    context.fillStyle = state === STATE.prefill ? colors.prefill : colors.decode;
    context.fillRect(x, middle - h / 2, width, h);
    return;
  }
  if (state === STATE.resident) {
    context.fillStyle = colors.decode;
    context.fillRect(x, middle - 0.5, width, 1);
    return;
  }
  context.strokeStyle = state === STATE.preempted ? colors.preempt : colors.wait;
  context.lineWidth = state === STATE.preempted ? Math.min(2, height / 2) : 1;
  context.setLineDash(state === STATE.preempted ? [4, 2] : [1, 3]);
  context.beginPath();
  context.moveTo(x, Math.round(middle) + 0.5);
  context.lineTo(x + width, Math.round(middle) + 0.5);
  context.stroke();
  context.setLineDash([]);
  if (state === STATE.preempted) { // where it lost its blocks
    const h = Math.max(4, height);
    context.fillStyle = colors.preempt;
    context.fillRect(x - 1, middle - h / 2, 2, h);
  }
}

function drawTimeline() {
  const canvas = $("timeline"), width = $("scroll").clientWidth;
  rowHeight = Math.max(5, Math.min(16, Math.floor(420 / Math.max(1, sequences.length))));
  const context = prepare(canvas, width, PAD + Math.max(1, sequences.length) * rowHeight + 2);
  context.translate(0, PAD);
  const every = Math.ceil(13 / rowHeight);
  if (selected >= 0) {
    context.fillStyle = colors.faint;
    context.fillRect(0, selected * rowHeight, width, rowHeight);
  }
  context.textAlign = "right";
  for (let sequence = 0; sequence < sequences.length; sequence++) {
    if (sequence % every && sequence !== selected) continue;
    if (selected >= 0 && sequence !== selected && Math.abs(sequence - selected) < every) continue;
    context.fillStyle = sequence === selected ? colors.accent : colors.quiet;
    context.fillText(shorten(context, name(sequence), GUTTER - 14), GUTTER - 10, (sequence + 0.5) * rowHeight + 0.5);
  }
  // What lasts a step only must not be hidden under what comes next.
  const rank = [0, 3, 1, 2, 4];
  for (let turn = 0; turn < rank.length; turn++) {
    for (const [sequence, state, first, more] of data.spans) {
      if (rank[state] !== turn) continue;
      const x = xOf(first, width), end = xOf(first + more + 1, width);
      drawSpan(context, state, x, sequence * rowHeight, Math.max(1, end - x), rowHeight);
    }
  }
  context.fillStyle = colors.ink;
  for (const step of stepsWith.finished) {
    for (const phase of eventsOf[step]) {
      for (const event of phase) {
        if (event[0] !== KIND.finished) continue;
        const x = Math.min(width - 1.5, xOf(step + 1, width)), y = (event[1] + 0.5) * rowHeight, h = Math.max(3, rowHeight * 0.7);
        context.fillRect(x - 0.75, y - h / 2, 1.5, h);
      }
    }
  }
}

function shorten(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let end = text.length;
  while (end > 1 && context.measureText(`…${text.slice(-end)}`).width > room) end--;
  return `…${text.slice(-end)}`;
}

function drawCursor() {
  const width = $("scroll").clientWidth, x = xOf(current, width);
  $("cursor").style.transform = `translateX(${x}px)`;
  $("cursor").style.width = `${Math.max(1, xOf(current + 1, width) - x)}px`;
}

// ---- blocks

const FREE = 0, CACHED = 1, HELD = 2, SHARED = 3;
function kindOfBlock(block) {
  const holders = books.holders[block];
  return holders > 1 ? SHARED : holders ? HELD : books.published[block] ? CACHED : FREE;
}

function layOutBlocks() {
  const width = $("blocks").clientWidth, room = Math.max(1, numBlocks);
  cell = Math.max(6, Math.min(34, Math.floor(Math.sqrt((width * 300) / room))));
  cellColumns = Math.max(1, Math.floor(width / cell));
  drawn = { context: prepare($("blocks"), width, Math.ceil(room / cellColumns) * cell + 4), looks: new Float64Array(numBlocks).fill(-1) };
}

/** Draws the blocks that look different from what is there. */
function drawBlocks() {
  const fresh = new Uint8Array(numBlocks);
  for (const event of eventsOf[current][0]) {
    if (event[0] === KIND.allocated) for (let i = 3; i < event.length; i++) fresh[event[i]] = 1;
  }
  const own = new Uint8Array(numBlocks);
  for (const block of books.tables.get(selected) || []) own[block] = 1;
  for (let block = 0; block < numBlocks; block++) {
    const kind = kindOfBlock(block), flags = fresh[block] + 2 * own[block] + 4 * (block === blockCursor) + 8 * books.published[block];
    const look = flags + 16 * (kind + 4 * (kind === HELD ? books.owner[block] + 1 : kind === SHARED ? books.holders[block] : 0));
    if (drawn.looks[block] === look) continue;
    drawn.looks[block] = look;
    drawBlock(drawn.context, block, kind, fresh[block], own[block], block === blockCursor);
  }
}

function drawBlock(context, block, kind, isNew, isOwn, isCursor) {
  const x = (block % cellColumns) * cell + 1, y = Math.floor(block / cellColumns) * cell + 2, size = cell - 2;
  const label = kind === SHARED ? `×${books.holders[block]}` : kind === HELD ? name(books.owner[block]) : "";
  context.clearRect(x - 1, y - 1, cell, cell);
  drawCell(context, x, y, size, size, kind, books.owner[block], books.published[block]);
  if (label && size >= 16) {
    context.font = `${size >= 24 ? 11 : 9}px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif`;
    context.fillStyle = kind === SHARED ? colors["on-shared"] : colors["on-owner"];
    context.textAlign = "center";
    const text = size >= 24 ? shorten(context, label, size - 1) : label;
    if (context.measureText(text).width < size) context.fillText(text, x + size / 2, y + size / 2 + 0.5);
  }
  if (isNew || isOwn || isCursor) {
    const thick = size >= 12 ? 2 : 1;
    context.strokeStyle = isCursor || isOwn ? colors.accent : colors.ink;
    context.lineWidth = isCursor ? thick + 1 : thick;
    context.strokeRect(x + thick / 2 - 0.5, y + thick / 2 - 0.5, size - thick + 1, size - thick + 1);
  }
}

function drawCell(context, x, y, width, height, kind, owner, isPublished) {
  if (kind === FREE || kind === CACHED) {
    context.strokeStyle = kind === FREE ? colors.line : colors.cached;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
    if (kind === CACHED) {
      context.fillStyle = colors.cached;
      const gap = width >= 12 ? 5 : 3, dot = width >= 12 ? 1.5 : 1;
      for (let dy = gap / 2 + 1; dy < height - 1.5; dy += gap) {
        for (let dx = gap / 2 + 1; dx < width - 1.5; dx += gap) context.fillRect(x + dx, y + dy, dot, dot);
      }
    }
    return;
  }
  context.fillStyle = kind === SHARED ? colors.shared : colors.owners[Math.max(0, owner) % 8];
  context.fillRect(x, y, width, height);
  if (kind === SHARED && height >= 8) { // a second edge, as of one sheet upon another
    context.strokeStyle = colors["on-shared"];
    context.lineWidth = 1;
    context.strokeRect(x + 2, y + 2, width - 4, height - 4);
  }
  if (isPublished && kind === HELD && height >= 8) {
    context.fillStyle = colors["on-owner"];
    context.fillRect(x + 2, y + height - 3, width - 4, 1.5);
  }
}

function tellBlock(block) {
  if (block < 0 || block >= numBlocks) return "";
  const holders = holdersOf(books, block), kind = kindOfBlock(block);
  if (kind === FREE) return `Block ${block}: free.`;
  if (kind === CACHED) return `Block ${block}: held by nobody; cached, so that a prompt that begins alike can take it over.`;
  const who = holders.map((one) => `${name(one)} (its block ${books.tables.get(one).indexOf(block) + 1})`);
  const many = who.length > 8 ? `${who.slice(0, 8).join(", ")} and ${who.length - 8} more` : who.join(", ");
  return `Block ${block}: held by request ${many}${kind === SHARED ? ", shared" : ""}${books.published[block] ? "; in the prefix cache" : ""}.`;
}

// ---- text

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function list(items, most = 24) {
  return items.length > most ? `${items.slice(0, most).join(", ")} and ${items.length - most} more` : items.join(", ");
}

function ranges(numbers) {
  const parts = [];
  for (let i = 0; i < numbers.length; ) {
    let j = i;
    while (j + 1 < numbers.length && numbers[j + 1] === numbers[j] + 1) j++;
    parts.push(j > i + 1 ? `${numbers[i]}–${numbers[j]}` : numbers.slice(i, j + 1).join(", "));
    i = j + 1;
  }
  return parts.join(", ");
}

/** What happened in a phase, a line a kind. */
function tellEvents(events) {
  const lines = [];
  for (const kind of data.kinds) {
    const these = events.filter((event) => event[0] === KIND[kind]);
    if (!these.length || kind === "freed") continue;
    const whose = these.filter((event) => event[1] >= 0).map((event) => {
      const blocks = event.slice(3), which = blocks.length > 12 ? `${blocks.length} blocks` : ranges(blocks);
      if (kind === "admitted") return name(event[1]) + (event[2] ? ` (${event[2]} tokens cached)` : "");
      if (kind === "finished") return `${name(event[1])} (${event[2]})`;
      if (kind === "evicted") return which;
      return name(event[1]) + (blocks.length ? ` ${kind === "published" ? "→" : "←"} ${which}` : "");
    });
    lines.push([kind, whose.length ? list(whose, 16) : ranges(these.flatMap((event) => event.slice(3)))]);
  }
  return lines;
}

function showStep() {
  const line = steps[current], prefill = [], decode = [...books.decoding.keys()];
  for (let i = 0; i < line[PREFILL].length; i += 4) {
    const [sequence, start, length, samples] = line[PREFILL].slice(i, i + 4);
    prefill.push(`${name(sequence)}: ${start}–${start + length - 1}${samples ? "" : " …"}`);
  }
  $("step-title").textContent = `Step ${current}`;
  const times = line[END] < 0 ? (line[TAKEN_BACK] ? "taken back: it did not fit the device's memory" : "nobody waited for it")
    : `${duration(line[END])}: schedule ${duration(line[LAUNCHED])}, run ${duration(line[LANDED] - line[LAUNCHED])}, update ${duration(line[END] - line[LANDED])}`;
  const free = engine.num_blocks - heldOf[current] - cachedOf[current];
  const facts = [
    ["Time", times],
    ["Tokens", `${count(tokensOf(current))} prefill, ${count(decode.length)} decode`],
    ["Requests", `${line[RUNNING]} running, ${line[WAITING]} waiting`],
    ["KV blocks", `${count(heldOf[current])} held, ${count(cachedOf[current])} cached, ${count(free)} free`],
    ...(prefill.length ? [["Prefill", list(prefill, 12)]] : []),
    ...(decode.length ? [["Decode", list(decode.map(name), 40)]] : []),
  ];
  $("facts").replaceChildren(...facts.flatMap(([title, text]) => [element("dt", title), element("dd", text)]));
  const parts = [];
  ["Planned", "Results", "Afterwards"].forEach((title, phase) => {
    const lines = tellEvents(eventsOf[current][phase]);
    if (!lines.length) return;
    const entries = lines.map(([kind, text]) => {
      const entry = element("li", "", { class: kind });
      entry.append(element("span", kind), element("span", text));
      return entry;
    });
    const group = document.createElement("ul");
    group.append(...entries);
    parts.push(element("h3", title), group);
  });
  $("happened").replaceChildren(...parts);
}

function showTables() {
  const rows = [], most = showAll ? Infinity : 24, prefilling = new Set();
  const line = steps[current];
  for (let i = 0; i < line[PREFILL].length; i += 4) prefilling.add(line[PREFILL][i]);
  const residents = [...books.tables.keys()];
  if (selected >= 0 && books.tables.has(selected)) residents.sort((a, b) => (b === selected) - (a === selected));
  for (const sequence of residents.slice(0, most)) {
    const row = document.createElement("tr");
    row.setAttribute("aria-selected", String(sequence === selected));
    const button = element("button", name(sequence), { type: "button", "aria-label": `Select request ${name(sequence)}` });
    button.dataset.sequence = sequence;
    const who = document.createElement("td");
    who.append(button);
    const state = prefilling.has(sequence) ? "prefill" : books.decoding.has(sequence) ? "decode" : "resident";
    const blocks = document.createElement("td");
    const table = books.tables.get(sequence), shown = table.length > 48 ? table.slice(0, 48) : table;
    const shared = shown.filter((block) => books.holders[block] > 1), own = shown.filter((block) => books.holders[block] <= 1);
    if (shared.length) blocks.append(element("b", `${ranges(shared)} shared`), own.length ? " · " : "");
    blocks.append(ranges(own) + (shown.length < table.length ? ` and ${table.length - shown.length} more` : ""));
    row.append(who, element("td", state), element("td", count(books.computed[sequence]), { class: "number" }), blocks);
    rows.push(row);
  }
  if (!rows.length) rows.push(element("tr", ""));
  document.querySelector("#tables tbody").replaceChildren(...rows);
  $("all-tables").hidden = residents.length <= 24;
  $("all-tables").textContent = showAll ? "Show fewer" : `Show all ${residents.length}`;
}

function tellSelected() {
  if (selected < 0) {
    $("timeline-status").textContent = "Select a request with the arrow keys or a click to follow it.";
    return;
  }
  const seq = sequences[selected], cached = stream.find((event) => event[0] === KIND.admitted && event[1] === selected);
  const preemptions = stream.filter((event) => event[0] === KIND.preempted && event[1] === selected).length;
  const parts = [
    `Request ${seq[NAME]}: ${count(seq[PROMPT_TOKENS])} prompt tokens${cached && cached[2] ? `, ${cached[2]} from the prefix cache` : ""}`,
    `${count(seq[OUTPUT_TOKENS])} sampled`,
    preemptions ? `preempted ${preemptions === 1 ? "once" : `${preemptions} times`}` : "never preempted",
    seq[FINISHED] === null ? "not finished" : `ended (${seq[REASON]}) after ${duration(seq[FINISHED] - seq[ADDED])}`,
  ];
  $("timeline-status").textContent = parts.join("; ") + "." + (seq[PROMPT] ? ` “${seq[PROMPT].replace(/\s+/g, " ").trim()}”` : "");
}

// ---- moving

function show(step) {
  if (!steps.length) return;
  current = Math.max(0, Math.min(steps.length - 1, step));
  goTo(current);
  const slider = $("slider");
  slider.value = current;
  slider.setAttribute("aria-valuetext", `step ${current} of ${steps.length}`);
  $("position").textContent = `Step ${count(current)} of ${count(steps.length - 1)}`;
  $("first").disabled = $("back").disabled = current === 0;
  $("next").disabled = $("last").disabled = current === steps.length - 1;
  drawCursor();
  follow();
  drawBlocks();
  showStep();
  showTables();
  $("blocks-status").textContent = blockCursor >= 0 ? tellBlock(blockCursor) : legendOfBlocks();
}

/** Scrolls the timeline if none of the requests that run is in sight. */
function follow() {
  const box = $("scroll"), running = [...books.tables.keys()];
  if (!running.length || box.scrollHeight <= box.clientHeight) return;
  const top = Math.min(...running) * rowHeight + PAD, bottom = (Math.max(...running) + 1) * rowHeight + PAD;
  if (bottom < box.scrollTop + 2 * rowHeight || top > box.scrollTop + box.clientHeight - 2 * rowHeight) box.scrollTop = top - 40;
}

function legendOfBlocks() {
  const untouched = engine.num_blocks - numBlocks;
  const marks = cell >= 18 ? "A number is the request that holds the block, ×N how many share it." : "Point at a block, or go there with the arrow keys, to see whose it is.";
  return `${marks}${untouched > 0 ? ` ${count(untouched)} blocks were never used and are not drawn.` : ""}`;
}

function select(sequence) {
  selected = sequence;
  drawTimeline();
  tellSelected();
  if (sequence >= 0) {
    const box = $("scroll"), top = sequence * rowHeight + PAD;
    if (top < box.scrollTop || top + rowHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  }
  show(current);
}

function jump(direction) {
  const found = stepsWith[$("kind").value];
  const next = direction > 0 ? found.find((step) => step > current) : found.findLast((step) => step < current);
  if (next !== undefined) show(next);
}

let player = null;
function play() {
  const playing = player === null;
  if (playing) {
    if (current === steps.length - 1) show(0);
    const pause = Math.max(40, Math.min(250, 12000 / steps.length));
    player = setInterval(() => (current < steps.length - 1 ? show(current + 1) : play()), pause);
  } else {
    clearInterval(player);
    player = null;
  }
  $("play").textContent = playing ? "Pause" : "Play";
  $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
}

function layOut() {
  readColors();
  if (steps.length) {
    drawCharts();
    drawTimeline();
  }
  layOutBlocks();
  drawLegends();
  show(current);
}

function drawLegends() {
  const fill = (id, entries) => $(id).replaceChildren(...entries.map(([text, draw]) => {
    const item = document.createElement("li"), canvas = document.createElement("canvas");
    canvas.setAttribute("aria-hidden", "true");
    item.append(canvas, text);
    const scale = window.devicePixelRatio || 1, context = canvas.getContext("2d");
    canvas.width = 22 * scale;
    canvas.height = 14 * scale;
    context.scale(scale, scale);
    draw(context);
    return item;
  }));
  const span = (state) => (context) => drawSpan(context, STATE[state], 1, 0, 20, 14);
  fill("timeline-legend", [
    ["queued", span("queued")], ["prefill", span("prefill")], ["decode", span("decode")],
    ["resident, not in the step", span("resident")], ["preempted", span("preempted")],
    ["finished", (context) => { context.fillStyle = colors.ink; context.fillRect(10, 2, 1.5, 10); }],
  ]);
  const block = (kind, published) => (context) => drawCell(context, 4, 0, 14, 14, kind, 0, published);
  fill("blocks-legend", [
    ["held", block(HELD, 0)], ["held, in the prefix cache", block(HELD, 1)], ["shared", block(SHARED, 1)],
    ["cached, held by nobody", block(CACHED, 1)], ["free", block(FREE, 0)],
    ["new in this step", (context) => {
      drawCell(context, 4, 0, 14, 14, HELD, 0, 0);
      context.strokeStyle = colors.ink;
      context.lineWidth = 2;
      context.strokeRect(5, 1, 12, 12);
    }],
  ]);
}

function showTotals() {
  const share = totals.prompt_tokens ? Math.round((100 * totals.prefix_hit_tokens) / totals.prompt_tokens) : 0;
  const figures = [
    ["Requests", count(totals.sequences), `${count(totals.finished)} finished`],
    ["Steps", count(totals.steps), `median ${duration(totals.median_step_seconds * 1e6)}`],
    ["Time", duration(totals.seconds * 1e6), `longest step ${duration(totals.longest_step_seconds * 1e6)}`],
    ["Prefill tokens", count(totals.prefill_tokens), `in ${count(totals.steps_with_prefill)} steps`],
    ["Output tokens", count(totals.output_tokens), totals.seconds ? `${count(Math.round(totals.output_tokens / totals.seconds))} a second` : ""],
    ["Prefix hits", count(totals.prefix_hits), `${count(totals.prefix_hit_tokens)} tokens, ${share}% of prompts`],
    ["Preemptions", count(totals.preemptions), `${count(totals.blocks_evicted)} blocks evicted`],
    ["Most blocks held", count(totals.peak_blocks_held), `of ${count(engine.num_blocks)}`],
    ["Longest queue", count(totals.longest_queue), `${count(engine.max_num_seqs)} run at most`],
  ];
  $("totals").replaceChildren(...figures.map(([title, figure, more]) => {
    const box = document.createElement("div"), value = element("dd", figure);
    value.append(element("small", more));
    box.append(element("dt", title), value);
    return box;
  }));
  const facts = [engine.model, engine.device, engine.dtype, engine.quantization, engine.attention_backend && `${engine.attention_backend} attention`,
    `${count(engine.num_blocks)} KV blocks of ${engine.block_size} tokens`, `steps of at most ${count(engine.max_num_batched_tokens)} tokens`,
    engine.workload];
  $("engine").textContent = facts.filter(Boolean).join(" · ");
  const bad = data.violations.length;
  $("verdict").textContent = bad ? `✗ The block manager’s books were wrong: ${data.violations.slice(0, 3).join("; ")}${bad > 3 ? `; and ${bad - 3} more` : ""}`
    : `✓ The block manager’s books were checked ${data.checked ? "in full after every operation" : "operation by operation"} and were right.`;
  $("verdict").classList.toggle("bad", bad > 0);
}

// ---- what the user does

for (const [id, action] of Object.entries({
  first: () => show(0), back: () => show(current - 1), next: () => show(current + 1), last: () => show(steps.length - 1),
  play, "event-back": () => jump(-1), "event-next": () => jump(1),
  "all-tables": () => { showAll = !showAll; showTables(); },
  "by-step": () => setAxis(false), "by-time": () => setAxis(true),
})) $(id).addEventListener("click", action);

function setAxis(time) {
  byTime = time;
  $("by-step").setAttribute("aria-pressed", String(!time));
  $("by-time").setAttribute("aria-pressed", String(time));
  layOut();
}

$("slider").addEventListener("input", (event) => show(Number(event.target.value)));
document.querySelector("#tables tbody").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const sequence = Number(button.dataset.sequence);
  select(sequence === selected ? -1 : sequence);
  document.querySelector(`#tables button[data-sequence="${sequence}"]`)?.focus();
});

for (const id of ["charts", "timeline"]) {
  const canvas = $(id), move = (event) => show(stepAt(event.clientX - canvas.getBoundingClientRect().left, $("scroll").clientWidth));
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (id === "timeline") {
      const row = Math.floor((event.clientY - canvas.getBoundingClientRect().top - PAD) / rowHeight);
      if (row >= 0 && row < sequences.length) select(row);
    }
    if (event.clientX - canvas.getBoundingClientRect().left >= GUTTER) move(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) move(event); });
}

function moveBlock(block) {
  blockCursor = block;
  drawBlocks();
  $("blocks-status").textContent = block >= 0 ? tellBlock(block) : legendOfBlocks();
}

function blockAt(event) {
  const box = $("blocks").getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / cell), block = Math.floor((event.clientY - box.top - 1) / cell) * cellColumns + column;
  return column < cellColumns && block >= 0 && block < numBlocks ? block : -1;
}
$("blocks").addEventListener("pointermove", (event) => moveBlock(blockAt(event)));
$("blocks").addEventListener("pointerleave", () => moveBlock(-1));
$("blocks").addEventListener("click", (event) => {
  const block = blockAt(event);
  if (block >= 0 && books.holders[block]) select(books.owner[block]);
});
$("blocks").addEventListener("blur", () => moveBlock(-1));

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || target.id === "slider" || target.tagName === "SELECT") return;
  const sideways = { ArrowLeft: -1, ArrowRight: 1 }[key], upwards = { ArrowUp: -1, ArrowDown: 1 }[key];
  if (target.id === "blocks" && (sideways || upwards || key === "Home" || key === "End" || key === "Enter")) {
    if (key === "Enter") select(blockCursor >= 0 && books.holders[blockCursor] ? books.owner[blockCursor] : -1);
    else if (key === "Home" || key === "End") moveBlock(key === "Home" ? 0 : numBlocks - 1);
    else moveBlock(Math.max(0, Math.min(numBlocks - 1, blockCursor < 0 ? 0 : blockCursor + (sideways || upwards * cellColumns))));
  } else if (target.id === "timeline" && upwards && sequences.length) {
    select(Math.max(0, Math.min(sequences.length - 1, selected < 0 ? 0 : selected + upwards)));
  } else if (key === "Escape") select(-1);
  else if (sideways) show(current + sideways * (event.shiftKey ? 10 : 1));
  else if (key === "Home") show(0);
  else if (key === "End") show(steps.length - 1);
  else if (key === "PageUp" || key === "PageDown") { if (target.id !== "timeline") return; show(current + (key === "PageUp" ? -10 : 10)); }
  else if (key === " " && target.tagName !== "BUTTON") play();
  else if (key === "n" || key === "p") jump(key === "n" ? 1 : -1);
  else return;
  event.preventDefault();
});

const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
let isThemeChosen = false;  // until then it is the system's
function setTheme(isDark) {
  root.dataset.theme = isDark ? "dark" : "light";
  $("theme").textContent = isDark ? "Light" : "Dark";
}
$("theme").addEventListener("click", () => {
  isThemeChosen = true;
  setTheme(root.dataset.theme !== "dark");
  layOut();
});
system.addEventListener("change", () => {
  if (isThemeChosen) return;
  setTheme(system.matches);
  layOut();
});
let lastWidth = document.body.clientWidth;
window.addEventListener("resize", () => requestAnimationFrame(() => {
  if (document.body.clientWidth === lastWidth) return;
  lastWidth = document.body.clientWidth;
  layOut();
}));

setTheme(system.matches);
showTotals();
tellSelected();
$("slider").max = Math.max(0, steps.length - 1);
if (!steps.length) $("position").textContent = "No step was run";
current = Math.min(Number(/step=(\d+)/.exec(location.hash)?.[1] ?? 0), Math.max(0, steps.length - 1));
layOut();
