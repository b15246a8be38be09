// The state of the page: what the gateway knows (videos), how it is reached, and what is chosen here.

export function makeStore() {
  const listeners = new Set();
  const seen = new Map(); // id -> { rank, at }: the API tells whole seconds, so that the order is kept apart
  const gone = new Set(); // ids do not come back, though an answer that was under way may still name them
  let told = false;
  const state = {
    about: null,
    videos: new Map(),
    older: null, // the id behind which older videos are, null: none
    loaded: false,
    link: 'starting', // up, away
    serverReady: null,
    previews: new Map(), // id -> { url, step }
    filter: { text: '', status: 'all' },
    compared: [],
  };

  /** Tells everybody once, however many changes come in a row. */
  function changed() {
    if (told) return;
    told = true;
    queueMicrotask(() => {
      told = false;
      for (const listener of [...listeners]) listener(state);
    });
  }

  function put(videos) {
    for (const video of videos) {
      if (gone.has(video.id)) continue;
      if (!seen.has(video.id)) seen.set(video.id, { rank: seen.size, at: performance.now() });
      state.videos.set(video.id, video);
    }
    changed();
  }

  function drop(id) {
    gone.add(id);
    state.videos.delete(id);
    const preview = state.previews.get(id);
    if (preview) URL.revokeObjectURL(preview.url);
    state.previews.delete(id);
    state.compared = state.compared.filter((other) => other !== id);
    changed();
  }

  /** The newest page of the list, asked for at `at`: what it should have and has not was deleted. */
  function putNewest(page, at) {
    const ids = new Set(page.data.map((video) => video.id));
    const oldest = page.has_more ? page.data.at(-1).created_at : -Infinity;
    for (const video of [...state.videos.values()]) {
      if (video.created_at > oldest && !ids.has(video.id) && seen.get(video.id).at < at) drop(video.id);
    }
    if (!state.loaded) state.older = page.has_more ? page.last_id : null;
    state.loaded = true;
    put(page.data.toReversed());
  }

  return {
    state,
    changed,
    put,
    drop,
    putNewest,
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    newestFirst: () => [...state.videos.values()].sort((a, b) => b.created_at - a.created_at || seen.get(b.id).rank - seen.get(a.id).rank),
  };
}

export const isActive = (video) => video.status === 'queued' || video.status === 'in_progress';
