// Size and length of the video.
import { h, say } from './dom.js';
import { lengths, offered, shaped, sidesOf, tokensOf } from './sizes.js';
import { choice, field } from './widgets.js';

const NAMES = ['wide', 'square', 'tall', 'like', 'own'];

export function makeLook(app) {
  const { draft, words, store } = app;
  const { t } = words;
  let ratio = null; // of the picture
  let own = false; // whether the sides are written by hand

  const faces = Object.fromEntries(NAMES.map((name) => [name, h('span', { class: `ratio ${name}`, 'aria-hidden': 'true' })]));
  const figures = Object.fromEntries(NAMES.map((name) => [name, h('small', {})]));
  const options = NAMES.map((name) => ({ value: name, content: [faces[name], h('span', {}, t(`size.${name}`)), figures[name]] }));
  const kinds = choice(t('size.title'), 'size', options, choose, 'sizes');
  const width = sideField('width');
  const height = sideField('height');
  const sides = h('div', { class: 'pair' }, width.node, height.node);
  const length = h('input', { type: 'range', min: 1, step: 1, on: { input: lengthen } });
  const lengthPart = field(t('length.title'), length);
  const lengthValue = h('output', { class: 'value' });
  lengthPart.node.querySelector('label').append(lengthValue);
  const wrong = h('p', { class: 'wrong', hidden: true, role: 'alert' });
  const node = h('section', { 'aria-label': t('compose.look') }, h('h3', {}, t('compose.look')), kinds.node, sides, lengthPart.node, wrong);

  function sideField(name) {
    const input = h('input', { type: 'number', inputMode: 'numeric', on: { change: () => draft.set({ size: `${width.control.value || 0}x${height.control.value || 0}` }) } });
    return field(t(`size.${name}`), input);
  }

  const about = () => store.state.about;
  const server = () => about()?.server;

  function sizes() {
    const { defaults, limits } = server();
    const unit = about().pixels_per_unit;
    const base = `${defaults.width}x${defaults.height}`;
    return { ...offered(defaults, unit, limits), ...(ratio ? { like: shaped(base, ratio, unit, limits) } : {}) };
  }

  function choose(name) {
    own = name === 'own';
    draft.set({ size: own ? sizeNow() : sizes()[name] });
  }

  function lengthen() {
    draft.set({ num_frames: Number(length.value) * about().frames_per_unit });
  }

  /** The size that the form describes; null while no server has told its own. */
  function sizeNow() {
    if (draft.fields.size) return draft.fields.size;
    return server() ? `${server().defaults.width}x${server().defaults.height}` : null;
  }

  function show() {
    node.classList.toggle('unknown', !server());
    if (!server()) return;
    const { defaults, limits } = server();
    const known = sizes();
    const now = sizeNow();
    const found = Object.keys(known).find((name) => known[name] === now);
    const name = own || !found ? 'own' : found;
    kinds.set(name);
    for (const [index, each] of NAMES.entries()) {
      kinds.cards[index].hidden = each === 'like' && !ratio;
      say(figures[each], each === 'own' ? '' : (known[each] ?? '').replace('x', ' × '));
    }
    sides.hidden = name !== 'own';
    const unit = about().pixels_per_unit;
    for (const [part, value, most] of [[width, sidesOf(now)[0], limits.max_width], [height, sidesOf(now)[1], limits.max_height]]) {
      Object.assign(part.control, { min: 2 * unit, max: most, step: unit });
      if (document.activeElement !== part.control) part.control.value = value;
      part.hint(t('size.unit', { n: unit }));
    }
    const steps = about().frames_per_unit;
    const frames = Number(draft.fields.num_frames || defaults.num_frames);
    const most = lengths(steps, limits.max_frames).filter((each) => tokensOf(now, each) <= limits.max_tokens).length;
    length.max = Math.max(most, frames / steps, 1);
    length.value = frames / steps;
    const s = (frames / about().fps).toFixed(1);
    say(lengthValue, t('length.value', { s }));
    lengthPart.hint(t('length.frames', { n: frames, fps: about().fps }));
    length.setAttribute('aria-valuetext', t('length.value', { s }));
  }

  function seePicture() {
    ratio = null;
    if (!draft.picture) {
      show();
      return;
    }
    createImageBitmap(draft.picture).then((bitmap) => {
      ratio = bitmap.width / bitmap.height;
      bitmap.close();
      show();
    }, show);
  }

  const stops = [draft.subscribe((what) => (what === 'picture' ? seePicture() : show())), store.subscribe(show)];
  seePicture();
  return {
    node,
    sizeNow,
    complain(text) {
      say(wrong, text);
      wrong.hidden = !text;
    },
    stop: () => stops.forEach((stop) => stop()),
  };
}

