/* The driver of whoever moves sliders: coefficients by number, and the head's turn. */

import { multiply, rotvecOf, turning } from "./rigid.js";

const RAD = Math.PI / 180;
const PRESET_MS = 250;

let player = null, tell = null, moving = 0;

export const available = () => true;

export function start(given, onDrive) {
  player = given;
  tell = onDrive;
}

export function stop() {
  cancelAnimationFrame(moving);
  tell = null;
}

/* Set coefficients, a map of number -> value. */
export function setExpression(values) {
  cancelAnimationFrame(moving);
  const expression = player.drive.expression.slice();
  for (const [i, value] of values) expression[i] = value;
  const looks = [...values.keys()].some((i) => player.names[i].startsWith("eyeLook"));
  tell({ expression, eyes: looks ? null : undefined });
}

/* Go over to the whole expression [E], at once or within a moment. */
export function goTo(target, still) {
  cancelAnimationFrame(moving);
  const from = player.drive.expression.slice(), begin = performance.now();
  const step = (now) => {
    const share = still ? 1 : Math.min(1, Math.max(0, (now - begin) / PRESET_MS)), eased = share * share * (3 - 2 * share);
    tell({ expression: from.map((value, i) => value + eased * (target[i] - value)), eyes: null });
    if (share < 1) moving = requestAnimationFrame(step);
  };
  step(begin);
}

/* Degrees from rest in the head's own axes: pitch down, yaw to the subject's left, roll with its left ear up. */
export function headAngles(shown) {
  const turn = new Float64Array(16), { head: rest } = shown.rest, { head } = shown.drive;
  for (let r = 0; r < 3; r++)
    for (let c = 0; c < 3; c++)
      turn[4 * r + c] = rest[r] * head[c] + rest[4 + r] * head[4 + c] + rest[8 + r] * head[8 + c];
  return rotvecOf(turn, new Float64Array(3)).map((angle) => angle / RAD);
}

export function setHeadAngles([pitch, yaw, roll]) {
  const head = new Float64Array(16), turn = turning(pitch * RAD, yaw * RAD, roll * RAD, new Float64Array(16));
  multiply(player.rest.head, turn, head); // the turn moves nothing: the translation is that of rest
  tell({ head, torso: null, torsoShape: null, skull: null });
}
