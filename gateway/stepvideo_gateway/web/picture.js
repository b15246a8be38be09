// The first image: dropped, pasted, chosen or taken by the camera, with the crop that the model sees drawn on it. A
// finished video that is dropped here gives its settings.
import { h, icon, say } from './dom.js';
import { settingsIn } from './mp4.js';
import { cropOf, sidesOf } from './sizes.js';
import { button } from './widgets.js';
import { openCamera } from './shot.js';

const KINDS = ['image/png', 'image/jpeg', 'image/webp'];

/** `sizeNow()`: of the video that the form describes. */
export function makePicture(app, sizeNow) {
  const { draft, words, messages } = app;
  const { t } = words;
  const chooser = h('input', {
    type: 'file', class: 'unseen', tabIndex: -1, accept: `${KINDS.join()},video/mp4`, 'aria-label': t('picture.choose'),
    on: { change: () => { void take(chooser.files[0]); chooser.value = ''; } },
  });
  const image = h('img', { alt: t('picture.alt') });
  const crop = h('div', { class: 'crop', 'aria-hidden': 'true' });
  const framed = h('div', { class: 'framed' }, image, crop);
  const caption = h('p', { class: 'hint', id: 'picture-hint', 'aria-live': 'polite' });
  const wrong = h('p', { class: 'wrong', hidden: true, role: 'alert' });
  const empty = h('div', { class: 'drop-empty' },
    icon('image'), h('p', { class: 'drop-title' }, t('picture.drop')),
    h('p', { class: 'drop-ways' }, `${t('picture.or')} `,
      button(t('picture.choose'), () => chooser.click(), { kind: 'link' }), ' · ',
      button(t('picture.camera'), shoot, { kind: 'link' })),
    h('p', { class: 'hint' }, t('picture.readBack')));
  const tools = h('div', { class: 'tools' },
    button(t('picture.replace'), () => chooser.click()), button(t('picture.camera'), shoot),
    button(t('picture.remove'), () => { draft.setPicture(null); chooser.focus(); }));
  const zone = h('div', { class: 'drop' }, empty, framed);
  const node = h('section', { class: 'picture', 'aria-label': t('compose.picture') },
    h('h3', {}, t('compose.picture')), zone, caption, wrong, tools, chooser);
  let url = null;

  async function take(file) {
    if (!file) return;
    complain('');
    if (file.type === 'video/mp4') await readBack(file);
    else if (KINDS.includes(file.type) && (await shows(file))) draft.setPicture(file);
    else complain(t('picture.kind'));
  }

  async function readBack(file) {
    const settings = await settingsIn(file);
    if (!settings) {
      messages.warn(t('compose.noSettings'));
      return;
    }
    draft.take(settings, app.store.state.about?.cameras);
    const first = await firstFrame(file).catch(() => null);
    if (first) draft.setPicture(first);
    messages.note(t('compose.readBack'));
  }

  function complain(text) {
    say(wrong, text);
    wrong.hidden = !text;
  }

  function shoot() {
    openCamera(words).then((blob) => blob && draft.setPicture(blob)).catch(() => complain(t('picture.cameraNo')));
  }

  function show() {
    const there = Boolean(draft.picture);
    for (const [part, shown] of [[empty, !there], [framed, there], [tools, there], [caption, there]]) part.hidden = !shown;
    zone.classList.toggle('full', there);
    if (url) URL.revokeObjectURL(url);
    url = there ? URL.createObjectURL(draft.picture) : null;
    if (there) {
      complain('');
      image.src = url;
    } else image.removeAttribute('src');
  }

  /** Draws what the model sees. */
  function drawCrop() {
    const size = sizeNow();
    if (!image.naturalWidth || !draft.picture || !size) return;
    const part = cropOf({ width: image.naturalWidth, height: image.naturalHeight }, size);
    for (const side of ['left', 'top', 'width', 'height']) crop.style[side] = `${part[side] * 100}%`;
    const [w, hgt] = sidesOf(size);
    const cut = part.width < 0.995 || part.height < 0.995;
    say(caption, `${t(cut ? 'picture.sees' : 'picture.whole', { w, h: hgt })}${part.enlarged ? ` ${t('picture.small')}` : ''}`);
  }

  image.addEventListener('load', drawCrop);
  const stops = [draft.subscribe((what) => (what === 'picture' ? show() : drawCrop())), catchFiles(zone, take)];
  show();
  return { node, complain, drawCrop, take, focus: () => (draft.picture ? tools : empty).querySelector('button').focus(), stop: () => stops.forEach((stop) => stop()) };
}

/** Files that are dropped anywhere on the page, or pasted. */
function catchFiles(zone, take) {
  const offers = (event) => [...(event.dataTransfer?.types ?? [])].includes('Files');
  const on = {
    dragover(event) {
      if (!offers(event)) return;
      event.preventDefault();
      zone.classList.add('over');
    },
    dragleave(event) {
      if (!event.relatedTarget) zone.classList.remove('over');
    },
    drop(event) {
      zone.classList.remove('over');
      if (!offers(event)) return;
      event.preventDefault();
      void take(event.dataTransfer.files[0]);
    },
    paste(event) {
      const file = [...(event.clipboardData?.files ?? [])][0];
      if (!file) return;
      event.preventDefault();
      void take(file);
    },
  };
  for (const [name, act] of Object.entries(on)) document.addEventListener(name, act);
  return () => Object.entries(on).forEach(([name, act]) => document.removeEventListener(name, act));
}

async function shows(file) {
  try {
    (await createImageBitmap(file)).close();
    return true;
  } catch {
    return false;
  }
}

/** The first frame of a video as PNG. */
export async function firstFrame(file) {
  const url = URL.createObjectURL(file);
  const video = h('video', { muted: true, preload: 'auto', src: url });
  try {
    await new Promise((resolve, reject) => {
      video.onloadeddata = resolve;
      video.onerror = () => reject(new Error('the video cannot be shown'));
    });
    const canvas = h('canvas', { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext('2d').drawImage(video, 0, 0);
    return await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
  } finally {
    URL.revokeObjectURL(url);
  }
}
