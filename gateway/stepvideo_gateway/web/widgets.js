// Parts of forms that several places have: fields with labels, choices, messages.
import { freshId, h, icon, say } from './dom.js';

/** A label, a control, a hint and a place for what is wrong with it. */
export function field(label, control, hint = '') {
  const id = freshId('field');
  control.id = id;
  const help = h('p', { class: 'hint', id: `${id}-hint` }, hint);
  const wrong = h('p', { class: 'wrong', id: `${id}-wrong`, hidden: true });
  control.setAttribute('aria-describedby', `${id}-hint ${id}-wrong`);
  const node = h('div', { class: 'field' }, h('label', { for: id }, label), control, help, wrong);
  return {
    node,
    control,
    hint: (text) => say(help, text),
    wrong(text) {
      say(wrong, text);
      wrong.hidden = !text;
      control.setAttribute('aria-invalid', String(Boolean(text)));
    },
  };
}

/** One of several, as radio buttons that look like cards. `options`: [{ value, content, title }]. */
export function choice(legend, name, options, chosen, className = '') {
  const inputs = options.map(({ value }) =>
    h('input', { type: 'radio', name, value, on: { change: () => chosen(value) } }),
  );
  const cards = options.map(({ content, title }, index) =>
    h('label', { class: 'card-choice', title }, inputs[index], h('span', { class: 'face' }, content)),
  );
  const caption = h('legend', {}, legend);
  const node = h('fieldset', { class: `choice ${className}` }, caption, h('div', { class: 'options' }, cards));
  return {
    node,
    cards,
    caption,
    set(value) {
      for (const input of inputs) input.checked = input.value === String(value);
    },
  };
}

export function button(text, act, { kind = 'plain', picture = null, label = null, ...rest } = {}) {
  const props = { type: 'button', class: `button ${kind}`, on: { click: act }, ...rest };
  if (label) Object.assign(props, { 'aria-label': label, title: label });
  return h('button', props, picture && icon(picture), text && h('span', {}, text));
}

/** A button that asks before it acts, in its own place. */
export function sureButton(words, texts, act, options = {}) {
  const node = h('span', { class: 'sure' });
  const first = button(texts.label, ask, options);
  function ask() {
    const yes = button(texts.yes, () => {
      back();
      act();
    }, { kind: 'danger' });
    const no = button(texts.no, back, { kind: 'plain' });
    node.replaceChildren(h('span', { class: 'question', role: 'alert' }, texts.question), yes, no);
    no.focus();
  }
  function back() {
    const inside = node.contains(document.activeElement);
    node.replaceChildren(first);
    if (inside) first.focus();
  }
  node.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || node.contains(first)) return;
    event.preventDefault();
    event.stopPropagation();
    back();
  });
  node.append(first);
  return node;
}

/** Messages at the foot of the page; problems stay until they are dismissed. */
export function makeMessages(words) {
  const node = h('div', { class: 'messages', 'aria-live': 'polite' });

  function show(kind, content, ms) {
    const close = button('', () => message.remove(), { kind: 'quiet', picture: 'close', label: words.t('close') });
    const message = h('div', { class: `message ${kind}`, role: kind === 'bad' ? 'alert' : 'status' }, h('div', {}, content), close);
    node.append(message);
    while (node.childElementCount > 3) node.firstChild.remove();
    if (ms) setTimeout(() => message.remove(), ms);
  }

  return {
    node,
    note: (text) => show('good', text, 5000),
    problem: (error) => show('bad', problemText(words, error)),
    warn: (text) => show('bad', text),
  };
}

/** What went wrong, the remedy, and the sentence of the server where it says more. */
export function problemText(words, error) {
  const { what, remedy, said } = words.problem(error);
  const sentence = said && error.code !== 'network' && h('p', { class: 'said' }, `${words.t('details')}: ${said}`);
  return [h('strong', {}, what), ' ', remedy, sentence];
}
