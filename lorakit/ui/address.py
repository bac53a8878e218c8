"""Scripts of the page. One stores the open tab and run in the page's address, for reloads and links."""

from __future__ import annotations

from urllib.parse import parse_qsl

import gradio as gr

# Values of `?tab=`, in the order of the tabs. Gradio itself uses `?page=`.
TABS = ("photos", "train", "runs", "compare", "try", "adapter")
# The script reads the requested tab and run before Gradio opens its first tab. Afterwards, the address follows the
# display.
_FOLLOW = """
window.lorakitAddress = new URLSearchParams(location.search);
setInterval(() => {
  if (!document.body.dataset.ready) return;
  const buttons = [...document.querySelectorAll('#pages button[role=tab]')], here = new URL(location);
  const tab = %(tabs)s[buttons.findIndex((button) => button.ariaSelected === 'true')];
  const run = document.querySelector('#runs-list [data-run][aria-current]')?.dataset.run;
  if (tab) here.searchParams.set('tab', tab);
  if (run) here.searchParams.set('run', run);
  if (here.href !== location.href) history.replaceState(null, '', here);
}, 500);
"""
_TAB = """() => {
  const number = %(tabs)s.indexOf(window.lorakitAddress?.get('tab'));
  if (number > 0) document.querySelectorAll('#pages button[role=tab]')[number]?.click();
}"""
# If an element with the focus is redrawn, the new element gets the focus. If there is none, the open tab's button gets
# it, so that keyboard users keep their place.
_KEEP_FOCUS = """
let last = '', holder = null;
const PARTS = ['data-run', 'data-exclude', 'data-edit', 'data-file', 'data-picture'];
const selector = (node) => {
  const name = PARTS.find((part) => node.hasAttribute(part));
  if (name) return `[${name}="${CSS.escape(node.getAttribute(name))}"]`;
  const owner = node.closest('[id]');
  if (!owner) return '';
  return `#${CSS.escape(owner.id)}${owner === node ? '' : ` ${node.tagName}`}`;
};
document.addEventListener('pointerdown', () => { last = ''; }, true);
document.addEventListener('focusin', ({target}) => { last = selector(target); holder = target; });
setInterval(() => {
  // Do nothing if another element or the browser's own interface has the focus, or after a click.
  if (document.activeElement !== document.body || !last || !document.hasFocus()) return;
  // An element that still exists gave up the focus itself, as a list of suggestions does after Enter.
  if (holder.isConnected && holder.offsetParent && !holder.disabled) return;
  const node = document.querySelector(last);
  const tab = document.querySelector('#pages button[role=tab][aria-selected=true]');
  (node?.offsetParent && !node.disabled ? node : tab)?.focus({preventScroll: true});
}, 300);
"""
# Gradio sets an English aria-label on its upload boxes. Without it, screen readers read the box's own text.
_NAME_UPLOADS = """
const nameUploads = () => {
  for (const box of document.querySelectorAll('button.upload-container[aria-label]')) box.removeAttribute('aria-label');
};
nameUploads();
new MutationObserver(nameUploads).observe(
  document.body, {childList: true, subtree: true, attributes: true, attributeFilter: ['aria-label']});
"""
_FOLLOW_ADDRESS, OPEN_TAB = (script % {"tabs": list(TABS)} for script in (_FOLLOW, _TAB))
SCRIPTS = _FOLLOW_ADDRESS + _KEEP_FOCUS + _NAME_UPLOADS


def run_in(request: gr.Request) -> str:
    """The name of the run in the page's address, or "" if there is none."""
    query = str(request.headers.get("referer", "")).partition("?")[2]
    return dict(parse_qsl(query)).get("run", "")
