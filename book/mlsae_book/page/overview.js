// All latents at once: a column for each, by rising mean layer, the first layer at the bottom.  What
// a click chooses here is in the list as well.
class Overview {
  constructor(place, { latents, layers }, choose) {
    const { mean_layer: mean, probs } = latents;
    this.order = [...mean.keys()].sort((a, b) => mean[a] - mean[b]);
    this.mark = place.querySelector(".overview i");
    const canvas = place.querySelector(".overview canvas");
    [canvas.width, canvas.height] = [this.order.length, layers];
    const pen = canvas.getContext("2d");
    this.order.forEach((latent, x) => {
      probs[latent].forEach((share, layer) => {
        pen.fillStyle = `rgba(86, 180, 233, ${share / 100})`;
        pen.fillRect(x, layers - 1 - layer, 1, 1);
      });
    });
    const at = ({ offsetX }) => {
      const x = Math.floor((offsetX / canvas.clientWidth) * this.order.length);
      return this.order[Math.max(0, Math.min(this.order.length - 1, x))];
    };
    canvas.addEventListener("click", (event) => choose({ latent: at(event) }));
    canvas.addEventListener("mousemove", (event) => {
      canvas.title = `latent ${at(event)}, mean layer ${number(mean[at(event)])}`;
    });
  }

  show(latent) {
    this.mark.hidden = latent === null;
    this.mark.style.left = `${(100 * (this.order.indexOf(latent) + 0.5)) / this.order.length}%`;
  }
}
