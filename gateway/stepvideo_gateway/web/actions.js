// What can be done with a video, and its files as they are shown (fetched with the key, kept while the page lives).
import { sendAll } from './compose.js';
import { randomSeed } from './draft.js';

const KEPT_VIDEOS = 24;

export function makeActions(app) {
  const { api, store, draft, messages, words, feed } = app;
  const { files } = app; // "id variant" -> promise of an object URL

  function file(id, variant) {
    const name = `${id} ${variant}`;
    if (files.has(name)) {
      const known = files.get(name);
      files.delete(name); // again at the end: what was used last goes last
      files.set(name, known);
      return known;
    }
    const asked = api.content(id, variant).then(URL.createObjectURL);
    asked.catch(() => files.delete(name));
    files.set(name, asked);
    forgetOld();
    return asked;
  }

  function forgetOld() {
    const videos = [...files.keys()].filter((name) => name.endsWith(' video'));
    for (const name of videos.slice(0, -KEPT_VIDEOS)) drop(name);
  }

  function drop(name) {
    void files.get(name)?.then((url) => setTimeout(() => URL.revokeObjectURL(url), 1000), () => {});
    files.delete(name);
  }

  function forget(id) {
    for (const name of [...files.keys()].filter((each) => each.startsWith(`${id} `))) drop(name);
    store.drop(id);
  }

  /** Runs something that may fail; what failed is said. */
  async function trying(act) {
    try {
      return await act();
    } catch (error) {
      messages.problem(error);
      return null;
    }
  }

  async function end(id, said) {
    await trying(async () => {
      await api.remove(id).catch((error) => {
        if (error.code !== 'not_found') throw error;
      });
      forget(id);
      messages.note(words.t(said));
      await feed.announce();
    });
  }

  const settingsOf = (video) => ({ prompt: video.prompt, ...video.settings, seed: video.seed ?? '' });

  /** Asks for the same video with other settings; how many were taken. */
  async function again(video, ...changes) {
    const picture = await trying(() => api.content(video.id, 'input'));
    if (!picture) return 0;
    const requests = changes.map((change) => {
      const settings = { ...settingsOf(video), ...change };
      return Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== '' && value !== undefined));
    });
    return sendAll(app, requests, picture);
  }

  /** Puts a video's settings, and a picture of it, into the form. */
  async function into(video, variant, change = {}) {
    const picture = await trying(() => api.content(video.id, variant));
    if (!picture) return false;
    draft.take({ ...settingsOf(video), ...change }, store.state.about?.cameras);
    draft.setPicture(picture);
    return true;
  }

  /** Whether "full quality" would give something else: fewer steps, or not all of them computed. */
  function isDraft(video) {
    const steps = store.state.about?.server?.defaults.steps ?? 0;
    return (video.settings.quality ?? 'exact') !== 'exact' || (video.settings.num_inference_steps ?? steps) < steps;
  }

  return {
    thumbnail: (id) => file(id, 'thumbnail').catch(() => null),
    video: (id) => trying(() => file(id, 'video')),
    picture: (id) => file(id, 'input').catch(() => null),
    cancel: (id) => end(id, 'running.cancelled'),
    remove: (id) => end(id, 'detail.removed'),
    isDraft,
    async full(video) {
      const steps = store.state.about?.server?.defaults.steps;
      const more = steps ? { num_inference_steps: Math.max(steps, video.settings.num_inference_steps ?? steps) } : {};
      if (await again(video, { quality: 'exact', ...more })) messages.note(words.t('detail.fullSent'));
    },
    async four(video) {
      if (await again(video, ...Array.from({ length: 4 }, () => ({ seed: randomSeed() })))) messages.note(words.t('detail.fourSent'));
    },
    again: (video) => again(video, {}),
    useSeed(video) {
      draft.set({ seed: String(video.seed) });
      messages.note(words.t('detail.seedCopied'));
    },
    async same(video) {
      if (await into(video, 'input')) messages.note(words.t('compose.taken'));
    },
    async next(video) {
      if (await into(video, 'last_frame', { prompt: '', seed: '' })) messages.note(words.t('detail.nextReady'));
    },
  };
}
