// What is under way: place, time left, step, the moving preview, and a way to stop it.
import { h, keyed, say } from './dom.js';
import { isActive } from './store.js';
import { sureButton } from './widgets.js';

export function makeRunning(app) {
  const { words, store, pace } = app;
  const { t } = words;
  const list = h('ul', { class: 'works' });
  const node = h('section', { class: 'running', id: 'running', 'aria-label': t('running.title'), hidden: true }, h('h2', {}, t('running.title')), list);

  function show() {
    const active = store.newestFirst().filter(isActive).reverse();
    for (const video of active) pace.note(video);
    node.hidden = !active.length;
    keyed(list, active, (video) => video.id, (video) => makeCard(app, video));
    title(active);
  }

  /** The tab's title says how far the first one is. */
  function title(active) {
    const first = active.find((video) => video.status === 'in_progress');
    document.title = `${first ? `${first.progress} % · ` : ''}Step-Video`;
  }

  const stops = [store.subscribe(show)];
  const ticking = setInterval(show, 1000);
  show();
  return {
    node,
    stop() {
      clearInterval(ticking);
      stops.forEach((stop) => stop());
    },
  };
}

function makeCard(app, { id, prompt, size }) {
  const { words, store, pace, actions } = app;
  const { t, duration } = words;
  const image = h('img', { alt: '', hidden: true });
  const first = h('img', { alt: '', class: 'first', hidden: true });
  const screen = h('div', { class: 'screen' }, first, image);
  const [width, height] = size.split('x');
  screen.style.aspectRatio = `${width} / ${height}`;
  const state = h('p', { class: 'state' });
  const rest = h('p', { class: 'rest' });
  const bar = h('progress', { max: 100, 'aria-label': prompt });
  const cancel = sureButton(words, { label: t('running.cancel'), question: t('running.cancelSure'), yes: t('running.yes'), no: t('running.no') }, () => actions.cancel(id));
  const node = h('li', { class: 'panel work', dataset: { id } }, screen,
    h('div', { class: 'told' }, h('p', { class: 'prompt-line', title: prompt }, prompt), state, rest, bar, cancel));
  void actions.picture(id).then((url) => {
    if (!url) return;
    first.src = url;
    first.hidden = false;
  });

  function update(video) {
    const running = video.status === 'in_progress';
    node.classList.toggle('waiting', !running);
    if (running && video.total_steps) bar.value = (100 * video.step) / video.total_steps;
    else if (running) bar.removeAttribute('value');
    else bar.value = 0;
    say(state, running ? atWork(video) : inLine(video));
    say(rest, running ? timeLeft(video) : video.start_in_s ? t('running.begins', { time: duration(video.start_in_s) }) : '');
    const preview = store.state.previews.get(id);
    image.hidden = !preview;
    if (preview && image.src !== preview.url) {
      image.src = preview.url;
      image.dataset.kind = preview.kind;
      image.dataset.step = preview.step;
      image.alt = t('running.preview', { n: preview.step });
    }
  }

  function atWork(video) {
    if (!video.total_steps || !video.step) return t('running.starting');
    return video.step >= video.total_steps ? t('running.finishing') : t('running.step', { n: video.step, m: video.total_steps });
  }

  function timeLeft(video) {
    const left = pace.left(video);
    if (left === null || video.step >= video.total_steps || store.state.link === 'away') return '';
    return left < 1 ? t('running.soon') : t('running.left', { time: duration(left) });
  }

  /** The server's own count where it has told one; else the videos of this page that were asked for before. */
  function inLine(video) {
    if (video.queue_position) return video.queue_position === 1 ? t('running.next') : t('running.place', { n: video.queue_position });
    const active = store.newestFirst().filter(isActive).reverse();
    const ahead = active.findIndex((other) => other.id === id);
    return ahead > 0 ? t('running.ahead', { n: ahead }) : t('running.queued');
  }

  return { node, update };
}
