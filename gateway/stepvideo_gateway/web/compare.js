// Two results side by side, in step, and what differs in their settings.
import { h, icon } from './dom.js';
import { settingsShown } from './detail.js';
import { button } from './widgets.js';

const FPS = 25;

export async function openCompare(app) {
  const { words, store, actions } = app;
  const { t } = words;
  const videos = store.state.compared.map((id) => store.state.videos.get(id)).filter(Boolean);
  if (videos.length < 2) return;
  const urls = await Promise.all(videos.map((video) => actions.video(video.id)));
  if (urls.includes(null)) return;
  const screens = urls.map((src, index) => h('video', { src, muted: true, playsInline: true, preload: 'auto', 'aria-label': `${'AB'[index]}: ${videos[index].prompt}` }));
  const player = makePlayer(words, screens);
  const shown = videos.map((video) => settingsShown(words, video));
  const panes = screens.map((screen, index) => h('figure', {}, screen, h('figcaption', {}, h('strong', {}, 'AB'[index]), ' ', shown[index].prompt)));
  const close = button('', () => dialog.close(), { kind: 'quiet', picture: 'close', label: t('detail.close') });
  const dialog = h('dialog', { class: 'panel compare', 'aria-label': t('compare.title') },
    h('header', { class: 'part-head' }, h('h2', {}, t('compare.title')), close), h('div', { class: 'panes' }, panes), player.node, differences(words, shown));
  dialog.addEventListener('keydown', player.key);
  dialog.addEventListener('close', () => {
    player.stop();
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  player.focus();
}

function differences(words, [first, second]) {
  const { t } = words;
  const names = Object.keys(first).filter((name) => first[name] !== second[name]);
  if (!names.length) return h('p', { class: 'hint' }, t('compare.same'));
  const cell = (value) => h('td', {}, value || h('em', {}, t('compare.none')));
  return h('table', { class: 'differences' }, h('caption', {}, t('compare.differs')),
    h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, t('compare.setting')), h('th', { scope: 'col' }, 'A'), h('th', { scope: 'col' }, 'B'))),
    h('tbody', {}, names.map((name) => h('tr', {}, h('th', { scope: 'row' }, t(`names.${name}`)), cell(first[name]), cell(second[name])))));
}

/** Plays both by one clock, which is the longer video's; the shorter one waits at its last frame. */
function makePlayer({ t }, screens) {
  let playing = false;
  let drawing = 0;
  const playText = h('span', {});
  const play = h('button', { type: 'button', class: 'button main', on: { click: toggle } }, playText);
  const bar = h('input', { type: 'range', min: 0, max: 1, step: 1 / FPS, value: 0, 'aria-label': t('compare.time'), on: { input: () => seek(Number(bar.value)) } });
  const slow = h('input', { type: 'checkbox', on: { change: () => screens.forEach((screen) => (screen.playbackRate = slow.checked ? 0.5 : 1)) } });
  const node = h('div', { class: 'player' }, play,
    button('', () => step(-1), { kind: 'quiet', picture: 'back', label: t('compare.back') }), bar,
    button('', () => step(1), { kind: 'quiet', picture: 'forward', label: t('compare.forward') }),
    h('label', { class: 'check' }, slow, t('compare.slow')), h('p', { class: 'hint' }, t('compare.keys')));
  const length = (screen) => (Number.isFinite(screen.duration) ? screen.duration : 0);
  const leader = () => (length(screens[0]) >= length(screens[1]) ? screens[0] : screens[1]);
  const follower = () => screens.find((screen) => screen !== leader());

  function label() {
    playText.replaceChildren(icon(playing ? 'pause' : 'play'), t(playing ? 'compare.pause' : 'compare.play'));
  }

  function toggle() {
    playing = !playing;
    label();
    if (playing && leader().ended) seek(0);
    for (const screen of screens) {
      if (!playing) screen.pause();
      else if (!screen.ended) screen.play().catch(() => {});
    }
    if (!playing) seek(leader().currentTime);
    else tick();
  }

  /** Brings the follower back where it has drifted by a frame, and begins both anew at the end. */
  function tick() {
    if (!playing) return;
    const lead = leader();
    const other = follower();
    if (lead.ended) {
      seek(0);
      for (const screen of screens) screen.play().catch(() => {});
    } else if (lead.currentTime < length(other) && Math.abs(other.currentTime - lead.currentTime) > 1 / FPS) {
      other.currentTime = lead.currentTime;
    }
    bar.value = lead.currentTime;
    drawing = requestAnimationFrame(tick);
  }

  function seek(seconds) {
    const at = Math.min(Math.max(seconds, 0), length(leader()));
    // The middle of a frame: at its border, the two might show neighbours.
    const frame = Math.floor(at * FPS + 0.001);
    for (const screen of screens) screen.currentTime = Math.min((frame + 0.5) / FPS, Math.max(length(screen) - 0.5 / FPS, 0));
    bar.value = at;
  }

  function step(frames) {
    if (playing) toggle();
    seek(Math.floor(leader().currentTime * FPS + 0.001) / FPS + (frames + 0.01) / FPS);
  }

  function key(event) {
    if (event.target instanceof HTMLInputElement && event.target.type === 'checkbox') return;
    if (event.key === ' ' && event.target.tagName !== 'BUTTON') toggle();
    else if (event.key === 'ArrowLeft') step(-1);
    else if (event.key === 'ArrowRight') step(1);
    else return;
    event.preventDefault();
  }

  for (const screen of screens) {
    screen.addEventListener('loadedmetadata', () => {
      bar.max = length(leader());
      seek(0);
    });
  }
  label();
  return {
    node,
    key,
    focus: () => play.focus(),
    stop() {
      playing = false;
      cancelAnimationFrame(drawing);
      for (const screen of screens) screen.pause();
    },
  };
}
