// Reads the settings that the gateway has written into an mp4 (moov/udta/meta/ilst, "©cmt").

const CONTAINERS = new Set(['moov', 'udta', 'ilst']);
const COMMENT = '\u00a9cmt';
const OPTIONS = { steps: 'num_inference_steps', cfg_scale: 'guidance_scale', time_shift: 'flow_shift' };

function* boxes(view, begin, end) {
  let at = begin;
  while (at + 8 <= end) {
    let size = view.getUint32(at);
    const kind = String.fromCharCode(...new Uint8Array(view.buffer, view.byteOffset + at + 4, 4));
    let head = 8;
    if (size === 1 && at + 16 <= end) {
      size = Number(view.getBigUint64(at + 8));
      head = 16;
    } else if (size === 0) size = end - at;
    if (size < head || at + size > end) return;
    yield { kind, begin: at + head, end: at + size };
    at += size;
  }
}

function find(view, begin, end) {
  for (const box of boxes(view, begin, end)) {
    if (box.kind === COMMENT) {
      for (const data of boxes(view, box.begin, box.end)) {
        if (data.kind === 'data') return new Uint8Array(view.buffer, view.byteOffset + data.begin + 8, data.end - data.begin - 8);
      }
    }
    const inside = box.kind === 'meta' ? box.begin + 4 : box.begin;
    if (CONTAINERS.has(box.kind) || box.kind === 'meta') {
      const found = find(view, inside, box.end);
      if (found) return found;
    }
  }
  return null;
}

/** The fields of the API that made this file; null where it has none. */
export async function settingsIn(file) {
  const view = new DataView(await file.arrayBuffer());
  const comment = find(view, 0, view.byteLength);
  if (!comment) return null;
  try {
    const { prompt, height, width, model: _model, ...options } = JSON.parse(new TextDecoder().decode(comment));
    if (typeof prompt !== 'string') return null;
    const named = Object.entries(options).map(([name, value]) => [OPTIONS[name] ?? name, value]);
    return { prompt, ...(height && width ? { size: `${width}x${height}` } : {}), ...Object.fromEntries(named) };
  } catch {
    return null;
  }
}
