/* Rotations and rigid transforms as in pipeline/geometry.py: row-major 4x4 arrays, quaternions wxyz, angles in radians.
 * Everything writes into arrays that are given, so that a frame makes no garbage. */

/* out = a b, each 4x4 and rigid. */
export function multiply(a, b, out) {
  for (let r = 0; r < 12; r += 4) {
    const x = a[r], y = a[r + 1], z = a[r + 2];
    for (let c = 0; c < 4; c++) out[r + c] = x * b[c] + y * b[4 + c] + z * b[8 + c];
    out[r + 3] += a[r + 3];
  }
  out[12] = out[13] = out[14] = 0;
  out[15] = 1;
  return out;
}

/* out = the inverse of a rigid 4x4. */
export function invert(a, out) {
  for (let r = 0; r < 3; r++) {
    for (let c = 0; c < 3; c++) out[4 * r + c] = a[4 * c + r];
    out[4 * r + 3] = -(a[r] * a[3] + a[4 + r] * a[7] + a[8 + r] * a[11]);
  }
  out[12] = out[13] = out[14] = 0;
  out[15] = 1;
  return out;
}

/* q = the unit quaternion, w >= 0, of the rotation in a 4x4; the largest divisor is taken (Shepperd 1978). */
export function quaternionOf(m, q) {
  const xx = m[0], yy = m[5], zz = m[10];
  const divisors = [1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz];
  const best = divisors.indexOf(Math.max(...divisors));
  const d = divisors[best], a = m[9] - m[6], b = m[2] - m[8], c = m[4] - m[1];
  const xy = m[1] + m[4], xz = m[2] + m[8], yz = m[6] + m[9];
  if (best === 0) set4(q, d, a, b, c);
  else if (best === 1) set4(q, a, d, xy, xz);
  else if (best === 2) set4(q, b, xy, d, yz);
  else set4(q, c, xz, yz, d);
  const scale = (q[0] < 0 ? -1 : 1) / Math.hypot(q[0], q[1], q[2], q[3]);
  for (let i = 0; i < 4; i++) q[i] *= scale;
  return q;
}

function set4(q, w, x, y, z) {
  q[0] = w;
  q[1] = x;
  q[2] = y;
  q[3] = z;
}

const quaternion = new Float64Array(4);

/* out[at..at+3] = the rotation vector of the rotation in a 4x4. */
export function rotvecOf(m, out, at = 0) {
  const [w, x, y, z] = quaternionOf(m, quaternion);
  const sine = Math.hypot(x, y, z);
  const scale = sine < 1e-4 ? 2 + (sine * sine) / 3 : (2 * Math.atan2(sine, w)) / sine;
  out[at] = scale * x;
  out[at + 1] = scale * y;
  out[at + 2] = scale * z;
  return out;
}

/* out = the 4x4 with the rotation of a rotation vector (Rodrigues) and no translation. */
export function turning(x, y, z, out) {
  const squared = x * x + y * y + z * z, angle = Math.sqrt(squared);
  const a = angle < 1e-4 ? 1 - squared / 6 : Math.sin(angle) / angle;
  const b = angle < 1e-4 ? 0.5 - squared / 24 : (1 - Math.cos(angle)) / squared;
  out.fill(0);
  out[0] = 1 - b * (y * y + z * z);
  out[1] = b * x * y - a * z;
  out[2] = b * x * z + a * y;
  out[4] = b * x * y + a * z;
  out[5] = 1 - b * (x * x + z * z);
  out[6] = b * y * z - a * x;
  out[8] = b * x * z - a * y;
  out[9] = b * y * z + a * x;
  out[10] = 1 - b * (x * x + y * y);
  out[15] = 1;
  return out;
}
