// Byte-level byte-pair encoding.  Tokens are strings with one character for each of their bytes.
class Tokenizer {
  // The pieces that are encoded each for itself; white space is Unicode's, not JavaScript's \s.
  static PIECES = new RegExp(
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
      "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
    "gu",
  );

  // vocabulary: tokens by id; merges: ids of left and right, left and right, …, the first first.
  constructor(vocabulary, merges) {
    this.ids = new Map(vocabulary.map((token, id) => [token, id]));
    this.ranks = new Map();
    for (let rank = 0; 2 * rank < merges.length; rank++) {
      const [left, right] = merges.slice(2 * rank, 2 * rank + 2);
      const id = this.ids.get(vocabulary[left] + vocabulary[right]);
      this.ranks.set(left * vocabulary.length + right, { rank, id });
    }
    this.size = vocabulary.length;
  }

  encode(text) {
    const ids = [];
    for (const [piece] of text.matchAll(Tokenizer.PIECES)) {
      const bytes = Array.from(new TextEncoder().encode(piece), (b) => String.fromCharCode(b));
      for (const id of this.merge(bytes.map((byte) => this.ids.get(byte)))) ids.push(id);
    }
    return ids;
  }

  // The pair that was learnt first is joined first, of several like it the leftmost.
  merge(ids) {
    for (;;) {
      let best = null;
      let at = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const pair = this.ranks.get(ids[i] * this.size + ids[i + 1]);
        if (pair && (!best || pair.rank < best.rank)) [best, at] = [pair, i];
      }
      if (!best) return ids;
      ids.splice(at, 2, best.id);
    }
  }
}
