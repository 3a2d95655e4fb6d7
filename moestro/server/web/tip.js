// The one floating panel: beside a token or a cell, never over it, never off the screen.

import { byId } from "./dom.js";

const tip = byId("tip");
const GAP = 8;

/** `box`: what it belongs to, in client coordinates ({ left, right, top, bottom }). */
export function showTip(box, nodes) {
  tip.replaceChildren(...nodes);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(GAP, Math.min(box.left, innerWidth - width - GAP));
  const below = box.bottom + GAP;
  const above = box.top - height - GAP;
  const top = below + height <= innerHeight || above < GAP ? Math.min(below, innerHeight - height - GAP) : above;
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(Math.max(GAP, top))}px)`;
}

export function hideTip() {
  tip.hidden = true;
}
