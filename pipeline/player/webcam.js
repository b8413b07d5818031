/* Driving by the viewer's own camera: MediaPipe in the page. No picture leaves it; see main.js for what a driver is. */

import { asset, hasAsset } from "./assets.js";
import { Follower } from "./follower.js";
import { headPose } from "./retarget.js";
import { readTensors } from "./safetensors.js";

const FILE = "webcam.bin"; // what pipeline/exports/webcam.py packs
const LONGER_SIDE = 640; // pixels of what MediaPipe gets: it looks at the face in 256 x 256 anyway
const PACE_PICTURES = 50;

let packed = null; // a Promise of the file's bytes: the single page gives them once
let session = null; // what is on
const recent = []; // {at, took} of the last pictures, milliseconds

/* Whether the page came with MediaPipe. */
export function available() {
  return hasAsset(FILE);
}

/* Asks for the camera, starts MediaPipe, then drives until `stop`. Throws an Error with words for people. */
export async function start(player, onDrive) {
  stop();
  const mine = (session = new Session());
  try {
    player.say("Allow this page to use the camera. No picture leaves it.");
    const stream = await mine.hold(openCamera(), (opened) => opened.getTracks().forEach((track) => track.stop()));
    player.say("Starting the face tracker ...");
    const { arrays, about } = await mine.hold(readFile());
    const tracker = await mine.hold(startTracker(arrays), (started) => started.terminate());
    const video = await mine.hold(play(stream));
    follow(player, onDrive, mine, { stream, tracker, video, follower: new Follower(about, player.names) });
  } catch (error) {
    if (session === mine) {
      stop();
      throw error;
    }
  }
}

/* Hands picture after picture to the tracker, one at a time, and what it sees to the avatar. */
function follow(player, onDrive, mine, { stream, tracker, video, follower }) {
  const controls = showControls(video, follower);
  mine.cleanups.push(() => controls.remove());
  const end = async (text) => {
    if (mine.ended) return;
    await player.use(null); // which stops this driver
    player.say(text);
  };
  const send = async () => {
    const frame = await createImageBitmap(video, sizeOf(video));
    if (!mine.ended) tracker.postMessage({ frame, milliseconds: performance.now() }, [frame]);
  };
  const next = () => onNextPicture(video, () => {
    if (!mine.ended) send().catch((error) => end(`The camera's picture cannot be read: ${error.message}.`));
  });
  stream.getVideoTracks()[0].onended = () => end("The camera was unplugged or taken away.");
  tracker.onerror = () => end("The face tracker stopped. Start it again.");
  recent.length = 0;
  tracker.onmessage = ({ data: { face, took, error } }) => {
    if (mine.ended) return;
    if (error) return end(`The face tracker stopped: ${error}.`);
    recent.push({ at: performance.now(), took });
    if (recent.length > PACE_PICTURES) recent.shift();
    const seen = face && { coefficients: face.coefficients, pose: headPose(face.matrix) };
    onDrive(follower.follow(seen, performance.now() / 1000));
    player.say(!seen ? "No face in the picture." : follower.takingNeutral ? "Look ahead, with a face at rest ..." : "");
    next();
  };
  next();
}

/* Lets go of the camera and the tracker, also while `start` is still waiting. */
export function stop() {
  session?.end();
  session = null;
}

async function readFile() {
  packed ??= asset(FILE);
  try {
    return await readTensors(await packed);
  } catch (error) {
    packed = null; // it may come the next time
    throw error;
  }
}

/* Pictures that were tracked in a second, and the tracker's milliseconds for one: the mean of the last ones; null
 * before there are two. */
export function pace() {
  if (recent.length < 2) return null;
  const seconds = (recent.at(-1).at - recent[0].at) / 1000;
  const milliseconds = recent.reduce((sum, { took }) => sum + took, 0) / recent.length;
  return { pictures_per_second: (recent.length - 1) / seconds, milliseconds };
}

/* From a start to its stop: what has to be let go of in the end. */
class Session {
  constructor() {
    this.cleanups = [];
    this.ended = false;
  }

  /* What a promise gives, to be let go of in the end; at once, with an error, where the end came meanwhile. */
  async hold(promise, letGo = () => {}) {
    const held = await promise;
    if (this.ended) {
      letGo(held);
      throw new Error("stopped");
    }
    this.cleanups.push(() => letGo(held));
    return held;
  }

  end() {
    this.ended = true;
    for (const cleanup of this.cleanups.splice(0)) cleanup();
  }
}

const REFUSALS = {
  NotAllowedError: "The browser does not let this page use the camera: allow it (beside the address), then start again.",
  SecurityError: "The browser does not let this page use the camera: allow it in its settings, then start again.",
  NotFoundError: "There is no camera here.",
  NotReadableError: "The camera cannot be read: another program may hold it. Close that, then start again.",
  AbortError: "The camera did not start. Plug it in anew, then start again.",
};

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Error(
      "Browsers give a camera only to pages from https://, from localhost or from the disk. " +
        "Serve this folder in one of these ways, or open the single-file page.",
    );
  }
  try {
    const video = { facingMode: "user", width: 640, height: 480, frameRate: { ideal: 30 }, resizeMode: "none" };
    return await navigator.mediaDevices.getUserMedia({ audio: false, video });
  } catch (error) {
    throw new Error(REFUSALS[error.name] ?? `The camera does not start: ${error.message || error.name}.`);
  }
}

async function startTracker({ worker, ...parts }) {
  const url = URL.createObjectURL(new Blob([worker], { type: "text/javascript" }));
  const tracker = new Worker(url);
  try {
    await new Promise((resolve, reject) => {
      tracker.onerror = (event) => reject(new Error(event.message || "it does not load"));
      tracker.onmessage = ({ data }) => (data === "ready" ? resolve() : reject(new Error(data.error)));
      tracker.postMessage(parts, Object.values(parts).map((part) => part.buffer));
    });
    return tracker;
  } catch (error) {
    tracker.terminate();
    throw new Error(`The face tracker does not start: ${error.message}. It needs a browser of 2023 or later.`);
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function play(stream) {
  const video = document.createElement("video");
  video.muted = video.playsInline = true;
  video.srcObject = stream;
  await video.play();
  return video;
}

/* The size to shrink a video's pictures to; {} where they are small enough. */
function sizeOf({ videoWidth, videoHeight }) {
  const scale = LONGER_SIDE / Math.max(videoWidth, videoHeight);
  if (scale >= 1) return {};
  return { resizeWidth: Math.round(scale * videoWidth), resizeHeight: Math.round(scale * videoHeight) };
}

/* Calls once, when the video has a new picture. */
function onNextPicture(video, call) {
  if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(call);
  else requestAnimationFrame(call);
}

/* The viewer's picture, as in a mirror, and the buttons. */
function showControls(video, follower) {
  const controls = document.createElement("div");
  const button = (text, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.onclick = () => act(made);
    controls.append(made);
  };
  controls.append(video);
  button("This is my neutral", () => follower.takeNeutral());
  button("Hide my picture", (made) => {
    const hidden = video.classList.toggle("away"); // it has to play on
    made.textContent = hidden ? "Show my picture" : "Hide my picture";
  });
  document.getElementById("driver-webcam").append(controls);
  return controls;
}
