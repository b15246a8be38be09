// Keeps the store in step with the gateway: the list again and again, and the events of what runs.
import { isActive } from './store.js';

const BUSY_MS = 1500;
const IDLE_MS = 6000;
const HIDDEN_MS = 15000;
const LONGEST_WAIT_MS = 8000;
const STREAMS = 2; // browsers open six connections to a host, for all tabs together

export function makeFeed(api, store) {
  const streams = new Map(); // id -> AbortController
  const { state } = store;
  let timer = null;
  let failures = 0;
  let looking = false;
  let again = false; // somebody wants to know more while an answer is awaited
  let ended = false;

  function pause() {
    if (failures) return Math.min(1000 * 2 ** (failures - 1), LONGEST_WAIT_MS);
    if (document.hidden) return HIDDEN_MS;
    return [...state.videos.values()].some(isActive) ? BUSY_MS : IDLE_MS;
  }

  async function look() {
    clearTimeout(timer);
    if (ended) return;
    again = looking;
    if (looking) return;
    looking = true;
    const at = performance.now();
    try {
      const [page, health] = await Promise.all([api.list(), api.health()]);
      failures = 0;
      state.link = 'up';
      state.serverReady = Object.values(health.servers ?? {}).some(Boolean);
      store.putNewest(page, at);
      if (!state.about?.server) await learn();
      follow();
    } catch (error) {
      failures += 1;
      if (error.code === 'network' || error.status >= 502) state.link = 'away';
      store.changed();
    } finally {
      looking = false;
      if (!ended) timer = setTimeout(look, again ? 0 : pause());
    }
  }

  async function learn() {
    state.about = await api.about();
    store.changed();
  }

  /** Streams of the videos that run, so that previews come; of the first few only. */
  function follow() {
    const running = store.newestFirst().filter((video) => video.status === 'in_progress').slice(-STREAMS);
    for (const [id, stream] of streams) if (!running.some((video) => video.id === id)) stream.abort();
    for (const video of running) if (!streams.has(video.id)) void listen(video.id);
  }

  async function listen(id) {
    const stream = new AbortController();
    streams.set(id, stream);
    try {
      for await (const event of api.events(id, stream.signal)) {
        if (event.name === 'video.deleted') store.drop(id);
        else if (event.name === 'video.preview') show(id, event.data);
        else if (state.videos.has(id)) store.put([event.data]);
      }
      void look();
    } catch {
      // The list tells what has become of it, and a new stream begins if it still runs.
    } finally {
      streams.delete(id);
    }
  }

  function show(id, { step, media_type: type, data }) {
    const before = state.previews.get(id);
    if (!state.videos.has(id) || (before && before.step >= step)) return;
    const blob = new Blob([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], { type });
    state.previews.set(id, { url: URL.createObjectURL(blob), step, kind: type });
    if (before) setTimeout(() => URL.revokeObjectURL(before.url), 1000);
    store.changed();
  }

  async function older() {
    const page = await api.list(state.older);
    state.older = page.has_more ? page.last_id : null;
    store.put(page.data.toReversed());
  }

  const others = new BroadcastChannel('stepvideo');
  others.onmessage = () => void look();
  document.addEventListener('visibilitychange', () => void (document.hidden || look()));
  addEventListener('online', () => void look());

  return {
    look,
    older,
    /** This page has changed something: other tabs look, too. */
    announce() {
      others.postMessage('changed');
      return look();
    },
    stop() {
      ended = true;
      clearTimeout(timer);
      for (const stream of streams.values()) stream.abort();
    },
  };
}
