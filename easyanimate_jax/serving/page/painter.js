// A canvas on which a mask or paths are drawn, by mouse, pen or finger.

const SHOWN = "rgba(255, 64, 64, 0.55)";

export class Painter {
  // `changed` is called when a stroke ends.
  constructor(canvas, brush, changed) {
    this.canvas = canvas;
    this.brush = brush;
    this.changed = changed;
    this.kind = "mask";
    this.strokes = []; // each { points: [[x, y], ...], size }
    this.frame = null;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", () => this.#up());
    canvas.addEventListener("pointercancel", () => this.#up());
  }

  get touched() {
    return this.kind === "mask" && this.strokes.length > 0;
  }

  get paths() {
    return this.strokes.map((stroke) => stroke.points);
  }

  // Start to draw on a picture of this size; strokes stay if size and kind do.
  begin(kind, width, height, frame = null) {
    const same = this.kind === kind && this.canvas.width === width && this.canvas.height === height;
    if (!same || frame !== this.frame) this.strokes = [];
    [this.kind, this.frame] = [kind, frame];
    [this.canvas.width, this.canvas.height] = [width, height];
    this.draw();
  }

  // Show the first frame of a film or an animated picture; false if this browser cannot.
  async onFilm(file) {
    if (this.film === file) return true;
    const url = URL.createObjectURL(file);
    try {
      const frame = file.type.startsWith("image/") ? await createImageBitmap(file) : await firstFrame(url);
      this.begin("mask", frame.videoWidth || frame.width, frame.videoHeight || frame.height, frame);
      this.film = file;
      return true;
    } catch {
      return false;
    }
  }

  setPaths(text) {
    try {
      const paths = JSON.parse(text || "[]");
      this.strokes = paths.map((points) => ({ points, size: 0 }));
      this.draw();
    } catch {
      // The server says what is wrong with it.
    }
  }

  undo() {
    this.strokes.pop();
    this.draw();
    this.changed();
  }

  clear() {
    this.strokes = [];
    this.draw();
    this.changed();
  }

  // The mask as a PNG file: white where the strokes are.
  mask() {
    const sheet = new OffscreenCanvas(this.canvas.width, this.canvas.height);
    const pen = sheet.getContext("2d");
    pen.fillStyle = "black";
    pen.fillRect(0, 0, sheet.width, sheet.height);
    this.#strokes(pen, "white");
    return sheet.convertToBlob({ type: "image/png" });
  }

  draw() {
    const pen = this.canvas.getContext("2d");
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.frame) pen.drawImage(this.frame, 0, 0, this.canvas.width, this.canvas.height);
    this.#strokes(pen, SHOWN);
  }

  #strokes(pen, colour) {
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineCap = pen.lineJoin = "round";
    for (const { points, size } of this.strokes) {
      if (!points.length) continue;
      pen.lineWidth = this.kind === "path" ? Math.max(2, this.canvas.width / 100) : size;
      pen.beginPath();
      pen.moveTo(...points[0]);
      for (const point of points.slice(1)) pen.lineTo(...point);
      if (points.length === 1) pen.lineTo(points[0][0] + 0.1, points[0][1]);
      pen.stroke();
    }
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.canvas.width;
    const y = ((event.clientY - box.top) / box.height) * this.canvas.height;
    return [Math.round(x * 10) / 10, Math.round(y * 10) / 10];
  }

  #down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.drawing = true;
    const size = (Number(this.brush.value) / 400) * this.canvas.width;
    this.strokes.push({ points: [this.#at(event)], size });
    this.draw();
  }

  #move(event) {
    if (!this.drawing) return;
    this.strokes.at(-1).points.push(this.#at(event));
    this.draw();
  }

  #up() {
    if (!this.drawing) return;
    this.drawing = false;
    this.changed();
  }
}

function firstFrame(url) {
  return new Promise((done, failed) => {
    const film = document.createElement("video");
    film.muted = true;
    film.preload = "auto";
    film.addEventListener("loadeddata", () => done(film), { once: true });
    film.addEventListener("error", failed, { once: true });
    film.src = url;
  });
}
