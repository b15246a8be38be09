// Elements, without markup in strings: what users and servers write stays text.

/** An element. `props`: properties, `class`, `dataset`, `on` (listeners), and attributes with a dash or `role`, `for`. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === 'class') node.className = value;
    else if (name === 'on') for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name === 'dataset') Object.assign(node.dataset, value);
    else if (name.includes('-') || ['role', 'for', 'list', 'id'].includes(name)) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const DRAWN = {
  close: 'M5 5l10 10M15 5L5 15',
  dice: 'M4 4h12v12H4zM7.5 7.5v.01M12.5 7.5v.01M10 10v.01M7.5 12.5v.01M12.5 12.5v.01',
  play: 'M7 5l8 5-8 5z',
  pause: 'M7 5v10M13 5v10',
  back: 'M12 5l-5 5 5 5',
  forward: 'M8 5l5 5-5 5',
  download: 'M10 3v9M6 9l4 4 4-4M4 16h12',
  trash: 'M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10',
  image: 'M3 5h14v11H3zM3 13l4-4 4 4 2-2 4 4M13 8.5v.01',
  search: 'M9 4a5 5 0 100 10A5 5 0 009 4zM13 13l4 4',
  key: 'M7 8a3 3 0 110 5.5A3 3 0 017 8zM10 11h7M15 11v3',
};

/** A small line drawing; what it means must stand beside it, or in the label of its button. */
export function icon(name) {
  const space = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(space, 'svg');
  svg.setAttribute('viewBox', '0 0 20 20');
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS(space, 'path');
  path.setAttribute('d', DRAWN[name]);
  svg.append(path);
  return svg;
}

/** Brings the children of `parent` in line with `items`: nodes of known keys stay where they are, with their focus. */
export function keyed(parent, items, keyOf, make) {
  const known = parent.keyedParts ?? (parent.keyedParts = new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, part] of known) {
    if (wanted.has(key)) continue;
    part.node.remove();
    part.gone?.();
    known.delete(key);
  }
  let before = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    let part = known.get(key);
    if (!part) known.set(key, (part = make(item)));
    part.update(item);
    if (part.node === before) before = before.nextSibling;
    else parent.insertBefore(part.node, before);
  }
}

/** Sets a text only where it differs, so that screen readers hear changes alone. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

let numbered = 0;

/** An id for a label and its field. */
export function freshId(word) {
  numbered += 1;
  return `${word}-${numbered}`;
}
