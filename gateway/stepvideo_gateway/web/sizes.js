// Sizes, lengths and crops: the arithmetic of the form.

/** "992x544" -> [992, 544]. */
export const sidesOf = (size) => size.split('x').map(Number);

/** The size with this shape whose area is nearest to that of `size`, in the model's unit and within the limits. */
export function shaped(size, ratio, unit, limits) {
  const [width, height] = sidesOf(size);
  const side = Math.sqrt(width * height);
  const fit = (length, most) => Math.min(Math.max(Math.round(length / unit), 2) * unit, most);
  return `${fit(side * Math.sqrt(ratio), limits.max_width)}x${fit(side / Math.sqrt(ratio), limits.max_height)}`;
}

/** What the form offers: name -> size. The server's own size comes first, under the name of its shape. */
export function offered(defaults, unit, limits) {
  const own = `${defaults.width}x${defaults.height}`;
  const ratio = defaults.width / defaults.height;
  const kind = ratio > 1.1 ? 'wide' : ratio < 0.9 ? 'tall' : 'square';
  const turned = `${defaults.height}x${defaults.width}`;
  const wide = kind === 'wide' ? own : kind === 'tall' ? turned : shaped(own, 16 / 9, unit, limits);
  const tall = kind === 'tall' ? own : kind === 'wide' ? turned : shaped(own, 9 / 16, unit, limits);
  return { wide, tall, square: kind === 'square' ? own : shaped(own, 1, unit, limits) };
}

/** The part of a picture that the model sees: scaled until it covers the video, then its middle. In shares of the sides. */
export function cropOf(picture, size) {
  const [width, height] = sidesOf(size);
  const scale = Math.max(width / picture.width, height / picture.height);
  const part = { width: width / (picture.width * scale), height: height / (picture.height * scale) };
  return { left: (1 - part.width) / 2, top: (1 - part.height) / 2, ...part, enlarged: scale > 1.001 };
}

/** Frames that the model makes, up to the longest: [17, 34, ...]. */
export function lengths(unit, most) {
  return Array.from({ length: Math.floor(most / unit) }, (_, index) => (index + 1) * unit);
}

/** Tokens decide memory and time; the server bounds them. */
export function tokensOf(size, frames) {
  const [width, height] = sidesOf(size);
  return (frames / 17) * 3 * (width / 16) * (height / 16);
}
