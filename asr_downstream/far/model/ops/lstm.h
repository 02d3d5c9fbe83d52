// One direction of an LSTM head over a block of sequences, at inference, in vectors of the compiler (GCC, clang).
//
// No torch in here: tests/far/lstm_driver.cpp runs it under sanitizers. Sums are of single precision for every type of
// the tensors. Vectors hold neighbouring units: the four gates of LANES units lie side by side in weights and sums, so
// that a tile of ROWS sequences by 4 vectors stays in registers from the products to the new state. What pads the last
// vector of a direction is computed and never read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

namespace asr_lstm {

#if defined(LSTM_LANES)  // for tests: other sizes than those of the processor
constexpr int64_t LANES = LSTM_LANES, ROWS = LSTM_ROWS;
#elif defined(__AVX512F__)
constexpr int64_t LANES = 16, ROWS = 6;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, ROWS = 3;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, ROWS = 6;
#else
constexpr int64_t LANES = 4, ROWS = 3;
#endif
constexpr int64_t GATES = 4, GROUP = GATES * LANES;  // a group: the gates of LANES units
constexpr int64_t BLOCK = 2 * ROWS + 2;              // sequences at once: they share the loads of the weights
constexpr int64_t CHUNK = 48;                        // rows whose products with the inputs are made at once

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
#define ALWAYS inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

static ALWAYS Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
static ALWAYS void store(float* to, Vector value) { std::memcpy(to, &value, sizeof(value)); }
// Keeps a value in a register: compilers would load it again for each of its uses, and loads are what is scarce.
static ALWAYS void in_register([[maybe_unused]] Vector& value) {
#if defined(LSTM_LANES)  // may be wider than a register
#elif defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}
static ALWAYS Vector all(float value) { return value - Vector{}; }

// tanh(x) == top / bottom for |x| <= 9 to 2.1e-8, and 1 - tanh(9) is 3e-8. NaN stays: comparisons with it are false.
struct Fraction {
  Vector top, bottom;
};
static ALWAYS Fraction tanh_of(Vector x) {
  x = x > all(9.f) ? all(9.f) : x;
  x = x < all(-9.f) ? all(-9.f) : x;
  const Vector s = x * x;
  Vector top = s * 1.3354671924e-08f + 2.0609089709e-05f;
  Vector bottom = s * 7.7765625546e-07f + 3.2856355359e-04f;
  top = top * s + 3.4955885538e-03f;
  bottom = bottom * s + 2.5876983778e-02f;
  top = top * s + 1.3381025983e-01f;
  bottom = bottom * s + 4.6714341574e-01f;
  top = top * s + 9.9999997945e-01f;
  bottom = bottom * s + 1.f;
  return {top * x, bottom};
}

// New states from the sums of the gates i, f, g, o; those of the sigmoids i, f, o come halved, as the weights are
// packed: sigmoid(x) == (1 + tanh(x / 2)) / 2. One division for the cell and one for the state.
static ALWAYS Vector cell_step(const Vector* sums, Vector& cell) {
  const Fraction i = tanh_of(sums[0]), f = tanh_of(sums[1]), g = tanh_of(sums[2]), o = tanh_of(sums[3]);
  const Vector ig = i.bottom * g.bottom;
  cell = (0.5f * ((f.bottom + f.top) * cell * ig + (i.bottom + i.top) * g.top * f.bottom)) / (f.bottom * ig);
  const Fraction c = tanh_of(cell);
  return 0.5f * ((o.bottom + o.top) * c.top) / (o.bottom * c.bottom);
}

// sums[u][r] += weights of group u times row r; weights of a group: (depth, GROUP).
template <int R, int U>
static ALWAYS void multiply(Vector (&sums)[U][R][GATES], const float* weight, int64_t next, const float* const* rows,
                            int64_t depth) {
  for (int64_t k = 0; k < depth; k++)
    UNROLLED
    for (int u = 0; u < U; u++)
      UNROLLED
      for (int gate = 0; gate < GATES; gate++) {
        Vector w = load(weight + u * next + k * GROUP + gate * LANES);
        if (R > 1) in_register(w);
        UNROLLED
        for (int r = 0; r < R; r++) sums[u][r][gate] += rows[r][k] * w;
      }
}

template <int N>
using Size = std::integral_constant<int, N>;

// Call with the number of rows of a tile, up to ROWS, as a constant.
template <typename Call>
static ALWAYS void sized(int64_t rows, Call call) {
  switch (rows) {
    case 1: return call(Size<1>());
    case 2: return call(Size<2>());
    case 3: return call(Size<3>());
    case 4: return call(Size<4>());
    case 5: return call(Size<5>());
    case 6: return call(Size<6>());
  }
}

// Rows of the next tile: as even as can be, since a lone row is slow.
static ALWAYS int64_t tile(int64_t left) { return left <= ROWS ? left : left < 2 * ROWS ? (left + 1) / 2 : ROWS; }

// Weights of a direction as PyTorch stores them: gates i, f, g, o, each of ``width`` rows.
template <typename T>
struct Direction {
  const T *weight_ih, *weight_hh, *bias_ih, *bias_hh;
  int64_t width, inputs;
  bool reverse;
  int64_t groups() const { return (width + LANES - 1) / LANES; }
};

// Buffers of a thread, for directions up to a size.
class Workspace {
 public:
  Workspace(int64_t groups, int64_t width, int64_t inputs) {
    const int64_t sizes[] = {groups * inputs * GROUP, groups * width * GROUP,       groups * GROUP,
                             groups * most() * GROUP, most() * inputs,              3 * BLOCK * groups * LANES};
    int64_t total = 0, starts[6];
    for (int n = 0; n < 6; n++) {
      starts[n] = total;
      total += (sizes[n] + 15) / 16 * 16;
    }
    memory_.reset(new float[total + 16]);
    float* base = memory_.get() + (16 - reinterpret_cast<uintptr_t>(memory_.get()) / 4 % 16) % 16;
    float** names[] = {&weight_ih, &weight_hh, &bias, &sums, &tokens, &state};
    for (int n = 0; n < 6; n++) *names[n] = base + starts[n];
  }
  static constexpr int64_t most() { return CHUNK > BLOCK ? CHUNK : BLOCK; }
  float *weight_ih, *weight_hh, *bias, *sums, *tokens, *state;

 private:
  std::unique_ptr<float[]> memory_;
};

static ALWAYS float scale_of(int64_t gate) { return gate == 2 ? 1.f : 0.5f; }

typedef float Quad __attribute__((vector_size(16)));

static ALWAYS Quad four(const float* from) {
  Quad value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
template <typename T>
static ALWAYS Quad four(const T* from) {
  return Quad{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]),
              static_cast<float>(from[3])};
}

// Rows (4 width, depth) -> (groups, depth, GROUP), transposed by squares of 4; the sums of the sigmoids are halved.
template <typename T>
void pack(const T* from, int64_t width, int64_t depth, float* to) {
  for (int64_t first = 0; first < width; first += LANES, to += depth * GROUP)
    for (int64_t gate = 0; gate < GATES; gate++) {
      const float scale = scale_of(gate);
      for (int64_t lane = 0; lane < LANES; lane += 4) {
        const int64_t unit = first + lane, rows = std::clamp<int64_t>(width - unit, 0, 4);
        const T* row = from + (gate * width + unit) * depth;
        float* column = to + gate * LANES + lane;
        int64_t k = 0;
        if (rows == 4)
          for (; k + 4 <= depth; k += 4) {
            Quad a[4];
            UNROLLED
            for (int r = 0; r < 4; r++) a[r] = four(row + r * depth + k);
            const Quad ab = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5);
            const Quad cd = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
            const Quad ef = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
            const Quad gh = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
            const Quad columns[] = {
                __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                __builtin_shufflevector(ef, gh, 0, 1, 4, 5), __builtin_shufflevector(ef, gh, 2, 3, 6, 7)};
            for (int n = 0; n < 4; n++) {
              const Quad scaled = columns[n] * scale;
              std::memcpy(column + (k + n) * GROUP, &scaled, sizeof(scaled));
            }
          }
        for (; k < depth; k++)
          for (int64_t r = 0; r < 4; r++)
            column[k * GROUP + r] = r < rows ? scale * static_cast<float>(row[r * depth + k]) : 0.f;
      }
    }
}

template <typename T>
void pack(const Direction<T>& d, Workspace& space) {
  pack(d.weight_ih, d.width, d.inputs, space.weight_ih);
  pack(d.weight_hh, d.width, d.width, space.weight_hh);
  float* to = space.bias;
  for (int64_t first = 0; first < d.width; first += LANES)
    for (int64_t gate = 0; gate < GATES; gate++)
      for (int64_t unit = first; unit < first + LANES; unit++) {
        const int64_t row = gate * d.width + unit;
        *to++ = unit < d.width
                    ? scale_of(gate) * (static_cast<float>(d.bias_ih[row]) + static_cast<float>(d.bias_hh[row]))
                    : 0.f;
      }
}

// Sums of the gates of a group over R rows of inputs, from the bias on.
template <int R>
static void project(const float* weight, const float* bias, const float* const* rows, int64_t depth, float* to) {
  Vector sums[1][R][GATES];
  UNROLLED
  for (int gate = 0; gate < GATES; gate++)
    UNROLLED
    for (int r = 0; r < R; r++) sums[0][r][gate] = load(bias + gate * LANES);
  multiply<R, 1>(sums, weight, 0, rows, depth);
  UNROLLED
  for (int r = 0; r < R; r++)
    UNROLLED
    for (int gate = 0; gate < GATES; gate++) store(to + r * GROUP + gate * LANES, sums[0][r][gate]);
}

template <typename T>
static ALWAYS void write(T* to, Vector value, int64_t count) {
  float lanes[LANES];
  store(lanes, value);
  for (int64_t n = 0; n < count; n++) to[n] = static_cast<T>(lanes[n]);
}

// A step of R sequences and U groups. ``hidden`` and ``cell``: of the sequences, ``stride`` apart.
template <int R, int U, typename T>
static void advance(const float* weight, int64_t width, const float* sums_in, int64_t next, const float* before,
                    float* hidden, float* cell, int64_t stride, T* const* out, int64_t left) {
  Vector sums[U][R][GATES];
  const float* rows[R];
  UNROLLED
  for (int r = 0; r < R; r++) rows[r] = before + r * stride;
  UNROLLED
  for (int u = 0; u < U; u++)
    UNROLLED
    for (int r = 0; r < R; r++)
      UNROLLED
      for (int gate = 0; gate < GATES; gate++) sums[u][r][gate] = load(sums_in + u * next + r * GROUP + gate * LANES);
  multiply<R, U>(sums, weight, width * GROUP, rows, width);
  UNROLLED
  for (int u = 0; u < U; u++)
    UNROLLED
    for (int r = 0; r < R; r++) {
      const int64_t at = r * stride + u * LANES;
      Vector c = load(cell + at);
      const Vector h = cell_step(sums[u][r], c);
      store(cell + at, c);
      store(hidden + at, h);
      const int64_t count = std::min(LANES, left - u * LANES);
      if (std::is_same<T, float>::value && count == LANES)
        store(reinterpret_cast<float*>(out[r] + u * LANES), h);
      else
        write(out[r] + u * LANES, h, count);
    }
}

// Run a packed direction over ``count`` <= BLOCK sequences of ``length`` tokens.
template <typename T>
void run(const Direction<T>& d, Workspace& space, const T* x, int64_t x_sequence, int64_t x_token, int64_t count,
         int64_t length, T* out, int64_t out_sequence, int64_t out_token) {
  const int64_t groups = d.groups(), units = groups * LANES, steps = std::max<int64_t>(1, CHUNK / count);
  float *before = space.state, *hidden = before + count * units, *cell = hidden + count * units;
  std::fill(before, before + 3 * count * units, 0.f);
  for (int64_t start = 0; start < length; start += steps) {
    const int64_t here = std::min(steps, length - start), rows = here * count;
    const float* row[CHUNK > BLOCK ? CHUNK : BLOCK];
    for (int64_t step = 0; step < here; step++)
      for (int64_t b = 0; b < count; b++) {
        const int64_t t = d.reverse ? length - 1 - start - step : start + step, m = step * count + b;
        const T* from = x + b * x_sequence + t * x_token;
        if constexpr (std::is_same<T, float>::value) {
          row[m] = from;
        } else {
          float* to = space.tokens + m * d.inputs;
          for (int64_t k = 0; k < d.inputs; k++) to[k] = static_cast<float>(from[k]);
          row[m] = to;
        }
      }
    for (int64_t u = 0; u < groups; u++)
      for (int64_t m = 0, n; m < rows; m += n) {
        n = tile(rows - m);
        const float *weight = space.weight_ih + u * d.inputs * GROUP, *bias = space.bias + u * GROUP;
        float* to = space.sums + (u * rows + m) * GROUP;
        sized(n, [&](auto size) { project<decltype(size)::value>(weight, bias, row + m, d.inputs, to); });
      }
    for (int64_t step = 0; step < here; step++) {
      const int64_t t = d.reverse ? length - 1 - start - step : start + step;
      const bool up = (start + step) % 2 == 0;  // there and back: the last weights are still in the nearest cache
      auto groups_of = [&](int64_t u, auto pair) {
        constexpr int U = decltype(pair)::value;
        for (int64_t b = 0, n; b < count; b += n) {
          n = tile(count - b);
          const float* weight = space.weight_hh + u * d.width * GROUP;
          const float* sums = space.sums + (u * rows + step * count + b) * GROUP;
          const int64_t at = b * units + u * LANES;
          T* to[ROWS];
          for (int64_t r = 0; r < n; r++) to[r] = out + (b + r) * out_sequence + t * out_token + u * LANES;
          sized(n, [&](auto size) {
            constexpr int R = decltype(size)::value;
            if constexpr (U == 1 || R == 1)
              advance<R, U>(weight, d.width, sums, rows * GROUP, before + b * units, hidden + at, cell + at, units, to,
                            d.width - u * LANES);
          });
        }
      };
      if (count == 1) {  // two groups at once: one alone would wait for its own sums
        const int64_t pairs = (groups + 1) / 2;
        for (int64_t n = 0; n < pairs; n++) {
          const int64_t u = 2 * (up ? n : pairs - 1 - n);
          if (u + 1 < groups)
            groups_of(u, Size<2>());
          else
            groups_of(u, Size<1>());
        }
      } else {
        for (int64_t n = 0; n < groups; n++) groups_of(up ? n : groups - 1 - n, Size<1>());
      }
      std::swap(before, hidden);
    }
  }
}

}  // namespace asr_lstm
