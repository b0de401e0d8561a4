// Runs the network, apart from the page, which goes on answering meanwhile.
// In: { id, image: Float32Array of 3 x size x size in [-1, 1], targets: class ids, size }.
// Out: { device } once it is loaded, or { failed }; then for each target { id, target, output, ms }.

const here = (name) => new URL(name, import.meta.url).href;

// Not one that a CPU only plays: WebAssembly is faster then.
async function hasGPU() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter;
}

async function load(device, file) {
  const ort = await import(here(`ort/${file}`));
  ort.env.wasm.wasmPaths = here("ort/");
  // Threads share memory, which a browser allows isolated pages only.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const session = await ort.InferenceSession.create(here("model.onnx"), { executionProviders: [device], logSeverityLevel: 3 });
  return async (image, target, size) => {
    const began = performance.now();
    const { output } = await session.run({
      image: new ort.Tensor("float32", image, [1, 3, size, size]),
      target: new ort.Tensor("int64", BigInt64Array.of(BigInt(target)), [1]),
    });
    return { output: output.data, ms: performance.now() - began };
  };
}

async function start(size) {
  const ways = [["wasm", "ort.wasm.min.mjs"]];
  if (await hasGPU()) ways.unshift(["webgpu", "ort.webgpu.min.mjs"]);
  for (const [device, file] of ways) {
    try {
      const run = await load(device, file);
      await run(new Float32Array(3 * size * size), 0, size); // what the first call prepares is no visitor's time
      self.postMessage({ device });
      return run;
    } catch (error) {
      if (device === "wasm") throw error;
    }
  }
}

const size = Number(new URL(import.meta.url).searchParams.get("size"));
const ready = start(size);
ready.catch((error) => self.postMessage({ failed: String(error) }));

let latest = 0;
self.onmessage = async ({ data: { id, image, targets } }) => {
  latest = id;
  const run = await ready;
  for (const target of targets) {
    if (id !== latest) return; // the visitor has moved on
    try {
      self.postMessage({ id, target, ...(await run(image, target, size)) });
    } catch (error) {
      self.postMessage({ failed: String(error) });
    }
    await new Promise((next) => setTimeout(next)); // hear of a newer one
  }
};
