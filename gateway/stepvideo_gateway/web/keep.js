// What a reload must not lose: small things in localStorage, the picture of the form in IndexedDB. A browser that keeps
// nothing (private windows, blocked storage) has a page that works and forgets.

const PREFIX = 'stepvideo.';
const PICTURES = 'pictures';

function quietly(act, otherwise) {
  try {
    return act();
  } catch {
    return otherwise;
  }
}

export function makeKeep() {
  function read(name, otherwise = null) {
    return quietly(() => JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise, otherwise);
  }

  function write(name, value) {
    quietly(() => localStorage.setItem(PREFIX + name, JSON.stringify(value)));
  }

  function forget(name) {
    quietly(() => localStorage.removeItem(PREFIX + name));
    quietly(() => sessionStorage.removeItem(PREFIX + name));
  }

  /** The API key: for this tab, or for this computer where its holder wants that. */
  const key = {
    read: () => quietly(() => sessionStorage.getItem(`${PREFIX}key`)) ?? read('key'),
    write(value, remember) {
      forget('key');
      if (remember) write('key', value);
      else quietly(() => sessionStorage.setItem(`${PREFIX}key`, value));
    },
    forget: () => forget('key'),
  };

  function database() {
    return new Promise((resolve, reject) => {
      const asked = indexedDB.open('stepvideo', 1);
      asked.onupgradeneeded = () => asked.result.createObjectStore(PICTURES);
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = () => reject(asked.error);
    });
  }

  async function inStore(mode, act) {
    try {
      const opened = await database();
      return await new Promise((resolve, reject) => {
        const asked = act(opened.transaction(PICTURES, mode).objectStore(PICTURES));
        asked.onsuccess = () => resolve(asked.result);
        asked.onerror = () => reject(asked.error);
      }).finally(() => opened.close());
    } catch {
      return undefined;
    }
  }

  const picture = {
    read: () => inStore('readonly', (store) => store.get('form')),
    write: (blob) => inStore('readwrite', (store) => (blob ? store.put(blob, 'form') : store.delete('form'))),
  };

  return { read, write, key, picture };
}
