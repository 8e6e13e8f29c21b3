// The layers of PyTorch that the models use. Vectors lie one after the other in a
// Float32Array; images are {data, channels, height, width}, channel by channel.

/** Rows of x times a matrix (out, in): PyTorch's linear layer. */
export function linear(x, { shape: [outs, ins], data: w }) {
  const rows = x.length / ins, y = new Float32Array(rows * outs);
  // two rows and four outputs at a time, so that each number read is used often
  for (let row = 0; row < rows; row += 2) {
    const one = row * ins, two = Math.min(row + 1, rows - 1) * ins;
    for (let out = 0; out < outs; out += 4) {
      const a = out * ins, b = a + ins, c = b + ins, d = c + ins;
      let a1 = 0, b1 = 0, c1 = 0, d1 = 0, a2 = 0, b2 = 0, c2 = 0, d2 = 0;
      for (let i = 0; i < ins; i++) {
        const x1 = x[one + i], x2 = x[two + i];
        a1 += x1 * w[a + i];
        b1 += x1 * w[b + i];
        c1 += x1 * w[c + i];
        d1 += x1 * w[d + i];
        a2 += x2 * w[a + i];
        b2 += x2 * w[b + i];
        c2 += x2 * w[c + i];
        d2 += x2 * w[d + i];
      }
      y.set([a1, b1, c1, d1], row * outs + out);
      if (row + 1 < rows) y.set([a2, b2, c2, d2], (row + 1) * outs + out);
    }
  }
  return y;
}

/** Each vector with mean 0 and variance 1, times a weight; without a bias. */
export function layerNorm(x, { data: weight }) {
  const dim = weight.length, y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += dim) {
    let mean = 0, variance = 0;
    for (let i = 0; i < dim; i++) mean += x[start + i] / dim;
    for (let i = 0; i < dim; i++) variance += (x[start + i] - mean) ** 2 / dim;
    const scale = 1 / Math.sqrt(variance + 1e-5);
    for (let i = 0; i < dim; i++) {
      y[start + i] = (x[start + i] - mean) * scale * weight[i];
    }
  }
  return y;
}

/** The error function, to 1.5e-7 (Abramowitz and Stegun, 7.1.26). */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (0.254829592 +
    t * (-0.284496736 +
        t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

/** x times the share of a normal distribution below it; in place. */
export function gelu(x) {
  for (let i = 0; i < x.length; i++) x[i] *= (1 + erf(x[i] * Math.SQRT1_2)) / 2;
  return x;
}

/** x times its sigmoid; in place. */
export function silu(image) {
  const x = image.data;
  for (let i = 0; i < x.length; i++) x[i] /= 1 + Math.exp(-x[i]);
  return image;
}

/** Scores as probabilities, in place. */
export function softmax(x) {
  let largest = -Infinity, total = 0;
  for (const value of x) largest = Math.max(largest, value);
  for (let i = 0; i < x.length; i++) total += x[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < x.length; i++) x[i] /= total;
  return x;
}

/** A convolution with kernels of 1 x 1 or 3 x 3, padded with zeros. */
export function conv2d(image, { shape, data: w }, { data: bias }) {
  const { height, width } = image, [outs, ins, side] = shape, pixels = height * width;
  const y = new Float32Array(outs * pixels), margin = (side - 1) / 2;
  const wide = width + 2 * margin, padded = (height + 2 * margin) * wide;
  const x = new Float32Array(ins * padded);
  for (let channel = 0; channel < ins; channel++) {
    for (let row = 0; row < height; row++) {
      const from = channel * pixels + row * width;
      const to = channel * padded + (row + margin) * wide + margin;
      x.set(image.data.subarray(from, from + width), to);
    }
  }
  for (let out = 0; out < outs; out++) {
    const plane = y.subarray(out * pixels, (out + 1) * pixels).fill(bias[out]);
    for (let channel = 0; channel < ins; channel++) {
      const kernel = w.subarray((out * ins + channel) * side * side);
      addConvolved(plane, x.subarray(channel * padded), kernel, side, width, wide);
    }
  }
  return { data: y, channels: outs, height, width };
}

/** Adds one padded channel x, convolved with one kernel, to a plane. */
function addConvolved(plane, x, kernel, side, width, wide) {
  if (side === 1) {
    const weight = kernel[0];
    for (let i = 0; i < plane.length; i++) plane[i] += weight * x[i];
    return;
  }
  const [a, b, c, d, e, f, g, h, k] = kernel;
  for (let row = 0; row * width < plane.length; row++) {
    let above = row * wide, here = above + wide, below = here + wide;
    for (let i = row * width; i < (row + 1) * width; i++, above++, here++, below++) {
      plane[i] += a * x[above] + b * x[above + 1] + c * x[above + 2] +
        d * x[here] + e * x[here + 1] + f * x[here + 2] +
        g * x[below] + h * x[below + 1] + k * x[below + 2];
    }
  }
}

/** Groups of channels with mean 0 and variance 1, then a weight and a bias each. */
export function groupNorm(image, { data: weight }, { data: bias }) {
  const { data: x, channels, height, width } = image, y = new Float32Array(x.length);
  let groups = Math.min(32, channels >> 2);
  while (channels % groups) groups--;
  const pixels = height * width, size = x.length / groups;
  for (let start = 0; start < x.length; start += size) {
    let mean = 0, variance = 0;
    for (let i = start; i < start + size; i++) mean += x[i] / size;
    for (let i = start; i < start + size; i++) variance += (x[i] - mean) ** 2 / size;
    const scale = 1 / Math.sqrt(variance + 1e-6);
    for (let i = start; i < start + size; i++) {
      const channel = Math.floor(i / pixels);
      y[i] = (x[i] - mean) * scale * weight[channel] + bias[channel];
    }
  }
  return { ...image, data: y };
}

/** Each pixel twice in both directions. */
export function upsample({ data, channels, height, width }) {
  const wide = 2 * width, y = new Float32Array(4 * data.length);
  for (let i = 0; i < y.length; i++) {
    const row = Math.floor(i / wide), column = i % wide;
    y[i] = data[(row >> 1) * width + (column >> 1)]; // rows of all channels in turn
  }
  return { data: y, channels, height: 2 * height, width: wide };
}
