// Data comes as scripts that call `explorerAsset`, since a page from a file may not fetch.  Each is
// bytes, deflated, as base64; it is loaded when it is first asked for.
const assets = (() => {
  const folder = document.currentScript.src.replace(/[^/]*$/, "");
  const found = new Map();
  const arrived = new Map();
  window.explorerAsset = (name, payload) => arrived.set(name, payload);

  const script = (name) =>
    new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = `${folder}data/${name}.js`;
      element.onload = resolve;
      element.onerror = () =>
        reject(
          new Error(`The file explorer/data/${name}.js of this book is missing or cannot be read.`),
        );
      document.head.append(element);
    });

  const inflate = async (payload) => {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("This browser cannot unpack the data of the page (no DecompressionStream).");
    }
    const text = atob(payload);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  };

  const load = (name) => {
    if (!found.has(name)) {
      const bytes = script(name).then(() => {
        const payload = arrived.get(name);
        arrived.delete(name);
        return inflate(payload);
      });
      bytes.catch(() => found.delete(name)); // whoever asks again tries again
      found.set(name, bytes);
    }
    return found.get(name);
  };
  const json = async (name) => JSON.parse(new TextDecoder().decode(await load(name)));
  return { load, json };
})();
