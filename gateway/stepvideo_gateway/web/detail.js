// One video, large: player, settings, and what can be done with it.
import { h } from './dom.js';
import { button, problemText, sureButton } from './widgets.js';

const SHOWN = ['size', 'num_frames', 'num_inference_steps', 'guidance_scale', 'flow_shift', 'motion_score', 'quality', 'seed', 'negative_prompt'];

/** Every setting of a video under its name, as text; the server's choice is left out. */
export function settingsShown(words, video) {
  const values = { ...video.settings, seed: video.seed, prompt: video.prompt };
  return Object.fromEntries(['prompt', ...SHOWN].map((name) => {
    const value = name === 'quality' ? (words.t(`preset.${values.quality ?? 'exact'}`)?.[0] ?? values.quality) : values[name];
    return [name, value === null || value === undefined ? '' : String(value).replace(/^(\d+)x(\d+)$/, '$1 × $2')];
  }));
}

export function openDetail(app, id) {
  const { words, store, actions } = app;
  const { t, duration, date } = words;
  const video = store.state.videos.get(id);
  if (!video) return;
  const done = video.status === 'completed';
  const screen = h('div', { class: 'stage' });
  const [width, height] = video.size.split('x');
  screen.style.aspectRatio = `${width} / ${height}`;
  screen.style.setProperty('--ratio', width / height);
  const close = button('', () => dialog.close(), { kind: 'quiet', picture: 'close', label: t('detail.close') });
  const rows = Object.entries(settingsShown(words, video)).filter(([name, value]) => value && name !== 'prompt')
    .map(([name, value]) => h('div', {}, h('dt', {}, t(`names.${name}`)), h('dd', {}, value)));
  const facts = [date(video.created_at), video.took_s && t('detail.took', { time: duration(video.took_s) }), video.expires_at && t('detail.expires', { date: date(video.expires_at) })];
  const remarks = video.warnings.length > 0 && h('details', { class: 'disclosure' }, h('summary', {}, h('span', {}, t('detail.warnings'))), h('ul', {}, video.warnings.map((text) => h('li', {}, text))));
  const side = h('div', { class: 'side' },
    h('h2', { class: 'detail-prompt' }, video.prompt),
    video.status === 'failed' && h('div', { class: 'message bad' }, h('div', {}, problemText(words, video.error))),
    actionsOf(app, video, done, () => dialog.close()),
    h('dl', { class: 'settings', 'aria-label': t('detail.settings') }, rows), remarks,
    h('p', { class: 'hint' }, facts.filter(Boolean).join(' · ')));
  const dialog = h('dialog', { class: 'panel detail', 'aria-label': t('detail.title') }, close, h('div', { class: 'columns' }, screen, side));
  dialog.addEventListener('close', () => {
    stop();
    dialog.remove();
  });
  dialog.addEventListener('click', (event) => event.target === dialog && dialog.close());
  const stop = store.subscribe((state) => state.videos.has(id) || dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  void fill(app, video, done, screen);
}

async function fill({ actions }, video, done, screen) {
  const url = await (done ? actions.video(video.id) : actions.picture(video.id));
  if (!url) return;
  if (!done) screen.append(h('img', { src: url, alt: '' }));
  else screen.append(h('video', { src: url, controls: true, loop: true, autoplay: !matchMedia('(prefers-reduced-motion: reduce)').matches, muted: true, playsInline: true, 'aria-label': video.prompt }));
}

function actionsOf(app, video, done, close) {
  const { words, actions } = app;
  const { t } = words;
  const act = (what) => () => {
    close();
    void what(video);
  };
  const intoForm = (what) => async () => {
    close();
    await what(video);
    app.showCompose();
  };
  const parts = [
    done && button(t('detail.download'), () => void download(app, video), { kind: 'main', picture: 'download' }),
    done && actions.isDraft(video) && button(t('detail.full'), act(actions.full), { kind: 'accent' }),
    done && button(t('detail.next'), intoForm(actions.next)),
    button(t('detail.same'), intoForm(actions.same)),
    video.seed !== null && button(t('detail.seed'), intoForm(actions.useSeed)),
    done && button(t('detail.four'), act(actions.four)),
    !done && button(t('detail.again'), act(actions.again)),
    sureButton(words, { label: t('detail.remove'), question: t('detail.removeSure'), yes: t('detail.remove'), no: t('running.no') }, act(() => actions.remove(video.id)), { picture: 'trash' }),
  ];
  return h('div', { class: 'acts' }, parts);
}

async function download({ actions }, video) {
  const url = await actions.video(video.id);
  if (url) h('a', { href: url, download: `${video.id}.mp4` }).click();
}
