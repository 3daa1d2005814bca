"use strict";

// The page for people: choose adapters, write texts, see what they say. Everything that comes from outside is put into
// the page as text, never as markup. The token is kept in its field alone, so that it is gone with the page.

const WORDS = {
  en: {
    adapter: "Adapter", second: "Compare with", token: "Token", texts: "Texts, one a line", ask: "Classify",
    example: "Example", answers: "Answers", command: "The same from a terminal", copy: "Copy", copied: "Copied",
    text: "Text", hint: "Ctrl+Enter classifies", nobody: "none", search: "type the beginning of its name",
    only: "only where they differ", differs: "they differ",
    count: (n, more) => `${n.toLocaleString("en")}${more ? " or more" : ""} adapter${n === 1 && !more ? "" : "s"}`,
    none: "no adapter yet", asking: (done, all) => (done ? `${done} of ${all} texts …` : "…"),
    summary: (n, ms) => `${n} text${n === 1 ? "" : "s"} in ${ms} ms`,
    cut: "; longer texts were cut to what the adapter reads",
    differ: (n) => `; they differ on ${n}`,
    first: (n) => `The first ${n} texts.`, secret: "TOKEN holds your token.", others: (n) => `and ${n} more`,
    noText: "There is no text yet.", noAdapter: "No adapter is chosen.",
    offline: "The server does not answer.\nIs it still running? The texts are still here.",
    strange: (status) => `The answer cannot be read (HTTP ${status}).\nIs something else between this page and the server?`,
    needsToken: "This server wants a token.\nWhoever runs it has one for you. It is forgotten when this page is closed.",
    wrongToken: "The server does not know this token.",
    status: {},
    examples: "An unforgettable film: warm, funny and beautifully acted.\nThe parcel came three weeks late and nobody answered my calls.\nIt is fine, I suppose.",
  },
  zh: {
    adapter: "适配器", second: "并排比较", token: "令牌", texts: "文本，一行一条", ask: "分类",
    example: "示例", answers: "结果", command: "在终端里做同样的事", copy: "复制", copied: "已复制",
    text: "文本", hint: "Ctrl+Enter 即可分类", nobody: "无", search: "输入名称的开头",
    only: "只看不同的", differs: "两者不同",
    count: (n, more) => `${more ? "至少 " : ""}${n.toLocaleString("zh")} 个适配器`,
    none: "还没有适配器", asking: (done, all) => (done ? `${all} 条文本中的 ${done} 条 …` : "…"),
    summary: (n, ms) => `${n} 条文本，用时 ${ms} 毫秒`,
    cut: "；过长的文本已截断到适配器能读的长度",
    differ: (n) => `；两者有 ${n} 条不同`,
    first: (n) => `仅前 ${n} 条文本。`, secret: "TOKEN 是您的令牌。", others: (n) => `另有 ${n} 个`,
    noText: "还没有文本。", noAdapter: "还没有选择适配器。",
    offline: "服务器没有响应。\n它还在运行吗？文本仍保留在这里。",
    strange: (status) => `无法读取响应（HTTP ${status}）。\n此页面与服务器之间是否还有别的程序？`,
    needsToken: "此服务器需要令牌。\n请向管理员索取。关闭页面后不会保留。",
    wrongToken: "服务器不认识这个令牌。",
    // The server speaks English; what it says stands below these.
    status: {
      403: "此令牌不能使用这个适配器。", 404: "没有这个适配器。", 413: "一次发送的内容太多。", 422: "服务器无法理解这个请求。",
      424: "这个适配器的文件无法使用。", 429: "服务器正忙，请稍后再试。", 503: "服务器正在停止。", 504: "等待超时。",
      507: "内存不足，无法载入这个适配器。",
    },
    examples: "味道不错，就是送得太慢了。\n这部电影温暖又好笑，演得真好。\n还行吧。",
  },
};
const MOST_IN_A_MENU = 200; // more names than this are found by typing
const MOST_CHARACTERS = 200_000; // of one request; a fifth of what the server takes
const MOST_LABELS = 4; // of one answer
const MOST_IN_THE_LINE = 3; // texts

const $ = (id) => document.getElementById(id);
const say = (key, ...values) => {
  const word = WORDS[language][key];
  return typeof word === "function" ? word(...values) : word;
};
let language = remembered() || (navigator.language.startsWith("zh") ? "zh" : "en");
let listed = null; // names of adapters, and whether there are more
let perRequest = 256; // texts
let shown = null; // the last answers, and
let failure = null; // the last failure, so that a change of language can show them again
let busy = false;
let listing = null; // a promise: Enter in the token's field would ask twice

function remembered(chosen) {
  try {
    if (chosen) localStorage.setItem("language", chosen);
    const found = localStorage.getItem("language");
    return Object.hasOwn(WORDS, found) ? found : null;
  } catch {
    return null; // a browser that keeps nothing
  }
}

function element(tag, name, ...content) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...content);
  return made;
}

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const place of document.querySelectorAll("[data-say]")) place.textContent = say(place.dataset.say);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
  pickers();
  if (shown) showAnswers();
  showFailure();
  showLine();
}

// -- asking the server

class Failure extends Error {
  constructor(words) { // a function, because the language may change while they stand there
    super();
    this.words = words;
  }
}

async function call(path, body) {
  const headers = {};
  const token = $("token").value.trim();
  if (token) headers["Authorization"] = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Failure(() => say("offline"));
  }
  if (response.status === 401) {
    $("token-field").hidden = false;
    $("token").focus();
    throw new Failure(() => say(token ? "wrongToken" : "needsToken"));
  }
  const found = await response.json().catch(() => null);
  if (found === null || (!response.ok && !found.error)) throw new Failure(() => say("strange", response.status));
  if (!response.ok) {
    throw new Failure(() => [say("status")[response.status], found.error, found.mend].filter(Boolean).join("\n"));
  }
  return { found, headers: response.headers };
}

function showFailure(...one) {
  if (one.length) failure = one[0];
  if (failure && !(failure instanceof Failure)) throw failure; // a fault of ours belongs into the console
  $("problem").textContent = failure ? failure.words() : "";
  $("problem").hidden = !failure;
}

function list() {
  return listing ??= load().finally(() => { listing = null; });
}

async function load() {
  try {
    const info = await call("/info");
    $("base").textContent = info.found.model_id.split("/").pop();
    perRequest = info.found.max_client_batch_size || perRequest;
    const { found } = await call("/v1/models?limit=1000");
    listed = { names: found.data.map((one) => one.id), more: found.has_more };
    showFailure(null);
  } catch (error) {
    showFailure(error);
  }
  pickers();
  showLine();
}

// -- choosing

function pickers() {
  const names = listed ? listed.names : [];
  $("count").textContent = !listed ? "" : names.length ? say("count", names.length, listed.more) : say("none");
  const typed = names.length > MOST_IN_A_MENU || Boolean(listed && listed.more);
  for (const id of ["first", "second"]) {
    const chosen = $(id).value;
    const made = typed ? typedPicker() : menu(names, id === "second");
    const had = document.activeElement === $(id);
    made.id = id;
    $(id).replaceWith(made);
    if (typed || names.includes(chosen)) made.value = chosen;
    if (had) made.focus();
  }
  if (typed) suggest(names);
}

function menu(names, optional) {
  const nobody = Object.assign(element("option", "", say("nobody")), { value: "" });
  return element("select", "", ...(optional ? [nobody] : []), ...names.map((name) => element("option", "", name)));
}

function typedPicker() {
  const made = Object.assign(element("input"), { autocomplete: "off", spellcheck: false, placeholder: say("search") });
  made.setAttribute("list", "names");
  if (listed.more) made.addEventListener("input", () => searchFor(made.value.trim()));
  return made;
}

function suggest(names) {
  $("names").replaceChildren(...names.map((name) => Object.assign(element("option"), { value: name })));
}

async function searchFor(beginning) {
  if (!beginning) return;
  try {
    const { found } = await call(`/v1/models?limit=50&after=${encodeURIComponent(beginning)}`);
    suggest(found.data.map((one) => one.id).filter((name) => name.startsWith(beginning)));
  } catch {
    // Suggestions are a help only; the request for the answers says what is wrong.
  }
}

function chosenNames() {
  return [$("first").value.trim(), $("second").value.trim()].filter(Boolean);
}

function lines() {
  return $("texts").value.split("\n").filter((line) => line.trim());
}

// -- answers

function* parts(texts, names) {
  // Every text goes with all adapters in one request, so that they share the server's batches.
  const most = Math.max(1, Math.floor(perRequest / names.length));
  let part = [];
  let characters = 0;
  for (const text of texts) {
    if (part.length === most || (part.length && characters + text.length > MOST_CHARACTERS)) {
      yield part;
      part = [];
      characters = 0;
    }
    part.push(text);
    characters += text.length;
  }
  if (part.length) yield part;
}

async function ask() {
  const [texts, names] = [lines(), chosenNames()];
  if (busy) return;
  if (!names.length || !texts.length) {
    const missing = names.length ? "noText" : "noAdapter";
    $(names.length ? "texts" : "first").focus();
    showFailure(new Failure(() => say(missing)));
    return;
  }
  // Not `disabled`: that would take the keyboard's place on the page away.
  busy = true;
  $("ask").setAttribute("aria-disabled", "true");
  showFailure(null);
  const answers = names.map(() => []);
  let cut = false;
  try {
    const began = performance.now();
    for (const part of parts(texts, names)) {
      $("status").textContent = say("asking", answers[0].length, texts.length);
      const inputs = names.flatMap(() => part.map((text) => [text]));
      const models = names.flatMap((name) => part.map(() => name));
      const { found, headers } = await call("/predict", { inputs, models });
      names.forEach((_, i) => answers[i].push(...found.slice(i * part.length, (i + 1) * part.length)));
      cut ||= headers.get("x-truncated") !== "0";
    }
    shown = { texts, names, answers, cut, ms: Math.round(performance.now() - began) };
    $("only").checked = false;
    showAnswers();
  } catch (error) {
    $("status").textContent = "";
    showFailure(error);
  } finally {
    busy = false;
    $("ask").removeAttribute("aria-disabled");
  }
}

function showAnswers() {
  const { texts, names, answers, cut, ms } = shown;
  const head = element("tr", "", ...[say("text"), ...names].map((name) => element("th", "", name)));
  for (const cell of head.children) cell.scope = "col";
  $("head").replaceChildren(head);
  // Adapters that have no label in common cannot agree, so that nothing is to be marked.
  const [mine, theirs] = answers.map((all) => new Set(all[0].map((one) => one.label)));
  const comparable = Boolean(theirs) && [...mine].some((label) => theirs.has(label));
  let differing = 0;
  $("rows").replaceChildren(...texts.map((text, i) => {
    const cell = element("td", "text", isolated(text));
    const row = element("tr", "", cell, ...answers.map((all, which) => answerCell(all[i], names[which])));
    if (comparable && answers[0][i][0].label !== answers[1][i][0].label) {
      row.className = "differs";
      cell.append(element("span", "away", say("differs")));
      differing += 1;
    }
    return row;
  }));
  $("results").className = names.length > 1 ? "two" : "";
  $("only-field").hidden = !differing;
  showOnly();
  $("status").textContent = say("summary", texts.length, ms) + (comparable ? say("differ", differing) : "")
    + (cut ? say("cut") : "");
  $("results").hidden = false;
}

function showOnly() {
  $("rows").className = $("only").checked ? "only" : "";
}

function isolated(text) {
  return Object.assign(element("div", "", text), { dir: "auto" }); // right to left where its letters are
}

function answerCell(scores, name) {
  const cell = element("td", "answer", ...scores.slice(0, MOST_LABELS).map((one) =>
    element("div", "row", element("span", "label", one.label), bar(one.score), element("span", "score", one.score.toFixed(3)))));
  if (scores.length > MOST_LABELS) cell.append(say("others", scores.length - MOST_LABELS));
  cell.dataset.name = name;
  return cell;
}

function bar(score) {
  // An SVG's attribute, because the server's policy allows no style on an element.
  const [svg, rect] = ["svg", "rect"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("viewBox", "0 0 1 1");
  svg.setAttribute("preserveAspectRatio", "none");
  rect.setAttribute("width", String(score));
  rect.setAttribute("height", "1");
  svg.append(rect);
  const outer = element("span", "bar", svg);
  outer.ariaHidden = "true"; // the number beside it says the same
  return outer;
}

// -- the same from a terminal

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function showLine() {
  const names = chosenNames();
  $("line").hidden = !names.length;
  const all = lines();
  const texts = all.length ? all.slice(0, MOST_IN_THE_LINE) : [say("examples").split("\n")[0]];
  const body = names.length === 1
    ? { model: names[0], inputs: texts.length === 1 ? texts[0] : texts.map((text) => [text]) }
    : { models: names.flatMap((name) => texts.map(() => name)), inputs: names.flatMap(() => texts.map((text) => [text])) };
  // The token itself stands nowhere on the page, so that the line can be passed on.
  const token = $("token").value ? ' -H "Authorization: Bearer $TOKEN"' : "";
  $("curl").textContent =
    `curl -s ${location.origin}/predict${token} -H 'Content-Type: application/json' -d ${quoted(JSON.stringify(body))}`;
  $("curl-note").textContent = [all.length > texts.length && say("first", texts.length), token && say("secret")]
    .filter(Boolean).join(" ");
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
  } catch { // there is no clipboard on a page over plain HTTP from another machine
    getSelection().selectAllChildren($("curl"));
    document.execCommand("copy");
  }
  $("copy").textContent = say("copied");
  setTimeout(() => { $("copy").textContent = say("copy"); }, 1500);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (listed) ask();
  else list(); // the server did not answer before, or wanted a token
});
$("form").addEventListener("input", showLine);
$("form").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("token").addEventListener("change", list);
$("only").addEventListener("change", showOnly);
$("copy").addEventListener("click", copy);
$("example").addEventListener("click", () => { $("texts").value = say("examples"); showLine(); });
for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    language = button.dataset.language;
    remembered(language);
    translate();
  });
}
translate();
list();
