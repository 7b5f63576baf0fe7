// Runs prompts: all that the model can be asked.  Answers are generators that pause between blocks,
// so that they can run in slices where there is no worker.
class Engine {
  // buffer: the length of a header, the header, and of all weights the exponents and the rest.
  constructor(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const { count } = header;
    const exponents = new Uint8Array(buffer, 4 + length, count);
    const rest = new Uint16Array(buffer.slice(4 + length + count));
    const bits = new Uint32Array(count);
    for (let i = 0; i < count; i++) {
      bits[i] = ((rest[i] & 0x8000) << 16) | (exponents[i] << 23) | ((rest[i] & 0x7fff) << 8);
    }
    const all = new Float32Array(bits.buffer);
    const weights = {};
    for (const [name, start, end] of header.tensors) weights[name] = all.subarray(start, end);
    this.tokenizer = new Tokenizer(header.vocabulary, header.merges);
    this.network = new Transformer(header.config, weights);
    this.dictionary = new Dictionary(header.config, weights);
  }

  // Token ids, and the active latents of every layer; `left` tokens did not fit into the context.
  *run(text) {
    const all = this.tokenizer.encode(text);
    const ids = all.slice(0, this.network.context);
    const streams = [];
    let rows = this.network.embed(ids);
    for (let layer = 0; layer < this.network.layers; layer++) {
      rows = this.network.block(layer, rows);
      streams.push(rows);
      yield;
    }
    const codes = [];
    for (const stream of streams) {
      codes.push(this.dictionary.encode(stream));
      yield;
    }
    this.before = { streams, codes, probabilities: this.network.predict(rows) };
    this.after = null;
    return { ids, codes, left: all.length - ids.length };
  }

  // Change the vectors after one block and run the rest.
  // change: { kind: "steer" | "ablate" | "reconstruct", layer, latent, amount, token }; without a
  // token, at all of them.  Gives the codes from that layer on.
  *change({ kind, layer, latent, amount, token }) {
    const { dictionary, network } = this;
    const width = network.width;
    const codes = this.before.codes[layer];
    let rows = this.before.streams[layer].slice();
    for (let t = 0; t < rows.length / width; t++) {
      if (token !== null && token !== t) continue;
      if (kind === "reconstruct") {
        rows.set(dictionary.decode(codes, rows, t), t * width);
        continue;
      }
      const steps = kind === "ablate" ? -dictionary.activation(codes, t, latent) : amount;
      const size = steps * dictionary.stats(rows, t)[1];
      for (let i = 0; i < width; i++) {
        rows[t * width + i] += size * dictionary.decoder[latent * width + i];
      }
    }
    const later = [dictionary.encode(rows)];
    for (let next = layer + 1; next < network.layers; next++) {
      rows = network.block(next, rows);
      later.push(dictionary.encode(rows));
      yield;
    }
    this.after = { probabilities: network.predict(rows) };
    return { codes: later };
  }

  // Probabilities of every next token after a token, without and, if there is one, with the change.
  *predictions(token) {
    const of = (pass) => {
      if (!pass) return null;
      const size = this.tokenizer.size;
      return pass.probabilities.slice(token * size, (token + 1) * size);
    };
    return { before: of(this.before), after: of(this.after) };
  }

  // The likeliest next tokens after a token, by rising id: `most` without the change, and as many
  // with it; and what `predictions` has of them.
  *likeliest({ token, most }) {
    const { before, after } = yield* this.predictions(token);
    const best = (p) => (p ? [...p.keys()].sort((a, b) => p[b] - p[a]).slice(0, most) : []);
    const ids = [...new Set([...best(before), ...best(after)])].sort((a, b) => a - b);
    const of = (p) => p && ids.map((id) => p[id]);
    return { ids, before: of(before), after: of(after) };
  }

  // The mean over tokens of KL(before ‖ after) of the predictions, in nats.
  *divergence() {
    const [p, q] = [this.before.probabilities, this.after.probabilities];
    let sum = 0;
    for (let i = 0; i < p.length; i++) if (p[i] > 0) sum += p[i] * Math.log(p[i] / (q[i] || 1e-30));
    return (sum * this.tokenizer.size) / p.length;
  }
}

// Where prompts are run, and what a reader is told of it before.
const RUNS = {
  where: "this browser",
  before: (megabytes) =>
    `Model and dictionary, ${megabytes} MB, are loaded when you run a prompt. Nothing that you type leaves this page.`,
};

// What a worker runs; everything above is given to it as text.
function serve() {
  let engine = null;
  self.onmessage = ({ data: { id, method, given } }) => {
    try {
      let result = null;
      if (method === "start") engine = new Engine(given);
      else {
        const steps = engine[method](given);
        let step = steps.next();
        while (!step.done) step = steps.next();
        result = step.value;
      }
      self.postMessage({ id, result });
    } catch (error) {
      self.postMessage({ id, error: String(error) });
    }
  };
}

// Gives `ask(method, argument)`, a promise; questions are answered one after the other.
async function startEngine() {
  const buffer = await assets.load("model");
  const inWorker = async () => {
    const parts = [product, moments, gelu, Transformer, Dictionary, Tokenizer, Engine, serve];
    const source = `${parts.join("\n")}\nserve();`;
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const worker = new Worker(url);
    const waiting = new Map();
    let asked = 0;
    const ask = (method, given) =>
      new Promise((resolve, reject) => {
        waiting.set(++asked, { resolve, reject });
        worker.postMessage({ id: asked, method, given });
      });
    const settle = (id, how, value) => {
      waiting.get(id)?.[how](value);
      waiting.delete(id);
    };
    worker.onmessage = ({ data: { id, result, error } }) => {
      if (error === undefined) settle(id, "resolve", result);
      else settle(id, "reject", new Error(error));
    };
    worker.onerror = () => [...waiting.keys()].forEach((id) => settle(id, "reject", new Error()));
    return ask("start", buffer).then(() => ask);
  };
  const inSlices = async () => {
    const engine = new Engine(buffer);
    let last = Promise.resolve();
    return (method, given) => {
      const answer = last.then(async () => {
        const steps = engine[method](given);
        for (;;) {
          const step = steps.next();
          if (step.done) return step.value;
          await new Promise((resolve) => setTimeout(resolve));
        }
      });
      last = answer.catch(() => {});
      return answer;
    };
  };
  return inWorker().catch(inSlices);
}
