// `jaxsim.evaluate` for batches on CPU: the formulas of tilting.py and logspace.py in one pass that
// stays in a core's cache, one instance per vector lane. Built by `jaxsim native`, without fast-math.
//
// A group of lanes goes through its outputs five times; between the passes only per-instance numbers
// and arrays [outputs][lanes] are kept. Names and order follow tilting.py, which says why each
// formula is as it is.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// ---- Vectors of 32 bytes --------------------------------------------------------------------------

template <typename S>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  static constexpr int kMantissa = 23, kBias = 127, kFactorials = 12, kExp = 7, kAtanh = 5;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kShift = 12582912.0f;
  static constexpr float kLeast = -87.0f, kTiny = 0x1p-126f;
};
template <>
struct Vectors<double> {
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t I __attribute__((vector_size(32)));
  static constexpr int kMantissa = 52, kBias = 1023, kFactorials = 19, kExp = 13, kAtanh = 11;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kShift = 6755399441055744.0, kLeast = -708.0, kTiny = 0x1p-1022;
};

constexpr double kLogZero = -1e30;  // stands for the log of no mass
constexpr int kRadix = 16;          // of the levels of a sum

template <typename S>
class Kernel {
  using V = typename Vectors<S>::V;
  using I = typename Vectors<S>::I;
  using C = Vectors<S>;

 public:
  static constexpr int kLanes = 32 / sizeof(S);

  // Inputs, [instances][outputs] if output_stride is 1, else [outputs][instances]; and results.
  struct Task {
    const S *log_a, *log_u, *reward, *logit, *beta;
    int64_t outputs, instances, output_stride;
    S* out[7];  // in the order of Evaluation
  };

  explicit Kernel(const Task& task) : task_(task), scratch_(7 * task.outputs) {}

  // Evaluate instances first … first + kLanes - 1; lanes beyond the last repeat it.
  void group(int64_t first);

 private:
  static V all(double x) { return V{} + static_cast<S>(x); }
  // The second is returned where either is nan.
  static V least(V a, V b) { return a < b ? a : b; }
  static V most(V a, V b) { return a > b ? a : b; }
  static V size(V x) { return x < 0 ? -x : x; }
  static bool any(I mask) {
    bool found = false;
    for (int l = 0; l < kLanes; ++l) found |= mask[l] != 0;
    return found;
  }

  static V power_of_two(I exponent) {
    const I bits = (exponent + C::kBias) << C::kMantissa;
    V value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // Σ_k c(k) x^(k - from) for k = from … to, by Horner's rule.
  template <int from, int to, typename Coefficient>
  static V polynomial(V x, Coefficient) {
    V value = all(Coefficient::at(to));
    if constexpr (to > from) return horner<from, to - 1, Coefficient>(x, value);
    return value;
  }
  template <int from, int k, typename Coefficient>
  static V horner(V x, V value) {
    constexpr double c = Coefficient::at(k);
    value = all(c) + x * value;
    if constexpr (k > from) return horner<from, k - 1, Coefficient>(x, value);
    return value;
  }
  struct Exponential {  // 1/k!
    static constexpr double at(int k) { return k < 2 ? 1 : at(k - 1) / k; }
  };
  struct Bregman {  // (k - 1)/k!
    static constexpr double at(int k) { return (k - 1) * Exponential::at(k); }
  };
  struct Atanh {  // 1/(2k + 1)
    static constexpr double at(int k) { return 1.0 / (2 * k + 1); }
  };

  static V exp(V x) {  // x ≤ 88; zero where the result would be below the normal numbers
    const V kept = most(all(C::kLeast), x);
    const V shifted = kept * all(1.4426950408889634) + all(C::kShift), k = shifted - all(C::kShift);
    const V r = (kept - k * all(C::kLn2High)) - k * all(C::kLn2Low);
    const V value = polynomial<0, C::kExp>(r, Exponential{});
    const V grown = value * power_of_two(__builtin_convertvector(k, I));
    return x < all(C::kLeast) ? V{} : grown;
  }

  static V expm1_narrow(V x) {  // |x| ≤ 1
    return x * polynomial<1, C::kFactorials>(x, Exponential{});
  }

  static V log(V x) {  // x > 0; below the normal numbers as the least of them
    I bits;
    const V kept = most(all(C::kTiny), x);
    std::memcpy(&bits, &kept, sizeof bits);
    const I one = (I{} + C::kBias) << C::kMantissa;
    const I mantissa_bits = (bits & (((I{} + 1) << C::kMantissa) - 1)) | one;
    V m;
    std::memcpy(&m, &mantissa_bits, sizeof m);
    const I halve = m > all(1.4142135623730951);
    m = halve ? m * all(0.5) : m;
    const I exponent = ((bits >> C::kMantissa) - C::kBias) - halve;  // true is -1
    const V k = __builtin_convertvector(exponent, V);
    const V f = m - all(1), s = f / (all(2) + f), s2 = s * s;
    const V tail = polynomial<1, C::kAtanh>(s2, Atanh{});
    const V value = f - s * (f - (s2 + s2) * tail);  // log(1 + f) = f - s (f - 2 s² tail)
    return x == x ? k * all(C::kLn2High) + (k * all(C::kLn2Low) + value) : x;
  }

  static V log1p(V x) {  // x ≥ 0
    const V u = all(1) + x;
    const V lost = x < all(1) ? x - (u - all(1)) : all(1) - (u - x);
    return log(u) + lost / u;
  }

  static V log_sigmoid(V x) { return least(V{}, x) - log1p(exp(-size(x))); }

  static V log_add_exp(V a, V b) {
    return most(a, b) + log1p(exp(-size(a - b)));
  }

  // log(x e^shift), as one logarithm where that loses less.
  static V log_scaled(V x, V shift) {
    const I near = size(shift) < all(30);
    const V one = log(x * exp(near ? shift : V{}));
    return near ? one : shift + log(x);
  }

  // N sums over outputs in levels of 16 terms, so that their error grows as log n.
  template <int N>
  struct Sums {
    V levels[5][N]{};
    int64_t blocks = 0;

    void add(const V* block) {
      for (int k = 0; k < N; ++k) levels[0][k] += block[k];
      int64_t count = ++blocks;
      for (int level = 0; level < 4 && count % kRadix == 0; ++level, count /= kRadix)
        for (int k = 0; k < N; ++k) levels[level + 1][k] += levels[level][k], levels[level][k] = V{};
    }
    V total(int k) const {
      V sum = levels[0][k];
      for (int level = 1; level < 5; ++level) sum += levels[level][k];
      return sum;
    }
  };

  // term(i, s) adds output i to s[0] … s[N - 1].
  template <int N, typename Term>
  Sums<N> sum(Term term) const {
    Sums<N> sums;
    for (int64_t begin = 0; begin < task_.outputs; begin += kRadix) {
      const int64_t end = std::min<int64_t>(begin + kRadix, task_.outputs);
      V block[N]{};
      for (int64_t i = begin; i < end; ++i) term(i, block);
      sums.add(block);
    }
    return sums;
  }

  void load(int64_t first);

  const Task& task_;
  std::vector<V> scratch_;
  V* column(int k) { return scratch_.data() + k * task_.outputs; }
};

template <typename S>
void Kernel<S>::load(int64_t first) {
  const S* inputs[3] = {task_.log_a, task_.log_u, task_.reward};
  const int64_t n = task_.outputs;
  const int real = static_cast<int>(std::min<int64_t>(kLanes, task_.instances - first));
  for (int k = 0; k < 3; ++k) {
    V* into = column(k);
    if (task_.output_stride == 1) {
      for (int l = 0; l < kLanes; ++l) {
        const S* row = inputs[k] + (first + std::min(l, real - 1)) * n;
        for (int64_t i = 0; i < n; ++i) into[i][l] = row[i];
      }
    } else if (real == kLanes) {
      for (int64_t i = 0; i < n; ++i)
        std::memcpy(into + i, inputs[k] + i * task_.output_stride + first, sizeof(V));
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int l = 0; l < kLanes; ++l)
          into[i][l] = inputs[k][i * task_.output_stride + first + std::min(l, real - 1)];
    }
  }
}

template <typename S>
void Kernel<S>::group(int64_t first) {
  load(first);
  const int64_t n = task_.outputs;
  V *log_a = column(0), *log_u = column(1), *reward = column(2), *mass_a = column(3);
  V *mass_u = column(4), *weight_a = column(5), *weight_u = column(6);
  const int real = static_cast<int>(std::min<int64_t>(kLanes, task_.instances - first));
  V logit, beta;
  for (int l = 0; l < kLanes; ++l) {
    logit[l] = task_.logit[first + std::min(l, real - 1)];
    beta[l] = task_.beta[first + std::min(l, real - 1)];
  }
  const V e = exp(-size(logit)), large = all(1) / (all(1) + e), small = e / (all(1) + e);
  const V alpha = logit >= 0 ? large : small, not_alpha = logit >= 0 ? small : large;
  const V log_alpha = log_sigmoid(logit), log_not_alpha = log_sigmoid(-logit);
  const V log_zero = all(kLogZero), infinity = all(__builtin_inf());

  // Masses, and the range of the reward on the support.
  V top = -infinity, bottom = infinity;
  const auto masses = sum<2>([&](int64_t i, V* s) {
    const I in_a = log_a[i] > log_zero, in_u = log_u[i] > log_zero, inside = in_a | in_u;
    log_a[i] = in_a ? log_a[i] : log_zero;
    log_u[i] = in_u ? log_u[i] : log_zero;
    reward[i] = inside ? reward[i] : V{};
    top = most(top, inside ? reward[i] : -infinity);
    bottom = least(bottom, inside ? reward[i] : infinity);
    s[0] += mass_a[i] = exp(log_a[i]);
    s[1] += mass_u[i] = exp(log_u[i]);
  });
  const V total_a = masses.total(0), total_u = masses.total(1);
  const V share_a = alpha / total_a, share_u = not_alpha / total_u;

  // The reward from its mean; the largest exponents.
  const auto below_top = sum<1>([&](int64_t i, V* s) {
    const I inside = most(log_a[i], log_u[i]) > log_zero;
    s[0] += (share_a * mass_a[i] + share_u * mass_u[i]) * (inside ? reward[i] - top : V{});
  });
  const V center = most(bottom, least(top, top + below_top.total(0)));
  const V spread = (top - bottom) / beta;
  const I narrow = spread < all(1);
  const bool some_narrow = any(narrow), some_wide = any(~narrow);
  V peak_a = -infinity, peak_u = -infinity;
  for (int64_t i = 0; i < n; ++i) {
    const I inside = most(log_a[i], log_u[i]) > log_zero;
    const V t = weight_a[i] = (inside ? reward[i] - center : V{}) / beta;
    peak_a = most(peak_a, log_a[i] + t);
    peak_u = most(peak_u, log_u[i] + t);
  }

  // Both components tilted.
  const auto weight = [&](V log_p, V t, V peak) {
    const V exponent = log_p + t, seen = exponent - log_p;
    const V rounding = (log_p - (exponent - seen)) + (t - seen);
    const V value = exp(exponent - peak), half = all(0.5);
    return value + value * (log_p > log_zero ? most(-half, least(half, rounding)) : V{});
  };
  const auto tilted = sum<4>([&](int64_t i, V* s) {
    const V t = weight_a[i];
    if (some_narrow) {
      const V grown = expm1_narrow(narrow ? t : V{});
      s[2] += mass_a[i] * grown;
      s[3] += mass_u[i] * grown;
    }
    s[0] += weight_a[i] = weight(log_a[i], t, peak_a);
    s[1] += weight_u[i] = weight(log_u[i], t, peak_u);
  });
  const V weight_total_a = tilted.total(0), weight_total_u = tilted.total(1);
  const V mean_a = weight_total_a / total_a, mean_u = weight_total_u / total_u;
  const V growth_a = tilted.total(2) / total_a, growth_u = tilted.total(3) / total_u;

  // Δ and log Z.
  V shift{}, log_z_centered{};
  if (some_wide) {
    shift = log_scaled(mean_a / mean_u, peak_a - peak_u);
    log_z_centered = log_add_exp(log_alpha + log_scaled(mean_a, peak_a),
                                 log_not_alpha + log_scaled(mean_u, peak_u));
  }
  if (some_narrow) {
    const V gap = growth_a - growth_u, up = log1p(most(V{}, gap) / (all(1) + growth_u));
    const V down = log1p(most(V{}, -gap) / (all(1) + growth_a));
    shift = narrow ? (gap >= 0 ? up : -down) : shift;
    // log1p of a negative number: from above, as -log1p(-x/(1+x)).
    const V mixed = alpha * growth_a + not_alpha * growth_u;
    const V rise = log1p(most(V{}, mixed));
    const V fall = -log1p(most(V{}, -mixed) / (all(1) + least(V{}, mixed)));
    log_z_centered = narrow ? (mixed >= 0 ? rise : fall) : log_z_centered;
  }
  const V log_tpm_a = log_sigmoid(logit + shift), log_tpm_u = log_sigmoid(-(logit + shift));

  // p*, kept over the weights of A, and its mode.
  const V factor_a = exp(log_tpm_a) / weight_total_a, factor_u = exp(log_tpm_u) / weight_total_u;
  V mode = -infinity, mode_log_a{}, mode_log_u{}, mode_reward{};
  for (int64_t i = 0; i < n; ++i) {
    const V p_star = factor_a * weight_a[i] + factor_u * weight_u[i];
    const I higher = p_star > mode;
    mode = higher ? p_star : mode;
    mode_log_a = higher ? log_a[i] : mode_log_a;
    mode_log_u = higher ? log_u[i] : mode_log_u;
    mode_reward = higher ? reward[i] : mode_reward;
    weight_a[i] = p_star;
  }
  const V log_mode = log(mode), log_ref_mode = log_add_exp(
      log_alpha + mode_log_a - log(total_a), log_not_alpha + mode_log_u - log(total_u));
  const V ratio_at_mode = log_mode - log_ref_mode;

  // KL(p*‖p_ref) in Bregman form, and E_{p*}[r], twice.
  const auto divergence = sum<2>([&](int64_t i, V* s) {
    const I inside = most(log_a[i], log_u[i]) > log_zero;
    const V p_star = weight_a[i], p_ref = share_a * mass_a[i] + share_u * mass_u[i];
    const V above_mode = inside ? reward[i] - mode_reward : V{};
    const V above = inside ? reward[i] - center : V{};
    const V moved = (narrow ? above : above_mode) / beta;
    const V u = narrow ? moved - log_z_centered : moved + ratio_at_mode;
    const I near = size(u) < all(1);
    const V v = near ? u : V{};
    const V bent = p_ref * v * v * polynomial<2, C::kFactorials + 1>(v, Bregman{});
    const V far = (p_star > 0 ? p_star * u : V{}) - p_star + p_ref;
    s[0] += inside ? (near ? bent : far) : V{};
    s[1] += p_star * above_mode;
  });
  const V first_mean = mode_reward + divergence.total(1);
  const auto correction = sum<1>([&](int64_t i, V* s) {
    const I inside = most(log_a[i], log_u[i]) > log_zero;
    s[0] += weight_a[i] * (inside ? reward[i] - first_mean : V{});
  });

  const V results[7] = {center / beta + log_z_centered, log_tpm_a, log_tpm_u, shift,
                        divergence.total(0), first_mean + correction.total(0),
                        center + beta * log_z_centered};
  for (int k = 0; k < 7; ++k)
    for (int l = 0; l < real; ++l) task_.out[k][first + l] = results[k][l];
}

// ---- All cores -------------------------------------------------------------------------------------

// Do chunks 0 … count - 1 on the pool and on this thread. A task that starts when no chunk is left
// returns at once, so that a full pool cannot block this thread.
void in_parallel(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> chunk) {
  struct State {
    std::function<void(int64_t)> chunk;
    std::atomic<int64_t> next{0};
    int64_t count, done = 0;
    std::mutex mutex;
    std::condition_variable finished;
    void work() {
      for (int64_t at; (at = next.fetch_add(1)) < count;) {
        chunk(at);
        const std::lock_guard<std::mutex> lock(mutex);
        if (++done == count) finished.notify_all();
      }
    }
  };
  const auto state = std::make_shared<State>();
  state->chunk = std::move(chunk);
  state->count = count;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t k = 0; k < helpers; ++k) pool.Schedule([state] { state->work(); });
  state->work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == state->count; });
}

template <ffi::DataType D>
ffi::Error evaluate(ffi::ThreadPool pool, bool outputs_first, ffi::Buffer<D> log_a,
                    ffi::Buffer<D> log_u, ffi::Buffer<D> reward, ffi::Buffer<D> logit,
                    ffi::Buffer<D> beta, ffi::ResultBuffer<D> out) {
  using S = ffi::NativeType<D>;
  const auto shape = reward.dimensions();
  if (shape.size() != 2) return ffi::Error::InvalidArgument("jaxsim evaluate: reward is no matrix");
  const int64_t instances = logit.element_count();
  const int64_t outputs = outputs_first ? shape.front() : shape.back();
  if ( outputs < 1 || outputs * instances != static_cast<int64_t>(reward.element_count()) ||
      out->element_count() != static_cast<size_t>(7 * instances))
    return ffi::Error::InvalidArgument("jaxsim evaluate: shapes do not agree");
  typename Kernel<S>::Task task{log_a.typed_data(), log_u.typed_data(), reward.typed_data(),
                                logit.typed_data(), beta.typed_data(), outputs, instances,
                                outputs_first ? instances : 1, {}};
  for (int k = 0; k < 7; ++k) task.out[k] = out->typed_data() + k * instances;
  // Chunks of some 64k elements: long against the cost of handing one out.
  const int64_t lanes = Kernel<S>::kLanes;
  const int64_t groups = (instances + lanes - 1) / lanes;
  const int64_t per_chunk = std::max<int64_t>(1, 65536 / (outputs * lanes));
  in_parallel(pool, (groups + per_chunk - 1) / per_chunk, [&](int64_t at) {
    Kernel<S> kernel(task);
    const int64_t end = std::min(groups, (at + 1) * per_chunk);
    for (int64_t group = at * per_chunk; group < end; ++group) kernel.group(group * lanes);
  });
  return ffi::Error::Success();
}

template <ffi::DataType D>
auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<bool>("outputs_first")
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<D>>()
      .template Arg<ffi::Buffer<D>>()
      .template Ret<ffi::Buffer<D>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsim_evaluate_float32, evaluate<ffi::F32>, binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxsim_evaluate_float64, evaluate<ffi::F64>, binding<ffi::F64>());
