// The server's page: a chat that streams, and live figures read from /metrics.

const POLL = 1000; // ms between two readings of /metrics
const WINDOW = 60; // readings that the sparkline and the percentiles look back on
const QUANTILES = [0.5, 0.9, 0.99];
const at = (id) => document.getElementById(id);

// The key, if the server asks for one

const NeedsKey = class extends Error {};

async function request(path, options = {}) {
  const key = sessionStorage.getItem("optx_key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) throw new NeedsKey(await errorText(response));
  return response;
}

// What the server says is wrong: the message of OpenAI's error form, or the start of what came in its place.
async function errorText(response) {
  const body = await response.text();
  try {
    return JSON.parse(body).error.message;
  } catch {
    return `HTTP ${response.status}${body ? `: ${body.slice(0, 200)}` : ""}`;
  }
}

// Opens the dialog; resolves to whether a key was given.
function askKey() {
  const dialog = at("key_dialog");
  if (dialog.open) return Promise.resolve(false);
  if (sessionStorage.getItem("optx_key")) at("key_note").textContent = "The server refused that key. Try another one.";
  at("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const key = dialog.returnValue === "given" ? at("key").value : "";
      if (key) sessionStorage.setItem("optx_key", key);
      resolve(Boolean(key));
      if (key) poll();
    }, { once: true });
  });
}

at("key_cancel").addEventListener("click", () => at("key_dialog").close(""));
at("key_form").addEventListener("submit", (event) => {
  event.preventDefault();
  at("key_dialog").close("given");
});

// Chat

const chat = { messages: [], running: null };

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function show(role, text = "") {
  at("empty").hidden = true;
  const article = element("article", role);
  article.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const body = element("div", "text", text);
  article.append(body);
  at("log").append(article);
  scrollDown(true);
  return { article, body };
}

// Follows the text, unless the reader has scrolled up.
function scrollDown(always = false) {
  const log = at("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 80) log.scrollTop = log.scrollHeight;
}

// article: the answer that failed; another try takes its place.
function showError(text, article) {
  const box = element("div", "error", text);
  box.setAttribute("role", "alert");
  const again = element("button", "", "Try again");
  again.type = "button";
  again.addEventListener("click", () => {
    box.remove();
    article.remove();
    answer();
  });
  box.append(again);
  at("log").append(box);
  scrollDown(true);
}

function busy(on) {
  at("send").hidden = on;
  at("stop").hidden = !on;
}

// Events of a stream as parsed JSON, until its end mark. A stream that ends without one broke off.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let left = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream broke off before its end");
    const lines = (left + value).split("\n");
    left = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer() {
  const running = (chat.running = new AbortController());
  busy(true);
  const began = performance.now();
  const { article, body } = show("assistant");
  article.setAttribute("aria-busy", "true");
  const found = { text: "", first: null, tokens: 0, finish: "" };
  let failure = null;
  try {
    await stream(running.signal, (event) => {
      if (event.error) throw new Error(event.error.message);
      found.tokens = event.usage?.completion_tokens ?? found.tokens;
      const choice = event.choices?.[0];
      if (!choice) return;
      found.finish = choice.finish_reason ?? found.finish;
      if (choice.delta?.role === undefined || choice.delta?.content) found.first ??= performance.now();
      found.text += choice.delta?.content ?? "";
      body.textContent = found.text;
      scrollDown();
    });
  } catch (error) {
    if (running.signal.aborted) found.finish = "stopped";
    else failure = error;
  } finally {
    article.removeAttribute("aria-busy");
    if (chat.running === running) {
      chat.running = null;
      busy(false);
    }
  }
  if (!found.text) article.remove();
  if (failure) return failed(failure, article);
  if (!found.text || !article.isConnected) return;
  chat.messages.push({ role: "assistant", content: found.text });
  article.append(element("p", "meta", summary(found, began, performance.now())));
  scrollDown();
}

async function stream(signal, take) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model: at("model").textContent,
      messages: chat.messages,
      temperature: Number(at("temperature").value),
      max_tokens: Number(at("max_tokens").value),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!response.ok) throw new Error(await errorText(response));
  for await (const event of events(response)) take(event);
}

async function failed(error, article) {
  if (error instanceof NeedsKey && (await askKey())) return answer();
  // fetch has one error for all of the network
  const text = error instanceof TypeError ? "The server cannot be reached. Is it still running?" : error.message;
  showError(text, article);
}

// `57 tokens, first after 41 ms, then 61.2 tokens/s; cut at max tokens`
function summary({ tokens, first, finish }, began, ended) {
  const parts = tokens ? [`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`] : [];
  if (first !== null) parts.push(`first after ${Math.round(first - began)} ms`);
  if (tokens > 1) parts.push(`then ${number((1000 * (tokens - 1)) / (ended - first))} tokens/s`);
  return parts.join(", ") + ({ length: "; cut at max tokens", stopped: "; stopped" }[finish] ?? "");
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("prompt").value.trim();
  if (!text || chat.running) return;
  at("prompt").value = "";
  for (const box of document.querySelectorAll(".error")) box.remove();
  chat.messages.push({ role: "user", content: text });
  show("user", text);
  answer();
});

at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});

at("stop").addEventListener("click", () => {
  chat.running?.abort();
  at("prompt").focus();
});

at("clear").addEventListener("click", () => {
  chat.running?.abort();
  chat.messages = [];
  for (const part of [...at("log").children]) if (part !== at("empty")) part.remove();
  at("empty").hidden = false;
  at("prompt").focus();
});

// Figures

// Prometheus text -> Map of a sample's name to [{ labels, value }].
export function parseMetrics(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const [, name, labels, value] = line.match(/^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/) ?? [];
    if (!name) continue;
    const pairs = [...(labels ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key, text]) => [key, text]);
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels: Object.fromEntries(pairs), value: Number(value.replace("Inf", "Infinity")) });
  }
  return found;
}

// Cumulative counts of a histogram by upper bound: [[bound, count]], the last bound Infinity.
function buckets(metrics, name) {
  const rows = metrics.get(`${name}_bucket`) ?? [];
  return rows.map(({ labels, value }) => [Number(labels.le.replace("Inf", "Infinity")), value]);
}

// Quantile q of a histogram, even within a bucket, as Prometheus's histogram_quantile; null of an empty one.
export function quantile(rows, q) {
  const total = rows.length ? rows[rows.length - 1][1] : 0;
  if (!total) return null;
  const rank = q * total;
  const i = rows.findIndex(([, count]) => count >= rank);
  const [low, below] = i ? rows[i - 1] : [0, 0];
  const [high, count] = rows[i];
  return high === Infinity ? low : low + ((high - low) * (rank - below)) / (count - below);
}

function since(rows, old) {
  return old.length === rows.length ? rows.map(([bound, count], i) => [bound, count - old[i][1]]) : rows;
}

const readings = []; // { at: seconds, metrics }, the newest last
const rates = []; // output tokens/s between readings

function number(value) {
  if (value === null || Number.isNaN(value)) return "–";
  const digits = value === 0 || value >= 100 ? 0 : value >= 1 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function put(id, value) {
  at(id).textContent = typeof value === "number" ? value.toLocaleString("en") : value;
}

function render(metrics) {
  const get = (name) => metrics.get(`optx:${name}`)?.[0]?.value ?? 0;
  const old = readings[0].metrics;
  readings.push({ at: performance.now() / 1000, metrics });
  if (readings.length > WINDOW) readings.shift();
  renderRate();
  put("running", get("num_requests_running"));
  put("waiting", get("num_requests_waiting"));
  renderLatency(metrics, old);
  const pages = get("kv_pages");
  for (const kind of ["used", "cached", "free"]) put(`pages_${kind}`, get(`kv_pages_${kind}`));
  for (const kind of ["used", "cached"]) {
    at("pool").querySelector(`.${kind}`).style.width = `${pages ? (100 * get(`kv_pages_${kind}`)) / pages : 0}%`;
  }
  at("pool").setAttribute("aria-label",
    `KV cache pages: ${get("kv_pages_used")} used, ${get("kv_pages_cached")} cached, ${get("kv_pages_free")} free`);
  put("prefix", share(get("prefix_cache_hits_total"), get("prefix_cache_queries_total")));
  put("drafts", share(get("accepted_tokens_total"), get("draft_tokens_total")));
  put("preemptions", get("preemptions_total"));
  put("compiles", get("compiles_total"));
  put("generated", get("generation_tokens_total"));
}

function share(part, whole) {
  return whole ? `${number((100 * part) / whole)} %` : "–";
}

function renderRate() {
  const [before, now] = readings.slice(-2);
  const tokens = (reading) => reading.metrics.get("optx:generation_tokens_total")?.[0]?.value ?? 0;
  // A counter that fell belongs to a server that has started anew.
  rates.push(Math.max(0, tokens(now) - tokens(before)) / (now.at - before.at));
  if (rates.length > WINDOW) rates.shift();
  put("rate", number(rates[rates.length - 1]));
  const most = Math.max(...rates, 1);
  const points = rates.map((rate, i) => `${(120 * (WINDOW - rates.length + i)) / (WINDOW - 1)} ${31 - (30 * rate) / most}`);
  at("spark").querySelector(".line").setAttribute("d", `M${points.join("L")}`);
  at("spark").querySelector(".area").setAttribute("d", `M${points.join("L")}V32H${points[0].split(" ")[0]}Z`);
  at("spark").setAttribute("aria-label", `Output tokens/s over the last minute, ${number(most)} at most`);
}

function renderLatency(metrics, old) {
  const names = { ttft: "optx:time_to_first_token_seconds", tpot: "optx:time_per_output_token_seconds" };
  const all = Object.values(names).map((name) => buckets(metrics, name));
  const recent = Object.values(names).map((name, i) => since(all[i], buckets(old, name)));
  const fresh = recent.every((rows) => quantile(rows, 0.5) !== null);
  put("period", fresh ? "last minute" : "since the start");
  Object.keys(names).forEach((id, i) => {
    const cells = at(id).querySelectorAll("td");
    QUANTILES.forEach((q, j) => {
      const seconds = quantile((fresh ? recent : all)[i], q);
      cells[j].textContent = number(seconds === null ? null : 1000 * seconds);
    });
  });
}

function health(state, text, note = "") {
  if (at("health").dataset.state !== state || at("health").textContent !== text) {
    at("health").dataset.state = state;
    at("health").textContent = text;
  }
  at("figures_note").hidden = !note;
  at("figures_note").textContent = note;
}

async function readModel() {
  const response = await request("v1/models");
  if (!response.ok) throw new Error(await errorText(response));
  at("model").textContent = (await response.json()).data[0].id;
  document.title = `${at("model").textContent} · optx`;
}

let timer = 0;

async function poll() {
  clearTimeout(timer);
  if (!document.hidden && (await pollOnce())) timer = setTimeout(poll, POLL);
}

// Whether to go on: a server that wants a key is asked again when it has been given.
async function pollOnce() {
  try {
    if (!at("model").textContent) await readModel();
    const response = await request("metrics");
    if (!response.ok) throw new Error(await errorText(response));
    const metrics = parseMetrics(await response.text());
    if (!readings.length) readings.push({ at: performance.now() / 1000 - POLL / 1000, metrics });
    render(metrics);
    const alive = await fetch("health");
    if (alive.ok) health("good", "serving");
    else health("bad", "not healthy", await errorText(alive));
  } catch (error) {
    if (error instanceof NeedsKey) {
      health("bad", "needs a key", "The figures need the API key.");
      await askKey();
      return false;
    }
    const network = error instanceof TypeError;
    health("bad", network ? "unreachable" : "error", network ? "The server cannot be reached; figures stand still." : error.message);
  }
  return true;
}

document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
