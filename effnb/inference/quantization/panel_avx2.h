// What depends on the width of registers, for AVX2 with FMA and F16C: included by `step.cpp`.

constexpr int64_t PANEL = 32, WIDTH = 8;
using Floats = __m256;

bool supported() {
  unsigned a, b, c = 0, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & bit_F16C);
}

Floats set(float x) { return _mm256_set1_ps(x); }
Floats load(const float* x) { return _mm256_loadu_ps(x); }
void store(float* x, Floats value) { _mm256_storeu_ps(x, value); }
Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
Floats whole(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
Floats minus_fma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
Floats times_power(Floats x, Floats n) {  // x 2^n, for -127 < n < 128
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
float total(Floats x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// y = x W^T for 32 rows: w = s (u - 8) + t, so y = sum_g s (dot(u, x) - 8 sum(x)) + t sum(x).
// One instruction multiplies the codes of two columns by bytes and adds each pair, in 16 bits. Such a
// sum takes 16 columns, at most 16 * 15 * 128 = 30720: nothing saturates.
void panel(const Weight& w, int64_t p, const Inputs& x, float* y) {
  const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi32((int)0xffff0000);
  // Of four columns 0 and 2 meet in the lower half of a register, 1 and 3 in the upper one.
  const __m256i pairs = _mm256_set_m128i(_mm_set1_epi16(0x0301), _mm_set1_epi16(0x0200));
  const __m256i weigh = _mm256_set1_epi32(1 << 16 | 256);
  const uint8_t* codes = w.codes + p * (PANEL / 2) * w.columns;
  const int64_t groups = w.columns / w.group, of_inputs = x.columns / w.group;
  __m256 out[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t g = 0; g < groups; g++) {
    const int64_t at = g % of_inputs;  // an 8-bit code is two 4-bit ones, for the same inputs
    const int8_t *high = x.high.data() + at * w.group, *low = x.low.data() + at * w.group;
    const uint16_t* scales = w.scales + 2 * (g * w.rows + PANEL * p);
    _mm_prefetch((const char*)(scales + 2 * PANEL), _MM_HINT_T0);  // those of the next panel
    _mm_prefetch((const char*)(scales + 3 * PANEL), _MM_HINT_T0);
    __m256i sums[4];
    for (int i = 0; i < 4; i++) sums[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < w.group; k += 32, high += 32, low += 32) {
      __m256i h[4], l[4];
      for (int i = 0; i < 4; i++) h[i] = l[i] = _mm256_setzero_si256();
      for (int c = 0; c < 32; c += 4, codes += 64) {
        _mm_prefetch((const char*)codes + 2048, _MM_HINT_T0);
        const __m256i a = _mm256_loadu_si256((const __m256i*)codes);
        const __m256i b = _mm256_loadu_si256((const __m256i*)(codes + 32));
        int32_t four_high, four_low;
        std::memcpy(&four_high, high + c, 4), std::memcpy(&four_low, low + c, 4);
        const __m256i xh = _mm256_shuffle_epi8(_mm256_set1_epi32(four_high), pairs);
        const __m256i xl = _mm256_shuffle_epi8(_mm256_set1_epi32(four_low), pairs);
        for (int i = 0; i < 2; i++) {
          const __m256i both = i ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
          __m256i u = _mm256_and_si256(both, nibble);
          h[i] = _mm256_add_epi16(h[i], _mm256_maddubs_epi16(u, xh));
          l[i] = _mm256_add_epi16(l[i], _mm256_maddubs_epi16(u, xl));
          u = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
          h[i + 2] = _mm256_add_epi16(h[i + 2], _mm256_maddubs_epi16(u, xh));
          l[i + 2] = _mm256_add_epi16(l[i + 2], _mm256_maddubs_epi16(u, xl));
        }
      }
      for (int i = 0; i < 4; i++) {  // 256 h + l of eight rows, even and odd columns together
        const __m256i a = _mm256_madd_epi16(_mm256_unpacklo_epi16(h[i], l[i]), weigh);
        const __m256i b = _mm256_madd_epi16(_mm256_unpackhi_epi16(h[i], l[i]), weigh);
        const __m256i even = _mm256_permute2x128_si256(a, b, 0x20), odd = _mm256_permute2x128_si256(a, b, 0x31);
        sums[i] = _mm256_add_epi32(sums[i], _mm256_add_epi32(even, odd));
      }
    }
    const __m256 step = _mm256_set1_ps(x.scale[at]), sum = _mm256_set1_ps(x.sum[at]);
    const __m256 eight = _mm256_set1_ps(8 * x.sum[at]);
    for (int i = 0; i < 4; i++) {
      const __m256i both = _mm256_loadu_si256((const __m256i*)(scales + 16 * i));
      const __m256 s = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      const __m256 t = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
      const __m256 dot = _mm256_fmsub_ps(_mm256_cvtepi32_ps(sums[i]), step, eight);
      out[i] = _mm256_fmadd_ps(s, dot, _mm256_fmadd_ps(t, sum, out[i]));
    }
  }
  for (int i = 0; i < 4; i++) {
    if (w.after) {
      const __m128i half = _mm_loadu_si128((const __m128i*)(w.after + PANEL * p + 8 * i));
      out[i] = _mm256_mul_ps(out[i], _mm256_cvtph_ps(half));
    }
    _mm256_storeu_ps(y + PANEL * p + 8 * i, out[i]);
  }
}
