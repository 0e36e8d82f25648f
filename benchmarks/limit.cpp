// What this machine allows: the same work as a hand-written loop, 64 instances side by side.
// Built with -ffast-math, which jaxsim does not allow itself.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr int kLanes = 64;

inline void threefry(uint32_t k0, uint32_t k1, uint32_t& x, uint32_t& y) {
  const uint32_t keys[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  const int rotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  x += keys[0];
  y += keys[1];
#pragma GCC unroll 5
  for (int step = 0; step < 5; ++step) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int bits = rotations[(step % 2) * 4 + j];
      x += y;
      y = ((y << bits) | (y >> (32 - bits))) ^ x;
    }
    x += keys[(step + 1) % 3];
    y += keys[(step + 2) % 3] + step + 1;
  }
}

inline float unit(uint32_t word) {
  return std::min(((float)(int32_t)(word >> 1) + 0.5f) * 0x1p-31f, 1 - 0x1p-24f);
}

inline float cosine(float turn) {  // cos(2 pi turn)
  const float halves = nearbyintf(2 * turn), x = turn - 0.5f * halves, s = x * x;
  const float c[7] = {1.0f, -19.7392088f, 64.9393940f, -85.4568172f, 60.2446414f, -26.4262568f, 7.90353637f};
  float value = c[6];
  for (int k = 5; k >= 0; --k) value = c[k] + s * value;
  return fabsf(halves) == 1 ? -value : value;
}

inline float small_expm1(float x) {  // |x| <= 1
  float value = 1.0f / 3628800, divisor[9] = {362880, 40320, 5040, 720, 120, 24, 6, 2, 1};
  for (float d : divisor) value = 1 / d + x * value;
  return x * value;
}

// Below -87 the vector library leaves a lane to scalar code, and results to subnormal numbers.
inline float exp_above(float x) { return expf(std::max(x, -87.0f)); }

}  // namespace

extern "C" {

// Draw, evaluate, judge, reduce; out: hypotheses hold, of these TPM(A) < alpha, undecided,
// sum of TPM(A), sum of log Z.
void simulate(uint32_t key0, uint32_t key1, uint32_t start, int64_t num, float beta, double* out) {
  constexpr int n = 32;
  uint32_t k0 = 0, k1 = 0xFFFFFFFFu;
  threefry(key0, key1, k0, k1);
  const float inverse = 1 / beta, unit_roundoff = 0x1p-24f;
  double hold = 0, fail = 0, open = 0, tpm = 0, log_z = 0;
#pragma omp parallel for reduction(+ : hold, fail, open, tpm, log_z)
  for (int64_t block = 0; block < num / kLanes; ++block) {
    alignas(64) float a[n][kLanes], u[n][kLanes], r[n][kLanes];
    alignas(64) float sa[kLanes]{}, su[kLanes]{}, mean[kLanes]{}, top[kLanes], low[kLanes];
    alignas(64) float ca[kLanes]{}, cu[kLanes]{}, size_a[kLanes]{}, size_u[kLanes]{}, size[kLanes]{};
    alignas(64) float ga[kLanes]{}, gu[kLanes]{}, g[kLanes]{};
    const uint32_t first = start + (uint32_t)(block * kLanes);
    for (int l = 0; l < kLanes; ++l) top[l] = -1e30f, low[l] = 1e30f;
    for (int i = 0; i < n; ++i)
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        uint32_t x = first + l, y = i;
        threefry(k0, k1, x, y);
        a[i][l] = -log1pf(-unit(x));
        u[i][l] = -log1pf(-unit(y));
        sa[l] += a[i][l];
        su[l] += u[i][l];
      }
    for (int i = 0; i < n / 2; ++i)
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        uint32_t x = first + l, y = i + (32u << 24);
        threefry(k0, k1, x, y);
        const float radius = sqrtf(-2 * logf(unit(x))), turn = (float)(int32_t)y * 0x1p-32f;
        r[i][l] = radius * cosine(turn);
        r[i + n / 2][l] = radius * cosine(turn - 0.25f);
      }
    for (int i = 0; i < n; ++i)
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        top[l] = std::max(top[l], r[i][l]);
        low[l] = std::min(low[l], r[i][l]);
        mean[l] += r[i][l] * (1.0f / n);
      }
    for (int i = 0; i < n; ++i)
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const float d = r[i][l] - mean[l], size_d = fabsf(d);
        ca[l] += a[i][l] * d;
        cu[l] += u[i][l] * d;
        size_a[l] += a[i][l] * size_d;
        size_u[l] += u[i][l] * size_d;
        size[l] += size_d;
        const bool narrow = top[l] - low[l] < beta;
        const float t = (r[i][l] - (narrow ? mean[l] : top[l])) * inverse;
        const float grown = narrow ? small_expm1(std::max(-1.0f, std::min(1.0f, t))) : exp_above(t);
        ga[l] += a[i][l] * grown;
        gu[l] += u[i][l] * grown;
        g[l] += (a[i][l] + u[i][l]) * fabsf(grown);
      }
    float block_sums[5]{};
#pragma omp simd reduction(+ : block_sums[:5])
    for (int l = 0; l < kLanes; ++l) {
      uint32_t x = first + l, y = 40u << 24;
      threefry(k0, k1, x, y);
      const float alpha = unit(x), bound_a = 80 * unit_roundoff * (size_a[l] / sa[l] + size[l] / n);
      const float bound_u = 80 * unit_roundoff * (size_u[l] / su[l] + size[l] / n);
      const float cov_a = ca[l] / sa[l], cov_u = cu[l] / su[l];
      const bool narrow = top[l] - low[l] < beta;
      const float ea = ga[l] / sa[l], eu = gu[l] / su[l], mixed = alpha * ea + (1 - alpha) * eu;
      const float bound = 80 * unit_roundoff * g[l] / std::min(sa[l], su[l]);
      const float holds = cov_a > bound_a && cov_u < -bound_u ? 1.0f : 0.0f;
      block_sums[0] += holds;
      block_sums[1] += ea - eu < -bound ? holds : 0.0f;
      block_sums[2] += fabsf(ea - eu) <= bound || fabsf(cov_a) <= bound_a || fabsf(cov_u) <= bound_u;
      block_sums[3] += alpha * ((narrow ? 1 : 0) + ea) / ((narrow ? 1 : 0) + mixed);
      block_sums[4] += (narrow ? mean[l] : top[l]) * inverse + (narrow ? log1pf(mixed) : logf(mixed));
    }
    hold += block_sums[0];
    fail += block_sums[1];
    open += block_sums[2];
    tpm += block_sums[3];
    log_z += block_sums[4];
  }
  const double found[5] = {hold, fail, open, tpm, log_z};
  for (int k = 0; k < 5; ++k) out[k] = found[k];
}

// So many Adam steps on -L/beta from p_ref, with KL(pi || p*) = log E_pi[e^x] looked at before each.
// log_ref, t: [n, num]; out: the logits [n, num] and the last KL [num].
void adam(const float* log_ref, const float* t, int n, int64_t num, int steps, float rate,
          float* logits, float* kl) {
  constexpr float b1 = 0.9f, b2 = 0.999f, epsilon = 1e-8f;
#pragma omp parallel for
  for (int64_t block = 0; block < num / kLanes; ++block) {
    alignas(64) static thread_local float q[1024][kLanes], s[1024][kLanes], r[1024][kLanes];
    alignas(64) static thread_local float m[1024][kLanes], v[1024][kLanes], z[1024][kLanes];
    alignas(64) static thread_local float pi[1024][kLanes];
    const int64_t first = block * kLanes;
    for (int i = 0; i < n; ++i)
      for (int l = 0; l < kLanes; ++l) {
        r[i][l] = log_ref[i * num + first + l];
        s[i][l] = t[i * num + first + l];
        z[i][l] = r[i][l];
        m[i][l] = v[i][l] = 0;
      }
    float p1 = 1, p2 = 1;
    for (int step = 0; step <= steps; ++step) {
      alignas(64) float top[kLanes], sum[kLanes]{}, mean[kLanes]{}, grown[kLanes]{};
      for (int l = 0; l < kLanes; ++l) top[l] = -1e30f;
      for (int i = 0; i < n; ++i)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) top[l] = std::max(top[l], z[i][l]);
      for (int i = 0; i < n; ++i)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          z[i][l] -= top[l];
          pi[i][l] = exp_above(z[i][l]);
          sum[l] += pi[i][l];
        }
      for (int l = 0; l < kLanes; ++l) top[l] = logf(sum[l]), sum[l] = 1 / sum[l];
      for (int i = 0; i < n; ++i)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          pi[i][l] *= sum[l];
          q[i][l] = s[i][l] - (z[i][l] - top[l] - r[i][l]);
          mean[l] += pi[i][l] * q[i][l];
        }
      p1 *= b1, p2 *= b2;
      const float c1 = 1 / (1 - p1), c2 = 1 / (1 - p2);
      for (int i = 0; i < n; ++i)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          const float x = q[i][l] - mean[l], g = -pi[i][l] * x;
          // e^x - 1 - x, where it does not cancel: near the optimum the sum is of second order
          const float near = x * x * (0.5f + x * (1 / 6.0f + x * (1 / 24.0f + x * (1 / 120.0f))));
          grown[l] += pi[i][l] * (fabsf(x) < 0.25f ? near : exp_above(std::min(x, 80.0f)) - 1 - x);
          m[i][l] = b1 * m[i][l] + (1 - b1) * g;
          v[i][l] = b2 * v[i][l] + (1 - b2) * g * g;
          if (step < steps) z[i][l] -= rate * c1 * m[i][l] / (sqrtf(c2 * v[i][l]) + epsilon);
        }
      for (int l = 0; l < kLanes; ++l) kl[first + l] = log1pf(grown[l]);
    }
    for (int i = 0; i < n; ++i)
      for (int l = 0; l < kLanes; ++l) logits[i * num + first + l] = z[i][l];
  }
}
}
