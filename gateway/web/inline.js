// Owns markup inside a line: code, emphasis, links, line breaks. Builds DOM nodes out of text; never parses HTML.

const LONGEST_MARKED = 20_000; // characters of one paragraph; a longer one is shown as it is
const MOST_DELIMITERS = 400; // runs of * _ ~ in one paragraph; more would nest too deep to lay out
const LONGEST_LABEL = 400;
const LONGEST_HREF = 2_000;

const MOST_NAMED = 4; // of a run of characters that are not seen; the others are counted

// What changes the order of a line or cannot be seen: control characters, bidirectional overrides and isolates, tags.
// Also many marks on one letter, which no language uses and which take very long to lay out.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\u{e0000}-\u{e007f}]+|(?<=\p{M}{12})\p{M}+/gu;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const SPACE = /\s/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const BARE_URL = /https?:\/\/[^\s<>"'`]+/y;

/** Adds text to an element; characters that would reorder or hide text are named instead. */
export function addText(parent, text) {
  let from = 0;
  for (const found of text.matchAll(UNSEEN)) {
    if (found.index > from) parent.append(text.slice(from, found.index));
    parent.append(...namesOf([...found[0]]));
    from = found.index + found[0].length;
  }
  if (from < text.length) parent.append(text.slice(from));
}

function namesOf(characters) {
  const names = characters.slice(0, MOST_NAMED).map((one) => `U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
  if (characters.length > MOST_NAMED) names.push(`and ${characters.length - MOST_NAMED} more`);
  return names.map((name) => {
    const mark = document.createElement("span");
    mark.className = "unseen";
    mark.textContent = name;
    return mark;
  });
}

function addLines(parent, text) {
  text.split("\n").forEach((line, i) => {
    if (i) parent.append(document.createElement("br"));
    addText(parent, line);
  });
}

/** The address of a link, or null where the page will not make one of it. */
export function safeHref(text) {
  if (text.length > LONGEST_HREF || !/^https?:\/\//i.test(text)) return null;
  try {
    const url = new URL(text);
    const isPlain = (url.protocol === "https:" || url.protocol === "http:") && !url.username && !url.password;
    return isPlain ? url.href : null;
  } catch {
    return null;
  }
}

function link(href, fill) {
  const anchor = document.createElement("a");
  anchor.href = href;
  anchor.rel = "noopener noreferrer nofollow";
  anchor.target = "_blank";
  anchor.title = href;
  fill(anchor);
  return anchor;
}

/** Adds one paragraph's worth of markdown to an element. */
export function addInline(parent, text) {
  if (text.length > LONGEST_MARKED) addLines(parent, text);
  else build(parent, emphasise(scan(text)));
}

function build(parent, tokens) {
  for (const token of tokens) {
    if (token.text !== undefined) addLines(parent, token.text);
    else if (token.code !== undefined) addText(parent.appendChild(document.createElement("code")), token.code);
    else if (token.href !== undefined) {
      parent.append(link(token.href, (anchor) => (token.label ? build(anchor, token.label) : addText(anchor, token.shown))));
    } else build(parent.appendChild(document.createElement(token.tag)), token.inside);
  }
}

// ---------------------------------------------------------------- tokens: {text} {code} {href, label | shown} {run, count, …}

function scan(text, insideLink = false) {
  const tokens = [];
  const unclosed = new Set(); // lengths of backtick runs known to have no end
  let plain = "", i = 0, delimiters = 0;
  const flush = () => {
    if (plain) tokens.push({ text: plain });
    plain = "";
  };
  while (i < text.length) {
    const char = text[i];
    const found =
      char === "`" ? codeAt(text, i, unclosed)
        : insideLink ? null
          : char === "[" || (char === "!" && text[i + 1] === "[") ? linkAt(text, i)
            : char === "<" ? angleAt(text, i)
              : char === "h" && !/\w/.test(text[i - 1] ?? "") ? bareAt(text, i) : null;
    if (found) {
      flush();
      tokens.push(found.token);
      i = found.end;
    } else if (char === "\\" && text[i + 1] === "\n") {
      i += 1; // a line break by another name
    } else if (char === "\\" && ESCAPABLE.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else if ("*_~".includes(char)) {
      const count = runLength(text, i);
      const run = delimiters < MOST_DELIMITERS ? delimiterAt(text, i, count) : null;
      if (run) {
        flush();
        tokens.push(run);
        delimiters += 1;
      } else plain += text.slice(i, i + count);
      i += count;
    } else if (char === "`") {
      const count = runLength(text, i);
      plain += text.slice(i, i + count);
      i += count;
    } else {
      plain += char;
      i += 1;
    }
  }
  flush();
  return tokens;
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function codeAt(text, at, unclosed) {
  const count = runLength(text, at);
  if (unclosed.has(count)) return null;
  const start = at + count;
  for (let next = text.indexOf("`", start); next >= 0; next = text.indexOf("`", next)) {
    const length = runLength(text, next);
    if (length === count) {
      const inside = text.slice(start, next).replaceAll("\n", " ");
      const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
      return { token: { code: padded ? inside.slice(1, -1) : inside }, end: next + count };
    }
    next += length;
  }
  unclosed.add(count);
  return null;
}

/** `[label](address "title")`; a picture is linked to and never fetched. */
function linkAt(text, at) {
  const open = text[at] === "!" ? at + 1 : at;
  let depth = 0, close = -1;
  for (let i = open; i < text.length && i < open + LONGEST_LABEL; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "[") depth += 1;
    else if (text[i] === "]" && --depth === 0) {
      close = i;
      break;
    }
  }
  if (close < 0 || text[close + 1] !== "(") return null;
  let end = close + 2, inner = 0;
  for (; end < text.length && end < close + 2 + LONGEST_HREF; end += 1) {
    if (text[end] === "\n") return null;
    if (text[end] === "(") inner += 1;
    else if (text[end] === ")" && inner-- === 0) break;
  }
  if (text[end] !== ")") return null;
  const address = text.slice(close + 2, end).trim().split(/[ \t]/, 1)[0].replace(/^<|>$/g, "");
  const href = safeHref(address);
  if (!href) return null;
  const label = text.slice(open + 1, close);
  return { token: { href, label: label.trim() ? emphasise(scan(label, true)) : [{ text: address }] }, end: end + 1 };
}

function angleAt(text, at) {
  const end = text.indexOf(">", at);
  if (end < 0 || end - at > LONGEST_HREF) return null;
  const shown = text.slice(at + 1, end);
  const href = SPACE.test(shown) ? null : safeHref(shown);
  return href ? { token: { href, shown }, end: end + 1 } : null;
}

function bareAt(text, at) {
  BARE_URL.lastIndex = at;
  const found = BARE_URL.exec(text);
  if (!found) return null;
  let shown = found[0].slice(0, LONGEST_HREF).replace(/[.,;:!?*_~]+$/, "");
  while (shown.endsWith(")") && shown.split(")").length > shown.split("(").length) shown = shown.slice(0, -1);
  const href = safeHref(shown);
  return href ? { token: { href, shown }, end: at + shown.length } : null;
}

// ---------------------------------------------------------------- emphasis, by CommonMark's delimiter runs

function delimiterAt(text, at, count) {
  const char = text[at];
  if (char === "~" && count !== 2) return null;
  const before = text[at - 1] ?? " ", after = text[at + count] ?? " ";
  const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
  const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
  const opens = char === "_" ? left && (!right || PUNCTUATION.test(before)) : left;
  const closes = char === "_" ? right && (!left || PUNCTUATION.test(after)) : right;
  return { run: char, count, whole: count, opens, closes };
}

function emphasise(tokens) {
  for (let i = 0; i < tokens.length; i += 1) {
    const closer = tokens[i];
    if (!closer.run || !closer.closes) continue;
    let at = i - 1;
    while (at >= 0 && !matches(tokens[at], closer)) at -= 1;
    if (at < 0) continue;
    const opener = tokens[at];
    const used = Math.min(opener.count, closer.count, 2);
    const tag = closer.run === "~" ? "del" : used === 2 ? "strong" : "em";
    const inside = tokens.slice(at + 1, i).map(asText);
    opener.count -= used;
    closer.count -= used;
    const rest = [...(opener.count ? [opener] : []), { tag, inside }, ...(closer.count ? [closer] : [])];
    tokens.splice(at, i - at + 1, ...rest);
    i = at + rest.length - (closer.count ? 2 : 1); // what is left of the closer is looked at again
  }
  return tokens.map(asText);
}

function matches(opener, closer) {
  if (opener.run !== closer.run || !opener.opens || !opener.count) return false;
  const both = (opener.closes || closer.opens) && (opener.whole + closer.whole) % 3 === 0;
  return !both || (opener.whole % 3 === 0 && closer.whole % 3 === 0);
}

const asText = (token) => (token.run ? { text: token.run.repeat(token.count) } : token);
