// Puts the page together. `app` is what its parts share.
import { makeActions } from './actions.js';
import { makeApi } from './api.js';
import { makeCompose } from './compose.js';
import { openCompare } from './compare.js';
import { openDetail } from './detail.js';
import { h } from './dom.js';
import { makeDraft } from './draft.js';
import { makeFeed } from './feed.js';
import { makeGallery } from './gallery.js';
import { makeHead, openKey } from './head.js';
import { firstLanguage, makeWords } from './i18n.js';
import { makeKeep } from './keep.js';
import { makePace } from './pace.js';
import { makeRunning } from './running.js';
import { makeStore } from './store.js';
import { makeMessages } from './widgets.js';

function start(root) {
  const keep = makeKeep();
  const store = makeStore();
  const app = { keep, store, draft: makeDraft(keep), pace: makePace(), files: new Map() };
  app.api = makeApi(keep.key, (wrong) => openKey(app, wrong));
  app.feed = makeFeed(app.api, store);
  app.openDetail = (id) => openDetail(app, id);
  app.openCompare = () => void openCompare(app);
  let parts = [];

  /** Builds the page in a language; what is in the form, and what is chosen, stays. */
  app.speak = (language) => {
    keep.write('language', language);
    document.documentElement.lang = language === 'zh' ? 'zh-Hans' : 'en';
    for (const part of parts) part.stop();
    app.words = makeWords(language);
    app.messages = makeMessages(app.words);
    app.actions = makeActions(app);
    const head = makeHead(app);
    const compose = makeCompose(app);
    const running = makeRunning(app);
    const gallery = makeGallery(app);
    parts = [head, compose, running, gallery];
    app.showCompose = () => {
      compose.show();
      compose.focusPrompt();
    };
    const again = root.contains(document.activeElement) && document.activeElement.dataset.role;
    root.replaceChildren(head.header, head.banner,
      h('main', {}, compose.node, h('div', { class: 'results' }, running.node, gallery.node)), app.messages.node);
    if (again) root.querySelector(`[data-role="${again}"]`)?.focus();
  };

  app.speak(firstLanguage(keep.read('language')));
  void app.draft.restore();
  void app.feed.look();
  const stopWaiting = store.subscribe(({ about }) => {
    if (!about) return;
    stopWaiting();
    if (about.example && app.draft.untouched) void begin(app, about.example);
  });
}

/** The form begins with the example that the gateway was started with. */
async function begin({ api, draft }, { prompt, picture }) {
  const blob = await api.fetchPicture(picture).catch(() => null);
  if (!blob || !draft.untouched || draft.picture) return;
  draft.set({ prompt });
  draft.setPicture(blob);
}

start(document.getElementById('page'));
