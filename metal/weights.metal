// How a base layer stores its weights, read 16 values at a time; included by the kernels that read weights. No kernel.
//
// MODE: 0 dense, 1 affine, 2 mxfp4, 3 mxfp8, 4 nvfp4, 5 nf4. MLX packs a row as one stream of bits, the lowest first,
// so 16 values of BITS bits are BITS half-words, whatever BITS is. nf4 packs two values a byte, the first one high; its
// scales may be codes themselves (NESTED of them to a scale of their own). Groups run over the whole matrix, row by row.
// Pointers are `auto`: an array of fewer than 8 elements
// arrives in the constant address space. A unit's values are code * scale + bias.
//@header
constant float NF4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                          -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                          0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                          0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

METAL_FUNC const device ushort* half_words(const device ushort* w) { return w; }
METAL_FUNC const device ushort* half_words(const device uint* w) { return (const device ushort*)w; }
#ifdef __METAL_VERSION__  // in CUDA an address space is no part of a type
METAL_FUNC const constant ushort* half_words(const constant ushort* w) { return w; }
METAL_FUNC const constant ushort* half_words(const constant uint* w) { return (const constant ushort*)w; }
#endif

// 4 bits: sign, 2 of exponent, 1 of mantissa.
METAL_FUNC float e2m1(uint v) {
  const uint e = (v >> 1) & 3, m = v & 1;
  const float size = e == 0 ? 0.5f * float(m) : as_type<float>(((e + 126) << 23) | (m << 22));
  return (v & 8) ? -size : size;
}

// 8 bits: sign, 4 of exponent, 3 of mantissa.
METAL_FUNC float e4m3(uint v) {
  const uint e = (v >> 3) & 15, m = v & 7;
  float size = e == 0 ? float(m) * 0.001953125f : as_type<float>(((e + 120) << 23) | (m << 20));
  if (e == 15 && m == 7) size = NAN;
  return (v & 128) ? -size : size;
}

// 8 bits of exponent.
METAL_FUNC float e8m0(uint v) {
  if (v == 255) return NAN;
  return v == 0 ? as_type<float>(0x00400000u) : as_type<float>(v << 23);
}

// The 16 codes of a unit, given its BITS half-words.
template <int KIND, int BITS, typename P>
METAL_FUNC void read_codes(P words, thread float* code) {
  uint word[BITS];
  for (int i = 0; i < BITS; i++) word[i] = words[i];
  for (int i = 0; i < 16; i++) {
    const int at = KIND == 5 ? (i ^ 1) * BITS : i * BITS;
    uint v = word[at / 16] >> (at % 16);
    if (at % 16 + BITS > 16) v |= word[at / 16 + 1] << (16 - at % 16);
    v &= (1u << BITS) - 1;
    code[i] = KIND == 1 ? float(v) : KIND == 3 ? e4m3(v) : KIND == 5 ? NF4[v] : e2m1(v);
  }
}

// The scale of a group.
template <int KIND, typename P>
METAL_FUNC float read_scale(P scales, size_t group) {
  if (KIND == 2 || KIND == 3) return e8m0(uint(scales[group]));
  return KIND == 4 ? e4m3(uint(scales[group])) : float(scales[group]);
}

#ifdef NESTED
#define SCALE(group) (nested_map[scales[group]] * nested_absmax[(group) / NESTED] + nested_offset[0])
#define NESTED_TYPES , typename A, typename V, typename O
#define NESTED_PARAMETERS , A nested_absmax, V nested_map, O nested_offset
#define NESTED_ARGUMENTS , nested_absmax, nested_map, nested_offset
#else
#define SCALE(group) read_scale<MODE>(scales, group)
#define NESTED_TYPES
#define NESTED_PARAMETERS
#define NESTED_ARGUMENTS
#endif

// What there is of a weight, its scales and its biases, as three arguments.
#if MODE == 0
#define STORED(w, scales, biases) w, w, w
#elif MODE == 1
#define STORED(w, scales, biases) w, scales, biases
#else
#define STORED(w, scales, biases) w, scales, scales
#endif

// sum[m * ROWS + i] += what lane `lane` has of W[n0 + i, :] . x[m, :], for `rows` rows of W and M of x. A lane reads
// units of 16 weights and unpacks them once for all rows of x.
template <int BITS, int GROUP, int M, int ROWS, typename W, typename S, typename Z, typename X NESTED_TYPES>
METAL_FUNC void add_products(W w, S scales, Z biases, X x, int n0, int rows, int K, int lane,
                             thread float* sum NESTED_PARAMETERS) {
  for (int k = 16 * lane; k < K; k += 512) {
    float code[ROWS][16], s[ROWS], z[ROWS];
    for (int i = 0; i < ROWS; i++) {
      if (i >= rows) continue;
      const size_t row = n0 + i;
#if MODE == 0
      for (int j = 0; j < 16; j++) code[i][j] = k + j < K ? float(w[row * K + k + j]) : 0.0f;
#else
      read_codes<MODE, BITS>(half_words(w) + (row * K + k) / 16 * BITS, code[i]);
      const size_t group = (row * K + k) / GROUP;
      s[i] = SCALE(group);
#endif
#if MODE == 1
      z[i] = float(biases[group]);
#endif
    }
    for (int m = 0; m < M; m++) {
      float xs[16], total = 0;
      for (int j = 0; j < 16; j++) {
        xs[j] = k + j < K ? float(x[size_t(m) * K + k + j]) : 0.0f;
        total += xs[j];
      }
      for (int i = 0; i < ROWS; i++) {
        if (i >= rows) continue;
        float dot = 0;
        for (int j = 0; j < 16; j++) dot += code[i][j] * xs[j];
#if MODE == 0
        sum[m * ROWS + i] += dot;
#elif MODE == 1
        sum[m * ROWS + i] += s[i] * dot + z[i] * total;
#else
        sum[m * ROWS + i] += s[i] * dot;
#endif
      }
    }
  }
}
