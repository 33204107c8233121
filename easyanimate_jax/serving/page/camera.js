// Camera moves as a pose file: a title, then per row time fx fy cx cy 0 0 and a 3x4 matrix from
// world to camera, 24 rows a second (docs/generate.md).

const RATE = 24; // rows a second
const FOCAL = 0.844; // in heights of the picture, as most clips of RealEstate10K
const FAR = 1.5; // units that a slider at 1 moves the camera over the whole video
const TURN = Math.PI / 3; // that a slider at 1 turns it by

export const SLIDERS = ["x", "y", "z", "pan", "tilt", "roll"];
export const PRESETS = {
  still: {},
  left: { x: -1 },
  right: { x: 1 },
  up: { y: -1 },
  down: { y: 1 },
  forward: { z: 1 },
  back: { z: -1 },
  pan_left: { pan: -0.5 },
  pan_right: { pan: 0.5 },
  tilt_up: { tilt: 0.5 },
  tilt_down: { tilt: -0.5 },
  roll: { roll: 0.5 },
};

const times = (a, b) => a.map((row) => b[0].map((_, j) => row.reduce((sum, x, k) => sum + x * b[k][j], 0)));

// The rotation from world to camera, for a camera that is turned by these angles.
// x points right, y down, z into the picture.
function rotation(pan, tilt, roll) {
  const [p, t, r] = [pan, tilt, roll];
  const about_y = [[Math.cos(p), 0, -Math.sin(p)], [0, 1, 0], [Math.sin(p), 0, Math.cos(p)]];
  const about_x = [[1, 0, 0], [0, Math.cos(t), Math.sin(t)], [0, -Math.sin(t), Math.cos(t)]];
  const about_z = [[Math.cos(r), Math.sin(r), 0], [-Math.sin(r), Math.cos(r), 0], [0, 0, 1]];
  return times(about_z, times(about_x, about_y));
}

export function poses(moves, frames, height, width, fps) {
  const last = Math.max(1, Math.ceil(((frames - 1) * RATE) / fps));
  const rows = ["easyanimate_jax camera"];
  for (let number = 0; number <= last; number++) {
    const share = number / last;
    const at = ["x", "y", "z"].map((name) => FAR * share * (moves[name] ?? 0));
    const angles = ["pan", "tilt", "roll"].map((name) => TURN * share * (moves[name] ?? 0));
    const matrix = rotation(...angles);
    const numbers = matrix.flatMap((row) => [...row, -row.reduce((sum, x, k) => sum + x * at[k], 0)]);
    const focal = [(FOCAL * height) / width, FOCAL, 0.5, 0.5, 0, 0];
    rows.push([number, ...focal, ...numbers].map((x) => Number(x.toFixed(7))).join(" "));
  }
  return rows.join("\n") + "\n";
}
