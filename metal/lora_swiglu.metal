// y[m, n] = silu(gate[m, n]) * up[m, n], each of them W x + scale * B (A x), in one pass over both weights.
//
// As lora_qmv, twice: w, scales, biases, b of the gate, and w2, scales2, biases2, b2 of the up projection; `scale` holds
// both factors, `offset` both first columns of u. The two values are rounded to T before they meet, as separate
// operations would.
//@include weights
//@header
//@body
const int N = b_shape[1];
const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
const int total = TILED ? u_shape[1] : M, first = threadgroup_position_in_grid.x * M;
const int m0 = min(first, total - M);
const int n0 = (threadgroup_position_in_grid.y * NSG + sg) * ROWS;

// scale * u of the gate, then of the up projection.
threadgroup float low[2 * M * R];
for (int e = sg * 32 + lane; e < 2 * M * R; e += NSG * 32) {
  const int side = e / (M * R), m = e / R % M, j = e % R;
  float sum = 0;
  for (int s = 0; s < SPLITS; s++) sum += u[(size_t(s) * total + m0 + m) * u_shape[2] + offset[side] + j];
  low[e] = float(scale[side]) * sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const int rows = min(ROWS, N - n0);
if (rows <= 0) return;

float gate[M * ROWS], up[M * ROWS];
for (int i = 0; i < M * ROWS; i++) gate[i] = up[i] = 0;
add_products<BITS, GROUP, M, ROWS>(STORED(w, scales, biases), x + size_t(m0) * K, n0, rows, K, lane, gate);
add_products<BITS, GROUP, M, ROWS>(STORED(w2, scales2, biases2), x + size_t(m0) * K, n0, rows, K, lane, up);

const int mine = lane % ROWS;
if (mine < rows) {
  for (int j = lane / ROWS; j < R; j += 32 / ROWS) {
    const float v = float(b[size_t(j) * N + n0 + mine]), v2 = float(b2[size_t(j) * N + n0 + mine]);
    for (int m = 0; m < M; m++) {
      for (int i = 0; i < ROWS; i++) {
        if (i != mine) continue;
        gate[m * ROWS + i] += low[m * R + j] * v;
        up[m * ROWS + i] += low[(M + m) * R + j] * v2;
      }
    }
  }
}

float g = 0, h = 0;
for (int i = 0; i < M * ROWS; i++) {
  const float total = simd_sum(gate[i]), total2 = simd_sum(up[i]);
  if (lane == i) {
    g = float(T(total));
    h = float(T(total2));
  }
}
const int m = lane / ROWS;
if (m >= M || mine >= rows || m0 + m < first) return;
y[size_t(m0 + m) * N + n0 + mine] = T(g / (1.0f + exp(-g)) * h);
