// y[m, n] = gain[n] * (sum_k W[n, k] x[m, k] + scale * sum_j u[m, j] b[j, n]) + bias[n].
//
// A simdgroup takes ROWS rows of W and M rows of x: those from `first` on, or the last M, of which it then writes the new
// ones. A lane adds its share of the low-rank update to the sums it has of the base, so that both end in one reduction.
// Each byte of W and b is read once for M rows. u [splits, total, columns] comes from lora_shrink; its columns from
// `offset` on are ours. INDEXED: b is [adapters, R, N], row m takes adapter idx[m] (none where negative), of rank
// ranks[idx[m]].
//@include weights
//@header
//@body
#ifdef INDEXED
const int N = b_shape[2];
#else
const int N = b_shape[1];
#endif
const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
const int total = TILED ? u_shape[1] : M, first = threadgroup_position_in_grid.x * M;
const int m0 = min(first, total - M);
const int n0 = (threadgroup_position_in_grid.y * NSG + sg) * ROWS;

// scale * u, summed over the splits.
threadgroup float low[M * R];
for (int e = sg * 32 + lane; e < M * R; e += NSG * 32) {
  const int m = e / R, j = e % R;
#ifdef INDEXED
  const int id = idx[m0 + m];
  const float factor = id < 0 || j >= ranks[id] ? 0.0f : float(scale[id]);
#else
  const float factor = float(scale[0]);
#endif
  float sum = 0;
  for (int s = 0; s < SPLITS; s++) sum += u[(size_t(s) * total + m0 + m) * u_shape[2] + offset[0] + j];
  low[e] = factor * sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const int rows = min(ROWS, N - n0);
if (rows <= 0) return;

float sum[M * ROWS];
for (int i = 0; i < M * ROWS; i++) sum[i] = 0;
add_products<BITS, GROUP, M, ROWS>(STORED(w, scales, biases), x + size_t(m0) * K, n0, rows, K, lane,
                                   sum NESTED_ARGUMENTS);

// Lane l adds columns l / ROWS, l / ROWS + 32 / ROWS, ... of the update of row l % ROWS.
const int mine = lane % ROWS;
if (mine < rows) {
  for (int j = lane / ROWS; j < R; j += 32 / ROWS) {
#ifdef INDEXED
    for (int m = 0; m < M; m++) {
      const int id = idx[m0 + m];
      bool leads = id >= 0 && j < ranks[id];
      for (int l = 0; l < m; l++) leads = leads && idx[m0 + l] != id;
      if (!leads) continue;  // rows of one adapter share what is read
      const float v = float(b[(size_t(id) * R + j) * N + n0 + mine]);
      for (int l = m; l < M; l++)
        for (int i = 0; i < ROWS; i++)
          if (i == mine && idx[m0 + l] == id) sum[l * ROWS + i] += low[l * R + j] * v;
    }
#else
    const float v = float(b[size_t(j) * N + n0 + mine]);
    for (int m = 0; m < M; m++)
      for (int i = 0; i < ROWS; i++)
        if (i == mine) sum[m * ROWS + i] += low[m * R + j] * v;
#endif
  }
}

// Lane m * ROWS + i writes row m, column n0 + i.
float value = 0;
for (int i = 0; i < M * ROWS; i++) {
  const float total = simd_sum(sum[i]);
  if (lane == i) value = total;
}
const int m = lane / ROWS;
if (m >= M || mine >= rows || m0 + m < first) return;
#ifdef HAS_GAIN
value *= float(gain[n0 + mine]);
#endif
#ifdef HAS_BIAS
value += float(bias[n0 + mine]);
#endif
y[size_t(m0 + m) * N + n0 + mine] = T(value);
