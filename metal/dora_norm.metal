// squared[n] = sum over k of (W[n, k] + scale * sum_j a[k, j] b[j, n])^2, W unpacked in registers and never written out.
//
// A simdgroup takes ROWS rows; a lane reads units of 16 weights, each byte of W once. WITH_UPDATE off: of W alone. Every
// simdgroup reads all of a, from the cache.
//@include weights
//@header
//@body
const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
const int n0 = (threadgroup_position_in_grid.y * NSG + sg) * ROWS;
const int rows = min(ROWS, N - n0);

#ifdef WITH_UPDATE
// scale * b of our rows, [row][j].
threadgroup float low[NSG * ROWS * R];
for (int e = lane; e < ROWS * R; e += 32) {
  const int i = e % ROWS, j = e / ROWS;
  if (i < rows) low[(sg * ROWS + i) * R + j] = float(scale[0]) * float(b[size_t(j) * N + n0 + i]);
}
simdgroup_barrier(mem_flags::mem_threadgroup);
#endif

float sum[ROWS];
for (int i = 0; i < ROWS; i++) sum[i] = 0;
for (int k = 16 * lane; k < K; k += 512) {
  float v[ROWS][16];
  for (int i = 0; i < ROWS; i++) {
    if (i >= rows) continue;
    const size_t row = n0 + i;
#if MODE == 0
    for (int j = 0; j < 16; j++) v[i][j] = k + j < K ? float(w[row * K + k + j]) : 0.0f;
#else
    read_codes<MODE, BITS>(half_words(w) + (row * K + k) / 16 * BITS, v[i]);
    const size_t group = (row * K + k) / GROUP;
    const float s = SCALE(group);
#if MODE == 1
    const float z = float(biases[group]);
#else
    const float z = 0;
#endif
    for (int j = 0; j < 16; j++) v[i][j] = s * v[i][j] + z;
#endif
  }
#ifdef WITH_UPDATE
  for (int j = 0; j < 16; j++) {
    if (k + j >= K) continue;
    for (int c = 0; c < R; c++) {
      const float ak = float(a[size_t(k + j) * R + c]);
      for (int i = 0; i < ROWS; i++)
        if (i < rows) v[i][j] += ak * low[(sg * ROWS + i) * R + c];
    }
  }
#endif
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < 16; j++)
      if (i < rows) sum[i] += v[i][j] * v[i][j];
}
float value = 0;
for (int i = 0; i < ROWS; i++) {
  const float total = simd_sum(sum[i]);
  if (lane == i) value = total;
}
if (lane < rows) squared[n0 + lane] = value;
