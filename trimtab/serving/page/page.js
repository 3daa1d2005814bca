"use strict";

// The page for people: choose adapters, write texts, see what they say. Everything that comes from outside is put into
// the page as text, never as markup.

const WORDS = {
  en: {
    adapter: "Adapter", second: "Beside it (optional)", token: "Token", texts: "Texts, one a line", ask: "Classify",
    example: "Example", answers: "Answers", command: "The same from a terminal", copy: "Copy", copied: "Copied",
    text: "Text", asking: "…",
    count: (n, more) => `${n}${more ? " or more" : ""} adapter${n === 1 ? "" : "s"}`,
    none: "There is no adapter yet.",
    summary: (n, ms) => `${n} text${n === 1 ? "" : "s"} in ${ms} ms`,
    differ: (n) => `; the two differ on ${n}`,
    offline: "The server does not answer.", needsToken: "This server wants a token.",
    examples: "An unforgettable film: warm, funny and beautifully acted.\nThe parcel came three weeks late and nobody answered my calls.\nIt is fine, I suppose.",
  },
  zh: {
    adapter: "适配器", second: "并排比较（可选）", token: "令牌", texts: "文本，一行一条", ask: "分类",
    example: "示例", answers: "结果", command: "在终端里做同样的事", copy: "复制", copied: "已复制",
    text: "文本", asking: "…",
    count: (n, more) => `${more ? "至少 " : ""}${n} 个适配器`,
    none: "还没有适配器。",
    summary: (n, ms) => `${n} 条文本，用时 ${ms} 毫秒`,
    differ: (n) => `；两者有 ${n} 条不同`,
    offline: "服务器没有响应。", needsToken: "此服务器需要令牌。",
    examples: "味道不错，就是送得太慢了。\n这部电影温暖又好笑，演得真好。\n还行吧。",
  },
};

const $ = (id) => document.getElementById(id);
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let listed = { names: [], more: false };
let shown = null; // the last answers, so that a change of language can show them again

function say(key, ...values) {
  const word = WORDS[language][key];
  return typeof word === "function" ? word(...values) : word;
}

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const place of document.querySelectorAll("[data-say]")) place.textContent = say(place.dataset.say);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
  $("count").textContent = listed.names.length ? say("count", listed.names.length, listed.more) : say("none");
  if (shown) showAnswers();
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

async function call(path, body) {
  const headers = {};
  if ($("token").value) headers["Authorization"] = `Bearer ${$("token").value}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error(say("offline"));
  }
  if (response.status === 401) {
    $("token-field").hidden = false;
    throw new Error(say("needsToken"));
  }
  const found = await response.json();
  if (!response.ok) throw new Error([found.error, found.mend].filter(Boolean).join("\n"));
  return { found, headers: response.headers };
}

function problem(error) {
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

async function list() {
  try {
    const info = await call("/info");
    $("base").textContent = info.found.model_id.split("/").pop();
    const { found } = await call("/v1/models?limit=1000");
    listed = { names: found.data.map((one) => one.id), more: found.has_more };
    $("names").replaceChildren(...listed.names.map((name) => Object.assign(element("option"), { value: name })));
    if (!$("first").value && listed.names.length) $("first").value = listed.names[0];
    problem(null);
  } catch (error) {
    problem(error);
  }
  translate();
  curl();
}

function lines() {
  return $("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
}

function bar(score) {
  // Without styles on the element: the page's policy allows none.
  const outer = element("span", "bar");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 1");
  svg.setAttribute("preserveAspectRatio", "none");
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  rect.setAttribute("width", String(100 * score));
  rect.setAttribute("height", "1");
  svg.append(rect);
  outer.append(svg);
  return outer;
}

function answerCell(scores) {
  const cell = element("td", "answer");
  const best = scores[0];
  cell.append(element("span", "label", best.label), " ", element("span", "score", best.score.toFixed(3)));
  const more = element("div", "more");
  for (const one of scores.slice(0, 5)) {
    more.append(element("span", "", one.label), bar(one.score), element("span", "", one.score.toFixed(3)));
  }
  cell.append(more);
  return cell;
}

function showAnswers() {
  const { texts, names, answers, ms } = shown;
  const head = element("tr");
  head.append(element("th", "", say("text")), ...names.map((name) => element("th", "", name)));
  $("head").replaceChildren(head);
  let differing = 0;
  $("rows").replaceChildren(...texts.map((text, i) => {
    const row = element("tr");
    const each = answers.map((found) => found[i]);
    if (new Set(each.map((scores) => scores[0].label)).size > 1) {
      row.className = "differs";
      differing += 1;
    }
    row.append(element("td", "text", text), ...each.map(answerCell));
    return row;
  }));
  $("summary").textContent = say("summary", texts.length, ms) + (names.length > 1 ? say("differ", differing) : "");
  $("results").hidden = false;
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function curl() {
  const name = $("first").value;
  $("line").hidden = !name;
  const texts = lines();
  const inputs = texts.length > 1 ? texts.slice(0, 3).map((text) => [text]) : texts[0] || WORDS[language].examples.split("\n")[0];
  const token = $("token").value ? " -H \"Authorization: Bearer $TOKEN\"" : "";
  $("curl").textContent =
    `curl -s ${location.origin}/predict${token} -H 'Content-Type: application/json' -d ${quoted(JSON.stringify({ model: name, inputs }))}`;
}

async function ask(event) {
  event.preventDefault();
  const texts = lines();
  const names = [$("first").value.trim(), $("second").value.trim()].filter(Boolean);
  if (!texts.length || !names.length) return;
  $("ask").disabled = true;
  $("status").textContent = say("asking");
  problem(null);
  try {
    // Both adapters in one request, so that they share the server's batch.
    const began = performance.now();
    const inputs = names.flatMap(() => texts.map((text) => [text]));
    const { found } = await call("/predict", { inputs, models: names.flatMap((name) => texts.map(() => name)) });
    const answers = names.map((_, i) => found.slice(i * texts.length, (i + 1) * texts.length));
    shown = { texts, names, answers, ms: Math.round(performance.now() - began) };
    showAnswers();
  } catch (error) {
    problem(error);
  } finally {
    $("ask").disabled = false;
    $("status").textContent = "";
  }
}

async function copy() {
  const text = $("curl").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const range = document.createRange();
    range.selectNodeContents($("curl"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
  }
  $("copy").textContent = say("copied");
  setTimeout(() => { $("copy").textContent = say("copy"); }, 1500);
}

$("form").addEventListener("submit", ask);
$("form").addEventListener("input", curl);
$("texts").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("token").addEventListener("change", list);
$("copy").addEventListener("click", copy);
$("example").addEventListener("click", () => { $("texts").value = say("examples"); curl(); });
for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    language = button.dataset.language;
    localStorage.setItem("language", language);
    translate();
    curl();
  });
}
translate();
list();
