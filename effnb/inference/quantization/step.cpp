// One decoding step of a Llama with 4-bit or 8-bit weights, for x86 processors.
// `compiled.py` builds and calls it, and says what it computes.
#include <cpuid.h>
#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Panels of PANEL rows; for each column in turn the codes of all rows, i and i + PANEL / 2 in a byte.
// Where group is 0: rows of signed bytes.
struct Weight {
  const uint8_t* codes;
  const uint16_t* scales;  // bfloat16 (s, t) of each group and row
  const uint16_t* after;   // half precision, of each row, or null
  int64_t rows, columns, group, inputs;  // 8-bit codes in panels have two columns for an input
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
  double* seconds;  // of each part, added up, or null
  Weight head;
  Block block[1];
};

constexpr int64_t GROUP = 32;   // inputs with one scale, where weights have none
constexpr int64_t FILLED = 64;  // rows are filled up to a multiple of it
constexpr float LEAST = 1e-30f;  // groups without a larger number count as zeros

// Inputs in 16 bits, one scale a group: x = scale * (256 * high + low).
struct Inputs {
  std::vector<int8_t> high, low;
  std::vector<int16_t> both;
  std::vector<float> scale, sum;
  int64_t columns = 0;

  void set(const float* x, int64_t n, int64_t filled, int64_t group) {
    columns = filled;
    high.assign(filled, 0), low.assign(filled, 0), both.assign(filled, 0);
    scale.assign(filled / group, 0), sum.assign(filled / group, 0);
    for (int64_t start = 0, g = 0; start < n; start += group, g++) {
      const int64_t end = std::min(n, start + group);
      float top = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = start; i < end; i++) top = std::max(top, std::fabs(x[i]));
      if (top < LEAST) continue;
      const float step = top / 32639.f, inverse = 32639.f / top;  // 127 * 256 + 127
      int32_t total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = start; i < end; i++) {
        const int32_t q = (int32_t)std::nearbyintf(x[i] * inverse);
        const int8_t l = (int8_t)q;
        low[i] = l, high[i] = (int8_t)((q - l) >> 8), both[i] = (int16_t)q;
        total += q;
      }
      scale[g] = step, sum[g] = step * (float)total;
    }
  }
};

#ifdef __AVX512F__
#include "panel_avx512.h"
#else
#include "panel_avx2.h"
#endif

// y = x W^T for one row of signed bytes. The sum of 32 products has eight parts of four, at most
// 4 * 128 * 32639 each: exact in float32.
void row(const Weight& w, int64_t r, const Inputs& x, float* y) {
  const __m128i* codes = (const __m128i*)(w.codes + r * w.columns);
  const __m256i* both = (const __m256i*)x.both.data();
  __m256 sum = _mm256_setzero_ps();
  for (int64_t g = 0; g < w.columns / GROUP; g++, codes += 2, both += 2) {
    const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes));
    const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes + 1));
    const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(a, _mm256_loadu_si256(both)),
                                              _mm256_madd_epi16(b, _mm256_loadu_si256(both + 1)));
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(x.scale[g]), sum);
  }
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  y[r] = _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair))) * _cvtsh_ss(w.after[r]);
}

int64_t group_of(const Weight& w) { return w.group ? w.group : GROUP; }

// The part of y = x W^T that one of several threads computes.
void product(const Weight& w, const Inputs& x, int64_t me, int64_t all, float* y) {
  const int64_t count = w.group ? w.rows / PANEL : w.rows;
  for (int64_t p = me * count / all; p < (me + 1) * count / all; p++)
    w.group ? panel(w, p, x, y) : row(w, p, x, y);
}

// e^x = 2^n 2^f with n whole and |f| <= 1/2; a polynomial for 2^f, error about 1e-7 of the value.
Floats exponential(Floats x) {
  x = larger(smaller(x, set(88.f)), set(-87.f));
  const Floats n = whole(x * set(1.44269504f));
  Floats r = minus_fma(n, set(0.693359375f), x);
  r = minus_fma(n, set(-2.12194440e-4f), r);  // ln 2 in two parts
  Floats e = set(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) e = fma(e, r, set(c));
  return times_power(e, n);
}

float dot(const float* a, const float* b, int64_t n) {
  Floats sum = set(0);
  for (int64_t i = 0; i < n; i += WIDTH) sum = fma(load(a + i), load(b + i), sum);
  return total(sum);
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

// N registers of the weighted mean of n values and the newest one.
template <int N>
void mix(const float* weights, const float* values, int64_t n, int64_t size, const float* newest,
         float sum, float* out) {
  Floats sums[N];
  for (int j = 0; j < N; j++) sums[j] = set(weights[n]) * load(newest + j * WIDTH);
  for (int64_t t = 0; t < n; t++)
    for (int j = 0; j < N; j++) sums[j] = fma(set(weights[t]), load(values + t * size + j * WIDTH), sums[j]);
  for (int j = 0; j < N; j++) store(out + j * WIDTH, sums[j] / set(sum));
}

// One head: scores with the tokens before from the store, with the newest from its own key.
void attend(const Step& m, float* kept, int64_t head, const float* qkv, float* scores, float* out) {
  const int64_t size = m.size, shared = m.heads / m.kv_heads, of = head / shared, n = m.length;
  std::vector<float> q(size), key(size);
  rotate(qkv + head * size, m.cos, m.sin, size, q.data());
  rotate(qkv + (m.heads + of) * size, m.cos, m.sin, size, key.data());
  const float* value = qkv + (m.heads + m.kv_heads + of) * size;
  float *keys = kept + of * m.room * size, *values = kept + (m.kv_heads + of) * m.room * size;
  if (head % shared == 0) {
    std::memcpy(keys + n * size, key.data(), 4 * size);
    std::memcpy(values + n * size, value, 4 * size);
  }
  for (int64_t t = 0; t < n; t++) scores[t] = dot(q.data(), keys + t * size, size) * (float)m.scale;
  scores[n] = dot(q.data(), key.data(), size) * (float)m.scale;
  const int64_t filled = (n + WIDTH) / WIDTH * WIDTH;
  for (int64_t t = n + 1; t < filled; t++) scores[t] = -INFINITY;
  const Floats top = set(*std::max_element(scores, scores + n + 1));
  Floats sums = set(0);
  for (int64_t t = 0; t < filled; t += WIDTH) {
    const Floats e = exponential(load(scores + t) - top);
    store(scores + t, e);
    sums = sums + e;
  }
  const float sum = total(sums);
  out += head * size;
  int64_t i = 0;
  for (; i + 8 * WIDTH <= size; i += 8 * WIDTH) mix<8>(scores, values + i, n, size, value + i, sum, out + i);
  for (; i < size; i += WIDTH) mix<1>(scores, values + i, n, size, value + i, sum, out + i);
}

// Threads wait for each other 150 times a token, on idle cores for microseconds. OpenMP's barrier
// spins for milliseconds, also where the awaited thread needs this very core; this one lets it.
struct Barrier {
  std::atomic<int64_t> arrived{0}, round{0};

  void wait(int64_t all) {
    const int64_t now = round.load();
    if (arrived.fetch_add(1) + 1 == all) arrived = 0, round = now + 1;
    for (int tries = 0; round.load() == now; tries++) tries < 1000 ? _mm_pause() : (void)sched_yield();
  }
};

// Adds up where the time of the first thread goes: each part ends where the next one begins.
struct Clock {
  double* seconds;
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();

  void ends(int part) {
    if (!seconds) return;
    const auto now = std::chrono::steady_clock::now();
    seconds[part] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

enum { PRODUCTS, ATTENTION, HEAD, REST };

}  // namespace

extern "C" int effnb_supported() { return supported(); }

extern "C" void effnb_product(const Weight* weight, const float* input, int64_t n, float* y) {
  Inputs x;
  x.set(input, n, weight->inputs, group_of(*weight));
  product(*weight, x, 0, 1, y);
}

extern "C" void effnb_step(const Step* step) {
  const Step& m = *step;
  const int64_t width = (m.heads + 2 * m.kv_heads) * m.size, wide = m.heads * m.size;
  const auto filled = [](int64_t n) { return (n + FILLED - 1) / FILLED * FILLED; };
  std::vector<float> qkv(filled(width)), mixed(wide), change(filled(m.hidden)), both(filled(2 * m.inner));
  Barrier barrier;
#pragma omp parallel num_threads((int)m.threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    Clock clock{me ? nullptr : m.seconds};
    std::vector<float> h(m.input, m.input + m.hidden), normed(m.hidden), inner(m.inner), scores(m.length + 32);
    Inputs x;
    // What is small every thread does for itself: that takes less time than to wait for one.
    const auto multiply = [&](const Weight& w, const float* in, int64_t n, float* y, int part) {
      x.set(in, n, w.inputs, group_of(w));
      clock.ends(REST);
      product(w, x, me, all, y);
      barrier.wait(all);
      clock.ends(part);
    };
    const auto add = [&] {
      for (int64_t i = 0; i < m.hidden; i++) h[i] += change[i];
    };
    for (int64_t b = 0; b < m.blocks; b++) {
      const Block& block = m.block[b];
      rms_norm(h.data(), block.norm1, m.hidden, m.eps, normed.data());
      multiply(block.qkv, normed.data(), m.hidden, qkv.data(), PRODUCTS);
      for (int64_t head = me * m.heads / all; head < (me + 1) * m.heads / all; head++)
        attend(m, block.store, head, qkv.data(), scores.data(), mixed.data());
      barrier.wait(all);
      clock.ends(ATTENTION);
      multiply(block.out, mixed.data(), wide, change.data(), PRODUCTS);
      add();
      rms_norm(h.data(), block.norm2, m.hidden, m.eps, normed.data());
      multiply(block.gate_up, normed.data(), m.hidden, both.data(), PRODUCTS);
      for (int64_t i = 0; i < m.inner; i += WIDTH) {  // silu(gate) * up
        const Floats gate = load(both.data() + i), up = load(both.data() + m.inner + i);
        store(inner.data() + i, gate / (set(1) + exponential(set(0) - gate)) * up);
      }
      multiply(block.down, inner.data(), m.inner, change.data(), PRODUCTS);
      add();
    }
    rms_norm(h.data(), m.norm, m.hidden, m.eps, normed.data());
    multiply(m.head, normed.data(), m.hidden, m.logits, HEAD);
  }
}
