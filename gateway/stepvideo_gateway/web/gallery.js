// Finished and failed videos: found again, looked at, chosen for a comparison.
import { h, icon, keyed, say } from './dom.js';
import { isActive } from './store.js';
import { button, choice } from './widgets.js';

export function makeGallery(app) {
  const { words, store, feed, messages } = app;
  const { t } = words;
  const { state } = store;
  const search = h('input', { type: 'search', placeholder: t('gallery.search'), 'aria-label': t('gallery.search'), value: state.filter.text, on: { input: () => filter({ text: search.value }) } });
  const kinds = choice(t('gallery.title'), 'status', ['all', 'completed', 'failed'].map((value) => ({ value, content: t(`gallery.${value === 'completed' ? 'done' : value}`) })), (value) => filter({ status: value }), 'small tabs');
  kinds.caption.className = 'unseen';
  const tools = h('div', { class: 'find' }, h('span', { class: 'search' }, icon('search'), search), kinds.node);
  const grid = h('ul', { class: 'grid' });
  const empty = h('div', { class: 'empty', hidden: true });
  const more = button(t('gallery.more'), () => feed.older().catch(messages.problem));
  const pickedText = h('span', { 'aria-live': 'polite' });
  const compare = button(t('gallery.compare'), () => app.openCompare(), { kind: 'main' });
  const stop = button(t('gallery.stop'), () => pick(null));
  const tray = h('div', { class: 'tray', hidden: true }, pickedText, compare, stop);
  const node = h('section', { class: 'gallery', id: 'videos', tabIndex: -1, 'aria-label': t('gallery.title') },
    h('header', { class: 'part-head' }, h('h2', {}, t('gallery.title')), tools), grid, empty, more, tray);

  function filter(change) {
    Object.assign(state.filter, change);
    store.changed();
  }

  /** Chooses a video for the comparison, or lets go of it; null: of all. */
  function pick(id) {
    if (id === null) state.compared = [];
    else if (state.compared.includes(id)) state.compared = state.compared.filter((other) => other !== id);
    else state.compared = [...state.compared.slice(-1), id];
    store.changed();
  }

  function matches(video) {
    const { text, status } = state.filter;
    const words_ = text.trim().toLowerCase().split(/\s+/);
    const about = `${video.prompt} ${video.seed ?? ''} ${video.size} ${video.settings.quality ?? 'exact'}`.toLowerCase();
    return (status === 'all' || video.status === status) && words_.every((word) => about.includes(word));
  }

  function show() {
    const ended = store.newestFirst().filter((video) => !isActive(video));
    const shown = ended.filter(matches);
    kinds.set(state.filter.status);
    keyed(grid, shown, (video) => video.id, (video) => makeTile(app, video, pick));
    tools.hidden = !ended.length;
    more.hidden = !state.older;
    nothing(ended, shown);
    tray.hidden = !state.compared.length;
    compare.hidden = state.compared.length < 2;
    say(pickedText, state.compared.length < 2 ? t('gallery.pickOne') : t('gallery.picked'));
  }

  function nothing(ended, shown) {
    empty.hidden = shown.length > 0;
    if (shown.length) return;
    const working = [...state.videos.values()].some(isActive);
    const kind = !state.loaded ? 'loading' : ended.length ? 'noMatch' : working ? 'work' : 'first';
    if (empty.dataset.kind === kind) return;
    empty.dataset.kind = kind;
    if (kind === 'loading') empty.replaceChildren(h('p', {}, t('gallery.loading')));
    else if (kind === 'noMatch') empty.replaceChildren(h('h3', {}, t('gallery.noMatch')), h('p', {}, t('gallery.noMatchText')), button(t('gallery.clear'), () => { search.value = ''; filter({ text: '', status: 'all' }); }));
    else empty.replaceChildren(icon('play'), h('h3', {}, t('gallery.empty')), h('p', {}, t(kind === 'work' ? 'gallery.emptyWork' : 'gallery.emptyText')));
  }

  const stops = [store.subscribe(show)];
  show();
  return { node, stop: () => stops.forEach((each) => each()) };
}

function makeTile(app, { id, prompt, size, status, seconds, seed, error, settings }, pick) {
  const { words, store, actions } = app;
  const { t } = words;
  const screen = h('span', { class: 'screen' });
  const [width, height] = size.split('x');
  screen.style.aspectRatio = `${width} / ${height}`;
  const failed = status === 'failed';
  const open = h('button', { type: 'button', class: 'open', 'aria-label': t('gallery.open', { prompt }), on: { click: () => app.openDetail(id) } }, screen);
  const box = h('input', { type: 'checkbox', on: { change: () => pick(id) } });
  const quality = settings.quality ?? 'exact';
  const facts = failed
    ? h('p', { class: 'facts failed' }, words.problem(error).what)
    : h('p', { class: 'facts' }, [`${size.replace('x', ' × ')}`, t('length.value', { s: Number(seconds).toFixed(1) }), `#${seed}`, t(`preset.${quality}`)?.[0] ?? quality].join(' · '));
  const node = h('li', { class: `tile ${status}`, dataset: { id } }, open,
    h('div', { class: 'under' }, h('p', { class: 'prompt-line', title: prompt }, prompt), facts),
    !failed && h('label', { class: 'pick' }, box, h('span', {}, t('gallery.pick'))));
  void fill(actions, id, failed, screen);
  playOnHover(actions, id, failed, node, screen);
  return {
    node,
    update() {
      box.checked = store.state.compared.includes(id);
      node.classList.toggle('picked', box.checked);
    },
  };
}

async function fill(actions, id, failed, screen) {
  const url = await (failed ? actions.picture(id) : actions.thumbnail(id));
  if (url) screen.prepend(h('img', { src: url, alt: '', loading: 'lazy' }));
}

/** A finished video plays while the mouse is over it, or its button has the focus, where motion is welcome. */
function playOnHover(actions, id, failed, node, screen) {
  if (failed || matchMedia('(prefers-reduced-motion: reduce)').matches) return;
  let video = null;
  let wanted = false;
  async function begin() {
    wanted = true;
    const url = await actions.video(id);
    if (!url || !wanted || video) return;
    video = h('video', { src: url, muted: true, loop: true, playsInline: true, 'aria-hidden': 'true', tabIndex: -1 });
    screen.append(video);
    video.play().catch(() => end());
  }
  function end() {
    wanted = false;
    video?.remove();
    video = null;
  }
  node.addEventListener('pointerenter', (event) => event.pointerType === 'mouse' && void begin());
  node.addEventListener('pointerleave', end);
}
