// One decoding step of a Llama with 4-bit weights, for processors with AVX-512 VNNI and VBMI.
// `compiled.py` builds and calls it, and says what it computes.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Panels of 64 rows; for each column 32 bytes, rows i and i + 32 in a byte ("64 halves").
struct Weight {
  const uint8_t* codes;
  const uint16_t* scales;  // bfloat16 (s, t) of each group and row
  const uint16_t* after;   // half precision, of each row, or null
  int64_t rows, columns, group, inputs;  // 8-bit codes have two columns for an input
};

struct Block {
  const float *norm1, *norm2;
  Weight qkv, out, gate_up, down;
  float* store;  // keys, then values: [heads, room, size]
};

struct Step {
  int64_t blocks, hidden, heads, kv_heads, size, inner, room, length, threads;
  double eps, scale;
  const float *norm, *input, *cos, *sin;
  float* logits;
  Weight head;
  Block block[1];
};

// Inputs in 16 bits, one scale a group: x = scale * (256 * high + low).
struct Inputs {
  std::vector<int8_t> high, low;
  std::vector<float> scale, sum;
  int64_t columns = 0;

  void set(const float* x, int64_t n, int64_t filled, int64_t group) {
    columns = filled;
    high.assign(filled, 0), low.assign(filled, 0);
    scale.assign(filled / group, 0), sum.assign(filled / group, 0);
    for (int64_t start = 0, g = 0; start < n; start += group, g++) {
      const int64_t end = std::min(n, start + group);
      float top = 0;
      for (int64_t i = start; i < end; i++) top = std::max(top, std::fabs(x[i]));
      if (top == 0) continue;
      const float step = top / 32639.f, inverse = 32639.f / top;  // 127 * 256 + 127
      int32_t total = 0;
      for (int64_t i = start; i < end; i++) {
        const int32_t q = (int32_t)std::nearbyintf(x[i] * inverse);
        const int8_t l = (int8_t)q;
        low[i] = l, high[i] = (int8_t)((q - l) >> 8);
        total += q;
      }
      scale[g] = step, sum[g] = step * (float)total;
    }
  }
};

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

// e^x = 2^n 2^f with n whole and |f| <= 1/2; a polynomial for 2^f, error about 1e-7 of the value.
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);  // ln 2 in two parts
  __m512 e = _mm512_set1_ps(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(e, n);
}

float dot(const float* a, const float* b, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16)
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
  return _mm512_reduce_add_ps(sum);
}

void rms_norm(const float* h, const float* weight, int64_t n, double eps, float* out) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += h[i] * h[i];
  const float r = 1 / std::sqrt(squares / n + (float)eps);
  for (int64_t i = 0; i < n; i++) out[i] = weight[i] * (h[i] * r);
}

void rotate(const float* x, const float* cos, const float* sin, int64_t n, float* out) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; i++) {
    out[i] = x[i] * cos[i] - x[i + half] * sin[i];
    out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
  }
}

// One head: scores with the tokens before from the store, with the newest from its own key.
void attend(const Step& m, float* store, int64_t head, const float* qkv, float* scores, float* out) {
  const int64_t size = m.size, shared = m.heads / m.kv_heads, of = head / shared, n = m.length;
  std::vector<float> q(size), key(size);
  rotate(qkv + head * size, m.cos, m.sin, size, q.data());
  rotate(qkv + (m.heads + of) * size, m.cos, m.sin, size, key.data());
  const float* value = qkv + (m.heads + m.kv_heads + of) * size;
  float *keys = store + of * m.room * size, *values = store + (m.kv_heads + of) * m.room * size;
  if (head % shared == 0) {
    std::memcpy(keys + n * size, key.data(), 4 * size);
    std::memcpy(values + n * size, value, 4 * size);
  }
  for (int64_t t = 0; t < n; t++) scores[t] = dot(q.data(), keys + t * size, size) * (float)m.scale;
  scores[n] = dot(q.data(), key.data(), size) * (float)m.scale;
  const int64_t filled = (n + 16) / 16 * 16;
  for (int64_t t = n + 1; t < filled; t++) scores[t] = -INFINITY;
  const __m512 top = _mm512_set1_ps(*std::max_element(scores, scores + n + 1));
  __m512 sums = _mm512_setzero_ps();
  for (int64_t t = 0; t < filled; t += 16) {
    const __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + t), top));
    _mm512_storeu_ps(scores + t, e);
    sums = _mm512_add_ps(sums, e);
  }
  const float whole = _mm512_reduce_add_ps(sums);
  for (int64_t i = 0; i < size; i += 16) {
    __m512 sum = _mm512_mul_ps(_mm512_set1_ps(scores[n]), _mm512_loadu_ps(value + i));
    for (int64_t t = 0; t < n; t++)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[t]), _mm512_loadu_ps(values + t * size + i), sum);
    _mm512_storeu_ps(out + head * size + i, _mm512_div_ps(sum, _mm512_set1_ps(whole)));
  }
}

}  // namespace

extern "C" int effnb_supported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512dq");
}

extern "C" void effnb_step(const Step* step) {
  const Step& m = *step;
  const int64_t width = (m.heads + 2 * m.kv_heads) * m.size, wide = m.heads * m.size;
  const auto panels = [](int64_t n) { return (n + 63) / 64 * 64; };
  std::vector<float> qkv(panels(width)), mixed(panels(wide)), change(panels(m.hidden)), both(panels(2 * m.inner));
#pragma omp parallel num_threads((int)m.threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    std::vector<float> h(m.input, m.input + m.hidden), normed(m.hidden), inner(panels(m.inner)), scores(m.length + 32);
    Inputs x;
    // What is small every thread does for itself: that takes less time than to wait for one.
    const auto multiply = [&](const Weight& w, const float* in, int64_t n, float* y) {
      x.set(in, n, w.inputs, w.group);
      const int64_t count = w.rows / 64;
      for (int64_t p = me * count / all; p < (me + 1) * count / all; p++) panel(w, p, x, y);
#pragma omp barrier
    };
    const auto add = [&] {
      for (int64_t i = 0; i < m.hidden; i++) h[i] += change[i];
    };
    for (int64_t b = 0; b < m.blocks; b++) {
      const Block& block = m.block[b];
      rms_norm(h.data(), block.norm1, m.hidden, m.eps, normed.data());
      multiply(block.qkv, normed.data(), m.hidden, qkv.data());
      for (int64_t head = me * m.heads / all; head < (me + 1) * m.heads / all; head++)
        attend(m, block.store, head, qkv.data(), scores.data(), mixed.data());
#pragma omp barrier
      multiply(block.out, mixed.data(), wide, change.data());
      add();
      rms_norm(h.data(), block.norm2, m.hidden, m.eps, normed.data());
      multiply(block.gate_up, normed.data(), m.hidden, both.data());
      for (int64_t i = 0; i < m.inner; i += 16) {  // silu(gate) * up
        const __m512 gate = _mm512_loadu_ps(both.data() + i), up = _mm512_loadu_ps(both.data() + m.inner + i);
        const __m512 one = _mm512_set1_ps(1), e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
        _mm512_storeu_ps(inner.data() + i, _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, e)), up));
      }
      multiply(block.down, inner.data(), m.inner, change.data());
      add();
    }
    rms_norm(h.data(), m.norm, m.hidden, m.eps, normed.data());
    multiply(m.head, normed.data(), m.hidden, m.logits);
  }
}
