// How long a run will still take, from the steps that the page has seen.

const KEPT = 12;

export function makePace(clock = () => performance.now() / 1000) {
  const seen = new Map(); // id -> [[second, step], ...]

  function note(video) {
    if (video.status !== 'in_progress') {
      seen.delete(video.id);
      return;
    }
    const points = seen.get(video.id) ?? [];
    if (points.at(-1)?.[1] !== video.step) points.push([clock(), video.step]);
    seen.set(video.id, points.slice(-KEPT));
  }

  /** Seconds that the steps will still take; null while nothing is known. */
  function left(video) {
    if (video.status !== 'in_progress' || !video.total_steps || !video.step) return null;
    const points = seen.get(video.id) ?? [];
    const steps = video.total_steps - video.step;
    const known = points.length > 1 && points.at(-1)[1] > points[0][1];
    const perStep = known
      ? (points.at(-1)[0] - points[0][0]) / (points.at(-1)[1] - points[0][1])
      : video.elapsed_s / video.step;
    const sinceLast = points.length ? clock() - points.at(-1)[0] : 0;
    return Math.max(steps * perStep - sinceLast, 0);
  }

  return { note, left };
}
