// The language model (GPT-NeoX: rotary positions, attention beside the MLP) and its dictionary.
// A matrix of activations is one Float32Array, a row for each token.

// rows (n, width) times weight (outputs, width), transposed, plus bias: (n, outputs).  Four rows at
// a time, so that a weight is read once for them.
function product(rows, weight, bias, width) {
  const n = rows.length / width;
  const outputs = weight.length / width;
  const result = new Float32Array(n * outputs);
  for (let first = 0; first < n; first += 4) {
    const a = first * width;
    const b = Math.min(first + 1, n - 1) * width;
    const c = Math.min(first + 2, n - 1) * width;
    const d = Math.min(first + 3, n - 1) * width;
    for (let output = 0; output < outputs; output++) {
      const start = output * width;
      const offset = bias ? bias[output] : 0;
      let [p, q, r, s] = [offset, offset, offset, offset];
      for (let i = 0; i < width; i++) {
        const w = weight[start + i];
        p += w * rows[a + i];
        q += w * rows[b + i];
        r += w * rows[c + i];
        s += w * rows[d + i];
      }
      const at = first * outputs + output;
      result[at] = p;
      if (first + 1 < n) result[at + outputs] = q;
      if (first + 2 < n) result[at + 2 * outputs] = r;
      if (first + 3 < n) result[at + 3 * outputs] = s;
    }
  }
  return result;
}

// Mean, sum of squares about it, of one row.
function moments(rows, start, width) {
  let mean = 0;
  for (let i = 0; i < width; i++) mean += rows[start + i];
  mean /= width;
  let squares = 0;
  for (let i = 0; i < width; i++) squares += (rows[start + i] - mean) ** 2;
  return [mean, squares];
}

// x Φ(x), with the complementary error function of Press et al., Numerical Recipes, Section 6.2,
// whose relative error is below 1.2e-7.
function gelu(x) {
  const z = Math.abs(x) / Math.SQRT2;
  const t = 1 / (1 + 0.5 * z);
  const series = [
    1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
    -0.82215223, 0.17087277,
  ];
  let sum = 0;
  for (let i = series.length - 1; i >= 0; i--) sum = sum * t + series[i];
  const tail = t * Math.exp(-z * z - 1.26551223 + t * sum);
  return (x * (x >= 0 ? 2 - tail : tail)) / 2;
}

class Transformer {
  // config: as the asset's header has it; weights: name → Float32Array.
  constructor(config, weights) {
    Object.assign(this, config);
    this.weights = weights;
    this.headWidth = this.width / this.heads;
  }

  embed(ids) {
    const rows = new Float32Array(ids.length * this.width);
    ids.forEach((id, t) => {
      const row = this.weights.embedding.subarray(id * this.width, (id + 1) * this.width);
      rows.set(row, t * this.width);
    });
    return rows;
  }

  norm(rows, name) {
    const [scale, shift] = [this.weights[`${name}.weight`], this.weights[`${name}.bias`]];
    const result = new Float32Array(rows.length);
    for (let start = 0; start < rows.length; start += this.width) {
      const [mean, squares] = moments(rows, start, this.width);
      const factor = 1 / Math.sqrt(squares / this.width + this.epsilon);
      for (let i = 0; i < this.width; i++) {
        result[start + i] = (rows[start + i] - mean) * factor * scale[i] + shift[i];
      }
    }
    return result;
  }

  linear(rows, name, width) {
    return product(rows, this.weights[`${name}.weight`], this.weights[`${name}.bias`], width);
  }

  // The residual stream after a block, from the one before it.
  block(layer, rows) {
    const name = `layers.${layer}`;
    const joint = this.linear(this.norm(rows, `${name}.norm_attention`), `${name}.qkv`, this.width);
    const attended = this.linear(this.attend(joint), `${name}.attention`, this.width);
    const hidden = this.linear(this.norm(rows, `${name}.norm_mlp`), `${name}.up`, this.width);
    for (let i = 0; i < hidden.length; i++) hidden[i] = gelu(hidden[i]);
    const added = this.linear(hidden, `${name}.down`, this.hidden);
    for (let i = 0; i < added.length; i++) added[i] += attended[i] + rows[i];
    return added;
  }

  // joint (n, heads · 3 · head width): query, key and value of each head, side by side.
  attend(joint) {
    const [w, stride] = [this.headWidth, 3 * this.width];
    const n = joint.length / stride;
    const result = new Float32Array(n * this.width);
    const scores = new Float64Array(n);
    for (let head = 0; head < this.heads; head++) {
      const query = head * 3 * w;
      for (let t = 0; t < n; t++) {
        this.rotate(joint, t * stride + query, t);
        this.rotate(joint, t * stride + query + w, t);
      }
      for (let t = 0; t < n; t++) {
        let largest = -Infinity;
        for (let s = 0; s <= t; s++) {
          let score = 0;
          const [q, k] = [t * stride + query, s * stride + query + w];
          for (let i = 0; i < w; i++) score += joint[q + i] * joint[k + i];
          scores[s] = score / Math.sqrt(w);
          largest = Math.max(largest, scores[s]);
        }
        let total = 0;
        for (let s = 0; s <= t; s++) total += scores[s] = Math.exp(scores[s] - largest);
        for (let s = 0; s <= t; s++) {
          const share = scores[s] / total;
          const [v, out] = [s * stride + query + 2 * w, t * this.width + head * w];
          for (let i = 0; i < w; i++) result[out + i] += share * joint[v + i];
        }
      }
    }
    return result;
  }

  // Rotary position: turns the first dimensions of a vector, dimension i together with i + half.
  rotate(rows, start, position) {
    const half = this.rotary / 2;
    for (let i = 0; i < half; i++) {
      const angle = position * this.theta ** (-i / half);
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      const [a, b] = [rows[start + i], rows[start + half + i]];
      rows[start + i] = a * cos - b * sin;
      rows[start + half + i] = b * cos + a * sin;
    }
  }

  // Probabilities of the next token (n, vocabulary) after each row of the last block's output.
  predict(rows) {
    const logits = product(this.norm(rows, "norm_last"), this.weights.embedding, null, this.width);
    const size = this.weights.embedding.length / this.width;
    for (let start = 0; start < logits.length; start += size) {
      const row = logits.subarray(start, start + size);
      const largest = row.reduce((a, b) => Math.max(a, b));
      let total = 0;
      for (let i = 0; i < size; i++) total += row[i] = Math.exp(row[i] - largest);
      for (let i = 0; i < size; i++) row[i] /= total;
    }
    return logits;
  }
}

// The multi-layer sparse autoencoder: vectors standardised each by itself, the k largest latents.
class Dictionary {
  constructor({ width, k, std_epsilon }, weights) {
    Object.assign(this, { width, k, epsilon: std_epsilon });
    this.encoder = weights["dictionary.encoder"];
    this.decoder = weights["dictionary.decoder"]; // (latents, width)
    this.bias = weights["dictionary.bias"];
    this.latents = this.encoder.length / width;
  }

  // Mean and unbiased standard deviation of the vector of a token.
  stats(rows, t) {
    const [mean, squares] = moments(rows, t * this.width, this.width);
    return [mean, Math.sqrt(squares / (this.width - 1))];
  }

  // indices and values (n, k), the largest first, of equals the lower number; inactive ones are 0.
  encode(rows) {
    const n = rows.length / this.width;
    const scaled = new Float32Array(rows.length);
    for (let t = 0; t < n; t++) {
      const [mean, std] = this.stats(rows, t);
      for (let i = 0; i < this.width; i++) {
        const at = t * this.width + i;
        scaled[at] = (rows[at] - mean) / (std + this.epsilon) - this.bias[i];
      }
    }
    const scores = product(scaled, this.encoder, null, this.width);
    const indices = new Uint16Array(n * this.k);
    const values = new Float32Array(n * this.k);
    for (let t = 0; t < n; t++) {
      const row = scores.subarray(t * this.latents, (t + 1) * this.latents);
      const best = [];
      for (let j = 0; j < this.latents; j++) {
        if (best.length === this.k && row[j] <= row[best.at(-1)]) continue;
        let at = best.length;
        while (at > 0 && row[best[at - 1]] < row[j]) at--;
        best.splice(at, 0, j);
        best.length = Math.min(best.length, this.k);
      }
      best.forEach((j, rank) => {
        indices[t * this.k + rank] = j;
        values[t * this.k + rank] = Math.max(0, row[j]);
      });
    }
    return { indices, values };
  }

  // The reconstruction of one vector, in the residual stream's own units.
  decode(codes, rows, t) {
    const [mean, std] = this.stats(rows, t);
    const result = Float64Array.from(this.bias);
    for (let rank = 0; rank < this.k; rank++) {
      const start = codes.indices[t * this.k + rank] * this.width;
      const value = codes.values[t * this.k + rank];
      for (let i = 0; i < this.width; i++) result[i] += value * this.decoder[start + i];
    }
    return result.map((y) => y * std + mean);
  }

  // The activation of a latent at a token, 0 where it is not among the k largest.
  activation(codes, t, latent) {
    const at = codes.indices.subarray(t * this.k, (t + 1) * this.k).indexOf(latent);
    return at < 0 ? 0 : codes.values[t * this.k + at];
  }
}
