// The top of the page: name, how the gateway is, language, API key; and what is said when the connection is lost.
import { h, say } from './dom.js';
import { button, field } from './widgets.js';

export function makeHead(app) {
  const { words, store, feed, messages, keep } = app;
  const { t } = words;
  const stateText = h('span', {});
  const state = h('p', { class: 'link-state', role: 'status' }, h('i', { 'aria-hidden': 'true' }), stateText);
  const language = button(t('other'), () => app.speak(words.otherLanguage), { kind: 'plain', lang: words.otherLanguage });
  language.setAttribute('aria-label', t('otherLabel'));
  language.dataset.role = 'language';
  const key = button(t('key.button'), () => openKey(app, false), { kind: 'plain', picture: 'key' });
  const header = h('header', { class: 'top' },
    h('a', { class: 'unseen skip', href: '#videos' }, t('skip')),
    h('div', { class: 'brand' }, h('h1', {}, 'Step-Video'), h('p', {}, t('tagline'))), state, h('div', { class: 'top-tools' }, key, language));
  const bannerText = h('p', {});
  const again = button(t('link.again'), () => void feed.look());
  const banner = h('div', { class: 'banner', role: 'alert', hidden: true }, bannerText, again);
  let before = store.state.link;

  function show({ link, serverReady }) {
    const kind = link === 'away' ? 'away' : serverReady === false ? 'waiting' : link === 'up' ? 'ready' : 'starting';
    state.className = `link-state ${kind}`;
    say(stateText, kind === 'starting' ? t('gallery.loading') : t(`servers.${kind}`));
    banner.hidden = kind === 'ready' || kind === 'starting';
    again.hidden = kind !== 'away';
    say(bannerText, banner.hidden ? '' : t(kind === 'away' ? 'link.away' : 'link.noServer'));
    key.hidden = !keep.key.read();
    if (before === 'away' && link === 'up') messages.note(t('link.back'));
    before = link;
  }

  const stop = store.subscribe(show);
  show(store.state);
  return { header, banner, stop };
}

/** Asks for the API key; `wrong`: the one that was sent is not known. */
export function openKey(app, wrong) {
  const { words, keep, feed } = app;
  const { t } = words;
  if (document.querySelector('dialog.key')) return;
  const input = h('input', { type: 'password', autocomplete: 'off', spellcheck: false, required: true });
  const part = field(t('key.field'), input);
  if (wrong) part.wrong(t('key.wrong'));
  const remember = h('input', { type: 'checkbox' });
  const forget = keep.key.read() && button(t('key.forget'), () => {
    keep.key.forget();
    location.reload();
  });
  const save = h('button', { type: 'submit', class: 'button main' }, t('key.save'));
  const form = h('form', { on: { submit: saved } }, h('h2', {}, t('key.title')), h('p', {}, t('key.text')), part.node,
    h('label', { class: 'check' }, remember, t('key.remember')), h('div', { class: 'tools' }, save, forget));
  const dialog = h('dialog', { class: 'panel key', 'aria-label': t('key.title') }, form);
  function saved(event) {
    event.preventDefault();
    if (!input.value.trim()) return;
    keep.key.write(input.value.trim(), remember.checked);
    dialog.close();
    void feed.look();
  }
  dialog.addEventListener('close', () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  input.focus();
}
