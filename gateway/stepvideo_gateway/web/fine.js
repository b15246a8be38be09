// Presets of quality with what each would take, and the fine control.
import { h, say } from './dom.js';
import { randomSeed } from './draft.js';
import { button, choice, field } from './widgets.js';

/** Cards of the server's presets; `quotes(found)` writes what each would take. */
export function makePresets(app) {
  const { draft, words, store } = app;
  const { t, duration } = words;
  const node = h('section', { 'aria-label': t('compose.quality') }, h('h3', {}, t('compose.quality')));
  let built = '';
  let picker = null;
  let costs = {};
  let found = null;

  function build() {
    const presets = store.state.about?.server?.presets ?? [];
    if (built === presets.join()) return;
    built = presets.join();
    picker?.node.remove();
    costs = Object.fromEntries(presets.map((name) => [name, h('small', { class: 'cost unknown' }, t('preset.unknown'))]));
    const options = presets.map((name) => {
      const [title, text] = t(`preset.${name}`) ?? [name, t('preset.other')[1]];
      return { value: name, content: [h('strong', {}, title), h('span', { class: 'about' }, text), costs[name]] };
    });
    picker = choice(t('compose.quality'), 'quality', options, (value) => draft.set({ quality: value }), 'presets');
    picker.caption.className = 'unseen';
    node.append(picker.node);
    show();
    if (found) quotes(found);
  }

  function show() {
    picker?.set(draft.fields.quality || 'exact');
  }

  function quotes(all) {
    found = all;
    for (const [name, cost] of Object.entries(costs)) {
      const quote = all[name];
      cost.classList.toggle('unknown', !quote || Boolean(quote.error));
      if (!quote || quote.error) say(cost, t('preset.unknown'));
      else say(cost, t('quote.takes', { time: duration(quote.seconds) }));
      cost.title = quote && !quote.error ? t('preset.evaluations', { n: quote.evaluations, m: quote.steps }) : '';
    }
  }

  const stops = [draft.subscribe(show), store.subscribe(build)];
  build();
  return { node, quotes, stop: () => stops.forEach((stop) => stop()) };
}

const NUMBERS = [['num_inference_steps', 'steps', 1], ['guidance_scale', 'guidance', 0.5], ['flow_shift', 'shift', 0.5]];
const OPTION = { num_inference_steps: 'steps', guidance_scale: 'cfg_scale', flow_shift: 'time_shift' };

/** Seed and versions, and in a drawer what few need. */
export function makeFine(app) {
  const { draft, words, store } = app;
  const { t } = words;
  const fields = {};
  const seed = h('input', { type: 'number', inputMode: 'numeric', min: 0, max: 2 ** 32 - 1, step: 1, placeholder: t('fine.seedPlaceholder'), on: { input: () => draft.set({ seed: seed.value }) } });
  fields.seed = field(t('fine.seed'), seed, t('fine.seedText'));
  const dice = button('', () => draft.set({ seed: String(randomSeed()) }), { kind: 'quiet', picture: 'dice', label: t('fine.dice') });
  const forget = button('', () => draft.set({ seed: '' }), { kind: 'quiet', picture: 'close', label: t('fine.random') });
  const holder = h('div', { class: 'with-buttons' });
  seed.replaceWith(holder);
  holder.append(seed, dice, forget);

  const versions = choice(t('fine.versions'), 'versions', [1, 2, 4, 8].map((n) => ({ value: n, content: String(n) })), (value) => draft.set({ versions: value }), 'small');
  versions.node.append(h('p', { class: 'hint' }, t('fine.versionsText')));

  for (const [name, word, step] of NUMBERS) {
    const input = h('input', { type: 'number', inputMode: 'decimal', step, on: { input: () => draft.set({ [name]: input.value }) } });
    fields[name] = field(t(`fine.${word}`), input, t(`fine.${word}Text`));
  }
  const negative = h('textarea', { rows: 2, on: { input: () => draft.set({ negative_prompt: negative.value }) } });
  fields.negative_prompt = field(t('fine.negative'), negative, t('fine.negativeText'));
  const priority = h('select', { on: { change: () => draft.set({ priority: priority.value === 'normal' ? '' : priority.value }) } },
    ['high', 'normal', 'low'].map((value) => h('option', { value }, t(`fine.${value}`))));
  fields.priority = field(t('fine.priority'), priority);

  const drawer = h('details', { class: 'disclosure' }, h('summary', {}, h('span', {}, t('compose.more'))),
    h('div', { class: 'trio' }, NUMBERS.map(([name]) => fields[name].node)), fields.negative_prompt.node, fields.priority.node);
  const node = h('section', { class: 'fine' }, h('div', { class: 'pair seeds' }, fields.seed.node, versions.node), drawer);

  function show() {
    const { fields: given } = draft;
    const server = store.state.about?.server;
    for (const [name] of [...NUMBERS, ['seed'], ['negative_prompt']]) {
      const { control } = fields[name];
      if (document.activeElement !== control && control.value !== String(given[name])) control.value = given[name];
    }
    for (const [name] of NUMBERS) fields[name].control.placeholder = server ? server.defaults[OPTION[name]] : t('fine.byDefault');
    versions.set(given.versions);
    priority.value = given.priority || 'normal';
    forget.hidden = given.seed === '';
  }

  const stops = [draft.subscribe(show), store.subscribe(show)];
  show();
  return {
    node,
    complain(name, text) {
      if (!fields[name]) return false;
      if (text && drawer.contains(fields[name].node)) drawer.open = true;
      fields[name].wrong(text);
      return true;
    },
    calm: () => Object.values(fields).forEach((part) => part.wrong('')),
    stop: () => stops.forEach((stop) => stop()),
  };
}
