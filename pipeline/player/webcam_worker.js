/* MediaPipe's FaceLandmarker in a worker of its own, so that drawing never waits for it. A classic worker: MediaPipe's
 * loader is a script. It is told {bundle, loader, wasm, model} once, then {frame, milliseconds} for each picture; it
 * answers "ready", then {face, took: milliseconds} for each, face null where there is none, or {error} with a text.
 * MediaPipe comes under the Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0. */

let landmarker = null;

self.onmessage = async ({ data }) => {
  try {
    if (data.frame) {
      const begin = performance.now(), face = track(data.frame, data.milliseconds);
      self.postMessage({ face, took: performance.now() - begin });
    } else {
      await begin(data);
      self.postMessage("ready");
    }
  } catch (error) {
    self.postMessage({ error: String(error?.message ?? error) });
  }
};

async function begin({ bundle, loader, wasm, model }) {
  const url = (bytes) => URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
  const { FaceLandmarker } = await import(url(bundle));
  // The compiled part is given, not fetched; its chatter about how it runs is no error.
  self.Module = { wasmBinary: wasm, print: () => {}, printErr: () => {} };
  landmarker = await FaceLandmarker.createFromOptions(
    { wasmLoaderPath: url(loader), wasmBinaryPath: "" },
    {
      baseOptions: { modelAssetBuffer: model, delegate: "CPU" },
      runningMode: "VIDEO",
      numFaces: 1,
      outputFaceBlendshapes: true,
      outputFacialTransformationMatrixes: true,
    },
  );
}

function track(frame, milliseconds) {
  const found = landmarker.detectForVideo(frame, milliseconds);
  frame.close();
  const [scores] = found.faceBlendshapes, [matrix] = found.facialTransformationMatrixes;
  if (!scores || !matrix) return null;
  const coefficients = Object.fromEntries(scores.categories.map(({ categoryName, score }) => [categoryName, score]));
  return { coefficients, matrix: matrix.data };
}
