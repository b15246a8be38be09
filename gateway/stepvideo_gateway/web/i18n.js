// Words of the page in the chosen language, and numbers and times as it writes them.
import en from './words-en.js';
import zh from './words-zh.js';

const ALL = { en, zh };

/** "en" or "zh": what was chosen before, else what the browser asks for. */
export function firstLanguage(chosen) {
  if (chosen in ALL) return chosen;
  return navigator.languages.some((tag) => tag.toLowerCase().startsWith('zh')) ? 'zh' : 'en';
}

export function makeWords(language) {
  const words = ALL[language];

  /** The text at a dotted path with its values filled in; lists are given as they are. */
  function t(path, values = {}) {
    const found = path.split('.').reduce((at, part) => at?.[part], words);
    if (typeof found !== 'string') return found;
    return found.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
  }

  /** Seconds in words that are as exact as an estimate can be. */
  function duration(seconds) {
    const s = Math.max(0, seconds);
    if (s < 1) return t('time.less');
    if (s < 90) return t('time.s', { n: Math.round(s) });
    if (s < 600) {
      const whole = Math.round(s / 10) * 10;
      const rest = whole % 60;
      return rest ? t('time.minS', { n: Math.floor(whole / 60), m: rest }) : t('time.min', { n: whole / 60 });
    }
    const minutes = Math.round(s / 60);
    if (minutes < 60) return t('time.min', { n: minutes });
    const rest = minutes % 60;
    return rest ? t('time.hMin', { n: Math.floor(minutes / 60), m: rest }) : t('time.h', { n: minutes / 60 });
  }

  /** Unix seconds as a day and a time. */
  function date(unix) {
    const locale = language === 'zh' ? 'zh-CN' : 'en-GB';
    return new Intl.DateTimeFormat(locale, { dateStyle: 'medium', timeStyle: 'short' }).format(unix * 1000);
  }

  /** What went wrong, what to do, and the sentence of whoever refused. */
  function problem(error) {
    const [what, remedy] = t(`errors.${error.code}`) ?? t('errors.other');
    return { what, remedy, said: error.message ?? '' };
  }

  return { language, otherLanguage: language === 'en' ? 'zh' : 'en', t, duration, date, problem };
}
