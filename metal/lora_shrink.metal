// u[s, m, :] = the part of split s of the sum over k of x[m, k] a[k, :], for all NPROJ matrices a0, a1, ... at once.
//
// A threadgroup takes one split of k, 4 * C columns of one matrix and M rows of x, for which each byte of a is read once:
// C lanes side by side read 4 columns each of one k, the lanes beyond them the next k. The sum over the splits is left
// to whoever reads u. INDEXED: a is [adapters, K, R], row m takes adapter idx[m] (none where negative) and the first
// ranks[idx[m]] columns; a threadgroup serves the rows of one adapter, the first of them in charge.
//@header
template <typename T, int M, int C, int NSG, typename A, typename X>
METAL_FUNC void shrink(A a, X x, device float* u, threadgroup float* part, uint rows, int rank, int width, int stride, int K,
                       int begin, int end, int column, int lane, int sg) {
  const int c = column + 4 * (lane % C);
  float sum[4 * M];
  for (int i = 0; i < 4 * M; i++) sum[i] = 0;
  for (int k = begin + sg * (32 / C) + lane / C; k < end; k += NSG * (32 / C)) {
    float v[4];
    for (int i = 0; i < 4; i++) v[i] = c + i < rank ? float(a[size_t(k) * width + c + i]) : 0.0f;
    for (int m = 0; m < M; m++) {
      if (!(rows >> m & 1)) continue;
      const float xk = float(x[size_t(m) * K + k]);
      for (int i = 0; i < 4; i++) sum[4 * m + i] += v[i] * xk;
    }
  }
  for (int i = 0; i < 4 * M; i++) {
    for (int d = C; d < 32; d *= 2) sum[i] += simd_shuffle_xor(sum[i], ushort(d));
    if (lane < C) part[(sg * C + lane) * 4 * M + i] = sum[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = sg * 32 + lane; e < 4 * C * M; e += NSG * 32) {
    const int m = e / (4 * C), j = e % (4 * C);
    if (!(rows >> m & 1) || column + j >= width) continue;
    float total = 0;
    for (int g = 0; g < NSG; g++) total += part[(g * C + j / 4) * 4 * M + 4 * m + j % 4];
    u[size_t(m) * stride + column + j] = total;
  }
}
//@body
const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
const int tiles = threadgroups_per_grid.y / SPLITS;
const int split = threadgroup_position_in_grid.y / tiles;
const int column = (threadgroup_position_in_grid.y % tiles) * 4 * C;
const int step = (K + SPLITS - 1) / SPLITS;
const int begin = split * step, end = min(K, begin + step);
const int z = threadgroup_position_in_grid.z;
int total = TILED ? 1 : M;
for (int d = 0; TILED && d < x_ndim - 1; d++) total *= x_shape[d];
const int m0 = min(int(threadgroup_position_in_grid.x) * M, total - M);
const int first = threadgroup_position_in_grid.x * M - m0;  // the rows before belong to another threadgroup
threadgroup float part[NSG * C * 4 * M];

// MLX passes the shapes that the text names: a0_shape, a1_shape, a2_shape, a3_shape.
#ifdef INDEXED
const int p = z / M, leader = z % M;
const int id = idx[m0 + leader];
if (leader < first) return;
uint rows = 0;
for (int m = first; m < M; m++) {
  if (idx[m0 + m] != id) continue;
  if (m < leader) return;  // another threadgroup is in charge; all threads of this one leave
  rows |= 1u << m;
}
#define A(a) a + (id < 0 ? 0 : size_t(id) * K * a##_shape[2])
#define WIDTH(a) a##_shape[2]
#define RANK(a) id < 0 ? 0 : min(int(ranks[id]), a##_shape[2])
#else
const int p = z;
const uint rows = (1u << M) - (1u << first);
#define A(a) a
#define WIDTH(a) a##_shape[1]
#define RANK(a) a##_shape[1]
#endif
#define SHRINK(a, OFFSET)                                                                                   \
  shrink<T, M, C, NSG>(A(a), x + size_t(m0) * K, u + (size_t(split) * total + m0) * U + (OFFSET), part, rows, \
                       RANK(a), WIDTH(a), U, K, begin, end, column, lane, sg)

if (p == 0) SHRINK(a0, 0);
#if NPROJ > 1
if (p == 1) SHRINK(a1, WIDTH(a0));
#endif
#if NPROJ > 2
if (p == 2) SHRINK(a2, WIDTH(a0) + WIDTH(a1));
#endif
#if NPROJ > 3
if (p == 3) SHRINK(a3, WIDTH(a0) + WIDTH(a1) + WIDTH(a2));
#endif
