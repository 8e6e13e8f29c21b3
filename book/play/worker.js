// Draws beside the page, which stays responsive. Messages: {id, name, decoder, seed,
// options} begins a drawing, {cancel: true} ends it.

import { ImageGPT, MaskGIT, PixelGPT } from "./models.js";
import { Random } from "./sampling.js";
import { VQModel } from "./vq.js";
import { load } from "./weights.js";

const KINDS = { imagegpt: ImageGPT, maskgit: MaskGIT, pixelgpt: PixelGPT, vq: VQModel };
const models = new Map(), channel = new MessageChannel();
let current = null;

/** A model by the name of its folder, read once. */
async function model(name) {
  if (!models.has(name)) {
    const [config, weights] = await load(`models/${name}`);
    models.set(name, new KINDS[name.split("-")[0]](config, weights));
  }
  return models.get(name);
}

/** Lets messages in that came meanwhile, such as one to cancel. */
function breathe() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

async function draw({ id, name, decoder, seed, options }) {
  const drawer = await model(name), decode = decoder && await model(decoder);
  const start = performance.now();
  let tokens;
  for (const state of drawer.stream({ ...options, random: new Random(seed) })) {
    tokens = state.tokens;
    const colors = drawer.rgb && tokens.map((token) => drawer.rgb(token));
    postMessage({ id, type: "step", ...state, colors });
    await breathe();
    if (current !== id) return postMessage({ id, type: "end" });
  }
  const drawn = performance.now(), seconds = (drawn - start) / 1000;
  const image = decode && decode.decode(tokens, drawer.config.height);
  const decoding = (performance.now() - drawn) / 1000;
  postMessage({ id, type: "end", tokens, image, seconds, decoding });
}

self.onmessage = async ({ data }) => {
  current = data.cancel ? null : data.id;
  if (data.cancel) return;
  try {
    await draw(data);
  } catch (error) {
    postMessage({ id: data.id, type: "error", message: error.message });
  }
};
