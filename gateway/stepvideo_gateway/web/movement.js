// The pickers that explain themselves: camera movements, each shown by a small moving scene, and the motion score.
import { h, say } from './dom.js';
import { choice, field } from './widgets.js';

const CALM = 3;
const NATURAL = 7;
const LIVELY = 12;
const USUAL_MOST = 20; // the model's card names scores up to here; the server may allow more

/** A picker of the movements that the gateway names; hidden until they are known. */
export function makeCamera(app) {
  const { draft, words, store } = app;
  const { t } = words;
  const node = h('details', { class: 'disclosure' });
  const now = h('span', { class: 'now' });
  const explained = h('p', { class: 'hint', 'aria-live': 'polite' });
  node.append(h('summary', {}, h('span', {}, t('camera.title')), now));
  let picker = null;

  function build() {
    const cameras = store.state.about?.cameras;
    if (picker || !cameras) return;
    const options = ['', ...Object.keys(cameras)].map((value) => {
      const [name, text] = value ? (t(`camera.names.${value}`) ?? [value, '']) : [t('camera.none'), t('camera.noneText')];
      return { value, title: text, content: [h('span', { class: 'shot-scene', dataset: { move: value || 'none' }, 'aria-hidden': 'true' }, h('i')), h('span', {}, name)] };
    });
    picker = choice(t('camera.title'), 'camera', options, (value) => draft.set({ camera: value }), 'movements');
    picker.caption.className = 'unseen';
    node.append(picker.node, explained);
    show();
  }

  function show() {
    if (!picker) return;
    const { camera } = draft.fields;
    const [name, text] = camera ? (t(`camera.names.${camera}`) ?? [camera, '']) : [t('camera.none'), t('camera.noneText')];
    picker.set(camera);
    say(now, name);
    say(explained, camera ? `${text} ${t('camera.adds', { phrase: store.state.about.cameras[camera] })}` : text);
  }

  const stops = [draft.subscribe(show), store.subscribe(build)];
  build();
  return { node, stop: () => stops.forEach((stop) => stop()) };
}

/** The motion score, with a dot that moves as much. */
export function makeMotion(app) {
  const { draft, words, store } = app;
  const { t } = words;
  const slider = h('input', { type: 'range', min: 0, max: USUAL_MOST, step: 1, on: { input: () => draft.set({ motion_score: slider.value }) } });
  const part = field(t('motion.title'), slider);
  const value = h('output', { class: 'value' });
  const dot = h('span', { class: 'motion-dot', 'aria-hidden': 'true' }, h('i'));
  part.node.querySelector('label').append(value);
  part.node.insertBefore(dot, part.node.querySelector('.hint'));

  function show() {
    const most = store.state.about?.server?.limits.motion_score[1] ?? USUAL_MOST;
    const given = draft.fields.motion_score === '' ? (store.state.about?.server?.defaults.motion_score ?? 5) : Number(draft.fields.motion_score);
    slider.max = Math.min(most, Math.max(USUAL_MOST, given));
    slider.value = given;
    const kind = given < CALM ? 'calm' : given <= NATURAL ? 'natural' : given <= LIVELY ? 'lively' : 'intense';
    say(value, `${given} · ${t(`motion.${kind}`)}`);
    part.hint(t(`motion.${kind}Text`));
    slider.setAttribute('aria-valuetext', `${given}, ${t(`motion.${kind}`)}`);
    dot.style.setProperty('--beat', `${(6 / (1 + given / 2)).toFixed(2)}s`);
    dot.classList.toggle('still', given === 0);
  }

  const stops = [draft.subscribe(show), store.subscribe(show)];
  show();
  return { ...part, stop: () => stops.forEach((stop) => stop()) };
}
