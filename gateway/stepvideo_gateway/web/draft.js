// What stands in the form: kept over reloads, and what becomes of it when it is sent. '' is the server's choice.

const EMPTY = {
  prompt: '', camera: '', motion_score: '', size: '', num_frames: '', num_inference_steps: '', guidance_scale: '',
  flow_shift: '', seed: '', negative_prompt: '', quality: '', priority: '', versions: 1,
};
const MAX_SEED = 2 ** 32 - 1;
const PUNCTUATION = '，。！？；：、…,.!?;:';

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

export function makeDraft(keep) {
  const listeners = new Set();
  const draft = {
    fields: { ...EMPTY, ...keep.read('draft', {}) },
    picture: null, // a Blob
    /** Whether anything was ever written into the form: an example must not overwrite that. */
    get untouched() {
      return !changed && keep.read('draft') === null;
    },
  };
  let saving = null;
  let changed = false;

  function tell(what) {
    for (const listener of [...listeners]) listener(what);
  }

  /** Changes fields, keeps them, and tells the parts of the form: `what` is "fields" or "picture". */
  draft.set = (fields) => {
    Object.assign(draft.fields, fields);
    changed = true;
    clearTimeout(saving);
    saving = setTimeout(draft.save, 200);
    tell('fields');
  };
  draft.save = () => changed && keep.write('draft', draft.fields);
  draft.setPicture = (blob) => {
    draft.picture = blob;
    void keep.picture.write(blob);
    tell('picture');
  };
  draft.restore = async () => {
    draft.picture ??= (await keep.picture.read()) ?? null;
    if (draft.picture) tell('picture');
  };
  draft.reset = () => {
    draft.set({ ...EMPTY });
    draft.setPicture(null);
  };
  draft.subscribe = (listener) => {
    listeners.add(listener);
    return () => listeners.delete(listener);
  };
  addEventListener('pagehide', draft.save);

  /** The fields of the API, once per version: with seeds that follow each other, or all random. */
  draft.requests = () => {
    const { versions, ...fields } = draft.fields;
    const given = Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== ''));
    const first = given.seed === undefined ? null : Number(given.seed);
    return Array.from({ length: versions }, (_, index) => {
      if (first === null) return versions > 1 ? { ...given, seed: randomSeed() } : given;
      return { ...given, seed: (first + index) % (MAX_SEED + 1) };
    });
  };

  /** Takes over the settings of a video: fields of the API, `prompt` with its camera movement perhaps. */
  draft.take = (settings, cameras) => {
    const { prompt, camera } = apart(settings.prompt ?? '', cameras);
    const known = Object.fromEntries(Object.entries(settings).filter(([name]) => name in EMPTY));
    draft.set({ ...EMPTY, ...known, prompt, camera });
  };
  return draft;
}

/** A prompt and the camera movement that the gateway has made its last clause; together they give the prompt again. */
export function apart(prompt, cameras) {
  for (const [camera, phrase] of Object.entries(cameras ?? {})) {
    const end = `${phrase}。`;
    if (!prompt.endsWith(end)) continue;
    const text = prompt.slice(0, -end.length).trimEnd();
    const bare = text.endsWith('，') ? text.slice(0, -1) : text;
    if (bare && PUNCTUATION.includes(text.at(-1))) return { prompt: bare, camera };
  }
  return { prompt, camera: '' };
}
