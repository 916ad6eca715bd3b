// What depends on the width of registers, for AVX-512 with VNNI and VBMI: included by `step.cpp`.

constexpr int64_t PANEL = 64, WIDTH = 16;
using Floats = __m512;

bool supported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512dq");
}

Floats set(float x) { return _mm512_set1_ps(x); }
Floats load(const float* x) { return _mm512_loadu_ps(x); }
void store(float* x, Floats value) { _mm512_storeu_ps(x, value); }
Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
Floats whole(Floats x) { return _mm512_roundscale_ps(x, 0); }
Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x 2^n
Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
Floats minus_fma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
float total(Floats x) { return _mm512_reduce_add_ps(x); }

// y = x W^T for 64 rows: w = s (u - 8) + t, so y = sum_g s (dot(u, x) - 8 sum(x)) + t sum(x).
void panel(const Weight& w, int64_t p, const Inputs& x, float* y) {
  alignas(64) uint8_t first[64], second[64];
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 4; column++) {
      first[4 * row + column] = 32 * column + row;
      second[4 * row + column] = 32 * column + 16 + row;
    }
  const __m512i rows0 = _mm512_load_si512(first), rows1 = _mm512_load_si512(second);
  const __m512i nibble = _mm512_set1_epi8(15), upper = _mm512_set1_epi32((int)0xffff0000);
  const uint8_t* codes = w.codes + p * 32 * w.columns;
  const int64_t groups = w.columns / w.group, of_inputs = x.columns / w.group;
  __m512 out[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t g = 0; g < groups; g++) {
    const int64_t at = g % of_inputs;  // an 8-bit code is two 4-bit ones, for the same inputs
    const int8_t *high = x.high.data() + at * w.group, *low = x.low.data() + at * w.group;
    __m512i h[4], l[4];
    for (int i = 0; i < 4; i++) h[i] = l[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < w.group; k += 4, codes += 128) {
      _mm_prefetch((const char*)codes + 2048, _MM_HINT_T0);
      _mm_prefetch((const char*)codes + 2112, _MM_HINT_T0);
      const __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes + 64);
      const __m512i c0 = _mm512_permutex2var_epi8(a, rows0, b);
      const __m512i c1 = _mm512_permutex2var_epi8(a, rows1, b);
      const __m512i u[4] = {
          _mm512_and_si512(c0, nibble), _mm512_and_si512(c1, nibble),
          _mm512_and_si512(_mm512_srli_epi16(c0, 4), nibble),
          _mm512_and_si512(_mm512_srli_epi16(c1, 4), nibble)};
      int32_t four_high, four_low;
      std::memcpy(&four_high, high + k, 4), std::memcpy(&four_low, low + k, 4);
      const __m512i xh = _mm512_set1_epi32(four_high), xl = _mm512_set1_epi32(four_low);
      for (int i = 0; i < 4; i++) {
        h[i] = _mm512_dpbusd_epi32(h[i], u[i], xh);
        l[i] = _mm512_dpbusd_epi32(l[i], u[i], xl);
      }
    }
    const __m512 step = _mm512_set1_ps(x.scale[at]), sum = _mm512_set1_ps(x.sum[at]);
    const __m512 eight = _mm512_set1_ps(8 * x.sum[at]);
    const uint16_t* scales = w.scales + 2 * (g * w.rows + 64 * p);
    for (int i = 0; i < 4; i++) {
      const __m512i both = _mm512_loadu_si512(scales + 32 * i);
      const __m512 s = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 t = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
      const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(h[i], 8), l[i]);
      const __m512 dot = _mm512_fmsub_ps(_mm512_cvtepi32_ps(total), step, eight);
      out[i] = _mm512_fmadd_ps(s, dot, _mm512_fmadd_ps(t, sum, out[i]));
    }
  }
  for (int i = 0; i < 4; i++) {
    if (w.after) {
      const __m256i half = _mm256_loadu_si256((const __m256i*)(w.after + 64 * p + 16 * i));
      out[i] = _mm512_mul_ps(out[i], _mm512_cvtph_ps(half));
    }
    _mm512_storeu_ps(y + 64 * p + 16 * i, out[i]);
  }
}
