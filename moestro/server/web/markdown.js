// Text of a model as markdown. It is not to be trusted: HTML in it is shown as text, the rest goes through DOMPurify,
// images become links (nothing is loaded from elsewhere), and links lead to http, https and mailto only.

import { copyFrom, element, icon } from "./dom.js";
import { Marked } from "./marked.esm.js";
import DOMPurify from "./purify.es.mjs";
import { t } from "./strings.js";

const HARMLESS_TAG = /^<(?:br\s*\/?|\/?(?:sub|sup|kbd))>$/i;
const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "input", "kbd", "li", "ol",
  "p", "pre", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul",
];
const RULES = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "start", "title", "type"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escapeHtml = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => (HARMLESS_TAG.test(text.trim()) ? text : escapeHtml(text)),
    image: ({ href, text }) => `<a href="${escapeHtml(href)}">${escapeHtml(text || href)}</a>`,
  },
});

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class") data.keepAttr = node.tagName === "CODE" && /^language-[\w+#.-]+$/.test(data.attrValue);
});
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
  if (node.tagName === "INPUT" && node.getAttribute("type") !== "checkbox") node.remove();
});

function toFragment(tokens) {
  const fragment = DOMPurify.sanitize(marked.parser(tokens), RULES);
  fragment.querySelectorAll("pre").forEach(frameCode);
  fragment.querySelectorAll("table").forEach((table) => {
    const frame = element("div", { class: "table-frame", tabindex: 0, role: "group", "aria-label": t("table") });
    table.replaceWith(frame);
    frame.append(table);
  });
  return fragment;
}

function frameCode(pre) {
  const language = pre.querySelector("code")?.className.replace("language-", "") || "";
  const copy = element("button", { type: "button", class: "quiet", "aria-label": t("copy.code"), title: t("copy.code") }, icon("copy"));
  copy.addEventListener("click", () => copyFrom(copy, pre.textContent.replace(/\n$/, "")));
  const frame = element("div", { class: "code-frame" }, element("div", { class: "code-head" }, element("span", {}, language), copy));
  pre.setAttribute("tabindex", "0"); // so that the keyboard can scroll it
  pre.replaceWith(frame);
  frame.append(pre);
}

/** Grows with a text: blocks that did not change keep their nodes, and with them a selection or a copied button. */
export class Markdown {
  constructor() {
    this.node = element("div", { class: "markdown" });
    this.blocks = [];
    this.source = "";
  }

  /** Text of the blocks that are settled now and were not before. */
  update(source, isLast = false) {
    if (source === this.source && !isLast) return "";
    this.source = source;
    const tokens = marked.lexer(source).filter((token) => token.type !== "space");
    let kept = 0;
    // A reference that is defined at the end changes links before it, so the last time nothing is kept if there is one.
    const isSame = (index) => index < tokens.length && this.blocks[index]?.raw === tokens[index].raw;
    const hasReferences = isLast && tokens.some((token) => token.type === "def");
    while (!hasReferences && isSame(kept)) kept += 1;
    this.blocks.splice(kept).forEach(({ node }) => node.remove());
    tokens.slice(kept).forEach((token) => {
      const node = element("div", { class: "block" });
      node.append(toFragment([token]));
      this.node.append(node);
      this.blocks.push({ raw: token.raw, node, isTold: false });
    });
    return this.tell(isLast);
  }

  tell(isLast) {
    const settled = isLast ? this.blocks : this.blocks.slice(0, -1);
    const news = settled.filter((block) => !block.isTold);
    news.forEach((block) => { block.isTold = true; });
    return news.map(({ node }) => node.textContent.trim()).join("\n");
  }
}
