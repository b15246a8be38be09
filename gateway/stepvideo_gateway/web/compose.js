// The form: picture, prompt, shape, quality, and what it would take; then it is sent.
import { onceName } from './api.js';
import { h, say } from './dom.js';
import { makeFine, makePresets } from './fine.js';
import { makeLook } from './look.js';
import { makeCamera, makeMotion } from './movement.js';
import { makePicture } from './picture.js';
import { makeQuotes } from './quotes.js';
import { button, field } from './widgets.js';

const LOOKS = ['size', 'num_frames', 'seconds'];

export function makeCompose(app) {
  const { draft, words, store, messages } = app;
  const { t, duration } = words;
  const prompt = h('textarea', { rows: 4, on: { input: () => draft.set({ prompt: prompt.value }) } });
  const promptPart = field(t('compose.prompt'), prompt, t('compose.promptHint'));
  promptPart.node.classList.add('prompt');
  const camera = makeCamera(app);
  const motion = makeMotion(app);
  const look = makeLook(app);
  const picture = makePicture(app, look.sizeNow);
  const presets = makePresets(app);
  const fine = makeFine(app);
  const time = h('p', { class: 'quote', 'aria-live': 'polite' }, t('quote.none'));
  const sendText = h('span', {});
  const send = h('button', { type: 'submit', class: 'button main' }, sendText);
  const foot = h('div', { class: 'foot' }, time, send);
  const head = h('header', { class: 'part-head' }, h('h2', {}, t('compose.title')), button(t('compose.reset'), startOver, { kind: 'link' }));
  const form = h('form', { class: 'panel compose', noValidate: true, 'aria-label': t('compose.title'), on: { submit: submitted } },
    head, picture.node, promptPart.node, h('div', { class: 'movement' }, camera.node, motion.node), look.node, presets.node, fine.node, foot);
  form.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  let quotes = null;
  let sending = null; // the requests that are not answered yet, and the names that they have

  function show() {
    if (document.activeElement !== prompt && prompt.value !== draft.fields.prompt) prompt.value = draft.fields.prompt;
    const { versions } = draft.fields;
    say(sendText, sending ? t('compose.sending') : versions > 1 ? t('compose.sendMany', { n: versions }) : t('compose.send'));
    showTime();
  }

  /** What it would take, and when it would begin. */
  function showTime() {
    const quote = quotes?.[draft.fields.quality || 'exact'];
    if (!quote) {
      say(time, store.state.serverReady === false ? t('quote.away') : t('quote.none'));
      return;
    }
    if (quote.error) {
      const wrong = quote.error.code === 'invalid_value' || quote.error.code === 'not_allowed';
      if (wrong) complain(quote.error);
      say(time, wrong ? words.problem(quote.error).what : store.state.serverReady === false ? t('quote.away') : t('quote.unknown'));
      return;
    }
    const { versions } = draft.fields;
    const one = duration(quote.seconds);
    const takes = t('quote.takes', { time: versions > 1 ? t('quote.each', { n: versions, time: one }) : one });
    const begins = quote.wait_s < 1 && quote.place === 1 ? [t('quote.now')] : [t('quote.place', { n: quote.place }), ...(quote.wait_s >= 1 ? [t('quote.wait', { time: duration(quote.wait_s) })] : [])];
    say(time, [takes, ...begins].join(' · '));
  }

  /** Shows what the gateway said where it belongs; whether there was such a place. */
  function complain(error) {
    const text = error.message;
    if (error.param === 'prompt' || error.param === 'camera') promptPart.wrong(text);
    else if (error.param === 'input_reference') picture.complain(text);
    else if (LOOKS.includes(error.param)) look.complain(text);
    else return fine.complain(error.param, text);
    return true;
  }

  function calm() {
    promptPart.wrong('');
    look.complain('');
    picture.complain('');
    fine.calm();
  }

  async function submitted(event) {
    event.preventDefault();
    if (sending) return;
    calm();
    if (!draft.picture) {
      picture.complain(t('compose.needPicture'));
      picture.focus();
      return;
    }
    if (!draft.fields.prompt.trim()) {
      promptPart.wrong(t('compose.needPrompt'));
      prompt.focus();
      return;
    }
    sending = draft.requests();
    show();
    const sent = await sendAll(app, sending, draft.picture, complain);
    sending = null;
    show();
    if (!sent) return;
    messages.note(t('compose.sent'));
    if (matchMedia('(max-width: 900px)').matches) document.getElementById('running')?.scrollIntoView({ block: 'start' });
  }

  function startOver() {
    calm();
    draft.reset();
    picture.focus();
  }

  const asked = makeQuotes(app, (found) => {
    look.complain('');
    fine.calm();
    quotes = found;
    presets.quotes(found);
    show();
  });
  const stops = [draft.subscribe(show), store.subscribe(show)];
  show();
  return {
    node: form,
    focusPrompt() {
      prompt.focus();
      prompt.setSelectionRange(0, prompt.value.length);
    },
    show: () => form.scrollIntoView({ block: 'start' }),
    stop: () => [camera, motion, look, picture, presets, fine, asked, ...stops.map((stop) => ({ stop }))].forEach((part) => part.stop()),
  };
}

/** Sends requests for the same picture one after the other; how many were taken. Problems are said once. */
export async function sendAll(app, requests, picture, complain = () => false) {
  let sent = 0;
  const moving = app.store.state.about?.fields.includes('preview_format') ? { preview_format: 'webp' } : {};
  try {
    for (const settings of requests) {
      app.store.put([await stubbornly(() => onceName(), (once) => app.api.create({ ...settings, ...moving }, picture, once))]);
      sent += 1;
    }
  } catch (error) {
    const placed = complain(error);
    if (!placed || error.code !== 'invalid_value') app.messages.problem(error);
  }
  await app.feed.announce();
  return sent;
}

/** Tries once more where the answer was lost; the same name makes no second video. */
async function stubbornly(name, act) {
  const once = name();
  try {
    return await act(once);
  } catch (error) {
    if (error.code !== 'network') throw error;
    return act(once);
  }
}
