// Reads what minigen/checkpoints.py writes: config.json and model.safetensors.

/** Every 16-bit float as a number: sign, 5 bits of exponent, 10 of mantissa. */
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31;
  const mantissa = bits & 1023;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return exponent === 0
    ? sign * mantissa * 2 ** -24
    : sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
});

/** A file, or an error that says in a sentence what is wrong with it. */
async function read(url) {
  let reply;
  try {
    reply = await fetch(url);
  } catch {
    throw new Error(`the file ${url} cannot be read: is the server still there?`);
  }
  if (!reply.ok) {
    throw new Error(
      `the file ${url} is missing (${reply.status}): build the book again`,
    );
  }
  return reply;
}

/** The tensors of a safetensors file, {name: {shape, data}}, of 16-bit floats. */
export function readSafetensors(buffer, name = "model.safetensors") {
  const damaged = new Error(`the file ${name} is damaged: build the book again`);
  if (buffer.byteLength < 8) throw damaged;
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  if (8 + length > buffer.byteLength) throw damaged;
  let header;
  try {
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  } catch {
    throw damaged;
  }
  const tensors = {};
  for (const [key, { dtype, shape, data_offsets }] of Object.entries(header)) {
    if (dtype !== "F16") continue; // counters of the training
    const [start, end] = data_offsets;
    const count = shape.reduce((a, b) => a * b, 1);
    if (end - start !== 2 * count || 8 + length + end > buffer.byteLength) {
      throw damaged;
    }
    const bytes = buffer.slice(8 + length + start, 8 + length + end);
    const data = Float32Array.from(new Uint16Array(bytes), (half) => HALVES[half]);
    tensors[key] = { shape, data };
  }
  return tensors;
}

/** The configuration and the weights of a model in a folder. */
export async function load(folder) {
  const config = await (await read(`${folder}/config.json`)).json();
  const file = `${folder}/model.safetensors`;
  return [config, readSafetensors(await (await read(file)).arrayBuffer(), file)];
}
