// The gateway's HTTP API. Every failure is an ApiError with the code of the gateway, or "network".

export class ApiError extends Error {
  constructor(message, { status = 0, code = 'network', param = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfterS });
  }
}

async function errorOf(response) {
  const retryAfterS = Number(response.headers.get('retry-after')) || null;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Something between the page and the gateway has answered: its status is all that is known.
  }
  const code = error.code ?? (response.status >= 500 ? 'unavailable' : 'other');
  return new ApiError(error.message ?? `HTTP ${response.status}`, { status: response.status, code, param: error.param, retryAfterS });
}

/** `key`: of keep.js. `refused()` is called when the gateway asks for a key, or for another one. */
export function makeApi(key, refused) {
  async function ask(path, options = {}) {
    const headers = new Headers(options.headers);
    const holder = key.read();
    if (holder) headers.set('authorization', `Bearer ${holder}`);
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new ApiError(String(error.message ?? error));
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status === 401) refused(Boolean(holder));
    throw error;
  }

  async function json(path, options) {
    return (await ask(path, options)).json();
  }

  function post(path, body, options = {}) {
    const headers = { 'content-type': 'application/json', ...options.headers };
    return json(path, { ...options, method: 'POST', body: JSON.stringify(body), headers });
  }

  /** A new video; the same `once` gives the same video, so that a lost answer makes no second one. */
  function create(settings, picture, once) {
    const form = new FormData();
    for (const [name, value] of Object.entries(settings)) form.set(name, String(value));
    form.set('input_reference', picture, 'first-image');
    return json('/v1/videos', { method: 'POST', body: form, headers: { 'idempotency-key': once } });
  }

  /** Whether servers are ready, as the gateway sees it; it answers 503 where none is. */
  async function health() {
    const response = await fetch('/health').catch((error) => {
      throw new ApiError(String(error.message ?? error));
    });
    return response.json();
  }

  /** Video objects as they change, until the video has ended or `signal` says so. */
  async function* events(id, signal) {
    const response = await ask(`/v1/videos/${id}/events`, { signal, headers: { accept: 'text/event-stream' } });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let waiting = '';
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      waiting += value;
      const parts = waiting.split('\n\n');
      waiting = parts.pop();
      for (const part of parts) {
        const lines = part.split('\n');
        const name = lines.find((line) => line.startsWith('event: '))?.slice(7);
        const data = lines.filter((line) => line.startsWith('data: ')).map((line) => line.slice(6)).join('\n');
        if (data) yield { name, data: JSON.parse(data) };
      }
    }
  }

  return {
    about: () => json('/v1/about'),
    list: (after) => json(`/v1/videos?limit=100${after ? `&after=${encodeURIComponent(after)}` : ''}`),
    remove: (id) => json(`/v1/videos/${id}`, { method: 'DELETE' }),
    quotes: async (settings, signal) => (await post('/v1/quotes/presets', settings, { signal })).presets,
    content: async (id, variant) => (await ask(`/v1/videos/${id}/content?variant=${variant}`)).blob(),
    create,
    health,
    events,
    fetchPicture: async (path) => (await ask(path)).blob(),
  };
}

/** A name that no other request has. */
export function onceName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}
