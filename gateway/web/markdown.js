// Owns a model's markdown as blocks on the page, kept in step with an answer that grows. Text in, DOM nodes out.

import { copyButton } from "./copying.js";
import { addInline, addText } from "./inline.js";

const DEEPEST = 6; // lists and quotes within each other; deeper ones are text
const MOST_CELLS = 5_000;
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;

/** One answer's markdown. Blocks that did not change keep their nodes, so a selection in them survives. */
export class Prose {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    this.shown = []; // [{key, node, block}]
  }

  set(text) {
    const blocks = parse(text);
    blocks.forEach((block, i) => this.place(block, i));
    for (const { node } of this.shown.splice(blocks.length)) node.remove();
  }

  place(block, i) {
    const key = JSON.stringify(block), old = this.shown[i];
    if (old?.key === key) return;
    if (old && grows(old.block, block)) {
      addText(old.node.querySelector("code"), block.text.slice(old.block.text.length));
      this.shown[i] = { key, node: old.node, block };
      return;
    }
    const node = nodeOf(block);
    if (old) old.node.replaceWith(node);
    else this.root.append(node);
    this.shown[i] = { key, node, block };
  }
}

/** A code block that only got longer: its button and the scroll position stay. */
const grows = (old, block) =>
  old.kind === "code" && block.kind === "code" && old.language === block.language && block.text.startsWith(old.text);

// ---------------------------------------------------------------- blocks

/** The blocks of a text: {kind: paragraph | heading | code | quote | list | table | rule, …}. */
export function parse(text) {
  return blocksOf(text.replace(/\r\n?|[\u2028\u2029]/g, "\n").split("\n"), 0);
}

function blocksOf(lines, depth) {
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    let read = null;
    if (!line.trim()) {
      i += 1;
      continue;
    }
    if (FENCE.test(line)) read = codeFrom(lines, i);
    else if (HEADING.test(line)) read = { block: headingOf(line), end: i + 1 };
    else if (isRule(line)) read = { block: { kind: "rule" }, end: i + 1 };
    else if (QUOTE.test(line) && depth < DEEPEST) read = quoteFrom(lines, i, depth);
    else if (ITEM.test(line) && depth < DEEPEST) read = listFrom(lines, i, depth);
    else if (isTable(lines, i)) read = tableFrom(lines, i);
    else read = paragraphFrom(lines, i, depth);
    blocks.push(read.block);
    i = read.end;
  }
  return blocks;
}

function startsBlock(lines, i, depth) {
  const line = lines[i];
  const item = depth < DEEPEST ? ITEM.exec(line) : null;
  const isItem = item && item[3] && (/^[-*+]$|^1[.)]$/.test(item[2]));
  return FENCE.test(line) || HEADING.test(line) || isRule(line) || isItem || (depth < DEEPEST && QUOTE.test(line)) || isTable(lines, i);
}

function paragraphFrom(lines, start, depth) {
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end, depth)) end += 1;
  // Indentation is kept: a small model often writes code without a fence around it.
  return { block: { kind: "paragraph", text: lines.slice(start, end).join("\n").trim() }, end };
}

function codeFrom(lines, start) {
  const [, indent, fence, info] = FENCE.exec(lines[start]);
  let end = start + 1;
  const closes = (line) => {
    const bare = line.trim();
    return bare.length >= fence.length && bare === fence[0].repeat(bare.length);
  };
  while (end < lines.length && !closes(lines[end])) end += 1;
  const strip = new RegExp(`^ {0,${indent.length}}`);
  const text = lines.slice(start + 1, end).map((line) => line.replace(strip, "")).join("\n");
  return { block: { kind: "code", language: info.trim().split(/\s/, 1)[0].slice(0, 30), text }, end: end + 1 };
}

function headingOf(line) {
  const [whole, marks] = HEADING.exec(line);
  const text = line.slice(whole.length).trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  const isClosed = end < text.length && (end === 0 || text[end - 1] === " ");
  return { kind: "heading", level: marks.length, text: isClosed ? text.slice(0, end).trim() : text };
}

function isRule(line) {
  if (line.length > 200) return false;
  const bare = line.replace(/[ \t]/g, "");
  return bare.length >= 3 && "-*_".includes(bare[0]) && bare === bare[0].repeat(bare.length);
}

function quoteFrom(lines, start, depth) {
  let end = start;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inside = lines.slice(start, end).map((line) => line.replace(QUOTE, ""));
  return { block: { kind: "quote", blocks: blocksOf(inside, depth + 1) }, end };
}

function nextFull(lines, from) {
  let next = from;
  while (next < lines.length && !lines[next].trim()) next += 1;
  return next;
}

const indentOf = (line) => line.length - line.trimStart().length;

function listFrom(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const isOrdered = /\d/.test(first[2]), base = first[1].length, items = [];
  let i = start, isLoose = false;
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || /\d/.test(item[2]) !== isOrdered || isRule(lines[i])) break;
    const width = item[3].length > 4 ? item[1].length + item[2].length + 1 : item[0].length;
    const inside = [lines[i].slice(width)];
    i += 1;
    while (i < lines.length) {
      const line = lines[i].replaceAll("\t", "    ");
      // Two columns are enough to belong to an item: models rarely indent as far as the marker is wide.
      const isWithin = indentOf(line) >= base + 2;
      if (!line.trim()) {
        const next = nextFull(lines, i);
        if (next === lines.length || indentOf(lines[next].replaceAll("\t", "    ")) < base + 2) break;
        isLoose = true;
        inside.push("");
        i = next - 1;
      } else if (isWithin) inside.push(line.slice(Math.min(indentOf(line), width)));
      else if (!inside.at(-1).trim() || startsBlock(lines, i, depth) || ITEM.test(line)) break;
      else inside.push(line);
      i += 1;
    }
    items.push(blocksOf(inside, depth + 1));
    const next = nextFull(lines, i);
    const follows = ITEM.exec(lines[next] ?? "");
    if (!follows || /\d/.test(follows[2]) !== isOrdered || isRule(lines[next])) break;
    if (next > i) isLoose = true;
    i = next;
  }
  return { block: { kind: "list", isOrdered, start: isOrdered ? parseInt(first[2], 10) : 1, isLoose, items }, end: i };
}

// ---------------------------------------------------------------- tables

function cellsOf(line) {
  const cells = [];
  let cell = "", isCode = false;
  for (let i = 0; i < line.length; i += 1) {
    if (line[i] === "\\" && line[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (line[i] === "|" && !isCode) {
      cells.push(cell.trim());
      cell = "";
    } else {
      if (line[i] === "`") isCode = !isCode;
      cell += line[i];
    }
  }
  cells.push(cell.trim());
  if (cells[0] === "") cells.shift();
  if (cells.at(-1) === "") cells.pop();
  return cells;
}

function isTable(lines, i) {
  const below = lines[i + 1];
  if (below === undefined || !lines[i].includes("|") || !/^[-:| \t]+$/.test(below) || !below.includes("-")) return false;
  const marks = cellsOf(below);
  return marks.length > 0 && marks.every((mark) => /^:?-+:?$/.test(mark)) && cellsOf(lines[i]).length === marks.length;
}

function tableFrom(lines, start) {
  const head = cellsOf(lines[start]);
  const align = cellsOf(lines[start + 1]).map((mark) =>
    mark.endsWith(":") ? (mark.startsWith(":") ? "centre" : "end") : "start");
  const rows = [];
  let end = start + 2;
  while (end < lines.length && lines[end].includes("|") && rows.length * head.length < MOST_CELLS) {
    const cells = cellsOf(lines[end]);
    rows.push(head.map((_, column) => cells[column] ?? ""));
    end += 1;
  }
  return { block: { kind: "table", head, align, rows }, end };
}

// ---------------------------------------------------------------- nodes

function element(tag, className) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  return made;
}

function nodeOf(block) {
  switch (block.kind) {
    case "code": return codeNode(block);
    case "table": return tableNode(block);
    case "rule": return element("hr");
    case "heading": {
      // The page's own headings end at h2.
      const heading = element(`h${Math.min(6, block.level + 2)}`);
      heading.dir = "auto";
      addInline(heading, block.text);
      return heading;
    }
    case "quote": {
      const quote = element("blockquote");
      quote.append(...block.blocks.map(nodeOf));
      return quote;
    }
    case "list": return listNode(block);
    default: {
      const paragraph = element("p");
      paragraph.dir = "auto";
      addInline(paragraph, block.text);
      return paragraph;
    }
  }
}

function listNode({ isOrdered, start, isLoose, items }) {
  const list = element(isOrdered ? "ol" : "ul");
  if (isOrdered) list.start = start;
  for (const blocks of items) {
    const item = list.appendChild(element("li"));
    item.dir = "auto";
    blocks.forEach((block) => {
      if (block.kind === "paragraph" && !isLoose) {
        const line = item.appendChild(element("span", "line"));
        addInline(line, block.text);
      } else item.append(nodeOf(block));
    });
  }
  return list;
}

function codeNode({ language, text }) {
  const figure = element("div", "code");
  const head = figure.appendChild(element("div", "code-head"));
  const named = head.appendChild(element("span", "code-language"));
  addText(named, language || "text");
  const code = element("code");
  head.append(copyButton("Copy", "Copy this code", () => codeText(code)));
  const pre = figure.appendChild(element("pre"));
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  pre.dir = "ltr";
  pre.append(code);
  addText(code, text);
  return figure;
}

/** What is written in a code block, less the names of characters that are not seen. */
function codeText(code) {
  return [...code.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.data).join("");
}

function tableNode({ head, align, rows }) {
  const holder = element("div", "table");
  holder.tabIndex = 0;
  holder.setAttribute("role", "region");
  holder.setAttribute("aria-label", "Table");
  const table = holder.appendChild(element("table"));
  const addRow = (section, tag, cells) => {
    const row = section.appendChild(element("tr"));
    cells.forEach((text, column) => {
      const cell = row.appendChild(element(tag, `to-${align[column]}`));
      cell.dir = "auto";
      addInline(cell, text.replace(/<br\s*\/?>/gi, "\n"));
    });
  };
  addRow(table.appendChild(element("thead")), "th", head);
  const body = table.appendChild(element("tbody"));
  rows.forEach((cells) => addRow(body, "td", cells));
  return holder;
}
