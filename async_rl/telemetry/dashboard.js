// The state of the page, how events change it, and how it is drawn. One stream of events; nothing is polled.

const at = (id) => document.getElementById(id);
const MAX_POINTS = 1200, LAG_STEPS = 10, LAG_ROWS = 6, QUIET_S = 10, SURE_MS = 4000;
const COLORS = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)", "var(--c7)"];
const CAUSE_COLORS = { wait_lease: "var(--c0)", wait_batch: "var(--c1)", wait_weights: "var(--c4)", environment: "var(--c3)", publish: "var(--c5)", checkpoint: "var(--c6)" };
const state = { run: null, rows: [], evaluations: [], messages: [], samples: [], status: null, heard: 0, link: "connecting", ended: "", busy: false };

// Without the name and password that the page's own address may have: a request with those is refused.
const address = (path) => new URL(path, location.origin + location.pathname);

// --- events ---------------------------------------------------------------------------------------------------

function start(data) {
  Object.assign(state, { run: data.run, evaluations: data.evaluations, messages: data.messages, rows: [], samples: [], ended: "" });
  document.title = `${data.run.name}: async_rl`;
  update(data);
}

function update(data) {
  state.status = data.status;
  for (const row of data.rows) {
    while (state.rows.length && state.rows[state.rows.length - 1].version >= row.version) state.rows.pop(); // a learner started again
    state.rows.push(row);
  }
  if (state.rows.length > MAX_POINTS) state.rows = state.rows.filter((_, index) => index % 2 || index > state.rows.length - LAG_STEPS - 1);
  state.evaluations.push(...data.new_evaluations);
  state.messages = state.messages.concat(data.said).slice(-200);
  if (data.samples.length) state.samples = data.samples;
  if (data.ended) state.ended = data.ended;
}

const handlers = { start, update };

function handle(kind, data) {
  state.heard = Date.now();
  state.link = "live";
  handlers[kind]?.(data);
  wantDraw();
}

async function listen() {
  const answer = await fetch(address("events"), { cache: "no-store" });
  if (!answer.ok) throw new Error(answer.status === 401 || answer.status === 403 ? "refused: load the page again and give the token" : `HTTP ${answer.status}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const fields = event.split("\n");
      const kind = fields.find((line) => line.startsWith("event: "))?.slice(7);
      const data = fields.find((line) => line.startsWith("data: "))?.slice(6);
      if (kind && data) handle(kind, JSON.parse(data));
    }
  }
}

async function stayConnected() {
  for (let pause = 1; ; pause = Math.min(2 * pause, 5)) {
    const since = state.heard;
    try {
      await listen();
      state.link = "lost";
    } catch (error) {
      state.link = error.message.startsWith("refused") ? error.message : "lost";
    }
    if (state.heard > since) pause = 1;
    wantDraw();
    await new Promise((wake) => setTimeout(wake, pause * 1000));
  }
}

// --- drawing --------------------------------------------------------------------------------------------------

let wanted = false;

function wantDraw() {
  if (wanted) return;
  wanted = true;
  const draw = () => {
    wanted = false;
    drawHead();
    if (state.status) drawBody();
  };
  if (document.hidden) setTimeout(draw, 1000);
  else requestAnimationFrame(draw);
}

function drawHead() {
  const { run, status } = state, lost = state.link !== "live" && state.link !== "connecting";
  const quiet = (Date.now() - state.heard) / 1000;
  const last = state.heard ? clock(state.heard) : "";
  const link = at("link");
  link.className = `pill ${lost ? "lost" : state.link}`;
  const heard = last ? `, last news ${last}` : "";
  write(link, !lost ? (state.link === "live" && quiet > QUIET_S ? `no news for ${duration(quiet)}` : state.link) : state.ended ? `ended ${last}` : state.link === "lost" ? `connection lost${heard}` : state.link);
  const steering = !lost && status && !status.stopping && status.stage !== "saving";
  for (const id of ["pause", "evaluate", "stop"]) at(id).disabled = !steering;
  // For those who listen: what changes rarely, and no counts.
  write(at("announce"), lost && !state.ended ? "connection lost" : state.ended || (status ? (status.paused ? "paused" : status.stage) : ""));
  if (!run) return;
  write(at("name"), [run.name, run.environment, run.algorithm, run.model].filter(Boolean).join(" · "));
  if (!status) return;
  if (state.busy || !status.evaluates) at("evaluate").disabled = true;
  write(at("pause"), status.paused ? "Resume" : "Pause");
  write(at("stage"), state.ended || (status.paused ? `paused at ${status.words}` : status.words));
  const row = state.rows[state.rows.length - 1];
  at("progress").value = status.version / run.steps;
  const parts = [`step ${status.version} of ${run.steps}`];
  if (row) parts.push(`${duration(row.wall_s)} of training`);
  if (row && !state.ended && status.version < run.steps) parts.push(`about ${duration(timeLeft(row))} left`);
  if (status.turn) parts.push(`device: ${status.turn}`);
  write(at("times"), parts.join(", "));
}

function timeLeft(row) {
  const recent = state.rows.slice(-21), first = recent[0];
  const steps = recent.length > 1 ? row.version - first.version : row.version;
  const seconds = recent.length > 1 ? row.wall_s - first.wall_s : row.wall_s;
  return ((state.run.steps - row.version) * seconds) / Math.max(1, steps);
}

function drawBody() {
  drawReward();
  drawLag();
  drawHealth();
  drawWaits();
  drawSpeed();
  drawLedger();
  drawGenerators();
  drawGroups();
  drawMessages();
  drawSamples();
}

function write(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

function legend(place, keys) {
  place.replaceChildren(...keys.map(([color, words]) => {
    const key = element("span", { class: "key" }, words);
    key.style.setProperty("--mark", color);
    return key;
  }));
}

function pairs(place, rows) {
  place.replaceChildren(...rows.map(([name, value, kind]) =>
    element("tr", { class: kind || "" }, element("th", { scope: "row" }, name), element("td", {}, value))));
}

function drawReward() {
  const rewards = state.rows.map((row) => [row.version, row.reward]);
  const many = rewards.length > 30;
  const heldout = state.evaluations.map((one) => [one.version, one.reward]);
  const series = [
    { name: "reward of a step", color: COLORS[0], points: rewards, faint: many },
    ...(many ? [{ name: "smoothed", color: COLORS[0], points: smooth(rewards, 0.9) }] : []),
    { name: "held-out, greedy", color: COLORS[1], points: heldout, dots: true },
  ];
  lineChart(at("reward-chart"), series, { x: "step", y: "mean reward" });
  const row = state.rows[state.rows.length - 1], evaluated = state.evaluations[state.evaluations.length - 1];
  write(at("reward-now"), row ? short(row.reward) : "");
  const keys = [[COLORS[0], many ? "training, smoothed" : "training"]];
  if (evaluated) {
    const metrics = Object.entries(evaluated.metrics).slice(0, 3).map(([name, value]) => `${name} ${short(value)}`);
    const failed = evaluated.failed ? [`${evaluated.failed} failed`] : [];
    keys.push([COLORS[1], [`held-out ${short(evaluated.reward)} at step ${evaluated.version}`, ...metrics, ...failed].join(", ")]);
  }
  legend(at("reward-legend"), keys);
}

function drawLag() {
  const bound = state.run.max_staleness, tokens = new Map();
  for (const row of state.rows.slice(-LAG_STEPS))
    for (const [lag, count] of Object.entries(row.lag_tokens)) tokens.set(+lag, (tokens.get(+lag) || 0) + count);
  const total = [...tokens.values()].reduce((sum, count) => sum + count, 0);
  const size = Math.ceil((bound + 1) / LAG_ROWS), rows = [];
  for (let low = 0; low <= bound; low += size) rows.push([low, Math.min(low + size - 1, bound)]);
  rows.push([bound + 1, Infinity]);
  const said = [];
  at("lag").replaceChildren(...rows.flatMap(([low, high]) => {
    let count = 0;
    for (const [lag, of] of tokens) if (lag >= low && lag <= high) count += of;
    const share = total ? count / total : 0, over = high === Infinity && count > 0 ? " over" : "";
    const bar = element("i");
    bar.style.width = `${share * 100}%`;
    const label = high === Infinity ? `>${bound}` : low === high ? `${low}` : `${low}-${high}`;
    said.push(`${label}: ${percent(share)}`);
    return [element("span", { class: over }, label), element("div", { class: `track${over}` }, bar), element("b", { class: over }, total ? percent(share, 1) : "-")];
  }));
  at("lag").setAttribute("aria-label", `Share of tokens by lag in versions. ${said.join(", ")}`);
  const row = state.rows[state.rows.length - 1];
  write(at("lag-note"), `versions, last ${LAG_STEPS} steps`);
  write(at("lag-words"), row ? `mean ${short(row.lag_mean)}, oldest ${row.lag_max}; bound ${bound}, over it ${state.run.on_stale}` : `bound ${bound}, over it ${state.run.on_stale}`);
}

function drawHealth() {
  const row = state.rows[state.rows.length - 1] || {}, limit = row.equal_version_limit;
  const gap = row.equal_version_gap;
  pairs(at("health"), [
    ["effective sample size", percent(row.ess_frac), row.ess_frac < 0.5 ? "bad" : ""],
    ["masked: over the bound", percent(row.masked_fraction, 1), row.masked_fraction > 2 * (state.run.mask_budget || 1) ? "bad" : ""],
    ["outside the guard", percent(row.guarded_fraction, 1)],
    ["clipped", percent(row.clip_fraction, 1)],
    ["engine - learner, nats", short(gap), gap > limit ? "bad" : ""],
    ["entropy, nats", short(row.entropy)],
    ["completion, tokens", short(row.length)],
    ["time, s", short(row.step_s)],
  ]);
}

function drawWaits() {
  const shares = state.status.shares;
  at("waits").replaceChildren(...["generator", "learner"].map((role) => {
    const causes = Object.entries(shares[role] || {}).sort((a, b) => (b[0] in state.run.work) - (a[0] in state.run.work) || b[1] - a[1]);
    const whole = wholePercents(causes.map(([, share]) => share));
    const stack = element("div", { class: "stack" }), keys = [];
    causes.forEach(([cause, share], index) => {
      const color = cause in state.run.work ? "var(--c2)" : CAUSE_COLORS[cause] || "var(--c7)";
      const part = element("i", { title: `${state.run.causes[cause] || cause.replaceAll("_", " ")} ${percent(share, 1)}` });
      part.style.width = `${share * 100}%`;
      part.style.background = color;
      stack.append(part);
      if (whole[index] > 0) keys.push([color, `${state.run.causes[cause] || cause.replaceAll("_", " ")} ${whole[index]} %`]);
    });
    const words = element("p", { class: "legend" });
    if (keys.length) legend(words, keys);
    else words.append("not known before the first batch");
    return element("div", { class: "role", role: "group", "aria-label": role }, element("span", {}, role), stack, words);
  }));
}

function drawSpeed() {
  const series = ["generator", "learner"].map((role, index) => ({
    name: role, color: COLORS[index], points: state.rows.map((row) => [row.version, row.tokens_per_s[role]]),
  }));
  lineChart(at("speed-chart"), series, { x: "step", y: "tokens/s", zero: true });
  const rates = state.status.rates;
  legend(at("speed-legend"), [[COLORS[0], `sampled ${short(rates.generator)} tokens/s`], [COLORS[1], `trained on ${short(rates.learner)} tokens/s`]]);
  const row = state.rows[state.rows.length - 1];
  write(at("speed-now"), row ? `${short(row.tokens_per_cpu_s)} tokens/CPU-s` : "");
}

function drawLedger() {
  const { ledger, alive, available, free, queued } = state.status;
  const reasons = (event) => Object.entries(ledger.reasons[event] || {}).filter(([kind]) => kind).map(([kind, count]) => [kind.replaceAll("_", " "), short(count), "sub"]);
  const ended = ledger.trained + ledger.filtered + ledger.failed + ledger.cancelled;
  const living = alive.running + alive.scored + alive.ready + alive.composed;
  pairs(at("ledger"), [
    ["admitted", short(ledger.admitted), "sum"],
    ["running", short(alive.running)], ["scored, group incomplete", short(alive.scored)],
    [`ready; a step takes ${short(state.run.step_rollouts)}`, short(alive.ready)], ["in a step now", short(alive.composed)],
    ["trained", short(ledger.trained)],
    ["filtered", short(ledger.filtered)], ...reasons("filtered"),
    ["failed", short(ledger.failed), ledger.failed > ledger.trained ? "bad" : ""], ...reasons("failed").slice(0, 4),
    ["cancelled", short(ledger.cancelled)], ...reasons("cancelled"),
    ["admission may take", short(Math.max(0, free))], ["leases in the queue", short(queued)],
  ]);
  const same = ended + living === ledger.admitted;
  write(at("ledger-sum"), same ? "every one accounted for" : `SUM IS WRONG: ${ledger.admitted - ended - living} unaccounted`);
  at("ledger-sum").classList.toggle("bad", !same);
}

function drawGenerators() {
  const { generators, version, lane } = state.status;
  const words = { live: "samples", silent: "silent", no_weights: "no weights yet" };
  const order = { silent: 0, no_weights: 1, live: 2 };
  const sorted = [...generators].sort((a, b) => order[a.connection] - order[b.connection] || a.version - b.version || a.name.localeCompare(b.name, "en", { numeric: true }));
  const rows = sorted.map((one) => {
    const behind = known(one.version) && version > one.version ? ` (-${version - one.version})` : "";
    const engine = one.engine, slots = known(engine.slots) ? `${short(engine.running)}/${short(engine.slots)}` : short(engine.running);
    const held = `${one.held}/${one.held + one.free}`;
    return element("tr", {},
      element("th", { scope: "row" }, one.name), element("td", { class: one.connection === "silent" ? "bad" : "" }, one.name === lane ? "fast lane" : words[one.connection]),
      element("td", { class: "n" }, known(one.version) ? one.version + behind : "-"), element("td", { class: "n" }, held), element("td", { class: "n" }, slots),
      element("td", { class: "n" }, percent(engine.server_cache_used ?? engine.cache_used)), element("td", { class: "n" }, short(one.rate)));
  });
  if (!rows.length) rows.push(element("tr", {}, element("td", { colspan: "7" }, element("div", { class: "empty" }, "none is here yet"))));
  at("generators").replaceChildren(...rows);
  const silent = generators.filter((one) => one.connection === "silent").length;
  write(at("generators-note"), `${generators.length} of ${state.run.generators}${silent ? `, ${silent} silent` : ""}; rollouts: held / accepted at a time`);
}

function drawGroups() {
  const { groups, version, num_groups } = state.status, bound = state.run.max_staleness;
  const rows = groups.map((one) => {
    const age = version - one.version;
    const members = Object.entries(one.states).filter(([, count]) => count).map(([name, count]) => `${count} ${name}`).join(", ");
    const holders = one.holders.length > 2 ? `${one.holders.length} generators` : one.holders.join(", ");
    return element("tr", {}, element("th", { scope: "row" }, String(one.id)), element("td", { class: age > bound ? "n bad" : "n" }, String(age)),
      element("td", { class: "n" }, duration(one.seconds)), element("td", {}, members || "-"), element("td", { class: "n" }, short(one.tokens)), element("td", {}, holders || "-"));
  });
  if (!rows.length) rows.push(element("tr", {}, element("td", { colspan: "6" }, element("div", { class: "empty" }, "none runs or waits"))));
  at("groups").replaceChildren(...rows);
  write(at("groups-note"), groups.length < num_groups ? `${groups.length} of ${num_groups}` : `${num_groups} running or waiting for a step`);
}

function drawMessages() {
  const place = at("messages");
  const rows = [...state.messages].reverse().map((one) => element("li", {}, element("time", {}, clock(one.at * 1000)), element("span", {}, one.text)));
  place.replaceChildren(...(rows.length ? rows : [element("li", { class: "note" }, element("span"), element("span", {}, "nothing to say"))]));
  const on = Object.entries(state.status.alarms).filter(([, value]) => value).map(([name]) => state.run.alarms[name] || name);
  const alarms = at("alarms"), words = on.join("\n");
  if (alarms.dataset.words !== words) {
    alarms.dataset.words = words;
    alarms.replaceChildren(...on.map((text) => element("p", {}, text)));
  }
}

function drawSamples() {
  const place = at("samples"), shown = JSON.stringify(state.samples.map((one) => [one.step, one.group, one.member]));
  if (place.dataset.shown === shown || place.matches(":hover, :focus-within")) return; // somebody reads
  place.dataset.shown = shown;
  place.classList.toggle("short", state.samples.length > 0 && state.samples.every((one) => one.pieces.reduce((sum, [, part]) => sum + part.length, 0) < 40));
  const lags = new Set();
  place.replaceChildren(...state.samples.map((one) => {
    const text = element("pre", { dir: "auto", tabindex: "0", "aria-label": `group ${one.group}, member ${one.member}` });
    for (const [version, part] of one.pieces) {
      const lag = version < 0 ? null : Math.max(0, one.step - version);
      if (lag !== null) lags.add(Math.min(lag, 4));
      const name = lag === null ? "told" : `said lag${Math.min(lag, 4)}`;
      text.append(element("span", { class: name, title: lag === null ? "not sampled" : `version ${version}, lag ${lag}` }, part));
    }
    const label = element("p", { class: "label" }, element("span", {}, `step ${one.step + 1}, ${one.group}/${one.member}`), element("span", {}, `reward ${short(one.reward)}, ${one.tokens} tokens`));
    return element("article", { class: "sample" }, label, text);
  }));
  for (const text of place.querySelectorAll("pre")) {
    const said = text.querySelector(".said"); // prompts may be long: what the policy wrote is to be seen
    if (said) text.scrollTop = said.offsetTop - text.offsetTop - 36;
  }
  if (!state.samples.length) place.replaceChildren(element("div", { class: "empty" }, state.run.samples || "none has been trained on yet"));
  const marks = ["var(--axis)", "var(--lag1)", "var(--lag2)", "var(--lag3)", "var(--lag4)"];
  legend(at("samples-legend"), [["var(--muted)", "prompt and tools"], ...[...lags].sort().map((lag) => [marks[lag], lag === 4 ? "lag 4 or more" : `lag ${lag}`])]);
}

// --- steering -------------------------------------------------------------------------------------------------

async function post(path) {
  try {
    const answer = await fetch(address(path), { method: "POST" });
    if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status} ${await answer.text()}`);
  } catch (error) {
    state.messages.push({ at: Date.now() / 1000, text: error.message });
  }
  wantDraw();
}

at("pause").addEventListener("click", () => post(state.status.paused ? "resume" : "pause"));
at("evaluate").addEventListener("click", async () => {
  state.busy = true;
  write(at("evaluate"), "evaluating");
  await post("evaluate");
  state.busy = false;
  write(at("evaluate"), "Evaluate");
});
at("stop").addEventListener("click", () => {
  const button = at("stop");
  if (button.classList.contains("sure")) {
    post("stop");
    calm();
  } else {
    button.classList.add("sure");
    write(button, "Really stop?");
    setTimeout(calm, SURE_MS);
  }
  function calm() {
    button.classList.remove("sure");
    write(button, "Stop");
  }
});

new ResizeObserver(wantDraw).observe(document.body);
setInterval(drawHead, 1000); // "no news for": the one thing that changes without an event
stayConnected();
