// A picture taken by the computer's or telephone's camera.
import { h } from './dom.js';
import { button } from './widgets.js';

/** A PNG, or null where its taker thought better of it. Rejects where the camera cannot be used. */
export async function openCamera({ t }) {
  if (!navigator.mediaDevices) throw new Error('no camera without a secure connection');
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment', width: { ideal: 1920 } } });
  const video = h('video', { autoplay: true, muted: true, playsInline: true, srcObject: stream });
  return new Promise((resolve) => {
    const dialog = h('dialog', { class: 'panel shot', 'aria-label': t('picture.cameraTitle') });
    const end = (blob) => {
      for (const track of stream.getTracks()) track.stop();
      dialog.close();
      dialog.remove();
      resolve(blob);
    };
    const shoot = () => {
      const canvas = h('canvas', { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext('2d').drawImage(video, 0, 0);
      canvas.toBlob(end, 'image/png');
    };
    const row = h('div', { class: 'tools' }, button(t('picture.shoot'), shoot, { kind: 'main' }), button(t('picture.close'), () => end(null)));
    dialog.append(video, row);
    dialog.addEventListener('cancel', () => end(null));
    document.body.append(dialog);
    dialog.showModal();
  });
}
