// Answers what Sphinx's search asks of other pages from their text, see mlsae_book.excerpts.
(() => {
  const outside = window.fetch;
  window.fetch = (address, ...rest) => {
    const sections = TEXT[String(address).replace(/^\.\//, "")];
    if (!sections) return outside(address, ...rest);
    const main = document.createElement("div");
    main.setAttribute("role", "main");
    for (const [id, text] of sections) {
      const section = main.appendChild(document.createElement("section"));
      section.id = id;
      section.textContent = `${text} `;
    }
    return Promise.resolve(new Response(main.outerHTML));
  };
})();
