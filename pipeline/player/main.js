/* The player: a baked avatar (docs/avatars.md), posed by a driver, drawn with WebGL2. No library, nothing fetched.
 *
 * What poses the avatar is one object:
 *
 *   drive = {
 *     expression: Float32Array(E)  coefficients in the order of player.names
 *     head: Float32Array(16)       T_cam_head, row-major, metres, in the axes of the clip's camera: x right, y down,
 *                                  z forward; the head's own axes: x to the subject's left, y up, z out of the face
 *     eyes: null | 4 numbers       pitch and yaw of the left eye, then of the right, radians (down and to the
 *                                  subject's left are positive); null: where the eyeLook* coefficients say
 *     torso, torsoShape, skull: null | 16, M, 16 numbers   null: as they follow from the head
 *   }
 *
 * A driver fills it: 'sliders' (sliders.js), 'clip' (clip.js), 'webcam' (webcam.js). It is a module that exports
 *
 *   available()              whether it can work here: the page offers it only then
 *   start(player, onDrive)   may be async; throws an Error whose message is for people. Whenever there are new numbers
 *                            it calls onDrive({expression, head, eyes}); a part left out stays as it is, null
 *                            means rest (or "as it follows from the head"); what it gives is copied
 *   stop()                   lets go of everything, also while start is still waiting
 *
 * One driver is on at a time: player.use(name) stops the other first. For drivers, player has
 *
 *   player.names             [E] names of the coefficients
 *   player.rest              the drive of rest: {expression, head, eyes, torso, torsoShape, skull}
 *   player.drive             the drive that is shown now; read it only
 *   player.say(text)         one line for people at the foot of the page; '' takes it away
 *   asset(name)              of assets.js: a Promise of the bytes (Uint8Array) of a file that came with the page, the
 *                            same in the folder and in the single file; hasAsset(name) tells whether it came
 *
 * A driver's own controls (a preview, a button) go into the element <section id="driver-NAME"> of index.html, which is
 * shown while it is on. Modules import with `import { a, b } from "./x.js"` or `import * as x from "./x.js"` on one
 * line, and export with `export` before the declaration: so the single file is put together (pipeline/exports/web.py).
 */

import { asset } from "./assets.js";
import { readAvatar } from "./avatar_file.js";
import * as clip from "./clip.js";
import { build } from "./controls.js";
import { BakedAvatar } from "./gaussians.js";
import { Player } from "./player.js";
import * as sliders from "./sliders.js";
import * as webcam from "./webcam.js";

const AVATAR = "avatar.bin";

async function begin() {
  const message = document.getElementById("message");
  try {
    const avatar = new BakedAvatar(await readAvatar(await asset(AVATAR)));
    clip.load(avatar);
    const player = new Player(avatar, document.getElementById("view"), { sliders, clip, webcam });
    build(player);
    const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (clip.available() && !still) {
      await player.use("clip");
      clip.play();
    } else await player.use("sliders");
    window.player = player; // for the console and for tests: it is there when all is ready
    document.body.classList.remove("loading");
  } catch (error) {
    message.textContent = error.message;
    message.hidden = false;
    document.body.classList.replace("loading", "failed");
    console.warn(error);
  }
}

begin();
