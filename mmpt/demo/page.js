// What the page does by itself: sound as it comes, Escape, the theme, and staying at the end.
(() => {
  const find = (selector) => document.querySelector(selector);
  let audio, name, count, ends, sources = [];

  const hush = () => {
    sources.forEach((source) => { try { source.stop(); } catch (e) { /* it has ended */ } });
    sources = [];
  };

  const samples = (chunk) => {
    const bytes = Uint8Array.from(atob(chunk), (letter) => letter.charCodeAt(0));
    return Float32Array.from(new Int16Array(bytes.buffer), (value) => value / 32768);
  };

  // the chunks of one part so far; those that were not heard yet follow the others without a gap
  const hear = (value) => {
    if (!value || !value.chunks) return;
    audio = audio || new AudioContext();
    audio.resume();
    if (value.name !== name) { name = value.name; count = 0; ends = Math.max(ends || 0, audio.currentTime + .05); }
    for (const chunk of value.chunks.slice(count)) {
      const wave = samples(chunk);
      const buffer = audio.createBuffer(1, wave.length, value.rate);
      buffer.copyToChannel(wave, 0);
      const source = audio.createBufferSource();
      source.buffer = buffer;
      source.connect(audio.destination);
      const begin = Math.max(ends, audio.currentTime);
      source.start(begin);
      ends = begin + buffer.duration;
      sources.push(source);
      mmpt.heard += 1;
    }
    count = value.chunks.length;
  };

  const stop = () => {
    hush();
    find("#composer .stop-button")?.click();
  };

  const themed = (dark) => {
    document.body.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    find("#theme")?.setAttribute("aria-pressed", dark);
  };

  const acts = (element, trigger) => element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-act]");
    if (button) trigger("select", { act: button.dataset.act, part: button.dataset.part });
  });

  // a brush over a picture: black where it is made anew
  const easel = (element, trigger) => {
    let last = null;
    const place = (canvas, event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) * canvas.width / box.width,
        (event.clientY - box.top) * canvas.height / box.height];
    };
    const paint = (canvas, to) => {
      const brush = canvas.getContext("2d");
      brush.lineCap = brush.lineJoin = "round";
      brush.lineWidth = Math.max(canvas.width, canvas.height) / 7;
      brush.beginPath();
      brush.moveTo(...(last || to));
      brush.lineTo(...to);
      brush.stroke();
      last = to;
    };
    element.addEventListener("pointerdown", (event) => {
      if (event.target.tagName !== "CANVAS") return;
      event.target.setPointerCapture(event.pointerId);
      last = null;
      paint(event.target, place(event.target, event));
    });
    element.addEventListener("pointermove", (event) => {
      if (event.target.tagName === "CANVAS" && last && event.buttons) paint(event.target, place(event.target, event));
    });
    element.addEventListener("pointerup", () => { last = null; });
    const said = (box) => {
      const value = (name) => box.querySelector(`[name=${name}]`)?.value || "";
      const mask = box.querySelector("canvas")?.toDataURL("image/png") || "";
      return { part: box.dataset.part, text: value("text"), start: value("start"), stop: value("stop"), mask };
    };
    element.addEventListener("click", (event) => {
      const act = event.target.closest("[data-act]")?.dataset.act;
      if (act === "cancel") trigger("select", {});
      if (act === "go") trigger("submit", said(event.target.closest(".easel")));
    });
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.name === "text") trigger("submit", said(event.target.closest(".easel")));
    });
  };

  window.mmpt = { hear, acts, easel, heard: 0 };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest("#theme")) themed(!document.body.classList.contains("dark"));
    if (event.target.closest(".stop-button")) hush();
  });
  // the end of the conversation stays in sight, unless someone scrolled up to read
  const follow = () => {
    const [talk, ask, ...boxes] = ["#talk", "#ask", "#history", "#live"].map(find);
    if (!talk || !ask || !boxes.every(Boolean)) return setTimeout(follow, 100);
    themed(document.body.classList.contains("dark"));
    let stuck = true;
    const keep = () => { if (stuck) talk.scrollTop = talk.scrollHeight; };
    talk.addEventListener("scroll", () => {
      stuck = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120;
    });
    // one click begins a recording, and one ends it
    let asked = false;
    new MutationObserver(() => {
      const [begin, attach] = [".record-button", ".confirm-button"].map((name) => ask.querySelector(name));
      if (!attach && !(begin && asked)) return;
      asked = false;
      setTimeout(() => (attach || begin).click(), attach ? 250 : 0); // behind its drawing of the wave
    }).observe(ask, { childList: true, subtree: true });
    ask.addEventListener("click", (event) => { asked ||= !!event.target.closest(".microphone-button"); }, true);
    // others may be answered first: say so until something changes
    let before = 0;
    const shown = () => boxes[0].querySelectorAll(".turn").length;
    const waits = (on) => { before = shown(); document.body.classList.toggle("waits", on); };
    const changed = new MutationObserver(() => {
      if (shown() !== before || boxes[1].querySelector(".turn, .problem")) waits(false);
    });
    boxes.forEach((box) => changed.observe(box, { childList: true, subtree: true }));
    ask.addEventListener("keydown", (event) => waits(event.key === "Enter" && event.target.matches("#composer textarea")));
    document.addEventListener("click", (event) => { if (event.target.closest(".submit-button, .chip")) waits(true); });
    const grown = new ResizeObserver(keep);
    [talk, ...boxes].forEach((box) => grown.observe(box));
    ask.addEventListener("keydown", (event) => { stuck ||= event.key === "Enter"; });
  };
  follow();
})();
