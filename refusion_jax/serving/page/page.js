"use strict";
// A conversation with the served model. Every answer keeps when each of its tokens was committed, for the replay.

const $ = (id) => document.getElementById(id);
const conversation = []; // messages as the API takes them
let info = null; // what the server offers
let running = null; // AbortController of the answer being written

// --- Settings.

async function start() {
  restoreTheme();
  try {
    info = await (await fetch("/server_info")).json();
  } catch (error) {
    $("log").append(paragraph("error", `The server does not answer: ${error.message}`));
    return;
  }
  $("model").textContent = document.title = info.model;
  for (const name of Object.keys(info.methods)) $("method").append(new Option(name.replaceAll("_", " "), name));
  showOwn();
  $("message").focus();
}

function showOwn() {
  const method = $("method").value, config = info.methods[method];
  $("max_tokens").max = config.gen_length;
  const numbers = info.own_settings[method].filter((name) => typeof config[name] === "number");
  $("own").replaceChildren(...numbers.map((name) => {
    const label = document.createElement("label"), input = document.createElement("input");
    label.append(name.replaceAll("_", " "), input);
    Object.assign(input, { type: "number", step: "any", name, value: config[name] });
    return label;
  }));
}

function requested() {
  const body = {
    model: info.model,
    messages: conversation,
    method: $("method").value,
    stream: true,
    stream_options: { include_usage: true, slots: true },
  };
  for (const id of ["max_tokens", "seed"]) if ($(id).value) body[id] = Number($(id).value);
  for (const input of $("own").querySelectorAll("input")) if (input.value) body[input.name] = Number(input.value);
  return body;
}

function restoreTheme() {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
}

function switchTheme() {
  const root = document.documentElement;
  const dark = (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
}

// --- An answer on the page.

class Answer {
  constructor() {
    this.node = $("answer").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.node.querySelector(name);
    this.commits = []; // {position, text, round} in the order in which they came
    this.text = "";
    this.shown = Infinity; // rounds shown
    this.seconds = 0; // that it took; 0: not over yet
    this.begin = performance.now();
    this.usage = null;
    this.part(".play").addEventListener("click", () => this.play());
    this.part(".round").addEventListener("input", (event) => this.show(Number(event.target.value)));
    $("log").append(this.node);
    this.draw();
  }

  get rounds() {
    return this.usage?.refusion.rounds ?? this.commits.reduce((most, commit) => Math.max(most, commit.round + 1), 0);
  }

  take(chunk) {
    const choice = chunk.choices[0];
    if (choice) this.text += choice.delta.content || "";
    for (const slot of chunk.refusion?.slots || [])
      slot.positions.forEach((position, i) => this.commits.push({ position, text: slot.texts[i], round: slot.round }));
    if (chunk.usage) {
      this.usage = chunk.usage;
      // What was written behind the answer's end is not part of it.
      this.commits = this.commits.filter((commit) => commit.position < chunk.usage.completion_tokens);
    }
    this.draw();
  }

  draw() {
    const rounds = this.rounds, last = Math.max(this.usage ? 1 : 7, rounds - 1), cells = [];
    for (const commit of this.commits) if (commit.round < this.shown) cells[commit.position] = commit;
    const newest = this.shown === Infinity ? -1 : this.shown - 1;
    this.part(".text").replaceChildren(...Array.from(cells, (commit) => {
      const span = document.createElement("span");
      if (!commit) {
        span.className = "open";
        span.textContent = "·";
        return span;
      }
      span.className = commit.round === newest ? "token new" : "token";
      span.textContent = commit.text;
      span.title = `position ${commit.position}, round ${commit.round + 1}`;
      span.style.setProperty("--hue", 215 - 215 * commit.round / last); // from blue to red
      return span;
    }));
    const tokens = this.usage ? this.usage.completion_tokens : this.commits.length;
    const seconds = this.seconds || (performance.now() - this.begin) / 1000;
    const facts = [`${tokens} tokens`, `${rounds} rounds`];
    if (this.usage) facts.push(`${this.usage.refusion.forwards} forwards`, `${this.usage.refusion.tokens_per_forward.toFixed(2)} tokens per forward`);
    if (tokens) facts.push(`${(tokens / Math.max(seconds, 1e-3)).toFixed(0)} tokens/s`);
    this.part(".facts").textContent = facts.join(" · ");
  }

  end() {
    this.seconds = (performance.now() - this.begin) / 1000;
    this.draw();
    this.part(".text").setAttribute("aria-label", this.text);
    this.part(".spoken").textContent = this.text;
    this.part(".replay").hidden = !this.rounds;
    this.part(".round").max = this.part(".round").value = this.rounds;
    this.show(this.rounds);
    this.node.scrollIntoView({ block: "nearest" });
  }

  show(rounds) {
    this.shown = rounds >= this.rounds ? Infinity : rounds;
    this.part(".round").value = rounds;
    this.part("output").textContent = `round ${rounds} of ${this.rounds}`;
    this.draw();
  }

  async play() {
    for (let round = 0; round <= this.rounds; round++) {
      this.show(round);
      await new Promise((done) => setTimeout(done, Math.max(60, Math.min(500, 4000 / this.rounds))));
    }
  }
}

function paragraph(kind, text) {
  const node = document.createElement("p");
  node.className = kind;
  node.textContent = text;
  return node;
}

// --- Asking.

async function* events(response) {
  let rest = "";
  for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function ask(text) {
  const question = { role: "user", content: text };
  conversation.push(question);
  $("log").append(paragraph("question", text));
  const answer = new Answer();
  answer.node.scrollIntoView({ block: "end" });
  running = new AbortController();
  busy(true);
  try {
    const headers = { "Content-Type": "application/json" };
    if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers, body: JSON.stringify(requested()), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      answer.take(chunk);
    }
  } catch (error) {
    if (error.name !== "AbortError") answer.node.append(paragraph("error", error.message));
  }
  answer.end();
  if (conversation.at(-1) === question) { // else a new conversation has begun
    if (answer.text) conversation.push({ role: "assistant", content: answer.text });
    else conversation.pop(); // nothing was said to it
  }
  running = null;
  busy(false);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (!yes) $("message").focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value.trim();
  if (!text || running || !info) return;
  $("message").value = "";
  ask(text);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("message").focus();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("theme").addEventListener("click", switchTheme);
$("method").addEventListener("change", showOwn);
$("fields").addEventListener("submit", (event) => event.preventDefault());
$("new").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  $("log").replaceChildren();
  $("message").focus();
});
start();
