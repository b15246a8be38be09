// What the video of the form would take with each preset, asked whenever something changes that decides it.

const DECIDING = ['size', 'num_frames', 'num_inference_steps', 'guidance_scale', 'flow_shift', 'priority'];
const QUIET_MS = 350; // after the last keystroke
const AGAIN_MS = 15000; // the queue moves meanwhile
// A quote depends neither on the picture nor on the prompt's words, but the gateway wants both.
const ANY_PICTURE = 'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==';

/** `heard(quotes)`: preset -> { seconds, wait_s, place, evaluations } or { error }; null while asking anew. */
export function makeQuotes(app, heard) {
  const { api, draft, store } = app;
  let timer = null;
  let asking = null;
  let asked = '';

  const presets = () => store.state.about?.server?.presets ?? [];

  function settings() {
    const given = DECIDING.map((name) => [name, draft.fields[name]]).filter(([, value]) => value !== '');
    return { prompt: '.', input_reference: ANY_PICTURE, ...Object.fromEntries(given) };
  }

  function key() {
    const queued = [...store.state.videos.values()].filter((video) => video.status === 'queued').length;
    const done = [...store.state.videos.values()].filter((video) => video.status === 'completed').length;
    return JSON.stringify([settings(), presets(), queued, done, store.state.serverReady, store.state.link]);
  }

  function changed() {
    if (key() === asked || !presets().length) return;
    asked = key();
    clearTimeout(timer);
    timer = setTimeout(ask, QUIET_MS);
  }

  async function ask() {
    clearTimeout(timer);
    asking?.abort();
    const mine = (asking = new AbortController());
    try {
      const all = await api.quotes(settings(), mine.signal);
      heard(Object.fromEntries(Object.entries(all).map(([preset, quote]) => [preset, quote.error ? quote : read(quote)])));
    } catch (error) {
      if (error.name === 'AbortError') return;
      heard({}); // the gateway is away, which the page says elsewhere
    }
    timer = setTimeout(() => (document.hidden ? changed() : ask()), AGAIN_MS);
  }

  function read(quote) {
    const { report } = Object.values(quote.servers)[0];
    const ahead = [...store.state.videos.values()].filter((video) => video.status === 'in_progress').length;
    return {
      seconds: quote.seconds, wait_s: quote.wait_s, place: quote.jobs_waiting + ahead + 1,
      evaluations: Math.round(report.evaluations.mean), steps: report.steps,
    };
  }

  const stops = [draft.subscribe(changed), store.subscribe(changed)];
  changed();
  return {
    stop() {
      clearTimeout(timer);
      asking?.abort();
      stops.forEach((stop) => stop());
    },
  };
}
